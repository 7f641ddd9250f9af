"""What all heads share: scikit-learn's contract over `column_scores`, one column of scores a class.

Knows nothing of images, files or stores: arrays in, labels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted

from featcache.heads.path import PathSearch
from featcache.heads.widen import finite

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn 1.5 has it as a method

    def validate_data(estimator: Any, X: ArrayLike, **options: Any) -> Any:
        return estimator._validate_data(X, **options)


CHUNK_VALUES = 4_000_000  # values converted to float64 at a time: 32 MB
FLOATS = (np.float64, np.float32, np.float16)  # kept as they come; anything else becomes float64


_FINITE = next(
    name for name in ("ensure_all_finite", "force_all_finite") if name in signature(check_array).parameters
)


class Head(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A classifier on feature vectors.

    A head implements `_fit`, `column_scores`, `to_arrays` and `from_arrays`. Probabilities are
    softmax(scores / temperature); every head has the parameter `temperature`, and fits without it.
    """

    temperature: float
    classes_: NDArray[Any]
    n_features_in_: int

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit on X, array-like of shape (n_samples, n_features), and its labels y, (n_samples,)."""
        rows, codes = self._check_training(X, y)
        self._fit(rows, codes)
        return self

    def fit_path(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        candidates: Sequence[Mapping[str, Any]],
        views: Sequence[NDArray[Any]] = (),
    ) -> list[Self]:
        """One fitted copy of this head for every candidate, values of parameters by name, in the order given.

        Heads that can share work between the candidates override this. views: augmented feature vectors
        of the rows of X, each of its shape, for heads whose `fit` takes them.
        """
        more = {"views": views} if views else {}
        return [clone(self).set_params(**values).fit(X, y, **more) for values in candidates]

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
        """Cross-validation that shares work between folds and candidates; None: `fit_path` is used instead.

        fold: (n_samples,), the fold that holds a row out, below 0 for rows that are always fitted on.
        searched: the parameters that candidates will name; none for a head that is fitted as it is.
        views: as `fit_path` has them; rows held out are scored on X alone.
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
        probabilities: NDArray[np.float64] = softmax(scores / self.temperature, axis=1)
        return probabilities

    def shift_scores(self, offsets: NDArray[np.float64]) -> None:
        """Move the log-odds of the probabilities by offsets, (n_classes,), for all rows alike.

        ValueError: this head has no intercept that could take them.
        """
        raise ValueError("its scores have no intercept that could be moved")

    def require_savable(self) -> None:
        """HeadError where a model file may not hold such a head; called before it is fitted."""

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
        checked: tuple[NDArray[Any], NDArray[Any]] = validate_data(
            self, X, y=y, dtype=FLOATS, **_finiteness(X)
        )
        self.classes_, codes = np.unique(checked[1], return_inverse=True)
        # Each class twice: of many classes with few rows scikit-learn warns that they may be a regression.
        check_classification_targets(np.repeat(self.classes_, 2))
        if len(self.classes_) < 2:
            raise ValueError(f"{type(self).__name__} needs at least two classes, the labels hold one class")
        return checked[0], codes

    def _check_input(self, X: ArrayLike) -> NDArray[Any]:
        check_is_fitted(self, "classes_")
        checked: NDArray[Any] = validate_data(self, X, dtype=FLOATS, reset=False, **_finiteness(X))
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
        return self.coef_ / self.temperature, self.intercept_ / self.temperature

    def shift_scores(self, offsets: NDArray[np.float64]) -> None:
        self.intercept_ = self.intercept_ + offsets * self.temperature

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


def class_weights(
    class_weight: str | Mapping[Any, float] | None,
    codes: NDArray[np.intp],
    *,
    n_classes: int,
    classes: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """The weight of the rows of each class, (n_classes,): 1, or "balanced", n / (K n_k), or those given.

    codes: (n_samples,), of the rows that are fitted on. classes: the labels that a mapping names, by code;
    None: the codes themselves. ValueError for any other `class_weight`.
    """
    if class_weight is None:
        return np.ones(n_classes)
    if isinstance(class_weight, Mapping):
        labels = range(n_classes) if classes is None else classes.tolist()
        given = np.array([class_weight.get(label, 1.0) for label in labels], dtype=np.float64)
        if not np.all(np.isfinite(given) & (given > 0)):
            raise ValueError(f"the weights of classes are numbers above 0, not {dict(class_weight)!r}")
        return given
    if class_weight != "balanced":
        raise ValueError(f"class_weight is 'balanced', a weight for each class or None, not {class_weight!r}")
    counts = np.bincount(codes, minlength=n_classes)
    return len(codes) / (n_classes * np.maximum(counts, 1))


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


def all_finite(X: NDArray[Any]) -> bool:
    """Whether no value of X, (n_samples, n_features), is infinite or NaN, looking at some rows at a time."""
    step = max(CHUNK_VALUES // max(X.shape[1], 1), 1)
    return all(finite(X[start : start + step]) for start in range(0, len(X), step))


def _finiteness(X: ArrayLike) -> dict[str, bool]:
    """Spares scikit-learn its check of rows that are finite.

    Of float16 it takes a byte a value, all at once; of large float32 it warns that their sum overflows.
    """
    if not isinstance(X, np.ndarray) or X.ndim != 2 or X.dtype not in FLOATS or not X.size:
        return {}
    return {_FINITE: False} if all_finite(X) else {}
