"""Leaving the unsure rows to a person: the lowest confidence that still keeps a wished precision.

Knows labels and probabilities. The threshold is chosen on predictions for rows that were held out of the fit
by cross-validation, never on the rows that are scored; what it gives there is only reported.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.evaluate.metrics import Interval, wilson_interval


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """How the rows fare whose highest probability reaches a threshold; the others are left unanswered."""

    n: int
    accepted: int
    correct: int
    coverage: float
    precision: float | None  # of the rows accepted; None without any
    precision_ci95: Interval | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """`91.2 % of 661 rows answered, 0.9502 of those right (0.9294 to 0.9650)`."""
        said = f"{100 * self.coverage:.1f} % of {self.n:,} rows answered"
        if self.precision is None or self.precision_ci95 is None:
            return said
        low, high = self.precision_ci95
        return f"{said}, {self.precision:.4f} of those right ({low:.4f} to {high:.4f})"


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """A threshold for a wished precision: chosen on `held_out` rows, then looked at on the rows scored.

    threshold: None when none reaches the wish; then `held_out` and `test` are None too, and `best` is the
    highest lower bound that any threshold has.
    """

    wish: float
    threshold: float | None
    held_out: Accepted | None
    test: Accepted | None
    best: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """What a person reads."""
        if self.threshold is None or self.held_out is None:
            return [
                f"no threshold gives a precision of {self.wish:g} with confidence: in cross-validation none "
                f"is sure to exceed {self.best:.4f}. Wish for less, or add labelled images"
            ]
        rows = f"rows of a probability from {self.threshold}"
        lines = [f"to be right {100 * self.wish:g} % of the time, answer for {rows}"]
        lines.append(f"  in cross-validation  {self.held_out.describe()}")
        if self.test is not None:
            lines.append(f"  on the rows scored   {self.test.describe()}")
        return lines


def accepted_at(
    y: NDArray[np.integer[Any]],
    probabilities: NDArray[Any],
    threshold: float,
    *,
    units: NDArray[np.int64] | None = None,
) -> Accepted:
    """What a threshold on the highest probability gives on the labelled rows, accepting those that reach it.

    y: ndarray of shape (n_samples,), -1 = unlabelled. probabilities: (n_samples, n_classes). units:
    (n_samples,), the same number for rows that are not independent.
    """
    labelled = y >= 0
    confidence, correct = _confidence(y[labelled], probabilities[labelled])
    accepted = confidence >= threshold
    n, right = int(accepted.sum()), int(correct[accepted].sum())
    ends = None
    if n:
        size = _effective(correct[accepted], None if units is None else units[labelled][accepted])[-1]
        ends = wilson_interval(right / n * size, size)
    return Accepted(
        n=len(confidence),
        accepted=n,
        correct=right,
        coverage=n / len(confidence) if len(confidence) else 0.0,
        precision=right / n if n else None,
        precision_ci95=ends,
    )


def choose_threshold(
    y: NDArray[np.integer[Any]],
    probabilities: NDArray[Any],
    wish: float,
    *,
    units: NDArray[np.int64] | None = None,
) -> tuple[float | None, float]:
    """The lowest threshold whose precision is `wish` at least, with confidence, and the best bound of any.

    With confidence: the lower end of Wilson's 95 % interval reaches the wish, so that for one threshold the
    precision on new rows is below it 1 time in 40. The lowest of many is taken, which costs little where
    confidence orders the rows (2 to 4 times in 100, simulated) and more where it says nothing of them (up to
    1 in 5, and then by little). None: no threshold reaches it. units: as `accepted_at` has them.
    """
    if not 0 < wish < 1:
        raise ValueError(f"a precision is wished for between 0 and 1, not {wish!r}")
    confidence, correct = _confidence(y, probabilities)
    order = np.argsort(-confidence, kind="stable")
    sizes = _effective(correct[order], None if units is None else units[order])
    confidence, right = confidence[order], np.cumsum(correct[order])
    # Equal rows are accepted together: only the last of them is where a threshold can be.
    ends = np.flatnonzero(np.diff(confidence, append=-np.inf) != 0)
    lower = np.array(
        [wilson_interval(int(right[end]) / (int(end) + 1) * sizes[end], sizes[end])[0] for end in ends]
    )
    reached = np.flatnonzero(lower >= wish)
    best = float(lower.max(initial=0.0))
    return (float(confidence[ends[reached[-1]]]) if len(reached) else None), best


def choose_abstention(
    wish: float,
    *,
    held_out: tuple[NDArray[np.integer[Any]], NDArray[Any]],
    test: tuple[NDArray[np.integer[Any]], NDArray[Any]] | None = None,
    held_out_units: NDArray[np.int64] | None = None,
    test_units: NDArray[np.int64] | None = None,
) -> Abstention:
    """Choose a threshold on held-out labels and probabilities, and look at it on those of the test rows."""
    threshold, best = choose_threshold(*held_out, wish, units=held_out_units)
    if threshold is None:
        return Abstention(wish=wish, threshold=None, held_out=None, test=None, best=best)
    threshold = _shortest(threshold, held_out[1].max(axis=1))
    return Abstention(
        wish=wish,
        threshold=threshold,
        held_out=accepted_at(*held_out, threshold, units=held_out_units),
        test=accepted_at(*test, threshold, units=test_units) if test is not None else None,
        best=best,
    )


def _shortest(threshold: float, confidence: NDArray[Any]) -> float:
    """The number of fewest digits that accepts the same rows: it is to be typed."""
    below = float(confidence[confidence < threshold].max(initial=0.0))
    for digits in range(1, 17):
        found = math.floor(threshold * 10.0**digits) / 10.0**digits
        if below < found <= threshold:
            return found
    return threshold


def _effective(correct: NDArray[np.bool_], units: NDArray[np.int64] | None) -> NDArray[np.float64]:
    """Of as many independent rows as say as much: the first 1, 2, … of these, as `score` has it of all."""
    n = np.arange(1.0, len(correct) + 1)
    if units is None or len(np.unique(units)) == len(units):
        return n
    rows, right = _so_far(np.ones(len(units)), units), _so_far(correct.astype(np.float64), units)
    n_units = np.cumsum(rows == 1)
    rate = np.cumsum(correct) / n
    # Sums over units of squares and products of their rows and right ones, by what each row adds.
    squares = np.cumsum(2 * rows - 1)
    products = np.cumsum(np.where(correct, right + rows - 1, right))
    right_squares = np.cumsum(np.where(correct, 2 * right - 1, 0))
    between = right_squares - 2 * rate * products + rate**2 * squares
    between *= n_units / np.maximum(n_units - 1, 1) / n**2
    mixed = (rate > 0) & (rate < 1) & (n_units > 1)
    some = mixed & (between > 1e-15)
    ratio = np.divide(rate * (1 - rate), between, out=n.copy(), where=some)
    return np.where(mixed, np.minimum(ratio, n), n_units)


def _so_far(values: NDArray[np.float64], units: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of the values of each row's unit, up to that row."""
    order = np.argsort(units, kind="stable")
    ordered, sums = units[order], np.cumsum(values[order])
    starts = np.searchsorted(ordered, ordered)
    found = np.empty(len(values))
    found[order] = sums - sums[starts] + values[order][starts]
    return found


def _confidence(
    y: NDArray[np.integer[Any]], probabilities: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The highest probability of each row, and whether its class is the true one."""
    correct: NDArray[np.bool_] = probabilities.argmax(axis=1) == y
    return probabilities.max(axis=1).astype(np.float64), correct
