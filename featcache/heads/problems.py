"""Penalised softmax regressions that share their rows: what is minimised, from where, and what was found.

A problem is a fold and a strength C. Knows no head and no labels, but through `SoftmaxRows`; `training`
makes the problems of some rows.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.curvature import Curvature
from featcache.heads.lbfgs import minimise
from featcache.heads.softmax import SoftmaxRows
from featcache.heads.threads import one_blas_thread

LOOK_SHARE = 0.25  # of the arithmetic of reads, that looks at the curvature may cost
GROUP_VALUES = 8_000_000  # weights of the problems that advance together; the solver holds some 25 times this


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Where a problem ended, or a point for one to start from (then `n_iter` is below 0)."""

    weights: NDArray[np.float64]  # (K, R), on the features of the fold
    bias: NDArray[np.float64]  # (K,)
    n_iter: int
    converged: bool
    variance: NDArray[np.float64]  # the mean of p (1 - p), (K,)


class Problems:
    """1/2 ||W||^2 + C times the log-loss, minimised on the rows of each fold, and what was found so far.

    rows, exact: the same rows in the precision of the search and in float64, made when they are read.
    first: weights (K, R) and bias (K,) to start from at a strength C times the rows; None: from zero.
    on_raw: (fold, weights, bias) as they act on raw features. from_raw: the way back, for the last fold.
    score: (fold, weights (V, K, R), bias (V, K), out), the scores of the rows the fold holds out.
    wave: strengths that are solved side by side before the next ones start from them.
    """

    def __init__(
        self,
        *,
        rows: SoftmaxRows,
        exact: SoftmaxRows,
        curvature: Curvature,
        first: Callable[[float], tuple[NDArray[np.float64], NDArray[np.float64]]] | None,
        n_rows: NDArray[np.int64],
        on_raw: Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]],
        from_raw: Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]],
        score: Callable[..., None],
        wave: int,
        dtype: type[np.floating[Any]],
    ) -> None:
        self.rows, self.exact, self.curvature, self.n_rows = rows, exact, curvature, n_rows
        self.first = first
        self.on_raw, self.from_raw, self.score = on_raw, from_raw, score
        self.wave, self.dtype = max(wave, 1), dtype
        self.n_folds, self.n_features = rows.affine.mean.shape
        self.n_classes = rows.n_classes
        self.solved: dict[tuple[int, float], Solution] = {}
        self.evaluations = 0  # of a problem, summed over the problems

    def solve(self, wanted: Sequence[tuple[int, float]], *, tol: float, max_iter: int) -> list[Solution]:
        """The solutions for these folds and strengths; what can, starts from one found before."""
        group = max(GROUP_VALUES // max(self.n_classes * self.n_features, 1), 1)
        # A start that was put there has not been iterated upon.
        missing = [key for key in wanted if key not in self.solved or self.solved[key].n_iter < 0]
        for start in range(0, len(missing), group):
            some = missing[start : start + group]
            for key, solution in zip(some, self._minimise(some, tol, max_iter), strict=True):
                self.solved[key] = solution
        return [self.solved[key] for key in wanted]

    def check(self, fold: int, C: float, solution: Solution) -> tuple[float, float]:
        """The objective and the norm of its gradient, from float64 products."""
        objective = _Objective(self, self.exact, [(fold, C)])
        x = objective.pack(solution.weights[None], solution.bias[None])
        value, gradient = objective.evaluate(np.arange(1), x)
        return float(value[0]), float(np.linalg.norm(gradient))

    def _minimise(self, keys: Sequence[tuple[int, float]], tol: float, max_iter: int) -> list[Solution]:
        objective = _Objective(self, self.rows, keys)
        starts = [self._start(*key) for key in keys]
        x = objective.pack(np.stack([s.weights for s in starts]), np.stack([s.bias for s in starts]))
        objective.variance[:] = [s.variance for s in starts]
        with one_blas_thread():
            found = minimise(objective, x, tol=tol, max_iter=max_iter)
        weights, bias = objective.unpack(found.x)
        return [
            Solution(
                weights=weights[j].copy(),
                bias=bias[j] - bias[j].mean(),
                n_iter=int(found.n_iter[j]),
                converged=bool(found.converged[j]),
                variance=objective.variance[j],
            )
            for j in range(len(keys))
        ]

    def _start(self, fold: int, C: float) -> Solution:
        """What was put there, else the line through the strengths of this fold on both sides, or through the
        two next lower ones, else `first`.

        Only from the fold itself: a start that saw the rows held out would favour them.
        """
        if (fold, C) in self.solved:
            return self.solved[fold, C]
        K = self.n_classes
        known = sorted(c for f, c in self.solved if f == fold)
        below = bisect(known, C)
        nearest = known[max(below - 1, 0) : below + 1] if below < len(known) else known[-2:]
        if len(nearest) == 2:
            c1, c2 = nearest
            return _along(self.solved[fold, c1], self.solved[fold, c2], c1, c2, C)
        if nearest:
            return self.solved[fold, nearest[0]]
        weights, bias = np.zeros((K, self.n_features)), np.zeros(K)
        if self.first is not None and fold == self.n_folds - 1:  # all rows
            weights, bias = self.first(C * float(self.n_rows[fold]))
        variance = np.full(K, 0.5 / K)
        return Solution(weights=weights, bias=bias, n_iter=0, converged=False, variance=variance)


def _along(first: Solution, second: Solution, c1: float, c2: float, C: float) -> Solution:
    """The line in log C through two solutions, followed to C."""
    t = np.log(C / c1) / np.log(c2 / c1)
    return Solution(
        weights=first.weights + t * (second.weights - first.weights),
        bias=first.bias + t * (second.bias - first.bias),
        n_iter=0,
        converged=False,
        variance=second.variance,
    )


class _Objective:
    """The objectives of some folds and strengths (`lbfgs.Objective`). A point is weights, then bias."""

    def __init__(self, problems: Problems, rows: SoftmaxRows, keys: Sequence[tuple[int, float]]) -> None:
        self.problems, self.rows = problems, rows
        self.fold, self.C = np.array([f for f, _ in keys]), np.array([C for _, C in keys])
        self.noise = float(np.finfo(problems.dtype).eps)
        self.variance = np.zeros((len(keys), problems.n_classes))
        self.reads, self.operations, self.looks = 0, 0.0, 0

    def pack(self, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([weights.reshape(len(weights), -1), bias], axis=1)

    def unpack(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        K = self.problems.n_classes
        return x[:, :-K].reshape(len(x), K, -1), x[:, -K:]

    def evaluate(
        self, which: NDArray[np.intp], x: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        weights, bias = self.unpack(x)
        C, fold = self.C[which], self.fold[which]
        self.at = weights.mean(axis=0), bias.mean(axis=0)
        self.reads += 1
        self.operations += 4.0 * weights.size * float(self.problems.n_rows.max())
        data = self.rows.evaluate(fold, weights, bias)
        self.problems.evaluations += len(which)
        floor = 1e-6
        self.variance[which] = np.maximum(data.variance / self.problems.n_rows[fold][:, None], floor)
        value = 0.5 * np.einsum("jkr,jkr->j", weights, weights) + C * data.loss
        gradient = self.pack(weights + C[:, None, None] * data.weights, C[:, None] * data.bias)
        return value, gradient

    def precondition(self, which: NDArray[np.intp], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        curvature = self.problems.curvature
        if self._is_look_due(curvature.look_cost):
            curvature.look(*self.at)
            self.looks += 1
        weights, bias = self.unpack(gradient)
        strength = 2 * self.C[which][:, None] * self.variance[which]  # (J, K)
        return self.pack(*curvature.solve(self.fold[which], strength, weights, bias))

    def _is_look_due(self, cost: float) -> bool:
        """After 1, 6, 24, 96 … reads, but where all looks together would cost much beside the reads."""
        due = 1 if not self.looks else 6 * 4 ** (self.looks - 1)
        return self.reads >= due and (self.looks + 1) * cost <= LOOK_SHARE * self.operations
