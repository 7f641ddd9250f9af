"""The competition of heads as a scikit-learn classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.evaluate.compete import Competition, compete
from featcache.evaluate.select import TrainingRows
from featcache.evaluate.splits import make_folds
from featcache.heads import HeadKind, build_head
from featcache.heads.base import Head, class_weights


class AutoHead(Head):
    """The head that a competition on the training rows chooses, fitted on all of them.

    Parameters
    ----------
    budget : seconds of the competition.
    class_weight : "balanced" counts every class alike, None every row.
    seed : of the folds, and of heads that draw.

    Attributes: head_ (the fitted head, whose classes are 0 … n_classes - 1), head_name_ (str), params_ (dict)
    and competition_ (`Competition`).
    """

    head_: Head
    head_name_: str
    params_: Mapping[str, Any]
    competition_: Competition

    def __init__(self, *, budget: float = 60.0, class_weight: str | None = None, seed: int = 0) -> None:
        self.budget = budget
        self.class_weight = class_weight
        self.seed = seed

    def column_scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        return self.head_.column_scores(X)

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        checked = self._check_input(X)
        return self.head_.predict_proba(checked)

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        weights = None
        if self.class_weight is not None:
            weights = class_weights(self.class_weight, codes, n_classes=len(self.classes_))[codes]
        folds = make_folds(_digests(X), codes, seed=self.seed)
        self.competition_, self.head_name_, selection = compete(
            TrainingRows(X=X, y=codes, folds=folds, weights=weights),
            params_of=self._given,
            why_not=lambda kind: None,
            budget=self.budget,
            seed=self.seed,
        )
        self.params_ = selection.params
        if selection.refit:
            self.head_ = selection.refit(selection.params)
        else:
            self.head_ = build_head(self.head_name_, selection.params, seed=self.seed).fit(X, codes)

    def _given(self, kind: HeadKind) -> dict[str, Any]:
        return {"class_weight": self.class_weight} if self.class_weight and kind.weighted else {}


def _digests(X: NDArray[Any]) -> NDArray[np.uint8]:
    """The sha256 of each row, (n_samples, 32): equal rows are on one side of a fold."""
    found = b"".join(hashlib.sha256(row.tobytes()).digest() for row in np.ascontiguousarray(X))
    return np.frombuffer(found, dtype=np.uint8).reshape(-1, 32)
