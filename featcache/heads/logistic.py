"""Multinomial logistic regression, all strengths and folds side by side. numpy and scipy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from featcache.heads.base import LinearHead, require_count, require_positive
from featcache.heads.curvature import Curvature, DiagonalCurvature, GramCurvature
from featcache.heads.lbfgs import minimise
from featcache.heads.moments import take_moments
from featcache.heads.path import PathSearch
from featcache.heads.softmax import Affine, Block, SoftmaxRows
from featcache.heads.standardize import Standardizer, rotate
from featcache.heads.threads import in_threads, one_blas_thread

FLOAT64_VALUES = 200_000  # up to this size products are float64; above, speed matters
CACHE_BYTES = 400_000_000  # standardised rows kept in memory; beyond, they are made anew for every read
BLOCK_VALUES = 4_000_000  # of a block of rows: 16 MB
GRAM_ROWS = 8  # rows that curvature is taken from, for each feature
WIDE = 48  # columns from which a matrix product runs at its full rate
GROUP_VALUES = 8_000_000  # weights of the problems that advance together; the solver holds some 25 times this
SCORE_VALUES = 50_000_000  # scores held at a time


class LogisticHead(LinearHead):
    """minimise  1/2 ||W||^2 + C sum_n log-loss(softmax(W z_n + b), y_n)  on standardised features z.

    The intercept b is not penalised. Two classes are treated like any number: their W has two rows, and the
    optimum is that of scikit-learn's binomial form at 2 C.

    L-BFGS starts each step from the inverse of 2 C q_k Z^T Z + 1, with q_k the mean of p (1 - p) over the
    rows for class k at the point reached. Each z_n has diag(p) - p p^T in the Hessian, whose row of class k
    sums to 2 p_k (1 - p_k) in absolute value, so that diag(2 p (1 - p)) is above it (Gershgorin); the mean
    stands for each row's own. (Böhning, "Multinomial logistic regression algorithm", Ann. Inst. Statist.
    Math. 1992, has the bound 1/2 for all of it; where classes are well separated q is far smaller.)

    Matrix products are float32 for large data, sums are float64; the last gradient is float64 throughout.

    Parameters
    ----------
    C : inverse strength of the penalty.
    tol : the solver stops when the decrease it still expects is below this fraction of the objective.
    max_iter : the solver stops here whatever was reached.

    Attributes: coef_, intercept_, n_iter_ (int), converged_ (bool), objective_ (float),
    gradient_norm_ (float, the length of the objective's gradient by W and b).
    """

    n_iter_: int
    converged_: bool
    objective_: float
    gradient_norm_: float

    def __init__(self, C: float = 1.0, *, tol: float = 1e-9, max_iter: int = 1000) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter

    def fit_path(self, X: ArrayLike, y: ArrayLike, *, name: str, values: Sequence[Any]) -> list[Self]:
        if name != "C":
            return super().fit_path(X, y, name=name, values=values)
        heads = [clone(self).set_params(C=value) for value in values]
        features, codes = heads[0]._check_training(X, y)
        problems = _without_folds(features, codes, n_classes=len(heads[0].classes_))
        for head in sorted(heads, key=lambda head: head.C):
            head.classes_, head.n_features_in_ = heads[0].classes_, heads[0].n_features_in_
            head._take(problems)
        return heads

    def start_search(
        self, X: ArrayLike, y: ArrayLike, *, fold: NDArray[np.intp], n_folds: int, name: str | None
    ) -> PathSearch | None:
        if name != "C":
            return None
        head = clone(self)
        features, codes = head._check_training(X, y)
        n_classes = len(head.classes_)
        known = [len(np.unique(codes[fold != f])) == n_classes for f in range(n_folds)]
        if not all(known):  # a class without rows would have an intercept of minus infinity
            return None
        few = len(features) <= features.shape[1]
        make = _rotated_folds if few else _shared_folds
        problems = make(features, codes, n_classes=n_classes, fold=fold, n_folds=n_folds)
        return _LogisticSearch(head=head, problems=problems, X=X, y=y, fold=fold, n_folds=n_folds)

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        self._take(_without_folds(X, codes, n_classes=len(self.classes_)))

    def _check_params(self) -> None:
        require_positive("C", self.C)
        require_positive("tol", self.tol)
        require_count("max_iter", self.max_iter)

    def _take(self, problems: _Problems, *, start: _Solution | None = None) -> None:
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
    """`PathSearch`: folds and strengths share every read of the rows."""

    def __init__(
        self,
        *,
        head: LogisticHead,
        problems: _Problems,
        X: ArrayLike,
        y: ArrayLike,
        fold: NDArray[np.intp],
        n_folds: int,
    ) -> None:
        self.head, self.problems, self.X, self.y, self.fold, self.n_folds = (
            head,
            problems,
            X,
            y,
            fold,
            n_folds,
        )

    def scores(self, values: Sequence[Any]) -> Iterator[NDArray[Any]]:
        for value in values:
            self.head.set_params(C=value)._check_params()
        strengths, folds = [float(value) for value in values], range(self.n_folds)
        ascending = sorted(set(strengths))
        wave = self.problems.wave
        for start in range(0, len(ascending), wave):
            wanted = [(f, C) for C in ascending[start : start + wave] for f in folds]
            self.problems.solve(wanted, tol=self.head.tol, max_iter=self.head.max_iter)
        n, K = len(self.fold), self.problems.n_classes
        group = max(SCORE_VALUES // (n * K), 1)
        for start in range(0, len(strengths), group):
            some = strengths[start : start + group]
            table = np.zeros((len(some), n, K), dtype=self.problems.dtype)
            for f in folds:
                models = [self.problems.solved[f, C] for C in some]
                weights, bias = np.stack([m.weights for m in models]), np.stack([m.bias for m in models])
                self.problems.score(f, weights, bias, table)
            yield from table

    def fit(self, params: Mapping[str, Any]) -> LogisticHead:
        head = LogisticHead(**params)
        X, codes = head._check_training(self.X, self.y)
        problems = self.problems
        if problems.n_folds == self.n_folds:  # none of them has all rows
            problems = _without_folds(X, codes, n_classes=problems.n_classes)
        head._take(problems, start=self._mean_of_folds(problems, params))
        return head

    def _mean_of_folds(self, problems: _Problems, params: Mapping[str, Any]) -> _Solution | None:
        """The mean of the solutions of the folds, if there are, as a point to start from."""
        C = float(params.get("C", self.head.C))
        found = [(f, self.problems.solved.get((f, C))) for f in range(self.n_folds)]
        raw = [self.problems.on_raw(f, s.weights, s.bias) for f, s in found if s is not None]
        if len(raw) < self.n_folds:
            return None
        coef, intercept = (np.mean([model[i] for model in raw], axis=0) for i in range(2))
        weights, bias = problems.from_raw(coef, intercept)
        variance = np.mean([s.variance for _, s in found if s is not None], axis=0)
        return _Solution(weights=weights, bias=bias, n_iter=-1, converged=False, variance=variance)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Solution:
    weights: NDArray[np.float64]  # (K, R), on the features of the fold
    bias: NDArray[np.float64]  # (K,)
    n_iter: int
    converged: bool
    variance: NDArray[np.float64]  # the mean of p (1 - p), (K,)


class _Problems:
    """What is minimised on some rows, fold by fold, and what was found so far.

    rows, exact: the same rows in the precision of the search and in float64, made when they are read.
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
        n_rows: NDArray[np.int64],
        on_raw: Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]],
        from_raw: Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]],
        score: Callable[..., None],
        wave: int,
        dtype: type[np.floating[Any]],
    ) -> None:
        self.rows, self.exact, self.curvature, self.n_rows = rows, exact, curvature, n_rows
        self.on_raw, self.from_raw, self.score = on_raw, from_raw, score
        self.wave, self.dtype = max(wave, 1), dtype
        self.n_folds, self.n_features = rows.affine.mean.shape
        self.n_classes = rows.n_classes
        self.solved: dict[tuple[int, float], _Solution] = {}
        self.evaluations = 0  # of a problem, summed over the problems

    def solve(self, wanted: Sequence[tuple[int, float]], *, tol: float, max_iter: int) -> list[_Solution]:
        """The solutions for these folds and strengths; what can, starts from one found before."""
        group = max(GROUP_VALUES // (self.n_classes * self.n_features), 1)
        # A start that was put there has not been iterated upon.
        missing = [key for key in wanted if key not in self.solved or self.solved[key].n_iter < 0]
        for start in range(0, len(missing), group):
            some = missing[start : start + group]
            for key, solution in zip(some, self._minimise(some, tol, max_iter), strict=True):
                self.solved[key] = solution
        return [self.solved[key] for key in wanted]

    def check(self, fold: int, C: float, solution: _Solution) -> tuple[float, float]:
        """The objective and the norm of its gradient, from float64 products."""
        objective = _Objective(self, self.exact, [(fold, C)])
        x = objective.pack(solution.weights[None], solution.bias[None])
        value, gradient = objective.evaluate(np.arange(1), x)
        return float(value[0]), float(np.linalg.norm(gradient))

    def _minimise(self, keys: Sequence[tuple[int, float]], tol: float, max_iter: int) -> list[_Solution]:
        objective = _Objective(self, self.rows, keys)
        starts = [self._start(*key) for key in keys]
        x = objective.pack(np.stack([s.weights for s in starts]), np.stack([s.bias for s in starts]))
        objective.variance[:] = [s.variance for s in starts]
        with one_blas_thread():
            found = minimise(objective, x, tol=tol, max_iter=max_iter)
        weights, bias = objective.unpack(found.x)
        return [
            _Solution(
                weights=weights[j].copy(),
                bias=bias[j] - bias[j].mean(),
                n_iter=int(found.n_iter[j]),
                converged=bool(found.converged[j]),
                variance=objective.variance[j],
            )
            for j in range(len(keys))
        ]

    def _start(self, fold: int, C: float) -> _Solution:
        """What was put there, else the line through the two next lower strengths of this fold, else zero.

        Only from the fold itself: a start that saw the rows held out would favour them.
        """
        if (fold, C) in self.solved:
            return self.solved[fold, C]
        weaker = sorted(c for f, c in self.solved if f == fold and c <= C)[-2:]
        if len(weaker) == 2:
            c1, c2 = weaker
            return _along(self.solved[fold, c1], self.solved[fold, c2], c1, c2, C)
        if weaker:
            return self.solved[fold, weaker[0]]
        K = self.n_classes
        return _Solution(
            weights=np.zeros((K, self.n_features)), bias=np.zeros(K), n_iter=0, converged=False,
            variance=np.full(K, 0.5 / K),
        )  # fmt: skip


def _along(first: _Solution, second: _Solution, c1: float, c2: float, C: float) -> _Solution:
    """The line in log C through two solutions, followed to C."""
    t = np.log(C / c1) / np.log(c2 / c1)
    return _Solution(
        weights=first.weights + t * (second.weights - first.weights),
        bias=first.bias + t * (second.bias - first.bias),
        n_iter=0,
        converged=False,
        variance=second.variance,
    )


class _Objective:
    """The objectives of some folds and strengths (`lbfgs.Objective`). A point is weights, then bias."""

    def __init__(self, problems: _Problems, rows: SoftmaxRows, keys: Sequence[tuple[int, float]]) -> None:
        self.problems, self.rows = problems, rows
        self.fold, self.C = np.array([f for f, _ in keys]), np.array([C for _, C in keys])
        self.noise = float(np.finfo(problems.dtype).eps)
        self.variance = np.zeros((len(keys), problems.n_classes))

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
        data = self.rows.evaluate(fold, weights, bias)
        self.problems.evaluations += len(which)
        floor = 1e-6
        self.variance[which] = np.maximum(data.variance / self.problems.n_rows[fold][:, None], floor)
        value = 0.5 * np.einsum("jkr,jkr->j", weights, weights) + C * data.loss
        gradient = self.pack(weights + C[:, None, None] * data.weights, C[:, None] * data.bias)
        return value, gradient

    def precondition(self, which: NDArray[np.intp], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        weights, bias = self.unpack(gradient)
        fold = self.fold[which]
        strength = 2 * self.C[which][:, None] * self.variance[which]  # (J, K)
        solved = self.problems.curvature.solve(fold, strength, weights)
        # The column of ones of the bias is orthogonal to features that are centred.
        return self.pack(solved, bias / (strength * self.problems.n_rows[fold][:, None]))


def _without_folds(X: NDArray[Any], codes: NDArray[np.intp], *, n_classes: int) -> _Problems:
    never = np.full(len(X), -1)
    if len(X) <= X.shape[1]:
        return _rotated_folds(X, codes, n_classes=n_classes, fold=never, n_folds=0, whole=True)
    return _shared_folds(X, codes, n_classes=n_classes, fold=never, n_folds=0)


def _rotated_folds(
    X: NDArray[Any],
    codes: NDArray[np.intp],
    *,
    n_classes: int,
    fold: NDArray[np.intp],
    n_folds: int,
    whole: bool = False,
) -> _Problems:
    """For fewer rows than features: each fold has a basis of its own (`Rotation`), an axis for each row."""
    trained = [fold != f for f in range(n_folds)] + ([fold == fold] if whole else [])
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

    return _Problems(
        rows=SoftmaxRows(blocks(dtype), affine=affine, n_classes=n_classes),
        exact=SoftmaxRows(blocks(np.float64), affine=affine, n_classes=n_classes),
        curvature=DiagonalCurvature(norms),
        n_rows=np.array([rows.sum() for rows in trained]),
        on_raw=on_raw,
        from_raw=from_raw,
        score=score,
        wave=WIDE // n_classes,
        dtype=dtype,
    )


def _shared_folds(
    X: NDArray[Any], codes: NDArray[np.intp], *, n_classes: int, fold: NDArray[np.intp], n_folds: int
) -> _Problems:
    """For more rows than features: all folds read the same standardised rows; the last has all of them."""
    part = np.where(fold < 0, n_folds, fold)
    moments = take_moments(X, codes, n_classes=n_classes, part=part, n_parts=n_folds + 1)
    present = moments.counts.sum(axis=1) > 0
    trained = [present & (np.arange(n_folds + 1) != f) for f in range(n_folds)] + [present]
    whole = moments.select(present).standardizer()
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
        makers = [partial(source.blocks, start, start + step) for start in range(0, len(X), step)]
        return [_kept(make()) for make in makers] if keep else list(makers)

    keep = X.size * np.dtype(dtype).itemsize <= CACHE_BYTES
    rows = SoftmaxRows(blocks(dtype, keep=keep), affine=affine, n_classes=n_classes)
    counts = np.array([moments.counts[parts].sum() for parts in trained])

    def on_raw(f: int, weights: NDArray[np.float64], bias: NDArray[np.float64]) -> Any:
        return own[f].fold(weights, bias)

    def from_raw(coef: NDArray[np.float64], intercept: NDArray[np.float64]) -> Any:
        return coef * own[-1].scale, intercept + coef @ own[-1].mean

    return _Problems(
        rows=rows,
        exact=SoftmaxRows(blocks(np.float64, keep=False), affine=affine, n_classes=n_classes),
        curvature=GramCurvature(_correlation(X, whole), counts),
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

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        part = self.part[start:stop]
        for p in np.unique(part):
            index = start + np.flatnonzero(part == p)
            rows = self.X[index] if len(index) < len(part) else self.X[start:stop]
            standardised = _standardise(rows, self.standardizer, self.dtype)
            yield Block(rows=standardised, index=index, codes=self.codes[index], fitted=self.fitted[p])


def _standardise(rows: NDArray[Any], standardizer: Standardizer, dtype: Any) -> NDArray[Any]:
    """(x - mean) / scale: the difference in float64 where float32 would lose it."""
    standardised: NDArray[Any] = ((rows.astype(np.float64) - standardizer.mean) / standardizer.scale).astype(
        dtype
    )
    return standardised


def _correlation(X: NDArray[Any], standardizer: Standardizer) -> NDArray[np.float64]:
    """Z^T Z / N from some of the rows, spread over all: enough for a scaling. (D, D)."""
    n, d = X.shape
    chosen = np.arange(0, n, max(n // (GRAM_ROWS * d), 1))
    gram = np.zeros((d, d))
    step = max(BLOCK_VALUES // d, 1)
    for start in range(0, len(chosen), step):
        rows = _standardise(X[chosen[start : start + step]], standardizer, np.float32)
        gram += rows.T @ rows
    return gram / len(chosen)
