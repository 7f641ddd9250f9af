"""Linear discriminant analysis with a shrunk covariance, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from featcache.heads.base import require_positive
from featcache.heads.closed import ClosedFormHead
from featcache.heads.penalised import Penalised
from featcache.heads.sums import ClassSums

LEAST_SPREAD = 1e-6  # of all variance, that the classes are taken to have within


class DiscriminantHead(ClosedFormHead):
    """The class of the highest normal density, all with one covariance, on standardised features z.

    With class means m_k, priors p_k and the covariance S within the classes, shrunk towards a multiple of the
    identity of the same trace, V = (1 - s) S + s tr(S) / D, the scores are z . V^-1 m_k - 1/2 m_k . V^-1 m_k
    + log p_k (Friedman, "Regularized discriminant analysis", JASA 1989). V^-1 is that of S with the penalty
    s tr(S) / D / (1 - s), for every s from one tridiagonal form (`Penalised`).

    Parameters
    ----------
    shrinkage : s, above 0 and at most 1.
    class_weight : "balanced" takes all classes for equally frequent, in the priors and in S; None takes them
        as frequent as they are in the rows.
    device : where products over the rows are done: cpu, cuda, or auto, which takes a CUDA device where torch
        has one and the processors would take long.
    temperature : what the scores are divided by before the softmax that makes them probabilities.
    """

    path: ClassVar[frozenset[str]] = frozenset({"shrinkage"})
    cross: ClassVar[bool] = True

    def __init__(
        self,
        shrinkage: float = 0.1,
        *,
        class_weight: str | Mapping[Any, float] | None = None,
        device: str = "cpu",
        temperature: float = 1.0,
    ) -> None:
        self.shrinkage = shrinkage
        self.class_weight = class_weight
        self.device = device
        self.temperature = temperature

    def _check_params(self) -> None:
        require_positive("shrinkage", self.shrinkage)
        if self.shrinkage > 1:
            raise ValueError(f"shrinkage is at most 1, not {self.shrinkage!r}")
        require_positive("temperature", self.temperature)

    def _solve(self, sums: ClassSums, heads: Sequence[Any]) -> None:
        weight, means = sums.class_weight, sums.means
        between = (means - sums.mean) * np.sqrt(weight / weight.sum())[:, None]
        total = sums.scatter() / weight.sum()
        total = np.diag(total) if total.ndim == 1 else total
        within = total - between.T @ between
        # Where the rows of every class are alike, what is left within is rounding.
        least = LEAST_SPREAD * float(np.trace(total)) or 1.0
        spread = max(float(np.trace(within)), least) / sums.n_features
        penalised = Penalised(within, noise=sums.noise)
        # s = 1 is the limit of a penalty that leaves nothing of S.
        kept = [max(1 - float(head.shrinkage), 1e-12) for head in heads]
        solutions = penalised.solve(means.T, [(1 - k) * spread / k for k in kept])
        for head, keep, solution in zip(heads, kept, solutions, strict=True):
            weights = solution.T / keep  # (K, R)
            bias = np.log(weight / weight.sum()) - 0.5 * np.sum(weights * means, axis=1)
            head.coef_, head.intercept_ = sums.on_raw(weights, bias)
