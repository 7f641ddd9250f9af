"""Which of several candidates is right more often on the same rows, whether that is sure, and which to take.

Knows which rows each candidate gets right and what it costs; not what the candidates are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.evaluate.bootstrap import paired_means
from featcache.evaluate.metrics import Interval
from featcache.evaluate.report import aligned_lines
from featcache.words import name_some


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of one candidate less that of another on the same rows, with the ends of its interval.

    se: the standard error of this difference alone.
    """

    points: float  # of a hundred, as the others
    ci95: Interval
    se: float

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
    def is_near(self) -> bool:
        """Whether cross-validation has them within one standard error: a choice may rest on this."""
        return self.cv is not None and self.cv.points <= self.cv.se

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
            Difference(points=100 * by, ci95=(max(100 * low, -100), min(100 * high, 100)), se=100 * float(se))
            for (by, low, high), se in zip(found, means.errors[0, 1:], strict=True)
        ]


def compare_pairs(names: Sequence[str], *, test: Answers, cv: Answers | None, seed: int = 0) -> list[Pair]:
    """The first candidate against each of the others, on the rows scored and on training rows held out."""
    on_test = test.differences(seed=seed)
    on_train = cv.differences(seed=seed) if cv else [None] * len(on_test)
    return [
        Pair(best=names[0], other=other, test=one, cv=two)
        for other, one, two in zip(names[1:], on_test, on_train, strict=True)
    ]


CHEAPER = 0.9  # of what the first costs: less of a difference is none
# In the order in which they count, and how they are said.
COSTS = {"ms_per_image": "{:g} ms an image", "num_params": "{:,} parameters", "num_features": "{:,} features"}


def take_cheapest(pairs: Sequence[Pair], costs: Sequence[Mapping[str, float | None]]) -> tuple[int, str]:
    """The place of the candidate to take, and why: the cheapest within one standard error of the first.

    pairs: the first against each of the others. costs: of all candidates, by the names of `COSTS`; one that
    is not known of all that are near does not count, nor one that is about the same. Near is what
    cross-validation has so: what the rows scored say is told, and decides nothing.
    """
    near = [0, *(place for place, pair in enumerate(pairs, start=1) if pair.is_near)]
    taken, why = 0, f"the most accurate in cross-validation{_how_surely(pairs)}"
    for name, said in COSTS.items():
        values = {place: value for place in near if (value := costs[place].get(name))}
        cheapest = min(values, key=lambda place: values[place], default=0)
        if len(values) == len(near) and values[cheapest] < CHEAPER * values[0]:
            here, there = (said.format(values[place]) for place in (cheapest, 0))
            why = (
                f"within one standard error of {pairs[0].best}, the most accurate in cross-validation, and "
                f"cheaper: {here}, not {there}"
            )
            taken = cheapest
            break
    if taken:
        ahead = [pairs[0].best] if pairs[taken - 1].test.verdict == "beats" else []
    else:
        ahead = [pair.other for pair in pairs if pair.test.verdict == "is beaten by"]
    if ahead:
        why += (
            f". Beyond chance, {name_some(ahead)} did better on the rows scored, which are unlike the "
            "training rows"
        )
    return taken, why


def _how_surely(pairs: Sequence[Pair]) -> str:
    others = [pair.other for pair in pairs if pair.cv and pair.cv.verdict == "is tied with"]
    return f", though {name_some(others, limit=3)} may be as good" if others else ", beyond chance"


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
