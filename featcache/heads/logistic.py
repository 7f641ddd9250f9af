"""Multinomial logistic regression: an exact rotation, then preconditioned L-BFGS. numpy and scipy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.base import clone
from threadpoolctl import threadpool_limits

from featcache.heads.base import LinearHead, require_count, require_positive
from featcache.heads.standardize import Rotation, rotate

ROUGH = 1e-3  # tolerance of the solution that the scaling is taken from
SMALL_PRODUCT = 50_000_000  # multiplications of one matrix product that one thread does as fast as many


class LogisticHead(LinearHead):
    """minimise  1/2 ||W||^2 + C sum_n log-loss(softmax(W z_n + b), y_n)  on standardised features z.

    The intercept b is not penalised. Two classes are treated like any number: their W has two rows, and the
    optimum is that of scikit-learn's binomial form at 2 C.

    Z is rotated once (`Rotation`), for all C, and Z^T Z becomes diagonal with entries s_i. The Hessian for
    class k is C Z^T diag(p_nk (1 - p_nk)) Z + 1; with q_k, the mean of p (1 - p) at the starting point, in
    place of the diagonal it is C q_k s_i + 1, and L-BFGS runs in variables scaled by its inverse root.
    (Böhning, "Multinomial logistic regression algorithm", Ann. Inst. Statist. Math. 1992, has the bound
    q = 1/2; where classes are well separated q is far smaller, and the bound takes three times the steps.)

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
        problem = _Problem(rotation=rotation, codes=codes, n_classes=len(self.classes_), C=float(self.C))
        if start is None:  # a rough solution first: the curvature there is the one that matters
            start = _minimise(problem, tol=max(self.tol, ROUGH), max_iter=self.max_iter, start=None)
        solution = _minimise(problem, tol=self.tol, max_iter=self.max_iter, start=start)
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
class _Problem:
    """What is minimised: rotated rows, labels (n_samples,) as indices of classes, the strength C."""

    rotation: Rotation
    codes: NDArray[np.intp]
    n_classes: int
    C: float

    def logits(self, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n_samples, n_classes); the product is in the precision of the rows, sums are float64."""
        rows = self.rotation.rows
        product: NDArray[np.float64] = (rows @ weights.T.astype(rows.dtype)).astype(np.float64)
        return product + bias

    def mean_variance(self, solution: _Solution | None) -> NDArray[np.float64]:
        """The mean of p (1 - p) over the rows for each class, (n_classes,); for None where W is 0."""
        if solution is None:
            return np.full(self.n_classes, (1 - 1 / self.n_classes) / self.n_classes)
        p = softmax(self.logits(solution.weights, solution.bias), axis=1)
        floored: NDArray[np.float64] = np.maximum(np.mean(p * (1 - p), axis=0), 1e-6)
        return floored


@dataclass(frozen=True, kw_only=True, eq=False)
class _Solution:
    weights: NDArray[np.float64]  # (n_classes, rank)
    bias: NDArray[np.float64]  # (n_classes,)
    objective: float
    n_iter: int
    converged: bool


def _minimise(problem: _Problem, *, tol: float, max_iter: int, start: _Solution | None) -> _Solution:
    rows, codes, n_classes, C = problem.rotation.rows, problem.codes, problem.n_classes, problem.C
    each, rank = np.arange(len(codes)), rows.shape[1]
    curvature = C * problem.mean_variance(start)  # (K,)
    scale = 1 / np.sqrt(curvature[:, None] * problem.rotation.squared_norms + 1)  # (K, rank)
    bias_scale = 1 / np.sqrt(curvature * len(codes))  # its column of ones is orthogonal to centred features

    def unpack(flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        u = flat.reshape(n_classes, rank + 1)
        return u[:, :rank] * scale, u[:, rank] * bias_scale

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights, bias = unpack(flat)
        logits = problem.logits(weights, bias)  # (N, K)
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
