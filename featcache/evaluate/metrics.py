"""How good predictions are: accuracy, log-loss, calibration with their intervals; per class; confusion.

Knows labels and probabilities; not which head made them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.evaluate.bootstrap import (
    DRAWS,
    LEAST_UNITS,
    draws_for,
    interval,
    resampled_sums,
    row_counts,
)

LEAST_PROBABILITY = 1e-15  # log-loss counts smaller ones as this, so that it stays finite
_NO_CHANCE = 34.5  # nats from which a probability counts as none: that of the smallest, but for rounding
ECE_BINS = 15
Z95 = 1.959963984540054  # standard normal quantile of 0.975
FULL_CONFUSION = 100  # classes up to which the confusion matrix is kept whole
CONFUSED_PAIRS = 20  # the most confused, kept with examples
EXAMPLES = 5  # ids of a pair
_MOST_KISH = 2  # times as many rows as weigh as much: recalls of 0 and 1 differ in no drawing of few rows
_ROWS = 4096  # at a time, where a table as large as the probabilities would be made

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """How the rows of one class fared."""

    name: str
    n: int
    accuracy: float | None  # recall: of the rows of this class; None without any
    precision: float | None  # of the rows predicted to be this class; None without any
    f1: float | None  # harmonic mean of the two; None where the class is neither there nor predicted


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Rows of one class that were taken for another: how many, and the ids of the surest of them."""

    true: str
    predicted: str
    n: int
    ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Scores of n rows. `classes` name the rows and columns of `confusion` (true, predicted).

    The intervals of shares are Wilson's; for the mean per class and the area under ROC of as many rows as
    have the variance that a bootstrap over the rows finds. Those of log-loss and calibration error are by
    bootstrap. None where that was not asked for, for these two of fewer than `LEAST_UNITS` rows or where all
    are alike, and for all but accuracy and top 5 of a single row. Rows that are not independent count as one
    unit.
    no_chance: rows whose true class was given no more than `LEAST_PROBABILITY`, such as those of a class that
    the head does not know. Each adds 34.5 to the log-loss, which says nothing of the others: nll_of_others.
    Of more than 100 classes `confusion` is None; `confusion_counts` are its cells that are not 0, as (true,
    predicted, rows), and are empty otherwise.
    """

    n: int
    n_units: int  # n where every row is one of its own
    accuracy: float
    accuracy_ci95: Interval
    mean_per_class_accuracy: float  # over the classes that have rows
    mean_per_class_accuracy_ci95: Interval | None
    top5: float | None  # None unless there are more than 5 classes
    top5_ci95: Interval | None
    nll: float  # mean log-loss, nats
    nll_ci95: Interval | None
    no_chance: int
    nll_of_others: float | None  # of the other rows; None without any
    ece: float
    ece_ci95: Interval | None
    auroc: float | None  # of the second of two classes; None unless both have rows
    auroc_ci95: Interval | None
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    confusion_counts: tuple[tuple[int, int, int], ...]
    confused: tuple[ConfusedPair, ...]  # most rows first
    per_class: tuple[ClassMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        """The metrics as JSON-able values."""
        return asdict(self)


def score(
    y: NDArray[np.integer[Any]],
    probabilities: NDArray[Any],
    classes: Sequence[str],
    ids: Sequence[str] | None = None,
    *,
    units: NDArray[np.integer[Any]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Metrics:
    """Metrics of the labelled rows.

    y: ndarray of shape (n_samples,), indices into `classes`; rows of -1 are ignored.
    probabilities: ndarray of shape (n_samples, n_classes). A class the head does not know has probability 0,
        so that its rows count as errors.
    ids: n_samples names, for the examples of what is confused.
    units: (n_samples,), the same number for rows that are not independent: one image or one group.
    draws: of the bootstrap; 0 leaves its intervals out.
    """
    labelled = np.flatnonzero(y >= 0)
    if not len(labelled):
        raise ValueError("there are no labelled rows to score")
    rows = _Rows.of(y[labelled], probabilities if len(labelled) == len(y) else probabilities[labelled])
    pairs = rows.pairs(len(classes))
    per_class = _class_metrics(pairs, classes)
    recalls = [row.accuracy for row in per_class if row.accuracy is not None]
    found = _Headline(
        mean_per_class_accuracy=sum(recalls) / len(recalls),
        nll=float(rows.losses.mean()),
        ece=expected_calibration_error(rows.confidence, rows.correct),
        auroc=_auroc(rows.y, rows.second) if len(classes) == 2 else None,
    )
    names = None if ids is None else [ids[int(row)] for row in labelled]
    units = None if units is None else np.unique(units[labelled], return_inverse=True)[1].ravel()
    n_units = len(labelled) if units is None else int(units.max()) + 1
    wanted = draws_for(len(labelled), draws=draws) if n_units > 1 else 0
    sampling = _Sampling(units=units, n_units=n_units, draws=wanted, seed=seed)
    dense = _dense(pairs, len(classes)) if len(classes) <= FULL_CONFUSION else None
    chance = rows.losses < _NO_CHANCE
    return Metrics(
        n=len(labelled),
        n_units=n_units,
        accuracy=float(rows.correct.mean()),
        accuracy_ci95=_rate_interval(rows.correct, units),
        top5=float(rows.in_top5.mean()) if len(classes) > 5 else None,
        top5_ci95=_rate_interval(rows.in_top5, units) if len(classes) > 5 else None,
        **asdict(found),
        no_chance=int((~chance).sum()),
        nll_of_others=float(rows.losses[chance].mean()) if chance.any() else None,
        **asdict(_intervals(rows, found, len(classes), sampling)),
        classes=tuple(classes),
        confusion=dense,
        confusion_counts=() if dense is not None else tuple(pairs),
        confused=_confused(rows, pairs, classes, names),
        per_class=per_class,
    )


def wilson_interval(successes: float, n: float) -> Interval:
    """The 95 % score interval of a proportion, within [0, 1] also for 0 and n successes.

    (Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.)
    """
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _rate_interval(correct: NDArray[np.bool_], units: NDArray[np.intp] | None) -> Interval:
    """Wilson's, of the share of rows, of as many independent ones as say as much as these.

    The variance of the share between units, over that of independent rows, is by how much there are fewer.
    (Korn & Graubard, "Confidence intervals for proportions with small expected number of positive counts",
    1998.) Where all rows are right, or all wrong, there are as many as units.
    """
    n, rate = len(correct), float(correct.mean())
    if units is None:
        return wilson_interval(int(correct.sum()), n)
    sums = np.bincount(units, weights=correct - rate)
    if 0 < rate < 1 and len(sums) > 1:
        between = len(sums) / (len(sums) - 1) * float((sums**2).sum()) / n**2
        effective = min(rate * (1 - rate) / between, n) if between else float(n)
    else:
        effective = float(len(sums))
    return wilson_interval(rate * effective, effective)


def _share_interval(
    estimate: float, drawn: NDArray[np.float64], *, n_units: int, alike: float, most: float = math.inf
) -> Interval:
    """Wilson's, for a score made of rights and wrongs, of as many rows as have the variance that was drawn.

    Drawing rows again cannot bring up an error that no row shows, so that quantiles of what was drawn claim
    certainty where all rows are right, and too much of it where most are. alike: the number of rows where no
    drawing differs from another. most: a number that few rows must not exceed.
    """
    drawn = drawn[np.isfinite(drawn)]
    variance = float(drawn.var()) * n_units / (n_units - 1) if len(drawn) else 0.0
    sure = estimate in (0.0, 1.0) or variance < 1e-12
    n = alike if sure else min(estimate * (1 - estimate) / variance, most)
    return wilson_interval(estimate * n, n)


def log_losses(y: NDArray[np.integer[Any]], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log of the probability of the true class, ndarray of shape (n_samples,), nats."""
    true = probabilities[np.arange(len(y)), y]
    losses: NDArray[np.float64] = -np.log(np.maximum(true, LEAST_PROBABILITY))
    return losses


def expected_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Mean gap between confidence and accuracy over 15 bins of equal width, weighted by their rows.

    (Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015.)
    """
    gap = np.bincount(_bins(confidence), weights=confidence - correct, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _bins(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    # A bin is (low, high]: confidence 1 is in the last one.
    bins: NDArray[np.int64] = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    return bins


@dataclass(frozen=True, kw_only=True)
class _Headline:
    """The scores whose interval needs a bootstrap, by their names in Metrics."""

    mean_per_class_accuracy: float
    nll: float
    ece: float
    auroc: float | None


@dataclass(frozen=True, kw_only=True)
class _Intervals:
    """Theirs, by their names in Metrics."""

    mean_per_class_accuracy_ci95: Interval | None = None
    nll_ci95: Interval | None = None
    ece_ci95: Interval | None = None
    auroc_ci95: Interval | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sampling:
    """How rows are drawn. units: (n_samples,) from 0, or None, where every row is one of `n_units`."""

    units: NDArray[np.intp] | None
    n_units: int
    draws: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """What all scores are made of, arrays of shape (n_samples,)."""

    y: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]  # the highest probability
    losses: NDArray[np.float64]
    in_top5: NDArray[np.bool_]
    second: NDArray[np.float64]  # the probability of the second class, 0 where there is one class only

    @classmethod
    def of(cls, y: NDArray[np.integer[Any]], probabilities: NDArray[Any]) -> _Rows:
        blocks = [slice(start, start + _ROWS) for start in range(0, len(y), _ROWS)]
        parts = [cls._of_block(y[block], np.asarray(probabilities[block], np.float64)) for block in blocks]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__
        }
        return cls(**joined)

    @classmethod
    def _of_block(cls, y: NDArray[np.integer[Any]], p: NDArray[np.float64]) -> _Rows:
        true = p[np.arange(len(y)), y]
        # The rank of the true class, equal ones by their order, as a stable sort has it.
        ahead = (p > true[:, None]) | ((p == true[:, None]) & (np.arange(p.shape[1]) < y[:, None]))
        return cls(
            y=y.astype(np.int64),
            predicted=p.argmax(axis=1),
            confidence=p.max(axis=1),
            losses=log_losses(y, p),
            in_top5=(ahead.sum(axis=1) < 5) & (true > 0),
            second=p[:, 1] if p.shape[1] > 1 else np.zeros(len(y)),
        )

    @property
    def correct(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.predicted == self.y
        return right

    def pairs(self, n_classes: int) -> list[tuple[int, int, int]]:
        """(true, predicted, rows) of every pair that occurs, ascending."""
        cells, counts = np.unique(self.y * n_classes + self.predicted, return_counts=True)
        true, predicted = np.divmod(cells, n_classes)
        return list(zip(true.tolist(), predicted.tolist(), counts.tolist(), strict=True))


def _intervals(rows: _Rows, found: _Headline, n_classes: int, sampling: _Sampling) -> _Intervals:
    if not sampling.draws:
        return _Intervals()
    # (B, 1 + 2 K + bins): losses, rows of a class, those found, confidence minus correct by bin
    sums = resampled_sums(
        _columns(rows, n_classes), draws=sampling.draws, seed=sampling.seed, units=sampling.units
    )
    there, right = sums[:, 1 : 1 + n_classes], sums[:, 1 + n_classes : 1 + 2 * n_classes]
    n = there.sum(axis=1)  # of rows drawn: units differ in theirs
    ece = np.abs(sums[:, 1 + 2 * n_classes :]).sum(axis=1) / n
    enough = sampling.n_units >= LEAST_UNITS
    return _Intervals(
        mean_per_class_accuracy_ci95=_per_class_interval(
            found.mean_per_class_accuracy, rows.y, there, right, sampling
        ),
        nll_ci95=interval(found.nll, sums[:, 0] / n) if enough else None,
        ece_ci95=interval(found.ece, ece, high=1.0) if enough else None,
        auroc_ci95=None if found.auroc is None else _auroc_interval(found.auroc, rows, sampling),
    )


def _per_class_interval(
    estimate: float,
    y: NDArray[np.int64],
    there: NDArray[np.float64],
    right: NDArray[np.float64],
    sampling: _Sampling,
) -> Interval:
    """there, right: rows of each class in each drawing, and those of them that are right, (B, K)."""
    recalls = np.divide(right, there, out=np.zeros_like(right), where=there > 0)
    drawn = recalls.sum(axis=1) / (there > 0).sum(axis=1)
    counts = np.bincount(y)
    weight = 1 / (counts[y] * np.count_nonzero(counts))  # of each row in the mean
    of_unit = weight if sampling.units is None else np.bincount(sampling.units, weights=weight)
    n = 1 / float((of_unit**2).sum())  # rows of equal weight that say as much (Kish, "Survey sampling", 1965)
    return _share_interval(estimate, drawn, n_units=sampling.n_units, alike=n, most=_MOST_KISH * n)


def _auroc_interval(estimate: float, rows: _Rows, sampling: _Sampling) -> Interval:
    """Where the classes are apart in all drawings, that of pairs of rows of which none is in two."""
    unit = np.arange(len(rows.y)) if sampling.units is None else sampling.units
    pairs = min(len(np.unique(unit[rows.y == label])) for label in (0, 1))
    drawn = _resampled_auroc(rows.y, rows.second, sampling)
    return _share_interval(estimate, drawn, n_units=sampling.n_units, alike=pairs)


def _columns(rows: _Rows, n_classes: int) -> Any:
    """What the scores are sums of, a column each, sparse, (n_samples, 1 + 2 n_classes + bins)."""
    from scipy.sparse import csr_array

    n = len(rows.y)
    values = [rows.losses, np.ones(n), rows.correct, rows.confidence - rows.correct]
    bins = 1 + 2 * n_classes + _bins(rows.confidence)
    places = [np.zeros(n), 1 + rows.y, 1 + n_classes + rows.y, bins]
    where = (np.tile(np.arange(n), len(values)), np.concatenate(places).astype(np.int64))
    data = np.concatenate(values).astype(np.float64)
    return csr_array((data, where), shape=(n, 1 + 2 * n_classes + ECE_BINS))


def _auroc(y: NDArray[np.int64], scores: NDArray[np.float64]) -> float | None:
    """The chance that a row of class 1 has a higher score than one of class 0, ties half, by ranks."""
    positive = int((y == 1).sum())
    negative = len(y) - positive
    if not positive or not negative:
        return None
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1; of equal scores their mean
    above = ranks[y == 1].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def _resampled_auroc(
    y: NDArray[np.int64], scores: NDArray[np.float64], sampling: _Sampling
) -> NDArray[np.float64]:
    """`_auroc` of each drawing of the rows, (draws,), NaN where a class was not drawn."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # where other scores begin
    drawn = []
    blocks = row_counts(len(y), draws=sampling.draws, seed=sampling.seed, units=sampling.units)
    for counts in blocks:
        weights = counts[order]  # (n, B)
        negative = np.add.reduceat(weights * (y[order] == 0)[:, None], first, axis=0)
        positive = np.add.reduceat(weights * (y[order] == 1)[:, None], first, axis=0)
        below = np.cumsum(negative, axis=0) - negative / 2
        pairs = negative.sum(axis=0) * positive.sum(axis=0)
        above = (positive * below).sum(axis=0)
        drawn.append(np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))
    return np.concatenate(drawn)


def _class_metrics(pairs: Sequence[tuple[int, int, int]], classes: Sequence[str]) -> tuple[ClassMetrics, ...]:
    n, said, right = ([0] * len(classes) for _ in range(3))
    for true, predicted, count in pairs:
        n[true] += count
        said[predicted] += count
        right[true] += count if true == predicted else 0
    return tuple(
        ClassMetrics(
            name=name,
            n=n[k],
            accuracy=right[k] / n[k] if n[k] else None,
            precision=right[k] / said[k] if said[k] else None,
            f1=2 * right[k] / (n[k] + said[k]) if n[k] + said[k] else None,
        )
        for k, name in enumerate(classes)
    )


def _dense(pairs: Sequence[tuple[int, int, int]], n_classes: int) -> tuple[tuple[int, ...], ...]:
    table = [[0] * n_classes for _ in range(n_classes)]
    for true, predicted, count in pairs:
        table[true][predicted] = count
    return tuple(map(tuple, table))


def _confused(
    rows: _Rows, pairs: Sequence[tuple[int, int, int]], classes: Sequence[str], ids: Sequence[str] | None
) -> tuple[ConfusedPair, ...]:
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    most = sorted(wrong, key=lambda pair: (-pair[2], pair[0], pair[1]))[:CONFUSED_PAIRS]
    return tuple(
        ConfusedPair(
            true=classes[true],
            predicted=classes[predicted],
            n=count,
            ids=_surest(rows, true, predicted, ids) if ids is not None else (),
        )
        for true, predicted, count in most
    )


def _surest(rows: _Rows, true: int, predicted: int, ids: Sequence[str]) -> tuple[str, ...]:
    """The ids of the rows of a pair that have the highest confidence in the wrong class."""
    members = np.flatnonzero((rows.y == true) & (rows.predicted == predicted))
    surest = members[np.argsort(-rows.confidence[members], kind="stable")][:EXAMPLES]
    return tuple(ids[row] for row in surest)
