"""`verify`: every kind of disagreement is named, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import make_toy_store, write_toy_blocks

from featcache import embedding
from featcache.commands.embed import embed
from featcache.commands.verify import VerifyResult, verify
from featcache.errors import DamagedStore, DataError, StoreError
from featcache.store.blocks import BlockState
from featcache.store.layout import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

TOY = "channel_mean:channel_mean"


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    for i in range(10):
        save_image(tmp_path / "photos" / f"c{i % 2}" / f"{i}.png", seed=i)
    return tmp_path / "photos"


@pytest.fixture
def store(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten rows in blocks of 4; rows 0 to 4 are photos/c0/{0,2,4,6,8}.png."""
    monkeypatch.setattr(embedding, "BLOCK_ROWS", 4)
    embed(photos, tmp_path / "s.h5", backbone=TOY, batch_size=4)
    return tmp_path / "s.h5"


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_sound_store_is_sound(store: Path) -> None:
    result = verify(store)
    assert (result.sound, result.rows, result.blocks, result.damaged) == (True, 10, 3, ())
    assert result.bytes == store.stat().st_size
    assert result.describe().endswith("\nsound")


@pytest.mark.parametrize(
    ("region", "state"),
    [
        ("features", BlockState.BAD_FEATURES),
        ("row_status", BlockState.BAD_COLUMNS),
        ("sources", BlockState.BAD_COLUMNS),
        ("blocks", BlockState.BAD_RECORD),
    ],
)
def test_damage_is_named_by_rows_and_ids(store: Path, region: str, state: BlockState) -> None:
    layout = read_layout(store)
    where = layout.features["penultimate"] if region == "features" else getattr(layout, region)
    first = 1 if region == "blocks" else 5
    overwrite(store, where.offset + first * where.row_bytes, b"\x07")
    result = verify(store)
    assert not result.sound
    (damage,) = result.damaged
    assert (damage.first, damage.last, damage.why) == (4, 7, state.value)
    assert (damage.first_id, damage.last_id) == ("c0/8.png", "c1/5.png")
    assert "rows 4-7 (c0/8.png … c1/5.png)" in result.describe()
    assert "featcache repair" in result.describe()


def test_damage_of_the_structure_is_an_error(store: Path) -> None:
    overwrite(store, 100, b"\xaa\xbb\xcc")
    with pytest.raises(StoreError, match="damaged"):
        verify(store)


def test_a_block_the_disk_does_not_give_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region = read_layout(store).features["penultimate"]
    plain, bad = os.preadv, region.offset + 5 * region.row_bytes

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= bad < offset + len(buffers[0]):
            raise OSError(5, "Input/output error")
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    (damage,) = verify(store).damaged
    assert (damage.first, damage.why) == (4, BlockState.UNREADABLE.value)
    with pytest.raises(DamagedStore, match="rows 4-7"):
        FeatureStore.open(store)


def test_pending_rows_are_counted_and_are_no_damage(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=10, fill=False)
    write_toy_blocks(path, range(1, 2))
    result = verify(path)
    assert (result.sound, result.pending) == (True, 6)
    assert "6 rows are not embedded yet" in result.describe()


def test_sources_names_an_edit_that_keeps_size_and_mtime_and_a_missing_image(
    store: Path, photos: Path
) -> None:
    assert verify(store, sources=True).sources is not None
    assert verify(store, sources=True).sound
    edited = photos / "c0" / "2.png"
    stat = edited.stat()
    raw = bytearray(edited.read_bytes())
    raw[-20] ^= 1
    edited.write_bytes(raw)
    os.utime(edited, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (photos / "c1" / "3.png").unlink()
    result = verify(store, sources=True)
    assert not result.sound
    assert result.sources is not None
    assert result.sources.same == 8
    assert dict(result.sources.differ) == {
        "c0/2.png": "its bytes are not those that were embedded",
        "c1/3.png": "the file is not there",
    }


def test_recompute_agrees_with_an_honest_store(store: Path) -> None:
    result = verify(store, recompute=5, backbone=TOY, batch_size=4)
    assert result.sound
    assert result.recomputed is not None
    assert (result.recomputed.rows, result.recomputed.largest_difference) == (5, 0.0)
    assert verify(store, recompute=500, backbone=TOY).recomputed.rows == 10  # type: ignore[union-attr]


def test_recompute_finds_features_that_only_their_checksum_vouches_for(store: Path, photos: Path) -> None:
    opened = FeatureStore.open(store)
    rows = opened.layout.rows_of(1)
    forged = np.array(opened.map()[rows])
    forged[2] = forged[2][::-1] * [1, -1, 1]
    with StoreWriter(opened.layout) as writer:
        writer.write_block(
            1,
            features={"penultimate": forged},
            row_status=np.array(opened.row_status[rows]),
            sources=np.array(opened.sources[rows]),
        )
    (photos / "c0" / "0.png").write_bytes(b"another image")
    assert verify(store).sound
    result = verify(store, recompute=10, backbone=TOY)
    assert not result.sound
    assert result.recomputed is not None
    assert [path for path, _, _ in result.recomputed.disagree] == ["c1/3.png"]
    assert dict(result.recomputed.left_out).keys() == {"c0/0.png"}
    assert "disagrees: c1/3.png: |Δ|" in result.describe()


def test_code_a_store_names_is_run_only_when_it_is_repeated(store: Path) -> None:
    with pytest.raises(StoreError, match=f"--backbone {TOY}"):
        verify(store, recompute=1)


def test_images_that_have_moved_are_asked_for(store: Path, photos: Path) -> None:
    moved = photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(DataError, match="not there.*--data"):
        verify(store, sources=True)
    result: VerifyResult = verify(store, sources=True, data=moved)
    assert result.sound
