"""`plan`: what it says of a run is what the run then takes, and it writes nothing."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from channel_mean import ChannelMean
from click.testing import CliRunner
from conftest import toy_records, toy_spec
from gaussians import PROVENANCE

from featcache import forecast, pipeline
from featcache.backbones import Backbone, make_backbone
from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.plan import PlanResult, plan
from featcache.embedding import BLOCK_ROWS
from featcache.engines.agreement import Agreement
from featcache.engines.lower_precision import LowerPrecision
from featcache.forecast import ADVICE, Sample, Situation, advise, describe_stages, spread
from featcache.images import identity
from featcache.spec import Preprocessing, StoreDtype
from featcache.store.creating import create_store
from featcache.store.layout import RowTable

TOY = "channel_mean:channel_mean"
SLOW = "test_plan:slow_backbone"
PASS_SECONDS = 0.02


class SlowMean(ChannelMean):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(PASS_SECONDS)
        mean: torch.Tensor = super().forward(images)
        return mean


def slow_backbone() -> Backbone:
    return make_backbone(SlowMean(), preprocessing=Preprocessing(resize_size=8, crop_size=8))


class WideMean(ChannelMean):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = super().forward(images)
        return mean.repeat(1, 2000)  # (B, 6000)


def wide_backbone() -> Backbone:
    return make_backbone(WideMean(), preprocessing=Preprocessing(resize_size=8, crop_size=8))


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """Forty images of two classes."""
    for i in range(40):
        save_image(tmp_path / "photos" / f"class{i % 2}" / f"{i:02d}.png", seed=i)
    return tmp_path / "photos"


def many(photos: Path, count: int) -> Path:
    """The folder with so many images in it, copies of one."""
    for i in range(count - 40):
        shutil.copy(photos / "class0" / "00.png", photos / "class1" / f"copy{i:03d}.png")
    return photos


def slowly(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, seconds: float) -> None:
    original = getattr(module, name)

    def throttled(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, throttled)


def wall_of(result: PlanResult) -> str:
    assert result.sample is not None
    return result.sample.wall


def test_throttled_decoding_is_the_wall(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, pipeline, "load_pictures", 0.01)
    result = plan(photos, backbone=TOY)
    assert wall_of(result) == "decoding"
    assert "decoding is the wall: " in result.describe()


def test_a_throttled_network_is_the_wall(photos: Path) -> None:
    result = plan(photos, backbone=SLOW, batch_size=2)
    assert wall_of(result) == "forward"
    assert "the network is the wall: " in result.describe()


def test_a_throttled_disk_is_the_wall(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, forecast, "open_regular", 0.01)
    slowly(monkeypatch, identity, "_read_all", 0.01)
    result = plan(photos, backbone=TOY)
    assert wall_of(result) == "reading"
    assert any("images on a disk of this machine" in said for said in result.advice)


def test_the_time_is_that_of_all_pending_images_from_some_of_them(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "SAMPLE_SECONDS", 0.4)
    result = plan(many(photos, 400), backbone=SLOW, batch_size=2, workers=1)
    assert result.sample is not None
    assert result.sample.images < 200
    least = 400 / 2 * PASS_SECONDS  # one thread sleeps so long a batch of two
    assert least <= result.seconds["embedding"] < 4 * least
    assert result.total_seconds == pytest.approx(sum(result.seconds.values()))


def test_where_all_is_sampled_the_time_is_that_of_the_sample(photos: Path) -> None:
    result = plan(photos, backbone=SLOW, batch_size=2, workers=1)
    assert result.sample is not None
    assert (result.sample.images, result.sample.begun_images) == (40, 0)
    assert result.seconds["embedding"] == pytest.approx(result.sample.seconds)


@pytest.mark.parametrize("views", [1, 3])
def test_the_disk_of_a_store_is_known_to_the_byte(tmp_path: Path, views: int) -> None:
    spec, table = toy_spec(views=views), RowTable.from_records(toy_records(500), ("c0", "c1"))
    create_store(tmp_path / "s.h5", spec=spec, table=table, provenance=PROVENANCE, block_rows=BLOCK_ROWS)
    found = forecast.measure_store(table, spec, provenance=PROVENANCE)
    assert found == (tmp_path / "s.h5").stat().st_size


@pytest.mark.parametrize("store_dtype", get_args(StoreDtype))
def test_the_disk_is_that_of_the_store_that_is_made(
    photos: Path, tmp_path: Path, store_dtype: StoreDtype
) -> None:
    result = plan(photos, backbone="test_plan:wide_backbone", store_dtype=store_dtype)
    embed(photos, tmp_path / "s.h5", backbone="test_plan:wide_backbone", store_dtype=store_dtype)
    assert result.disk_bytes == pytest.approx((tmp_path / "s.h5").stat().st_size, rel=0.01)


def test_only_what_the_store_lacks_is_counted(
    photos: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    embed(photos, tmp_path / "s.h5", backbone=TOY)
    save_image(photos / "class0" / "new.png", seed=99)
    result = plan(photos, tmp_path / "s.h5", backbone=TOY)
    assert (result.rows, result.to_embed, result.known) == (41, 1, 40)
    assert result.sample is not None
    assert result.sample.images == 1


def test_a_complete_store_needs_no_torch(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    save_image(tmp_path / "one" / "class" / "1.png")
    embed(tmp_path / "one", tmp_path / "s.h5", backbone="resnet18", weights="random")
    arguments = ["plan", str(tmp_path / "one"), "-o", str(tmp_path / "s.h5"), "--weights", "random", "-q"]
    code = (
        "import sys; from featcache.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "nothing to embed: about " in ran.stdout, ran.stderr
    assert ran.stdout.splitlines()[-1] == "False"


def test_nothing_is_written(photos: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    plan(photos, tmp_path / "s.h5", backbone=TOY)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_that_cannot_be_used_are_counted(photos: Path) -> None:
    (photos / "class0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    result = plan(photos, backbone=TOY)
    assert result.sample is not None
    assert result.sample.failed == 1
    assert "1 image of those seen cannot be used" in result.describe()


def test_the_json_has_the_documented_keys(photos: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, ["plan", str(photos), "--backbone", TOY, "--json", "-q"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert list(found) == [
        "rows", "to_embed", "known", "seconds", "steps", "images_per_second", "sample", "stages", "wall",
        "advice", "lower_precision", "disk_bytes", "disk_free_bytes", "memory_bytes", "network_bytes",
        "engine", "decoder", "device", "batch_size", "workers", "fingerprint", "store",
    ]  # fmt: skip
    assert list(found["steps"]) == ["listing", "loading", "comparing", "choosing", "embedding"]
    assert found["seconds"] == pytest.approx(sum(found["steps"].values()), abs=0.01)
    assert found["memory_bytes"] > 50e6  # no process with torch has less
    assert found["wall"] in found["stages"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "resnet81"], "resnet81"),
        (["--backbone", TOY, "--device", "toaster"], "toaster"),
        (["--backbone", TOY, "--node", "nowhere"], "nowhere"),
        (["--backbone", TOY, "--root", "."], "another root is for CSV manifests"),
    ],
)
def test_what_cannot_be_had_is_one_line(photos: Path, arguments: list[str], said: str) -> None:
    ran = CliRunner().invoke(main, ["plan", str(photos), *arguments])
    assert ran.exit_code == 1, ran.output
    (line,) = ran.stderr.splitlines()
    assert line.startswith("Error: ")
    assert said in line


def test_a_data_set_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, ["plan", str(tmp_path / "none"), "--backbone", TOY])
    assert ran.exit_code == 1
    assert "is not there" in ran.stderr


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"batch_size": 0}], ids=str)
def test_numbers_out_of_range_are_value_errors(photos: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan(photos, backbone=TOY, **wrong)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 4096])
def test_every_beginning_is_spread_over_all(count: int) -> None:
    order = spread(count)
    assert sorted(order) == list(range(count))
    if count >= 100:
        beginning = [*sorted(order[: count // 10]), count]
        gaps = [after - before for before, after in itertools.pairwise(beginning)]
        assert max(gaps) <= 30  # ten times as far apart as in an even spread would be 100


def test_stages_in_words_begin_with_the_wall() -> None:
    said = describe_stages({"decoding": 0.21, "forward": 0.78, "writing": 0.01})
    assert said == "the network is the wall: 78% of its threads' time; decoding 21%; writing 1%"
    assert describe_stages({"forward": 0.5}) == "the network is the wall: 50% of its threads' time"


def situation(wall: str = "forward", *, shrinkable: float = 0.0, **changes: Any) -> Situation:
    """One in which no advice applies but for what is changed."""
    stages = {"forward": 0.1, "decoding": 0.1, "reading": 0.1, wall: 0.8}
    calm = Situation(
        sample=Sample(images=100, seconds=1.0, stages=stages, shrinkable=shrinkable),
        seconds=60.0,
        device="cpu",
        best_device="cpu",
        precision="float32",
        lower=None,
        asked_engine=None,
        other_engines=("onnx",),
        lacks_onnx=False,
        decoder_is_free=False,
        scaled=False,
        workers=4,
        processors=4,
        goes_on=False,
    )
    return replace(calm, **changes)


def bfloat16(times_as_fast: float) -> LowerPrecision:
    near = Agreement(images=8, cosine=0.999994, difference=0.003)
    return LowerPrecision(precision="bfloat16", agreement=near, times_as_fast=times_as_fast)


CASES = [
    ("--device cuda", situation(best_device="cuda"), situation("decoding", best_device="cuda")),
    ("featcache[onnx]", situation(lacks_onnx=True), situation(lacks_onnx=True, precision="bfloat16")),
    (
        "--engine auto",
        situation(asked_engine="torch-eager"),
        situation(asked_engine="onnx", other_engines=()),
    ),
    (
        "--precision bfloat16",
        situation(device="cuda", best_device="cuda"),
        situation("decoding", device="cuda", best_device="cuda"),
    ),
    (
        "--precision bfloat16: the network 1.5 times as fast on this processor; other features (lowest "
        "cosine 0.999994 over 8 images), another fingerprint",
        situation(lower=bfloat16(1.5)),
        situation(lower=bfloat16(1.1)),
    ),
    ("--decoder fast", situation("decoding", decoder_is_free=True), situation(decoder_is_free=True)),
    (
        "--jpeg-scaled: 75%",
        situation("decoding", shrinkable=0.75),
        situation("decoding", shrinkable=0.75, scaled=True),
    ),
    (
        "--workers 8",
        situation("decoding", device="cuda", best_device="cuda", processors=8),
        situation("forward", device="cuda", best_device="cuda", precision="bfloat16", processors=8),
    ),
    ("80% of their time", situation("reading"), situation("decoding")),
    ("--shard", situation(seconds=3600.0), situation(seconds=60.0)),
]


@pytest.mark.parametrize(("said", "applies", "otherwise"), CASES, ids=[case[0] for case in CASES])
def test_an_advice_is_given_where_it_applies(said: str, applies: Situation, otherwise: Situation) -> None:
    (found,) = advise(applies)
    assert said in found
    assert not advise(otherwise)


@pytest.mark.parametrize(
    "applies",
    [
        situation(device="cuda", best_device="cuda"),
        situation(lower=bfloat16(1.5)),
        situation("decoding", shrinkable=0.75),
    ],
    ids=["on cuda", "on processors", "scaled"],
)
def test_other_features_are_for_another_store_than_the_one_there_is(applies: Situation) -> None:
    (anew,), (there,) = advise(applies), advise(replace(applies, goes_on=True))
    assert there == f"{anew}; not in this store: name a new -o, all images are embedded anew"


def test_what_a_store_can_go_on_with_is_advised_as_ever() -> None:
    applies = situation("decoding", decoder_is_free=True)
    assert advise(replace(applies, goes_on=True)) == advise(applies)


def test_every_advice_has_a_case() -> None:
    assert len(CASES) == len(ADVICE)


def test_shrinking_is_advised_only_for_jpegs_that_would_be_shrunk(
    tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    for name, size in (("small.jpg", (31, 40)), ("large.jpg", (32, 40)), ("large.png", (32, 40))):
        save_image(tmp_path / name.replace(".", "_") / "c" / name, size=size)
        result = plan(tmp_path / name.replace(".", "_"), backbone=TOY)
        assert result.sample is not None
        assert result.sample.shrinkable == (name == "large.jpg")
