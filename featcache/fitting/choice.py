"""Which head, with which parameters, and that head fitted. Sees training rows only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.evaluate.compete import Competition, bar_for, compete
from featcache.evaluate.select import Selection, TrainingRows, select
from featcache.heads import HEADS, HeadKind, build_head, find_head
from featcache.progress import Progress

if TYPE_CHECKING:
    from featcache.heads.base import Head

AUTO = "auto"  # the heads compete
BUDGET = 60.0  # seconds of that
BALANCED = "balanced"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked for; HeadError where it does not go together, before any work.

    head: a name, or AUTO. params: of the head. budget: seconds, `spent` of which are gone already.
    class_weight: BALANCED counts every class alike, None every row. logit_adjustment: tau, the scores of
    class k are lowered by tau log p_k, its share of the training rows. device: where heads that can do their
    products: auto, cpu, cuda; None: each as it does by itself.
    """

    head: str = AUTO
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    budget: float = BUDGET
    spent: float = 0.0
    class_weight: str | None = None
    logit_adjustment: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.class_weight not in (None, BALANCED):
            raise HeadError(f"class_weight is {BALANCED!r} or None, not {self.class_weight!r}")
        if self.logit_adjustment is not None and not 0 < self.logit_adjustment < float("inf"):
            raise HeadError(f"the logit adjustment is a number above 0, not {self.logit_adjustment!r}")
        if self.device is not None:
            _require_device(self.device)
        if not self.budget > 0:
            raise HeadError(f"the budget is a number of seconds above 0, not {self.budget:g}")
        if self.head == AUTO:
            self._check_auto()
            return
        kind = find_head(self.head)
        build_head(self.head, self.params, seed=self.seed)  # unknown parameters are refused
        if self.device is not None and not kind.has_device:
            able = ", ".join(one.name for one in HEADS.values() if one.has_device)
            raise HeadError(f"{self.head} is fitted on the processor. Heads that take a device: {able}.")
        if self.class_weight and not kind.weighted:
            able = ", ".join(one.name for one in HEADS.values() if one.weighted)
            raise HeadError(f"{self.head} cannot weight classes. Heads that can: {able}.")
        if self.logit_adjustment is not None and not _can_shift(kind):
            able = ", ".join(one.name for one in HEADS.values() if _can_shift(one))
            raise HeadError(
                f"{self.head} has no intercept that a logit adjustment could move. Heads with one: {able}."
            )

    def _check_auto(self) -> None:
        if self.params:
            raise HeadError(
                f"{next(iter(self.params))!r} is a parameter of one head, and {AUTO} chooses among several. "
                "Name the head as well: --head logistic."
            )

    @property
    def loss_weights(self) -> str | None:
        """How rows are weighted where losses are compared: as they are when heads are fitted."""
        return self.class_weight or self.params.get("class_weight")

    def require_savable(self) -> None:
        """HeadError where the head could be fitted and not be written."""
        if self.head != AUTO:
            build_head(self.head, self.params, seed=self.seed).require_savable()

    @property
    def uses_views(self) -> bool:
        """Whether augmented vectors are of use, to the head or to one that competes."""
        if self.head != AUTO:
            return find_head(self.head).uses_views
        return any(kind.uses_views for kind in HEADS.values() if kind.entry)

    def given(self, kind: HeadKind) -> dict[str, Any]:
        """The parameters that are given for a head."""
        weights = {"class_weight": self.class_weight} if self.class_weight and kind.weighted else {}
        device = {"device": self.device} if self.device is not None and kind.has_device else {}
        return {**weights, **device, **self.params}

    def why_not(self, kind: HeadKind) -> str | None:
        """Why a head cannot take part in the competition."""
        if self.logit_adjustment is not None and not _can_shift(kind):
            return "it has no intercept to adjust"
        return None


def _require_device(device: str) -> None:
    if device == "cpu":
        return
    from featcache.heads.minibatch import pick_device  # imports torch

    try:
        pick_device(device)
    except ValueError as error:
        raise HeadError(f"{error}.") from error


def _can_shift(kind: HeadKind) -> bool:
    from featcache.heads.base import Head

    return kind.load().shift_scores is not Head.shift_scores


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
