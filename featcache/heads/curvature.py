"""What stands for the Hessian of a softmax regression: a multiple of the Gram matrix for each class."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

KEPT_BYTES = 300_000_000  # of Cholesky factors
FLOAT32_LOSS = 0.05  # rounding that a factor in float32 may have, twice as fast as one in float64
SPACING = 2.0  # strengths between two factors: the nearer one is at most 1.41 times off


class Curvature(Protocol):
    def solve(
        self, fold: NDArray[np.intp], strength: NDArray[np.float64], vectors: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(strength Gram + 1)^-1 v for the Gram matrix of each problem's fold.

        fold (J,), strength (J, K), vectors (J, K, R).
        """
        ...


class DiagonalCurvature:
    """Features whose Gram matrix is diagonal: `norms` of shape (n_folds, R)."""

    def __init__(self, norms: NDArray[np.float64]) -> None:
        self.norms = norms

    def solve(
        self, fold: NDArray[np.intp], strength: NDArray[np.float64], vectors: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        solved: NDArray[np.float64] = vectors / (strength[..., None] * self.norms[fold][:, None] + 1)
        return solved


class GramCurvature:
    """One correlation matrix (R, R) for all folds, times the rows of each (n_folds,).

    Cholesky factors are made for strengths on a grid, when they are first met. Float32 solutions: they
    only steer.
    """

    def __init__(self, correlation: NDArray[np.float64], n_rows: NDArray[np.int64]) -> None:
        self.correlation, self.n_rows = correlation, n_rows
        self.factors: dict[int, NDArray[np.float32]] = {}

    def solve(
        self, fold: NDArray[np.intp], strength: NDArray[np.float64], vectors: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        level = np.rint(np.log(strength * self.n_rows[fold][:, None]) / np.log(SPACING)).astype(int)  # (J, K)
        solved = np.empty_like(vectors)
        for value in np.unique(level):
            which = level == value
            right = vectors[which].astype(np.float32)  # (M, R)
            solved[which] = cho_solve((self._factor(int(value)), True), right.T, check_finite=False).T
        return solved

    def _factor(self, level: int) -> NDArray[np.float32]:
        if level not in self.factors:
            R = len(self.correlation)
            while self.factors and (len(self.factors) + 1) * R * R * 4 > KEPT_BYTES:
                del self.factors[next(iter(self.factors))]  # the one made first: strengths only rise
            matrix = self.correlation * SPACING**level
            matrix[np.diag_indices(R)] += 1
            # What float32 rounds off may not come near the 1, or the matrix is no longer positive.
            if R * SPACING**level * np.finfo(np.float32).eps < FLOAT32_LOSS:
                matrix = matrix.astype(np.float32)
            factor: Any = cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)[0]
            self.factors[level] = factor.astype(np.float32)
        return self.factors[level]
