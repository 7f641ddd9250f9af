"""Heads whose products over rows torch does: the same sums and optimum, and torch only when asked for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

import featcache.heads.moments as moments
import featcache.heads.pieces as pieces
import featcache.heads.softmax_torch as softmax_torch
import featcache.heads.training as training
from featcache.heads import HEADS
from featcache.heads.device import ON_PROCESSORS, find_products
from featcache.heads.logistic import LogisticHead
from featcache.heads.moments import Moments, take_moments
from featcache.heads.softmax_torch import OnTorch, TorchSoftmaxRows

ON_TORCH = OnTorch(torch.device("cpu"))
CANDIDATES: Any = {
    "logistic": [{"C": 0.01}, {"C": 1.0}],
    "ridge": [{"alpha": 0.3}, {"alpha": 30.0}],
    "lda": [{"shrinkage": 0.1}],
}


def blobs(n: int = 300, d: int = 12, k: int = 4) -> tuple[Any, Any]:
    """Features of unequal scale and offset, classes of unequal size."""
    rng = np.random.default_rng(0)
    y = np.maximum(rng.integers(-2, k, size=n), 0)
    X = rng.normal(size=(k, d))[y] * 0.7 + rng.normal(size=(n, d))
    return X * 10.0 ** rng.uniform(-2, 2, size=d) + rng.uniform(-50, 50, size=d), y


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device, torch's processor does the products, as a CUDA device would."""
    for module in ("logistic", "closed"):
        monkeypatch.setattr(f"featcache.heads.{module}.find_products", lambda *_, **__: ON_TORCH)


@pytest.mark.parametrize("room", [np.inf, 0], ids=["rows kept", "rows streamed"])
@pytest.mark.parametrize("weight", [None, "balanced"])
def test_losses_and_gradients_of_torch_are_those_of_numpy(
    weight: Any, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "BLOCK_VALUES", 500)
    monkeypatch.setattr(training, "CACHE_BYTES", 0)
    monkeypatch.setattr(softmax_torch, "TILE_VALUES", 700)
    X, y = blobs()
    head = LogisticHead(class_weight=weight)
    head.classes_ = np.arange(4)
    fold = np.random.default_rng(1).integers(-1, 3, size=len(y))
    ours, theirs = (
        training.shared_folds(X, y, weigh=head._weigh, fold=fold, n_folds=3, products=products)
        for products in (ON_TORCH, ON_PROCESSORS)
    )
    assert isinstance(ours.rows, TorchSoftmaxRows)
    ours.rows.room = room
    rng = np.random.default_rng(2)
    folds = np.array([0, 2, 2, 3])
    weights, bias = rng.normal(size=(4, 4, 12)), rng.normal(size=(4, 4))
    for _ in range(2):  # the second time from the rows that were kept
        found, expected = (some.rows.evaluate(folds, weights, bias) for some in (ours, theirs))
        for part in ("loss", "weights", "bias", "variance"):
            np.testing.assert_allclose(getattr(found, part), getattr(expected, part), rtol=1e-10, atol=1e-9)
    tables = np.zeros((2, 2, len(y), 4))
    for table, some in zip(tables, (ours, theirs), strict=True):
        some.score(1, weights[:2], bias[:2], table)
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-10, atol=1e-9)
    assert tables[0].any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", CANDIDATES)
def test_torch_reaches_the_optimum_that_numpy_reaches(
    name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("training", "moments", "closed"):
        monkeypatch.setattr(f"featcache.heads.{module}.FLOAT64_VALUES", 0)  # as for large data
    X, y = blobs()
    X, fold = X.astype(dtype), np.arange(len(y)) % 3
    tables, heads = [], []
    for _ in range(2):
        head: Any = HEADS[name].load()()
        search = head.start_search(X, y, fold=fold, n_folds=3, searched=tuple(CANDIDATES[name][0]))
        tables.append(list(search.scores(CANDIDATES[name])))
        heads.append(clone_fit(head, CANDIDATES[name][0], X, y))
        by_torch(monkeypatch)
    np.testing.assert_allclose(tables[0], tables[1], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(*(head.predict_proba(X) for head in heads), atol=1e-3)
    if name == "logistic":
        assert heads[1].objective_ == pytest.approx(heads[0].objective_, rel=1e-5)
        assert heads[1].converged_


def clone_fit(head: Any, values: Any, X: Any, y: Any) -> Any:
    return type(head)(**values).fit(X, y)


def test_cross_products_of_torch_are_those_of_numpy() -> None:
    X, y = blobs()
    part = np.arange(len(y)) % 3
    found, expected = (
        take_moments(X, y, n_classes=4, part=part, n_parts=3, cross=True, products=products).gram
        for products in (ON_TORCH, ON_PROCESSORS)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.5, 2.0, 3.0])])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_moments_of_rows_that_a_device_takes_as_they_are_stored_are_those_of_numpy(
    dtype: Any, weights: Any, cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "FLOAT64_VALUES", 0)
    monkeypatch.setattr(moments, "CHUNK_VALUES", 700)
    X, y = blobs()
    X, part = X.astype(dtype), np.random.default_rng(1).integers(0, 3, size=len(y))
    X.flags.writeable = False  # as those of a store
    options: Any = {"n_classes": 4, "part": part, "n_parts": 3, "cross": cross, "weights": weights}
    expected = take_moments(X, y, **options)
    monkeypatch.setattr(pieces, "centre_rows", lambda *_, **__: pytest.fail("rows were prepared by numpy"))
    found = take_moments(X, y, products=ON_TORCH, **options)
    for field in fields(Moments):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize(
    ("device", "words"),
    [("abacus", "device is auto, cpu or cuda, not 'abacus'"), ("cuda:99", "torch has .* CUDA devices? here")],
)
def test_a_device_that_is_not_there_is_refused(name: str, device: str, words: str) -> None:
    X, y = blobs()
    with pytest.raises(ValueError, match=words):
        HEADS[name].load()(device=device).fit(X, y)


def test_torch_is_looked_for_where_the_processors_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "featcache.heads.minibatch.pick_device", lambda name: asked.append(name) or torch.device("meta")
    )
    assert find_products("auto", operations=1e9) is ON_PROCESSORS
    assert find_products("cpu", operations=1e18) is ON_PROCESSORS
    assert not asked
    assert isinstance(find_products("auto", operations=1e18), OnTorch)


def test_a_small_fit_on_any_device_imports_no_torch() -> None:
    code = (
        "import sys, numpy as np; from featcache.heads import build_head; "
        "X, y = np.eye(8), np.arange(8) % 2; "
        "[build_head(name, {'device': 'auto'}, seed=0).fit(X, y) for name in ('logistic', 'ridge', 'lda')]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
