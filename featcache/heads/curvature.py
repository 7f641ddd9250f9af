"""What stands for the Hessian of a softmax regression: a matrix of the classes by one of the features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import softmax

from featcache.heads.threads import in_threads
from featcache.processors import usable_processors

KEPT_BYTES = 300_000_000  # of Cholesky factors
FLOAT32_LOSS = 0.05  # rounding that a factor in float32 may have, twice as fast as one in float64
SPACING = 2.0  # strengths between two factors: the nearer one is at most 1.41 times off
LEAST_SPREAD = 1e-2  # of the axis on which classes are told apart least, beside the one of most
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

    Each row [z, 1] has diag(p) - p p^T times its own cross-products in the Hessian. For the sum over the rows
    stands the product of both sums: A, the mean of diag(p) - p p^T, and the cross-products of the rows, each
    weighted by its share of A's trace (as in Martens and Grosse, "Optimizing neural networks with
    Kronecker-factored approximate curvature", ICML 2015). On the axes of A the classes come apart, and each
    axis is a ridge regression at a strength of its own. The weighted rows have the mean m and the covariance
    V about it: where classes are well separated, the rows that have any weight are few, and vary far less
    than all rows. As few rows tell a covariance badly, V is drawn towards the Gram matrix of all rows.

    Before the first look V is that matrix, m is 0, and the classes are taken one by one. A and V are those of
    the model last looked at; a problem scales A by its own trace.

    Cholesky factors are made for strengths on a grid, when they are first met. Float32 solutions: they
    only steer.
    """

    def __init__(self, sample: NDArray[np.float32], n_rows: NDArray[np.int64], n_classes: int) -> None:
        self.sample, self.n_rows = sample, n_rows
        self.gram = _gram(sample) / len(sample)
        S, R = sample.shape
        # Cross-products, a product with the models, the axes of A, and a factor for each of some strengths.
        self.look_cost = GRAM_ROWS * R**3 + 4.0 * S * R * n_classes + 10.0 * n_classes**3 + 4 * R**3 / 3
        self.axes: NDArray[np.float64] | None = None  # of A, (K, K) in columns
        self.spread = np.ones(n_classes)  # A's eigenvalues as parts of its trace
        self._take(self.gram, np.zeros(R))

    def look(self, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
        p = softmax(self.sample @ weights.T.astype(np.float32) + bias.astype(np.float32), axis=1)  # (S, K)
        mean = p.mean(axis=0, dtype=np.float64)
        spread, axes = np.linalg.eigh(np.diag(mean) - (p.T @ p).astype(np.float64) / len(p))
        if spread.sum() > 0:  # where all rows are sure it may be rounding
            self.axes = axes
            self.spread = np.maximum(spread, LEAST_SPREAD * spread[-1]) / spread.sum()
        p *= 1 - p
        p += np.finfo(np.float32).eps
        of_row = p.sum(axis=1, dtype=np.float64)
        centre = (of_row.astype(np.float32) @ self.sample).astype(np.float64) / of_row.sum()
        rows, counts = self._draw(of_row)
        scatter = _gram(rows * np.sqrt(counts)[:, None]) / of_row.sum() - np.outer(centre, centre)
        effective = of_row.sum() ** 2 / max(np.sum(of_row**2), np.sum(counts.astype(np.float64) ** 2))
        share = len(scatter) / (len(scatter) + effective)
        self._take((1 - share) * scatter + share * self.gram, centre)

    def solve(
        self,
        fold: NDArray[np.intp],
        strength: NDArray[np.float64],
        weights: NDArray[np.float64],
        bias: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """With s the strength of all rows, w and b of s V w + w + s m (m w + b) = v and s (m w + b) = c are
        (s V + 1)^-1 (v - c m) and c / s - m w."""
        if self.axes is None:
            return self._solve(strength * self.n_rows[fold][:, None], weights, bias)
        of_trace = 0.5 * strength.sum(axis=1) * self.n_rows[fold]
        found, offset = self._solve(of_trace[:, None] * self.spread, self.axes.T @ weights, bias @ self.axes)
        return self.axes @ found, offset @ self.axes.T

    def _solve(
        self, strength: NDArray[np.float64], weights: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        level = np.rint(np.log(strength) / np.log(SPACING)).astype(int)  # (J, K)
        right = (weights - bias[..., None] * self.mean).astype(np.float32)
        solved = np.empty_like(weights)
        for value, factor in self._factors(np.unique(level)):
            which = level == value
            solved[which] = cho_solve((factor, True), right[which].T, check_finite=False).T
        return solved, bias / strength - solved @ self.mean

    def _take(self, scatter: NDArray[np.float64], mean: NDArray[np.float64]) -> None:
        self.scatter, self.mean = scatter, mean
        self.factors: dict[int, NDArray[np.float32]] = {}

    def _draw(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Some of the rows, the more likely the more they weigh, and what each then counts for."""
        R = self.sample.shape[1]
        least = weights.sum() / (GRAM_ROWS * R)
        drawn = np.random.default_rng(0).random(len(weights)) * least < weights
        return self.sample[drawn], np.maximum(weights[drawn], least).astype(np.float32)

    def _factors(self, levels: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Each level with its factor, those not met before made side by side, a few at a time."""
        R = len(self.scatter)
        most = max(KEPT_BYTES // (R * R * 4), 1)
        for start in range(0, len(levels), most):
            some = [int(level) for level in levels[start : start + most]]
            missing = [level for level in some if level not in self.factors]
            for old in [level for level in self.factors if level not in some]:  # those made first
                if len(self.factors) + len(missing) > most:
                    del self.factors[old]
            made = in_threads(lambda level: _cholesky(self.scatter, SPACING**level), missing)
            self.factors.update(zip(missing, made, strict=True))
            yield from ((level, self.factors[level]) for level in some)


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
    """Cross-products, of a part of the rows on each processor."""
    parts = np.array_split(rows, usable_processors())
    products = in_threads(lambda part: part.T @ part, parts)
    gram: NDArray[np.float64] = np.sum(products, axis=0, dtype=np.float64)
    return gram
