"""A competition of heads on the training rows, within a time budget. Never sees a test row.

Every head is cross-validated on the same folds and calibrated on the rows they hold out, and the heads are
compared by mean log-loss. Not by accuracy: few rows decide that, and probabilities are part of the answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.evaluate.select import (
    Candidate,
    OutOfFold,
    Selection,
    TrainingRows,
    finite_or_none,
    select,
)
from featcache.heads import HEADS, HeadKind
from featcache.heads.entry import Entry, Size
from featcache.progress import Progress, SilentProgress

NEGLIGIBLE = 1e-3  # of the lowest log-loss: heads that differ by less are tied, however surely they differ
QUICK = 3.0  # seconds, by arithmetic, below which a head's search is not worth a bar


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A head with the parameters that cross-validation chose for it, and how it compares with the best.

    behind: its mean log-loss less that of the best head; behind_se: the standard error of that difference.
    ahead: its accuracy less that of the best head, likewise.
    """

    head: str
    simplicity: int
    best: Candidate
    behind: float
    behind_se: float
    ahead: float
    ahead_se: float
    chosen: bool
    seconds: float = field(compare=False)

    @property
    def is_tied(self) -> bool:
        """Whether its log-loss is within one standard error of the best, or practically the same."""
        return self.behind <= _reach(self.behind_se, self.best.nll - self.behind)

    def to_json(self) -> dict[str, Any]:
        scores = {name: getattr(self.best, name) for name in ("nll", "nll_se", "accuracy", "accuracy_se")}
        scores |= {name: getattr(self, name) for name in ("behind", "behind_se", "ahead", "ahead_se")}
        return {
            "head": self.head,
            "params": {**self.best.values, "temperature": self.best.temperature},
            **finite_or_none(scores),
            "tied": self.is_tied,
            "chosen": self.chosen,
            "seconds": self.seconds,
        }


def _reach(se: float, lowest: float) -> float:
    """Up to what difference from the `lowest` log-loss a head is tied with the one that has it."""
    return max(se, NEGLIGIBLE * lowest)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A head that did not take part."""

    head: str
    why: str

    def to_json(self) -> dict[str, Any]:
        return {"head": self.head, "why": self.why}


@dataclass(frozen=True, kw_only=True)
class Competition:
    """Who took part, simplest first, and who did not. Without folds nobody could be compared."""

    contenders: tuple[Contender, ...]
    left_out: tuple[LeftOut, ...]
    weighted: bool  # every class counts alike in the means

    @property
    def chosen(self) -> Contender | None:
        return next((one for one in self.contenders if one.chosen), None)

    @property
    def best(self) -> Contender | None:
        """Of the lowest log-loss."""
        return min(self.contenders, key=lambda one: (one.behind, one.simplicity), default=None)

    @property
    def runner_up(self) -> Contender | None:
        """Of the lowest log-loss but for the chosen one."""
        others = [one for one in self.contenders if not one.chosen]
        return min(others, key=lambda one: (one.behind, one.simplicity), default=None)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of what one head loses beyond another on the same rows, and its standard error."""

    mean: float
    se: float


def paired_difference(
    one: NDArray[np.float64],
    other: NDArray[np.float64],
    *,
    weights: NDArray[np.float64],
    unit: NDArray[np.int64] | None = None,
) -> Difference:
    """The weighted mean of one - other, values of the same rows, (M,), with the standard error of that.

    The standard error is that of the differences row by row: both heads were asked the same rows, and how
    hard a row is cancels. That of either mean alone would be many times larger, and would call heads
    tied that differ on most rows. Rows of one `unit`, (M,), the same image or group, count as one. What other
    training rows would have made of the heads is not in it. One unit alone tells nothing: it is infinite.
    """
    difference = one - other
    mean = float(np.average(difference, weights=weights))
    unit = np.arange(len(one)) if unit is None else np.unique(unit, return_inverse=True)[1]
    sums = np.bincount(unit, weights=weights * (difference - mean))
    n = len(sums)
    if n < 2:
        return Difference(mean=mean, se=math.inf)
    return Difference(mean=mean, se=float(np.sqrt(np.sum(sums**2) * n / (n - 1)) / weights.sum()))


def compete(
    rows: TrainingRows,
    *,
    params_of: Callable[[HeadKind], Mapping[str, Any]],
    why_not: Callable[[HeadKind], str | None],
    budget: float,
    seed: int,
    spent: float = 0.0,
    progress: Progress | None = None,
) -> tuple[Competition, str, Selection]:
    """The competition, the head it chose, and that head's selection.

    params_of: the parameters that are given for a head. why_not: a reason to leave it out. budget: seconds,
    of which so many are `spent`. The simplest head that is tied with the one of the lowest log-loss is taken.
    """
    started = time.perf_counter() - spent
    size = size_of(rows)
    field_ = sorted((k for k in HEADS.values() if k.entry), key=lambda kind: _entry(kind).simplicity)
    if not size.folds:
        kind = field_[0]
        selection = select(kind.name, kind, params_of(kind), rows=rows, seed=seed)
        return Competition(contenders=(), left_out=(), weighted=False), kind.name, selection
    found: dict[str, tuple[Selection, float]] = {}
    left_out, planned = [], spent
    for kind in field_:
        wanted = _entry(kind).seconds(size)
        gone = max(planned, time.perf_counter() - started)
        why = why_not(kind) or _unfit(_entry(kind), rows)
        if found and not why:  # one head is tried whatever the budget
            why = _too_long(wanted, gone, budget)
        if why:
            left_out.append(LeftOut(head=kind.name, why=why))
            continue
        planned += wanted
        begun = time.perf_counter()
        try:
            bar = bar_for(kind, rows, progress)
            selection = select(kind.name, kind, params_of(kind), rows=rows, seed=seed, progress=bar)
        except HeadError as error:  # the others can still be compared
            left_out.append(LeftOut(head=kind.name, why=str(error)))
            continue
        found[kind.name] = selection, time.perf_counter() - begun
        _forget(found, rows)
    if not found:
        raise HeadError(f"no head can be fitted: {'; '.join(one.why for one in left_out)}")
    contenders = _compare(found, rows)
    chosen = next(one.head for one in contenders if one.chosen)
    competition = Competition(
        contenders=contenders, left_out=tuple(left_out), weighted=rows.weights is not None
    )
    return competition, chosen, found[chosen][0]


def size_of(rows: TrainingRows) -> Size:
    """What the cost of a head follows from."""
    return Size(n=len(rows.y), d=rows.X.shape[1], k=rows.n_classes, folds=rows.folds.n_folds)


def bar_for(kind: HeadKind, rows: TrainingRows, progress: Progress | None) -> Progress:
    """Where the search of a head tells how far it is: nowhere where it is quick."""
    quick = kind.entry is not None and kind.entry.seconds(size_of(rows)) < QUICK
    return SilentProgress() if quick or progress is None else progress


def _entry(kind: HeadKind) -> Entry:
    if kind.entry is None:
        raise ValueError(f"{kind.name} takes no part in competitions")
    return kind.entry


def _unfit(entry: Entry, rows: TrainingRows) -> str | None:
    if entry.needs_views and not rows.views:
        return "it wins by augmented views, of which there are none"
    if len(rows.y) < entry.least_rows:
        return f"tried from {entry.least_rows:,} training rows"
    return None


def _too_long(wanted: float, spent: float, budget: float) -> str | None:
    """The reason to leave out a head that would end after the budget.

    By arithmetic, so that always the same heads take part, unless those before it were slower than that.
    """
    if spent + wanted <= budget:
        return None
    if spent >= budget:
        return f"the {budget:g} s of --budget were spent"
    return f"about {_seconds(wanted)}, more than is left of the {budget:g} s of --budget"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 1 else f"{seconds:.1f} s"


def _predictions(selection: Selection) -> OutOfFold:
    if selection.out_of_fold is None:
        raise ValueError("a head that was not cross-validated cannot be compared")
    return selection.out_of_fold


def _loss(selection: Selection) -> float:
    return selection.best.nll if selection.best else math.inf


def _against(selection: Selection, best: Selection, rows: TrainingRows, *, hits: bool = False) -> Difference:
    one, other = _predictions(selection), _predictions(best)
    unit = None if rows.folds.unit is None else rows.folds.unit[one.rows]
    values = [some.hits if hits else some.losses for some in (one, other)]
    return paired_difference(*values, weights=one.weights, unit=unit)


def _forget(found: dict[str, tuple[Selection, float]], rows: TrainingRows) -> None:
    """Let go of what a search holds for fitting the head, where the head is out of reach of the best."""
    best = min((selection for selection, _ in found.values()), key=_loss)
    for name, (selection, seconds) in found.items():
        gap = _against(selection, best, rows)
        if gap.mean > _reach(gap.se, _loss(best)) and selection.refit:
            found[name] = replace(selection, refit=None), seconds


def _compare(found: Mapping[str, tuple[Selection, float]], rows: TrainingRows) -> tuple[Contender, ...]:
    """In the order of simplicity, in which they were found."""
    best = min((selection for selection, _ in found.values()), key=_loss)
    gaps = {name: _against(selection, best, rows) for name, (selection, _) in found.items()}
    chosen = next(name for name, gap in gaps.items() if gap.mean <= _reach(gap.se, _loss(best)))
    contenders = []
    for name, (selection, seconds) in found.items():
        gain = _against(selection, best, rows, hits=True)
        if selection.best is None:
            raise ValueError("a head that was not cross-validated cannot be compared")
        contenders.append(
            Contender(
                head=name,
                simplicity=_entry(HEADS[name]).simplicity,
                best=selection.best,
                behind=gaps[name].mean,
                behind_se=gaps[name].se,
                ahead=gain.mean,
                ahead_se=gain.se,
                chosen=name == chosen,
                seconds=seconds,
            )
        )
    return tuple(contenders)


_LEGEND = (
    "  (log-loss is 0 where the true class is given all probability, and large where a wrong one is;",
    "  ± is one standard error, which chance exceeds one time in three; tied: above by no more, or by 0.1 %)",
)


def competition_lines(competition: Competition) -> list[str]:
    """The table of who took part, the reason for the choice, and who was left out."""
    chosen, best = competition.chosen, competition.best
    if chosen is None or best is None:
        return ["nothing could be held out, so that heads could not be compared: the simplest was taken"]
    hits = "mean per class" if competition.weighted else "accuracy"
    lines = [f"  {'head':<10}  {'log-loss':>17}  {'above the best':>17}  {hits:>17}"]
    for one in competition.contenders:
        gap = "best" if one is best else f"{one.behind:>8.4f} ± {one.behind_se:.4f}"
        lines.append(
            f"{'>' if one.chosen else ' '} {one.head:<10}  {one.best.nll:>8.4f} ± {one.best.nll_se:.4f}"
            f"  {gap:>17}  {one.best.accuracy:>8.4f} ± {one.best.accuracy_se:.4f}"
            + ("  tied" if one.is_tied and one is not best else "")
        )
    if len(competition.contenders) > 1:
        lines += _LEGEND
    lines.append(_reason(competition, chosen, best))
    lines += _disagreement(competition, chosen)
    if competition.left_out:
        lines.append("left out: " + "; ".join(f"{one.head} ({one.why})" for one in competition.left_out))
    return lines


def _reason(competition: Competition, chosen: Contender, best: Contender) -> str:
    if len(competition.contenders) == 1:
        return f"{chosen.head} is taken: no other head took part"
    if chosen is not best:
        within = "one standard error" if chosen.behind <= chosen.behind_se else "0.1 %"
        return (
            f"{chosen.head} is taken: the simplest within {within} of the lowest log-loss, "
            f"that of {best.head}"
        )
    tied = [one.head for one in competition.contenders if one.is_tied and one is not best]
    more = f"; {' and '.join(tied)} tied with it, but less simple" if tied else ", beyond its standard error"
    return f"{chosen.head} is taken: it has the lowest log-loss{more}"


def _disagreement(competition: Competition, chosen: Contender) -> list[str]:
    """Heads that are surely more accurate than the chosen one, whose probabilities are worse."""
    better = [
        one
        for one in competition.contenders
        if one.ahead - chosen.ahead > 2 * math.hypot(one.ahead_se, chosen.ahead_se)
    ]
    if not better:
        return []
    top = max(better, key=lambda one: one.ahead)
    points = 100 * (top.ahead - chosen.ahead)
    return [
        f"{top.head} has {points:.1f} points more accuracy, but its probabilities are worse: for accuracy "
        f"alone, --head {top.head}"
    ]
