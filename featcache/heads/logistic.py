"""Multinomial logistic regression: an exact rotation, then preconditioned L-BFGS. numpy and scipy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.base import clone
from threadpoolctl import threadpool_limits

from featcache.heads.base import LinearHead, require_count, require_positive
from featcache.heads.standardize import Rotation, rotate

SMALL_PRODUCT = 50_000_000  # multiplications of one matrix product that one thread does as fast as many


class LogisticHead(LinearHead):
    """minimise  1/2 ||W||^2 + C sum_n log-loss(softmax(W z_n + b), y_n)  on standardised features z.

    The intercept b is not penalised. Two classes are treated like any number: their W has two rows, and the
    optimum is that of scikit-learn's binomial form at 2 C.

    Z is rotated once (`Rotation`), then L-BFGS runs in variables scaled by Böhning's bound: the Hessian of
    the log-loss is at most 1/2 Z^T Z for every class, whatever W (Böhning, "Multinomial logistic regression
    algorithm", Ann. Inst. Statist. Math. 1992). Rotated, Z^T Z is diagonal with entries s_i, so that
    scaling w_i by (C s_i / 2 + 1)^(-1/2) makes the bound the identity, for all C from one rotation.

    Parameters
    ----------
    C : inverse strength of the penalty.
    tol : L-BFGS stops when an iteration lowers the objective by less than this fraction of it.
    max_iter : L-BFGS stops here whatever was reached.

    Attributes: coef_, intercept_, n_iter_ (int), converged_ (bool), objective_ (float).
    """

    n_iter_: int
    converged_: bool
    objective_: float

    def __init__(self, C: float = 1.0, *, tol: float = 1e-9, max_iter: int = 1000) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter

    def fit_path(self, X: ArrayLike, y: ArrayLike, *, name: str, values: Sequence[Any]) -> list[Self]:
        if name != "C":
            return super().fit_path(X, y, name=name, values=values)
        heads = [clone(self).set_params(C=value) for value in values]
        features, codes = heads[0]._check_training(X, y)
        rotation = rotate(features)
        solution: _Solution | None = None
        for head in sorted(heads, key=lambda head: head.C):
            head.classes_, head.n_features_in_ = heads[0].classes_, heads[0].n_features_in_
            solution = head._fit_rotated(rotation, codes, start=solution)
        return heads

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        self._fit_rotated(rotate(X), codes, start=None)

    def _fit_rotated(
        self, rotation: Rotation, codes: NDArray[np.intp], *, start: _Solution | None
    ) -> _Solution:
        require_positive("C", self.C)
        require_positive("tol", self.tol)
        require_count("max_iter", self.max_iter)
        solution = _minimise(
            rotation,
            codes,
            n_classes=len(self.classes_),
            C=float(self.C),
            tol=self.tol,
            max_iter=self.max_iter,
            start=start,
        )
        self.coef_, self.intercept_ = rotation.unrotate(solution.weights, solution.bias)
        self.n_iter_, self.converged_ = solution.n_iter, solution.converged
        self.objective_ = solution.objective
        return solution

    @property
    def notes(self) -> tuple[str, ...]:
        if getattr(self, "converged_", True):
            return ()
        return (f"the solver stopped after {self.n_iter_} iterations, short of its tolerance",)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Solution:
    weights: NDArray[np.float64]  # (n_classes, rank)
    bias: NDArray[np.float64]  # (n_classes,)
    objective: float
    n_iter: int
    converged: bool


def _minimise(
    rotation: Rotation,
    codes: NDArray[np.intp],
    *,
    n_classes: int,
    C: float,
    tol: float,
    max_iter: int,
    start: _Solution | None,
) -> _Solution:
    rows, each = rotation.rows, np.arange(len(codes))
    rank = rows.shape[1]
    scale = 1 / np.sqrt(C * rotation.squared_norms / 2 + 1)  # (rank,)
    bias_scale = np.sqrt(2 / (C * len(codes)))  # its column of ones is orthogonal to the centred features

    def unpack(flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        u = flat.reshape(n_classes, rank + 1)
        return u[:, :rank] * scale, u[:, rank] * bias_scale

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights, bias = unpack(flat)
        logits = (rows @ weights.T.astype(rows.dtype)).astype(np.float64) + bias  # (N, K)
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        value = 0.5 * np.sum(weights * weights) - C * np.sum(log_p[each, codes])
        residual = np.exp(log_p)
        residual[each, codes] -= 1
        slope = (residual.T.astype(rows.dtype) @ rows).astype(np.float64)  # (K, rank)
        gradient = np.empty((n_classes, rank + 1))
        gradient[:, :rank] = (weights + C * slope) * scale
        gradient[:, rank] = C * residual.sum(axis=0) * bias_scale
        return float(value), gradient.ravel()

    first = np.zeros((n_classes, rank + 1))
    if start is not None:
        first[:, :rank], first[:, rank] = start.weights / scale, start.bias / bias_scale
    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 20, "ftol": tol, "gtol": 0.0}
    # Threads that wait for one another cost more than they bring in products this small.
    threads = 1 if rows.size * n_classes < SMALL_PRODUCT else None
    with threadpool_limits(limits=threads):
        found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    weights, bias = unpack(found.x)
    # status 2 is a line search that found nothing lower: the optimum, to the precision of the arithmetic.
    return _Solution(
        weights=weights,
        bias=bias - bias.mean(),
        objective=float(found.fun),
        n_iter=int(found.nit),
        converged=found.status != 1,
    )
