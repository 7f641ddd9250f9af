"""Multinomial logistic regression, all strengths and folds side by side. numpy and scipy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from featcache.heads.base import LinearHead, class_weights, require_count, require_positive
from featcache.heads.closed import every_fold_knows
from featcache.heads.device import Products, find_products
from featcache.heads.path import PathSearch
from featcache.heads.problems import Problems, Solution
from featcache.heads.training import all_rows, rotated_folds, shared_folds

FINER = 0.1  # of the tolerance in a search, on so few rows that it costs nothing


class LogisticHead(LinearHead):
    """minimise  1/2 ||W||^2 + C sum_n w_n log-loss(softmax(W z_n + b), y_n)  on standardised features z.

    w_n is the weight of the row's class. The intercept b is not penalised. Two classes are treated like any
    number: their W has two rows, and the optimum is that of scikit-learn's binomial form at 2 C.

    A fit starts from zero, or from discriminant analysis where that is far better (`FirstModel`), and L-BFGS
    each of its steps from the inverse of C N (A x V) + 1: A is the mean of diag(p) - p p^T over the rows, V a
    covariance of those that are not sure yet (`GramCurvature`).

    Matrix products are float32 for large data, sums are float64; the last gradient is float64 throughout.

    Parameters
    ----------
    C : inverse strength of the penalty.
    class_weight : "balanced" gives every class the same weight, None every row; or a weight for each class.
    tol : the solver stops when the decrease it still expects is below this fraction of the objective, which
        is then at most some 60 times as far above its minimum: within 1e-5 by default.
    max_iter : the solver stops here whatever was reached.
    device : where products over the rows are done: cpu, cuda, or auto, which takes a CUDA device where torch
        has one and the processors would take long.
    temperature : what the scores are divided by before the softmax that makes them probabilities.

    Attributes: coef_, intercept_, n_iter_ (int), converged_ (bool), objective_ (float),
    gradient_norm_ (float, the length of the objective's gradient by W and b).
    """

    n_iter_: int
    converged_: bool
    objective_: float
    gradient_norm_: float

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight: str | Mapping[Any, float] | None = None,
        device: str = "cpu",
        tol: float = 1e-7,
        max_iter: int = 1000,
        temperature: float = 1.0,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.device = device
        self.tol = tol
        self.max_iter = max_iter
        self.temperature = temperature

    def fit_path(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        candidates: Sequence[Mapping[str, Any]],
        views: Sequence[NDArray[Any]] = (),
    ) -> list[Self]:
        if any(set(values) - {"C"} for values in candidates):
            return super().fit_path(X, y, candidates=candidates)
        heads = [clone(self).set_params(**values) for values in candidates]
        features, codes = heads[0]._check_training(X, y)
        problems = all_rows(features, codes, weigh=heads[0]._weigh, products=heads[0]._products(features))
        for head in sorted(heads, key=lambda head: head.C):
            head.classes_, head.n_features_in_ = heads[0].classes_, heads[0].n_features_in_
            head._take(problems)
        return heads

    def start_search(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        fold: NDArray[np.intp],
        n_folds: int,
        searched: tuple[str, ...],
        views: Sequence[NDArray[Any]] = (),
    ) -> PathSearch | None:
        if set(searched) - {"C"}:
            return None
        head = clone(self)
        features, codes = head._check_training(X, y)
        # A class without rows would have an intercept of minus infinity.
        if not every_fold_knows(codes, fold, n_folds):
            return None
        few = len(features) <= features.shape[1]
        make = rotated_folds if few else shared_folds
        problems = make(
            features,
            codes,
            weigh=head._weigh,
            fold=fold,
            n_folds=n_folds,
            products=head._products(features, 9 * n_folds),
        )
        return _LogisticSearch(head, problems, features, codes, fold=fold, n_folds=n_folds)

    def _weigh(self, codes: NDArray[np.intp]) -> NDArray[np.float64]:
        """The weights of the classes, for the classes of the rows that are fitted on."""
        n_classes = len(self.classes_)
        return class_weights(self.class_weight, codes, n_classes=n_classes, classes=self.classes_)

    def _products(self, X: NDArray[Any], problems: int = 1) -> Products:
        """Who does the products over the rows, for some 20 losses and gradients of each problem."""
        operations = 20 * 4.0 * X.size * len(self.classes_) * problems
        return find_products(self.device, operations=operations)

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        self._check_params()
        self._take(all_rows(X, codes, weigh=self._weigh, products=self._products(X)))

    def _check_params(self) -> None:
        require_positive("C", self.C)
        require_positive("tol", self.tol)
        require_positive("temperature", self.temperature)
        require_count("max_iter", self.max_iter)

    def _take(self, problems: Problems, *, start: Solution | None = None) -> None:
        """Solve for all rows, the last fold of `problems`, from `start` if given, and keep the solution."""
        self._check_params()
        last = problems.n_folds - 1
        if start is not None:
            problems.solved[last, float(self.C)] = start
        solution = problems.solve([(last, float(self.C))], tol=self.tol, max_iter=self.max_iter)[0]
        self.coef_, self.intercept_ = problems.on_raw(last, solution.weights, solution.bias)
        self.n_iter_, self.converged_ = solution.n_iter, solution.converged
        self.objective_, self.gradient_norm_ = problems.check(last, float(self.C), solution)

    @property
    def notes(self) -> tuple[str, ...]:
        if getattr(self, "converged_", True):
            return ()
        return (
            f"the solver stopped after {self.n_iter_} iterations, short of its tolerance: the gradient's "
            f"norm is {self.gradient_norm_:.2g} at an objective of {self.objective_:.6g}",
        )


class _LogisticSearch:
    """`PathSearch`: folds and strengths share every read of the rows.

    Strengths are met in ascending order, each starting from those solved before.
    """

    def __init__(
        self,
        head: LogisticHead,
        problems: Problems,
        X: NDArray[Any],
        codes: NDArray[np.intp],
        *,
        fold: NDArray[np.intp],
        n_folds: int,
    ) -> None:
        self.head, self.problems, self.X, self.codes = head, problems, X, codes
        self.fold, self.n_folds = fold, n_folds

    def scores(self, candidates: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[Any]]:
        heads = [clone(self.head).set_params(**values) for values in candidates]
        for head in heads:
            head._check_params()
        strengths = [float(head.C) for head in heads]
        ascending = sorted(set(strengths))
        tables = self._tables(ascending)
        if strengths != ascending:
            found = dict(zip(ascending, tables, strict=True))
            tables = (found[C] for C in strengths)
        yield from tables

    def fit(self, params: Mapping[str, Any]) -> LogisticHead:
        kept = {"class_weight": self.head.class_weight, "device": self.head.device}
        head = LogisticHead(**{**kept, **params})
        head._check_params()
        head.classes_, head.n_features_in_ = self.head.classes_, self.head.n_features_in_
        problems = self.problems
        if problems.n_folds == self.n_folds:  # none of them has all rows
            products = head._products(self.X)
            problems = all_rows(self.X, self.codes, weigh=head._weigh, products=products)
        head._take(problems, start=self._mean_of_folds(problems, params))
        return head

    def _tables(self, ascending: Sequence[float]) -> Iterator[NDArray[Any]]:
        """The scores of each strength, a wave of strengths solved side by side."""
        tol = self.head.tol * (1 if self.problems.dtype is np.float32 else FINER)
        for start in range(0, len(ascending), self.problems.wave):
            wave = ascending[start : start + self.problems.wave]
            wanted = [(f, C) for C in wave for f in range(self.n_folds)]
            self.problems.solve(wanted, tol=tol, max_iter=self.head.max_iter)
            for C in wave:
                table = np.zeros((1, len(self.fold), self.problems.n_classes), dtype=self.problems.dtype)
                for f in range(self.n_folds):
                    model = self.problems.solved[f, C]
                    self.problems.score(f, model.weights[None], model.bias[None], table)
                yield table[0]

    def _mean_of_folds(self, problems: Problems, params: Mapping[str, Any]) -> Solution | None:
        """The mean of the solutions of the folds, if there are, as a point to start from."""
        C = float(params.get("C", self.head.C))
        found = [(f, self.problems.solved.get((f, C))) for f in range(self.n_folds)]
        raw = [self.problems.on_raw(f, s.weights, s.bias) for f, s in found if s is not None]
        if len(raw) < self.n_folds:
            return None
        coef, intercept = (np.mean([model[i] for model in raw], axis=0) for i in range(2))
        weights, bias = problems.from_raw(coef, intercept)
        variance = np.mean([s.variance for _, s in found if s is not None], axis=0)
        return Solution(weights=weights, bias=bias, n_iter=-1, converged=False, variance=variance)
