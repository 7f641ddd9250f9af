"""Least squares on one-vs-rest targets with a quadratic penalty, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lapack
from sklearn.base import clone

from featcache.heads.base import LinearHead, require_positive
from featcache.heads.closed import ClosedFormSearch, every_fold_knows
from featcache.heads.moments import Moments, take_moments
from featcache.heads.path import PathSearch
from featcache.heads.standardize import Rotation, rotate


class RidgeHead(LinearHead):
    """minimise  ||Z W^T + b - T||^2 + alpha ||W||^2  on standardised features Z, targets T of +1 and -1.

    The intercept, not penalised, is the mean of the targets, since Z is centred, and Z^T T is 2 S, twice the
    sum of Z over the rows of each class. With more rows than features everything comes from Z^T Z = Q L Q^T
    with tridiagonal L, once for every alpha: W^T = 2 Q (L + alpha)^-1 Q^T S. With fewer rows it comes from
    the rotated rows (`Rotation`), whose columns are orthogonal with squared norms s_i: w_i = rows_i . T /
    (s_i + alpha).

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
        for head in heads:
            head.classes_, head.n_features_in_ = heads[0].classes_, heads[0].n_features_in_
        _fit_all(features, codes, heads)
        return heads

    def start_search(
        self, X: ArrayLike, y: ArrayLike, *, fold: NDArray[np.intp], n_folds: int, name: str | None
    ) -> PathSearch | None:
        head = clone(self)
        features, codes = head._check_training(X, y)
        if not _many(features) or name not in ("alpha", None) or not every_fold_knows(codes, fold, n_folds):
            return None
        return ClosedFormSearch(
            head, X, y, fold=fold, n_folds=n_folds, name=name, solve=_solve_moments, cross=True
        )

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        _fit_all(X, codes, [self])

    def _check_params(self) -> None:
        require_positive("alpha", self.alpha)
        require_positive("temperature", self.temperature)

    def _fit_rotated(self, rotation: Rotation, codes: NDArray[np.intp]) -> None:
        self._check_params()
        targets = np.where(codes[:, None] == np.arange(len(self.classes_)), 1.0, -1.0)  # (N, K)
        bias = targets.mean(axis=0)
        weights = (targets - bias).T @ rotation.rows / (rotation.squared_norms + self.alpha)  # (K, rank)
        self.coef_, self.intercept_ = rotation.unrotate(weights, bias)


def _many(X: NDArray[Any]) -> bool:
    """Whether the moments are the shorter way; one feature is not for LAPACK to make tridiagonal."""
    return bool(len(X) > X.shape[1] > 1)


def _fit_all(X: NDArray[Any], codes: NDArray[np.intp], heads: Sequence[RidgeHead]) -> None:
    if _many(X):
        _solve_moments(take_moments(X, codes, n_classes=len(heads[0].classes_), cross=True), heads)
        return
    rotation = rotate(X, keep_float64=True)
    for head in heads:
        head._fit_rotated(rotation, codes)


def _solve_moments(moments: Moments, heads: Sequence[Any]) -> None:
    """Fit ridge heads that differ in alpha on the rows of these moments."""
    for head in heads:
        head._check_params()
    standardizer = moments.standardizer()
    right = 2 * moments.standardised_sums(standardizer).T  # (D, K)
    bias = 2 * moments.counts.sum(axis=0) / moments.n - 1
    penalised = Penalised(moments.standardised_gram(standardizer))
    solutions = penalised.solve(right, [float(head.alpha) for head in heads])
    for head, weights in zip(heads, solutions, strict=True):
        head.coef_, head.intercept_ = standardizer.fold(weights.T, bias)


class Penalised:
    """Solutions of (G + alpha) W = B for many alpha: G, (D, D), is made tridiagonal once, by reflections.

    That is the first third of an eigendecomposition, and the rest is not needed: a tridiagonal system takes
    some D operations for each alpha. (Golub and Van Loan, "Matrix computations", 2013, section 8.3.1.)
    """

    def __init__(self, gram: NDArray[np.float64]) -> None:
        n = len(gram)
        work, _ = lapack.dsytrd_lwork(n, lower=1)
        made, self.diagonal, self.off, self.tau, _ = lapack.dsytrd(
            np.asfortranarray(gram), lower=1, lwork=int(work), overwrite_a=1
        )
        self.reflectors = np.asfortranarray(made[1:, :-1])

    def solve(self, right: NDArray[np.float64], alphas: Sequence[float]) -> list[NDArray[np.float64]]:
        """W, (D, K), of each alpha."""
        inner = self._turn(right, "T")
        # Rounding may leave a tridiagonal matrix that is not positive where alpha is far below its size.
        least = len(self.diagonal) * np.finfo(float).eps * np.abs(self.diagonal).max(initial=0.0)
        solved = []
        for alpha in alphas:
            diagonal, off, failed = lapack.dpttrf(self.diagonal + max(alpha, least), self.off)
            if failed:
                raise ValueError(f"alpha = {alpha:g} is too small for these features; take a larger one")
            solved.append(lapack.dpttrs(diagonal, off, inner)[0])
        return np.split(self._turn(np.concatenate(solved, axis=1), "N"), len(alphas), axis=1)

    def _turn(self, columns: NDArray[np.float64], trans: str) -> NDArray[np.float64]:
        """Q^T ("T") or Q ("N") times these columns; the reflections leave the first row as it is."""
        turned: NDArray[np.float64] = np.array(columns, order="F")
        below, size = np.asfortranarray(turned[1:]), 64 * columns.shape[1]
        turned[1:] = lapack.dormqr("L", trans, self.reflectors, self.tau, below, size, overwrite_c=1)[0]
        return turned
