"""k nearest neighbours by cosine similarity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from featcache.heads.base import Head, require_count, require_positive
from featcache.heads.closed import every_fold_knows
from featcache.heads.path import PathSearch
from featcache.heads.threads import in_threads

CHUNK_SIMILARITIES = 8_000_000  # similarities a thread holds at a time: 32 MB
CHUNK_VALUES = 4_000_000  # of rows scaled at a time
GROUP = 16  # columns whose largest stands for them where the nearest are looked for


class NeighborsHead(Head):
    """The vote of the k most similar training rows, each weighted by exp(similarity / T).

    The protocol of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination",
    CVPR 2018, and of DINO (Caron et al., ICCV 2021), with T = 0.07. One further vote, spread evenly over all
    classes, keeps every probability above 0 without changing the order of the classes.

    Parameters
    ----------
    k : neighbours that vote; all training rows when there are fewer.
    T : temperature of the votes.
    temperature : what the logarithms of the votes are divided by before the softmax.
    """

    vectors_: NDArray[Any]  # (n_samples, n_features), rows of length 1
    labels_: NDArray[np.int64]  # (n_samples,), indices into classes_

    def __init__(self, k: int = 20, *, T: float = 0.07, temperature: float = 1.0) -> None:
        self.k = k
        self.T = T
        self.temperature = temperature

    def start_search(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        fold: NDArray[np.intp],
        n_folds: int,
        searched: tuple[str, ...],
        views: Sequence[NDArray[Any]] = (),
    ) -> PathSearch | None:
        head = clone(self)
        features, codes = head._check_training(X, y)
        if set(searched) - {"k", "T"} or not every_fold_knows(codes, fold, n_folds):
            return None
        return _NeighborsSearch(head, _unit_rows(features), codes, fold=fold, n_folds=n_folds)

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        self._check_params()
        self.vectors_, self.labels_ = _unit_rows(X), codes.astype(np.int64)

    def _check_params(self) -> None:
        require_count("k", self.k)
        require_positive("T", self.T)
        require_positive("temperature", self.temperature)

    def column_scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        scores = np.empty((len(X), len(self.classes_)))
        k = min(self.k, len(self.vectors_))
        rows = max(CHUNK_SIMILARITIES // len(self.vectors_), 1)

        def score(start: int) -> None:
            some = slice(start, start + rows)
            top, found = _nearest(_unit_rows(X[some]) @ self.vectors_.T, k)
            scores[some] = _log_votes(
                top, self.labels_[found], T=self.T, n_classes=scores.shape[1], n_voters=k
            )

        in_threads(score, range(0, len(X), rows))
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


class _NeighborsSearch:
    """`PathSearch`: the similarities of all rows are taken once, for every fold, k and T.

    Of each row that is held out it keeps the nearest rows outside of its fold, as many as the largest k.
    """

    def __init__(
        self,
        head: NeighborsHead,
        unit: NDArray[Any],
        codes: NDArray[np.intp],
        *,
        fold: NDArray[np.intp],
        n_folds: int,
    ) -> None:
        self.head, self.unit, self.codes, self.fold = head, unit, codes, fold
        held = np.bincount(fold[fold >= 0], minlength=n_folds)
        self.trained = len(fold) - held  # (n_folds,)
        # Rows of a fold stand together, so that they are left out as one slice.
        self.order = np.argsort(fold, kind="stable")
        self.stop = np.cumsum(held) + np.sum(fold < 0)
        self.start = self.stop - held
        self.top: NDArray[np.float32] = np.empty((len(fold), 0), dtype=np.float32)
        self.labels = np.empty((len(fold), 0), dtype=np.int32)

    def scores(self, candidates: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[Any]]:
        heads = [clone(self.head).set_params(**values) for values in candidates]
        for head in heads:
            head._check_params()
        self._find(max((head.k for head in heads), default=0))
        held = np.flatnonzero(self.fold >= 0)
        for head in heads:
            n_voters = np.minimum(head.k, self.trained[self.fold[held]])
            scores = np.zeros((len(self.fold), len(self.head.classes_)))
            scores[held] = _log_votes(
                self.top[held, : head.k],
                self.labels[held, : head.k],
                T=head.T,
                n_classes=scores.shape[1],
                n_voters=n_voters,
            )
            yield scores

    def fit(self, params: Mapping[str, Any]) -> NeighborsHead:
        head = NeighborsHead(**{**self.head.get_params(deep=False), **params})
        head._check_params()
        head.classes_, head.n_features_in_ = self.head.classes_, self.head.n_features_in_
        head.vectors_, head.labels_ = self.unit, self.codes.astype(np.int64)
        return head

    def _find(self, k: int) -> None:
        """The k nearest rows of each, all of those that are fitted on where there are fewer."""
        k = min(k, int(self.trained.max()))
        if k <= self.top.shape[1]:
            return
        n = len(self.fold)
        vectors, labels = self.unit[self.order], self.codes[self.order].astype(np.int32)
        self.top, self.labels = np.empty((n, k), dtype=np.float32), np.empty((n, k), dtype=np.int32)
        step = max(CHUNK_SIMILARITIES // n, 1)

        def find(start: int, fold: int) -> None:
            some = slice(start, min(start + step, int(self.stop[fold])))
            similarities = vectors[some] @ vectors.T
            similarities[:, self.start[fold] : self.stop[fold]] = -np.inf
            top, found = _nearest(similarities, k)
            self.top[self.order[some]], self.labels[self.order[some]] = top, labels[found]

        chunks = [
            (start, fold)
            for fold in range(len(self.trained))
            for start in range(int(self.start[fold]), int(self.stop[fold]), step)
        ]
        in_threads(lambda chunk: find(*chunk), chunks)


def _nearest(similarities: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The k largest of each row of (B, N), descending, (B, k), and where they are.

    The k largest lie in the k groups of columns whose maxima are largest, and only those are looked at.
    """
    n = similarities.shape[1]
    n_groups = n // GROUP
    columns = np.arange(n)[None]
    if n_groups > 2 * k:
        maxima = similarities[:, :n_groups].copy()
        for g in range(1, GROUP):
            np.maximum(maxima, similarities[:, g * n_groups : (g + 1) * n_groups], out=maxima)
        groups = np.argpartition(maxima, n_groups - k, axis=1)[:, n_groups - k :]  # (B, k)
        members = (groups[:, :, None] + n_groups * np.arange(GROUP)).reshape(len(groups), -1)
        rest = np.broadcast_to(np.arange(n_groups * GROUP, n), (len(groups), n - n_groups * GROUP))
        columns = np.concatenate([members, rest], axis=1)
        similarities = np.take_along_axis(similarities, columns, axis=1)
    size = similarities.shape[1]
    largest = np.argpartition(similarities, size - k, axis=1)[:, size - k :]
    top = np.take_along_axis(similarities, largest, axis=1)
    order = np.argsort(-top, axis=1, kind="stable")
    found = np.take_along_axis(np.broadcast_to(columns, similarities.shape), largest, axis=1)
    return np.take_along_axis(top, order, axis=1), np.take_along_axis(found, order, axis=1)


def _log_votes(
    top: NDArray[Any],
    labels: NDArray[np.integer[Any]],
    *,
    T: float,
    n_classes: int,
    n_voters: NDArray[np.intp] | int,
) -> NDArray[np.float64]:
    """Logarithms of the probabilities, (B, K), from descending similarities and labels, (B, k).

    n_voters: how many there are in fact, where similarities of minus infinity fill up.
    """
    weights = np.exp((top.astype(np.float64) - top[:, :1]) / T)
    weights /= weights.sum(axis=1, keepdims=True)
    cell = np.arange(len(top))[:, None] * n_classes + labels
    votes = np.bincount(cell.ravel(), weights=weights.ravel(), minlength=len(top) * n_classes)
    voters = np.broadcast_to(n_voters, len(top))[:, None]
    log_votes: NDArray[np.float64] = np.log(
        (voters * votes.reshape(-1, n_classes) + 1 / n_classes) / (voters + 1)
    )
    return log_votes


def _unit_rows(X: NDArray[Any]) -> NDArray[Any]:
    """The rows of X scaled to length 1, in X's precision, float32 at least; a row of zeros stays zero."""
    unit: NDArray[Any] = np.empty(X.shape, dtype=np.result_type(X.dtype, np.float32))
    step = max(CHUNK_VALUES // X.shape[1], 1)
    for start in range(0, len(X), step):
        rows = X[start : start + step].astype(np.float64)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
        unit[start : start + step] = rows / np.where(norms > 0, norms, 1.0)
    return unit
