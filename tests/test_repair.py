"""`repair`: just the damaged, failed and pending rows are embedded again; the others keep every byte."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from featcache import pipeline
from featcache.backbones import load_backbone
from featcache.commands.embed import embed
from featcache.commands.repair import RepairResult, repair
from featcache.errors import (
    BackboneError,
    DamagedStore,
    DataError,
    NotAStore,
    StoreError,
    StoreLocked,
    TooManyFailures,
)
from featcache.images.decode import load_pictures
from featcache.records import RowStatus
from featcache.sharding import Shard
from featcache.spec import Picture
from featcache.store.creating import create_store
from featcache.store.layout import RECORD_DTYPE
from featcache.store.lock import write_lock
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

pytestmark = pytest.mark.usefixtures("small_blocks")

TOY = "channel_mean:channel_mean"
ROWS = 20  # in blocks of 8: 0-7, 8-15, 16-19


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    return save_images(ROWS, lambda i: f"class{i // 10}/{i:02d}.png")


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> Path:
    embed(photos, tmp_path / "s.h5", backbone=TOY, batch_size=4)
    return tmp_path / "s.h5"


def fix(store: Path, **options: object) -> RepairResult:
    return repair(store, **{"backbone": TOY, **options})  # type: ignore[arg-type]


def counts(result: RepairResult) -> dict[str, int]:
    names = (
        "embedded", "damaged", "pending", "failed_before", "failed", "other_bytes", "missing", "changed",
    )  # fmt: skip
    return {name: getattr(result, name) for name in names if getattr(result, name)}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def damage(path: Path, row: int) -> None:
    region = read_layout(path).features["penultimate"]
    overwrite(path, region.offset + row * region.row_bytes, b"\xff\x00\xff")


def forget(path: Path, block: int) -> None:
    """As if the block had never been written."""
    region = read_layout(path).blocks
    overwrite(path, region.offset + block * region.row_bytes, bytes(region.row_bytes))


def content(path: Path) -> tuple[bytes, bytes]:
    """All bytes of a store but the block records, and what those say but the order of writing."""
    layout = read_layout(path)
    raw = bytearray(path.read_bytes())
    records = layout.map(layout.blocks).copy()
    start = layout.blocks.offset
    raw[start : start + records.nbytes] = bytes(records.nbytes)
    said = [records[name].tobytes() for name in RECORD_DTYPE.names if name not in ("sequence", "record_crc")]
    return bytes(raw), b"".join(said)


def test_damaged_blocks_are_embedded_again_and_nothing_else(store: Path, decoded: list[str]) -> None:
    before, inode = content(store), store.stat().st_ino
    damage(store, 9)
    with pytest.raises(DamagedStore, match="featcache repair"):
        FeatureStore.open(store)
    assert counts(fix(store)) == {"embedded": 8, "damaged": 8}
    assert sorted(decoded) == [f"{i:02d}.png" for i in range(8, 16)]
    assert content(store) == before
    assert store.stat().st_ino == inode, "a copy was made"


def test_every_kind_of_block_damage_is_mended(store: Path) -> None:
    before, layout = content(store), read_layout(store)
    overwrite(store, layout.row_status.offset + 2, bytes([RowStatus.MISSING]))
    overwrite(store, layout.sources.offset + 17 * layout.sources.row_bytes, b"\x00\x01")
    overwrite(store, layout.blocks.offset + layout.blocks.row_bytes + 20, b"\x12")
    assert counts(fix(store)) == {"embedded": 20, "damaged": 20}
    assert content(store) == before


def test_pending_rows_are_embedded(store: Path) -> None:
    before = content(store)
    forget(store, 2)
    assert counts(fix(store)) == {"embedded": 4, "pending": 4}
    assert content(store) == before


def test_a_sound_store_is_left_alone_without_images_torch_or_permission(
    store: Path, photos: Path, decoded: list[str]
) -> None:
    before = store.read_bytes()
    photos.rename(photos.with_name("gone"))
    result = repair(store)
    assert counts(result) == {}
    assert (result.missing, result.changed) == (None, None)
    assert result.describe() == "nothing to repair: no block is damaged or pending, no row failed (20 rows)"
    assert (store.read_bytes(), decoded) == (before, [])


def test_failed_rows_are_embedded_once_their_image_can_be_used(
    photos: Path, tmp_path: Path, decoded: list[str], save_image: Callable[..., Path]
) -> None:
    store, bad = tmp_path / "s.h5", [photos / "class0" / "03.png", photos / "class1" / "12.png"]
    good = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(b"no picture")
    embed(photos, store, backbone=TOY, batch_size=4, max_failures=0.5)
    before = store.read_bytes()
    decoded.clear()
    failed = fix(store)
    assert (counts(failed), store.read_bytes(), decoded) == ({"failed": 2}, before, [])
    assert [path for path, _ in failed.failures] == ["class0/03.png", "class1/12.png"]
    assert failed.describe().splitlines()[0] == (
        "20 rows: no block is damaged or pending; 2 rows failed before and would fail again"
    )
    bad[1].write_bytes(good[1])
    mended = fix(store)
    assert (counts(mended), decoded) == ({"embedded": 1, "failed_before": 1, "failed": 1}, ["12.png"])
    bad[0].write_bytes(good[0])
    assert counts(fix(store)) == {"embedded": 1, "failed_before": 1}
    calm = tmp_path / "calm.h5"
    embed(photos, calm, backbone=TOY, batch_size=4)
    for mine, theirs in ((FeatureStore.open(store), FeatureStore.open(calm)),):
        np.testing.assert_array_equal(mine.map(), theirs.map())
        np.testing.assert_array_equal(mine.sources, theirs.sources)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm.h5", "photos", "s.h5"]


def test_a_failed_row_and_a_damaged_block_are_mended_together(
    photos: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    store, bad = tmp_path / "s.h5", photos / "class0" / "03.png"
    bad.write_bytes(b"no picture")
    embed(photos, store, backbone=TOY, batch_size=4)
    save_image(bad, seed=3)
    damage(store, 17)
    forget(store, 1)
    assert counts(fix(store)) == {"embedded": 13, "damaged": 4, "pending": 8, "failed_before": 1}
    assert FeatureStore.open(store).features().X.shape == (20, 3)


def test_rows_too_large_for_float16_are_not_tried_over_and_over(photos: Path, tmp_path: Path) -> None:
    from featcache.engines.torch_eager import TorchEager

    plain = TorchEager.embed

    def huge(self: TorchEager, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {key: array * 0 + 1e6 for key, array in plain(self, pixels).items()}

    store = tmp_path / "s.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEager, "embed", huge)
        embed(photos, store, backbone=TOY, store_dtype="float16", max_failures=1.0)
    before = store.read_bytes()
    assert counts(repair(store)) == {"failed": 20}
    assert store.read_bytes() == before


def test_sound_rows_stay_as_they_are_whatever_became_of_their_image(
    store: Path, photos: Path, save_image: Callable[..., Path]
) -> None:
    save_image(photos / "class0" / "01.png", seed=101)
    (photos / "class0" / "02.png").unlink()
    old = FeatureStore.open(store).map().copy()
    damage(store, 19)
    result = fix(store)
    assert counts(result) == {"embedded": 4, "damaged": 4, "missing": 1, "changed": 1}
    assert "  1 sound row left alone whose image is not there\n" in result.describe()
    assert "  1 sound row left alone whose image has not the recorded size" in result.describe()
    np.testing.assert_array_equal(FeatureStore.open(store).map(), old)


def test_an_image_of_a_damaged_block_that_changed_is_embedded_as_it_is(
    store: Path, photos: Path, save_image: Callable[..., Path]
) -> None:
    save_image(photos / "class1" / "19.png", seed=119)
    (photos / "class1" / "18.png").unlink()
    damage(store, 17)
    result = fix(store)
    assert counts(result) == {"embedded": 3, "damaged": 4, "failed": 1, "other_bytes": 1}
    assert (
        "1 row of damaged blocks embedded from an image that is not the recorded one (first: class1/19.png)"
        in result.describe()
    )
    again = embed(photos, store, backbone=TOY)
    assert (again.embedded, again.reused, again.removed) == (0, 19, 1)


def test_a_dry_run_counts_and_writes_nothing(store: Path, tmp_path: Path) -> None:
    damage(store, 0)
    before = store.read_bytes()
    result = repair(store, dry_run=True)
    assert counts(result) == {"embedded": 8, "damaged": 8}
    assert "8 to embed again (8 of damaged blocks)" in result.describe()
    assert store.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "s.h5"]
    assert (result.to_json()["dry_run"], fix(store).to_json()["dry_run"]) == (True, False)


def test_json_has_just_the_documented_keys(store: Path) -> None:
    assert list(json.loads(json.dumps(repair(store).to_json()))) == [
        "rows", "embedded", "damaged", "pending", "failed_before", "failed", "other_bytes",
        "missing", "changed", "seconds", "fingerprint", "store", "dry_run",
    ]  # fmt: skip


def test_images_that_moved_are_named_by_the_user(store: Path, photos: Path) -> None:
    before = content(store)
    moved = photos.rename(photos.with_name("moved"))
    damage(store, 0)
    with pytest.raises(DataError, match=r"its images were in .*photos, which is not there.*--data DATA"):
        fix(store)
    with pytest.raises(DataError, match="should be in .*nowhere, which is not there") as wrong:
        fix(store, data=photos.with_name("nowhere"))
    assert "Pass where they are now" not in str(wrong.value)
    (photos.with_name("empty")).mkdir()
    with pytest.raises(DataError, match=r"images to embed again \(8, first class0/00.png\) is in .*empty"):
        fix(store, data=photos.with_name("empty"))
    assert counts(fix(store, data=moved)) == {"embedded": 8, "damaged": 8}
    assert content(store) == before


def test_images_of_a_manifest_are_found_below_its_root(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    manifest, store = tmp_path / "lists" / "all.csv", tmp_path / "m.h5"
    manifest.write_text("path,label\nclass0/00.png,a\nclass1/10.png,b\n")
    embed(manifest, store, backbone=TOY, root=photos)
    manifest.unlink()  # the store's ids say which images there are
    damage(store, 0)
    assert counts(fix(store)) == {"embedded": 2, "damaged": 2}
    moved = photos.rename(tmp_path / "moved")
    damage(store, 0)
    assert counts(fix(store, data=manifest, root=moved)) == {"embedded": 2, "damaged": 2}


def test_a_store_that_does_not_say_where_its_images_were_asks(store: Path, photos: Path) -> None:
    old = FeatureStore.open(store)
    provenance = {name: value for name, value in old.provenance.items() if name != "data"}
    elder = store.with_name("elder.h5")
    create_store(elder, spec=old.spec, table=old.table, provenance=provenance, block_rows=8)
    with pytest.raises(DataError, match="does not say where its images are: pass --data DATA"):
        fix(elder)
    assert counts(fix(elder, data=photos)) == {"embedded": 20, "pending": 20}
    assert content(elder)[1] == content(store)[1]


def test_an_id_that_leads_out_of_the_folder_is_not_read(
    store: Path, photos: Path, save_image: Callable[..., Path]
) -> None:
    """Trap: a store made by someone else that names any file of this machine."""
    outside = save_image(photos.parent / "outside.png", seed=1)
    old = FeatureStore.open(store)
    for name in ("../outside.png", str(outside), "class0/../../outside.png"):
        table = old.table
        object.__setattr__(table, "ids", (name, *table.ids[1:]))
        hostile = store.with_name("hostile.h5")
        create_store(hostile, spec=old.spec, table=table, provenance=old.provenance, block_rows=8)
        with pytest.raises(DataError, match="leads out of"):
            fix(hostile)


def test_a_link_out_of_the_folder_is_not_followed_unless_it_was(
    store: Path, photos: Path, save_image: Callable[..., Path]
) -> None:
    outside = save_image(photos.parent / "outside.png", seed=1)
    (photos / "class0" / "00.png").unlink()
    (photos / "class0" / "00.png").symlink_to(outside)
    damage(store, 0)
    with pytest.raises(DataError, match="leads out of"):
        fix(store)
    followed = store.with_name("followed.h5")
    embed(photos, followed, backbone=TOY, follow_links=True)
    damage(followed, 0)
    assert counts(fix(followed))["embedded"] == 8


CODE = "open('ran', 'w').close()\n" + (Path(__file__).parent / "channel_mean.py").read_text()


@pytest.mark.parametrize("allowed", [None, "channel_mean:other", "resnet18"])
def test_the_code_a_store_names_is_not_run_unless_the_user_names_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("planted.py").write_text(CODE)
    old = FeatureStore.open(store)
    request = {**old.provenance["request"], "backbone": "planted:channel_mean"}
    planted = tmp_path / "planted.h5"
    create_store(
        planted,
        spec=old.spec,
        table=old.table,
        provenance={**old.provenance, "request": request},
        block_rows=8,
    )
    for path in (planted, store):
        damage(store, 0)
        with pytest.raises(
            StoreError, match=r"a store is not trusted .*: repeat it as --backbone \w+:channel"
        ):
            fix(path, backbone=allowed)
    assert "planted" not in sys.modules
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("request", None), ("request", {"backbone": 1}), ("request", {"backbone": TOY, "seed": "x"})],
)
def test_a_store_that_does_not_say_its_backbone_is_one_line(store: Path, name: str, value: object) -> None:
    old = FeatureStore.open(store)
    odd = store.with_name("odd.h5")
    create_store(
        odd, spec=old.spec, table=old.table, provenance={**old.provenance, name: value}, block_rows=8
    )
    with pytest.raises(StoreError, match="does not say which backbone"):
        fix(odd)


def test_the_weights_are_the_recorded_ones_or_it_is_refused(photos: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        network = load_backbone("resnet18", weights="random", seed=seed).module
        save_file(
            {k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / f"{seed}.safetensors"
        )
    store, mine = tmp_path / "s.h5", tmp_path / "0.safetensors"
    embed(photos, store, backbone="resnet18", weights=str(mine), batch_size=4)
    before = content(store)
    damage(store, 9)
    with pytest.raises(
        BackboneError, match=r"s\.h5 holds features of resnet18 with weights .*--weights FILE"
    ):
        repair(store, weights=str(tmp_path / "1.safetensors"))
    moved = mine.rename(tmp_path / "moved.safetensors")
    with pytest.raises(BackboneError, match=r"weights file .*0\.safetensors, which is not there"):
        repair(store)
    assert counts(repair(store, weights=str(moved))) == {"embedded": 8, "damaged": 8}
    assert content(store) == before


def test_a_growth_of_repair_keeps_the_request_that_made_the_store(photos: Path, tmp_path: Path) -> None:
    store, bad = tmp_path / "s.h5", photos / "class0" / "03.png"
    good = bad.read_bytes()
    bad.write_bytes(b"no picture")
    embed(photos, store, backbone="resnet18", weights="random", seed=7, batch_size=4)
    asked = FeatureStore.open(store).provenance["request"]
    bad.write_bytes(good)
    assert counts(repair(store)) == {"embedded": 1, "failed_before": 1}
    again = FeatureStore.open(store)
    assert (again.provenance["request"], again.provenance["batch_size"]) == (asked, 4)
    assert again.provenance["data"]["path"] == str(photos)
    assert (
        "nothing to embed" in embed(photos, store, backbone="resnet18", weights="random", seed=7).describe()
    )


def test_too_many_new_failures_stop_but_those_known_do_not_count(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.h5"
    for i in range(5):
        (photos / "class1" / f"bad{i}.png").write_bytes(b"")
    embed(photos, store, backbone=TOY, batch_size=4, max_failures=0.5)
    damage(store, 0)
    assert counts(fix(store)) == {"embedded": 8, "damaged": 8, "failed": 5}
    damage(store, 0)
    for i in range(3):
        (photos / "class0" / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(TooManyFailures, match="--max-failures"):
        fix(store)


@pytest.mark.parametrize(("known", "rows"), [(15, 22), (8, 9), (16, 20)])
def test_known_failures_do_not_count_however_few_may_fail(
    tmp_path: Path, save_image: Callable[..., Path], known: int, rows: int
) -> None:
    """Trap: (0 + 15 / 22) * 22 is less than 15."""
    store, folder = tmp_path / "s.h5", tmp_path / "few" / "c"
    folder.mkdir(parents=True)
    for i in range(rows):
        if i < known:
            (folder / f"{i:02d}.png").write_bytes(b"no picture")
        else:
            save_image(folder / f"{i:02d}.png", seed=i)
    embed(folder.parent, store, backbone=TOY, max_failures=1)
    damage(store, rows - 1)
    assert fix(store, max_failures=0).failed == known


def test_names_of_failed_rows_are_shown_on_one_line(photos: Path, tmp_path: Path) -> None:
    (photos / "class0" / "a\n\x1b[31m.png").write_bytes(b"no picture")
    embedded = embed(photos, tmp_path / "s.h5", backbone=TOY)
    assert "  failed: class0/a\\n\\x1b[31m.png: " in embedded.describe()
    assert "  failed: class0/a\\n\\x1b[31m.png: " in fix(tmp_path / "s.h5").describe()
    (photos / "class0" / "b\n.png").write_bytes(b"no picture")
    with pytest.raises(TooManyFailures, match=r"class0/a\\n\\x1b\[31m\.png: .*class0/b\\n\.png") as stopped:
        embed(photos, tmp_path / "t.h5", backbone=TOY, max_failures=0)
    assert str(stopped.value).isprintable()


def test_two_writers_at_once_are_refused(store: Path) -> None:
    with write_lock(store), pytest.raises(StoreLocked):
        repair(store)


def test_what_is_no_store_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="cannot be opened"):
        repair(tmp_path / "none.h5")


@contextmanager
def stopped_after_blocks(n: int) -> Iterator[None]:
    """Ctrl-C once `n` blocks are written; a shell may have had it ignored."""
    plain, left = StoreWriter.write_block, iter(range(n - 1))

    def write(self: StoreWriter, block: int, **columns: np.ndarray) -> None:
        plain(self, block, **columns)
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StoreWriter, "write_block", write)
            yield
    finally:
        signal.signal(signal.SIGINT, former)


def test_an_interrupted_repair_goes_on_where_it_was(
    photos: Path, tmp_path: Path, decoded: list[str], save_image: Callable[..., Path]
) -> None:
    store, bad = tmp_path / "s.h5", [photos / "class0" / "03.png", photos / "class1" / "19.png"]
    for path in bad:
        path.write_bytes(b"no picture")
    embed(photos, store, backbone=TOY, batch_size=4, max_failures=0.5)
    for seed, path in zip((3, 19), bad, strict=True):
        save_image(path, seed=seed)
    with stopped_after_blocks(1), pytest.raises(KeyboardInterrupt) as stopped:
        fix(store)
    assert stopped.value.__notes__ == ["8 of 20 rows are kept; run the same command again to go on"]
    decoded.clear()
    assert counts(fix(store))["embedded"] == 1
    assert decoded == ["19.png"]
    assert len(FeatureStore.open(store).features()) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "s.h5"]


def test_a_growth_of_embed_is_neither_taken_nor_removed(
    store: Path, photos: Path, decoded: list[str], save_image: Callable[..., Path]
) -> None:
    """Trap: the rows of an interrupted `embed` are in no other file."""
    for i in range(20):
        save_image(photos / "class2" / f"{i}.png", seed=200 + i)
    (photos / "class0" / "03.png").write_bytes(b"no picture")
    with stopped_after_blocks(4), pytest.raises(KeyboardInterrupt):
        embed(photos, store, backbone=TOY)
    save_image(photos / "class0" / "03.png", seed=3)
    damage(store, 0)
    assert counts(fix(store))["embedded"] == 8
    decoded.clear()
    assert embed(photos, store, backbone=TOY).rows == 40
    assert len(decoded) == 8, "the 12 rows of the interrupted growth were computed again"
    assert sorted(path.name for path in store.parent.iterdir()) == ["photos", "s.h5"]


def test_a_growth_of_embed_that_only_copied_so_far_is_not_taken_for_the_store(
    photos: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    store, bad = tmp_path / "s.h5", photos / "class0" / "03.png"
    bad.write_bytes(b"no picture")
    embed(photos, store, backbone=TOY, batch_size=4)
    save_image(photos / "class1" / "19.png", seed=119)
    with stopped_after_blocks(1), pytest.raises(KeyboardInterrupt):
        embed(photos, store, backbone=TOY)
    assert store.with_name("s.h5.growing").exists()
    os.utime(bad, ns=(1, 1))
    assert counts(fix(store)) == {"failed": 1, "changed": 1}
    assert FeatureStore.open(store).complete


@pytest.mark.parametrize("change", ["other images", "an edited image"])
def test_a_failed_row_is_mended_beside_a_growth_of_embed(
    photos: Path, tmp_path: Path, decoded: list[str], save_image: Callable[..., Path], change: str
) -> None:
    """Trap: rows of another table, or of newer images, taken by their number."""
    store, bad = tmp_path / "s.h5", photos / "class1" / "19.png"
    bad.write_bytes(b"no picture")
    embed(photos, store, backbone=TOY, batch_size=4)
    old = FeatureStore.open(store)
    if change == "other images":
        for i in range(12):
            save_image(photos / "a_first_class" / f"{i}.png", seed=200 + i)
    else:
        save_image(photos / "class0" / "00.png", seed=100)
    with stopped_after_blocks(1), pytest.raises(KeyboardInterrupt):
        embed(photos, store, backbone=TOY)
    save_image(bad, seed=19)
    decoded.clear()
    assert counts(fix(store))["embedded"] == 1
    assert decoded == ["19.png"]
    mended = FeatureStore.open(store)
    assert mended.table.ids == old.table.ids
    np.testing.assert_array_equal(mended.map()[:19], old.map()[:19])
    np.testing.assert_array_equal(mended.sources[:19], old.sources[:19])
    decoded.clear()
    embed(photos, store, backbone=TOY)
    assert len(decoded) == (4 if change == "other images" else 0), "rows of the growth were computed again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "s.h5"]


def test_a_repaired_shard_is_still_one(photos: Path, tmp_path: Path, save_image: Callable[..., Path]) -> None:
    whole, bad = tmp_path / "s.h5", photos / "class0" / "03.png"
    mine, other = (Shard(index=index, count=2) for index in (0, 1))
    if not mine.owns("class0/03.png"):
        mine, other = other, mine
    bad.write_bytes(b"no picture")
    part = embed(photos, whole, backbone=TOY, batch_size=4, shard=mine)
    save_image(bad, seed=3)
    assert counts(fix(Path(part.store))) == {"embedded": 1, "failed_before": 1}
    joined = embed(photos, whole, backbone=TOY, batch_size=4, shard=other)
    assert (joined.store, joined.rows, joined.failed) == (str(whole), ROWS, 0)


def test_an_image_that_hung_does_not_hang_the_repair(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, release = tmp_path / "s.h5", threading.Event()

    def hang(path: Path, pictures: Sequence[Picture], **options: Any) -> object:
        if path.name == "03.png":
            release.wait(60)
        return load_pictures(path, pictures, **options)

    monkeypatch.setattr(pipeline, "IMAGE_SECONDS", 0.3)
    monkeypatch.setattr(pipeline, "load_pictures", hang)
    monkeypatch.setattr("featcache.needs.load_pictures", hang)
    embed(photos, store, backbone=TOY, batch_size=4, decoder="exact")
    begun = time.monotonic()
    result = fix(store)
    release.set()
    assert time.monotonic() - begun < 30
    assert (counts(result), result.failures[0][1]) == (
        {"failed": 1},
        "took more than 0.3 s to read and decode",
    )
