"""Which head, with which parameters, and that head fitted. Sees training rows only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.evaluate.compete import Competition, bar_for, compete
from featcache.evaluate.select import Selection, TrainingRows, select
from featcache.fitting.wishes import AUTO, Wishes
from featcache.heads import HEADS, HeadKind, build_head, find_head
from featcache.progress import Progress

if TYPE_CHECKING:
    from featcache.heads.base import Head


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The head that was chosen or asked for, and its parameters."""

    head: str
    kind: HeadKind
    selection: Selection
    competition: Competition | None  # None where a head was asked for
    offsets: NDArray[np.float64] | None  # (K,), what the logit adjustment adds to the scores

    def without_search(self) -> Choice:
        """The same without what the search holds for `fit_head`, which may be as large as the features."""
        return replace(self, selection=replace(self.selection, refit=None))


def choose_head(wishes: Wishes, rows: TrainingRows, *, progress: Progress) -> Choice:
    """By cross-validation on the training rows."""
    offsets = _offsets(wishes.logit_adjustment, rows)
    if wishes.head != AUTO:
        kind = find_head(wishes.head)
        bar = bar_for(kind, rows, progress)
        selection = select(wishes.head, kind, wishes.given(kind), rows=rows, seed=wishes.seed, progress=bar)
        return Choice(head=wishes.head, kind=kind, selection=selection, competition=None, offsets=offsets)
    competition, head, selection = compete(
        rows,
        params_of=wishes.given,
        why_not=wishes.why_not,
        budget=wishes.budget,
        seed=wishes.seed,
        spent=wishes.spent,
        progress=progress,
    )
    return Choice(head=head, kind=HEADS[head], selection=selection, competition=competition, offsets=offsets)


def _offsets(tau: float | None, rows: TrainingRows) -> NDArray[np.float64] | None:
    """-tau log p_k (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 9)."""
    if tau is None:
        return None
    counts = np.bincount(rows.y, minlength=rows.n_classes)
    offsets: NDArray[np.float64] = -tau * np.log(counts / counts.sum())
    return offsets


def fit_head(choice: Choice, wishes: Wishes, rows: TrainingRows) -> Head:
    """The chosen head fitted on all training rows."""
    with head_errors(choice.head, doing="fitted"):
        if choice.selection.refit:
            head = choice.selection.refit(choice.selection.params)
        else:
            head = build_head(choice.head, choice.selection.params, seed=wishes.seed)
            views = {"views": rows.views} if choice.kind.uses_views and rows.views else {}
            head.fit(rows.X, rows.y, **views)
        if choice.offsets is not None:
            head.shift_scores(choice.offsets)
    return head


@contextmanager
def head_errors(head: str, *, doing: str) -> Iterator[None]:
    """One line for what scikit-learn says of parameters and features that do not go together."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise HeadError(f"{head} cannot be {doing}: {' '.join(str(error).split())}") from error
