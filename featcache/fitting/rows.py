"""Which rows of a feature set a head is fitted on, and which it is scored on.

Knows labels, splits, digests and groups, and takes features without looking at them; no heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.evaluate.groups import say_alike
from featcache.evaluate.select import TrainingRows
from featcache.evaluate.splits import Groups, hold_out, make_folds
from featcache.store.features import FeatureSet
from featcache.words import name_some, plural

A_FIFTH = 0.025  # shares that are called so differ by no more


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Which rows a head is fitted on and which it is scored on, as indices, and how they are called."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    trained_on: str
    scored_on: str
    notes: tuple[str, ...]
    groups: Groups | None = None  # of all rows


def choose_rows(features: FeatureSet, groups: Groups | None = None) -> Rows:
    """The splits of the data where it has them, else a fifth of the images held out by content.

    groups: of the rows; what is held out here is whole groups, while splits of the data are kept as they are.

    With both a val and a test split, val rows join the training rows, and test is scored. Rows without a
    label are left out, and so are rows without a split where others have one.
    """
    labelled = features.y >= 0
    if not labelled.any():
        raise HeadError(
            "no row has a label, so there is nothing to learn. Embed a folder with one folder a class."
        )
    splits = {name: labelled & (features.splits == name) for name in ("train", "val", "test", "")}
    has = {name: bool(rows.any()) for name, rows in splits.items()}
    if not has["train"] and (has["val"] or has["test"]):
        raise HeadError(
            "the data has no train rows, only "
            f"{' and '.join(name for name in ('val', 'test') if has[name])}. Embed the training images too."
        )
    if has["val"] or has["test"]:
        rows = _keep_splits(splits, features.y, groups)
    else:
        whole = "train split" if has["train"] else "images"
        pool = np.flatnonzero(splits["train" if has["train"] else ""])
        rows = _draw_split(features, pool, groups, whole=whole)
    notes = list(rows.notes)
    if has["train"] and has[""]:
        left = plural(int(splits[""].sum()), "labelled row")
        notes.append(f"{left} without a split {'was' if splits[''].sum() == 1 else 'were'} left out")
    notes += _warn_of(features, rows.train, rows.test, groups)
    return replace(rows, notes=tuple(notes))


def _keep_splits(
    splits: Mapping[str, NDArray[np.bool_]], y: NDArray[np.int64], groups: Groups | None
) -> Rows:
    both = bool(splits["val"].any() and splits["test"].any())
    train = np.flatnonzero(splits["train"] | splits["val"] if both else splits["train"])
    scored_on = "test" if splits["test"].any() else "val"
    if groups and _are_single(groups.index[train], y[train]):
        if alike := say_alike(groups):
            raise HeadError(f"{alike}.")
        raise HeadError(
            f"every class of the training rows lies in a single group of {groups.by}: no group can be held "
            "out to choose a head by. Group by something finer, or leave the grouping away."
        )
    return Rows(
        train=train,
        test=np.flatnonzero(splits[scored_on]),
        trained_on="train and val" if both else "train",
        scored_on=scored_on,
        notes=("val rows joined the training rows; test was scored",) if both else (),
        groups=groups,
    )


def _are_single(group: NDArray[np.int64], y: NDArray[np.int64]) -> bool:
    """Whether every class has one group alone, and there are images that a finer grouping would part."""
    pairs = np.unique(np.stack([y, group], axis=1), axis=0)
    return len(pairs) == len(np.unique(y)) < len(y)


def _draw_split(features: FeatureSet, pool: NDArray[np.int64], groups: Groups | None, *, whole: str) -> Rows:
    """pool: the rows to draw from, called `whole`."""
    held = hold_out(features.sha256[pool], features.y[pool], groups.take(pool) if groups else None)
    train, test = pool[~held], pool[held]
    if not len(test) or not len(train):
        raise HeadError(_nothing_held_out(groups))
    share = held.mean()
    part = "a fifth" if abs(share - 0.2) <= A_FIFTH else f"{100 * share:.0f} %"
    by = f"whole groups of {groups.by}" if groups else "content"
    return Rows(
        train=train,
        test=test,
        trained_on=f"the rest of the {whole}",
        scored_on=f"{part} of the {whole}, held out by {by}",
        notes=(),
        groups=groups,
    )


def _nothing_held_out(groups: Groups | None) -> str:
    if groups:
        if alike := say_alike(groups):
            return f"{alike}."
        return (
            f"every class lies in a single group of {groups.by}: no group can be held out to score the head. "
            "Group by something finer, or give the images train and test splits."
        )
    return (
        "every class has a single image, or there is but one: nothing can be held out to score the head. "
        "Embed more images, or give them train and test splits."
    )


def _warn_of(
    features: FeatureSet, train: NDArray[np.int64], test: NDArray[np.int64], groups: Groups | None
) -> list[str]:
    """What makes the score on `test` mean less than it seems."""
    notes = _say_groups(groups, train, test) if groups else []
    digests = np.ascontiguousarray(features.sha256).view("V32").ravel()
    shared = int(np.isin(digests[test], digests[train]).sum())
    if shared:
        notes.append(f"{shared:,} of the {len(test):,} rows scored are images that were also trained on")
    missing = np.setdiff1d(features.y[test], features.y[train])
    if len(missing):
        names = name_some([features.classes[k] for k in missing])
        notes.append(f"not in the training rows, so counted as errors: {names}")
    return notes


def _say_groups(groups: Groups, train: NDArray[np.int64], test: NDArray[np.int64]) -> list[str]:
    """How many there are, how large, and which of them are on both sides."""
    both_sides = np.intersect1d(groups.index[train], groups.index[test])
    sizes = np.bincount(groups.index[np.concatenate([train, test])])
    there = plural(int((sizes > 0).sum()), "group")
    notes = [f"{there} of {groups.by}, the largest of {plural(int(sizes.max()), 'row')}"]
    if alike := say_alike(groups):
        notes.append(alike)
    if len(both_sides):
        mixed = int(np.isin(groups.index[test], both_sides).sum())
        crossing = f"{plural(len(both_sides), 'group')} {'crosses' if len(both_sides) == 1 else 'cross'}"
        notes.append(
            f"{mixed:,} of the {len(test):,} rows scored share a group of {groups.by} with rows trained on: "
            f"{crossing} the splits of the data, which are kept as they are"
        )
    return notes


def training_rows(features: FeatureSet, rows: Rows, class_weight: Any, *, seed: int) -> TrainingRows:
    """What choosing and fitting may see. HeadError: the training rows hold one class only."""
    known, y = np.unique(features.y[rows.train], return_inverse=True)
    if len(known) < 2:
        raise HeadError(
            f"the training rows hold one class only ({features.classes[known[0]]}). A head tells classes "
            "apart: embed images of another class as well."
        )
    groups = rows.groups.take(rows.train) if rows.groups else None
    return TrainingRows(
        X=take_rows(features.X, rows.train),
        y=y,
        folds=make_folds(features.sha256[rows.train], y, seed=seed, groups=groups),
        views=tuple(take_rows(view, rows.train) for view in features.views),
        weights=loss_weights(class_weight, y),
    )


def loss_weights(class_weight: Any, y: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """The weight of each row in losses, as `class_weight` has it for a head.

    None too where it says nothing that is known here: the head itself takes or refuses it.
    """
    from featcache.heads.base import class_weights

    if class_weight is None:
        return None
    balanced = class_weight == "balanced_subsample"  # of a forest: the same, anew for each tree
    try:
        return class_weights("balanced" if balanced else class_weight, y, n_classes=int(y.max()) + 1)[y]
    except (TypeError, ValueError):
        return None


def take_rows(X: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """These rows of X, ascending: a view where they follow one another, else a copy."""
    together = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    taken: NDArray[Any] = X[rows[0] : rows[-1] + 1] if together else X[rows]
    return taken
