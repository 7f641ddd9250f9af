"""Which rows are known without opening a file: stores and listings whose images are not on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import toy_block, toy_spec
from gaussians import PROVENANCE
from test_salvage import damage_block

from featcache.images.identity import ImageFailure
from featcache.images.paths import escape_path, unescape_path
from featcache.records import FileStat, ImageRecord, Listing, RowStatus
from featcache.reuse import CachedRows, ReusePlan, plan_reuse
from featcache.store.creating import create_store
from featcache.store.layout import SOURCE_DTYPE, STAT_COLUMNS, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

N = 10
BLOCK_ROWS = 4


def stat_of(i: int) -> FileStat:
    return FileStat(size=100 + i, mtime_ns=200 + i, ctime_ns=300 + i, inode=400 + i)


def record_of(i: int, **changes: int) -> ImageRecord:
    return ImageRecord(path=f"c/{i:02d}.png", stat=stat_of(i)._replace(**changes), label="c")


def make_store(
    path: Path, records: Sequence[ImageRecord], *, status: RowStatus = RowStatus.OK, blocks: int = 99
) -> FeatureStore:
    """A store of these images, of which the first `blocks` blocks are written."""
    table = RowTable.from_records(tuple(records), ("c",))
    create_store(path, spec=toy_spec(), table=table, provenance=PROVENANCE, block_rows=BLOCK_ROWS)
    layout = FeatureStore.open(path).layout
    with StoreWriter(layout) as writer:
        for block in range(min(blocks, layout.n_blocks)):
            inside = records[layout.rows_of(block)]
            sources = np.zeros(len(inside), SOURCE_DTYPE)
            sources["sha256"][:, 0] = [int(record.path[2:4]) + 1 for record in inside]
            for name in STAT_COLUMNS:
                sources[name] = [getattr(record.stat, name) for record in inside]
            features = toy_block(FeatureStore.open(path), block)
            if status is not RowStatus.OK:
                features = {key: np.full_like(array, np.nan) for key, array in features.items()}
            writer.write_block(
                block,
                features=features,
                row_status=np.full(len(inside), status, dtype=np.uint8),
                sources=sources,
            )
    return FeatureStore.open(path)


def plan_for(records: Sequence[ImageRecord], *stores: FeatureStore) -> ReusePlan:
    return plan_reuse(
        Listing(root=Path("/nowhere"), records=tuple(records), classes=("c",)), stores, workers=1
    )


def test_the_columns_of_a_store_are_those_of_a_stat() -> None:
    assert FileStat._fields == STAT_COLUMNS


@pytest.mark.parametrize("column", STAT_COLUMNS)
def test_a_file_is_known_only_where_every_part_of_its_stat_is_the_recorded_one(
    tmp_path: Path, column: str
) -> None:
    store = make_store(tmp_path / "s.h5", [record_of(i) for i in range(N)])
    now = [record_of(i, **({column: 7} if i == 3 else {})) for i in range(N)]
    plan = plan_for(now, store)
    assert plan.by_stat.tolist() == [i != 3 for i in range(N)]
    assert plan.pending.tolist() == [3]
    assert plan.sources["sha256"][:, 0].tolist() == [0 if i == 3 else i + 1 for i in range(N)]


def test_rows_are_found_by_path_whatever_the_order_and_number_of_files(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.h5", [record_of(i) for i in range(N)])
    order = [7, 2, 30, 9, 0, 31]
    plan = plan_for([record_of(i) for i in order], store)
    assert plan.origin_row.tolist() == [7, 2, -1, 9, 0, -1]
    assert plan.origin_store.tolist() == [0, 0, -1, 0, 0, -1]
    assert plan.sources["inode"].tolist() == [407, 402, 0, 409, 400, 0]
    assert plan.removed_ids == tuple(f"c/{i:02d}.png" for i in (1, 3, 4, 5, 6, 8))


def test_rows_of_damaged_blocks_are_told(tmp_path: Path) -> None:
    path, records = tmp_path / "s.h5", [record_of(i) for i in range(N)]
    make_store(path, records)
    assert plan_for(records, FeatureStore.salvage(path)).notes() == []
    damage_block(path, 1)
    said = "1 block was damaged: its 4 rows are embedded again"
    assert plan_for(records, FeatureStore.salvage(path)).notes() == [said]
    damage_block(path, 2)
    said = "2 blocks were damaged: their 6 rows are embedded again"
    assert plan_for(records, FeatureStore.salvage(path)).notes() == [said]
    said = "1 block was damaged: its 1 row is embedded again"
    assert plan_for(records[8:9], FeatureStore.salvage(path)).notes() == [said]
    assert plan_for(records[:4], FeatureStore.salvage(path)).notes() == []
    elsewhere = make_store(tmp_path / "whole.h5", records)
    assert plan_for(records, elsewhere, FeatureStore.salvage(path)).notes() == []


def test_labels_and_splits_that_are_lost_are_told(tmp_path: Path) -> None:
    had = [record_of(i)._replace(split="train") for i in range(N)]
    now = [
        record._replace(label="c" if i >= 4 else None, split="train" if i != 3 else None)
        for i, record in enumerate(had)
    ]
    plan = plan_for(now, make_store(tmp_path / "had.h5", had))
    assert plan.relabelled == 4
    assert plan.notes() == [
        "4 rows lose their label and 1 row loses its split: c/00.png, c/01.png, c/02.png and 1 more"
    ]
    # What rows are given, and what they have instead, is no loss.
    other = [record._replace(split="test") for record in had]
    for stored, listed in ((now, had), (had, other)):
        plan = plan_for(listed, make_store(tmp_path / f"{stored is had}.h5", stored))
        assert (plan.relabelled > 0, plan.notes()) == (True, [])


@pytest.mark.parametrize("same_files", [True, False])
def test_a_row_whose_block_is_not_written_is_not_known(tmp_path: Path, same_files: bool) -> None:
    store = make_store(tmp_path / "s.h5", [record_of(i) for i in range(N)], blocks=1)
    records = [record_of(i) for i in range(N if same_files else N + 1)]
    found = CachedRows(store).rows_of(tuple(record.path for record in records))
    assert found.tolist() == [0, 1, 2, 3] + [-1] * (len(records) - BLOCK_ROWS)
    assert np.flatnonzero(plan_for(records, store).by_stat).tolist() == [0, 1, 2, 3]


def test_the_first_store_that_knows_a_file_gives_its_row(tmp_path: Path) -> None:
    first = make_store(tmp_path / "a.h5", [record_of(i) for i in (1, 2)])
    second = make_store(tmp_path / "b.h5", [record_of(i) for i in range(N)])
    plan = plan_for([record_of(i) for i in range(4)], first, second)
    assert plan.origin_store.tolist() == [1, 0, 0, 1]
    assert plan.origin_row.tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize(
    ("status", "known"),
    [
        (RowStatus.UNDECODABLE, True),
        (RowStatus.TOO_LARGE, True),
        (RowStatus.NON_FINITE, True),
        (RowStatus.MISSING, True),
        (RowStatus.CHANGED, False),
        (RowStatus.UNREADABLE, False),
    ],
)
def test_failures_that_the_bytes_decide_are_known_and_others_are_tried_again(
    tmp_path: Path, status: RowStatus, known: bool
) -> None:
    store = make_store(tmp_path / "s.h5", [record_of(i) for i in range(N)], status=status)
    assert plan_for([record_of(i) for i in range(N)], store).by_stat.tolist() == [known] * N


def test_a_single_row_is_asked_for_as_all_are(tmp_path: Path) -> None:
    cache = CachedRows(make_store(tmp_path / "s.h5", [record_of(i) for i in range(N)]))
    assert cache.has_stat(4, stat_of(4))
    assert not cache.has_stat(4, stat_of(5))


@pytest.mark.parametrize("raw", [b"a/b.jpg", b"a b\n.jpg", b"a\\b", b"\xc3\xa9.png", b"\xff.png", b"\\\xff"])
def test_a_path_is_escaped_byte_by_byte(raw: bytes) -> None:
    by_hand = raw.replace(b"\\", b"\\\\").decode("utf-8", errors="surrogateescape")
    by_hand = "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in by_hand)
    path = raw.decode("utf-8", errors="surrogateescape")
    assert escape_path(path) == by_hand
    assert unescape_path(by_hand) == path


def test_an_image_that_took_too_long_is_not_even_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def hash_image(path: Path) -> ImageFailure:
        read.append(path.name)
        return ImageFailure(status=RowStatus.MISSING, reason="", stat=stat_of(0))

    monkeypatch.setattr("featcache.reuse.hash_image", hash_image)
    slow = make_store(tmp_path / "s.h5", [record_of(i) for i in range(3)], status=RowStatus.TOO_SLOW)
    plan = plan_for([record_of(i) for i in range(4)], slow)
    assert read == ["03.png"]
    assert plan.pending.tolist() == [0, 1, 2, 3]
