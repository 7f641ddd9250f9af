"""Cross-validation of heads in closed form: one pass for the moments of each fold, one to score it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.heads.base import LinearHead
from featcache.heads.moments import Moments, take_moments
from featcache.heads.threads import in_threads

SCORE_VALUES = 50_000_000  # scores held at a time
CHUNK_VALUES = 4_000_000  # of rows scored at a time by one thread
FLOAT64_VALUES = 200_000  # up to this size scores are float64 products

Solve = Callable[[Moments, Sequence[LinearHead]], None]


def every_fold_knows(codes: NDArray[np.intp], fold: NDArray[np.intp], n_folds: int) -> bool:
    """Whether the training rows of every fold hold all classes."""
    n_classes = int(codes.max()) + 1
    return all(np.bincount(codes[fold != f], minlength=n_classes).all() for f in range(n_folds))


class ClosedFormSearch:
    """`PathSearch` of a linear head that `solve` fits, one for each value, from the moments of its rows."""

    def __init__(
        self,
        head: LinearHead,
        X: ArrayLike,
        y: ArrayLike,
        *,
        fold: NDArray[np.intp],
        n_folds: int,
        name: str | None,
        solve: Solve,
        cross: bool,
    ) -> None:
        self.head, self.name, self.solve = head, name, solve
        self.X, codes = head._check_training(X, y)
        self.fold, self.n_folds = fold, n_folds
        part = np.where(fold < 0, n_folds, fold)
        self.moments = take_moments(
            self.X, codes, n_classes=len(head.classes_), part=part, n_parts=n_folds + 1, cross=cross
        )

    def scores(self, values: Sequence[Any]) -> Iterator[NDArray[Any]]:
        params = [{self.name: value} if self.name else {} for value in values]
        heads = [[self._head(some) for some in params] for _ in self.folds]
        parts = np.arange(self.n_folds + 1)
        in_threads(lambda f: self.solve(self.moments.select(parts != f), heads[f]), self.folds)
        n, K = len(self.fold), len(self.head.classes_)
        group = max(SCORE_VALUES // (n * K), 1)
        for start in range(0, len(values), group):
            yield from self._score([some[start : start + group] for some in heads])

    def fit(self, params: Mapping[str, Any]) -> LinearHead:
        head = self._head(params)
        self.solve(self.moments, [head])
        return head

    @property
    def folds(self) -> range:
        return range(self.n_folds)

    def _head(self, params: Mapping[str, Any]) -> LinearHead:
        head = type(self.head)(**{**self.head.get_params(deep=False), **params})
        head.classes_, head.n_features_in_ = self.head.classes_, self.head.n_features_in_
        return head

    def _score(self, heads: Sequence[Sequence[LinearHead]]) -> NDArray[Any]:
        """Scores (V, N, K) of each row by the heads of the fold that holds it out: one wide product."""
        dtype = np.float64 if self.X.size <= FLOAT64_VALUES else np.float32
        shape = (len(heads[0]), len(self.fold), len(self.head.classes_))
        table = np.zeros(shape, dtype=dtype)
        centre = self.moments.centre
        wide = [np.concatenate([head.coef_ for head in some]) for some in heads]  # (V K, D)
        shift = [np.concatenate([head.intercept_ + head.coef_ @ centre for head in some]) for some in heads]
        step = max(CHUNK_VALUES // self.X.shape[1], 1)

        def score(start: int) -> None:
            of_fold = self.fold[start : start + step]
            for f in np.unique(of_fold[of_fold >= 0]):
                index = start + np.flatnonzero(of_fold == f)
                rows = (self.X[index].astype(np.float64) - centre).astype(dtype)
                scores = rows @ wide[f].T.astype(dtype) + shift[f].astype(dtype)  # (n, V K)
                table[:, index] = scores.reshape(len(index), shape[0], shape[2]).transpose(1, 0, 2)

        in_threads(score, range(0, len(self.fold), step))
        return table
