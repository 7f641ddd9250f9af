"""The competition as a scikit-learn classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.evaluate.auto import AutoHead


def blobs(n: int = 120, *, k: int = 3, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    return rng.normal(size=(n, 6)) + 1.5 * np.eye(k, 6)[y], y


def contract_checks() -> pytest.MarkDecorator:
    """scikit-learn's own checks, but for that of array libraries other than numpy."""
    mark = parametrize_with_checks([AutoHead()])
    names, checks = mark.args
    kept = [check for check in checks if "array_api_input" not in str(check[1])]
    return pytest.mark.parametrize(names, kept, ids=mark.kwargs["ids"])


@contract_checks()
def test_the_competition_keeps_scikit_learns_contract(estimator: Any, check: Any) -> None:
    check(estimator)


def test_it_is_the_head_it_names() -> None:
    X, y = blobs()
    names = np.array(["a", "b", "c"])[y]
    auto = AutoHead().fit(X, names)
    assert auto.competition_.chosen is not None
    assert auto.head_name_ == auto.competition_.chosen.head
    expected = auto.head_.predict_proba(X)
    np.testing.assert_array_equal(auto.predict_proba(X), expected)
    np.testing.assert_array_equal(auto.predict(X), np.array(["a", "b", "c"])[expected.argmax(axis=1)])
    assert auto.params_["temperature"] == auto.head_.temperature


def test_it_works_in_a_pipeline_and_is_cross_validated() -> None:
    X, y = blobs()
    scores = cross_val_score(make_pipeline(StandardScaler(), AutoHead()), X, y, cv=2)
    assert scores.mean() > 0.6


def test_balanced_weights_reach_the_heads() -> None:
    X, y = blobs(k=2)
    rare = (y == 0) | (np.arange(len(y)) % 12 == 1)
    plain, balanced = (AutoHead(class_weight=w).fit(X[rare], y[rare]) for w in (None, "balanced"))
    assert balanced.competition_.weighted
    assert (balanced.predict(X) == 1).sum() > (plain.predict(X) == 1).sum()
    with pytest.raises(ValueError, match="class_weight is 'balanced'"):
        AutoHead(class_weight="even").fit(X, y)
