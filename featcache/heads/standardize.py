"""Per-feature standardisation and the rotation that makes linear heads cheap. Arrays only, float64 sums.

Standardisation is per column: one mean and one deviation for all features together would leave the few
features of large variance in charge. Nothing here is applied at prediction: `fold` moves it into the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_VALUES = 4_000_000  # values converted to float64 at a time: 32 MB
FLOAT64_VALUES = 1_000_000  # up to this size rotated features stay in float64; above, speed matters


@dataclass(frozen=True, kw_only=True, eq=False)
class Standardizer:
    """Column means and deviations, float64 ndarrays of shape (n_features,); constant columns have
    that of `of_constant`."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def of(cls, X: NDArray[Any]) -> Standardizer:
        """The moments of X, (n_samples, n_features), in two passes over chunks of rows."""
        n = len(X)
        mean = sum(chunk.sum(axis=0) for chunk in _chunks(X)) / n
        variance = sum(np.square(chunk - mean).sum(axis=0) for chunk in _chunks(X)) / n
        scale = np.sqrt(variance)
        # Rounding leaves a constant column a deviation of some eps * mean.
        constant = scale <= 1e-13 * np.abs(mean)
        return cls(mean=np.asarray(mean), scale=np.where(constant | (scale == 0), of_constant(mean), scale))

    def apply(self, X: NDArray[Any]) -> NDArray[np.float64]:
        """The standardised rows, float64."""
        standardised: NDArray[np.float64] = (X.astype(np.float64) - self.mean) / self.scale
        return standardised

    def chunks(self, X: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
        """The standardised rows of X, a bounded number at a time."""
        for chunk in _chunks(X):
            yield (chunk - self.mean) / self.scale

    def fold(
        self, weights: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (n_classes, n_features) and bias on standardised features, as they act on raw ones."""
        coef = weights / self.scale
        return coef, bias - coef @ self.mean


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """Standardised features Z in the basis of their principal axes, Z = rows @ basis.T.

    rows: ndarray of shape (n_samples, rank); its columns are orthogonal.
    squared_norms: of those columns, float64 ndarray of shape (rank,), ascending.
    basis: float64 ndarray of shape (n_features, rank), orthonormal columns.

    A linear model with a quadratic penalty has its optimum in the row space of Z, so that fitting on `rows`
    and mapping the weights back by `basis` is exact, and costs rank <= min(n_samples, n_features) columns
    (Hastie and Tibshirani, "Efficient quadratic regularization for expression arrays", Biostatistics 2004).
    """

    standardizer: Standardizer
    rows: NDArray[Any]
    squared_norms: NDArray[np.float64]
    basis: NDArray[np.float64]

    def unrotate(
        self, weights: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (n_classes, rank) and bias on `rows`, as they act on raw features."""
        return self.standardizer.fold(weights @ self.basis.T, bias)


def of_constant(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scale of constant columns: 1, or as large as they are, which leaves no rounding of a huge mean."""
    return np.maximum(1.0, np.abs(mean))


def rotate(X: NDArray[Any], *, keep_float64: bool = False) -> Rotation:
    """Standardise X, (n_samples, n_features), and rotate it, by the smaller of the two Gram matrices.

    Sums are float64; `rows` is float32 for large X, which halves its memory and its time in matrix products,
    unless `keep_float64`.
    """
    standardizer = Standardizer.of(X)
    n, d = X.shape
    if n <= d:
        Z = standardizer.apply(X)
        squared, vectors = _principal(Z @ Z.T)
        rows, basis = vectors * np.sqrt(squared), Z.T @ (vectors / np.sqrt(squared))
    else:
        gram = np.zeros((d, d))
        for chunk in standardizer.chunks(X):
            gram += chunk.T @ chunk
        squared, basis = _principal(gram)
        dtype = np.float64 if keep_float64 or X.size <= FLOAT64_VALUES else np.float32
        rows = np.concatenate([(chunk @ basis).astype(dtype) for chunk in standardizer.chunks(X)])
    return Rotation(standardizer=standardizer, rows=rows, squared_norms=squared, basis=basis)


def _principal(gram: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues above rounding, ascending, and their vectors, of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(gram)
    keep = values > max(values[-1], 0.0) * len(values) * np.finfo(float).eps
    return values[keep], vectors[:, keep]


def _chunks(X: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    rows = max(CHUNK_VALUES // max(X.shape[1], 1), 1)
    for start in range(0, len(X), rows):
        yield X[start : start + rows].astype(np.float64)
