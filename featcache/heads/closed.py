"""Linear heads in closed form: one pass over the rows for the sums of each fold, one to score them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from featcache.heads.base import LinearHead, class_weights
from featcache.heads.device import Products, find_products
from featcache.heads.moments import take_moments
from featcache.heads.path import PathSearch
from featcache.heads.sums import ClassSums, of_moments, of_rows
from featcache.heads.threads import in_threads
from featcache.heads.widen import centre_rows

SCORE_VALUES = 50_000_000  # scores held at a time
CHUNK_VALUES = 4_000_000  # of rows scored at a time by one thread
FLOAT64_VALUES = 200_000  # up to this size scores are float64 products


class ClosedFormHead(LinearHead):
    """A linear head that is solved from `ClassSums`, for many values of one parameter at once.

    It implements `_solve` and `_check_params`. `path` names the parameters whose candidates share the sums,
    `cross` says whether it needs cross-products of the features.
    """

    path: ClassVar[frozenset[str]] = frozenset()
    cross: ClassVar[bool] = False

    def fit_path(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        candidates: Sequence[Mapping[str, Any]],
        views: Sequence[NDArray[Any]] = (),
    ) -> list[Self]:
        if any(set(values) - self.path for values in candidates):
            return super().fit_path(X, y, candidates=candidates)
        heads = [clone(self).set_params(**values) for values in candidates]
        features, codes = heads[0]._check_training(X, y)
        for head in heads:
            head.classes_, head.n_features_in_ = heads[0].classes_, heads[0].n_features_in_
            head._check_params()
        self._solve(heads[0]._sums(features, codes), heads)
        return heads

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
        if set(searched) - self.path or not every_fold_knows(codes, fold, n_folds):
            return None
        kind = MomentsSearch if head._by_moments(features) else RowsSearch
        return kind(head, features, codes, fold=fold, n_folds=n_folds)

    def _solve(self, sums: ClassSums, heads: Sequence[Self]) -> None:
        """Set `coef_` and `intercept_` of heads that differ in the parameters of `path` alone."""
        raise NotImplementedError

    def _check_params(self) -> None:
        """ValueError for a parameter that is not what it should be."""
        raise NotImplementedError

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        self._check_params()
        self._solve(self._sums(X, codes), [self])

    def _by_moments(self, X: NDArray[Any]) -> bool:
        """Whether the moments are the shorter way, not the rows on their principal axes."""
        return not self.cross or len(X) > X.shape[1]

    def _weights(self, codes: NDArray[np.intp]) -> NDArray[np.float64]:
        given = getattr(self, "class_weight", None)
        return class_weights(given, codes, n_classes=len(self.classes_), classes=self.classes_)

    def _sums(self, X: NDArray[Any], codes: NDArray[np.intp]) -> ClassSums:
        weights = self._weights(codes)
        if not self._by_moments(X):
            return of_rows(X, codes, weights=weights)
        moments = take_moments(
            X,
            codes,
            n_classes=len(weights),
            cross=self.cross,
            weights=weights,
            products=self._products(X),
        )
        return of_moments(moments)

    def _products(self, X: NDArray[Any]) -> Products:
        """Who does the products over the rows; X^T X is the largest of them."""
        return find_products(getattr(self, "device", "cpu"), operations=2.0 * X.size * X.shape[1])


def every_fold_knows(codes: NDArray[np.intp], fold: NDArray[np.intp], n_folds: int) -> bool:
    """Whether the training rows of every fold hold all classes."""
    n_classes = int(codes.max()) + 1
    return all(np.bincount(codes[fold != f], minlength=n_classes).all() for f in range(n_folds))


class _Search:
    """`PathSearch` of a head in closed form. Subclasses say where the sums of a fold come from."""

    def __init__(
        self,
        head: ClosedFormHead,
        X: NDArray[Any],
        codes: NDArray[np.intp],
        *,
        fold: NDArray[np.intp],
        n_folds: int,
    ) -> None:
        self.head, self.X, self.codes, self.fold, self.folds = head, X, codes, fold, range(n_folds)
        self.products = head._products(X)

    def scores(self, candidates: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[Any]]:
        if not candidates:
            return
        heads = [[self._head(some) for some in candidates] for _ in self.folds]
        in_threads(lambda f: self.head._solve(self._sums(f), heads[f]), self.folds)
        n, K = len(self.fold), len(self.head.classes_)
        group = max(SCORE_VALUES // (n * K), 1)
        for start in range(0, len(candidates), group):
            yield from self._score([some[start : start + group] for some in heads])

    def fit(self, params: Mapping[str, Any]) -> LinearHead:
        head = self._head(params)
        self.head._solve(self._sums(None), [head])
        return head

    def _sums(self, fold: int | None) -> ClassSums:
        """Of the rows that a fold does not hold out; None: of all rows."""
        raise NotImplementedError

    def _head(self, params: Mapping[str, Any]) -> ClosedFormHead:
        head = type(self.head)(**{**self.head.get_params(deep=False), **params})
        head._check_params()
        head.classes_, head.n_features_in_ = self.head.classes_, self.head.n_features_in_
        return head

    def _score(self, heads: Sequence[Sequence[LinearHead]]) -> NDArray[Any]:
        """Scores (V, N, K) of each row by the heads of the fold that holds it out: one wide product."""
        dtype = np.float64 if self.X.size <= FLOAT64_VALUES else np.float32
        shape = (len(heads[0]), len(self.fold), len(self.head.classes_))
        table = np.zeros(shape, dtype=dtype)
        centre = self.X[: max(CHUNK_VALUES // self.X.shape[1], 1)].mean(axis=0, dtype=np.float64)
        narrow = np.float64 if self.X.dtype == np.float64 else dtype
        near = centre.astype(narrow)
        centre = near.astype(np.float64)
        wide, shift = [], []  # of each fold, (V K, D) and (V K,)
        for some in heads:
            wide.append(np.concatenate([head.coef_.astype(dtype) for head in some]))
            shift.append(np.concatenate([head.intercept_ + head.coef_ @ centre for head in some]))
        step = max(CHUNK_VALUES // self.X.shape[1], 1)

        def score(start: int) -> None:
            of_fold = self.fold[start : start + step]
            for f in np.unique(of_fold[of_fold >= 0]):
                index = start + np.flatnonzero(of_fold == f)
                rows = np.empty((len(index), self.X.shape[1]), dtype=dtype)
                centre_rows(self.X[index], near, out=rows)
                scores = self.products.scores(rows, wide[f], shift[f])  # (n, V K)
                table[:, index] = scores.reshape(len(index), shape[0], shape[2]).transpose(1, 0, 2)

        in_threads(score, range(0, len(self.fold), step))
        return table


class MomentsSearch(_Search):
    """The moments of each fold, from one pass. Balanced weights are those of all rows that were given."""

    def __init__(
        self,
        head: ClosedFormHead,
        X: NDArray[Any],
        codes: NDArray[np.intp],
        *,
        fold: NDArray[np.intp],
        n_folds: int,
    ) -> None:
        super().__init__(head, X, codes, fold=fold, n_folds=n_folds)
        weights = head._weights(codes)
        part = np.where(fold < 0, n_folds, fold)
        self.moments = take_moments(
            X,
            codes,
            n_classes=len(weights),
            part=part,
            n_parts=n_folds + 1,
            cross=head.cross,
            weights=weights,
            products=self.products,
        )

    def _sums(self, fold: int | None) -> ClassSums:
        if fold is None:
            return of_moments(self.moments)
        return of_moments(self.moments.select(np.arange(len(self.folds) + 1) != fold))


class RowsSearch(_Search):
    """Each fold's rows on principal axes of their own."""

    def _sums(self, fold: int | None) -> ClassSums:
        rows = slice(None) if fold is None else self.fold != fold
        return self.head._sums(self.X[rows], self.codes[rows])
