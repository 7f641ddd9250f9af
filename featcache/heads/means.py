"""The nearest class mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.base import LinearHead, require_positive
from featcache.heads.standardize import Standardizer


class NearestMeanHead(LinearHead):
    """The class whose mean is nearest in Euclidean distance on standardised features.

    -1/2 |z - m_k|^2 = z . m_k - 1/2 |m_k|^2 - 1/2 |z|^2, whose last term is the same for all classes: the
    scores are linear, with weights m_k and intercepts -1/2 |m_k|^2 (Mensink et al., "Distance-based image
    classification", TPAMI 2013, with their metric the inverse variance of each feature).

    Parameters
    ----------
    temperature : what the scores are divided by before the softmax that makes them probabilities.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        require_positive("temperature", self.temperature)
        standardizer = Standardizer.of(X)
        means = np.stack(
            [X[codes == k].mean(axis=0, dtype=np.float64) for k in range(len(self.classes_))]
        )  # (K, D)
        weights = standardizer.apply(means)
        self.coef_, self.intercept_ = standardizer.fold(weights, -0.5 * np.sum(weights * weights, axis=1))
