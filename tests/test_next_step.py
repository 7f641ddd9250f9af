"""What follows from a score: the verb that helps, as a command that a shell takes apart into just that."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gaussians import gaussian_features

from featcache.answers import ALL_WORDS, LabelledRows
from featcache.evaluate.metrics import score
from featcache.fitting import Wishes, fit_features
from featcache.model import Model
from featcache.next_step import Scored, next_step
from featcache.spec import FeatureNode


@pytest.fixture(scope="module")
def model() -> Model:
    """Without scores of its own."""
    return replace(fit_features(gaussian_features(), Wishes(head="ncm", curve=False))[1], metrics={})


def rows_of(
    splits: Sequence[str], *, classes: tuple[str, ...] = ("class0", "class1", "class2")
) -> LabelledRows:
    """The classes in turn."""
    n = len(splits)
    y = np.arange(n) % len(classes)
    return LabelledRows(
        ids=[f"{i}.png" for i in range(n)], y=y, splits=np.array(splits, dtype="<U5"), classes=classes
    )


def scored(model: Model, folder: Path, *, right: float, n: int = 1000, **more: Any) -> Scored:
    """So many rows, a share of them right."""
    y = np.arange(n) % 3
    said = np.where(np.arange(n) < right * n, y, (y + 1) % 3)
    fields: dict[str, Any] = {
        "model": folder / "m.model",
        "fitted": model,
        "data": folder / "photos",
        "is_store": False,
        "rows": rows_of(["train"] * 30 + ["test"] * 30),
        "scored_on": "test",
        "metrics": score(y, np.eye(3)[said] * 0.9 + 1 / 30, ("class0", "class1", "class2"), draws=0),
        "trained_on": 0,
        "unknown": (),
    }
    return Scored(**{**fields, **more})


def command(seen: Scored) -> list[str]:
    step = next_step(seen)
    return shlex.split(step.command) if step else []


def test_a_model_that_is_right_is_exported(model: Model, tmp_path: Path) -> None:
    assert command(scored(model, tmp_path, right=0.99)) == [
        "featcache", "export", str(tmp_path / "m.model"), "--to", "onnx",
    ]  # fmt: skip


def test_few_rows_call_for_more_images_and_no_command(model: Model, tmp_path: Path) -> None:
    assert command(scored(model, tmp_path, right=1.0, n=20)) == []


def test_many_errors_call_for_fine_tuning(model: Model, tmp_path: Path) -> None:
    (tmp_path / "m2.model").touch()
    seen = scored(model, tmp_path, right=0.8, source=("--root", Path("-r")), weights="w.pth")
    assert command(seen) == [
        "featcache", "finetune", str(tmp_path / "m.model"), str(tmp_path / "photos"),
        "-o", str(tmp_path / "m3.model"), "--root", "./-r", "--weights", "w.pth",
    ]  # fmt: skip


@pytest.mark.parametrize("why", ["store", "tuned", "knn", "no training rows", "worse than when fitted"])
def test_where_fine_tuning_cannot_help_the_wrong_rows_are_listed(
    model: Model, tmp_path: Path, why: str
) -> None:
    better = {"accuracy_ci95": [0.85, 0.95]}
    more: dict[str, Any] = {
        "store": {"is_store": True},
        "tuned": {"fitted": replace(model, network={"w": np.zeros(1)})},
        "knn": {"fitted": replace(model, head_name="knn")},
        "no training rows": {"rows": rows_of(["test"] * 30)},
        "worse than when fitted": {"fitted": replace(model, metrics=better)},
    }[why]
    seen = scored(model, tmp_path, right=0.8, **more)
    assert command(seen)[:2] == ["featcache", "evaluate"]
    assert command(seen)[-4:] == ["--split", "test", "--csv", "m.answers.csv"]
    assert command(replace(seen, scored_on=ALL_WORDS))[-2:] == ["--csv", "m.answers.csv"]
    assert next_step(replace(seen, listed=True)) is None


def test_rows_it_was_fitted_on_are_left_out_first(model: Model, tmp_path: Path) -> None:
    seen = scored(model, tmp_path, right=1.0, trained_on=500, scored_on="train")
    assert command(seen)[-2:] == ["--split", "test"]
    assert next_step(replace(seen, scored_on="test")) is None
    assert next_step(replace(seen, rows=rows_of([""] * 30), scored_on=ALL_WORDS)) is None


def test_new_classes_are_fitted_where_there_are_rows_to_train_on(model: Model, tmp_path: Path) -> None:
    classes = ("class0", "new one", "class2")
    seen = scored(
        model, tmp_path, right=0.6, rows=rows_of(["train"] * 30, classes=classes), unknown=("new one",)
    )
    new = str(tmp_path / "m2.model")
    assert command(seen) == [
        "featcache", "embed", str(tmp_path / "photos"), "-o", "photos.h5", "--backbone", "toy",
        "&&", "featcache", "fit", "photos.h5", "-o", new,
    ]  # fmt: skip
    store = replace(seen, is_store=True, data=Path("s.h5"))
    assert command(store) == ["featcache", "fit", "s.h5", "-o", new]
    step = next_step(seen)
    assert step is not None
    assert "knows new one as well" in step.why
    only_scored = replace(seen, rows=rows_of(["test"] * 30, classes=classes))
    assert next_step(only_scored) is None
    assert next_step(replace(seen, fitted=replace(model, network={"w": np.zeros(1)}))) is None


def test_features_are_asked_for_as_the_model_has_them(model: Model, tmp_path: Path) -> None:
    node = FeatureNode(name="layer3", pooling="avg", num_features=5)
    pre = replace(model.spec.preprocessing, jpeg="scaled")
    spec = replace(
        model.spec, nodes=(node,), preprocessing=pre, compute_dtype="bfloat16", store_dtype="float16"
    )
    request = {"backbone": "resnet18", "weights": "random", "seed": 7}
    asked = replace(model, spec=spec, nodes=(node,), provenance={**model.provenance, "request": request})
    classes = ("class0", "new", "class2")
    seen = scored(asked, tmp_path, right=0.6, rows=rows_of([""] * 9, classes=classes), unknown=("new",))
    embed, _, fit = " ".join(command(seen)).partition(" && ")
    assert embed.endswith(
        "--backbone resnet18 --weights random --seed 7 --precision bfloat16 --store-dtype float16 "
        "--jpeg-scaled --node layer3:avg"
    )
    assert fit.endswith("--node layer3:avg")


def test_code_of_the_users_own_is_named_again(model: Model, tmp_path: Path) -> None:
    own = replace(model, provenance={**model.provenance, "request": {"backbone": "mine:net"}})
    assert command(scored(own, tmp_path, right=0.99))[-2:] == ["--backbone", "mine:net"]
