"""What heads trained by minibatches share: one fit, a path of candidates or a whole search in one run.

Knows arrays only. torch is imported when a training starts, so that a fitted head predicts without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone

from featcache.heads.base import Head, all_finite, class_weights, require_count, require_positive
from featcache.heads.batches import Walk
from featcache.heads.closed import every_fold_knows
from featcache.heads.minibatch import Network, Part, Recipe, Rows, Stack, divide, pick_device, side_by_side
from featcache.heads.moments import Moments, take_moments
from featcache.heads.path import PathSearch
from featcache.heads.standardize import Standardizer

DIFFERING = frozenset({"lr", "weight_decay"})  # the parameters in which the networks of a run may differ
STACK_VALUES = 20_000_000  # weights trained side by side: 320 MB with their gradients and moments


class TrainedHead(Head):
    """A head whose network is trained by minibatches of AdamW on standardised features, cross-entropy.

    A step is taken for every 256 rows, whatever `batch_size`, so that the batch size decides memory and not
    the result, and the learning rate needs no scaling with it. It rises for a twentieth of the steps, then
    falls to 0 as a cosine: there is nothing to stop early for. A generator of its own draws the rows, so
    that the seed decides everything and the global generators of torch and numpy are not touched.

    A head of this kind has the parameters below and implements `_network` and `_take`.
    """

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    label_smoothing: float
    mixup: float
    class_weight: str | Mapping[Any, float] | None
    seed: int
    device: str

    def fit(self, X: ArrayLike, y: ArrayLike, *, views: Sequence[NDArray[Any]] = ()) -> Self:
        """Fit on X, array-like of shape (n_samples, n_features), and its labels y, (n_samples,).

        views: augmented vectors of the same rows, each of the shape of X; every row of every epoch is drawn
        from X and these.
        """
        (head,) = self._fit_all(X, y, [self], views)
        return head

    def fit_path(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        candidates: Sequence[Mapping[str, Any]],
        views: Sequence[NDArray[Any]] = (),
    ) -> list[Self]:
        if any(set(values) - DIFFERING for values in candidates):
            return super().fit_path(X, y, candidates=candidates, views=views)
        return self._fit_all(X, y, [clone(self).set_params(**values) for values in candidates], views)

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
        if set(searched) - DIFFERING or not every_fold_knows(codes, fold, n_folds):
            return None
        return _TrainedSearch(head, Trainings(features, codes, views, fold=fold, n_folds=n_folds))

    def _network(self) -> Network:
        """The shape of what is trained."""
        raise NotImplementedError

    def _take(self, tensors: Sequence[NDArray[np.float64]], standardizer: Standardizer) -> None:
        """Keep a trained network, as it acts on raw features."""
        raise NotImplementedError

    def _fit_all(
        self, X: ArrayLike, y: ArrayLike, heads: Sequence[Self], views: Sequence[NDArray[Any]]
    ) -> list[Self]:
        features, codes = self._check_training(X, y)
        for head in heads:
            head.classes_, head.n_features_in_ = self.classes_, self.n_features_in_
        Trainings(features, codes, views).fit(heads)
        return list(heads)

    def _check_params(self) -> None:
        require_positive("lr", self.lr)
        require_positive("weight_decay", self.weight_decay, zero=True)
        require_positive("mixup", self.mixup, zero=True)
        require_positive("temperature", self.temperature)
        require_share("label_smoothing", self.label_smoothing)
        require_count("epochs", self.epochs)
        require_count("batch_size", self.batch_size)
        require_count("seed", self.seed, least=0)


class Trainings:
    """Rows to train on: all of them, or for each fold those that it does not hold out.

    fold: (n_samples,), the fold that holds a row out, below 0 for none. Networks of a run may differ in
    `DIFFERING` alone; what else there is to know comes from the first of the heads.
    """

    def __init__(
        self,
        X: NDArray[Any],
        codes: NDArray[np.intp],
        views: Sequence[NDArray[Any]],
        *,
        fold: NDArray[np.intp] | None = None,
        n_folds: int = 0,
    ) -> None:
        self.arrays = [X, *(_check_view(view, X) for view in views)]
        self.codes, self.n_classes = codes, int(codes.max()) + 1
        self.fold = np.full(len(X), -1) if fold is None else fold
        self.n_folds = n_folds
        part = np.where(self.fold < 0, n_folds, self.fold)
        self.moments = take_moments(X, codes, n_classes=self.n_classes, part=part, n_parts=n_folds + 1)

    def fit(self, heads: Sequence[TrainedHead]) -> None:
        """Train on all rows."""

        def keep(stack: Stack, part: Part) -> None:
            for place, c in enumerate(part.candidates):
                heads[c]._take(stack.arrays(0, place), self.moments.standardizer())

        self._train(heads, [np.arange(len(self.codes))], [self.moments], keep)

    def scores(self, heads: Sequence[TrainedHead]) -> NDArray[np.float32]:
        """(C, N, K), of every row that a fold holds out by networks trained without that fold."""
        table = np.zeros((len(heads), len(self.codes), self.n_classes), dtype=np.float32)

        def score(stack: Stack, part: Part) -> None:
            for place, f in enumerate(part.sets):
                held = np.flatnonzero(self.fold == f)
                some = slice(part.candidates.start, part.candidates.stop)
                table[some, held] = stack.scores(place, held)

        parts = np.arange(self.n_folds + 1)
        rows = [np.flatnonzero(self.fold != f) for f in range(self.n_folds)]
        self._train(heads, rows, [self.moments.select(parts != f) for f in range(self.n_folds)], score)
        return table

    def _train(
        self,
        heads: Sequence[TrainedHead],
        rows: Sequence[NDArray[np.intp]],
        moments: Sequence[Moments],
        use: Callable[[Stack, Part], None],
    ) -> None:
        """Train every head on every set of rows, and give the trained stacks to `use`, part by part."""
        for head in heads:
            head._check_params()
        first, device = heads[0], pick_device(heads[0].device)
        standardizers = [some.standardizer() for some in moments]
        network = first._network()

        def train(part: Part, stop: Event) -> None:
            own = [rows[f] for f in part.sets]
            weights = [
                class_weights(
                    first.class_weight,
                    self.codes[index],
                    n_classes=self.n_classes,
                    classes=first.classes_,
                )
                for index in own
            ]
            stack = Stack(
                network,
                Rows(self.arrays, [standardizers[f] for f in part.sets], device),
                self.codes,
                class_weights=np.stack(weights),
                counts=np.stack([moments[f].counts.sum(axis=0) for f in part.sets]),
                recipe=_recipe([heads[c] for c in part.candidates]),
            )
            stack.train(
                Walk(
                    parts=own,
                    epochs=first.epochs,
                    seed=first.seed,
                    n_views=len(self.arrays),
                    mixup=first.mixup,
                ),
                stop,
            )
            if not stop.is_set():
                use(stack, part)

        side_by_side(train, divide(len(rows), len(heads), device))


class _TrainedSearch:
    """`PathSearch`: folds and candidates are trained side by side, as many as memory allows."""

    def __init__(self, head: TrainedHead, trainings: Trainings) -> None:
        self.head, self.trainings = head, trainings

    def scores(self, candidates: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[Any]]:
        heads = [self._head(values) for values in candidates]
        d, k = self.head.n_features_in_, len(self.head.classes_)
        size = self.head._network().size(d, k) * self.trainings.n_folds
        group = max(STACK_VALUES // size, 1)
        for start in range(0, len(heads), group):
            yield from self.trainings.scores(heads[start : start + group])

    def fit(self, params: Mapping[str, Any]) -> TrainedHead:
        head = self._head(params)
        self.trainings.fit([head])
        return head

    def _head(self, params: Mapping[str, Any]) -> TrainedHead:
        head: TrainedHead = clone(self.head).set_params(**params)
        head.classes_, head.n_features_in_ = self.head.classes_, self.head.n_features_in_
        return head


def _recipe(heads: Sequence[TrainedHead]) -> Recipe:
    return Recipe(
        lr=np.array([head.lr for head in heads], dtype=np.float64),
        weight_decay=np.array([head.weight_decay for head in heads], dtype=np.float64),
        batch_size=heads[0].batch_size,
        label_smoothing=heads[0].label_smoothing,
        seed=heads[0].seed,
    )


def require_share(name: str, value: Any) -> None:
    """ValueError unless `value` is a number of at least 0 and below 1."""
    require_positive(name, value, zero=True)
    if value >= 1:
        raise ValueError(f"{name} is a number below 1, not {value!r}")


def _check_view(view: NDArray[Any], X: NDArray[Any]) -> NDArray[Any]:
    if view.shape != X.shape:
        raise ValueError(f"a view has shape {view.shape}, but the rows it shows have {X.shape}")
    if not all_finite(view):
        raise ValueError("a view holds values that are not finite; embed its images again")
    return view
