"""What more rows would bring: accuracy by labelled images a class, and by parts of the training rows.

The rows scored are asked again, by heads fitted on fewer rows with what is already chosen: nothing is chosen
by the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.evaluate.learning import (
    LearningCurve,
    Shots,
    few_shot,
    learning_curve,
    shots_lines,
    transfer_line,
)
from featcache.evaluate.select import TrainingRows, select
from featcache.evaluate.splits import make_folds
from featcache.fitting.choice import Choice, Wishes, head_errors
from featcache.fitting.rows import Rows, take_rows
from featcache.fitting.scoring import Scored
from featcache.heads import build_head
from featcache.store.features import FeatureSet

FEW_ROWS = 5_000  # up to so many, parts of the rows are drawn three times, else once
LEAST_ROWS = 40  # fewer rows have no eighths to speak of


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """shots: empty unless asked for. curve: None where it was not drawn."""

    shots: tuple[Shots, ...]
    curve: LearningCurve | None
    train_accuracy: float

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
    """curve: None draws it where the head is one that competes, which are quick to fit again."""
    again = _Again(choice, wishes, training, scored, features=features, rows=rows)
    with head_errors(choice.head, doing="fitted on fewer rows"):
        few = (
            few_shot(training.y, again.searched, shots=shots, tries=tries, seed=wishes.seed) if shots else []
        )
        drawn = None
        if curve or (curve is None and choice.kind.entry and len(training.y) >= LEAST_ROWS):
            attempts = 3 if len(training.y) <= FEW_ROWS else 1
            drawn = learning_curve(training.y, again.fitted, tries=attempts, seed=wishes.seed)
    return Outlook(shots=tuple(few), curve=drawn, train_accuracy=scored.train_accuracy)


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

    def fitted(self, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
        """With the parameters that were chosen on all rows."""
        if len(kept) == len(self.training.y):
            right: NDArray[np.bool_] = self.scored.held_out.probabilities.argmax(axis=1) == self.y
            return right
        return self._hits(kept, self.choice.selection.params, offsets=self.choice.offsets)

    def searched(self, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
        """With parameters chosen on these rows alone."""
        labels, y = np.unique(self.training.y[kept], return_inverse=True)
        if len(labels) < 2:
            only: NDArray[np.bool_] = self.y == self.known[labels[0]]
            return only
        folds = make_folds(self.sha256[kept], y, seed=self.wishes.seed)
        found = select(
            self.choice.head,
            self.choice.kind,
            self.wishes.given(self.choice.kind),
            rows=TrainingRows(X=take_rows(self.training.X, kept), y=y, folds=folds),
            seed=self.wishes.seed,
        )
        return self._hits(kept, found.params)

    def _hits(
        self, kept: NDArray[np.int64], params: Any, *, offsets: NDArray[np.float64] | None = None
    ) -> NDArray[np.bool_]:
        head = build_head(self.choice.head, params, seed=self.wishes.seed)
        views = [take_rows(view, kept) for view in self.training.views] if self.choice.kind.uses_views else []
        more = {"views": views} if views else {}
        head.fit(take_rows(self.training.X, kept), self.training.y[kept], **more)
        if offsets is not None:
            head.shift_scores(offsets)
        right: NDArray[np.bool_] = self.known[head.predict(self.X)] == self.y
        return right
