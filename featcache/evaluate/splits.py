"""Which rows are trained on, and which are scored. Knows labels, digests and groups; no features, no heads.

Rows are told apart by the sha256 of the image's bytes, never by position or path: moving a folder, adding
images or listing them in another order leaves every image where it was. What is on one side together, rows of
one image or of images in one group, is a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TEST_FRACTION = 0.2
NEVER = -1  # the fold of rows that are never held out


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Rows that belong together. `index` is the group of each row, (n_samples,), from 0; `by` says of what.

    keys: uint8 ndarray of shape (n_groups, 32), what each group is told by, whatever else there is.
    """

    index: NDArray[np.int64]
    keys: NDArray[np.uint8]
    by: str

    def take(self, rows: NDArray[np.int64]) -> Groups:
        """The groups of some of the rows."""
        kept, index = np.unique(self.index[rows], return_inverse=True)
        return Groups(index=index.astype(np.int64), keys=self.keys[kept], by=self.by)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Units:
    """`index` is the unit of each row; `fraction`, for each unit, where its key lies in the range of keys."""

    index: NDArray[np.int64]
    fraction: NDArray[np.float64]

    def of_class(self, y: NDArray[np.integer[Any]], label: int) -> NDArray[np.int64]:
        """The units that hold rows of this class, by ascending fraction."""
        members = np.unique(self.index[y == label])
        ascending: NDArray[np.int64] = members[np.argsort(self.fraction[members], kind="stable")]
        return ascending


def hold_out(
    sha256: NDArray[np.uint8], y: NDArray[np.integer[Any]], groups: Groups | None = None
) -> NDArray[np.bool_]:
    """The test rows of data without splits: those whose digest, as a fraction of its range, is below 0.2.

    sha256: uint8 ndarray of shape (n_samples, 32). y: (n_samples,) labels. With `groups`, the key of the
    group stands for the digests of its images.
    A class with two or more units has one on each side: its lowest is moved to the test rows, or its highest
    away from them, unless another class would lose its last training row by that. A group that alone has a
    class is trained on.
    """
    units = _units(sha256, groups)
    test: NDArray[np.bool_] = units.fraction < TEST_FRACTION
    for label in np.unique(y):
        members = units.of_class(y, label)
        if test[members].all() and (len(members) >= 2 or groups is not None):
            test[members[-1]] = False
    for label in np.unique(y):
        members = units.of_class(y, label)
        if len(members) >= 2 and not test[members].any():
            free = [unit for unit in members if _others_remain(unit, units, y, test)]
            if free:
                test[free[0]] = True
    held: NDArray[np.bool_] = test[units.index]
    return held


def _others_remain(unit: int, units: _Units, y: NDArray[np.integer[Any]], test: NDArray[np.bool_]) -> bool:
    """Whether every class of a unit would still have training rows without it."""
    left = ~test[units.index] & (units.index != unit)
    return bool(np.isin(y[units.index == unit], y[left]).all())


@dataclass(frozen=True, kw_only=True, eq=False)
class Folds:
    """`fold` is the fold that holds a row out, ndarray of shape (n_samples,), or NEVER.

    unit: (n_samples,), rows of one number are one image or group; None where that is not known. lack: why
    there are no folds, where there are none.
    """

    fold: NDArray[np.int64]
    n_folds: int
    unit: NDArray[np.int64] | None = None
    lack: str = "no row can be held out"

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """The rows that some fold holds out."""
        some: NDArray[np.bool_] = self.fold != NEVER
        return some


def make_folds(
    sha256: NDArray[np.uint8],
    y: NDArray[np.integer[Any]],
    *,
    seed: int,
    n_folds: int = 5,
    groups: Groups | None = None,
) -> Folds:
    """Folds with the classes spread evenly and units whole.

    There are as many folds as the class with the fewest units has, between 2 and `n_folds`. A unit that alone
    has a class is always trained on and never held out, since no fold could know that class otherwise; with
    fewer than two folds that hold rows out there are none (`n_folds` 0).
    """
    units = _units(sha256, groups)
    n_units = len(units.fraction)
    if groups is None:  # of an image with several labels, that of its first row
        pairs = _first_label(y, units.index, n_units)
    else:
        pairs = np.unique(np.stack([y, units.index], axis=1), axis=0)  # (class, unit), once each
    alone = np.bincount(pairs[:, 0])[pairs[:, 0]] == 1
    never = np.unique(pairs[alone, 1])
    pairs = pairs[~np.isin(pairs[:, 1], never)]
    counts = np.bincount(pairs[:, 0])
    if len(np.unique(pairs[:, 1])) < 2:
        if groups is None:
            lack = "every class has a single image"
        elif alone.all():
            lack = "every class lies in a single group"
        else:
            lack = "fewer than two groups could be held out without the loss of a class"
        return Folds(fold=np.full(len(y), NEVER), n_folds=0, unit=units.index, lack=lack)
    n_folds = int(np.clip(counts[counts > 0].min(), 2, n_folds))
    rng = np.random.default_rng(seed)
    if groups is None:
        fold_of = _deal(pairs, n_units, n_folds, rng)
    else:
        fold_of = _balance(units.index, y, np.unique(pairs[:, 1]), n_folds, rng)
    return Folds(fold=fold_of[units.index], n_folds=n_folds, unit=units.index)


def _first_label(y: NDArray[np.integer[Any]], index: NDArray[np.int64], n_units: int) -> NDArray[np.int64]:
    label_of = np.full(n_units, -1, dtype=np.int64)
    label_of[index[::-1]] = y[::-1]
    return np.stack([label_of, np.arange(n_units)], axis=1)


def _deal(
    pairs: NDArray[np.int64], n_units: int, n_folds: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The fold of each unit of one class: each class in turn, in an order drawn at random."""
    fold_of = np.full(n_units, NEVER)
    dealt = 0  # goes on from class to class, so that folds differ by one image at most
    for label in np.unique(pairs[:, 0]):
        members = rng.permutation(pairs[pairs[:, 0] == label, 1])
        fold_of[members] = (dealt + np.arange(len(members))) % n_folds
        dealt += len(members)
    return fold_of


def _balance(
    index: NDArray[np.int64],
    y: NDArray[np.integer[Any]],
    units: NDArray[np.int64],
    n_folds: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """The fold of each unit of any size and classes: the largest first, to the fold that has least of its."""
    order = np.argsort(index, kind="stable")
    ends = np.searchsorted(index[order], np.arange(index.max() + 2))
    totals = np.bincount(y).astype(np.float64)
    filled = np.zeros((n_folds, len(totals)))
    fold_of = np.full(index.max() + 1, NEVER)
    drawn = rng.permutation(units)
    for unit in drawn[np.argsort(ends[drawn] - ends[drawn + 1], kind="stable")]:
        labels, counts = np.unique(y[order[ends[unit] : ends[unit + 1]]], return_counts=True)
        # The sum over classes of squared shares, but for what is the same for all folds.
        worth = (filled[:, labels] * counts / totals[labels] ** 2).sum(axis=1)
        fold = int(np.lexsort((filled.sum(axis=1), worth))[0])
        fold_of[unit] = fold
        filled[fold, labels] += counts
    return fold_of


def number_units(sha256: NDArray[np.uint8], groups: Groups | None = None) -> NDArray[np.int64]:
    """The unit of each row, (n_samples,), from 0."""
    return _units(sha256, groups).index


def _units(sha256: NDArray[np.uint8], groups: Groups | None) -> _Units:
    """Rows of one image are a unit; with `groups`, all that images or groups tie together. In key order."""
    images, fractions = _images(sha256)
    if groups is None:
        return _Units(index=images, fraction=fractions)
    n_images, n_groups = len(fractions), len(groups.keys)
    ties = coo_array(
        (np.ones(len(images), dtype=bool), (images, n_images + groups.index)),
        shape=(n_images + n_groups, n_images + n_groups),
    )
    part = connected_components(ties, directed=False)[1]
    _, index = np.unique(part[images], return_inverse=True)
    of_group = _fractions(groups.keys)[groups.index]
    fraction = np.ones(index.max(initial=-1) + 1)
    np.minimum.at(fraction, index, of_group)
    return _Units(index=index.astype(np.int64), fraction=fraction)


def _images(sha256: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The number of each row's image, and each image's digest as a fraction; images in digest order."""
    digests = np.ascontiguousarray(sha256).view("V32").ravel()
    distinct, images = np.unique(digests, return_inverse=True)
    return images.ravel(), _fractions(np.frombuffer(distinct.tobytes(), dtype=np.uint8).reshape(-1, 32))


def _fractions(digests: NDArray[np.uint8]) -> NDArray[np.float64]:
    first = np.ascontiguousarray(digests[:, :8]).view(">u8").ravel()
    return first.astype(np.float64) / 2.0**64
