"""Sufficient statistics of labelled rows, part by part, from one pass. Arrays only, float64 sums.

The parts are the folds, so that the statistics of a fold's training rows are the sum of the other parts':
nothing is subtracted, and a further fold or penalty does not read the rows again. Cross-products of much
float32 data are float32 within a few thousand rows, which is twice as fast, and float64 between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.device import ON_PROCESSORS, Products
from featcache.heads.pieces import Cut, Piece
from featcache.heads.standardize import CHUNK_VALUES, Standardizer, of_constant
from featcache.heads.threads import in_threads
from featcache.processors import usable_processors

CENTRE_ROWS = 4096  # rows that the provisional centre is the mean of
FLOAT64_VALUES = 1_000_000  # up to this size cross-products are float64; above, those of float64 data alone


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
    weights: NDArray[np.float64]  # (K,), of the rows of each class, where something is called weighted
    gram: NDArray[np.float64] | None  # (P, D, D), weighted, of x - centre; None unless asked for
    noise: float  # relative rounding error of the gram

    def select(self, parts: NDArray[np.bool_]) -> Moments:
        """The moments of these parts together, as one part."""
        return Moments(
            centre=self.centre,
            counts=self.counts[parts].sum(axis=0, keepdims=True),
            sums=self.sums[parts].sum(axis=0, keepdims=True),
            squares=self.squares[parts].sum(axis=0, keepdims=True),
            low=self.low[parts].min(axis=0, keepdims=True),
            high=self.high[parts].max(axis=0, keepdims=True),
            weights=self.weights,
            noise=self.noise,
            gram=None
            if self.gram is None
            else np.asarray(sum(self.gram[p] for p in np.flatnonzero(parts)))[None],
        )

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    @property
    def class_weight(self) -> NDArray[np.float64]:
        """The weight of all rows of each class together, (K,)."""
        weight: NDArray[np.float64] = self.weights * self.counts.sum(axis=0)
        return weight

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which features have one value in all rows, (D,)."""
        same: NDArray[np.bool_] = self.low.min(axis=0) == self.high.max(axis=0)
        return same

    def standardizer(self) -> Standardizer:
        """Means and deviations of all rows; a column that is constant has the scale of `of_constant`."""
        shift = self.sums.sum(axis=(0, 1)) / self.n
        mean = self.centre + shift
        variance = np.maximum(self.squares.sum(axis=0) / self.n - shift * shift, 0.0)
        scale = np.sqrt(variance)
        constant = self.constant | (scale <= 1e-13 * np.abs(mean))
        return Standardizer(mean=mean, scale=np.where(constant | (scale == 0), of_constant(mean), scale))

    def standardised_gram(self, standardizer: Standardizer) -> NDArray[np.float64]:
        """Z^T Z of all rows, weighted and about their weighted mean, (D, D)."""
        if self.gram is None:
            raise ValueError("these moments were taken without cross-products")
        weight = float(self.class_weight.sum())
        shift = self.weights @ self.sums.sum(axis=0) / weight
        gram: NDArray[np.float64] = self.gram.sum(axis=0)
        gram -= weight * np.outer(shift, shift)
        gram /= standardizer.scale[:, None]
        gram /= standardizer.scale
        constant = self.constant
        gram[constant] = gram[:, constant] = 0.0  # what is left there is rounding
        return gram

    def standardised_sums(self, standardizer: Standardizer) -> NDArray[np.float64]:
        """The sum of the standardised rows of each class, (K, D)."""
        shift, counts = standardizer.mean - self.centre, self.counts.sum(axis=0)
        sums: NDArray[np.float64] = (self.sums.sum(axis=0) - counts[:, None] * shift) / standardizer.scale
        sums[:, self.constant] = 0.0
        return sums


def take_moments(
    X: NDArray[Any],
    codes: NDArray[np.intp],
    *,
    n_classes: int,
    part: NDArray[np.intp] | None = None,
    n_parts: int = 1,
    cross: bool = False,
    weights: NDArray[np.float64] | None = None,
    products: Products = ON_PROCESSORS,
) -> Moments:
    """The moments of X, (n_samples, n_features), with classes and parts (n_samples,), in one pass.

    A few chunks of rows are held at a time. cross: also the cross-products of the features. weights:
    (n_classes,), of the rows of each class in them; None: all 1. The result does not depend on the number of
    processors.
    """
    d = X.shape[1]
    part = np.zeros(len(X), dtype=np.intp) if part is None else part
    group = part * n_classes + codes
    weights = np.ones(n_classes) if weights is None else weights
    weighted = not np.all(weights == 1)
    cut = Cut(
        n_classes=n_classes,
        centre=_centre(X),
        dtype=np.float64 if X.size <= FLOAT64_VALUES or X.dtype == np.float64 else np.float32,
        squares=weighted or not cross,
        scale=np.sqrt(weights) if weighted and cross else None,
    )
    sums = np.zeros((n_parts * n_classes, d))
    squares = np.zeros((n_parts, d))
    low, high = np.full((n_parts, d), np.inf), np.full((n_parts, d), -np.inf)
    crossed = products.gram(n_parts, d) if cross else None
    for piece in _pieces(X, group, cut, products):
        sums[piece.groups] += piece.sums
        p = piece.part
        squares[p] += piece.squares
        np.minimum(low[p], piece.low, out=low[p])
        np.maximum(high[p], piece.high, out=high[p])
        if crossed is not None:
            crossed.add(p, piece.rows)
    gram = None if crossed is None else crossed.total()
    if gram is not None and not weighted:
        squares = np.einsum("pdd->pd", gram).copy()
    return Moments(
        centre=cut.centre,
        counts=np.bincount(group, minlength=n_parts * n_classes).reshape(n_parts, n_classes),
        sums=sums.reshape(n_parts, n_classes, d),
        squares=squares,
        low=low,
        high=high,
        weights=weights,
        noise=float(np.finfo(cut.dtype).eps),
        gram=gram,
    )


def _pieces(X: NDArray[Any], group: NDArray[np.intp], cut: Cut, products: Products) -> Iterator[Piece]:
    """All rows, in a fixed order; a chunk for each processor is prepared at a time."""
    step = max(CHUNK_VALUES // max(X.shape[1], 1), 1)
    chunks = [slice(start, min(start + step, len(X))) for start in range(0, len(X), step)]
    together = usable_processors()

    def prepare(rows: slice) -> list[Piece]:
        return products.pieces(X[rows], group[rows], cut)

    for first in range(0, len(chunks), together):
        for made in in_threads(prepare, chunks[first : first + together], products=False):
            yield from made


def _centre(X: NDArray[Any]) -> NDArray[np.float64]:
    """The mean of some rows all over X, in a number that float32 holds unless X is wider, so that x - centre
    is right to its last bit, and exact for a column that is constant."""
    some = X[:: max(len(X) // CENTRE_ROWS, 1)].astype(np.float64)
    mean = some.mean(axis=0)
    if X.dtype != np.float64:
        mean = mean.astype(np.float32).astype(np.float64)
    centre: NDArray[np.float64] = np.where(some.min(axis=0) == some.max(axis=0), some[0], mean)
    return centre
