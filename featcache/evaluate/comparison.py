"""Which of several candidates is right more often on the same rows, and whether that is sure.

Knows which rows each candidate gets right; not what the candidates are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.evaluate.bootstrap import paired_means
from featcache.evaluate.metrics import Interval
from featcache.evaluate.report import aligned_lines


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of one candidate less that of another on the same rows, with the ends of its interval."""

    points: float  # of a hundred
    ci95: Interval

    @property
    def verdict(self) -> Literal["beats", "is beaten by", "is tied with"]:
        low, high = self.ci95
        return "beats" if low > 0 else "is beaten by" if high < 0 else "is tied with"

    def describe(self) -> str:
        low, high = self.ci95
        return f"{self.points:+.1f} points ({low:+.1f} to {high:+.1f})"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The best candidate by cross-validation and another one: on the rows scored, and in cross-validation."""

    best: str
    other: str
    test: Difference
    cv: Difference | None

    @property
    def is_tied(self) -> bool:
        """On the rows scored and in cross-validation."""
        return all(one.verdict == "is tied with" for one in (self.test, self.cv) if one)

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.test.verdict, **asdict(self)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """right: whether each candidate is right on each row, (n_rows, n_candidates).

    units: (n_rows,), equal for rows that are not independent, such as those of one image.
    """

    right: NDArray[np.bool_]
    units: NDArray[np.int64]

    def differences(self, *, seed: int) -> list[Difference]:
        """Of the first candidate and each other one, with intervals that hold for all pairs there are."""
        means = paired_means(self.right, seed=seed, units=self.units)
        found = [means.difference(0, other) for other in range(1, self.right.shape[1])]
        return [
            Difference(points=100 * by, ci95=(max(100 * low, -100), min(100 * high, 100)))
            for by, low, high in found
        ]


def compare_pairs(names: Sequence[str], *, test: Answers, cv: Answers | None, seed: int = 0) -> list[Pair]:
    """The first candidate against each of the others, on the rows scored and on training rows held out."""
    on_test = test.differences(seed=seed)
    on_train = cv.differences(seed=seed) if cv else [None] * len(on_test)
    return [
        Pair(best=names[0], other=other, test=one, cv=two)
        for other, one, two in zip(names[1:], on_test, on_train, strict=True)
    ]


def pair_lines(pairs: Sequence[Pair]) -> list[str]:
    """A line a pair, below one that says of whom."""
    heading = f"{pairs[0].best} on the rows scored, by intervals that hold for all together (95 %):"
    rows = [
        (
            f"  {pair.test.verdict}",
            pair.other,
            pair.test.describe(),
            f"in cross-validation {pair.cv.describe()}" if pair.cv else "",
        )
        for pair in pairs
    ]
    return [heading, *aligned_lines(rows)]
