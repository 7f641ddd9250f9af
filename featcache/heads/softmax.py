"""The log-loss of many softmax regressions in one read of the rows. Knows no penalty, solver or file.

A problem is a fold and a strength; problems differ in which rows they are fitted on and share the rows
themselves, so that one wide matrix product serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.narrow import of_models, of_rows
from featcache.heads.threads import in_threads
from featcache.processors import usable_processors

TILE_VALUES = 4_000_000  # logits a thread holds at a time: 16 MB
ROW_VALUES = 1_000_000  # of rows that are in the cache when they are multiplied again: 4 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Some rows (n, R), their places among all rows, their classes (n,), and which folds fit on them (F,)."""

    rows: NDArray[Any]
    index: NDArray[np.intp]
    codes: NDArray[np.intp]
    fitted: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
    """How the features of each fold come from the rows: (row - mean[fold]) / scale[fold], both (F, R)."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class DataTerm:
    """Weighted sums over the rows of each problem, for weights (J, K, R) on its features and bias (J, K)."""

    loss: NDArray[np.float64]  # (J,)
    weights: NDArray[np.float64]  # gradient, (J, K, R)
    bias: NDArray[np.float64]  # gradient, (J, K)
    variance: NDArray[np.float64]  # sum of p (1 - p), (J, K)


class SoftmaxRows:
    """Rows in blocks, each read (and made, if need be) by one of as many threads as there are processors.

    blocks: functions that give some blocks each. Which thread takes which is fixed, and so are all sums.
    weights: (n_folds, n_classes), what a row of each class counts for in each fold.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[], Iterator[Block]]],
        *,
        affine: Affine,
        weights: NDArray[np.float64],
    ) -> None:
        self.blocks, self.affine, self.weights = blocks, affine, weights
        self.n_classes = weights.shape[1]

    def evaluate(
        self, fold: NDArray[np.intp], weights: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> DataTerm:
        """The log-loss of the problems of these folds, (J,), with its gradient."""
        J, K, R = weights.shape
        models = _Models(fold, *self._on_rows(fold, weights, bias))
        own = self.weights[fold]
        weigh = None if np.all(own == 1) else own
        parts = self._map(lambda block, total: _add(block, models, weigh, total), (J, K, R))
        loss, slope, sums, variance = (sum(part[i] for part in parts) for i in range(4))
        mean, scale = self.affine.mean[fold][:, None], self.affine.scale[fold][:, None]
        gradient = (slope.transpose(1, 0, 2) - sums.T[..., None] * mean) / scale
        return DataTerm(loss=loss, weights=gradient, bias=sums.T.copy(), variance=variance.T.copy())

    def scores(
        self, fold: int, weights: NDArray[np.float64], bias: NDArray[np.float64], out: NDArray[Any]
    ) -> None:
        """Write the scores of V models of one fold, (V, K, R) and (V, K), on the rows it is not fitted on.

        out: (V, n_samples, K).
        """
        folds = np.full(len(weights), fold)
        on_rows, offset = self._on_rows(folds, weights, bias)
        wide = on_rows.reshape(-1, on_rows.shape[2])

        def write(block: Block, _: Any) -> None:
            if not block.fitted[fold]:
                logits = (wide.astype(block.rows.dtype) @ block.rows.T).reshape(
                    *offset.shape, -1
                )  # (K, V, n)
                out[:, block.index] = (logits + offset[..., None]).transpose(1, 2, 0)

        self._map(write, None)

    def _on_rows(
        self, fold: NDArray[np.intp], weights: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The models as they act on the rows themselves, classes first: (K, J, R) and (K, J)."""
        on_rows = weights / self.affine.scale[fold][:, None]
        offset = bias - np.einsum("jkr,jr->jk", on_rows, self.affine.mean[fold])
        return np.ascontiguousarray(on_rows.transpose(1, 0, 2)), offset.T

    def _map(self, work: Callable[[Block, Any], None], shape: tuple[int, int, int] | None) -> list[Any]:
        """`work` on every block with the totals of its thread; the totals of all threads."""
        threads = min(usable_processors(), len(self.blocks))

        def run(first: int) -> Any:
            total = _zeros(shape) if shape else None
            for make in self.blocks[first::threads]:
                for block in make():
                    work(block, total)
            return total

        return in_threads(run, range(threads))


def _zeros(shape: tuple[int, int, int]) -> tuple[NDArray[np.float64], ...]:
    J, K, R = shape
    return np.zeros(J), np.zeros((K, J, R)), np.zeros((K, J)), np.zeros((K, J))


class _Models:
    """Models on the rows, (K, J, R) and (K, J), of problems of these folds, (J,), side by side as blocks need
    them: a cast and a copy for all blocks that are fitted on in the same folds."""

    def __init__(
        self, fold: NDArray[np.intp], on_rows: NDArray[np.float64], offset: NDArray[np.float64]
    ) -> None:
        self.fold, self.on_rows, self.offset = fold, on_rows, offset
        self.made: dict[tuple[bytes, Any], tuple[NDArray[np.intp], NDArray[Any], NDArray[Any]]] = {}

    def of(self, block: Block) -> tuple[NDArray[np.intp], NDArray[Any], NDArray[Any]]:
        """The problems fitted on a block, (J',), their models (K J', R) and (K, J', 1), in its precision."""
        dtype, key = block.rows.dtype, (block.fitted.tobytes(), block.rows.dtype)
        if key not in self.made:
            use = np.flatnonzero(block.fitted[self.fold])
            wide = self.on_rows[:, use].astype(dtype).reshape(-1, self.on_rows.shape[2])
            self.made[key] = use, wide, self.offset[:, use].astype(dtype)[..., None]
        return self.made[key]


def _add(
    block: Block,
    models: _Models,
    weigh: NDArray[np.float64] | None,
    total: tuple[NDArray[np.float64], ...],
) -> None:
    """Add to `total` what the rows of a block are to the problems that are fitted on them."""
    use, wide, shift = models.of(block)
    if not len(use):
        return
    K, dtype = len(shift), block.rows.dtype
    step = max(min(TILE_VALUES // len(wide), ROW_VALUES // wide.shape[1]), 64)
    loss, own_class = np.zeros(len(use)), np.zeros((len(use), K))
    sums, squares = np.zeros((K, len(use))), np.zeros((K, len(use)))
    slope: Any = 0
    for start in range(0, len(block.codes), step):
        rows, codes = block.rows[start : start + step], block.codes[start : start + step]
        each = np.arange(len(codes))
        p = of_models(wide, rows).reshape(K, len(use), -1)  # (K, J, n)
        p += shift
        # The other classes against the row's own: 1 - p of a sure row would be rounding of p.
        own = p[codes, :, each].T  # (J, n)
        p[codes, :, each] = -np.inf
        top = p.max(axis=0)
        p -= top
        np.exp(p, out=p)
        others = p.sum(axis=0)
        against = top + np.log(others) - own
        smaller = np.exp(-np.abs(against))
        losses = np.maximum(against, 0) + np.log1p(smaller)
        wrong = np.where(against > 0, 1, smaller) / (1 + smaller)
        p *= wrong / others
        p[codes, :, each] = -wrong.T
        if weigh is None:
            squares += np.einsum("kjn,kjn->kj", p, p)
        else:
            of_row = weigh[use][:, codes].astype(dtype)  # (J, n)
            squares += np.einsum("jn,kjn,kjn->kj", of_row, p, p)
            losses, wrong = losses * of_row, wrong * of_row
            p *= of_row
        loss += losses.sum(axis=1, dtype=np.float64)
        sums += p.sum(axis=2)
        own_class += [np.bincount(codes, weights=of_problem, minlength=K) for of_problem in wrong]
        slope = slope + of_rows(p.reshape(len(wide), -1), rows)
    slope = slope.reshape(K, len(use), -1)
    for j, problem in enumerate(use):
        total[1][:, problem] += slope[:, j]
    total[0][use] += loss
    total[2][:, use] += sums
    total[3][:, use] += sums + 2 * own_class.T - squares
