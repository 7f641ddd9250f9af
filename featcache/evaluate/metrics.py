"""How good predictions are: accuracy with its interval, log-loss, calibration, per class.

Knows labels and probabilities; not which head made them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_PROBABILITY = 1e-15  # log-loss counts smaller ones as this, so that it stays finite
ECE_BINS = 15
Z95 = 1.959963984540054  # standard normal quantile of 0.975


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """How the rows of one class fared."""

    name: str
    n: int
    accuracy: float | None  # of the rows of this class; None without any
    precision: float | None  # of the rows predicted to be this class; None without any


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Scores of n rows. `classes` name the rows and columns of `confusion` (true, predicted)."""

    n: int
    accuracy: float
    accuracy_ci95: tuple[float, float]
    mean_per_class_accuracy: float  # over the classes that have rows
    top5: float | None  # None unless there are more than 5 classes
    nll: float  # mean log-loss, nats
    ece: float
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    per_class: tuple[ClassMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        """The metrics as JSON-able values."""
        return asdict(self)


def score(y: NDArray[np.integer[Any]], probabilities: NDArray[Any], classes: Sequence[str]) -> Metrics:
    """Metrics of the labelled rows.

    y: ndarray of shape (n_samples,), indices into `classes`; rows of -1 are ignored.
    probabilities: ndarray of shape (n_samples, n_classes). A class the head does not know has probability 0,
        so that its rows count as errors.
    """
    labelled = y >= 0
    y, probabilities = y[labelled], probabilities[labelled].astype(np.float64)
    if not len(y):
        raise ValueError("there are no labelled rows to score")
    predicted = probabilities.argmax(axis=1)
    correct = predicted == y
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (y, predicted), 1)
    per_class = tuple(_class_metrics(confusion, k, name) for k, name in enumerate(classes))
    recalls = [row.accuracy for row in per_class if row.accuracy is not None]
    return Metrics(
        n=len(y),
        accuracy=float(correct.mean()),
        accuracy_ci95=wilson_interval(int(correct.sum()), len(y)),
        mean_per_class_accuracy=sum(recalls) / len(recalls),
        top5=_in_top5(y, probabilities) if len(classes) > 5 else None,
        nll=float(log_losses(y, probabilities).mean()),
        ece=expected_calibration_error(probabilities.max(axis=1), correct),
        classes=tuple(classes),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        per_class=per_class,
    )


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, within [0, 1] also for 0 and n successes.

    (Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.)
    """
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def log_losses(y: NDArray[np.integer[Any]], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log of the probability of the true class, ndarray of shape (n_samples,), nats."""
    true = probabilities[np.arange(len(y)), y]
    losses: NDArray[np.float64] = -np.log(np.maximum(true, LEAST_PROBABILITY))
    return losses


def expected_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Mean gap between confidence and accuracy over 15 bins of equal width, weighted by their rows.

    (Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015.)
    """
    # A bin is (low, high]: confidence 1 is in the last one.
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gap = np.bincount(bins, weights=confidence - correct, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _in_top5(y: NDArray[np.integer[Any]], probabilities: NDArray[np.float64]) -> float:
    """The share of rows whose class is among the five most probable, with a probability above 0."""
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    possible = probabilities[np.arange(len(y)), y] > 0
    return float(((top == y[:, None]).any(axis=1) & possible).mean())


def _class_metrics(confusion: NDArray[np.int64], k: int, name: str) -> ClassMetrics:
    right, n, said = int(confusion[k, k]), int(confusion[k].sum()), int(confusion[:, k].sum())
    return ClassMetrics(
        name=name, n=n, accuracy=right / n if n else None, precision=right / said if said else None
    )
