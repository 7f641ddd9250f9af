"""`verify`: every kind of disagreement is named, and nothing else is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_toy_store, write_toy_blocks

from featcache import embedding
from featcache.commands.embed import embed
from featcache.commands.verify import VerifyResult, _compare, verify
from featcache.engines.torch_eager import TorchEager
from featcache.errors import DamagedStore, DataError, StoreError
from featcache.store.blocks import BlockState
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter
from featcache.verification import OtherImages

TOY = "channel_mean:channel_mean"


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    return save_images(10, lambda i: f"c{i % 2}/{i}.png")


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
    assert "6 rows not embedded yet; unless a run is writing the store now" in result.describe()
    assert result.describe().endswith("\nsound so far, 6 rows pending")
    assert result.to_json()["verdict"] == "pending"


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
    (photos / "c1" / "5.png").unlink()
    (photos / "c1" / "5.png").mkdir()
    result = verify(store, sources=True)
    assert (result.sound, result.verdict) == (False, "images differ")
    assert result.sources is not None
    assert (result.sources.same, result.sources.not_compared) == (7, 0)
    assert result.sources.other == OtherImages(
        changed=["c0/2.png"], missing=["c1/3.png"], unreadable=[("c1/5.png", "not a regular file")]
    )
    said = result.describe().splitlines()
    assert said[2:6] == [
        "3 images not as embedded:",
        "  missing: c1/3.png",
        "  changed: c0/2.png",
        "  unreadable: c1/5.png: not a regular file",
    ]
    assert "pass --data DATA" in said[6]
    assert "featcache explain" in said[6]
    assert said[7:] == ["sound, but not what the images are now"]


def test_a_damaged_store_is_not_called_one_whose_images_differ(store: Path, photos: Path) -> None:
    region = read_layout(store).features["penultimate"]
    overwrite(store, region.offset + 5 * region.row_bytes, b"\x07")
    (photos / "c0" / "2.png").unlink()
    result = verify(store, sources=True)
    assert result.to_json()["verdict"] == "damaged"
    assert result.describe().endswith("\ndamaged")
    assert result.sources is not None
    assert (result.sources.same, result.sources.not_compared, len(result.sources.other)) == (5, 4, 1)
    assert "4 rows not compared with the image: damaged, pending, or failed" in result.describe()


def test_a_row_whose_image_was_never_read_is_not_compared(photos: Path, tmp_path: Path) -> None:
    (photos / "c0" / "0.png").unlink()
    (photos / "c0" / "0.png").symlink_to("nowhere")
    embed(photos, tmp_path / "s.h5", backbone=TOY)
    result = verify(tmp_path / "s.h5", sources=True)
    assert result.sound
    assert "1 row without features, as recorded" in result.describe()
    assert "1 row not compared with the image" in result.describe()
    assert "9 images as embedded" in result.describe()


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
    assert result.recomputed.other == OtherImages(changed=["c0/0.png"])
    assert "disagrees: c1/3.png: |Δ|" in result.describe()


@pytest.mark.parametrize("factor", [2.0, np.nan, np.inf])
def test_recompute_finds_answers_that_are_longer_or_no_numbers(
    store: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Trap: the cosine of twice a vector is 1, and of NaN nothing is smaller."""
    plain = TorchEager.embed

    def other(self: TorchEager, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {key: array * np.float32(factor) for key, array in plain(self, pixels).items()}

    monkeypatch.setattr(TorchEager, "embed", other)
    result = verify(store, recompute=10, backbone=TOY)
    assert (result.sound, result.verdict) == (False, "features differ")
    assert result.describe().endswith("\nsound, but not what the network gives now")
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))["recomputed"]
    assert len(found["disagree"]) == 10
    assert (found["largest_difference"] is None) == (factor != 2.0)


def test_what_one_of_two_nodes_cannot_answer_is_a_disagreement(tmp_path: Path) -> None:
    store = FeatureStore.open(make_toy_store(tmp_path / "s.h5", n=4))
    fine = {key: store.map(key)[1] for key in store.layout.features}
    assert _compare(store, 1, fine).is_small
    for key in fine:
        distance = _compare(store, 1, {**fine, key: fine[key] * np.float32(np.nan)})
        assert not distance.is_small
        assert np.isnan([distance.largest, distance.cosine, distance.of_length]).all()


@pytest.mark.parametrize("away", ["missing", "changed"])
def test_recompute_that_compared_nothing_is_not_sound(store: Path, photos: Path, away: str) -> None:
    for path in photos.rglob("*.png"):
        if away == "missing":
            path.unlink()
        else:
            path.write_bytes(b"no picture")
    result = verify(store, recompute=3, backbone=TOY)
    assert (result.sound, result.verdict) == (False, "images differ")
    assert result.recomputed is not None
    assert len(getattr(result.recomputed.other, away)) == 3
    assert result.recomputed.lowest_cosine is None
    assert "0 rows embedded again and compared\n3 rows not compared, the image not" in result.describe()


def test_names_are_shown_on_one_line_and_kept_in_json(photos: Path, tmp_path: Path) -> None:
    odd = (photos / "c0" / "0.png").rename(photos / "c0" / "a\n\x1b[31m.png")
    embed(photos, tmp_path / "s.h5", backbone=TOY)
    odd.unlink()
    result = verify(tmp_path / "s.h5", sources=True)
    assert result.to_json()["sources"]["other"]["missing"] == ["c0/a\n\x1b[31m.png"]
    assert "  missing: c0/a\\n\\x1b[31m.png\n" in result.describe()


def test_a_store_removed_while_it_is_verified_is_still_measured(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, size = FeatureStore.inspect, store.stat().st_size

    def inspect(self: FeatureStore) -> list[BlockState]:
        store.unlink()
        return plain(self)

    monkeypatch.setattr(FeatureStore, "inspect", inspect)
    assert verify(store).bytes == size


def test_a_rate_is_said_of_what_is_long_enough_to_have_one() -> None:
    small = VerifyResult(
        store="s.h5", rows=1, blocks=1, bytes=49_000_000, seconds=0.5, damaged=(), pending=0, failed=0
    )
    assert small.describe().splitlines()[0] == "s.h5: 1 row in 1 block, 49.0 MB checked in 0.50 s"
    assert "100.0 MB checked in 0.50 s (0.2 GB/s)" in replace(small, bytes=100_000_000).describe()


def test_code_a_store_names_is_run_only_when_it_is_repeated(store: Path) -> None:
    with pytest.raises(StoreError, match=f"--backbone {TOY}"):
        verify(store, recompute=1)


def test_images_that_have_moved_are_asked_for(store: Path, photos: Path) -> None:
    moved = photos.rename(photos.with_name("elsewhere"))
    with pytest.raises(DataError, match="not there.*--data"):
        verify(store, sources=True)
    result: VerifyResult = verify(store, sources=True, data=moved)
    assert result.sound


def test_fewer_than_no_rows_are_not_embedded_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 rows or more"):
        verify(make_toy_store(tmp_path / "s.h5", n=3), recompute=-1)
