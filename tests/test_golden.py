"""Files written by earlier versions are read as they were meant. `scripts/make_golden.py` wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from featcache.errors import IncompleteStore
from featcache.model import Model
from featcache.records import RowStatus
from featcache.store.reader import FeatureStore

FORMAT_1 = Path(__file__).parent / "golden" / "format-1"
HEADS = ("knn", "linear", "logistic", "ncm", "ridge")


def rows_and_columns(rows: list[int], columns: int) -> np.ndarray:
    return np.array(rows)[:, None] + np.arange(columns) / 8


def test_a_complete_store_of_format_1() -> None:
    store = FeatureStore.open(FORMAT_1 / "complete.h5")
    kept = [0, 1, 2, 3, 4, 5, 7, 8, 9]
    for key, columns in (("penultimate", 3), ("stem:max", 2)):
        features = store.features(key)
        assert features.X.dtype == np.float32
        np.testing.assert_array_equal(features.X, rows_and_columns(kept, columns))
    assert features.ids[:2] == (r"c0/\xff and \\.png", "c1/é01.png")
    assert features.y.tolist() == [0, 1, 0, 1, 0, 1, 1, 0, -1]
    assert features.classes == ("c0", "c1")
    assert features.splits.tolist() == ["train", "val", "test", "", "train", "val", "", "train", "val"]
    assert (features.sha256 == np.array(kept)[:, None]).all()
    assert store.failed_rows() == [("c0/é06.png", RowStatus.UNDECODABLE)]
    assert store.sources["size"].tolist() == list(range(100, 110))
    assert store.spec.nodes[1].pooling == "max"


def test_a_store_of_format_1_in_progress() -> None:
    store = FeatureStore.open(FORMAT_1 / "in-progress.h5")
    with pytest.raises(IncompleteStore, match="4 of 10 rows are pending"):
        store.features()
    features = store.features(partial=True)
    assert features.X.dtype == np.float16
    np.testing.assert_array_equal(features.X, rows_and_columns([0, 1, 2, 3, 8, 9], 3))


def test_plain_h5py_reads_format_1() -> None:
    with h5py.File(FORMAT_1 / "complete.h5") as file:
        assert file.attrs["encoding-type"] == b"featcache-store"
        np.testing.assert_array_equal(file["features/stem:max"][3], rows_and_columns([3], 2)[0])
        assert np.isnan(file["features/penultimate"][6]).all()
        assert file["ids"].asstr()[1] == "c1/é01.png"
        assert json.loads(file.attrs["spec"])["backbone"] == "toy"


@pytest.mark.parametrize("head", HEADS)
def test_a_model_of_format_1_gives_the_probabilities_it_gave(head: str) -> None:
    said = json.loads((FORMAT_1 / "probabilities.json").read_text())
    model = Model.load(FORMAT_1 / f"{head}.model")
    assert model.classes == ("class0", "class1", "class2")
    np.testing.assert_allclose(model.predict_proba(said["X"]), said[head], rtol=1e-6)


def test_a_linear_model_of_format_1_is_what_plain_safetensors_reads() -> None:
    said = json.loads((FORMAT_1 / "probabilities.json").read_text())
    arrays = load_file(FORMAT_1 / "logistic.model")
    scores = np.exp(np.array(said["X"]) @ arrays["coef"].T + arrays["intercept"])
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), said["logistic"], rtol=1e-5)
