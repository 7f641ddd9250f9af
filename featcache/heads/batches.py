"""Which rows each step of a training by minibatches sees: their order, views and partners in mixup.

Knows numbers of rows and a seed, no features. Several sets of rows, the training parts of the folds, are
walked side by side, each exactly as it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP_ROWS = 256  # of one step of the optimizer; the learning rate counts on it


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """The rows of one step, F sets side by side, at most B rows each; shorter ones are padded by row 0."""

    index: NDArray[np.intp]  # (F, B), rows of X
    view: NDArray[np.intp]  # (F, B), 0 for X itself
    used: NDArray[np.bool_]  # (F, B), False for padding
    share: NDArray[np.float32]  # (F,), what is left of a row that is mixed; 1 where nothing is
    partner: NDArray[np.intp]  # (F, B), the position in the step of the row it is mixed with


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How sets of rows are walked.

    parts: the rows of each set, indices. n_views: vectors of each row to draw from, X itself among them.
    mixup: alpha of the Beta distribution of the shares, 0 for none (Zhang et al., "mixup: beyond empirical
    risk minimization", ICLR 2018).
    """

    parts: Sequence[NDArray[np.intp]]
    epochs: int
    seed: int
    n_views: int = 1
    mixup: float = 0.0

    def n_steps(self) -> NDArray[np.int64]:
        """Of each set, (F,)."""
        return np.array([self.epochs * -(-len(rows) // STEP_ROWS) for rows in self.parts])

    def steps(self) -> Iterator[Step]:
        """Until the longest set has had its epochs; a set that is done has no used rows."""
        for sides in zip_longest(*(self._alone(rows) for rows in self.parts)):
            yield _pad(sides)

    def _alone(self, rows: NDArray[np.intp]) -> Iterator[_Side]:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.epochs):
            order = rows[rng.permutation(len(rows))]
            view = rng.integers(self.n_views, size=len(rows)) if self.n_views > 1 else np.zeros_like(order)
            for start in range(0, len(rows), STEP_ROWS):
                index = order[start : start + STEP_ROWS]
                partner, share = np.arange(len(index)), 1.0
                if self.mixup:
                    partner, share = rng.permutation(len(index)), rng.beta(self.mixup, self.mixup)
                yield _Side(index, view[start : start + STEP_ROWS], share, partner)


@dataclass(frozen=True, eq=False)
class _Side:
    """One set's share of a `Step`."""

    index: NDArray[np.intp]
    view: NDArray[np.intp]
    share: float
    partner: NDArray[np.intp]


def _pad(sides: Sequence[_Side | None]) -> Step:
    lengths = np.array([0 if side is None else len(side.index) for side in sides])
    width = int(lengths.max())

    def padded(part: str) -> NDArray[Any]:
        table = np.zeros((len(sides), width), dtype=np.intp)
        for f, side in enumerate(sides):
            if side is not None:
                table[f, : len(side.index)] = getattr(side, part)
        return table

    return Step(
        index=padded("index"),
        view=padded("view"),
        used=np.arange(width) < lengths[:, None],
        share=np.array([1.0 if side is None else side.share for side in sides], dtype=np.float32),
        partner=padded("partner"),
    )
