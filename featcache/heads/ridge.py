"""Least squares on one-vs-rest targets with a quadratic penalty, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from featcache.heads.base import LinearHead, require_positive
from featcache.heads.standardize import Rotation, rotate


class RidgeHead(LinearHead):
    """minimise  ||Z W^T + b - T||^2 + alpha ||W||^2  on standardised features Z, targets T of +1 and -1.

    Rotated to principal axes (`Rotation`) the solution for every alpha is one division: the columns of the
    rotated features are orthogonal with squared norms s_i, and w_i = rows_i . T / (s_i + alpha). The
    intercept, not penalised, is the mean of the targets, since Z is centred.

    Parameters
    ----------
    alpha : strength of the penalty.
    temperature : what the scores are divided by before the softmax that makes them probabilities.
    """

    def __init__(self, alpha: float = 1.0, *, temperature: float = 1.0) -> None:
        self.alpha = alpha
        self.temperature = temperature

    def fit_path(self, X: ArrayLike, y: ArrayLike, *, name: str, values: Sequence[Any]) -> list[Self]:
        if name != "alpha":
            return super().fit_path(X, y, name=name, values=values)
        heads = [clone(self).set_params(alpha=value) for value in values]
        features, codes = heads[0]._check_training(X, y)
        rotation = rotate(features, keep_float64=True)
        for head in heads:
            head.classes_, head.n_features_in_ = heads[0].classes_, heads[0].n_features_in_
            head._fit_rotated(rotation, codes)
        return heads

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        self._fit_rotated(rotate(X, keep_float64=True), codes)

    def _fit_rotated(self, rotation: Rotation, codes: NDArray[np.intp]) -> None:
        require_positive("alpha", self.alpha)
        require_positive("temperature", self.temperature)
        targets = np.where(codes[:, None] == np.arange(len(self.classes_)), 1.0, -1.0)  # (N, K)
        bias = targets.mean(axis=0)
        weights = (targets - bias).T @ rotation.rows / (rotation.squared_norms + self.alpha)  # (K, rank)
        self.coef_, self.intercept_ = rotation.unrotate(weights, bias)
