"""Choosing a head's parameter by cross-validation on the training rows.

Never sees a test row. Candidates are compared by mean log-loss, which is less noisy than accuracy where
few rows decide; k nearest neighbours by accuracy, since their votes are not probabilities one would tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from featcache.errors import HeadError
from featcache.evaluate.metrics import log_losses
from featcache.evaluate.splits import Folds
from featcache.heads import HeadKind, build_head
from featcache.heads.temperature import fit_temperature
from featcache.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from featcache.heads.base import Head

MAX_EXTENSIONS = 8  # candidates a grid may grow by


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One value of the searched parameter and its scores, means over folds. Lower nll is better."""

    value: float
    nll: float
    nll_se: float  # standard error of the mean over folds
    accuracy: float
    accuracy_se: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What cross-validation chose.

    `params` are the parameters to fit with: those given, the chosen one and the temperature.
    """

    params: dict[str, Any]
    candidates: tuple[Candidate, ...]
    criterion: str
    n_folds: int
    notes: tuple[str, ...] = ()
    refit: Callable[[Mapping[str, Any]], Head] | None = field(default=None, compare=False, repr=False)
    """Fits the head on all rows with these parameters, from what the search holds; None: fit it as usual."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scored:
    candidate: Candidate
    temperature: float


def select(
    name: str,
    kind: HeadKind,
    params: Mapping[str, Any],
    *,
    X: NDArray[Any],
    y: NDArray[np.int64],
    folds: Folds,
    seed: int,
    progress: Progress | None = None,
) -> Selection:
    """Choose `kind.searched` over its grid, unless `params` gives it, and the temperature if it needs one.

    X: ndarray of shape (n_samples, n_features). y: (n_samples,), 0 … n_classes - 1, all of them present.
    A grid with a `factor` grows while its best value is on an edge. Ties go to the stronger regularisation.
    """
    given = dict(params)
    searched = None if kind.searched in given else kind.searched
    needs_temperature = kind.calibrated and "temperature" not in given
    if searched is None and not needs_temperature:
        return Selection(params=given, candidates=(), criterion=kind.criterion, n_folds=0)
    if not folds.n_folds:
        if searched is not None:
            given[searched] = kind.grid[len(kind.grid) // 2]
        note = "every class has a single image: nothing could be held out, so nothing was chosen"
        return Selection(params=given, candidates=(), criterion=kind.criterion, n_folds=0, notes=(note,))
    search = _Search(name, kind, given, searched, X, y, folds, seed, progress or SilentProgress())
    best = search.run()
    if searched is not None:
        given[searched] = best.candidate.value
    if needs_temperature:
        given["temperature"] = best.temperature
    candidates = tuple(scored.candidate for scored in search.scored()) if searched else ()
    return Selection(
        params=given,
        candidates=candidates,
        criterion=kind.criterion,
        n_folds=folds.n_folds,
        notes=search.notes(best),
        refit=search.path.fit if search.path else None,
    )


class _Search:
    def __init__(
        self,
        name: str,
        kind: HeadKind,
        params: Mapping[str, Any],
        searched: str | None,
        X: NDArray[Any],
        y: NDArray[np.int64],
        folds: Folds,
        seed: int,
        progress: Progress,
    ) -> None:
        self.name, self.kind, self.params, self.searched = name, kind, params, searched
        self.X, self.y, self.folds, self.seed, self.progress = X, y, folds, seed, progress
        self.n_classes = int(y.max()) + 1
        self.found: dict[float, _Scored] = {}
        with self._one_line():
            self.path = self._head().start_search(X, y, fold=folds.fold, n_folds=folds.n_folds, name=searched)

    def run(self) -> _Scored:
        """Score the grid, and what it grows by, and return the best."""
        if self.searched is None:
            self._score([math.nan])
            return next(iter(self.found.values()))
        self._score(self._first_grid())
        for _ in range(MAX_EXTENSIONS):
            beyond = self._beyond_edge(self.best())
            if beyond is None:
                break
            self._score([beyond])
        return self.best()

    def best(self) -> _Scored:
        """The best candidate; of equals, the one that regularises more."""
        sign = 1 if self.kind.strong_end == "low" else -1
        return min(self.scored(), key=lambda s: (self._cost(s), sign * s.candidate.value))

    def scored(self) -> list[_Scored]:
        """All that was scored, by ascending value."""
        return [self.found[value] for value in sorted(self.found)]

    def notes(self, best: _Scored) -> tuple[str, ...]:
        if self.searched is None or self._beyond_edge(best) is None:
            return ()
        return (f"{self.searched} = {best.candidate.value:g} is on the edge of what was searched",)

    def _cost(self, scored: _Scored) -> float:
        return scored.candidate.nll if self.kind.criterion == "nll" else -scored.candidate.accuracy

    def _first_grid(self) -> Sequence[float]:
        """The grid; whole numbers stop at the rows that the smallest training part has."""
        if all(isinstance(value, float) for value in self.kind.grid):
            return self.kind.grid
        held = np.bincount(self.folds.fold[self.folds.held_out])
        most = len(self.y) - int(held.max())
        return sorted({min(value, most) for value in self.kind.grid})

    def _beyond_edge(self, best: _Scored) -> float | None:
        """The value next to the best where that is the lowest or the highest so far and the grid grows."""
        values, value = sorted(self.found), best.candidate.value
        if self.kind.factor is None or value not in (values[0], values[-1]):
            return None
        return value / self.kind.factor if value == values[0] else value * self.kind.factor

    def _score(self, values: Sequence[float]) -> None:
        """Score every value on the rows that each fold holds out, by heads fitted without them."""
        with self._one_line():
            for value, table in zip(values, self._tables(values), strict=True):
                self.found[value] = self._judge(value, table)

    def _tables(self, values: Sequence[float]) -> Iterator[NDArray[Any]]:
        """The scores (N, K) of each value."""
        label = f"choosing {self.searched}" if self.searched else "calibrating"
        if self.path is None:
            yield from self._fold_by_fold(values, label)
            return
        self.progress.start(label, total=len(values), unit="candidates")
        for table in self.path.scores(values):
            self.progress.advance(1)
            yield table
        self.progress.finish()

    def _fold_by_fold(self, values: Sequence[float], label: str) -> NDArray[np.float64]:
        """(V, N, K), of a head fitted anew for every fold."""
        self.progress.start(label, total=self.folds.n_folds, unit="folds")
        shape = (len(values), len(self.y), self.n_classes)
        scores = np.full(shape, -np.inf)  # a class that a fold does not know stays at -inf
        for fold in range(self.folds.n_folds):
            held = self.folds.fold == fold
            heads = self._fit_fold(~held, values)
            for index, head in enumerate(heads):
                columns = np.ix_(np.flatnonzero(held), head.classes_)
                scores[index][columns] = head.column_scores(self.X[held])
            self.progress.advance(1)
        self.progress.finish()
        return scores

    def _head(self) -> Head:
        return build_head(self.name, {**self.kind.search_params, **self.params}, seed=self.seed)

    def _fit_fold(self, rows: NDArray[np.bool_], values: Sequence[float]) -> Sequence[Head]:
        X, y = self.X[rows], self.y[rows]
        if self.searched is None:
            return [self._head().fit(X, y)]
        return self._head().fit_path(X, y, name=self.searched, values=values)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """What scikit-learn says of parameters and features that do not go together, as one line."""
        try:
            yield
        except ValueError as error:
            raise HeadError(f"{self.name} cannot be fitted: {error}") from error

    def _judge(self, value: float, scores: NDArray[Any]) -> _Scored:
        """Scores of every held-out row, (N, K), to means and standard errors over the folds."""
        held = self.folds.held_out
        scores, y, fold = scores[held].astype(np.float64), self.y[held], self.folds.fold[held]
        temperature = self.params.get("temperature", 1.0)
        if self.kind.calibrated and "temperature" not in self.params:
            temperature = fit_temperature(scores, y)
        losses = log_losses(y, softmax(scores / temperature, axis=1))
        hits = (scores.argmax(axis=1) == y).astype(np.float64)
        nll, nll_se = _mean_over_folds(losses, fold, self.folds.n_folds)
        accuracy, accuracy_se = _mean_over_folds(hits, fold, self.folds.n_folds)
        candidate = Candidate(value=value, nll=nll, nll_se=nll_se, accuracy=accuracy, accuracy_se=accuracy_se)
        return _Scored(candidate=candidate, temperature=temperature)


def _mean_over_folds(
    values: NDArray[np.float64], fold: NDArray[np.int64], n_folds: int
) -> tuple[float, float]:
    """The mean over all rows, and the standard error of the folds' means."""
    means = [values[fold == k].mean() for k in range(n_folds) if np.any(fold == k)]
    error = np.std(means, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(values.mean()), float(error)
