"""What a head brings to a competition of heads: how simple it is, what it costs, when it is worth trying.

Knows sizes only. Costs are arithmetic operations and meant to be right within a factor of two or three: they
decide what is tried within a time budget, the same way on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from featcache.processors import usable_processors

RATE = 50e9  # operations a second and processor that products of large matrices reach on common machines


@dataclass(frozen=True, kw_only=True)
class Size:
    """n rows of d features, k classes, in so many folds."""

    n: int
    d: int
    k: int
    folds: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What `--head auto` needs to know of a head.

    simplicity: of heads that are equally good, the one with the lowest is taken. operations: of searching,
    calibrating and fitting it. start: seconds before the first of them. least_rows: with fewer training rows
    it is not tried. needs_views: nor without augmented vectors of the rows.
    """

    simplicity: int
    operations: Callable[[Size], float]
    start: float = 0.0
    least_rows: int = 0
    needs_views: bool = False

    def seconds(self, size: Size) -> float:
        """What the head will take on this machine, by its arithmetic."""
        return self.start + self.operations(size) / (RATE * usable_processors())


def class_means(size: Size) -> float:
    """Sums over rows and the scores of all rows, bound by memory: some 8 operations' time a value."""
    return 8.0 * size.n * size.d + 2.0 * size.n * size.d * size.k


def closed_form(size: Size) -> float:
    """Cross-products or rotations of each part, a factorisation each, and 9 candidates' scores."""
    n, d, parts = size.n, size.d, size.folds + 1
    made = 2.0 * n * d * d + 8.0 * parts * d**3 if n > d else parts * (4.0 * n * n * d + 10.0 * n**3)
    return made + 18.0 * n * d * size.k


def softmax_path(size: Size) -> float:
    """6 strengths in each fold, 15 losses and gradients each, on no more features than rows."""
    return 6.0 * size.folds * 15 * 4.0 * size.n * min(size.n, size.d) * size.k


def all_pairs(size: Size) -> float:
    """The similarity of every row to every other, and finding the largest, as long again."""
    return 4.0 * size.n**2 * size.d


def minibatches(*, epochs: int, candidates: int, hidden: int = 0) -> Callable[[Size], float]:
    """Forward and backward passes through one layer, or two with `hidden` units, of every fold and of all."""

    def operations(size: Size) -> float:
        weights = size.d * hidden + hidden * size.k if hidden else size.d * size.k
        return 6.0 * epochs * (candidates * size.folds + 1) * size.n * weights

    return operations
