"""What more rows would bring: accuracy by labelled images a class, and by parts of the training rows.

The rows scored are asked again, by heads fitted on fewer rows with what is already chosen: nothing is chosen
by the answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.evaluate.learning import (
    FRACTIONS,
    LearningCurve,
    Limit,
    Shots,
    few_shot,
    learning_curve,
    limit_of,
    shots_lines,
    transfer_line,
)
from featcache.evaluate.select import TrainingRows
from featcache.evaluate.splits import make_folds, number_units
from featcache.fitting.choice import Choice, choose_head, fit_head, head_errors
from featcache.fitting.rows import Rows, loss_weights, take_rows
from featcache.fitting.scoring import Scored
from featcache.fitting.wishes import Wishes
from featcache.heads import build_head
from featcache.progress import Progress, SilentProgress
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

    @property
    def limit(self) -> Limit | None:
        """What stands in the way of fewer errors; None without a curve."""
        return limit_of(self.curve, train_accuracy=self.train_accuracy) if self.curve else None

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
    left: float = math.inf,
    progress: Progress | None = None,
) -> Outlook:
    """A curve that was not wished for is drawn where the head is one that competes, in `left` seconds or not
    at all.

    A head that cannot be fitted on fewer rows is a note: the one on all of them is there. Rows scored of
    classes that were not trained on say nothing of more rows of the others, and are left out.
    """
    again = _Again(choice, wishes, training, scored, features=features, rows=rows)
    if not len(again.y):
        none = "no accuracy by fewer labelled images: no row scored is of a class that was trained on"
        asked = (none,) if wishes.curve or wishes.shots else ()
        return Outlook(shots=(), curve=None, train_accuracy=scored.train_accuracy, notes=asked)
    few, few_notes = _few_shots(again, progress or SilentProgress())
    curve, drawn, notes = wishes.curve, None, list(few_notes)
    if curve or (curve is None and choice.kind.entry and len(training.y) >= LEAST_ROWS):
        attempts = 3 if len(training.y) <= FEW_ROWS else 1
        parts = attempts * sum(FRACTIONS[:-1]) * len(training.y)
        pace = _Pace(whole=len(training.y), parts=parts, seconds=math.inf if curve else left)
        try:
            with head_errors(choice.head, doing="fitted on fewer rows"):
                drawn = learning_curve(
                    training.y,
                    lambda kept: pace.keep(kept, again.fitted),
                    tries=attempts,
                    seed=wishes.seed,
                    images=again.images,
                    together=again.together,
                    units=again.units,
                )
        except HeadError as error:
            notes.append(f"no accuracy by training rows: {error}")
        except _TooSlow as slow:
            notes.append(
                f"no accuracy by training rows: {slow} of the {wishes.budget:g} s of --budget; --curve asks "
                "for it all the same"
            )
    if (few or drawn) and len(again.y) < len(rows.test):
        notes.append(
            f"accuracy by fewer labelled images is of the {len(again.y):,} rows scored whose class was "
            "trained on"
        )
    return Outlook(shots=tuple(few), curve=drawn, train_accuracy=scored.train_accuracy, notes=tuple(notes))


def _few_shots(again: _Again, progress: Progress) -> tuple[list[Shots], list[str]]:
    found: list[Shots] = []
    notes = []
    tries = again.wishes.tries
    for number in sorted(set(again.wishes.shots)):
        images = plural(number, "labelled image")
        progress.start(f"fitting on {images} a class", total=tries, unit="drawings")

        def searched(kept: NDArray[np.int64]) -> NDArray[np.bool_]:
            right = again.searched(kept)
            progress.advance(1)
            return right

        try:
            with head_errors(again.choice.head, doing="fitted on fewer rows"):
                found += few_shot(
                    again.training.y,
                    searched,
                    shots=[number],
                    tries=tries,
                    seed=again.wishes.seed,
                    images=again.images,
                )
        except HeadError as error:
            notes.append(f"no accuracy by {images} a class: {error}")
        progress.finish()
    return found, notes


class _TooSlow(Exception):
    """More fits would take longer than there is time."""


class _Pace:
    """Fits on parts of the rows while, by what a row took so far, all of them end in time.

    whole: all rows, which are fitted already. parts: the rows of all parts together.
    """

    def __init__(self, *, whole: int, parts: float, seconds: float) -> None:
        self.whole, self.parts, self.seconds = whole, parts, seconds
        self.fitted, self.started = 0, time.perf_counter()

    def keep(
        self, kept: NDArray[np.int64], fit: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
    ) -> NDArray[np.bool_]:
        if len(kept) == self.whole:
            return fit(kept)
        expected = 0.0
        if self.fitted:
            expected = (time.perf_counter() - self.started) * self.parts / self.fitted
        if self.seconds <= 0:
            raise _TooSlow("nothing is left")
        if expected > self.seconds:
            about, left = _seconds(expected), _seconds(self.seconds)
            raise _TooSlow(f"it would take about {about}, longer than the {left} left")
        right = fit(kept)
        self.fitted += len(kept)
        return right


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


class _Again:
    """The chosen head on some of the training rows, scored on the rows held out of classes trained on."""

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
        self.is_known = np.isin(features.y[rows.test], self.known)  # of the rows held out
        test = rows.test[self.is_known]
        self.X, self.y = take_rows(features.X, test), features.y[test]
        self.sha256 = features.sha256[rows.train]
        self.groups = rows.groups.take(rows.train) if rows.groups else None
        self.images = number_units(self.sha256)
        self.together = number_units(self.sha256, self.groups)
        scored_groups = rows.groups.take(test) if rows.groups else None
        self.units = number_units(features.sha256[test], scored_groups)

    def fitted(self, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
        """With the parameters that were chosen on all rows."""
        if len(kept) == len(self.training.y):
            answers = self.scored.held_out.probabilities.argmax(axis=1)[self.is_known]
            right: NDArray[np.bool_] = answers == self.y
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
