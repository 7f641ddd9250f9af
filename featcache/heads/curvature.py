"""What stands for the Hessian of a softmax regression: for each class a multiple of one Gram matrix."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import softmax

KEPT_BYTES = 300_000_000  # of Cholesky factors
FLOAT32_LOSS = 0.05  # rounding that a factor in float32 may have, twice as fast as one in float64
SPACING = 2.0  # strengths between two factors: the nearer one is at most 1.41 times off
GRAM_ROWS = 2  # rows that a look takes cross-products of, for each feature


class Curvature(Protocol):
    """An approximation of the Hessians of some problems, the same for all folds but for their rows."""

    look_cost: float  # arithmetic operations of a look

    def look(self, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
        """Take the curvature as it is at a model, (K, R) and (K,)."""
        ...

    def solve(
        self,
        fold: NDArray[np.intp],
        strength: NDArray[np.float64],
        weights: NDArray[np.float64],
        bias: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The inverse of each problem's Hessian by a vector, weights (J, K, R) and bias (J, K).

        fold (J,); strength (J, K), what a row counts for in the Hessian of each class.
        """
        ...


class DiagonalCurvature:
    """Centred features whose Gram matrix is diagonal: `norms`, (n_folds, R), of n_rows, (n_folds,)."""

    look_cost = np.inf

    def __init__(self, norms: NDArray[np.float64], n_rows: NDArray[np.int64]) -> None:
        self.norms, self.n_rows = norms, n_rows

    def look(self, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
        """It is taken to be the same everywhere."""

    def solve(
        self,
        fold: NDArray[np.intp],
        strength: NDArray[np.float64],
        weights: NDArray[np.float64],
        bias: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        solved: NDArray[np.float64] = weights / (strength[..., None] * self.norms[fold][:, None] + 1)
        return solved, bias / (strength * self.n_rows[fold][:, None])


class GramCurvature:
    """From some rows, (S, R), that stand for all, and for folds of n_rows, (n_folds,).

    The Hessian of class k is the Gram matrix of the rows [z, 1], each weighted by p_k (1 - p_k). It is taken
    apart into the mean m_k of the rows weighted so, and a covariance V about such means, the same for all
    classes: where these are well separated, the rows that have any weight are few, and vary far less about
    the mean of their class than all rows about theirs. As few rows tell a covariance badly, V is drawn
    towards the Gram matrix of all rows. Before the first look, V is that matrix and m_k is 0.

    Cholesky factors are made for strengths on a grid, when they are first met. Float32 solutions: they
    only steer.
    """

    def __init__(self, sample: NDArray[np.float32], n_rows: NDArray[np.int64], n_classes: int) -> None:
        self.sample, self.n_rows = sample, n_rows
        self.gram = _gram(sample) / len(sample)
        S, R = sample.shape
        # Cross-products, a product with the models, and a factor for each of some strengths.
        self.look_cost = GRAM_ROWS * R**3 + 4.0 * S * R * n_classes + 4 * R**3 / 3
        self._take(self.gram, np.zeros((n_classes, R)))

    def look(self, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
        p = softmax(self.sample @ weights.T.astype(np.float32) + bias.astype(np.float32), axis=1)  # (S, K)
        p *= 1 - p
        p += np.finfo(np.float32).eps
        of_class, of_row = p.sum(axis=0, dtype=np.float64), p.sum(axis=1, dtype=np.float64)
        means = (p.T @ self.sample).astype(np.float64) / of_class[:, None]
        rows, counts = self._draw(of_row)
        scatter = _gram(rows * np.sqrt(counts)[:, None]) - (means.T * of_class) @ means
        effective = of_row.sum() ** 2 / max(np.sum(of_row**2), np.sum(counts.astype(np.float64) ** 2))
        share = len(scatter) / (len(scatter) + effective)
        self._take((1 - share) / of_row.sum() * scatter + share * self.gram, means)

    def solve(
        self,
        fold: NDArray[np.intp],
        strength: NDArray[np.float64],
        weights: NDArray[np.float64],
        bias: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """With s the strength of all rows, w and b of s V w + w + s m (m w + b) = v and s (m w + b) = c are
        (s V + 1)^-1 (v - c m) and c / s - m w."""
        strength = strength * self.n_rows[fold][:, None]
        level = np.rint(np.log(strength) / np.log(SPACING)).astype(int)  # (J, K)
        right = (weights - bias[..., None] * self.means).astype(np.float32)
        solved = np.empty_like(weights)
        for value in np.unique(level):
            which = level == value
            factor = (self._factor(int(value)), True)
            solved[which] = cho_solve(factor, right[which].T, check_finite=False).T
        return solved, bias / strength - np.einsum("jkr,kr->jk", solved, self.means)

    def _take(self, scatter: NDArray[np.float64], means: NDArray[np.float64]) -> None:
        self.scatter, self.means = scatter, means
        self.factors: dict[int, NDArray[np.float32]] = {}

    def _draw(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Some of the rows, the more likely the more they weigh, and what each then counts for."""
        R = self.sample.shape[1]
        least = weights.sum() / (GRAM_ROWS * R)
        drawn = np.random.default_rng(0).random(len(weights)) * least < weights
        return self.sample[drawn], np.maximum(weights[drawn], least).astype(np.float32)

    def _factor(self, level: int) -> NDArray[np.float32]:
        if level not in self.factors:
            R = len(self.scatter)
            while self.factors and (len(self.factors) + 1) * R * R * 4 > KEPT_BYTES:
                del self.factors[next(iter(self.factors))]  # the one made first
            self.factors[level] = _cholesky(self.scatter, SPACING**level)
        return self.factors[level]


def _cholesky(scatter: NDArray[np.float64], strength: float) -> NDArray[np.float32]:
    """The factor of strength * scatter + 1."""
    R, eps = len(scatter), float(np.finfo(np.float32).eps)
    more = 1.0
    while True:
        matrix = scatter * strength
        matrix[np.diag_indices(R)] += more
        # What float32 rounds off may not come near the 1, or the matrix is no longer positive.
        if R * strength * eps < FLOAT32_LOSS:
            matrix = matrix.astype(np.float32)
        try:
            factor: Any = cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)[0]
            return np.asarray(factor, dtype=np.float32)
        except LinAlgError:  # the rounding of the scatter itself is more than 1
            if not np.isfinite(more):
                raise  # the scatter is no number
            more = max(10 * more, strength * eps * float(np.trace(scatter)))


def _gram(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    gram: NDArray[np.float64] = (rows.T @ rows).astype(np.float64)
    return gram
