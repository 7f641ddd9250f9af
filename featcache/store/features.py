"""Features as heads see them: arrays in memory or mapped from a store, rows joined by identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.spec import FeatureNode, FeatureSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """The usable rows of a store. Failed and pending rows are left out of every array alike.

    X: ndarray of shape (n_samples, n_features), float16 or float32: the vectors of `nodes`, one after the
        other; of one node a read-only memory map of the store when every row is usable, otherwise a copy.
    y: int64 ndarray of shape (n_samples,), indices into `classes`, -1 = unlabelled.
    ids: the relative paths, n_samples of them.
    splits: str ndarray of shape (n_samples,), "train", "val", "test" or "" for none.
    sha256: uint8 ndarray of shape (n_samples, 32), of the bytes of each image.
    views: augmented vectors of the same rows, ndarrays of the shape of X; empty unless they were asked for.
    """

    X: NDArray[Any]
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    splits: NDArray[np.str_]
    sha256: NDArray[np.uint8]
    nodes: tuple[FeatureNode, ...]
    spec: FeatureSpec
    views: tuple[NDArray[Any], ...] = ()

    def __len__(self) -> int:
        return len(self.y)
