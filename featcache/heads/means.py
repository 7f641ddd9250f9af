"""The nearest class mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.heads.base import require_positive
from featcache.heads.closed import ClosedFormHead
from featcache.heads.sums import ClassSums


class NearestMeanHead(ClosedFormHead):
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

    def _check_params(self) -> None:
        require_positive("temperature", self.temperature)

    def _solve(self, sums: ClassSums, heads: Sequence[Any]) -> None:
        means = sums.means  # (K, D)
        for head in heads:
            head.coef_, head.intercept_ = sums.on_raw(means, -0.5 * np.sum(means * means, axis=1))
