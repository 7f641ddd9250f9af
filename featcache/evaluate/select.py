"""Choosing a head's parameters by cross-validation on the training rows.

Never sees a test row. Candidates are compared by mean log-loss after the temperature that suits each, which
is less noisy than accuracy where few rows decide; k nearest neighbours by accuracy, since their votes are
not probabilities one would tune.
"""

from __future__ import annotations

import itertools
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
from featcache.heads.threads import in_threads
from featcache.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from featcache.heads.base import Head

MAX_EXTENSIONS = 8  # candidates a grid may grow by
PART_ROWS = 4096  # turned into probabilities at a time
DECADE = 10.0  # between the values that are tried first where a candidate is dear
SURELY = 3.0  # standard errors
WORTH = 0.01  # standard errors that the last step to an edge must have gained for another one


def finite_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has neither infinity nor NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Values of the searched parameters and their scores, means over the rows held out; low nll is good.

    An nll of infinity: its scores were not finite.
    """

    values: Mapping[str, Any]
    nll: float
    nll_se: float  # standard error of the mean, from the folds
    accuracy: float
    accuracy_se: float
    temperature: float

    def to_json(self) -> dict[str, Any]:
        only = {"value": next(iter(self.values.values()))} if len(self.values) == 1 else {}
        return finite_or_none({**only, **asdict(self)})


@dataclass(frozen=True, kw_only=True, eq=False)
class OutOfFold:
    """What the chosen candidate says of M training rows by heads that were fitted without them.

    rows: (M,), ascending indices into the training rows. y: (M,). fold: (M,). probabilities: (M, K), after
    the temperature. losses: (M,), nats. weights: (M,), with a mean of 1.
    """

    rows: NDArray[np.int64]
    y: NDArray[np.int64]
    fold: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    losses: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def hits(self) -> NDArray[np.float64]:
        """(M,), 1 where the most probable class is the true one, else 0."""
        right: NDArray[np.float64] = (self.probabilities.argmax(axis=1) == self.y).astype(np.float64)
        return right


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What cross-validation chose.

    `params` are the parameters to fit with: those given, the chosen ones and the temperature. `candidates`
    are what was compared, none where nothing was searched; `best` is the chosen one, None without folds.
    """

    params: dict[str, Any]
    candidates: tuple[Candidate, ...]
    criterion: str
    n_folds: int
    best: Candidate | None = None
    notes: tuple[str, ...] = ()
    refit: Callable[[Mapping[str, Any]], Head] | None = field(default=None, compare=False, repr=False)
    """Fits the head on all rows with these parameters, from what the search holds; None: fit it as usual."""
    out_of_fold: OutOfFold | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRows:
    """What a search may see.

    X: ndarray of shape (n_samples, n_features). y: (n_samples,), 0 … n_classes - 1, all of them present.
    views: augmented vectors of the same rows. weights: (n_samples,) of the losses, with a mean of 1.
    """

    X: NDArray[Any]
    y: NDArray[np.int64]
    folds: Folds
    views: Sequence[NDArray[Any]] = ()
    weights: NDArray[np.float64] | None = None

    @property
    def n_classes(self) -> int:
        return int(self.y.max()) + 1


def select(
    name: str,
    kind: HeadKind,
    params: Mapping[str, Any],
    *,
    rows: TrainingRows,
    seed: int,
    progress: Progress | None = None,
) -> Selection:
    """Choose what is in `kind.searched`, but for what `params` gives, and the temperature.

    A grid with a `factor` grows while its best value is on an edge, then gets a value between its best two.
    Ties go to the stronger regularisation. HeadError: no candidate has finite scores.
    """
    given = dict(params)
    searched = tuple(parameter for parameter in kind.searched if parameter not in given)
    if not rows.folds.n_folds:
        given |= {parameter: kind.grid[parameter][len(kind.grid[parameter]) // 2] for parameter in searched}
        note = f"{rows.folds.lack}: nothing could be held out, so nothing was chosen"
        return Selection(params=given, candidates=(), criterion=kind.criterion, n_folds=0, notes=(note,))
    search = _Search(name, kind, given, searched, rows, seed, progress or SilentProgress())
    best = search.run()
    if not math.isfinite(best.nll):
        raise HeadError(
            f"{name} cannot be fitted: its scores of the rows held out are not finite. Its parameters or the "
            "size of the features may not suit it: set others with --param, or take another head."
        )
    return Selection(
        params={**given, **best.values, "temperature": best.temperature},
        candidates=tuple(search.scored()) if searched else (),
        best=best,
        criterion=kind.criterion,
        n_folds=rows.folds.n_folds,
        notes=search.notes(best),
        refit=search.path.fit if search.path else None,
        out_of_fold=search.kept[_key(best.values)],
    )


def _key(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(values.values())


class _Search:
    def __init__(
        self,
        name: str,
        kind: HeadKind,
        params: Mapping[str, Any],
        searched: tuple[str, ...],
        rows: TrainingRows,
        seed: int,
        progress: Progress,
    ) -> None:
        self.name, self.kind, self.params, self.searched = name, kind, params, searched
        self.rows, self.folds, self.seed, self.progress = rows, rows.folds, seed, progress
        self.views = {"views": rows.views} if kind.uses_views and rows.views else {}
        self.found: dict[tuple[Any, ...], Candidate] = {}
        self.kept: dict[tuple[Any, ...], OutOfFold] = {}  # of the best so far alone
        with self._one_line():
            self.path = self._head().start_search(
                rows.X,
                rows.y,
                fold=self.folds.fold,
                n_folds=self.folds.n_folds,
                searched=searched,
                **self.views,
            )

    def run(self) -> Candidate:
        """Score the grid, what it grows by and a half step at last, and return the best."""
        grids = [self._first_values(parameter) for parameter in self.searched]
        if self.kind.is_valley and len(grids) == 1:
            self._descend(grids[0])
        else:
            self._score(
                [dict(zip(self.searched, values, strict=True)) for values in itertools.product(*grids)]
            )
        for _ in range(MAX_EXTENSIONS):
            beyond = self._beyond_edge(self.best())
            if beyond is None:
                break
            self._score([beyond])
        between = self._half_step(self.best())
        if between is not None:
            self._score([between])
        return self.best()

    def _descend(self, values: Sequence[float]) -> None:
        """Score values a decade apart, up to one that is surely worse than the best, and what is missing
        beside the best: what is left out lies higher on the sides of a valley."""
        (parameter,) = self.searched
        ratio = values[1] / values[0] if len(values) > 1 else DECADE
        stride = max(round(math.log(DECADE) / math.log(ratio)), 1)
        coarse = sorted({*values[::stride], values[-1]})
        self._score([{parameter: value} for value in coarse], until_sure=True)
        while True:
            at = values.index(self.best().values[parameter])
            beside = [value for value in values[max(at - 1, 0) : at + 2] if (value,) not in self.found]
            if not beside:
                return
            self._score([{parameter: value} for value in beside])

    def best(self) -> Candidate:
        """The best candidate; of equals, the one that regularises more."""
        return min(self.scored(), key=self._rank)

    def scored(self) -> list[Candidate]:
        """All that was scored, by ascending values."""
        return [self.found[values] for values in sorted(self.found)]

    def notes(self, best: Candidate) -> tuple[str, ...]:
        notes = []
        if self._beyond_edge(best) is not None:
            (parameter,) = self.searched
            notes.append(f"{parameter} = {best.values[parameter]:g} is on the edge of what was searched")
        held, K = len(np.unique(self.rows.y[self.folds.held_out])), self.rows.n_classes
        if held < K:
            notes.append(f"no row of {K - held} of the {K} classes could be held out in cross-validation")
        return tuple(notes)

    def _rank(self, candidate: Candidate) -> tuple[float, ...]:
        cost = candidate.nll if self.kind.criterion == "nll" else -candidate.accuracy
        cost = cost if math.isfinite(candidate.nll) else math.inf
        weak = [
            -value if self.kind.strong_end.get(parameter) == "high" else value
            for parameter, value in candidate.values.items()
        ]
        return (cost, *weak)

    def _first_values(self, parameter: str) -> Sequence[float]:
        """The grid; whole numbers stop at the rows that the smallest training part has."""
        grid = self.kind.grid[parameter]
        if all(isinstance(value, float) for value in grid):
            return grid
        held = np.bincount(self.folds.fold[self.folds.held_out])
        most = len(self.rows.y) - int(held.max())
        return sorted({min(value, most) for value in grid})

    def _beyond_edge(self, best: Candidate) -> dict[str, float] | None:
        """The value next to the best where that is the lowest or the highest so far and the grid grows."""
        if self.kind.factor is None or len(self.searched) != 1:
            return None
        (parameter,) = self.searched
        values, value = sorted(values[0] for values in self.found), best.values[parameter]
        if value not in (values[0], values[-1]):
            return None
        beside = self.found[(values[1] if value == values[0] else values[-2],)]
        if beside.nll - best.nll < WORTH * best.nll_se:
            return None  # so flat that what lies beyond is as good
        return {parameter: value / self.kind.factor if value == values[0] else value * self.kind.factor}

    def _half_step(self, best: Candidate) -> dict[str, float] | None:
        """The value halfway, by its logarithm, from the best to its better neighbour."""
        if self.kind.factor is None or len(self.searched) != 1:
            return None
        (parameter,) = self.searched
        values, value = sorted(values[0] for values in self.found), best.values[parameter]
        if value in (values[0], values[-1]):
            return None  # what is beyond is as good, or was not to be searched
        at = values.index(value)
        beside = [self.found[(values[i],)] for i in (at - 1, at + 1)]
        other = min(beside, key=lambda candidate: candidate.nll)
        if other.nll - best.nll < WORTH * best.nll_se:
            return None
        return {parameter: math.sqrt(value * other.values[parameter])}

    def _score(self, candidates: Sequence[Mapping[str, Any]], *, until_sure: bool = False) -> None:
        """Score every candidate on the rows that each fold holds out, by heads fitted without them.

        until_sure: only as far as to the first that is surely worse than the best so far.
        """
        with self._one_line():
            told = zip(candidates, self._tables(candidates), strict=True)
            for done, (values, table) in enumerate(told, start=1):
                candidate, predictions = self._judge(values, table)
                self.found[_key(values)] = candidate
                if self.best() is candidate:
                    self.kept = {_key(values): predictions}
                elif until_sure and self._is_surely_worse(predictions):
                    self.progress.advance(len(candidates) - done)  # those that cannot win are settled, too
                    break

    def _is_surely_worse(self, predictions: OutOfFold) -> bool:
        """Than the best so far, on the same rows. Nothing is while the best is the lowest value: where rows
        differ much in length, the log-loss can rise before it falls."""
        if self.best() is self.scored()[0]:
            return False
        (best,) = self.kept.values()
        above = predictions.weights * (predictions.losses - best.losses)
        return bool(above.mean() > SURELY * above.std() / math.sqrt(len(above)))

    def _tables(self, candidates: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[Any]]:
        """The scores (N, K) of each candidate."""
        what = f"choosing {' and '.join(self.searched)} of" if self.searched else "cross-validating"
        if self.path is None:
            yield from self._fold_by_fold(candidates, f"{what} {self.name}")
            return
        # A bar of one step says nothing, and a grid that grows would leave one for every step.
        progress = self.progress if len(candidates) > 1 and not self.found else SilentProgress()
        progress.start(f"{what} {self.name}", total=len(candidates), unit="candidates")
        try:
            for table in self.path.scores(candidates):
                progress.advance(1)
                yield table
        finally:
            progress.finish()

    def _fold_by_fold(self, candidates: Sequence[Mapping[str, Any]], label: str) -> NDArray[np.float64]:
        """(V, N, K), of a head fitted anew for every fold."""
        self.progress.start(label, total=self.folds.n_folds, unit="folds")
        shape = (len(candidates), len(self.rows.y), self.rows.n_classes)
        scores = np.full(shape, -np.inf)  # a class that a fold does not know stays at -inf
        for fold in range(self.folds.n_folds):
            held = self.folds.fold == fold
            heads = self._fit_fold(~held, candidates)
            for index, head in enumerate(heads):
                columns = np.ix_(np.flatnonzero(held), head.classes_)
                scores[index][columns] = head.column_scores(self.rows.X[held])
            self.progress.advance(1)
        self.progress.finish()
        return scores

    def _head(self) -> Head:
        return build_head(self.name, {**self.kind.search_params, **self.params}, seed=self.seed)

    def _fit_fold(self, fitted: NDArray[np.bool_], candidates: Sequence[Mapping[str, Any]]) -> Sequence[Head]:
        views = {name: [view[fitted] for view in views] for name, views in self.views.items()}
        X, y = self.rows.X[fitted], self.rows.y[fitted]
        return self._head().fit_path(X, y, candidates=candidates, **views)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """What scikit-learn says of parameters and features that do not go together, as one line."""
        try:
            yield
        except ValueError as error:
            raise HeadError(f"{self.name} cannot be fitted: {' '.join(str(error).split())}") from error

    def _judge(self, values: Mapping[str, Any], scores: NDArray[Any]) -> tuple[Candidate, OutOfFold]:
        """Scores of every held-out row, (N, K), to means and standard errors over the folds."""
        held = np.flatnonzero(self.folds.held_out)
        scores, y, fold = scores[held], self.rows.y[held], self.folds.fold[held]
        weights = np.ones(len(held)) if self.rows.weights is None else self.rows.weights[held]
        weights = weights / weights.mean()
        finite = not (np.isnan(scores) | (scores == np.inf)).any()
        if not finite:
            scores = np.zeros_like(scores)
        temperature = self.params.get("temperature")
        if temperature is None:
            temperature = fit_temperature(scores, y, weights=weights)
        probabilities = _probabilities(scores, temperature)
        losses = log_losses(y, probabilities)
        hits = (scores.argmax(axis=1) == y).astype(np.float64)
        nll, nll_se = _mean_over_folds(losses, weights, fold)
        accuracy, accuracy_se = _mean_over_folds(hits, weights, fold)
        candidate = Candidate(
            values=dict(values),
            nll=nll if finite else math.inf,
            nll_se=nll_se if finite else math.nan,
            accuracy=accuracy,
            accuracy_se=accuracy_se,
            temperature=temperature,
        )
        return candidate, OutOfFold(
            rows=held, y=y, fold=fold, probabilities=probabilities, losses=losses, weights=weights
        )


def _probabilities(scores: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """softmax(scores / temperature), (n, K), float64 whatever the scores are."""
    probabilities = np.empty(scores.shape)

    def fill(start: int) -> None:
        part = slice(start, start + PART_ROWS)
        probabilities[part] = softmax(scores[part].astype(np.float64) / temperature, axis=1)

    in_threads(fill, range(0, len(scores), PART_ROWS), products=False)
    return probabilities


def _mean_over_folds(
    values: NDArray[np.float64], weights: NDArray[np.float64], fold: NDArray[np.int64]
) -> tuple[float, float]:
    """The mean over all rows, and the standard error of the folds' means."""
    means = [np.average(values[fold == k], weights=weights[fold == k]) for k in np.unique(fold)]
    error = np.std(means, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(np.average(values, weights=weights)), float(error)
