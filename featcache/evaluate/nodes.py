"""Which nodes of a network to concatenate, chosen by cross-validation on the training rows.

Forward from the best single node, the one that lowers the held-out log-loss most is added, until none lowers
it by more than one standard error. The judge is ridge regression: from the cross-products of all nodes'
features, taken once for each fold, that of every concatenation is a block, and to add a node to a Cholesky
factor costs little more than its own features. Never sees a test row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.special import softmax

from featcache.evaluate.compete import Difference, paired_difference
from featcache.evaluate.metrics import log_losses
from featcache.evaluate.select import finite_or_none
from featcache.evaluate.splits import Folds
from featcache.heads.entry import RATE
from featcache.heads.standardize import Standardizer, rotate
from featcache.heads.temperature import fit_temperature
from featcache.heads.threads import in_threads
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress

MOST_ROWS, MOST_SCORES = 20_000, 10_000_000  # that nodes are judged by; scores are rows x classes
LEAST_ROWS = 2_000  # however little time there is
MOST_FOLDS = 3
PENALTIES = tuple(10.0**e for e in (-3, -2, -1, 0, 1, 2))  # for each training row


@dataclass(frozen=True, kw_only=True)
class NodeStep:
    """A concatenation of nodes, and what its last node gains in mean log-loss over those before it."""

    nodes: tuple[str, ...]
    num_features: int
    nll: float
    accuracy: float
    gain: float | None  # None of a single node
    gain_se: float | None

    def to_json(self) -> dict[str, Any]:
        return finite_or_none(asdict(self))


@dataclass(frozen=True, kw_only=True)
class NodeChoice:
    """singles: every node alone. steps: the way from the best of them to the nodes chosen.

    refused: what would have been the next step, None where there was none to take.
    """

    singles: tuple[NodeStep, ...]
    steps: tuple[NodeStep, ...]
    refused: NodeStep | None
    n_rows: int
    n_folds: int

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.steps[-1].nodes

    def to_json(self) -> dict[str, Any]:
        return {
            "singles": [step.to_json() for step in self.singles],
            "steps": [step.to_json() for step in self.steps],
            "refused": self.refused.to_json() if self.refused else None,
            "n_rows": self.n_rows,
            "n_folds": self.n_folds,
        }


def choice_seconds(widths: Sequence[int], *, n: int, k: int) -> float:
    """What choosing among nodes of these widths by n rows of k classes takes here, by its arithmetic.

    Should all of them be taken, one by one: half of them are then left on the average, beside most columns.
    """
    widths = [min(d, n) for d in widths]  # wider ones are turned onto as many axes as there are rows
    D, m = sum(widths), len(widths)
    products = 2.0 * n * D * D
    singles = len(PENALTIES) * MOST_FOLDS * sum(d**3 for d in widths) / 3
    base, near = 0.7 * D, 3 * (m - 1)  # of each step, three penalties are tried
    added = base**3 / 3 + sum(base**2 * d + base * d**2 + d**3 / 3 for d in widths) / 2
    fits = 2.0 * (singles + near * MOST_FOLDS * added)  # in float64, which takes twice as long
    scores = 2.0 * n * D * m * k * (len(PENALTIES) + near / 2)
    return (products + fits + scores) / (RATE * usable_processors())


def rows_within(seconds: float, widths: Sequence[int], *, n: int, k: int) -> int:
    """Of n training rows, so many as nodes are judged by in this time, and `LEAST_ROWS` at least."""
    most = min(n, MOST_ROWS, max(MOST_SCORES // k, 1))
    least = min(most, LEAST_ROWS)
    while most > least and choice_seconds(widths, n=most, k=k) > seconds:
        most = max(9 * most // 10, least)
    return most


def choose_nodes(
    parts: Mapping[str, NDArray[Any]],
    y: NDArray[np.int64],
    folds: Folds,
    *,
    rows: NDArray[np.int64] | None = None,
    weights: NDArray[np.float64] | None = None,
    most: int = MOST_ROWS,
    progress: Progress | None = None,
) -> NodeChoice:
    """Nodes by the features of the training rows that each has.

    parts: for each node, an array of vectors. rows: which of these are the training rows, (n_samples,),
    ascending; None: all are. y: (n_samples,), 0 … n_classes - 1. weights: (n_samples,), of the rows where
    fits and losses are weighted. most: the rows that nodes are judged by. ValueError without folds: nothing
    can be compared.
    """
    if not folds.n_folds:
        raise ValueError("no row could be held out, so that nodes cannot be compared")
    progress = progress or SilentProgress()
    judge = _Judge(parts, y, folds, weights, rows=rows, most=most)
    progress.start("choosing nodes", total=len(parts), unit="nodes")
    singles = judge.extend((), tuple(parts))
    best = min(singles, key=_cost)
    progress.advance(1)
    steps, refused = [best.step], None
    while len(steps) < len(parts):
        left = tuple(key for key in parts if key not in best.step.nodes)
        longer = min(judge.extend(best.step.nodes, left, before=best), key=_cost)
        step = longer.step
        progress.advance(1)
        if step.gain is None or step.gain_se is None or not step.gain > step.gain_se:
            refused = step
            break
        steps.append(step)
        best = longer
    progress.finish()
    return NodeChoice(
        singles=tuple(found.step for found in singles),
        steps=tuple(steps),
        refused=refused,
        n_rows=len(judge.y),
        n_folds=judge.n_folds,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    step: NodeStep
    losses: NDArray[np.float64]  # (N,)
    penalty: float


def _cost(found: _Found) -> float:
    return found.step.nll if np.isfinite(found.step.nll) else np.inf


class _Judge:
    """The rows that nodes are judged by, standardised node by node, with the cross-products of each fold."""

    def __init__(
        self,
        parts: Mapping[str, NDArray[Any]],
        y: NDArray[np.int64],
        folds: Folds,
        weights: NDArray[np.float64] | None = None,
        *,
        rows: NDArray[np.int64] | None = None,
        most: int = MOST_ROWS,
    ) -> None:
        held = np.flatnonzero(folds.held_out)
        self.K = int(y.max()) + 1
        most = min(most, MOST_ROWS, max(MOST_SCORES // self.K, 1))
        some = _thinned(held, folds.fold[held] % MOST_FOLDS, most)
        self.y, self.fold = y[some], folds.fold[some] % MOST_FOLDS
        self.weight = np.ones(len(some)) if weights is None else weights[some] / weights[some].mean()
        self.unit = None if folds.unit is None else folds.unit[some]
        self.n_folds = int(self.fold.max()) + 1
        self.widths = {key: X.shape[1] for key, X in parts.items()}
        taken = some if rows is None else rows[some]  # of the many rows there may be, these alone are read
        blocks = [_standardised(X[taken]) for X in parts.values()]
        ends = np.cumsum([0, *(block.shape[1] for block in blocks)])
        self.columns = {key: np.arange(ends[i], ends[i + 1]) for i, key in enumerate(parts)}
        Z = np.concatenate(blocks, axis=1)
        self.held = [np.flatnonzero(self.fold == f) for f in range(self.n_folds)]
        self.Z = [Z[rows] for rows in self.held]  # of each fold, (n, D)
        self.weights = [self.weight[rows] for rows in self.held]
        products = [_product(rows, w) for rows, w in zip(self.Z, self.weights, strict=True)]
        whole = np.sum(products, axis=0)
        self.fits = [self._centred(f, whole - products[f]) for f in range(self.n_folds)]

    def _centred(self, fold: int, gram: NDArray[Any]) -> _Fit:
        """The normal equations of the rows that a fold does not hold out."""
        others = [f for f in range(self.n_folds) if f != fold]
        weights = self.weights
        n = float(sum(weights[f].sum() for f in others))
        mean = np.sum([np.einsum("n,nd->d", weights[f], self.Z[f]) for f in others], axis=0) / n
        sign = {f: np.where(self.y[self.held[f], None] == np.arange(self.K), 1.0, -1.0) for f in others}
        bias = np.sum([weights[f] @ sign[f] for f in others], axis=0) / n
        gram -= (n * np.outer(mean, mean)).astype(gram.dtype)
        parts = [self.Z[f].T @ (weights[f][:, None] * (sign[f] - bias)).astype(gram.dtype) for f in others]
        right = np.sum(parts, axis=0)
        return _Fit(n=n, gram=gram, right=right.astype(np.float64), mean=mean, bias=bias)

    def extend(
        self, base: tuple[str, ...], more: Sequence[str], *, before: _Found | None = None
    ) -> list[_Found]:
        """The base with each of the nodes in `more`, at its best penalty near that of the base."""
        penalties = PENALTIES
        if before is not None:
            at = PENALTIES.index(before.penalty)
            penalties = PENALTIES[max(at - 1, 0) : at + 2]
        found: dict[str, _Found] = {}
        for penalty in penalties:
            for key, scores in self._scores(base, more, penalty).items():
                one = self._found((*base, key), scores, penalty, before)
                if key not in found or _cost(one) < _cost(found[key]):
                    found[key] = one
        return list(found.values())

    def _scores(self, base: tuple[str, ...], more: Sequence[str], penalty: float) -> dict[str, NDArray[Any]]:
        """(N, K) for each longer concatenation: every row by the fit without its fold."""
        start = np.concatenate([np.empty(0, dtype=int), *(self.columns[key] for key in base)])
        tables = {key: np.empty((len(self.y), self.K), dtype=np.float32) for key in more}

        def score(f: int) -> None:
            fit, K = self.fits[f], self.K
            factor = fit.factor(start, penalty)
            wide = np.zeros((len(fit.mean), len(more) * K))  # the weights of all, one product
            for index, key in enumerate(more):
                columns = np.concatenate([start, self.columns[key]])
                weights = fit.extend(factor, start, self.columns[key], penalty)  # (d, K)
                wide[columns, index * K : (index + 1) * K] = weights
            shift = np.tile(fit.bias, len(more)) - fit.mean @ wide
            scores = self.Z[f] @ wide.astype(np.float32) + shift.astype(np.float32)
            for index, key in enumerate(more):
                tables[key][self.held[f]] = scores[:, index * K : (index + 1) * K]

        in_threads(score, range(self.n_folds))
        return tables

    def _found(
        self, nodes: tuple[str, ...], scores: NDArray[Any], penalty: float, before: _Found | None
    ) -> _Found:
        scores = scores.astype(np.float64)
        temperature = fit_temperature(scores, self.y, weights=self.weight)
        losses = log_losses(self.y, softmax(scores / temperature, axis=1))
        gain: Difference | None = None
        if before is not None:
            gain = paired_difference(before.losses, losses, weights=self.weight, unit=self.unit)
        step = NodeStep(
            nodes=nodes,
            num_features=sum(self.widths[key] for key in nodes),
            nll=float(np.average(losses, weights=self.weight)),
            accuracy=float(np.average(scores.argmax(axis=1) == self.y, weights=self.weight)),
            gain=gain.mean if gain else None,
            gain_se=gain.se if gain else None,
        )
        return _Found(step=step, losses=losses, penalty=penalty)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fit:
    """(G + alpha) W = B with G the cross-products (D, D) and B (D, K) of centred rows."""

    n: float  # the sum of their weights
    gram: NDArray[Any]
    right: NDArray[np.float64]
    mean: NDArray[np.float64]
    bias: NDArray[np.float64]

    def block(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float64]:
        part: NDArray[np.float64] = self.gram[np.ix_(rows, columns)].astype(np.float64)
        return part

    def factor(
        self, columns: NDArray[np.intp], penalty: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """L with L L^T = G + alpha in these columns, and L^-1 B."""
        if not len(columns):
            return np.empty((0, 0)), np.empty((0, self.right.shape[1]))
        lower = cholesky(_add_to_diagonal(self.block(columns, columns), penalty * self.n), lower=True)
        return lower, solve_triangular(lower, self.right[columns], lower=True)

    def extend(
        self,
        factor: tuple[NDArray[np.float64], NDArray[np.float64]],
        base: NDArray[np.intp],
        more: NDArray[np.intp],
        penalty: float,
    ) -> NDArray[np.float64]:
        """W of the columns `base`, whose factor is known, and `more`, by block elimination."""
        lower, inner = factor
        corner = _add_to_diagonal(self.block(more, more), penalty * self.n)
        if not len(base):
            own = cholesky(corner, lower=True)
            turned = solve_triangular(own, self.right[more], lower=True)
            return np.asarray(solve_triangular(own, turned, lower=True, trans=1))
        across = solve_triangular(lower, self.block(base, more), lower=True)  # (d, e)
        own = cholesky(corner - across.T @ across, lower=True)
        turned = solve_triangular(own, self.right[more] - across.T @ inner, lower=True)
        last = solve_triangular(own, turned, lower=True, trans=1)
        first = solve_triangular(lower, inner - across @ last, lower=True, trans=1)
        return np.concatenate([first, last])


def _thinned(rows: NDArray[np.intp], fold: NDArray[np.int64], most: int) -> NDArray[np.intp]:
    """Some of the rows, of each fold one at least: at random, since labels may come in order."""
    if len(rows) <= most:
        return rows
    drawn = np.random.default_rng(0).choice(len(rows), most, replace=False)
    folds, first = np.unique(fold, return_index=True)
    return rows[np.union1d(drawn, first[~np.isin(folds, fold[drawn])])]


def _product(rows: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[Any]:
    even = bool((weights == 1).all())
    product: NDArray[Any] = rows.T @ (rows if even else rows * weights[:, None].astype(rows.dtype))
    return product


def _add_to_diagonal(block: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    block[np.diag_indices_from(block)] += alpha
    return block


def _standardised(X: NDArray[Any]) -> NDArray[Any]:
    """Standardised features; on axes of their own where there are more of them than rows. float32."""
    if len(X) < X.shape[1]:
        return rotate(X, keep_float64=True).rows.astype(np.float32)
    return Standardizer.of(X).apply(X).astype(np.float32)


def choice_lines(choice: NodeChoice) -> list[str]:
    """The way to the nodes that were chosen."""
    lines = [
        f"nodes chosen by ridge regression in {choice.n_folds}-fold cross-validation on {choice.n_rows:,} "
        "training rows, from the best one on, while the next lowers the log-loss by more than its standard "
        "error:",
        f"  {'node':<20}  {'log-loss':>8}  {'accuracy':>8}  {'lower by':>17}",
    ]
    for index, step in enumerate(choice.steps):
        lines.append(_step_line(step, "+ " if index else "  "))
    if choice.refused:
        lines.append(_step_line(choice.refused, "not ") + "  within its standard error")
    elif len(choice.singles) == len(choice.steps):
        lines.append("all of the store's nodes are used")
    return lines


def _step_line(step: NodeStep, sign: str) -> str:
    gain = "" if step.gain is None else f"{step.gain:>8.4f} ± {step.gain_se:.4f}"
    return f"  {sign + step.nodes[-1]:<20}  {step.nll:>8.4f}  {step.accuracy:>8.4f}  {gain:>17}".rstrip()
