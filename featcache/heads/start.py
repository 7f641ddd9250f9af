"""Where a softmax regression starts: discriminant analysis of some rows, as long as the penalty allows."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import logsumexp

from featcache.heads.curvature import GRAM_ROWS

SHRINKAGE = 0.1  # of the covariance within classes, towards the identity
LENGTHS = (0.0, *(2.0**e for e in range(-14, 3)))
FEW = 2000  # rows that tell which length is best
SEPARATED = 0.15  # of the objective at zero; from a first model that is not below it, no steps are saved


class FirstModel:
    """Of standardised rows (S, R) and their classes (S,): weights t W and bias t b, those of linear
    discriminant analysis times t, which is about the best for a strength.

    Where classes are well separated, weights that have to be long take most of a solver's steps from zero:
    there every row is unsure, and at the end only those between the classes. Elsewhere it is zero.
    """

    def __init__(self, sample: NDArray[np.float32], codes: NDArray[np.intp], *, n_classes: int) -> None:
        self.sample, self.codes, self.n_classes = sample, codes, n_classes

    def __call__(self, strength: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(K, R) and (K,) for 1/2 ||W||^2 + strength times the mean log-loss."""
        weights, bias = self._discriminant
        some = slice(None, None, max(len(self.sample) // FEW, 1))
        scores: Any = self.sample[some] @ weights.T.astype(np.float32) + bias.astype(np.float32)
        own, squared = scores[np.arange(len(scores)), self.codes[some]], float(np.sum(weights**2))
        objectives = []
        for t in LENGTHS:
            losses = logsumexp(t * scores, axis=1) - t * own
            objectives.append(0.5 * t * t * squared + strength * float(losses.mean(dtype=np.float64)))
        separated = min(objectives) < SEPARATED * objectives[0]
        best = LENGTHS[int(np.argmin(objectives))] if separated else 0.0
        return best * weights, best * bias

    @cached_property
    def _discriminant(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        told = (self.codes == np.arange(self.n_classes)[:, None]).astype(np.float32)
        means = (told @ self.sample) / np.maximum(told.sum(axis=1, keepdims=True), 1)  # (K, R)
        R = self.sample.shape[1]
        some = slice(None, None, max(len(self.sample) // (GRAM_ROWS * R), 1))
        within = self.sample[some] - means[self.codes[some]]
        scatter = within.T @ within / len(within)
        scatter[np.diag_indices(R)] += SHRINKAGE * max(float(np.trace(scatter)) / R, 1e-6)
        factor = cho_factor(scatter, lower=True, overwrite_a=True, check_finite=False)
        weights: NDArray[np.float64] = cho_solve(factor, means.T, check_finite=False).T.astype(np.float64)
        weights -= weights.mean(axis=0)
        return weights, -0.5 * np.sum(weights * means, axis=1)
