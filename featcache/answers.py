"""What a model says of labelled rows, which are images or their features in a store, and which of them count.

Rows and classes are joined by name. Features are taken from a store only where they are the ones the head
was fitted on. Knows nothing of metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError, SpecMismatch
from featcache.images.identity import ImageFailure
from featcache.images.paths import resolve, show_path
from featcache.inference import ReadyModel
from featcache.model import Model
from featcache.progress import Progress
from featcache.records import SPLITS, Listing
from featcache.spec import FeatureSpec, describe_differences
from featcache.store.reader import FeatureStore
from featcache.words import name_some, plural

ALL = "all"  # no split: every labelled row
ALL_WORDS = "all that have a label"
_ROWS_AT_ONCE = 4096  # of a store, so that the head's own arrays stay small


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledRows:
    """n images: y is (n,) indices into classes, -1 without a label; splits hold "" for none."""

    ids: Sequence[str]
    y: NDArray[np.int64]
    splits: NDArray[np.str_]
    classes: tuple[str, ...]

    def take(self, rows: NDArray[np.int64]) -> LabelledRows:
        ids = [self.ids[row] for row in rows.tolist()]
        return replace(self, ids=ids, y=self.y[rows], splits=self.splits[rows])

    def counts(self) -> dict[str, int]:
        """{class: rows} of the labelled rows, in the order of the classes."""
        found = Counter(self.y[self.y >= 0].tolist())
        return {self.classes[label]: n for label, n in sorted(found.items())}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What is said of n rows.

    probabilities: (n, classes of the model), NaN in rows that failed. sha256: (n, 32), of the bytes of each
    image, zeros where they could not be read. failed: {id: reason}.
    """

    probabilities: NDArray[np.float64]
    sha256: NDArray[np.uint8]
    failed: Mapping[str, str]

    @property
    def given(self) -> NDArray[np.bool_]:
        """The rows that did not fail."""
        given: NDArray[np.bool_] = ~np.isnan(self.probabilities[:, 0])
        return given


class RowSource(Protocol):
    """Where labelled rows come from, and what the model says of some of them."""

    @property
    def rows(self) -> LabelledRows: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def answer(self, chosen: NDArray[np.int64], progress: Progress) -> Answers:
        """chosen: indices of rows, ascending."""


class StoreRows:
    """The usable rows of a store of the features that the model was fitted on."""

    def __init__(self, model: Model, path: Path, *, where: str, views: int) -> None:
        """where: the model file. views: of the store's, to average over."""
        store = FeatureStore.open(path)
        _require_features_of(model, store.spec, where=where, path=path)
        keys = [node.key for node in model.nodes]
        self._model = model
        self._views = [store.features(keys, view=view) for view in range(views)]
        plain = self._views[0]
        self.rows = LabelledRows(ids=plain.ids, y=plain.y, splits=plain.splits, classes=plain.classes)
        failed = len(store.failed_rows())
        self.notes = [f"{plural(failed, 'image')} without features in the store left out"] if failed else []

    def answer(self, chosen: NDArray[np.int64], progress: Progress) -> Answers:
        probabilities = np.zeros((len(chosen), len(self._model.classes)))
        for start in range(0, len(chosen), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            said = [self._model.predict_proba(view.X[chosen[part]]) for view in self._views]
            probabilities[part] = np.mean(said, axis=0)
        return Answers(probabilities=probabilities, sha256=self._views[0].sha256[chosen], failed={})


class ImageRows:
    """The images of a listing, embedded by the model's network while they are answered for."""

    def __init__(
        self, model: Model, listing: Listing, *, load: Callable[[int], ReadyModel], views: int, seed: int
    ) -> None:
        """load: makes the model ready for so many forward passes. views, seed: see `ReadyModel.answer`."""
        number = {name: index for index, name in enumerate(listing.classes)}
        labels = [-1 if record.label is None else number[record.label] for record in listing.records]
        self._model, self._root, self._load = model, listing.root, load
        self._views, self._seed = views, seed
        self.notes = listing.notes
        self.rows = LabelledRows(
            ids=[record.path for record in listing.records],
            y=np.array(labels, dtype=np.int64),
            splits=np.array([record.split or "" for record in listing.records]),
            classes=listing.classes,
        )

    def answer(self, chosen: NDArray[np.int64], progress: Progress) -> Answers:
        ids = [self.rows.ids[row] for row in chosen.tolist()]
        ready = self._load(len(ids) * self._views)
        if ready.said:
            progress.note(ready.said)
        files = [resolve(self._root, path) for path in ids]
        probabilities = np.full((len(ids), len(self._model.classes)), np.nan)
        sha256 = np.zeros((len(ids), 32), dtype=np.uint8)
        failed: dict[str, str] = {}
        done = 0
        progress.start("evaluating", total=len(ids), unit="images")
        for batch in ready.answer(files, views=self._views, seed=self._seed):
            end = done + len(batch.outcomes)
            probabilities[done:end] = batch.probabilities
            digests = b"".join(said.sha256 or bytes(32) for said in batch.outcomes)
            sha256[done:end] = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
            outcomes = zip(ids[done:end], batch.outcomes, strict=True)
            failed |= {path: said.reason for path, said in outcomes if isinstance(said, ImageFailure)}
            progress.advance(len(batch.outcomes))
            done = end
        progress.finish()
        return Answers(probabilities=probabilities, sha256=sha256, failed=failed)


def _require_features_of(model: Model, spec: FeatureSpec, *, where: str, path: Path) -> None:
    """SpecMismatch unless the vectors of the model's nodes are the same; a store may hold others as well."""
    have, want = (replace(one, nodes=model.nodes, views=1) for one in (spec, model.spec))
    said = describe_differences(have, want)
    if not said and not set(model.nodes) <= set(spec.nodes):
        held, needed = (", ".join(node.key for node in nodes) for nodes in (spec.nodes, model.nodes))
        said = f"nodes is {held}, not {needed}"
    if said:
        raise SpecMismatch(
            f"{show_path(path)} holds other features than {where} was fitted on: {said}. Give the folder or "
            "CSV of the images instead, or a store made as the model's was."
        )


def choose_split(rows: LabelledRows, asked: str | None, *, data: str) -> tuple[NDArray[np.int64], str]:
    """Indices of the labelled rows of a split, and what they are called.

    asked: one of `SPLITS` or ALL; None for test where there is one, else val, else all. DataError where there
    are none.
    """
    labelled = rows.y >= 0
    if not labelled.any():
        raise DataError(
            f"{data} has no labels, so there is nothing to compare answers with. Give each class a folder of "
            "its own, or use `featcache predict`."
        )
    counts = Counter(rows.splits[labelled].tolist())
    split = asked or next((name for name in ("test", "val") if counts[name]), ALL)
    if split == ALL:
        return np.flatnonzero(labelled), ALL_WORDS
    if not counts[split]:
        have = ", ".join(f"{counts[name]:,} in {name}" for name in SPLITS if counts[name])
        raise DataError(
            f"{data} has no labelled images in the split {split} ({have or 'it has no splits'}): choose "
            "another --split."
        )
    return np.flatnonzero(labelled & (rows.splits == split)), split


def join_classes(model: Model, rows: LabelledRows, *, where: str, data: str) -> tuple[str, ...]:
    """The classes of the data, and those of the model that it lacks; DataError where they share none."""
    there = rows.counts()
    if not there.keys() & set(model.classes):
        raise DataError(
            f"{where} knows none of the classes of {data}: it knows {name_some(model.classes)}, and the data "
            f"has {name_some(list(there))}. Classes are compared by name."
        )
    own = set(rows.classes)
    return (*rows.classes, *(name for name in model.classes if name not in own))


def spread(model: Model, probabilities: NDArray[np.float64], classes: Sequence[str]) -> NDArray[np.float64]:
    """(n, len(classes)): the model's columns in their places, 0 for a class it does not know."""
    place = {name: column for column, name in enumerate(classes)}
    table = np.zeros((len(probabilities), len(classes)))
    table[:, [place[name] for name in model.classes]] = probabilities
    return table
