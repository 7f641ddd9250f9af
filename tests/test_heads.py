"""Every head: scikit-learn's contract, saving, and agreement with independent implementations."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.fixes import parse_version

from featcache.errors import HeadError
from featcache.heads import HEADS, build_head, find_head
from featcache.heads.estimators import EstimatorHead
from featcache.heads.logistic import LogisticHead
from featcache.heads.neighbors import NeighborsHead
from featcache.heads.parameters import parse_params, parse_value
from featcache.heads.ridge import RidgeHead
from featcache.heads.standardize import Standardizer, rotate
from featcache.heads.temperature import fit_temperature

NAMES = [*(name for name in HEADS if name != "sklearn"), "sklearn:RandomForestClassifier"]


def blobs(*, n: int = 90, d: int = 7, k: int = 3, seed: int = 0, gap: float = 1.0) -> tuple[Any, Any]:
    """Features of unequal scale, and their labels."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    X = rng.normal(size=(k, d))[y] * gap + rng.normal(size=(n, d))
    return X * 10.0 ** rng.uniform(-2, 2, size=d) + rng.uniform(-5, 5, size=d), y


def objective(X: Any, y: Any, weights: Any, bias: Any, C: float) -> float:
    """The logistic objective by hand, on standardised features."""
    logits = StandardScaler().fit_transform(X) @ weights.T + bias
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(0.5 * np.sum(weights**2) - C * log_p[np.arange(len(y)), y].sum())


def contract_checks() -> pytest.MarkDecorator:
    """scikit-learn's own checks, but for that of array libraries other than numpy."""
    mark = parametrize_with_checks([build_head(name, {}, seed=0) for name in NAMES])
    names, checks = mark.args
    kept = [check for check in checks if "array_api_input" not in str(check[1])]
    return pytest.mark.parametrize(names, kept, ids=mark.kwargs["ids"])


@contract_checks()
def test_a_head_keeps_scikit_learns_contract(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_works_in_a_pipeline_and_a_grid_search(name: str) -> None:
    X, y = blobs()
    kind = find_head(name)
    parameter, values = "temperature", [0.5, 2.0]
    if kind.searched:
        parameter, values = kind.searched[0], list(kind.grid[kind.searched[0]][:2])
    head = clone(build_head(name, {}, seed=0)).set_params(**{parameter: values[0]})
    pipeline = make_pipeline(StandardScaler(), head)
    search = GridSearchCV(pipeline, {f"{type(head).__name__.lower()}__{parameter}": values}, cv=2).fit(X, y)
    assert search.best_score_ > 0.5
    assert search.predict(X).shape == y.shape


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_head_saved_as_arrays_predicts_the_same(name: str, k: int) -> None:
    X, y = blobs(k=k)
    head = build_head(name, {}, seed=0).fit(X.astype(np.float32), y)
    arrays, rest = head.to_arrays()
    assert set(arrays) == set(find_head(name).arrays)
    again = type(head).from_arrays(arrays, rest, params=head.get_params(deep=False))
    np.testing.assert_array_equal(again.predict_proba(X), head.predict_proba(X))


@pytest.mark.parametrize(
    "name", [name for name in HEADS if HEADS[name].arrays.keys() == {"coef", "intercept"}]
)
def test_a_linear_head_is_one_affine_map_of_raw_features(name: str) -> None:
    X, y = blobs(k=2)
    head: Any = build_head(name, {"temperature": 3.0}, seed=0).fit(X, y)
    W, b = head.as_linear()
    e = np.exp(X @ W.T + b - (X @ W.T + b).max(axis=1, keepdims=True))
    np.testing.assert_allclose(e / e.sum(axis=1, keepdims=True), head.predict_proba(X), atol=1e-12)


@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("n", "d", "k"), [(90, 7, 3), (40, 120, 3), (60, 5, 2)])
def test_logistic_reaches_scikit_learns_optimum(n: int, d: int, k: int, C: float) -> None:
    X, y = blobs(n=n, d=d, k=k)
    Z = StandardScaler().fit_transform(X)
    # The binomial form has one row w: with rows -w/2 and w/2, |W|^2 / 2 = |w|^2 / 4, hence twice the C.
    theirs = LogisticRegression(C=2 * C if k == 2 else C, tol=1e-8, max_iter=100_000).fit(Z, y)
    rows, bias = theirs.coef_, theirs.intercept_
    if k == 2:
        rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
    best = objective(X, y, rows, bias, C)
    head = LogisticHead(C=C).fit(X, y)
    scaler = Standardizer.of(X)
    ours = objective(X, y, head.coef_ * scaler.scale, head.intercept_ + head.coef_ @ scaler.mean, C)
    assert head.converged_
    assert ours == pytest.approx(best, rel=1e-5)
    assert head.objective_ == pytest.approx(ours, rel=1e-6)


def test_a_path_of_logistic_fits_is_the_single_fits() -> None:
    X, y = blobs()
    values = [10.0, 0.01, 1.0]
    path = LogisticHead(tol=1e-11).fit_path(X, y, candidates=[{"C": value} for value in values])
    for value, head in zip(values, path, strict=True):
        assert value == head.C
        np.testing.assert_allclose(
            head.coef_, LogisticHead(C=value, tol=1e-11).fit(X, y).coef_, rtol=1e-2, atol=1e-3
        )


def test_logistic_says_when_it_did_not_converge() -> None:
    X, y = blobs()
    head = LogisticHead(C=10, max_iter=1).fit(X, y)
    assert not head.converged_
    assert "short of its tolerance" in head.notes[0]


@pytest.mark.parametrize(("n", "d", "k"), [(90, 7, 3), (40, 120, 3), (60, 5, 2)])
def test_ridge_is_scikit_learns(n: int, d: int, k: int) -> None:
    X, y = blobs(n=n, d=d, k=k)
    theirs = RidgeClassifier(alpha=3.0).fit(StandardScaler().fit_transform(X), y)
    (ours,) = RidgeHead().fit_path(X, y, candidates=[{"alpha": 3.0}])
    weights = ours.coef_[-1:] if k == 2 else ours.coef_
    np.testing.assert_allclose(
        weights * Standardizer.of(X).scale, np.atleast_2d(theirs.coef_), rtol=1e-6, atol=1e-9
    )


def test_standardisation_is_per_feature_and_survives_constant_columns() -> None:
    X = np.array([[1.0, 1000.0, 0.1], [3.0, 3000.0, 0.1]])
    np.testing.assert_allclose(Standardizer.of(X).apply(X), [[-1, -1, 0], [1, 1, 0]], atol=1e-12)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_a_rotation_keeps_the_standardised_features(shape: tuple[int, int]) -> None:
    X = np.random.default_rng(0).normal(size=shape) * 5 + 2
    rotation = rotate(X)
    np.testing.assert_allclose(rotation.rows @ rotation.basis.T, Standardizer.of(X).apply(X), atol=1e-9)


def test_scaling_one_feature_changes_no_linear_prediction() -> None:
    X, y = blobs()
    scaled = X * np.array([1e4, 1, 1, 1, 1, 1, 1])
    for name in ("logistic", "ridge", "lda", "ncm"):
        first, second = (build_head(name, {}, seed=0).fit(F, y).predict_proba(F) for F in (X, scaled))
        np.testing.assert_allclose(first, second, atol=1e-4)


def test_neighbours_vote_as_the_formula_says() -> None:
    X, y = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]), np.array([0, 1, 1])
    head = NeighborsHead(k=2).fit(X, y)
    query = np.array([[2.0, 1.0]])
    a, b = np.exp(2 / 5**0.5 / 0.07), np.exp(3 / 10**0.5 / 0.07)
    expected = (2 * a / (a + b) + 0.5) / 3
    np.testing.assert_allclose(head.predict_proba(query), [[expected, 1 - expected]], rtol=1e-4)
    assert head.predict_proba(X).min() > 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("False", False),
        ("TRUE", True),
        ("none", None),
        ("3", 3),
        ("0.5", 0.5),
        ("sqrt", "sqrt"),
        ("[1]", [1]),
    ],
)
def test_parameters_mean_what_they_say(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(("text", "written"), [("(8,8)", "[8,8]"), (" (8,) ", "[8]"), ("()", "[]")])
def test_a_tuple_is_refused_with_the_list_to_write(text: str, written: str) -> None:
    words = f"sizes={text.strip()} is a text and no list. Write sizes={written}."
    with pytest.raises(HeadError, match=re.escape(words)):
        parse_params({"alpha": "1", "sizes": text})
    assert parse_params({"sizes": written}) == {"sizes": json.loads(written)}


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("logistik", {}, "Did you mean logistic"),
        ("sklearn", {}, "sklearn:CLASSNAME"),
        ("sklearn:RandomForest", {}, "RandomForestClassifier"),
        ("logistic", {"c": 1}, "no parameter 'c'. Did you mean C"),
        ("sklearn:SVC", {"gama": 1}, "Did you mean gamma"),
        ("sklearn:VotingClassifier", {}, "needs another estimator"),
        pytest.param(
            "sklearn:SelfTrainingClassifier",
            {},
            "needs another estimator",
            marks=pytest.mark.skipif(
                parse_version(sklearn.__version__) < parse_version("1.6"), reason="counts it as no classifier"
            ),
        ),
        ("foo", {}, "there is no head 'foo'. Heads: "),
        ("sklearn:Foo", {}, "no classifier 'Foo'. Name one by its class, such as SVC, "),
        ("sklearn:", {}, "sklearn: is followed by the name of a classifier of scikit-learn, such as SVC, "),
        ("ridge", {"foo": 1}, "ridge has no parameter 'foo'. It has alpha, class_weight, "),
        ("sklearn:SVC", {"foo": 1}, "sklearn:SVC has no parameter 'foo'. It has C, break_ties, "),
    ],
)
def test_what_does_not_exist_is_named_with_the_nearest(name: str, params: Any, words: str) -> None:
    X, y = blobs()
    with pytest.raises(HeadError, match=words):
        build_head(name, params, seed=0).fit(X, y)


def test_a_scikit_learn_estimator_gets_the_seed_and_the_warnings_become_notes() -> None:
    X, y = blobs()
    head = EstimatorHead("MLPClassifier", params={"max_iter": 2}, seed=7).fit(X, y)
    assert head.pipeline_[-1].random_state == 7
    assert any("ConvergenceWarning" in note for note in head.notes)


def test_an_estimator_that_no_model_file_may_hold_is_refused_by_type() -> None:
    X, y = blobs()
    head = EstimatorHead("GaussianProcessClassifier").fit(X, y)
    with pytest.raises(
        HeadError, match=r"GaussianProcess.* holds sklearn\.\S+, which a model file may not contain"
    ):
        head.to_arrays()


def test_the_temperature_makes_overconfident_scores_honest() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = (rng.random(len(p))[:, None] > p.cumsum(axis=1)).sum(axis=1)
    assert fit_temperature(logits * 5, y) == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("linear", "mlp")])
def test_a_head_that_needs_no_torch_does_not_import_it(name: str) -> None:
    code = (
        "import sys, numpy as np; from featcache.heads import build_head; "
        "X, y = np.eye(8), np.arange(8) % 2; "
        f"h = build_head({name!r}, {{}}, seed=0).fit(X, y); a, r = h.to_arrays(); "
        "type(h).from_arrays(a, r, params=h.get_params(deep=False)).predict_proba(X); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_guide_quotes_the_real_file() -> None:
    root = Path(__file__).parent.parent
    assert (root / "featcache/heads/means.py").read_text() in (root / "docs/adding-a-head.md").read_text()


@pytest.mark.parametrize("name", [name for name in HEADS if name != "sklearn"])
def test_the_parameters_of_a_head_and_their_defaults_are_in_the_guide(name: str) -> None:
    guide = (Path(__file__).parent.parent / "docs/heads.md").read_text()
    said = next(line for line in guide.splitlines() if line.startswith(f"| `{name}` |"))
    if "minibatches" in said:
        said += guide.split("\n## ")[1]
    for parameter in inspect.signature(HEADS[name].load()).parameters.values():
        default = re.search(rf"`{parameter.name}(=[^`]+)?`", said + "`temperature`")
        assert default, parameter.name
        assert not default[1] or parse_value(default[1][1:]) == parameter.default
