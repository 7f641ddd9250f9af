"""Stores at the ends of what there is: `fit` from the command line ends in a report or in one line."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gaussians import gaussian_features, take, write_store

from featcache.cli import main
from featcache.store.features import FeatureSet

SPLITS = {"train": 60, "test": 30}


def fit_default(folder: Path, features: FeatureSet, *options: str) -> Any:
    """`featcache fit` with heads that compete, where a warning is an error."""
    path = write_store(folder / "s.h5", features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran = CliRunner().invoke(main, ["fit", str(path), "--json", "-q", *options])
    assert isinstance(ran.exception, SystemExit | None), ran.exc_info
    return ran


def constant(features: FeatureSet, n: int) -> FeatureSet:
    """With the last n features of one value each."""
    d = features.X.shape[1]
    values = np.linspace(-3, 3, d).astype(np.float32)
    return replace(features, X=np.where(np.arange(d) >= d - n, values, features.X))


def as_float16(features: FeatureSet, *, norm: float) -> FeatureSet:
    """With vectors of about this norm, stored as float16."""
    X = features.X / np.linalg.norm(features.X, axis=1).mean() * norm
    return replace(features, X=X.astype(np.float16), spec=replace(features.spec, store_dtype="float16"))


WIDE = gaussian_features(SPLITS, d=120, gap=4)
STORES = {
    "one image a class in each split": gaussian_features({"train": 6, "test": 6}, k=6, d=8),
    "one image a class in all": gaussian_features({"": 6}, k=6, d=8),
    "two classes": gaussian_features(SPLITS, k=2),
    "a class only in test": take(WIDE, (WIDE.splits == "test") | (WIDE.y != 2)),
    "a class only in train": take(WIDE, (WIDE.splits == "train") | (WIDE.y != 2)),
    "rows without a label": replace(WIDE, y=np.where(np.arange(90) % 5 == 0, -1, WIDE.y)),
    "100 constant features": constant(WIDE, 100),
    "no feature that varies": constant(WIDE, 120),
    "one feature that varies": constant(gaussian_features(SPLITS, k=2, d=120, gap=4), 119),
    "fewer rows than features": gaussian_features({"train": 20, "test": 10}, d=200),
    "rows all alike in each class": replace(WIDE, X=np.eye(3, 120, dtype=np.float32)[WIDE.y]),
    "vectors of norm 1e4 in float16": as_float16(WIDE, norm=1e4),
    "vectors of norm 1e-6 in float16": as_float16(WIDE, norm=1e-6),
    "vectors of norm 1e-30": replace(WIDE, X=WIDE.X * np.float32(1e-30)),
    "vectors of norm 1e30": replace(WIDE, X=WIDE.X * np.float32(1e30)),
}
LEAST = {
    "one image a class in all": 0.0,  # of classes that were not trained on
    "a class only in test": 0.5,
    "no feature that varies": 0.3,
    "vectors of norm 1e-6 in float16": 0.3,
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_at_the_ends_of_what_there_is_ends_in_a_report(name: str, tmp_path: Path) -> None:
    ran = fit_default(tmp_path, STORES[name])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert report["accuracy"] >= LEAST.get(name, 0.8)


NO_SPLITS = gaussian_features({"": 12}, k=4, d=8)
REFUSED = {
    "one class": (gaussian_features(SPLITS, k=1), "class"),
    "no label": (replace(NO_SPLITS, y=np.full(12, -1)), "label"),
    "nothing to train on": (gaussian_features({"test": 12}), "train"),
    "nothing to score on": (gaussian_features({"train": 2}, k=2), "nothing can be held out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_store_that_nothing_can_be_learned_from_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    features, word = REFUSED[name]
    ran = fit_default(tmp_path, features)
    assert ran.exit_code == 1, ran.output
    (line,) = ran.stderr.splitlines()
    assert word in line


def test_a_thousand_classes_of_five_rows(tmp_path: Path) -> None:
    features = gaussian_features({"": 5000}, k=1000, d=24, gap=0)
    centres = np.random.default_rng(0).normal(size=(1000, 24)) * 4
    features = replace(features, X=(features.X + centres[features.y]).astype(np.float32))
    ran = fit_default(tmp_path, features, "--budget", "0.5")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["accuracy"] > 0.5
