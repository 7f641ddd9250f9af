"""The store: what is written is read back, what is damaged is not served, what is hostile is refused."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import make_toy_store, toy_block, toy_spec, write_toy_blocks

from featcache.errors import DamagedStore, DiskError, IncompleteStore, NotAStore, StoreError
from featcache.records import RowStatus
from featcache.spec import FeatureNode
from featcache.store.blocks import BlockCheck
from featcache.store.files import StoreFiles
from featcache.store.layout import SOURCE_DTYPE
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter


def flip_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_features_labels_and_ids_come_back_as_written(toy_store: Path) -> None:
    features = FeatureStore.open(toy_store).features()
    np.testing.assert_array_equal(features.X, np.arange(10)[:, None] + np.arange(3))
    assert features.y.tolist() == [0, 1] * 5
    assert features.ids[3] == "c1/é0003.png"
    assert set(features.splits) == {"train"}


def test_every_node_has_its_own_dataset(toy_store: Path) -> None:
    assert FeatureStore.open(toy_store).features("stem:max").X.shape == (10, 2)
    with pytest.raises(StoreError, match="penultimate, stem:max"):
        FeatureStore.open(toy_store).features("layer9")


def test_features_are_a_read_only_view_of_the_mapped_file(toy_store: Path) -> None:
    X = FeatureStore.open(toy_store).features().X
    assert not X.flags.owndata
    assert not X.flags.writeable


def test_feature_datasets_of_a_page_or_more_begin_on_a_page(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=600)
    assert [region.offset % 4096 for region in read_layout(path).features.values()] == [0, 0]


def test_plain_h5py_reads_the_store_without_us(toy_store: Path) -> None:
    with h5py.File(toy_store) as file:
        assert file.attrs["encoding-type"] == b"featcache-store"
        assert file["features/penultimate"][4].tolist() == [4, 5, 6]
        assert file["ids"].asstr()[1] == "c1/é0001.png"


def test_failed_rows_are_left_out_of_features_and_labels_together(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=4, fill=False)
    store = FeatureStore.open(path)
    arrays = toy_block(store, 0)
    status = np.array([RowStatus.OK, RowStatus.UNDECODABLE, RowStatus.OK, RowStatus.OK], dtype=np.uint8)
    for array in arrays.values():
        array[1] = np.nan
    with StoreWriter(store.layout) as writer:
        writer.write_block(0, features=arrays, row_status=status, sources=np.zeros(4, SOURCE_DTYPE))
    features = FeatureStore.open(path).features()
    assert features.X[:, 0].tolist() == [0, 2, 3]
    assert features.y.tolist() == [0, 0, 1]
    assert features.ids[1] == "c0/é0002.png"
    assert FeatureStore.open(path).failed_rows() == [("c1/é0001.png", RowStatus.UNDECODABLE)]


@pytest.mark.parametrize("wrong", ["zeros in a failed row", "NaN in a good row", "a pending row"])
def test_the_writer_refuses_rows_that_contradict_their_status(tmp_path: Path, wrong: str) -> None:
    store = FeatureStore.open(make_toy_store(tmp_path / "s.h5", n=4, fill=False))
    arrays = toy_block(store, 0)
    status = np.ones(4, dtype=np.uint8)
    if wrong == "NaN in a good row":
        arrays["penultimate"][2] = np.nan
    else:
        status[2] = RowStatus.PENDING if wrong == "a pending row" else RowStatus.MISSING
    with StoreWriter(store.layout) as writer, pytest.raises(ValueError, match="finite|known"):
        writer.write_block(0, features=arrays, row_status=status, sources=np.zeros(4, SOURCE_DTYPE))


def test_an_unfinished_store_is_refused_but_serves_its_complete_blocks(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=10, fill=False)
    write_toy_blocks(path, range(1, 2))
    store = FeatureStore.open(path)
    assert not store.complete
    with pytest.raises(IncompleteStore, match="6 of 10 rows are pending.*featcache embed"):
        store.features()
    assert store.features(partial=True).X[:, 0].tolist() == [4, 5, 6, 7]


def test_a_block_declared_before_its_data_arrived_is_pending_on_resume(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=10)
    flip_byte(path, read_layout(path).features["penultimate"].offset + 5 * 12)
    assert list(BlockCheck(read_layout(path)).pending()) == [1]


@pytest.mark.parametrize("column", ["features", "row_status", "sources", "blocks"])
def test_a_flipped_bit_in_any_row_data_is_found_at_opening(toy_store: Path, column: str) -> None:
    layout = read_layout(toy_store)
    region = layout.features["stem:max"] if column == "features" else getattr(layout, column)
    flip_byte(toy_store, region.offset + region.row_bytes)
    with pytest.raises(DamagedStore, match="rows .* checksums.*again"):
        FeatureStore.open(toy_store)


@pytest.mark.parametrize("name", ["ids", "labels", "classes", "splits"])
def test_a_flipped_bit_in_a_static_column_is_found_at_opening(toy_store: Path, name: str) -> None:
    with h5py.File(toy_store) as file:
        offset = file[name].id.get_offset()
    flip_byte(toy_store, offset)
    with pytest.raises(DamagedStore, match="do not match the checksum"):
        FeatureStore.open(toy_store, check=False)


def test_a_truncated_store_is_damaged(toy_store: Path) -> None:
    os.truncate(toy_store, os.path.getsize(toy_store) - 100)
    with pytest.raises((DamagedStore, NotAStore), match="damaged|within the file"):
        FeatureStore.open(toy_store)


def test_no_metadata_byte_can_be_flipped_into_another_answer(toy_store: Path) -> None:
    """Any flip before the first feature page either changes nothing that is served or is refused."""
    whole = toy_store.read_bytes()
    expected = FeatureStore.open(toy_store).features()
    layout = read_layout(toy_store)
    for offset in range(0, min(region.offset for region in layout.features.values()), 7):
        flip_byte(toy_store, offset)
        try:
            got = FeatureStore.open(toy_store).features()
        except StoreError:
            pass
        else:
            np.testing.assert_array_equal(got.X, expected.X)
            assert (got.ids, got.classes, got.spec) == (expected.ids, expected.classes, expected.spec)
        toy_store.write_bytes(whole)


def test_other_files_are_not_stores(tmp_path: Path) -> None:
    text = tmp_path / "a.h5"
    text.write_text("hello")
    with pytest.raises(NotAStore, match="not an HDF5 file"):
        FeatureStore.open(text)
    with h5py.File(tmp_path / "b.h5", "w"):
        pass
    with pytest.raises(NotAStore, match="not a feature store"):
        FeatureStore.open(tmp_path / "b.h5")
    with pytest.raises(NotAStore, match="not a regular file"):
        FeatureStore.open(tmp_path)
    with pytest.raises(NotAStore, match="No such file.*featcache embed"):
        FeatureStore.open(tmp_path / "none.h5")


def test_a_reader_keeps_its_rows_when_a_grown_store_takes_the_name(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=10)
    reader = FeatureStore.open(path)
    os.replace(make_toy_store(tmp_path / "grown.h5", n=3), path)
    assert reader.features().X.shape == (10, 3)
    assert FeatureStore.open(path).features().X.shape == (3, 3)


def test_a_store_without_labels_or_rows_of_odd_counts_round_trips(tmp_path: Path) -> None:
    from featcache.records import NO_FILE, ImageRecord
    from featcache.store.creating import create_store
    from featcache.store.layout import RowTable

    records = (ImageRecord(path="a.png", stat=NO_FILE),)
    path = tmp_path / "one.h5"
    create_store(
        path, spec=toy_spec(), table=RowTable.from_records(records, ()), provenance={}, block_rows=256
    )
    write_toy_blocks(path)
    features = FeatureStore.open(path).features()
    assert (features.y.tolist(), features.classes, features.splits.tolist()) == ([-1], (), [""])


def test_creating_in_a_place_without_space_or_permission_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="creating .*No such file or directory.*same command"):
        make_toy_store(tmp_path / "missing" / "s.h5", n=4)


def test_a_full_disk_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DiskError, match="No space left on device.*free space"):
        make_toy_store(tmp_path / "s.h5", n=4)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_and_many_nodes_are_stored_as_asked(tmp_path: Path) -> None:
    spec = toy_spec(store_dtype="float16", nodes=(FeatureNode(name="a", num_features=7),))
    path = make_toy_store(tmp_path / "s.h5", n=9, spec=spec)
    X = FeatureStore.open(path).features().X
    assert X.dtype == np.float16
    assert X[8].tolist() == [8, 9, 10, 11, 12, 13, 14]


def test_the_torch_dataset_gives_rows_and_labels(toy_store: Path) -> None:
    dataset = FeatureStore.open(toy_store).torch_dataset()
    row, label = dataset[3]
    assert (row.tolist(), label) == ([3, 4, 5], 1)


def test_loader_workers_that_share_a_forked_store_get_the_right_rows(tmp_path: Path) -> None:
    """Trap: one HDF5 handle used by several forked workers returns rows of others."""
    from torch.utils.data import DataLoader

    path = make_toy_store(tmp_path / "s.h5", n=400)
    dataset = FeatureStore.open(path).torch_dataset()
    handles = h5py.h5f.OBJ_FILE | h5py.h5f.OBJ_DATASET
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, handles) == 0, "a handle that forks would share"
    loader = DataLoader(dataset, batch_size=7, num_workers=2, multiprocessing_context="fork")
    rows = np.concatenate([batch.numpy() for batch, _ in loader])
    np.testing.assert_array_equal(rows, np.arange(400)[:, None] + np.arange(3))


def test_a_reader_sees_whole_blocks_of_a_store_being_written(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=2000, fill=False)
    writing = threading.Thread(target=write_toy_blocks, args=(path,))
    writing.start()
    seen = [0]
    while seen[-1] < 2000:
        features = FeatureStore.open(path).features(partial=True)
        rows = np.array([int(name[4:8]) for name in features.ids])
        np.testing.assert_array_equal(features.X, rows[:, None] + np.arange(3))
        assert len(rows) % 4 == 0
        seen.append(len(rows))
    writing.join()
    assert seen == sorted(seen)


def test_more_nodes_than_a_store_can_describe_are_refused_before_it_is_made(tmp_path: Path) -> None:
    nodes = tuple(FeatureNode(name=f"layer{i}", num_features=1) for i in range(1500))
    with pytest.raises(StoreError, match="spec .* at most 64,000.*fewer nodes"):
        make_toy_store(tmp_path / "s.h5", n=3, spec=toy_spec(nodes=nodes))
    assert list(tmp_path.iterdir()) == []


def test_an_io_error_is_no_damage(toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DiskError, match=r"reading .*toy.h5 failed: Input/output error. Mend that.*again"):
        FeatureStore.open(toy_store)


def test_blocks_of_another_spec_are_not_sound(tmp_path: Path) -> None:
    """The rows of one store under the structure of another of the same shape: misdirected writes do that."""
    one = read_layout(make_toy_store(tmp_path / "one.h5", n=10))
    path = make_toy_store(tmp_path / "two.h5", n=10, spec=toy_spec(weights_sha256="1" * 64))
    two = read_layout(path)
    with open(path, "r+b") as file:
        for here, there in zip(
            (*two.features.values(), two.row_status, two.sources, two.blocks),
            (*one.features.values(), one.row_status, one.sources, one.blocks),
            strict=True,
        ):
            file.seek(here.offset)
            file.write(one.read(there).tobytes())
    with pytest.raises(DamagedStore, match="rows 0-9 do not match"):
        FeatureStore.open(path)


def test_a_name_is_not_taken_before_what_freed_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run may have renamed the growth of that name and not synced its folder."""
    calls = []
    sync, replace = os.fsync, os.replace

    def noted_sync(fd: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
        sync(fd)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    make_toy_store(tmp_path / "s.h5.growing", n=4, fill=False)
    assert calls == ["sync folder", "sync file", "rename", "sync folder"]


def test_a_status_that_is_none_is_one_line_in_a_store_opened_unchecked(toy_store: Path) -> None:
    offset = read_layout(toy_store).row_status.offset
    with open(toy_store, "r+b") as file:
        file.seek(offset + 5)
        file.write(b"\xc8")
    store = FeatureStore.open(toy_store, check=False)
    with pytest.raises(DamagedStore, match="row 5 has the status 200, which no row has. `featcache verify"):
        store.status_counts()
    store.inspect()
    assert store.status_counts() == {RowStatus.PENDING: 4, RowStatus.OK: 6}


def test_rows_found_damaged_are_not_served_because_they_were_looked_at_before(toy_store: Path) -> None:
    region = read_layout(toy_store).features["penultimate"]
    with open(toy_store, "r+b") as file:
        file.seek(region.offset + 4 * region.row_bytes)
        file.write(b"\xff")
    store = FeatureStore.open(toy_store, check=False)
    assert (store.row_status == RowStatus.OK).all()
    store.inspect()
    assert store.features(partial=True).ids == tuple(store.table.ids[row] for row in (0, 1, 2, 3, 8, 9))


def test_labels_that_a_caller_changes_are_the_callers_own(toy_store: Path) -> None:
    store = FeatureStore.open(toy_store)
    labels = store.features().y
    labels[:] = 7
    assert store.features().y.tolist() == [0, 1] * 5


def test_a_folder_that_cannot_be_listed_is_one_line_whoever_asks(
    toy_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), folder)

    monkeypatch.setattr(os, "listdir", fail)
    for ask in (
        lambda files: files.growths,
        lambda files: files.shards,
        lambda files: files.has(Path("o.h5")),
    ):
        with pytest.raises(DiskError, match="listing what is beside .*toy.h5 failed: Input/output error"):
            ask(StoreFiles.at(toy_store))
