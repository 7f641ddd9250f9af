"""Least squares on one-vs-rest targets with a quadratic penalty, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from featcache.heads.base import require_positive
from featcache.heads.closed import ClosedFormHead
from featcache.heads.penalised import Penalised
from featcache.heads.sums import ClassSums


class RidgeHead(ClosedFormHead):
    """minimise  sum_n w_n |W z_n + b - t_n|^2 + alpha |W|^2  on standardised features z, targets t of +1, -1.

    w_n is the weight of the row's class. The intercept is not penalised: b = t_ - W z_, where t_ and z_ are
    weighted means. About those means Z^T w T is 2 w_k S_k, twice the weighted sum of z over the rows of class
    k, and with G = Z^T w Z the solution is W^T = 2 (G + alpha)^-1 (w_k S_k), for every alpha from one
    tridiagonal form of G (`Penalised`).

    Parameters
    ----------
    alpha : strength of the penalty.
    class_weight : "balanced" gives every class the same weight, None every row; or a weight for each class.
    device : where products over the rows are done: cpu, cuda, or auto, which takes a CUDA device where torch
        has one and the processors would take long.
    temperature : what the scores are divided by before the softmax that makes them probabilities.
    """

    path: ClassVar[frozenset[str]] = frozenset({"alpha"})
    cross: ClassVar[bool] = True

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        class_weight: str | Mapping[Any, float] | None = None,
        device: str = "cpu",
        temperature: float = 1.0,
    ) -> None:
        self.alpha = alpha
        self.class_weight = class_weight
        self.device = device
        self.temperature = temperature

    def _check_params(self) -> None:
        require_positive("alpha", self.alpha)
        require_positive("temperature", self.temperature)

    def _solve(self, sums: ClassSums, heads: Sequence[Any]) -> None:
        weight, mean = sums.class_weight, sums.mean
        right = 2 * (sums.weights[:, None] * sums.sums - weight[:, None] * mean)  # (K, R)
        target = 2 * weight / weight.sum() - 1
        penalised = Penalised(sums.scatter(), noise=sums.noise)
        solutions = penalised.solve(right.T, [float(head.alpha) for head in heads])
        for head, solution in zip(heads, solutions, strict=True):
            bias = target - mean @ solution
            head.coef_, head.intercept_ = sums.on_raw(np.ascontiguousarray(solution.T), bias)
