"""A fitted head on the rows held out, once, and on those it was fitted on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from featcache.evaluate.abstain import Abstention, choose_abstention
from featcache.evaluate.metrics import LEAST_PROBABILITY, Metrics, expected_calibration_error, score
from featcache.evaluate.select import TrainingRows
from featcache.evaluate.splits import number_units
from featcache.fitting.choice import Choice, head_errors
from featcache.fitting.rows import Rows, take_rows
from featcache.store.features import FeatureSet

if TYPE_CHECKING:
    from featcache.heads.base import Head


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """The rows that were scored, and what the fitted head says of them.

    ids: the relative paths, n of them. y: (n,), indices into `classes`. probabilities: (n, n_classes); a
    class that the training rows lack has 0.
    """

    ids: tuple[str, ...]
    y: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """cross_validated: of the predictions for training rows by heads fitted without them; None without any.
    uncalibrated_ece: of the rows held out, at a temperature of 1.
    """

    held_out: HeldOut
    test: Metrics
    train_accuracy: float
    cross_validated: Metrics | None
    uncalibrated_ece: float
    abstention: Abstention | None


def score_head(
    head: Head,
    choice: Choice,
    features: FeatureSet,
    rows: Rows,
    training: TrainingRows,
    *,
    known: NDArray[np.int64],
    precision: float | None = None,
) -> Scored:
    """known: the classes of the training rows, (K,), ascending. precision: what is wished of answers."""

    def ask(X: NDArray[Any]) -> NDArray[np.float64]:
        with head_errors(choice.head, doing="scored"):
            return head.predict_proba(X)

    y, probabilities = features.y[rows.test], np.zeros((len(rows.test), len(features.classes)))
    probabilities[:, known] = ask(take_rows(features.X, rows.test))
    ids = tuple(features.ids[row] for row in rows.test)
    held_out = HeldOut(ids=ids, y=y, probabilities=probabilities, classes=features.classes)
    # Of `training.X`, which is there already: to take the rows anew may be to copy them.
    train_accuracy = float((ask(training.X).argmax(axis=1) == training.y).mean())
    out_of_fold, units = _out_of_fold(choice), None
    if choice.selection.out_of_fold and training.folds.unit is not None:
        units = training.folds.unit[choice.selection.out_of_fold.rows]
    names = tuple(features.classes[k] for k in known)
    abstention = None
    if precision is not None and out_of_fold is not None:
        abstention = choose_abstention(
            precision,
            held_out=out_of_fold,
            test=(y, probabilities),
            held_out_units=units,
            test_units=_units(features, rows),
        )
    raw = _uncalibrated(probabilities[:, known], choice)
    hits = known[raw.argmax(axis=1)] == y
    return Scored(
        held_out=held_out,
        test=score(y, probabilities, features.classes, ids, units=_units(features, rows)),
        train_accuracy=train_accuracy,
        cross_validated=score(*out_of_fold, names, draws=0, units=units) if out_of_fold else None,
        uncalibrated_ece=expected_calibration_error(raw.max(axis=1), hits),
        abstention=abstention,
    )


def _units(features: FeatureSet, rows: Rows) -> NDArray[np.int64]:
    groups = rows.groups.take(rows.test) if rows.groups else None
    return number_units(features.sha256[rows.test], groups)


def _out_of_fold(choice: Choice) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Labels and probabilities of the training rows that folds held out, adjusted as the head is."""
    found = choice.selection.out_of_fold
    if found is None:
        return None
    if choice.offsets is None:
        return found.y, found.probabilities
    return found.y, softmax(_logarithms(found.probabilities) + choice.offsets, axis=1)


def _uncalibrated(probabilities: NDArray[np.float64], choice: Choice) -> NDArray[np.float64]:
    """What the probabilities would be at a temperature of 1."""
    offsets = 0.0 if choice.offsets is None else choice.offsets
    temperature = choice.selection.params.get("temperature", 1.0)
    scores = (_logarithms(probabilities) - offsets) * temperature
    raw: NDArray[np.float64] = softmax(scores + offsets, axis=1)
    return raw


def _logarithms(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.maximum(probabilities, LEAST_PROBABILITY**4))
