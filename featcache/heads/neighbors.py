"""k nearest neighbours by cosine similarity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.heads.base import Head, require_count, require_positive

CHUNK_SIMILARITIES = 8_000_000  # similarities held at a time: 32 MB


class NeighborsHead(Head):
    """The vote of the k most similar training rows, each weighted by exp(similarity / T).

    The protocol of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination",
    CVPR 2018, and of DINO (Caron et al., ICCV 2021), with T = 0.07. One further vote, spread evenly over all
    classes, keeps every probability above 0 without changing the order of the classes.

    Parameters
    ----------
    k : neighbours that vote; all training rows when there are fewer.
    T : temperature of the votes.
    """

    vectors_: NDArray[Any]  # (n_samples, n_features), rows of length 1
    labels_: NDArray[np.int64]  # (n_samples,), indices into classes_

    def __init__(self, k: int = 20, *, T: float = 0.07) -> None:
        self.k = k
        self.T = T

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        require_count("k", self.k)
        require_positive("T", self.T)
        self.vectors_, self.labels_ = _unit_rows(X), codes.astype(np.int64)

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        X = self._check_input(X)
        rows = max(CHUNK_SIMILARITIES // len(self.vectors_), 1)
        starts = range(0, len(X), rows)
        return np.concatenate([self._votes(_unit_rows(X[start : start + rows])) for start in starts])

    def column_scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = np.log(self.predict_proba(X))
        return scores

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        return {"vectors": self.vectors_, "labels": self.labels_}, {"n_classes": len(self.classes_)}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], rest: Mapping[str, Any], *, params: Mapping[str, Any]
    ) -> Self:
        head = cls(**params)
        head.vectors_, head.labels_ = arrays["vectors"], arrays["labels"]
        head._restore(n_classes=rest["n_classes"], n_features=head.vectors_.shape[1])
        if len(head.labels_) and not 0 <= head.labels_.min() <= head.labels_.max() < rest["n_classes"]:
            raise ValueError("labels name classes that do not exist")
        return head

    def _votes(self, queries: NDArray[Any]) -> NDArray[np.float64]:
        """Probabilities (B, K) of unit rows (B, D)."""
        k = min(self.k, len(self.vectors_))
        similarities = queries @ self.vectors_.T  # (B, N)
        nearest = np.argpartition(-similarities, k - 1, axis=1)[:, :k]  # (B, k)
        top = np.take_along_axis(similarities, nearest, axis=1).astype(np.float64)
        weights = np.exp((top - top.max(axis=1, keepdims=True)) / self.T)
        weights /= weights.sum(axis=1, keepdims=True)
        votes = np.zeros((len(queries), len(self.classes_)))
        np.add.at(votes, (np.arange(len(queries))[:, None], self.labels_[nearest]), weights)
        probabilities: NDArray[np.float64] = (k * votes + 1 / votes.shape[1]) / (k + 1)
        return probabilities


def _unit_rows(X: NDArray[Any]) -> NDArray[Any]:
    """The rows of X scaled to length 1, in X's precision, float32 at least; a row of zeros stays zero."""
    rows = X.astype(np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    unit: NDArray[Any] = rows / np.where(norms > 0, norms, 1.0)
    return unit.astype(np.result_type(X.dtype, np.float32))
