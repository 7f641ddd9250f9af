"""Sufficient statistics of labelled rows, part by part, from one pass. Arrays only, float64 sums.

The parts are the folds, so that the statistics of a fold's training rows are the sum of the other parts':
nothing is subtracted, and a further fold or penalty does not read the rows again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.standardize import CHUNK_VALUES, Standardizer

CENTRE_ROWS = 4096  # rows that the provisional centre is the mean of


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Sums over the rows x - centre of P parts and K classes, D features; float64.

    centre is near the mean of all rows, which keeps the cancellation in a variance to a few bits.
    """

    centre: NDArray[np.float64]  # (D,)
    counts: NDArray[np.int64]  # (P, K)
    sums: NDArray[np.float64]  # (P, K, D)
    squares: NDArray[np.float64]  # (P, D)
    low: NDArray[np.float64]  # (P, D), the least value of each feature
    high: NDArray[np.float64]  # (P, D)
    gram: NDArray[np.float64] | None  # (P, D, D), of x - centre; None unless asked for

    def select(self, parts: NDArray[np.bool_]) -> Moments:
        """The moments of these parts together, as one part."""
        return Moments(
            centre=self.centre,
            counts=self.counts[parts].sum(axis=0, keepdims=True),
            sums=self.sums[parts].sum(axis=0, keepdims=True),
            squares=self.squares[parts].sum(axis=0, keepdims=True),
            low=self.low[parts].min(axis=0, keepdims=True),
            high=self.high[parts].max(axis=0, keepdims=True),
            gram=None
            if self.gram is None
            else np.asarray(sum(self.gram[p] for p in np.flatnonzero(parts)))[None],
        )

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    def standardizer(self) -> Standardizer:
        """Means and deviations of all rows; a column that is constant has scale 1."""
        shift = self.sums.sum(axis=(0, 1)) / self.n
        mean = self.centre + shift
        variance = np.maximum(self.squares.sum(axis=0) / self.n - shift * shift, 0.0)
        scale = np.sqrt(variance)
        constant = (self.low.min(axis=0) == self.high.max(axis=0)) | (scale <= 1e-13 * np.abs(mean))
        return Standardizer(mean=mean, scale=np.where(constant | (scale == 0), 1.0, scale))

    def standardised_gram(self, standardizer: Standardizer) -> NDArray[np.float64]:
        """Z^T Z of all rows, (D, D)."""
        if self.gram is None:
            raise ValueError("these moments were taken without cross-products")
        shift = standardizer.mean - self.centre
        gram: NDArray[np.float64] = self.gram.sum(axis=0)
        gram -= self.n * np.outer(shift, shift)
        gram /= standardizer.scale[:, None]
        gram /= standardizer.scale
        constant = self.low.min(axis=0) == self.high.max(axis=0)
        gram[constant] = gram[:, constant] = 0.0  # what is left there is rounding
        return gram

    def standardised_sums(self, standardizer: Standardizer) -> NDArray[np.float64]:
        """The sum of the standardised rows of each class, (K, D)."""
        shift, counts = standardizer.mean - self.centre, self.counts.sum(axis=0)
        sums: NDArray[np.float64] = (self.sums.sum(axis=0) - counts[:, None] * shift) / standardizer.scale
        constant = self.low.min(axis=0) == self.high.max(axis=0)
        sums[:, constant] = 0.0
        return sums


def take_moments(
    X: NDArray[Any],
    codes: NDArray[np.intp],
    *,
    n_classes: int,
    part: NDArray[np.intp] | None = None,
    n_parts: int = 1,
    cross: bool = False,
) -> Moments:
    """The moments of X, (n_samples, n_features), with classes and parts (n_samples,), in one pass.

    A chunk of rows is float64 at a time. cross: also the cross-products of the features.
    """
    d = X.shape[1]
    part = np.zeros(len(X), dtype=np.intp) if part is None else part
    group = part * n_classes + codes  # (N,)
    centre = _centre(X)
    sums = np.zeros((n_parts * n_classes, d))
    squares = np.zeros((n_parts, d))
    low, high = np.full((n_parts, d), np.inf), np.full((n_parts, d), -np.inf)
    gram = np.zeros((n_parts, d, d)) if cross else None
    step = max(CHUNK_VALUES // max(d, 1), 1)
    for start in range(0, len(X), step):
        order = np.argsort(group[start : start + step], kind="stable")
        rows = X[start : start + step][order].astype(np.float64) - centre
        groups, firsts = np.unique(group[start : start + step][order], return_index=True)
        sums[groups] += np.add.reduceat(rows, firsts, axis=0)
        of_part = part[start : start + step][order]
        for p in np.unique(of_part):
            first, last = np.searchsorted(of_part, [p, p + 1])
            piece = rows[first:last]
            np.minimum(low[p], piece.min(axis=0), out=low[p])
            np.maximum(high[p], piece.max(axis=0), out=high[p])
            if gram is None:
                squares[p] += np.einsum("nd,nd->d", piece, piece)
            else:
                gram[p] += piece.T @ piece
    if gram is not None:
        squares = np.einsum("pdd->pd", gram).copy()
    return Moments(
        centre=centre,
        counts=np.bincount(group, minlength=n_parts * n_classes).reshape(n_parts, n_classes),
        sums=sums.reshape(n_parts, n_classes, d),
        squares=squares,
        low=low,
        high=high,
        gram=gram,
    )


def _centre(X: NDArray[Any]) -> NDArray[np.float64]:
    """The mean of some rows all over X, in float32 where that holds it, so that x - centre is exact for a
    column that is constant."""
    some = X[:: max(len(X) // CENTRE_ROWS, 1)].astype(np.float64)
    mean = some.mean(axis=0)
    centre: NDArray[np.float64] = np.where(some.min(axis=0) == some.max(axis=0), some[0], mean)
    return centre
