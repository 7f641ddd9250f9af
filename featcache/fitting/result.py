"""What fitting a head gives, as values; `fitting.report` says it in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featcache.evaluate.abstain import Abstention
from featcache.evaluate.compete import Competition
from featcache.evaluate.metrics import Metrics
from featcache.evaluate.nodes import NodeChoice
from featcache.evaluate.report import Verdict, judge
from featcache.evaluate.select import Selection
from featcache.fitting.advice import advise
from featcache.fitting.outlook import Outlook
from featcache.fitting.scoring import HeldOut
from featcache.fitting.summary import summarise


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where things are, for commands that can be pasted; a word in capitals where that is not known.

    data: what was embedded; images: the folder they lie in. embed: the command that brings the store up to
    date. own_code: the user's own backbone, `module:function`, which has to be allowed by its name.
    fit_options: those of `featcache fit` that were given, but for head, nodes and groups, which the result
    has; head_options: those that only this head takes.
    """

    store: str = "STORE.h5"
    model: str = "MODEL"
    data: str = "DATA"
    images: str = "IMAGES"
    embed: tuple[str, ...] = ("featcache", "embed", "DATA", "-o", "STORE.h5")
    own_code: str | None = None
    fit_options: tuple[str, ...] = ()
    head_options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What was fitted, how it was chosen and how good it is on rows it has not seen."""

    head: str
    asked: str  # the head that was asked for; "auto": they competed
    params: Mapping[str, Any]
    searched: tuple[str, ...]
    selection: Selection
    competition: Competition | None  # None where a head was asked for
    logit_adjustment: float | None
    nodes: tuple[str, ...]
    num_features: int
    n_train: int
    metrics: Metrics  # of the rows held out
    train_accuracy: float
    cross_validated: Metrics | None  # of the training rows, each by a head fitted without it
    uncalibrated_ece: float  # of the rows held out, at a temperature of 1
    abstention: Abstention | None
    outlook: Outlook
    scored_on: str
    trained_on: str
    seconds: float
    fingerprint: str
    model: str | None  # path of the model file
    notes: tuple[str, ...]
    held_out: HeldOut = field(compare=False, repr=False)
    node_choice: NodeChoice | None = None  # None where the nodes were asked for
    other_nodes: tuple[str, ...] = ()  # that the store has besides
    untrained: tuple[str, ...] = ()  # classes of rows scored that no training row has
    grouped_by: str | None = None
    files: Files = Files()
    replaced: str | None = None  # what the model file was before, in words

    @property
    def chosen_by(self) -> str | None:
        """How the searched parameters were chosen; None when nothing was searched."""
        if not self.selection.candidates:
            return None
        what = "mean log-loss" if self.selection.criterion == "nll" else "accuracy"
        return f"{what} in {self.selection.n_folds}-fold cross-validation on the training rows"

    @property
    def n_untrained(self) -> int:
        """How many of the rows scored are of classes that were not trained on."""
        return sum(row.n for row in self.metrics.per_class if row.name in self.untrained)

    @property
    def verdict(self) -> Verdict | None:
        """Over- or underfitting, and whether the rows scored are as the training rows.

        None where some are of classes that were not trained on, which are wrong however good the fit is.
        """
        if self.untrained:
            return None
        return judge(self.train_accuracy, self.metrics, held_out=self.cross_validated)

    def to_json(self) -> dict[str, Any]:
        metrics, held = self.metrics.to_json(), self.cross_validated
        competition = self.competition
        return {
            "head": self.head,
            "asked": self.asked,
            "params": {name: _finite_or_text(value) for name, value in self.params.items()},
            "logit_adjustment": self.logit_adjustment,
            "nodes": list(self.nodes),
            "node_choice": self.node_choice.to_json() if self.node_choice else None,
            "num_features": self.num_features,
            "n_train": self.n_train,
            "n_test": metrics.pop("n"),
            **metrics,
            "train_accuracy": self.train_accuracy,
            "cv_accuracy": held.accuracy if held else None,
            "cv_accuracy_ci95": list(held.accuracy_ci95) if held else None,
            "cv_nll": held.nll if held else None,
            "uncalibrated_ece": self.uncalibrated_ece,
            "candidates": [candidate.to_json() for candidate in self.selection.candidates],
            "chosen_by": self.chosen_by,
            "heads": [one.to_json() for one in competition.contenders] if competition else [],
            "left_out": [one.to_json() for one in competition.left_out] if competition else [],
            "verdict": self.verdict.to_json() if self.verdict else None,
            "abstention": self.abstention.to_json() if self.abstention else None,
            **self.outlook.to_json(),
            "trained_on": self.trained_on,
            "scored_on": self.scored_on,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "untrained": list(self.untrained),
            "replaced": self.replaced,
            "notes": list(self.notes),
            "summary": summarise(self),
            "next": advise(self).to_json(),
        }

    def describe(self) -> str:
        """The report a person reads in a terminal."""
        from featcache.fitting.report import report_lines

        return "\n".join(report_lines(self))


def _finite_or_text(value: Any) -> Any:
    """JSON has no infinity, which some of scikit-learn's parameters take."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
