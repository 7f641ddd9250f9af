"""Any scikit-learn classifier by its class name, saved without pickle through skops."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import clone
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from featcache.errors import HeadError, ModelError
from featcache.heads.archive import check_archive
from featcache.heads.base import Head, require_positive
from featcache.heads.contents import check_contents
from featcache.heads.parameters import did_you_mean, require_known

# What a model file may hold beside the types skops trusts by itself: the trees, whose indices `contents`
# checks, the training state of the perceptron and the parts of a calibrated classifier.
TRUSTED = frozenset(
    {
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.calibration._TemperatureScaling",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.tree._tree.Tree",
    }
)
LEAST_PROBABILITY = 1e-15  # smaller ones count as this, so that their logarithms are finite
FAR = 10.0  # standard deviations of every feature at once: further than images lie
# Classifiers of what standardised features are not, and what that is.
FOREIGN = {"CategoricalNB": "categories", "ComplementNB": "counts", "MultinomialNB": "counts"}
SUCH_AS = "such as SVC, GaussianNB or RandomForestClassifier"


class EstimatorHead(Head):
    """A scikit-learn classifier behind a StandardScaler, with the parameters the user gave it.

    Parameters
    ----------
    estimator : class name of the classifier.
    params : its parameters; others keep scikit-learn's defaults.
    seed : its random_state, where it has one and `params` does not set it.
    temperature : what the logarithms of its probabilities are divided by before the softmax.
    """

    pipeline_: Pipeline
    warnings_: tuple[str, ...]

    def __init__(
        self,
        estimator: str = "LinearDiscriminantAnalysis",
        *,
        params: Mapping[str, Any] | None = None,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> None:
        self.estimator = estimator
        self.params = params
        self.seed = seed
        self.temperature = temperature

    def _probabilities(self, X: NDArray[Any]) -> NDArray[np.float64]:
        """The estimator's probabilities, or the softmax of its scores where it has none.

        An estimator with neither gets 0.99 for its label and an even share of the rest for the others.
        """
        pipeline, n_classes, X = self.pipeline_, len(self.classes_), _wide_enough(X)
        if hasattr(pipeline, "predict_proba"):
            return np.asarray(pipeline.predict_proba(X), dtype=np.float64)
        if hasattr(pipeline, "decision_function"):
            scores = np.asarray(pipeline.decision_function(X), dtype=np.float64)
            if scores.ndim == 1:
                scores = np.stack([np.zeros_like(scores), scores], axis=1)
            if scores.shape[1] == n_classes:
                probabilities: NDArray[np.float64] = softmax(scores, axis=1)
                return probabilities
        said = pipeline.predict(X)[:, None] == np.arange(n_classes)
        return np.where(said, 0.99, 0.01 / (n_classes - 1))

    def column_scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        with _quietly():
            return np.log(np.maximum(self._probabilities(X), LEAST_PROBABILITY))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """What the estimator itself predicts."""
        X = self._check_input(X)
        with _quietly():
            labels: NDArray[Any] = self.classes_[self.pipeline_.predict(_wide_enough(X))]
        return labels

    def require_savable(self) -> None:
        """By fitting it on a few rows of chance: what an estimator holds, it holds once fitted.

        Of one that cannot be fitted on these nothing is said: that is for the real rows to say.
        """
        y = np.arange(48) % 2
        X = np.random.default_rng(0).normal(size=(48, 16)) + y[:, None]
        head = clone(self)
        try:
            head.fit(X, y)
        except ValueError:
            return
        head.to_arrays()
        if not head._answers(np.full((1, 16), FAR)):
            raise HeadError(
                f"sklearn:{self.estimator} has no answer for images far from those it was fitted on. Set "
                "other parameters with --param, or choose another head; featcache fit --help lists them."
            )

    def _answers(self, X: NDArray[Any]) -> bool:
        try:
            return bool(np.isfinite(self.predict_proba(X)).all())
        except ValueError:
            return False

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        with _torch_left_alone():
            from skops.io import dumps, get_untrusted_types

            data = dumps(self.pipeline_)
            unknown = sorted(set(get_untrusted_types(data=data)) - TRUSTED)
        if unknown:
            raise HeadError(
                f"sklearn:{self.estimator} holds {unknown[0]}, which a model file may not contain. "
                "Choose another head; featcache fit --help lists them."
            )
        return {"skops": np.frombuffer(data, dtype=np.uint8)}, {
            "n_classes": len(self.classes_),
            "n_features": self.n_features_in_,
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], rest: Mapping[str, Any], *, params: Mapping[str, Any]
    ) -> Self:
        head = cls(**params)
        head.pipeline_ = _load_pipeline(arrays["skops"].tobytes(), n_features=rest["n_features"])
        head._restore(n_classes=rest["n_classes"], n_features=rest["n_features"])
        if not np.array_equal(head.pipeline_.classes_, head.classes_):
            raise ModelError("the scikit-learn estimator of this model has other classes than the model")
        return head

    @property
    def notes(self) -> tuple[str, ...]:
        return getattr(self, "warnings_", ())

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        require_positive("temperature", self.temperature)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipeline = make_pipeline(StandardScaler(), self._build())
            try:
                self.pipeline_ = pipeline.fit(_wide_enough(X), codes)
            except (TypeError, ValueError) as error:
                if getattr(pipeline[-1], "estimator", "") is None and "'estimator' parameter" in str(error):
                    raise self._needs_another() from error
                raise ValueError(str(error)) from error  # a TypeError of a value, as some estimators have it
        _require_neighbors(pipeline[-1])
        said = dict.fromkeys(f"{w.category.__name__}: {_first_line(w.message)}" for w in caught)
        self.warnings_ = tuple(said)

    def _build(self) -> Any:
        given = dict(self.params or {})
        kind = _find_classifier(self.estimator)
        try:
            defaults = kind().get_params()
        except TypeError as error:
            raise self._needs_another() from error
        require_known(given, defaults, what=f"sklearn:{self.estimator}")
        if "random_state" in defaults and "random_state" not in given:
            given["random_state"] = self.seed
        if defaults.get("algorithm") == "auto":
            # Of few features scikit-learn makes a tree of neighbours, which a model file may not hold.
            given.setdefault("algorithm", "brute")
        return kind(**given)

    def _needs_another(self) -> HeadError:
        return HeadError(
            f"sklearn:{self.estimator} needs another estimator as its parameter, which a command line "
            "cannot give. Choose another classifier."
        )


def _find_classifier(name: str) -> Any:
    """scikit-learn's classifier of this class name; HeadError naming the nearest, or what suits features."""
    with _torch_left_alone():
        from sklearn.utils import all_estimators

        known = dict(all_estimators(type_filter="classifier"))
    if not name:
        raise HeadError(f"sklearn: is followed by the name of a classifier of scikit-learn, {SUCH_AS}.")
    if name not in known:
        hint = did_you_mean(name, known) or f"Name one by its class, {SUCH_AS}."
        raise HeadError(f"scikit-learn has no classifier {name!r}. {hint}")
    if name in FOREIGN:
        raise HeadError(
            f"sklearn:{name} takes {FOREIGN[name]}, and features are numbers of either sign. Choose "
            "sklearn:GaussianNB, or another head; featcache fit --help lists them."
        )
    return known[name]


def _require_neighbors(estimator: Any) -> None:
    """ValueError where a fitted estimator asks for more neighbours than it has rows, and cannot answer."""
    wanted, there = getattr(estimator, "n_neighbors", None), getattr(estimator, "n_samples_fit_", None)
    if wanted is not None and there is not None and wanted > there:
        raise ValueError(
            f"n_neighbors is {wanted}, more than the {there} rows it is fitted on, which in cross-validation "
            "are those of all folds but one. Pass a lower one."
        )


def _wide_enough(X: NDArray[Any]) -> NDArray[Any]:
    """float16 becomes float32, which is the least scikit-learn's estimators compute in."""
    return X.astype(np.float32) if X.dtype == np.float16 else X


def _first_line(message: Warning | str) -> str:
    return str(message).strip().splitlines()[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what scikit-learn warns of after a fit: answers that are not finite are refused later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _torch_left_alone() -> Iterator[None]:
    """Keep scikit-learn's list of estimators from importing torch.

    The list is made by importing every module of scikit-learn, among them a layer for torch arrays, and
    skops makes it when it is imported. A None in `sys.modules` is Python's own way to say "not there".
    """
    layer = "sklearn.externals.array_api_compat.torch"
    if "torch" in sys.modules or layer in sys.modules:
        yield
        return
    sys.modules[layer] = None  # type: ignore[assignment]  # what the import system looks for
    try:
        yield
    finally:
        del sys.modules[layer]


def _load_pipeline(data: bytes, *, n_features: int) -> Any:
    """The pipeline in `data`; ModelError naming the first type that is neither skops' nor ours."""
    with _torch_left_alone(), _quietly():
        from skops.io import get_untrusted_types, loads

        check_archive(data)
        unknown = set(get_untrusted_types(data=data))
        if unknown - TRUSTED:
            raise ModelError(
                f"this model holds {min(unknown - TRUSTED)}, a type that featcache does not load. "
                "Fit the model again with this version."
            )
        pipeline = loads(data, trusted=sorted(unknown))
    if not isinstance(pipeline, Pipeline) or pipeline.n_features_in_ != n_features:
        raise ModelError("the scikit-learn estimator of this model does not fit its features")
    check_contents(pipeline, n_features=n_features)
    return pipeline
