"""Whether an exported file answers as featcache does, looked at before the file gets its name."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import DEFAULT_ENGINE, make_engine
from featcache.errors import ExportError
from featcache.exporting import Answers, Opened
from featcache.exporting.pictures import Pictures
from featcache.exporting.subject import Subject
from featcache.spec import Precision
from featcache.words import plural

LARGEST_DIFFERENCE = 1e-4  # of a probability
TIE = 1e-6  # classes whose probabilities are nearer than this are equally probable

_BATCH = 7  # no power of two and no divisor of what is checked: batches of several sizes are run


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The answers of a file beside featcache's on the same images.

    difference: the largest of a probability. same: images for which both name the same class.
    """

    images: int
    on: str  # the images, in words
    difference: float
    same: int

    @property
    def passed(self) -> bool:
        return self.difference <= LARGEST_DIFFERENCE and self.same == self.images

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "on": self.on,
            "largest_difference": self.difference,
            "same_class": self.same,
        }

    def describe(self) -> str:
        return (
            f"on {self.on} its probabilities are within {self.difference:.1e} of featcache's and it names "
            f"the same class for {self.same} of {self.images}"
        )


@dataclass(frozen=True, kw_only=True)
class Proof:
    """That a file answers as featcache does. notes: what keeps the two apart nevertheless, in words."""

    agreement: Agreement
    notes: tuple[str, ...] = ()


def prove(subject: Subject, opened: Opened, pictures: Pictures, *, rounds: bool) -> Proof:
    """`check`, and how far the file is from `featcache predict`. ExportError: the file answers otherwise."""
    agreement = check(subject, opened, pictures, rounds=rounds)
    apart = apart_from_predict(subject, opened, pictures, rounds=rounds)
    return Proof(agreement=agreement, notes=(apart,) if apart else ())


def check(subject: Subject, opened: Opened, pictures: Pictures, *, rounds: bool) -> Agreement:
    """What the file answers, beside featcache in the arithmetic that the file has. ExportError: it differs.

    rounds: the file keeps the rounding of a float16 store. Of a file that shows its vectors these are
    compared, and then the answers with those that featcache's head gives for the very same vectors.
    """
    found = _in_batches(opened.answers, pictures.pixels)
    vectors = features(subject, pictures, precision="float32", rounded=rounds)
    if opened.vectors:
        vectors = _require_near(_in_batches(opened.vectors, pictures.pixels), vectors, where=subject.where)
    agreement = compare(found, subject.model.predict_proba(vectors), on=pictures.words)
    if not agreement.passed:
        raise ExportError(
            f"the exported file is not {subject.where}: {agreement.describe()}, where {LARGEST_DIFFERENCE:g} "
            "and all of them are asked for. Nothing was written: choose another --to, or fit another head."
        )
    return agreement


def apart_from_predict(subject: Subject, opened: Opened, pictures: Pictures, *, rounds: bool) -> str | None:
    """How far the file is from `featcache predict`, in words, where the two do not compute alike."""
    spec = subject.model.spec
    lost = [f"computes in {spec.compute_dtype}"] if spec.compute_dtype != "float32" else []
    lost += ["rounds features to float16"] if subject.rounds and not rounds else []
    if not lost and not opened.vectors:
        return None
    own = subject.model.predict_proba(features(subject, pictures, precision=spec.compute_dtype, rounded=True))
    apart = compare(_in_batches(opened.answers, pictures.pixels), own, on=pictures.words)
    if not lost and apart.passed:
        return None
    why = (
        f"{' and '.join(lost)} as the store was made, the file does not"
        if lost
        else ("has the same vectors but for rounding errors, of which this head makes steps")
    )
    return (
        f"featcache predict {why}: probabilities differ by up to {apart.difference:.1e} and the class for "
        f"{apart.images - apart.same} of {plural(apart.images, 'image')}"
    )


def _require_near(
    found: NDArray[np.floating[Any]], expected: NDArray[Any], *, where: str
) -> NDArray[np.floating[Any]]:
    """The vectors (N, D) that were found; ExportError where they are not featcache's but for rounding."""
    apart = np.linalg.norm(found - expected.astype(np.float64), axis=1)
    largest = float((apart / np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)).max())
    if not largest <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the exported file is not {where}: its vectors differ by {largest:.1e} of their length. "
            "Nothing was written: choose another --to."
        )
    return found


def features(subject: Subject, pictures: Pictures, *, precision: Precision, rounded: bool) -> NDArray[Any]:
    """featcache's own vectors, (N, D), on the processor. rounded: as the store's dtype is."""
    engine = make_engine(
        subject.backbone,
        nodes=tuple(node.key for node in subject.model.nodes),
        device="cpu",
        precision=precision,
        engine=DEFAULT_ENGINE,
    )
    dtype = subject.model.spec.store_dtype if rounded else "float32"

    def joined(pixels: NDArray[np.uint8]) -> NDArray[Any]:
        vectors = engine.embed(pixels)
        return np.concatenate([vectors[node.key].astype(dtype) for node in subject.model.nodes], axis=1)

    return _in_batches(joined, pictures.pixels, size=engine.batch_size)


def compare(found: NDArray[np.float64], expected: NDArray[np.float64], *, on: str) -> Agreement:
    """Probabilities (N, K) of a file against featcache's; what is not a number agrees with nothing."""
    if found.shape != expected.shape:
        raise ExportError(
            f"the exported file answers with {found.shape}, where {expected.shape} was expected"
        )
    difference = np.abs(found - expected)
    chosen = np.take_along_axis(expected, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    same = chosen >= expected.max(axis=1) - TIE
    return Agreement(
        images=len(found),
        on=on,
        difference=float(np.where(np.isfinite(difference), difference, np.inf).max()),
        same=int(same.sum()),
    )


def _in_batches(answers: Answers, pixels: NDArray[np.uint8], *, size: int = _BATCH) -> NDArray[Any]:
    """The answers for all images; the first one alone."""
    cuts = [0, *range(1, len(pixels), size), len(pixels)]
    return np.concatenate([answers(pixels[a:b]) for a, b in pairwise(cuts)])
