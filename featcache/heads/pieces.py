"""A chunk of labelled rows as the sums over it that moments are made of. Arrays only, float64 sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.widen import centre_rows

LONG_RUNS = 16  # mean rows of a run from which it is summed by itself


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """How chunks are cut into pieces: what is taken from rows, in which dtype, and what is summed.

    scale: what the rows of each class are multiplied by, after their sums were taken; None: nothing.
    """

    n_classes: int
    centre: NDArray[np.float64]  # (D,)
    dtype: type[np.floating[Any]]  # of the rows of a piece
    squares: bool
    scale: NDArray[np.float64] | None  # (K,)

    def wide(self, rows: NDArray[Any]) -> type[np.floating[Any]]:
        """The dtype that rows are centred in."""
        return np.float64 if rows.dtype == np.float64 else self.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Rows first … last of a chunk that is sorted by part and class: those of one part."""

    part: int
    first: int
    last: int
    groups: NDArray[np.intp]  # part * n_classes + class, of those it has
    firsts: NDArray[np.intp]  # where each of these begins, from `first`


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Rows of one part, sorted by class, and their sums."""

    part: int
    rows: Any  # (n, D), centred and scaled: an array, or a tensor where it was made on a device
    groups: NDArray[np.intp]  # part and class of each row of `sums`
    sums: NDArray[np.float64]  # (classes met, D)
    squares: NDArray[np.float64] | float
    low: NDArray[Any]  # (D,)
    high: NDArray[Any]


def runs(group: NDArray[np.intp], n_classes: int) -> Iterator[Run]:
    """Of sorted groups, (n_samples,)."""
    for p in np.unique(group // n_classes).tolist():
        first, last = np.searchsorted(group, [p * n_classes, (p + 1) * n_classes]).tolist()
        groups, firsts = np.unique(group[first:last], return_index=True)
        yield Run(part=p, first=first, last=last, groups=groups, firsts=firsts)


def cut_rows(rows: NDArray[Any], group: NDArray[np.intp], cut: Cut) -> list[Piece]:
    """The pieces of rows (n, D), whose part and class are group (n,)."""
    order = np.argsort(group, kind="stable")
    group = group[order]
    centred = np.empty(rows.shape, dtype=cut.dtype)
    centre_rows(rows[order], cut.centre.astype(cut.wide(rows)), out=centred)
    made = []
    for run in runs(group, cut.n_classes):
        some = centred[run.first : run.last]
        piece = Piece(
            part=run.part,
            rows=some,
            groups=run.groups,
            sums=_sums(some, run.firsts),
            squares=np.einsum("nd,nd->d", some, some, dtype=np.float64) if cut.squares else 0.0,
            low=some.min(axis=0),
            high=some.max(axis=0),
        )
        if cut.scale is not None:
            some *= cut.scale[group[run.first : run.last] % cut.n_classes, None].astype(some.dtype)
        made.append(piece)
    return made


def _sums(rows: NDArray[Any], firsts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sums of the runs of rows that start at `firsts`."""
    if len(rows) < LONG_RUNS * len(firsts):
        return np.asarray(np.add.reduceat(rows, firsts, axis=0, dtype=np.float64))
    return np.stack([run.sum(axis=0, dtype=np.float64) for run in np.split(rows, firsts[1:])])
