"""How accuracy grows with labelled rows: a few a class, and growing parts of all; whether more would help.

Knows labels and row numbers. Fitting and scoring is the caller's: a function that is given rows to train on,
as indices, and answers which of its rows it then gets right, (n_scored,) bool, always the same rows in the
same order and none of them trained on. What is chosen by these numbers should not be scored on those rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.evaluate.metrics import Z95, wilson_interval
from featcache.evaluate.report import FEW_ERRORS
from featcache.words import plural

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
WORTH = 0.005  # of accuracy: a doubling of the labels that gains less is not worth its work
PLENTIFUL = 1000  # rows a class, from which fine-tuning usually beats a frozen backbone

FitAndScore = Callable[[NDArray[np.int64]], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Accuracy of heads fitted on `shots` images a class, over several drawings of them."""

    shots: int
    mean: float
    sd: float | None  # between drawings; None of a single one
    tries: int
    short: int  # classes that have fewer images, and gave all of them

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def few_shot(
    y: NDArray[np.int64],
    fit_and_score: FitAndScore,
    *,
    shots: Sequence[int],
    tries: int = 10,
    seed: int = 0,
    images: NDArray[np.int64] | None = None,
) -> list[Shots]:
    """Accuracy for each number of shots, ascending.

    y: (n_train,), 0 … n_classes - 1. images: (n_train,), the same number for copies of one image, which are
    drawn together; None: there are none. A class with fewer gives what it has. The rows of one try are
    nested, so that between numbers of shots only their number differs.
    """
    sizes = _images_a_class(y, images)
    numbers = sorted(set(shots))
    if not numbers or numbers[0] < 1 or tries < 1:
        raise ValueError("shots and tries are numbers from 1")
    scores = np.empty((tries, len(numbers)))
    for attempt in range(tries):
        rank = _rank_in_class(y, images, np.random.default_rng([seed, attempt]))
        for column, number in enumerate(numbers):
            scores[attempt, column] = fit_and_score(np.flatnonzero(rank < number)).mean()
    return [
        Shots(
            shots=number,
            mean=float(column.mean()),
            sd=float(column.std(ddof=1)) if tries > 1 else None,
            tries=tries,
            short=int(((sizes > 0) & (sizes < number)).sum()),
        )
        for number, column in zip(numbers, scores.T, strict=True)
    ]


def shots_lines(found: Sequence[Shots]) -> list[str]:
    """A line a number of shots."""
    tries = plural(found[0].tries, "drawing") if found else ""
    lines = [f"accuracy by labelled images a class, mean and standard deviation over {tries}"]
    for row in found:
        spread = "" if row.sd is None else f" ± {row.sd:.4f}"
        short = f"  ({plural(row.short, 'class has', 'classes have')} fewer)" if row.short else ""
        lines.append(f"  {row.shots:>6,}  {row.mean:.4f}{spread}{short}")
    return lines


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Accuracy of heads fitted on a part of the training rows, the same share of every class."""

    fraction: float
    n: int  # rows; where groups are drawn, the mean over the drawings
    accuracy: float  # likewise

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Points of growing parts, and what the last doubling gained.

    gain: accuracy on all rows less that on half of them. gain_se: its standard error, over the rows scored,
    which are the same for both, and over the drawings of the half; at least that of rows of which none
    differs (Agresti & Min, 2005).
    """

    points: tuple[CurvePoint, ...]
    gain: float
    gain_se: float
    rows_a_class: float  # training images, the mean over classes
    n_scored: int  # that are independent

    @property
    def gain_ci95(self) -> tuple[float, float]:
        return self.gain - Z95 * self.gain_se, self.gain + Z95 * self.gain_se

    @property
    def trend(self) -> Literal["rising", "flat", "unclear"]:
        """rising: the last doubling gained something for sure. flat: at most what is not worth it."""
        low, high = self.gain_ci95
        if low > 0 and self.gain >= WORTH:
            return "rising"
        return "flat" if high < 2 * WORTH and self.gain < WORTH else "unclear"

    @property
    def next_gain(self) -> float:
        """What a next doubling would gain if gains go on falling as between the last two; an estimate.

        An error of a + b n^-c falls by the same ratio from doubling to doubling.
        """
        accuracy = [point.accuracy for point in self.points]
        before = accuracy[-2] - accuracy[-3] if len(accuracy) > 2 else self.gain
        ratio = self.gain / before if before > 0 else 1.0
        return max(self.gain, 0.0) * min(max(ratio, 0.0), 1.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "points": [point.to_json() for point in self.points],
            "gain": self.gain,
            "gain_se": self.gain_se,
            "gain_ci95": list(self.gain_ci95),
            "next_gain": self.next_gain,
            "trend": self.trend,
            "says": self.says(),
        }

    def says(self) -> str:
        """Whether more labels would help, in a sentence."""
        low, high = (100 * end for end in self.gain_ci95)
        half, whole = self.points[-2].n, self.points[-1].n
        gained = f"gained {100 * self.gain:.1f} points ({low:.1f} to {high:.1f})"
        doubling = f"going from {half:,} to {whole:,} training rows {gained}"
        if self.trend == "rising":
            return (
                f"more labels would help: {doubling}; as many again may gain about {100 * self.next_gain:.1f}"
            )
        if self.trend == "flat":
            return f"more labels would hardly help: {doubling}"
        return f"whether more labels would help cannot be told from the rows scored: {doubling}"

    def lines(self) -> list[str]:
        """The curve and its sentence."""
        rows = [f"  {point.n:>9,}  {point.accuracy:.4f}" for point in self.points]
        return ["accuracy by training rows", *rows, self.says()]


def learning_curve(
    y: NDArray[np.int64],
    fit_and_score: FitAndScore,
    *,
    fractions: Sequence[float] = FRACTIONS,
    tries: int = 3,
    seed: int = 0,
    images: NDArray[np.int64] | None = None,
    together: NDArray[np.int64] | None = None,
    units: NDArray[np.int64] | None = None,
) -> LearningCurve | None:
    """Accuracy at growing fractions of the training rows, the last two of them 1/2 and 1.

    y: (n_train,), 0 … n_classes - 1. images: as `few_shot` has them. together: (n_train,), the same number
    for rows that are drawn together, such as those of a group; None: those of an image. units: (n_scored,),
    the same number for rows scored that are not independent; None: all are. Every class keeps its share of
    what is drawn together, and one at least; parts that are no smaller than the next one are left out. Parts
    of one try are nested; all rows are fitted on once, a part `tries` times. None: half of the rows, one a
    class at least, are all of them.
    """
    numbers = sorted(set(fractions))
    if numbers[-2:] != [0.5, 1.0] or numbers[0] <= 0:
        raise ValueError("the fractions are above 0 and end with 1/2 and 1")
    together = images if together is None else together
    sizes = _images_a_class(y, together)
    drawn = [int(_part(sizes, fraction).sum()) for fraction in numbers]
    numbers = [n for n, some, more in zip(numbers, drawn, drawn[1:], strict=False) if some < more] + [1.0]
    if len(numbers) < 2 or numbers[-2] != 0.5:
        return None
    whole = fit_and_score(np.arange(len(y))).astype(np.float64)
    right = np.empty((tries, len(numbers) - 1, len(whole)), dtype=bool)
    counts = np.empty((tries, len(numbers) - 1))  # of the same rows in every try, but where groups differ
    for attempt in range(tries):
        rank = _rank_in_class(y, together, np.random.default_rng([seed, attempt]))
        for index, fraction in enumerate(numbers[:-1]):
            kept = np.flatnonzero(rank < _part(sizes, fraction)[y])
            right[attempt, index], counts[attempt, index] = fit_and_score(kept), len(kept)
    points = [
        CurvePoint(fraction=fraction, n=round(n), accuracy=float(hits.mean()))
        for fraction, n, hits in zip(
            numbers[:-1], counts.mean(axis=0).tolist(), right.swapaxes(0, 1), strict=True
        )
    ]
    points.append(CurvePoint(fraction=1.0, n=len(y), accuracy=float(whole.mean())))
    gained = whole - right[:, -1].mean(axis=0)  # (n_scored,)
    unit = np.arange(len(gained)) if units is None else np.unique(units, return_inverse=True)[1].ravel()
    sums = np.bincount(unit, weights=gained - gained.mean())
    n_units = len(sums)
    variance = n_units / (n_units - 1) * float((sums**2).sum()) / len(gained) ** 2 if n_units > 1 else 0.0
    if tries > 1:
        variance += right[:, -1].mean(axis=1).var(ddof=1) / tries
    return LearningCurve(
        points=tuple(points),
        gain=float(gained.mean()),
        gain_se=max(math.sqrt(variance), 1 / (n_units + 2)),
        rows_a_class=float(_images_a_class(y, images).sum()) / int((sizes > 0).sum()),
        n_scored=n_units,
    )


Limit = Literal["nothing", "unsure", "features", "both", "labels", "rows"]


def limit_of(curve: LearningCurve, *, train_accuracy: float) -> Limit:
    """What stands in the way of fewer errors.

    The errors on all training rows say whether the features can tell the classes apart at all; the curve says
    whether labels are what is missing. "nothing": there are few errors; "unsure": maybe. "rows": they are
    learned by heart, and it is not seen that more of them would help.
    """
    accuracy = curve.points[-1].accuracy
    errors = 1 - accuracy
    if errors <= FEW_ERRORS:
        return "nothing"
    if 1 - wilson_interval(round(accuracy * curve.n_scored), curve.n_scored)[1] <= FEW_ERRORS:
        return "unsure"
    if 1 - train_accuracy >= errors / 2:
        return "both" if curve.trend == "rising" else "features"
    return "labels" if curve.trend == "rising" else "rows"


def transfer_line(curve: LearningCurve, *, train_accuracy: float) -> str:
    """Whether a head on these frozen features is enough, or the data are too different or too plentiful."""
    errors, train_errors = 1 - curve.points[-1].accuracy, 1 - train_accuracy
    made = f"{100 * errors:.1f} % of new rows are wrong, {100 * train_errors:.1f} % of those trained on"
    limit = limit_of(curve, train_accuracy=train_accuracy)
    if limit == "nothing":
        return f"a head on these features is enough: {made}"
    if limit == "unsure":
        return f"a head on these features may be enough: {made}, and {curve.n_scored:,} rows cannot tell more"
    tune = (
        f"or fine-tune, for which {curve.rows_a_class:,.0f} images a class are plenty"
        if curve.rows_a_class >= PLENTIFUL
        else "or fine-tune"
    )
    if limit in ("features", "both"):
        both = "features and labels both limit" if limit == "both" else "the features are the limit"
        return f"{both}: {made}. Try other nodes, another backbone, {tune}"
    return f"{_MISSING[curve.trend]}: {made}. {_REMEDY[curve.trend]}, {tune}"


# Where the training rows are learned and new ones are not.
_MISSING = {
    "rising": "labels are the limit",
    "flat": "the head learns its rows by heart, and more of them would hardly help",
    "unclear": "the head learns its rows by heart",
}
_REMEDY = {
    "rising": "Label more images, use augmented views",
    "flat": "Look at what is confused; try other nodes, another backbone",
    "unclear": "Label more images, to train on and to score; try other nodes, another backbone",
}


def _part(sizes: NDArray[np.int64], fraction: float) -> NDArray[np.float64]:
    """How many images of each class, (n_classes,), a fraction of them is."""
    some: NDArray[np.float64] = np.minimum(np.maximum(np.round(fraction * sizes), 1), sizes)
    return some


def _pairs(y: NDArray[np.int64], images: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The class of every image with that label, ascending, and which of these each row is."""
    labels = np.stack([y, np.arange(len(y)) if images is None else images], axis=1)
    pairs, index = np.unique(labels, axis=0, return_inverse=True)
    return pairs[:, 0], index.ravel()


def _images_a_class(y: NDArray[np.int64], images: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return np.bincount(_pairs(y, images)[0])


def _rank_in_class(
    y: NDArray[np.int64], images: NDArray[np.int64] | None, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The place of each row's image among those of its class, in an order drawn at random.

    The order is one for all classes, so that a group of several is drawn as a whole, or nearly.
    """
    label, index = _pairs(y, images)
    number = np.arange(len(y)) if images is None else images
    image = np.empty(len(label), dtype=np.int64)
    image[index] = np.unique(number, return_inverse=True)[1].ravel()
    order = np.lexsort((rng.permutation(int(image.max()) + 1)[image], label))
    starts = np.searchsorted(label[order], label[order])
    rank = np.empty(len(label), dtype=np.int64)
    rank[order] = np.arange(len(label)) - starts
    of_row: NDArray[np.int64] = rank[index]
    return of_row
