"""`plan` and bfloat16: tried where a run in float32 waits for the processors, and advised where it pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_mean import ChannelMean
from test_plan import PASS_SECONDS, slowly

from featcache import pipeline
from featcache.backbones import Backbone, make_backbone
from featcache.commands import plan as plan_module
from featcache.commands.embed import embed
from featcache.commands.plan import plan
from featcache.engines import Engine, devices, lower_precision
from featcache.engines.lower_precision import LowerPrecision, try_lower_precision
from featcache.spec import Preprocessing


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    """Forty images of two classes."""
    return save_images(40, lambda i: f"class{i % 2}/{i:02d}.png")


class QuickMean(ChannelMean):
    """Four times as fast in a lower precision, as on a processor that has it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        lower = torch.is_autocast_enabled("cpu")
        time.sleep(PASS_SECONDS / 4 if lower else PASS_SECONDS)
        mean: torch.Tensor = super().forward(images)
        return self.lowered(mean) if lower else mean

    def lowered(self, mean: torch.Tensor) -> torch.Tensor:
        return mean


class OtherMean(QuickMean):
    def lowered(self, mean: torch.Tensor) -> torch.Tensor:
        return mean.flip(1)


class NarrowMean(QuickMean):
    def lowered(self, mean: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 must have the same dtype")


def quick_backbone() -> Backbone:
    return make_backbone(QuickMean(), preprocessing=Preprocessing(resize_size=8, crop_size=8))


def other_backbone() -> Backbone:
    return make_backbone(OtherMean(), preprocessing=Preprocessing(resize_size=8, crop_size=8))


def narrow_backbone() -> Backbone:
    return make_backbone(NarrowMean(), preprocessing=Preprocessing(resize_size=8, crop_size=8))


@pytest.fixture
def bfloat16_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that computes in it."""
    monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: True)


def test_a_lower_precision_is_advised_where_it_is_faster_and_agrees(
    photos: Path, bfloat16_here: None
) -> None:
    result = plan(photos, backbone="test_plan_precision:quick_backbone", batch_size=2)
    (said,) = [said for said in result.advice if said.startswith("--precision bfloat16: ")]
    assert said.endswith("other features (lowest cosine 1.000000 over 8 images), another fingerprint")
    assert said in result.describe()
    assert "differ too much" not in result.describe()
    found = result.to_json()["lower_precision"]
    assert (found["precision"], found["agrees"], found["images"]) == ("bfloat16", True, 8)
    assert found["times_as_fast"] >= 1.2


def test_a_store_that_is_there_is_not_advised_a_lower_precision(
    photos: Path, tmp_path: Path, bfloat16_here: None, save_image: Callable[..., Path]
) -> None:
    named: dict[str, Any] = {"backbone": "test_plan_precision:quick_backbone", "batch_size": 2}
    embed(photos, tmp_path / "s.h5", **named)
    for i in range(20):
        save_image(photos / "class0" / f"new{i}.png", seed=100 + i)
    for output, ends in ((tmp_path / "s.h5", True), (tmp_path / "new.h5", False)):
        (said,) = [said for said in plan(photos, output, **named).advice if "--precision" in said]
        assert said.endswith("name a new -o, all images are embedded anew") is ends


@pytest.mark.parametrize(("asked", "tried"), [(None, 8), (4, 4)])
def test_a_lower_precision_is_tried_in_batches_of_its_own_and_not_in_those_of_the_store(
    photos: Path,
    tmp_path: Path,
    bfloat16_here: None,
    save_image: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    tried: int,
) -> None:
    named: dict[str, Any] = {"backbone": "test_plan_precision:quick_backbone"}
    embed(photos, tmp_path / "s.h5", batch_size=2, **named)
    for i in range(20):
        save_image(photos / "class0" / f"new{i}.png", seed=100 + i)
    sizes: list[int] = []

    def look(lower: Engine, *given: Any, **more: Any) -> LowerPrecision:
        sizes.append(lower.batch_size)
        return try_lower_precision(lower, *given, **more)

    monkeypatch.setattr(lower_precision, "try_lower_precision", look)
    assert plan(photos, tmp_path / "s.h5", batch_size=asked, **named).lower_precision is not None
    assert sizes == [tried]


def test_a_lower_precision_that_makes_other_features_is_not_advised(
    photos: Path, bfloat16_here: None
) -> None:
    result = plan(photos, backbone="test_plan_precision:other_backbone", batch_size=2)
    assert not any("--precision" in said for said in result.advice)
    found = result.to_json()["lower_precision"]
    assert (found["agrees"], found["times_as_fast"]) == (False, None)
    assert found["lowest_cosine"] < 0.9999
    told = f"bfloat16 was tried: its features differ too much (lowest cosine {found['lowest_cosine']:.6f}, "
    assert told in result.describe()


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "device_kind", lambda device: "cuda")


def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bfloat16_instructions", lambda: False)


def slow_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, pipeline, "load_pictures", 0.1)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (without_instructions, {}),
        (on_cuda, {}),
        (slow_to_decode, {}),
        (None, {"precision": "bfloat16"}),
        (None, {"backbone": "test_plan_precision:narrow_backbone"}),
    ],
)
def test_no_lower_precision_is_tried_where_it_would_move_nothing(
    photos: Path,
    bfloat16_here: None,
    monkeypatch: pytest.MonkeyPatch,
    changed: Callable[[pytest.MonkeyPatch], None] | None,
    options: dict[str, Any],
) -> None:
    if changed is not None:
        changed(monkeypatch)
    result = plan(photos, batch_size=2, **{"backbone": "test_plan_precision:quick_backbone", **options})
    assert result.sample is not None
    assert result.lower_precision is None
    assert not any("on this processor" in said for said in result.advice)
