"""Several stores from one pass over the images, and several views of each image in one store."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from featcache import pipeline
from featcache.cli import main
from featcache.commands.embed import embed, embed_together
from featcache.commands.fit import fit
from featcache.commands.info import info
from featcache.commands.predict import predict
from featcache.commands.repair import repair
from featcache.commands.verify import verify
from featcache.errors import SpecMismatch, StoreError, TooManyFailures, UnknownBackbone
from featcache.progress import SilentProgress
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

MEAN, CONVOLUTION = "channel_mean:channel_mean", "killed_backbone:backbone"
# Blocks of 64 rows; the decoder is named, so that both stores share a pass.
PLAIN: dict[str, Any] = {"batch_size": 4, "workers": 2, "decoder": "exact", "engine": "torch-eager"}


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """80 images of two classes, whose place in their folder is not that of their name."""
    for i in range(80):
        save_image(tmp_path / "photos" / f"c{i % 2}" / f"{i:02d}.png", seed=i, size=(30, 20 + i % 5))
    return tmp_path / "photos"


def rows(path: Path, *, view: int = 0) -> np.ndarray:
    return np.array(FeatureStore.open(path).features(view=view).X)


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, Path]:
    return {MEAN: tmp_path / "mean.h5", CONVOLUTION: tmp_path / "convolution.h5"}


def test_each_image_is_decoded_once_and_each_store_is_that_of_a_run_of_its_own(
    photos: Path, stores: dict[str, Path], tmp_path: Path, decoded: list[str]
) -> None:
    results = embed_together(photos, stores, **PLAIN)
    assert [(result.rows, result.embedded) for result in results] == [(80, 80)] * 2
    assert sorted(decoded) == sorted(f"{i:02d}.png" for i in range(80))
    for backbone, store in stores.items():
        alone = tmp_path / "alone.h5"
        alone.unlink(missing_ok=True)
        embed(photos, alone, backbone=backbone, **PLAIN)
        assert rows(store).tobytes() == rows(alone).tobytes()
        assert FeatureStore.open(store).fingerprint == FeatureStore.open(alone).fingerprint


def test_stores_that_lack_other_rows_get_just_those(
    photos: Path, stores: dict[str, Path], decoded: list[str], save_image: Callable[..., Path]
) -> None:
    embed(photos, stores[MEAN], backbone=MEAN, **PLAIN)
    (photos / "c0" / "00.png").unlink()
    save_image(photos / "c0" / "a.png", seed=100)
    decoded.clear()
    first, second = embed_together(photos, stores, **PLAIN)
    assert (first.embedded, first.reused, first.removed) == (1, 79, 1)
    assert (second.embedded, second.reused) == (80, 0)
    assert sorted(decoded) == sorted([*(f"{i:02d}.png" for i in range(1, 80)), "a.png"])
    assert FeatureStore.open(stores[MEAN]).table.ids == FeatureStore.open(stores[CONVOLUTION]).table.ids
    decoded.clear()
    assert [result.embedded for result in embed_together(photos, stores, **PLAIN)] == [0, 0]
    assert decoded == []


def test_stores_with_other_decoders_get_a_pass_each(
    photos: Path, stores: dict[str, Path], decoded: list[str], save_image: Callable[..., Path]
) -> None:
    embed(photos, stores[MEAN], backbone=MEAN, **{**PLAIN, "decoder": "fast"})
    embed(photos, stores[CONVOLUTION], backbone=CONVOLUTION, **PLAIN)
    save_image(photos / "c0" / "a.png", seed=100)
    decoded.clear()
    results = embed_together(photos, stores, batch_size=4)
    assert [result.embedded for result in results] == [1, 1]
    assert decoded == ["a.png", "a.png"]
    assert [FeatureStore.open(path).provenance["decoder"] for path in stores.values()] == ["fast", "exact"]


def test_what_stops_one_store_keeps_what_all_have(photos: Path, stores: dict[str, Path]) -> None:
    embed(photos, stores[MEAN], backbone=MEAN, nodes=("penultimate",), **PLAIN)
    with pytest.raises(SpecMismatch, match="holds channel_mean:channel_mean features"):
        embed_together(photos, {CONVOLUTION: stores[MEAN]}, **PLAIN)
    with pytest.raises(UnknownBackbone):
        embed_together(photos, {**stores, "resnet5": stores[MEAN].with_name("r.h5")}, **PLAIN)
    assert not stores[CONVOLUTION].exists()
    for i in range(3):
        (photos / "c0" / f"0{i}_bad.png").write_bytes(b"bad")
    with pytest.raises(TooManyFailures, match="3 of 83 images failed"):
        embed_together(photos, stores, **PLAIN)
    results = embed_together(photos, stores, max_failures=0.1, **PLAIN)
    assert [result.failed for result in results] == [3, 3]
    assert results[0].reused == 80
    assert not list(stores[MEAN].parent.glob("*.lock"))


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The images come in few at a time, so that a block is in progress at the third time or fourth."""
    monkeypatch.setattr(pipeline, "PICTURES_AHEAD", 1)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_an_interrupt_finishes_the_block_of_each_store_and_says_what_is_kept(
    photos: Path, stores: dict[str, Path], ctrl_c: None
) -> None:
    class Once(SilentProgress):
        advances = 0

        def advance(self, count: int, **_: object) -> None:
            self.advances += 1
            if self.advances == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        embed_together(photos, stores, progress=Once(), **PLAIN)
    for store, note in zip(stores.values(), raised.value.__notes__, strict=True):
        assert FeatureStore.open(store).done.sum() == 64
        assert note == f"{store}: 64 of 80 rows are kept; run the same command again to go on"
    assert [result.embedded for result in embed_together(photos, stores, **PLAIN)] == [16, 16]


def test_an_interrupt_does_not_wait_for_a_store_that_is_filled_already(
    photos: Path, stores: dict[str, Path], ctrl_c: None, decoded: list[str], save_image: Callable[..., Path]
) -> None:
    embed(photos, stores[MEAN], backbone=MEAN, **PLAIN)
    save_image(photos / "c0" / "00_new.png", seed=1)
    for i in range(200):
        (photos / "c1" / f"z{i:03d}.png").write_bytes((photos / "c0" / "00.png").read_bytes())
    decoded.clear()

    class Once(SilentProgress):
        advances = 0

        def advance(self, count: int, **_: object) -> None:
            self.advances += 1
            if self.advances == 4:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        embed_together(photos, stores, progress=Once(), **PLAIN)
    assert FeatureStore.open(stores[CONVOLUTION]).done.sum() == 64
    assert len(decoded) < 140


@pytest.mark.parametrize(
    ("outputs", "weights", "said"),
    [
        ({}, None, "a store of its own"),
        ({MEAN: "a.h5", CONVOLUTION: "./a.h5"}, None, "a store of its own"),
        ({MEAN: "a.h5", CONVOLUTION: "b.h5"}, "w.pth", "a weights file is of one backbone"),
    ],
)
def test_what_makes_no_sense_together_is_a_mistake_of_the_caller(
    photos: Path, outputs: dict[str, str], weights: str | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        embed_together(photos, outputs, weights=weights)


class TestCommandLine:
    def run(self, photos: Path, *arguments: str) -> Any:
        options = ("--batch-size", "4", "-q")
        return CliRunner().invoke(main, ["embed", str(photos), *arguments, *options])

    def test_the_backbones_name_goes_into_the_stores(self, photos: Path, tmp_path: Path) -> None:
        output = str(tmp_path / "x.{backbone}.h5")
        ran = self.run(photos, "-o", output, "--backbone", MEAN, "--backbone", CONVOLUTION, "--json")
        assert ran.exit_code == 0, ran.output
        answers = json.loads(ran.stdout)["stores"]
        names = ["x.channel_mean.channel_mean.h5", "x.killed_backbone.backbone.h5"]
        assert [Path(answer["store"]).name for answer in answers] == names
        assert all((tmp_path / name).exists() for name in names)

    def test_one_backbone_answers_as_ever(self, photos: Path, tmp_path: Path) -> None:
        ran = self.run(photos, "-o", str(tmp_path / "{backbone}.h5"), "--backbone", MEAN, "--json")
        assert json.loads(ran.stdout)["store"] == str(tmp_path / "channel_mean.channel_mean.h5")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("-o", "a.h5"), "2 backbones need a store each: write {backbone}"),
            (("-o", "{backbone}.h5", "--weights", "w.pth"), "--weights FILE is of one backbone"),
            (("-o", "{backbone}.h5", "--backbone", "channel_mean.channel_mean"), "would have one store"),
        ],
    )
    def test_two_backbones_in_one_store_are_wrong_usage(
        self, photos: Path, arguments: tuple[str, ...], said: str
    ) -> None:
        ran = self.run(photos, *arguments, "--backbone", MEAN, "--backbone", CONVOLUTION)
        assert ran.exit_code == 2
        assert said in " ".join(ran.output.split())


class TestViews:
    @pytest.fixture
    def store(self, photos: Path, tmp_path: Path) -> Path:
        embed(photos, tmp_path / "views.h5", backbone=CONVOLUTION, views=3, seed=5, **PLAIN)
        return tmp_path / "views.h5"

    def test_the_first_view_is_the_plain_one_and_the_others_differ(
        self, photos: Path, store: Path, tmp_path: Path
    ) -> None:
        embed(photos, tmp_path / "plain.h5", backbone=CONVOLUTION, **PLAIN)
        assert rows(store).tobytes() == rows(tmp_path / "plain.h5").tobytes()
        views = [rows(store, view=view) for view in range(3)]
        assert len({view.tobytes() for view in views}) == 3
        assert FeatureStore.open(store).fingerprint != FeatureStore.open(tmp_path / "plain.h5").fingerprint
        with pytest.raises(StoreError, match="has no view 3; it holds 3 views, counted from 0"):
            rows(store, view=3)

    def test_a_view_depends_on_the_image_and_the_seed_alone(
        self, photos: Path, store: Path, tmp_path: Path, save_image: Callable[..., Path]
    ) -> None:
        before = dict(zip(FeatureStore.open(store).table.ids, rows(store, view=2).tolist(), strict=True))
        (photos / "c0" / "00.png").rename(photos / "c1" / "zz.png")
        save_image(photos / "c0" / "01_new.png", seed=200)
        fresh = tmp_path / "fresh.h5"
        embed(photos, fresh, backbone=CONVOLUTION, views=3, seed=5, **PLAIN)
        after = dict(zip(FeatureStore.open(fresh).table.ids, rows(fresh, view=2).tolist(), strict=True))
        assert after["c1/zz.png"] == before["c0/00.png"]
        assert after["c1/03.png"] == before["c1/03.png"]
        other = tmp_path / "other.h5"
        embed(photos, other, backbone=CONVOLUTION, views=3, seed=6, **PLAIN)
        assert rows(other).tobytes() == rows(fresh).tobytes()
        assert rows(other, view=1).tobytes() != rows(fresh, view=1).tobytes()

    def test_a_store_of_other_views_is_refused(self, photos: Path, store: Path) -> None:
        with pytest.raises(SpecMismatch, match="views is 3, not 2"):
            embed(photos, store, backbone=CONVOLUTION, views=2, seed=5, **PLAIN)
        with pytest.raises(SpecMismatch, match="views_seed is 5, not 6"):
            embed(photos, store, backbone=CONVOLUTION, views=3, seed=6, **PLAIN)

    def test_a_growth_takes_all_views_over(
        self, photos: Path, store: Path, decoded: list[str], save_image: Callable[..., Path]
    ) -> None:
        before = [rows(store, view=view) for view in range(3)]
        save_image(photos / "c1" / "zzz.png", seed=300)
        assert embed(photos, store, backbone=CONVOLUTION, views=3, seed=5, **PLAIN).embedded == 1
        assert decoded == ["zzz.png"]
        for view in range(3):
            np.testing.assert_array_equal(rows(store, view=view)[:80], before[view])

    def test_the_other_verbs_know_views(self, photos: Path, store: Path, tmp_path: Path) -> None:
        again = verify(store, sources=True, recompute=5, backbone=CONVOLUTION).recomputed
        assert again is not None
        assert (again.rows, again.largest_difference) == (5, 0.0)
        assert "penultimate" in info(store).describe()
        fit(store, tmp_path / "m.model", head="ncm")
        answers = predict(tmp_path / "m.model", [photos / "c0"], backbone=CONVOLUTION).predictions
        assert len(answers) == 40
        good = [rows(store, view=view) for view in range(3)]
        with open(store, "r+b") as file:
            file.seek(read_layout(store).features["penultimate@2"].offset)
            file.write(b"\xff\x00\xff")
        assert repair(store, backbone=CONVOLUTION).embedded == 64
        for view in range(3):
            np.testing.assert_array_equal(rows(store, view=view), good[view])
