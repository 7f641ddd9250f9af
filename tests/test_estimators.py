"""scikit-learn's classifiers as heads: each is fitted, saved and read again, or refused in one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from gaussians import gaussian_features, write_store
from sklearn.utils import all_estimators
from sklearn.utils.fixes import parse_version

from featcache import fit
from featcache.errors import HeadError, ModelError
from featcache.heads.contents import check_contents, check_predictor, check_tree
from featcache.heads.estimators import EstimatorHead
from featcache.model import Model
from featcache.store.reader import FeatureStore

NAMES = [name for name, _ in all_estimators(type_filter="classifier")]
QUICK: dict[str, dict[str, Any]] = {
    "AdaBoostClassifier": {"n_estimators": 5},
    "BaggingClassifier": {"n_estimators": 3},
    "CalibratedClassifierCV": {"cv": 2},
    "ExtraTreesClassifier": {"n_estimators": 5},
    "GradientBoostingClassifier": {"n_estimators": 3},
    "HistGradientBoostingClassifier": {"max_iter": 2, "min_samples_leaf": 3},
    "LogisticRegressionCV": {"Cs": 2, "cv": 2},
    "MLPClassifier": {"max_iter": 100},
    "RandomForestClassifier": {"n_estimators": 5},
}
REFUSED = {
    "takes counts": ["ComplementNB", "MultinomialNB"],
    "takes categories": ["CategoricalNB"],
    "no answer for images far": ["LabelPropagation", "LabelSpreading", "RadiusNeighborsClassifier"],
    "holds .*, which a model file may not contain": ["GaussianProcessClassifier"],
    "needs another estimator": [
        "ClassifierChain",
        "FixedThresholdClassifier",
        "MultiOutputClassifier",
        "OneVsOneClassifier",
        "OneVsRestClassifier",
        "OutputCodeClassifier",
        "SelfTrainingClassifier",
        "StackingClassifier",
        "TunedThresholdClassifierCV",
        "VotingClassifier",
    ],
}
# SelfTrainingClassifier counts as a classifier from scikit-learn 1.6 on.
WHY = {name: words for words, names in REFUSED.items() for name in names if name in NAMES}
NOT_BEFORE_1_8 = pytest.mark.skipif(
    parse_version(sklearn.__version__) < parse_version("1.8"), reason="has no temperature"
)


def fitted(name: str, **params: Any) -> Any:
    """The pipeline of a head, fitted on rows of three classes."""
    features = gaussian_features({"train": 60}, gap=1)
    return EstimatorHead(name, params=params or QUICK.get(name)).fit(features.X, features.y).pipeline_


@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_is_saved_and_read_again_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    features = gaussian_features({"train": 36, "test": 24}, gap=2)
    path = write_store(tmp_path / "s.h5", features)
    options: dict[str, Any] = {"head": f"sklearn:{name}", "params": QUICK.get(name), "curve": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what scikit-learn warns of is a note of the report
        if name in WHY:
            with pytest.raises(HeadError, match=WHY[name]) as caught:
                fit(path, **options)
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "s.model").exists()
            return
        result = fit(path, **options)
        said = Model.load(tmp_path / "s.model").predict_proba(features.X)
    held_out = features.splits == "test"
    guessed = said[held_out].argmax(axis=1) == features.y[held_out]
    assert result.metrics.accuracy == guessed.mean()
    assert result.metrics.accuracy > (0.5 if name != "DummyClassifier" else 0.3)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("KNeighborsClassifier", {}),
        ("HistGradientBoostingClassifier", {"max_iter": 2}),
        pytest.param("CalibratedClassifierCV", {"method": "temperature"}, marks=NOT_BEFORE_1_8),
        ("CalibratedClassifierCV", {"method": "isotonic"}),
        ("LabelSpreading", {"kernel": "knn"}),
        ("LabelPropagation", {"gamma": 0.01}),
        ("RadiusNeighborsClassifier", {"radius": 100.0}),
        ("SVC", {"kernel": "poly"}),
        ("NuSVC", {}),
        ("BaggingClassifier", {"max_features": 0.5, "n_estimators": 3}),
    ],
)
@pytest.mark.parametrize("k", [2, 3])
def test_what_an_estimator_says_is_the_same_once_it_was_saved(name: str, params: Any, k: int) -> None:
    features = gaussian_features({"train": 60}, k=k, d=20, gap=1.5)
    head = EstimatorHead(name, params=params)
    head.require_savable()
    arrays, rest = head.fit(features.X, features.y).to_arrays()
    again = EstimatorHead.from_arrays(arrays, rest, params=head.get_params(deep=False))
    np.testing.assert_array_equal(again.predict_proba(features.X), head.predict_proba(features.X))
    np.testing.assert_array_equal(again.predict(features.X), head.predict(features.X))


@pytest.mark.parametrize("name", WHY)
def test_what_could_not_be_used_is_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureStore, "open", lambda *_, **__: pytest.fail("the store was opened"))
    with pytest.raises(HeadError, match=WHY[name]):
        fit(tmp_path / "s.h5", head=f"sklearn:{name}")


@pytest.mark.parametrize("k", [35, 100])
def test_more_neighbours_than_the_folds_have_rows_are_told_as_such(k: int, tmp_path: Path) -> None:
    params = {"n_neighbors": k}
    EstimatorHead("KNeighborsClassifier", params=params).require_savable()  # of more rows they can be asked
    path = write_store(tmp_path / "s.h5", gaussian_features({"train": 40, "test": 20}))
    words = f"n_neighbors is {k}, more than the 3[12] rows .* Pass a lower"
    with pytest.raises(HeadError, match=words) as caught:
        fit(path, head="sklearn:KNeighborsClassifier", params=params, curve=False)
    assert "\n" not in str(caught.value)
    more = write_store(tmp_path / "more.h5", gaussian_features({"train": 600, "test": 20}))
    assert fit(more, head="sklearn:KNeighborsClassifier", params=params, curve=False).metrics.accuracy > 0.9


def test_a_variance_of_zero_is_floored_or_refused(tmp_path: Path) -> None:
    features = gaussian_features({"train": 36, "test": 24}, d=6)
    constant = replace(features, X=np.where(np.arange(6) < 3, features.X, np.float32(7)))
    path = write_store(tmp_path / "s.h5", constant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(path, head="sklearn:GaussianNB", curve=False).metrics.accuracy == 1
        with pytest.raises(HeadError, match=r"scores of the rows held out are not finite.*--param") as caught:
            fit(path, head="sklearn:GaussianNB", params={"var_smoothing": 0}, curve=False)
    assert "\n" not in str(caught.value)


def put(name: str, values: Any) -> Callable[[Any], None]:
    return lambda estimator: setattr(estimator, name, values(getattr(estimator, name)))


FORGED: list[tuple[str, Callable[[Any], None]]] = [
    ("KNeighborsClassifier", put("_fit_X", lambda rows: rows[:, :2])),
    ("KNeighborsClassifier", put("_y", lambda labels: labels[:5])),
    ("KNeighborsClassifier", put("_y", lambda labels: labels + 10**8)),
    ("SVC", put("support_vectors_", lambda rows: rows[:, :2])),
    ("SVC", put("_dual_coef_", lambda weights: weights[:, :2])),
    ("SVC", put("_intercept_", lambda intercepts: intercepts[:1])),
    ("SVC", put("_n_support", lambda counts: counts + 1)),
    ("DecisionTreeClassifier", put("n_features_in_", lambda n: n + 1)),
    ("CalibratedClassifierCV", put("calibrated_classifiers_", lambda _: [fitted("DecisionTreeClassifier")])),
]


@pytest.mark.parametrize(("name", "forge"), FORGED)
def test_what_leads_outside_of_its_arrays_is_refused(name: str, forge: Callable[[Any], None]) -> None:
    pipeline = fitted(name)
    check_contents(pipeline, n_features=5)
    forge(pipeline[-1])
    with pytest.raises(ModelError, match=r"of this model (has|have|takes) "):
        check_contents(pipeline, n_features=4 if name == "CalibratedClassifierCV" else 5)


def test_a_tree_whose_indices_lead_outside_is_refused() -> None:
    tree = fitted("DecisionTreeClassifier")[-1].tree_
    check_tree(tree, n_features=5)
    with pytest.raises(ModelError, match="outside"):
        check_tree(tree, n_features=1)


@pytest.mark.parametrize(
    ("field", "value"), [("left", 0), ("right", 10**6), ("feature_idx", 5), ("is_categorical", 1)]
)
def test_a_tree_of_histograms_whose_indices_lead_outside_is_refused(field: str, value: int) -> None:
    predictor = fitted("HistGradientBoostingClassifier")[-1]._predictors[0][0]
    check_predictor(predictor, n_features=5)
    assert not predictor.nodes["is_leaf"][0]
    predictor.nodes[field][0] = value
    with pytest.raises(ModelError, match="a decision tree of this model"):
        check_predictor(predictor, n_features=5)


def test_a_tree_of_histograms_without_nodes_is_refused() -> None:
    predictor = fitted("HistGradientBoostingClassifier")[-1]._predictors[0][0]
    predictor.nodes = predictor.nodes[:0]
    with pytest.raises(ModelError, match="not one that featcache writes"):
        check_predictor(predictor, n_features=5)
