"""The graph before an estimator of scikit-learn: to the last digit what the estimator is given here."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from sklearn.preprocessing import StandardScaler

from featcache.exporting import estimators
from featcache.exporting.estimators import FEATURES


def standardized(scaler: StandardScaler, X: np.ndarray) -> np.ndarray:
    """What the graph makes of X (n_samples, n_features)."""
    taken = helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["batch", X.shape[1]])
    graph = helper.make_graph([], "scaler", [taken], [])
    estimators._standardize(graph, scaler)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {FEATURES: X})
    return np.asarray(found)


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(3, 0.7, size=(500, 16)).astype(np.float32)


def test_rows_are_standardized_to_the_last_digit() -> None:
    """A threshold of a tree may lie between two neighbouring numbers."""
    scaler = StandardScaler().fit(rows())
    np.testing.assert_array_equal(standardized(scaler, rows()), scaler.transform(rows()))


@pytest.mark.parametrize(
    ("version", "precision"), [("1.7.2", np.float64), ("1.8.0", np.float32), ("2.0.dev0", np.float32)]
)
def test_each_step_is_in_the_precision_of_the_installed_scikit_learn(
    version: str, precision: type[np.floating], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimators, "version", lambda name: version)
    X = rows()
    scaler = StandardScaler().fit(X)
    centred = (X.astype(precision) - scaler.mean_.astype(precision)).astype(np.float32)
    expected = (centred.astype(precision) / scaler.scale_.astype(precision)).astype(np.float32)
    np.testing.assert_array_equal(standardized(scaler, X), expected)
    other = np.float32 if precision is np.float64 else np.float64
    assert np.any(expected != ((X - scaler.mean_.astype(other)) / scaler.scale_.astype(other)).astype("f4"))
