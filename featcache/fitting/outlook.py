"""What more rows would bring: accuracy by labelled images a class, and by parts of the training rows.

The rows scored are asked again, by heads fitted on fewer rows with what is already chosen: nothing is chosen
by the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.evaluate.learning import (
    LearningCurve,
    Shots,
    few_shot,
    learning_curve,
    shots_lines,
    transfer_line,
)
from featcache.evaluate.select import TrainingRows
from featcache.evaluate.splits import make_folds, number_units
from featcache.fitting.choice import Choice, Wishes, choose_head, fit_head, head_errors
from featcache.fitting.rows import Rows, loss_weights, take_rows
from featcache.fitting.scoring import Scored
from featcache.heads import build_head
from featcache.progress import SilentProgress
from featcache.store.features import FeatureSet
from featcache.words import plural

FEW_ROWS = 5_000  # up to so many, parts of the rows are drawn three times, else once
LEAST_ROWS = 40  # fewer rows have no eighths to speak of


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """shots: empty unless asked for. curve: None where it was not drawn. notes: what could not be asked."""

    shots: tuple[Shots, ...]
    curve: LearningCurve | None
    train_accuracy: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "shots": [row.to_json() for row in self.shots],
            "learning_curve": self.curve.to_json() if self.curve else None,
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        lines = shots_lines(self.shots) if self.shots else []
        return lines + (self.curve.lines() if self.curve else [])

    def sentence(self) -> str | None:
        """Whether a head on these features is enough; None without a curve."""
        return transfer_line(self.curve, train_accuracy=self.train_accuracy) if self.curve else None


def look_ahead(
    choice: Choice,
    wishes: Wishes,
    training: TrainingRows,
    scored: Scored,
    *,
    features: FeatureSet,
    rows: Rows,
    shots: Sequence[int],
    tries: int,
    curve: bool | None,
) -> Outlook:
    """curve: None draws it where the head is one that competes, which are quick to fit again.

    A head that cannot be fitted on fewer rows is a note: the one on all of them is there.
    """
    if tries < 1 or any(number < 1 for number in shots):
        raise ValueError("shots and tries are numbers from 1")
    again = _Again(choice, wishes, training, scored, features=features, rows=rows)
    few: list[Shots] = []
    drawn, notes = None, []
    for number in sorted(set(shots)):
        try:
            with head_errors(choice.head, doing="fitted on fewer rows"):
                few += few_shot(
                    training.y,
                    again.searched,
                    shots=[number],
                    tries=tries,
                    seed=wishes.seed,
                    images=again.images,
                )
        except HeadError as error:
            notes.append(f"no accuracy by {plural(number, 'labelled image')} a class: {error}")
    if curve or (curve is None and choice.kind.entry and len(training.y) >= LEAST_ROWS):
        attempts = 3 if len(training.y) <= FEW_ROWS else 1
        try:
            with head_errors(choice.head, doing="fitted on fewer rows"):
                drawn = learning_curve(
                    training.y,
                    again.fitted,
                    tries=attempts,
                    seed=wishes.seed,
                    images=again.images,
                    units=again.units,
                )
        except HeadError as error:
            notes.append(f"no accuracy by training rows: {error}")
    return Outlook(shots=tuple(few), curve=drawn, train_accuracy=scored.train_accuracy, notes=tuple(notes))


class _Again:
    """The chosen head on some of the training rows, scored on the rows held out."""

    def __init__(
        self,
        choice: Choice,
        wishes: Wishes,
        training: TrainingRows,
        scored: Scored,
        *,
        features: FeatureSet,
        rows: Rows,
    ) -> None:
        self.choice, self.wishes, self.training, self.scored = choice, wishes, training, scored
        self.known = np.unique(features.y[rows.train])
        self.X, self.y = take_rows(features.X, rows.test), features.y[rows.test]
        self.sha256 = features.sha256[rows.train]
        self.groups = rows.groups.take(rows.train) if rows.groups else None
        self.images = number_units(self.sha256)
        scored_groups = rows.groups.take(rows.test) if rows.groups else None
        self.units = number_units(features.sha256[rows.test], scored_groups)

    def fitted(self, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
        """With the parameters that were chosen on all rows."""
        if len(kept) == len(self.training.y):
            right: NDArray[np.bool_] = self.scored.held_out.probabilities.argmax(axis=1) == self.y
            return right
        head = build_head(self.choice.head, self.choice.selection.params, seed=self.wishes.seed)
        views = self._views(kept) if self.choice.kind.uses_views else ()
        more = {"views": views} if views else {}
        head.fit(take_rows(self.training.X, kept), self.training.y[kept], **more)
        if self.choice.offsets is not None:
            head.shift_scores(self.choice.offsets)
        hits: NDArray[np.bool_] = self.known[head.predict(self.X)] == self.y
        return hits

    def searched(self, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
        """With parameters chosen on these rows alone, as they were on all of them."""
        labels, y = np.unique(self.training.y[kept], return_inverse=True)
        if len(labels) < 2:
            only: NDArray[np.bool_] = self.y == self.known[labels[0]]
            return only
        groups = self.groups.take(kept) if self.groups else None
        rows = TrainingRows(
            X=take_rows(self.training.X, kept),
            y=y,
            folds=make_folds(self.sha256[kept], y, seed=self.wishes.seed, groups=groups),
            views=self._views(kept),
            weights=loss_weights(self.wishes.loss_weights, y),
        )
        weight = self.wishes.class_weight if self.choice.kind.weighted else None
        wishes = replace(self.wishes, head=self.choice.head, class_weight=weight)
        choice = choose_head(wishes, rows, progress=SilentProgress())
        right: NDArray[np.bool_] = (
            self.known[labels[fit_head(choice, wishes, rows).predict(self.X)]] == self.y
        )
        return right

    def _views(self, kept: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        return tuple(take_rows(view, kept) for view in self.training.views)
