"""Which images are trained on, chosen on and scored, and under which classes. Knows labels and digests.

The choice rows are those on which it is chosen which weights to keep: the val split where the data has one
besides what is scored, else some of the training rows, which are not trained on then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.evaluate.splits import Groups, hold_out
from featcache.fitting.rows import choose_rows
from featcache.store.features import FeatureSet
from featcache.words import name_some, plural


@dataclass(frozen=True, kw_only=True, eq=False)
class TuningRows:
    """Indices of images, ascending, and how they are called.

    classes: of the model to be, those of the model to begin with first. y: (n_images,) indices into
    `classes`, -1 for what is unlabelled or of a class that cannot be learned. groups: of all images.
    """

    train: NDArray[np.int64]
    choice: NDArray[np.int64]
    test: NDArray[np.int64]
    classes: tuple[str, ...]
    y: NDArray[np.int64]
    trained_on: str
    chosen_on: str
    scored_on: str
    notes: tuple[str, ...]
    groups: Groups | None = None


def tuning_rows(features: FeatureSet, known: Sequence[str], groups: Groups | None = None) -> TuningRows:
    """Rows as `fit` chooses them, but that val rows do not join the training rows: they are to choose on.

    Where the data has no val split besides what is scored, about a fifth of the training rows is kept for
    that, by content or in whole groups. known: the classes of the model. HeadError: no class in common, or
    too few rows.
    """
    rows = choose_rows(features, groups)
    _require_common(features.classes, known)
    is_choice = features.splits[rows.train] == "val"
    trained_on, chosen_on = "train", f"the {is_choice.sum():,} of the val split"
    if not is_choice.any():
        of_train = groups.take(rows.train) if groups else None
        if of_train:
            of_train = replace(of_train, keys=_second_digest(of_train.keys))
        is_choice = hold_out(_second_digest(features.sha256[rows.train]), features.y[rows.train], of_train)
        whole = plural(len(rows.train), "training row")
        trained_on = f"{rows.trained_on}, but for the choice rows"
        by = f"in whole groups of {groups.by}" if groups else "by content"
        chosen_on = f"{is_choice.sum():,} of the {whole}, kept from training {by}"
    train, choice = rows.train[~is_choice], rows.train[is_choice]
    if not len(choice) or not len(train):
        single = f"training rows in a single group of {groups.by}" if groups else "a single training image"
        raise HeadError(
            f"every class has {single}: none can be kept to choose weights on. Add images, or give some of "
            "them a val split."
        )
    there = {features.classes[k] for k in np.unique(features.y[train])}
    new = [name for name in features.classes if name in there and name not in known]
    classes = (*known, *new)
    place = np.array([classes.index(name) if name in classes else -1 for name in features.classes] + [-1])
    return TuningRows(
        train=train,
        choice=choice,
        test=rows.test,
        classes=classes,
        y=place[features.y],
        trained_on=trained_on,
        chosen_on=chosen_on,
        scored_on=rows.scored_on,
        notes=(
            *_notes(features, known, there, new),
            *_copies(features, train, choice),
            *_crossing(groups, train, choice),
            *_other_notes(rows.notes),
        ),
        groups=groups,
    )


def require_all_classes(rows: TuningRows, known: Sequence[str]) -> None:
    """HeadError for a class of the model of which there are no images to train on."""
    there = set(rows.y[np.concatenate([rows.train, rows.choice])].tolist())
    if lost := [name for place, name in enumerate(known) if place not in there]:
        raise HeadError(
            f"the data has no training image of {name_some(lost)}, which the model knows and would forget: "
            "add images, or pass --forget."
        )


def _require_common(classes: Sequence[str], known: Sequence[str]) -> None:
    if not set(classes) & set(known):
        raise HeadError(
            f"the model knows {name_some(known)}; the data has {name_some(classes)}: no class in common. "
            "Fit a head on this data first: featcache embed, then featcache fit."
        )


def _notes(features: FeatureSet, known: Sequence[str], there: set[str], new: Sequence[str]) -> list[str]:
    notes = []
    if new:
        notes.append(f"classes that the model did not know: {name_some(new)}")
    if forgotten := [name for name in known if name not in there]:
        notes.append(f"no training row has the class {name_some(forgotten)}: it may be forgotten")
    lost = [name for name in features.classes if name not in there and name not in known]
    if lost:
        notes.append(f"no training row has the class {name_some(lost)}, so its rows count as errors")
    return notes


def _copies(features: FeatureSet, train: NDArray[np.int64], choice: NDArray[np.int64]) -> list[str]:
    digests = np.ascontiguousarray(features.sha256).view("V32").ravel()
    shared = int(np.isin(digests[choice], digests[train]).sum())
    if not shared:
        return []
    return [f"{shared:,} of the {len(choice):,} choice rows are images that were also trained on"]


def _crossing(groups: Groups | None, train: NDArray[np.int64], choice: NDArray[np.int64]) -> list[str]:
    """Of a val split, which is kept as it is."""
    if groups is None:
        return []
    mixed = int(np.isin(groups.index[choice], groups.index[train]).sum())
    if not mixed:
        return []
    return [f"{mixed:,} of the {len(choice):,} choice rows share a group of {groups.by} with rows trained on"]


def _other_notes(notes: Sequence[str]) -> list[str]:
    """Of `choose_rows`, what is true here: val rows do not join, and missing classes are told above."""
    return [note for note in notes if not note.startswith(("val rows joined", "not in the training rows"))]


def _second_digest(sha256: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Digests that say nothing of the first ones: by those, rows may have been held out already."""
    digests = [hashlib.sha256(b"val " + row.tobytes()).digest() for row in sha256]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
