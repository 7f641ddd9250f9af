"""What the closed forms are solved from: sums over standardised rows. Arrays only, float64.

They come from moments (`of_moments`) or, where there are fewer rows than features, from the rows rotated to
their principal axes (`of_rows`), as many as the rank; a solution is brought back to raw features by `on_raw`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.moments import Moments
from featcache.heads.standardize import rotate

OnRaw = Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassSums:
    """Sums over rows z of K classes, in R features or axes. The rows of class k weigh weights[k]."""

    counts: NDArray[np.int64]  # (K,)
    weights: NDArray[np.float64]  # (K,)
    sums: NDArray[np.float64]  # (K, R), each row counted once
    gram: NDArray[np.float64] | None  # of the weighted rows about their mean: (R, R), or (R,) if diagonal
    noise: float  # relative rounding error of the gram
    n_features: int  # raw ones
    on_raw: OnRaw  # weights (K, R) and bias (K,) as they act on raw features

    @property
    def class_weight(self) -> NDArray[np.float64]:
        """The weight of all rows of each class together, (K,)."""
        return self.weights * self.counts

    @property
    def mean(self) -> NDArray[np.float64]:
        """The weighted mean of the rows, (R,)."""
        mean: NDArray[np.float64] = self.weights @ self.sums / self.class_weight.sum()
        return mean

    @property
    def means(self) -> NDArray[np.float64]:
        """Of each class, (K, R)."""
        return self.sums / self.counts[:, None]

    def scatter(self) -> NDArray[np.float64]:
        """The gram, which must have been asked for."""
        if self.gram is None:
            raise ValueError("these sums were taken without cross-products")
        return self.gram


def of_moments(moments: Moments) -> ClassSums:
    """The sums over the standardised rows of these moments."""
    standardizer = moments.standardizer()
    return ClassSums(
        counts=moments.counts.sum(axis=0),
        weights=moments.weights,
        sums=moments.standardised_sums(standardizer),
        gram=None if moments.gram is None else moments.standardised_gram(standardizer),
        noise=moments.noise,
        n_features=len(moments.centre),
        on_raw=standardizer.fold,
    )


def of_rows(X: NDArray[Any], codes: NDArray[np.intp], *, weights: NDArray[np.float64]) -> ClassSums:
    """The sums over the standardised rows of X, (n_samples, n_features), on their principal axes."""
    rotation = rotate(X, keep_float64=True)
    rows = rotation.rows  # (N, R)
    told = (codes == np.arange(len(weights))[:, None]).astype(np.float64)  # (K, N)
    gram = rotation.squared_norms
    if not np.all(weights == 1):
        of_row = weights[codes]
        centred = (rows - of_row @ rows / of_row.sum()) * np.sqrt(of_row)[:, None]
        gram = centred.T @ centred
    return ClassSums(
        counts=np.bincount(codes, minlength=len(weights)),
        weights=weights,
        sums=told @ rows,
        gram=gram,
        noise=float(np.finfo(float).eps),
        n_features=X.shape[1],
        on_raw=rotation.unrotate,
    )
