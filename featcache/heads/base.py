"""What all heads share: scikit-learn's contract over `column_scores`, one column of scores a class.

Knows nothing of images, files or stores: arrays in, labels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from featcache.heads.path import PathSearch

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn 1.5 has it as a method

    def validate_data(estimator: Any, X: ArrayLike, **options: Any) -> Any:
        return estimator._validate_data(X, **options)


CHUNK_VALUES = 4_000_000  # values converted to float64 at a time: 32 MB
FLOATS = (np.float64, np.float32, np.float16)  # kept as they come; anything else becomes float64


class Head(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A classifier on feature vectors.

    A head implements `_fit`, `column_scores`, `to_arrays` and `from_arrays`. Probabilities are
    softmax(scores / temperature), where `temperature` is 1 unless the head has a parameter of that name.
    """

    classes_: NDArray[Any]
    n_features_in_: int

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on X, array-like of shape (n_samples, n_features), and its labels y, (n_samples,)."""
        rows, codes = self._check_training(X, y)
        self._fit(rows, codes)
        return self

    def fit_path(self, X: ArrayLike, y: ArrayLike, *, name: str, values: Sequence[Any]) -> list[Self]:
        """One fitted copy of this head for every value of the parameter `name`, in the order given.

        Heads that can share work between the values override this.
        """
        return [clone(self).set_params(**{name: value}).fit(X, y) for value in values]

    def start_search(
        self, X: ArrayLike, y: ArrayLike, *, fold: NDArray[np.intp], n_folds: int, name: str | None
    ) -> PathSearch | None:
        """Cross-validation that shares work between folds and values, or None, and then `fit_path` is used.

        fold: (n_samples,), the fold that holds a row out, below 0 for rows that are always fitted on. name:
        the parameter whose values will be asked for, None for a head fitted as it is.
        """
        return None

    def column_scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        """Scores of shape (n_samples, n_classes), not yet divided by the temperature."""
        raise NotImplementedError

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Scores, (n_samples, n_classes); for two classes the second's minus the first's, (n_samples,)."""
        scores = self.column_scores(self._check_input(X))
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable class of each row, ndarray of shape (n_samples,)."""
        scores = self.column_scores(self._check_input(X))
        labels: NDArray[Any] = self.classes_[scores.argmax(axis=1)]
        return labels

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities, ndarray of shape (n_samples, n_classes); rows sum to 1."""
        scores = self.column_scores(self._check_input(X))
        probabilities: NDArray[np.float64] = softmax(scores / getattr(self, "temperature", 1.0), axis=1)
        return probabilities

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The fitted head as named arrays and a JSON-able rest, for `from_arrays`."""
        raise NotImplementedError

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], rest: Mapping[str, Any], *, params: Mapping[str, Any]
    ) -> Self:
        """The head `to_arrays` was called on; its classes are 0 … n_classes - 1."""
        raise NotImplementedError

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the last fit; empty when all went well."""
        return ()

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        """Learn from X, (n_samples, n_features), and codes, (n_samples,) indices into `classes_`."""
        raise NotImplementedError

    def _check_training(self, X: ArrayLike, y: ArrayLike) -> tuple[NDArray[Any], NDArray[np.intp]]:
        checked: tuple[NDArray[Any], NDArray[Any]] = validate_data(self, X, y=y, dtype=FLOATS)
        check_classification_targets(checked[1])
        self.classes_, codes = np.unique(checked[1], return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs at least two classes, the labels hold one class")
        return checked[0], codes

    def _check_input(self, X: ArrayLike) -> NDArray[Any]:
        check_is_fitted(self, "classes_")
        checked: NDArray[Any] = validate_data(self, X, dtype=FLOATS, reset=False)
        return checked

    def _restore(self, *, n_classes: int, n_features: int) -> None:
        """Set what `fit` would have learned of the shape of the data."""
        self.classes_ = np.arange(n_classes)
        self.n_features_in_ = n_features


class LinearHead(Head):
    """Heads whose scores are X @ coef_.T + intercept_, on raw features whatever they were fitted on.

    coef_: ndarray of shape (n_classes, n_features), also for two classes.
    intercept_: ndarray of shape (n_classes,).
    """

    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]

    def column_scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        scores = np.empty((len(X), len(self.coef_)))
        step = max(CHUNK_VALUES // max(X.shape[1], 1), 1)
        for start in range(0, len(X), step):
            rows = X[start : start + step].astype(np.float64)
            scores[start : start + step] = rows @ self.coef_.T + self.intercept_
        return scores

    def as_linear(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """W of shape (n_classes, n_features) and b such that `predict_proba` is softmax(X @ W.T + b)."""
        temperature = getattr(self, "temperature", 1.0)
        return self.coef_ / temperature, self.intercept_ / temperature

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        return {"coef": self.coef_, "intercept": self.intercept_}, {}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], rest: Mapping[str, Any], *, params: Mapping[str, Any]
    ) -> Self:
        head = cls(**params)
        head.coef_, head.intercept_ = arrays["coef"], arrays["intercept"]
        head._restore(n_classes=head.coef_.shape[0], n_features=head.coef_.shape[1])
        return head


def require_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """ValueError unless `value` is a finite number above 0 (or 0 itself where `zero` allows it)."""
    wanted = "a number of at least 0" if zero else "a number above 0"
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not np.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} is {wanted}, not {value!r}")


def require_count(name: str, value: Any, *, least: int = 1) -> None:
    """ValueError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}, not {value!r}")
