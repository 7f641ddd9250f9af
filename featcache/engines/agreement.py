"""Whether an engine computes what the reference does, looked at before it is trusted with a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.errors import DeviceError

LOWEST_COSINE = 0.9999
# A vector off by this fraction of its length is off by that angle at most. The cosine alone would not see an
# engine whose vectors are all twice as long.
LARGEST_DIFFERENCE = math.sqrt(1 - LOWEST_COSINE**2)

_NOISE_IMAGES = 4

Vectors = Mapping[str, NDArray[np.float64]]  # {node key: (B, D)}
Samples = Callable[[], NDArray[np.uint8]]  # some images of the run, (any number, S, S, 3)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an engine is from the reference over `images` images, by the node where it is farthest.

    difference: the largest |a - b| / |b| in Euclidean lengths. Both are NaN where either has NaN.
    """

    images: int
    cosine: float
    difference: float

    @property
    def passed(self) -> bool:
        return self.cosine >= LOWEST_COSINE and self.difference <= LARGEST_DIFFERENCE

    def passed_like(self, other: Agreement | None) -> bool:
        """Whether it passed, or is at least as near to the reference as `other` is."""
        nearer = other is not None and (self.cosine >= other.cosine and self.difference <= other.difference)
        return self.passed or nearer

    def to_json(self) -> dict[str, Any]:
        """For the provenance of a store, whose JSON has no NaN."""
        values = {"lowest_cosine": self.cosine, "largest_relative_difference": self.difference}
        return {"images": self.images, **{name: _number(value) for name, value in values.items()}}

    def describe(self) -> str:
        return f"lowest cosine {self.cosine:.6f}, largest difference {self.difference:.1e} of the length"


def _number(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


def compare_engines(engine: Engine, reference: Engine, pixels: NDArray[np.uint8]) -> Agreement:
    """`engine` against `reference` on images (B, S, S, 3), whatever the batch size of each."""
    return compare_vectors(embed_pixels(engine, pixels), embed_pixels(reference, pixels), images=len(pixels))


def require_agreement(
    engine: Engine, *, exact: Engine, reference: Engine, pixels: NDArray[np.uint8]
) -> Agreement:
    """How `engine` agrees with `exact`; DeviceError where it neither passes nor does as `reference` does.

    reference: the eager engine at the precision asked for, and exact in float32; they may be one.
    """
    agreement = compare_engines(engine, exact, pixels)
    like = None if exact is reference else compare_engines(reference, exact, pixels)
    if not agreement.passed_like(like):
        raise DeviceError(
            f"the engine {engine.name} does not compute here what {exact.name} does "
            f"({agreement.describe()}): pass another --engine"
        )
    return agreement


def compare_pixels(engine: Engine, pixels: NDArray[np.uint8], reference: NDArray[np.uint8]) -> Agreement:
    """What `engine` makes of images (B, S, S, 3) against what it makes of nearly the same ones."""
    return compare_vectors(embed_pixels(engine, pixels), embed_pixels(engine, reference), images=len(pixels))


def compare_vectors(found: Vectors, expected: Vectors, *, images: int) -> Agreement:
    """What came of an engine against what the reference has for the same images."""
    pairs = [_compare(found[key], expected[key]) for key in expected]
    return Agreement(
        images=images,
        cosine=float(np.min([cosine for cosine, _ in pairs])),
        difference=float(np.max([difference for _, difference in pairs])),
    )


def probe_pixels(size: int, samples: Samples | None) -> NDArray[np.uint8]:
    """What engines are compared on: noise, and images of the run where there are any."""
    probes = noise(_NOISE_IMAGES, size)
    return probes if samples is None else np.concatenate([probes, samples()])


def noise(count: int, size: int) -> NDArray[np.uint8]:
    """Seeded images (count, size, size, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def embed_pixels(engine: Engine, pixels: NDArray[np.uint8]) -> Vectors:
    """The vectors of images (B, S, S, 3), whatever the engine's batch size."""
    step = engine.batch_size
    parts = [engine.embed(pixels[i : i + step]) for i in range(0, len(pixels), step)]
    return {
        node.key: np.concatenate([part[node.key] for part in parts]).astype(float) for node in engine.nodes
    }


def _compare(found: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, float]:
    """The lowest cosine of a row, and the largest relative difference; two zero vectors agree."""
    lengths = np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1)
    products = lengths[0] * lengths[1]
    same = (found == expected).all(axis=1)
    cosines = np.where(same, 1.0, (found * expected).sum(axis=1) / np.where(products == 0, 1, products))
    apart = np.linalg.norm(found - expected, axis=1)
    differences = np.where(same, 0.0, apart / np.where(lengths[1] == 0, 1, lengths[1]))
    return float(np.min(cosines)), float(np.max(differences))
