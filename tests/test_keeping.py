"""Cached rows are not lost by a mistake: another folder for a store is refused before anything is touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_embed import TOY, no_decoding, stop_after
from test_salvage import flip_in

from featcache.cli import main
from featcache.commands.embed import EmbedResult, embed, embed_together
from featcache.errors import DataError
from featcache.sharding import Shard
from featcache.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("small_blocks")

ROWS = 12
REFUSED = r"rows with features in .* are of images that are not in .*--output .* or pass --prune"


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    """Two classes of six images."""
    return save_images(ROWS, lambda i: f"c{i // 6}/{i:02d}.png")


@pytest.fixture
def others(save_images: Callable[..., Path]) -> Path:
    return save_images(ROWS, lambda i: f"c{i // 6}/other{i:02d}.png", folder="others", seed=100)


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> Path:
    embed_it(photos, tmp_path / "s.h5")
    return tmp_path / "s.h5"


def embed_it(data: Path, store: Path, **options: Any) -> EmbedResult:
    how: dict[str, Any] = {
        "backbone": TOY,
        "batch_size": 4,
        "workers": 1,
        "decoder": "exact",
        "engine": "torch-eager",
    }
    return embed(data, store, **{**how, **options})


def remove(photos: Path, *numbers: int) -> None:
    for i in numbers:
        (photos / f"c{i // 6}" / f"{i:02d}.png").unlink()


def test_another_folder_is_refused_before_anything_is_touched(
    others: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, there = store.read_bytes(), sorted(path.name for path in store.parent.iterdir())
    no_decoding(monkeypatch)
    with pytest.raises(DataError, match=f"12 of the 12 {REFUSED}") as refused:
        embed_it(others, store)
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match=REFUSED):
        embed_it(others, store, dry_run=True)
    assert store.read_bytes() == kept
    assert sorted(path.name for path in store.parent.iterdir()) == there


def test_prune_removes_them(others: Path, store: Path) -> None:
    result = embed_it(others, store, prune=True)
    assert (result.rows, result.embedded, result.removed) == (ROWS, ROWS, ROWS)


def test_the_command_says_so_in_one_line(others: Path, store: Path) -> None:
    command = ["embed", str(others), "-o", str(store), "--backbone", TOY, "-q"]
    refused = CliRunner().invoke(main, command)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "--prune" in refused.stderr
    assert CliRunner().invoke(main, [*command, "--prune"]).exit_code == 0


@pytest.mark.parametrize("gone", [1, 5])
def test_less_than_half_of_the_images_are_removed_as_ever(photos: Path, store: Path, gone: int) -> None:
    remove(photos, *range(gone))
    assert embed_it(photos, store).removed == gone


def test_one_of_two_equal_classes_is_refused(photos: Path, store: Path) -> None:
    with pytest.raises(DataError, match=f"6 of the 12 {REFUSED}"):
        embed_it(photos / "c1", store)


def test_new_images_do_not_make_up_for_those_that_are_gone(photos: Path, others: Path, store: Path) -> None:
    remove(photos, *range(6))
    shutil.copytree(others, photos, dirs_exist_ok=True)
    with pytest.raises(DataError, match=f"6 of the 12 {REFUSED}"):
        embed_it(photos, store)


def test_a_part_of_the_data_set_is_refused_by_what_it_lacks(photos: Path, store: Path) -> None:
    remove(photos, 11)  # so that one class is more than half
    embed_it(photos, store)
    result = embed_it(photos / "c0", store, dry_run=True)
    assert result.reused == 6
    assert "6 rows lose their label: 00.png, 01.png, 02.png and 3 more" in result.notes
    with pytest.raises(DataError, match=f"6 of the 11 {REFUSED}"):
        embed_it(photos / "c1", store)


def test_one_split_of_a_data_set_is_refused_however_large(
    save_images: Callable[..., Path], tmp_path: Path
) -> None:
    data = save_images(ROWS, lambda i: f"{'val' if i < 3 else 'train'}/c{i % 2}/{i:02d}.png")
    store = tmp_path / "s.h5"
    embed_it(data, store)
    with pytest.raises(DataError, match=f"3 of the 12 {REFUSED}") as refused:
        embed_it(data / "train", store)
    assert "would lose their splits" in str(refused.value)
    assert FeatureStore.open(store).features().splits is not None
    shutil.rmtree(data / "val")
    assert embed_it(data, store).removed == 3  # the others are in train as before
    assert embed_it(data / "train", store).removed == 0  # nothing but splits is lost, which is said


def test_a_moved_renamed_or_edited_data_set_loses_nothing(
    photos: Path, store: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "c0").rename(photos / "renamed")
    (photos / "c1").rename(photos / "too")
    moved = photos.rename(photos.with_name("moved"))
    with monkeypatch.context() as patch:
        no_decoding(patch)
        assert embed_it(moved, store).reused == ROWS
    for path in list(moved.rglob("*.png")):
        save_image(path, seed=int(path.stem) + 50)
    assert embed_it(moved, store).embedded == ROWS


def test_rows_that_have_no_features_are_no_loss(
    tmp_path: Path, others: Path, save_image: Callable[..., Path]
) -> None:
    for i in range(9):
        (tmp_path / "mixed" / "c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mixed" / "c" / f"{i}.png").write_bytes(b"no picture")
    save_image(tmp_path / "mixed" / "c" / "good.png")
    store = tmp_path / "m.h5"
    embed_it(tmp_path / "mixed", store, max_failures=1.0)
    for i in range(9):
        (tmp_path / "mixed" / "c" / f"{i}.png").unlink()
    assert embed_it(tmp_path / "mixed", store).removed == 9


def test_what_an_unfinished_store_or_growth_has_counts(
    photos: Path, others: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "unfinished.h5"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            embed_it(photos, unfinished)
    done = int(FeatureStore.open(unfinished).done.sum())
    with pytest.raises(DataError, match=f"{done} of the {done} {REFUSED}"):
        embed_it(others, unfinished)

    alone = shutil.copytree(photos, tmp_path / "alone")
    for i in range(3):  # 36 images more than the store has, so that what it has is the smaller part
        shutil.copytree(others, photos / f"more{i}", dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            embed_it(photos, store)
    with pytest.raises(DataError, match=f"{REFUSED}"):
        embed_it(alone, store)
    assert embed_it(photos, store).rows == 4 * ROWS


def test_a_store_with_a_broken_seal_keeps_its_rows(others: Path, photos: Path, store: Path) -> None:
    flip_in(store, "ids")
    with pytest.raises(DataError, match=f"12 of the 12 {REFUSED}"):
        embed_it(others, store)
    assert embed_it(photos, store).reused == ROWS


def test_one_store_of_several_refuses_for_all(others: Path, store: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.h5"
    with pytest.raises(DataError, match=REFUSED):
        embed_together(others, {"killed_backbone:backbone": second, TOY: store}, batch_size=4)
    assert not second.exists()


def test_a_rank_refuses_what_has_nothing_to_do_with_the_store(
    others: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_decoding(monkeypatch)
    with pytest.raises(DataError, match=f"12 of the 12 {REFUSED}"):
        embed_it(others, store, shard=Shard(index=0, count=2))
    assert not list(store.parent.glob("s.h5.shard*"))


def test_ranks_join_nothing_that_loses_most_of_the_store(photos: Path, others: Path, store: Path) -> None:
    remove(photos, 0, 3, 4, 5, 6, 9, 10, 11)  # of those that are left each rank has two
    shutil.copytree(others, photos, dirs_exist_ok=True)
    shards = [Shard(index=index, count=2) for index in range(2)]
    embed_it(photos, store, shard=shards[0])
    with pytest.raises(DataError, match=f"8 of the 12 {REFUSED}"):
        embed_it(photos, store, shard=shards[1])
    assert len(FeatureStore.open(store)) == ROWS
    joined = embed_it(photos, store, shard=shards[1], prune=True)
    assert (joined.rows, joined.removed) == (16, 8)


def test_a_shard_keeps_its_own_rows(photos: Path, others: Path, tmp_path: Path) -> None:
    store, shard = tmp_path / "parts.h5", Shard(index=0, count=2)
    embed_it(photos, store, shard=shard)
    with pytest.raises(DataError, match=REFUSED):
        embed_it(others, store, shard=shard)
