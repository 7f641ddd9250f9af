"""The rows that softmax regressions are fitted on, fold by fold, as `Problems`.

With more rows than features all folds read the same standardised rows, kept in memory or made anew from a
file for every read; with fewer, each fold has its rows on principal axes of their own. Knows no head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.curvature import DiagonalCurvature, GramCurvature
from featcache.heads.device import ON_PROCESSORS, Products
from featcache.heads.moments import take_moments
from featcache.heads.problems import Problems
from featcache.heads.softmax import Affine, Block, SoftmaxRows
from featcache.heads.standardize import Standardizer, rotate
from featcache.heads.start import FirstModel
from featcache.heads.threads import in_threads
from featcache.heads.widen import centre_rows

FLOAT64_VALUES = 200_000  # up to this size products are float64; above, speed matters
CACHE_BYTES = 700_000_000  # standardised rows kept in memory; beyond, they are made anew for every read
BLOCK_VALUES = 4_000_000  # of a block of rows: 16 MB
SAMPLE_ROWS = (2, 8)  # rows that stand for all, for each feature: the least and the most
SAMPLE_VALUES = 16_000_000  # as many as these, between the two
WIDE = 48  # columns from which a matrix product runs at its full rate


# The weights of the classes, (K,), from the classes (n,) of the rows that are fitted on.
Weigh = Callable[[NDArray[np.intp]], NDArray[np.float64]]


def all_rows(
    X: NDArray[Any], codes: NDArray[np.intp], *, weigh: Weigh, products: Products = ON_PROCESSORS
) -> Problems:
    """One fold, of all rows."""
    never = np.full(len(X), -1)
    if len(X) <= X.shape[1]:
        return rotated_folds(X, codes, weigh=weigh, fold=never, n_folds=0, whole=True, products=products)
    return shared_folds(X, codes, weigh=weigh, fold=never, n_folds=0, products=products)


def rotated_folds(
    X: NDArray[Any],
    codes: NDArray[np.intp],
    *,
    weigh: Weigh,
    fold: NDArray[np.intp],
    n_folds: int,
    whole: bool = False,
    products: Products = ON_PROCESSORS,
) -> Problems:
    """For fewer rows than features: each fold has a basis of its own (`Rotation`), an axis for each row."""
    trained = [fold != f for f in range(n_folds)] + ([fold == fold] if whole else [])
    weights = np.stack([weigh(codes[rows]) for rows in trained])
    rotations = in_threads(lambda rows: rotate(X[rows], keep_float64=True), trained)
    rank = max(len(rotation.squared_norms) for rotation in rotations)
    dtype = np.float64 if X.size <= FLOAT64_VALUES else np.float32

    def blocks(dtype: Any) -> list[Callable[[], Iterator[Block]]]:
        made: list[Callable[[], Iterator[Block]]] = []
        for f, (rotation, rows) in enumerate(zip(rotations, trained, strict=True)):
            padded = np.zeros((len(rotation.rows), rank), dtype=dtype)
            padded[:, : rotation.rows.shape[1]] = rotation.rows
            fitted = np.arange(len(trained)) == f
            index = np.flatnonzero(rows)
            made.append(_kept([Block(rows=padded, index=index, codes=codes[rows], fitted=fitted)]))
        return made

    counts = np.array([rows.sum() for rows in trained])
    norms = np.zeros((len(trained), rank))
    for f, rotation in enumerate(rotations):
        norms[f, : len(rotation.squared_norms)] = rotation.squared_norms
    affine = Affine(mean=np.zeros_like(norms), scale=np.ones_like(norms))

    def on_raw(f: int, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> Any:
        return rotations[f].unrotate(weights[..., : rotations[f].basis.shape[1]], bias)

    def from_raw(coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> Any:
        last = rotations[-1]
        weights = np.zeros((len(coef), rank))
        weights[:, : last.basis.shape[1]] = (coef * last.standardizer.scale) @ last.basis
        return weights, intercept + coef @ last.standardizer.mean

    def score(f: int, weights: NDArray[np.float64], bias: NDArray[np.float64], out: NDArray[Any]) -> None:
        held = np.flatnonzero(fold == f)
        rows = X[held].astype(np.float64)
        for v in range(len(weights)):
            coef, intercept = on_raw(f, weights[v], bias[v])
            out[v, held] = rows @ coef.T + intercept

    return Problems(
        rows=products.softmax_rows(blocks(dtype), affine=affine, weights=weights),
        exact=SoftmaxRows(blocks(np.float64), affine=affine, weights=weights),
        curvature=DiagonalCurvature(norms, counts),
        first=None,
        n_rows=counts,
        on_raw=on_raw,
        from_raw=from_raw,
        score=score,
        wave=WIDE // weights.shape[1],
        dtype=dtype,
    )


def shared_folds(
    X: NDArray[Any],
    codes: NDArray[np.intp],
    *,
    weigh: Weigh,
    fold: NDArray[np.intp],
    n_folds: int,
    products: Products = ON_PROCESSORS,
) -> Problems:
    """For more rows than features: all folds read the same standardised rows; the last has all of them."""
    part = np.where(fold < 0, n_folds, fold)
    weights = np.stack([weigh(codes[part != f]) for f in range(n_folds)] + [weigh(codes)])
    n_classes = weights.shape[1]
    moments = take_moments(X, codes, n_classes=n_classes, part=part, n_parts=n_folds + 1)
    present = moments.counts.sum(axis=1) > 0
    trained = [present & (np.arange(n_folds + 1) != f) for f in range(n_folds)] + [present]
    whole = _rounded(moments.select(present).standardizer())
    own = [moments.select(parts).standardizer() for parts in trained]
    affine = Affine(
        mean=np.stack([(s.mean - whole.mean) / whole.scale for s in own]),
        scale=np.stack([s.scale / whole.scale for s in own]),
    )
    fitted = np.stack(trained, axis=1)  # (parts, folds)
    dtype = np.float64 if X.size <= FLOAT64_VALUES else np.float32

    def blocks(dtype: Any, *, keep: bool) -> list[Callable[[], Iterator[Block]]]:
        step = max(BLOCK_VALUES // X.shape[1], 1)
        source = _Source(X, codes, part, fitted, whole, dtype)
        most = None if keep else max(products.tile_values // X.shape[1], 1)
        makers = [partial(source.blocks, start, start + step, most=most) for start in range(0, len(X), step)]
        return in_threads(lambda make: _kept(make()), makers, products=False) if keep else list(makers)

    keep = X.size * np.dtype(dtype).itemsize <= CACHE_BYTES
    rows = products.softmax_rows(blocks(dtype, keep=keep), affine=affine, weights=weights)
    counts = np.array([moments.counts[parts].sum() for parts in trained])
    chosen = _some_of(*X.shape)
    sample = np.empty((len(chosen), X.shape[1]), dtype=np.float32)
    _standardise(X[chosen], whole, out=sample)

    def on_raw(f: int, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> Any:
        return own[f].fold(weights, bias)

    def from_raw(coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> Any:
        return coef * own[-1].scale, intercept + coef @ own[-1].mean

    return Problems(
        rows=rows,
        exact=SoftmaxRows(blocks(np.float64, keep=False), affine=affine, weights=weights),
        curvature=GramCurvature(sample, counts, n_classes),
        first=FirstModel(sample, codes[chosen], n_classes=n_classes),
        n_rows=counts,
        on_raw=on_raw,
        from_raw=from_raw,
        score=rows.scores,
        wave=WIDE // (n_classes * max(n_folds, 1)),
        dtype=dtype,
    )


def _kept(blocks: Iterable[Block]) -> Callable[[], Iterator[Block]]:
    """The blocks made once and given whenever they are asked for."""
    made = list(blocks)
    return lambda: iter(made)


@dataclass(frozen=True, eq=False)
class _Source:
    """Rows of X on their way into blocks: standardised by all rows, sorted by the part they belong to."""

    X: NDArray[Any]
    codes: NDArray[np.intp]
    part: NDArray[np.intp]
    fitted: NDArray[np.bool_]  # (parts, folds)
    standardizer: Standardizer
    dtype: Any

    def blocks(self, start: int, stop: int, *, most: int | None) -> Iterator[Block]:
        """These rows in blocks of at most so many, each overwritten by the next; None: blocks to keep."""
        part = self.part[start:stop]
        size = len(part) if most is None else min(most, len(part))
        made = None if most is None else np.empty((size, self.X.shape[1]), dtype=self.dtype)
        for p in np.unique(part):
            index = start + np.flatnonzero(part == p)
            for first in range(0, len(index), size):
                some = index[first : first + size]
                adjoining = some[-1] - some[0] == len(some) - 1
                rows = self.X[some[0] : some[-1] + 1] if adjoining else self.X[some]
                out = np.empty(rows.shape, dtype=self.dtype) if made is None else made[: len(some)]
                _standardise(rows, self.standardizer, out=out)
                yield Block(rows=out, index=some, codes=self.codes[some], fitted=self.fitted[p])


def _rounded(standardizer: Standardizer) -> Standardizer:
    """Nearly the same one, in numbers that float32 holds."""
    mean = standardizer.mean.astype(np.float32).astype(np.float64)
    limits = np.finfo(np.float32)
    reciprocal = np.clip(1 / standardizer.scale, limits.tiny, limits.max).astype(np.float32)
    return Standardizer(mean=mean, scale=1 / reciprocal.astype(np.float64))


def _standardise(rows: NDArray[Any], standardizer: Standardizer, *, out: NDArray[Any]) -> None:
    """(x - mean) / scale by a `_rounded` one, so that float32 differences are right to their last bit."""
    wide = np.float64 if rows.dtype == np.float64 else out.dtype
    reciprocal = (1 / standardizer.scale).astype(out.dtype)
    centre_rows(rows, standardizer.mean.astype(wide), reciprocal, out=out)


def _some_of(n: int, d: int) -> NDArray[np.intp]:
    """Rows to stand for all n, ascending; drawn, as rows may come in the order of their classes."""
    least, most = (of_feature * d for of_feature in SAMPLE_ROWS)
    return np.sort(np.random.default_rng(0).permutation(n)[: int(np.clip(SAMPLE_VALUES // d, least, most))])
