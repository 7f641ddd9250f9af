"""Temperature scaling: one number that turns scores into probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_ROWS, LEAST_ROWS, VALUES = 20_000, 5_000, 2_000_000  # as many rows tell a temperature to some 0.5 %
MAX_STEPS, CLOSE = 60, 1e-6
RANGE = 100.0  # T is between the usual spread of a row's scores divided by this and multiplied by it


def fit_temperature(
    scores: NDArray[Any], y: NDArray[np.integer[Any]], *, weights: NDArray[np.float64] | None = None
) -> float:
    """The T > 0 that minimises the log-loss of softmax(scores / T).

    scores: ndarray of shape (n_samples, n_classes) of rows the head was not fitted on; -inf where a class
        was unknown to it. y: (n_samples,) column indices. weights: (n_samples,), of the losses; None: equal.
    (Guo et al., "On calibration of modern neural networks", ICML 2017.) A share of 1 / (n + 2) of each label
    counts for all classes alike: where n rows were all told right, an error is not impossible but has by the
    rule of succession that probability. (Platt, "Probabilistic outputs for support vector machines", 1999.)
    Of many rows only some are used, drawn at random: rows may come in the order of their labels.
    """
    few = int(np.clip(VALUES // max(scores.shape[1], 1), LEAST_ROWS, MOST_ROWS))
    share = 1 / (len(scores) + 2)
    n = len(scores)
    some = np.sort(np.random.default_rng(0).choice(n, few, replace=False)) if n > few else np.arange(n)
    meant, z, p = _targets(scores[some].astype(np.float64), y[some], share)
    told = np.isfinite(meant)  # rows of a class that was unknown say nothing of T
    spread = float(np.nanmean(np.nanstd(np.where(p > 0, z, np.nan), axis=1))) if told.any() else 0.0
    if not spread > 0:
        return 1.0
    weight = np.ones(len(z)) if weights is None else weights[some]
    weight = weight[told] / weight[told].sum()
    return 1 / _newton(z[told], p[told], meant[told], weight, 1 / spread)


def _targets(
    scores: NDArray[np.float64], y: NDArray[np.integer[Any]], share: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The score a row's label stands for, (N,); scores less the highest of the row, 0 where there is none,
    (N, K); and 1 where there is one, else 0.
    """
    z = scores - scores.max(axis=1, keepdims=True)
    known = np.isfinite(z)
    own = z[np.arange(len(y)), y]
    z = np.where(known, z, 0.0)
    meant = (1 - share) * own + share * z.sum(axis=1) / known.sum(axis=1)
    return meant, z, known.astype(np.float64)


def _newton(
    z: NDArray[np.float64],
    known: NDArray[np.float64],
    meant: NDArray[np.float64],
    weight: NDArray[np.float64],
    start: float,
) -> float:
    """The b = 1 / T at the minimum of the mean of log sum_k exp(b z_k) - b meant, which is convex in b."""
    low, high, b = start / RANGE, start * RANGE, start
    for _ in range(MAX_STEPS):
        p = np.exp(b * z) * known
        p /= np.einsum("nk->n", p)[:, None]
        pz = p * z
        mean = np.einsum("nk->n", pz)
        slope = float(weight @ (mean - meant))
        curvature = float(weight @ (np.einsum("nk,nk->n", pz, z) - mean * mean))
        low, high = (low, b) if slope > 0 else (b, high)
        step = b - slope / curvature if curvature > 0 else high
        new = step if low < step < high else float(np.sqrt(low * high))
        if abs(new - b) <= CLOSE * b:
            return new
        b = new
    return b
