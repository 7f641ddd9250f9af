"""Temperature scaling: one number that turns scores into probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

LOWEST = np.log(1e-15)  # log-probabilities are cut here, so that one impossible class cannot be infinite


def fit_temperature(scores: NDArray[Any], y: NDArray[np.integer[Any]]) -> float:
    """The T > 0 that minimises the log-loss of softmax(scores / T).

    scores: ndarray of shape (n_samples, n_classes) of rows the head was not fitted on; -inf where a class
        was unknown to it. y: (n_samples,) column indices.
    (Guo et al., "On calibration of modern neural networks", ICML 2017.)
    """
    finite = np.where(np.isfinite(scores), scores, np.nan)
    spread = float(np.nanmean(np.nanstd(finite, axis=1))) if len(scores) else 0.0
    if not spread > 0:
        return 1.0

    def loss(log_t: float) -> float:
        log_p = log_softmax(scores / np.exp(log_t), axis=1)[np.arange(len(y)), y]
        return float(-np.maximum(log_p, LOWEST).mean())

    # Probabilities between nearly uniform and nearly one-hot: T from 1/100 to 100 times the usual spread.
    centre = np.log(spread)
    bounds = (centre - np.log(100), centre + np.log(100))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))
