"""What is asked of `fit` besides a store, its nodes and its groups, in one type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from featcache.errors import HeadError
from featcache.heads import HEADS, HeadKind, build_head, find_head
from featcache.words import spell_options

AUTO = "auto"  # the heads compete
BUDGET = 60.0  # seconds of that
BALANCED = "balanced"
TRIES = 10
_OPTIONS = {
    "class_weight": "--class-weight",
    "logit_adjustment": "--logit-adjustment",
    "precision": "--wish-precision",
    "budget": "--budget",
    "shots": "--shots",
    "tries": "--tries",
    "device": "--device",
    "seed": "--seed",
}


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked for; HeadError where it does not go together, before any work.

    The defaults are those of `featcache.fit`. head: a name, or AUTO. params: of the head. budget: seconds,
    `spent` of which are gone already. class_weight: BALANCED counts every class alike, None every row.
    logit_adjustment: tau, the scores of class k are lowered by tau log p_k, its share of the training rows.
    precision: what rows above a threshold shall be right by. shots: labelled images a class, each drawn
    `tries` times. curve: by parts of the training rows; None: where there is time. device: where heads that
    can do their products: auto, cpu, cuda; None: each as it does by itself.
    ValueError: numbers that there cannot be.
    """

    head: str = AUTO
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    budget: float = BUDGET
    spent: float = 0.0
    class_weight: str | None = None
    logit_adjustment: float | None = None
    precision: float | None = None
    shots: Sequence[int] = ()
    tries: int = TRIES
    curve: bool | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.tries < 1 or any(number < 1 for number in self.shots):
            raise ValueError("shots and tries are numbers from 1")
        if self.precision is not None and not 0 < self.precision < 1:
            raise ValueError(f"a precision is wished for between 0 and 1, not {self.precision!r}")
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

    def spell(self) -> tuple[str, ...]:
        """The options of `featcache fit` for all that is not its default, but for the head and its params."""
        default = {one.name: one.default for one in fields(self)}
        said = {
            option: (_said(getattr(self, name)), _said(default[name])) for name, option in _OPTIONS.items()
        }
        curve = {None: (), True: ("--curve",), False: ("--no-curve",)}[self.curve]
        return spell_options(said) + curve

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


def _said(value: Any) -> Any:
    """A list as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


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
