"""Which rows are trained on, and which are scored. Knows labels and image digests; no features, no heads.

Rows are told apart by the sha256 of the image's bytes, never by position or path: moving a folder, adding
images or listing them in another order leaves every image where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEST_FRACTION = 0.2
NEVER = -1  # the fold of rows that are never held out


def hold_out(sha256: NDArray[np.uint8], y: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """The test rows of data without splits: those whose digest, as a fraction of its range, is below 0.2.

    sha256: uint8 ndarray of shape (n_samples, 32). y: (n_samples,) labels.
    A class with two or more distinct images has one on each side at least: its lowest digest is moved to the
    test rows, or its highest away from them. Rows of identical images are always on one side.
    """
    images, fractions = _images(sha256)
    test: NDArray[np.bool_] = fractions < TEST_FRACTION  # (n_images,)
    for label in np.unique(y):
        members = np.unique(images[y == label])  # in the order of their digests
        if len(members) >= 2 and not test[members].any():
            test[members[0]] = True
        elif len(members) >= 2 and test[members].all():
            test[members[-1]] = False
    held: NDArray[np.bool_] = test[images]
    return held


@dataclass(frozen=True, kw_only=True, eq=False)
class Folds:
    """`fold` is the fold that holds a row out, ndarray of shape (n_samples,), or NEVER."""

    fold: NDArray[np.int64]
    n_folds: int

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """The rows that some fold holds out."""
        some: NDArray[np.bool_] = self.fold != NEVER
        return some


def make_folds(
    sha256: NDArray[np.uint8], y: NDArray[np.integer[Any]], *, seed: int, n_folds: int = 5
) -> Folds:
    """Folds with the classes spread evenly and identical images together.

    There are as many folds as the smallest class has distinct images, between 2 and `n_folds`. A class with
    a single image is always trained on and never held out, since no fold could know it otherwise; with
    nothing but such classes there are no folds (`n_folds` 0).
    """
    images, _ = _images(sha256)
    label_of = np.full(images.max(initial=-1) + 1, -1, dtype=np.int64)
    label_of[images[::-1]] = y[::-1]  # of an image with several labels, that of its first row
    counts = np.bincount(label_of)
    enough = counts[counts >= 2]
    if not len(enough):
        return Folds(fold=np.full(len(y), NEVER), n_folds=0)
    n_folds = int(np.clip(enough.min(), 2, n_folds))
    rng = np.random.default_rng(seed)
    fold_of = np.full(len(label_of), NEVER)
    dealt = 0  # goes on from class to class, so that folds differ by one image at most
    for label in np.flatnonzero(counts >= 2):
        members = rng.permutation(np.flatnonzero(label_of == label))
        fold_of[members] = (dealt + np.arange(len(members))) % n_folds
        dealt += len(members)
    return Folds(fold=fold_of[images], n_folds=n_folds)


def _images(sha256: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The number of each row's image, and each image's digest as a fraction; images in digest order."""
    digests = np.ascontiguousarray(sha256).view("V32").ravel()
    distinct, images = np.unique(digests, return_inverse=True)
    heads = np.frombuffer(distinct.tobytes(), dtype=np.uint8).reshape(-1, 32)[:, :8]
    fractions = np.ascontiguousarray(heads).view(">u8").ravel().astype(np.float64) / 2.0**64
    return images.ravel(), fractions
