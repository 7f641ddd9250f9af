"""A power cut at any moment loses nothing acknowledged and leaves nothing wrong; and the proof can fail."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.crash_disk import Fate, cuts
from faults.crash_recording import Created, Enter, Op, Rename, Sync, SyncNames, Write, record
from faults.crash_states import BLOCK_ROWS, CREATING, GROUP_BYTES, STORE, Bench, Plan, Tally, open_bench

from featcache.store.blocks import BlockCheck
from featcache.store.layout import RECORD_DTYPE, SOURCE_DTYPE

PROTOCOLS = (
    "create and fill", "resume", "recompute a damaged block", "repair a damaged block", "grow",
    "growth resumed", "relabel", "remove leftover growths", "create and fill two nodes", "save a model",
    "first model", "lock",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench() as bench:
        yield bench


def said(tally: Tally) -> str:
    return "\n".join(map(str, tally.violations))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_power_cut_at_any_moment_keeps_every_promise(bench: Bench, name: str) -> None:
    plan = Plan(exhaustive=True, draws=100, resume_every=400, kill_every=8, again=25)
    tally = bench.experiment(name).explore(plan)
    assert not tally.violations, said(tally)
    assert tally.operations >= 3
    assert tally.exhaustive > 5 * tally.cuts
    assert tally.resumed


def test_no_more_than_a_commit_group_and_a_block_is_ever_unacknowledged(bench: Bench) -> None:
    experiment = bench.experiment("create and fill")
    in_flight = [
        sum(len(op.data) for op in ops if isinstance(op, Write))
        for cut in experiment.cuts
        for inode, ops in cut.unsynced_data.items()
        if cut.issued_names.get(STORE) == inode
    ]
    block = BLOCK_ROWS * (96 * 4 + 1 + SOURCE_DTYPE.itemsize) + RECORD_DTYPE.itemsize
    assert block < max(in_flight) < GROUP_BYTES + block


def test_every_protocol_is_tested(bench: Bench) -> None:
    assert set(PROTOCOLS) == set(bench.protocols)


class After:
    """Leaves out one kind of call, but only before or only after a store was created."""

    def __init__(self, kind: type[Op], *, created: bool) -> None:
        self._kind, self._when, self._created = kind, created, False

    def __call__(self, op: Op) -> Op | None:
        self._created = self._created or isinstance(op, Created)
        return None if isinstance(op, self._kind) and self._created == self._when else op


def without_temporary_name(op: Op) -> Op | None:
    if isinstance(op, Enter) and op.name == STORE + CREATING:
        return Enter(STORE, op.inode)
    return None if isinstance(op, Rename) else op


BROKEN: dict[str, tuple[str, Callable[[], Callable[[Op], Op | None]], str]] = {
    "blocks are not synced": (
        "create and fill", lambda: After(Sync, created=True), "acknowledged rows are lost",
    ),
    "a new store is not synced": (
        "create and fill", lambda: After(Sync, created=False), "the store is no store",
    ),
    "a new store's name is not synced": (
        "create and fill", lambda: After(SyncNames, created=False), "the store is gone",
    ),
    "a store is created under its own name": (
        "create and fill", lambda: without_temporary_name, "the store is no store",
    ),
    "a grown store's name is not synced": (
        "grow", lambda: After(SyncNames, created=True), "the store is not the new one",
    ),
    "a grown store is not synced before it takes the name": (
        "grow", lambda: After(Sync, created=True), "acknowledged rows are lost",
    ),
    "a model is not synced before it takes the name": (
        "save a model", lambda: After(Sync, created=False), "neither the old one nor",
    ),
    "a model's name is not synced": (
        "save a model", lambda: After(SyncNames, created=False), "neither the old one nor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_protocol_without_one_of_its_steps_is_caught(bench: Bench, fault: str) -> None:
    name, alter, expected = BROKEN[fault]
    tally = bench.experiment(name, alter()).explore(Plan(exhaustive=True))
    assert expected in said(tally)


def test_a_record_that_is_believed_without_its_checksums_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for check in ("has_sound_features", "has_sound_columns"):
        monkeypatch.setattr(BlockCheck, check, lambda self, block: True)
    tally = bench.experiment("create and fill").explore(Plan(exhaustive=True))
    assert "passes for done and holds other bytes" in said(tally)


@pytest.mark.parametrize(
    ("name", "fault", "replacement", "expected"),
    [
        # What a killed run wrote is in the page cache, and nowhere else.
        ("create and fill", "featcache.store.writer.sync_directory", None, "acknowledged rows are lost"),
        ("create and fill", "featcache.store.files.sync_file", None, "acknowledged rows are lost"),
        # A growth of which every row can be copied is not one of which every row was copied.
        (
            "relabel",
            "featcache.store.reader.FeatureStore.complete",
            True,
            "differs from that of an undisturbed",
        ),
    ],
)
def test_a_run_that_trusts_what_a_killed_one_left_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, fault: str, replacement: object, expected: str
) -> None:
    experiment = bench.experiment(name)
    monkeypatch.setattr(fault, replacement or (lambda path: None))
    assert expected in said(experiment.explore(Plan(kill_every=1, again=30)))


def test_a_leftover_that_stops_the_next_run_is_caught(bench: Bench) -> None:
    experiment = bench.experiment("create and fill")
    experiment.protocol.run = lambda folder: os.close(os.open(folder / "left", os.O_CREAT | os.O_EXCL)) or 0
    cut = experiment.cuts[-1]
    wrong, _ = experiment.resume(cut, cut.everything(), frozenset())
    assert wrong == ["left is left over"]


def test_a_state_is_found_again_by_its_name(bench: Bench) -> None:
    experiment = bench.experiment("create and fill", After(Sync, created=True))
    tally = experiment.explore(Plan(draws=200, seed=7))
    violation = tally.violations[-1]
    assert violation.what in experiment.find(violation.place)


def write_two_sectors(folder: Path) -> None:
    fd = os.open(folder / "new", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"a" * 1024, 0)
    os.fsync(fd)
    os.pwrite(fd, b"b" * 1100, 256)
    os.close(fd)
    os.rename(folder / "new", folder / "old")


def test_what_was_not_synced_is_torn_at_sectors_and_undone(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    cut = list(cuts(record(lambda: write_two_sectors(tmp_path), tmp_path)))[-1]
    inode = cut.issued_names["old"]

    def image(*sectors: int, sizes: bool = False, stale: bool = False) -> bytes:
        mask = sum(1 << sector for sector in sectors)
        return cut.image(inode, Fate(names=(1, 1), data={inode: (mask,)}, sizes=sizes, stale=stale))

    assert image() == b"a" * 1024
    assert image(0) == b"a" * 256 + b"b" * 256 + b"a" * 512
    assert image(2) == b"a" * 1024 + b"b" * 332
    assert image(0, 1, 2) == b"a" * 256 + b"b" * 1100
    assert image(sizes=True) == b"a" * 1024 + bytes(332)
    assert image(sizes=True, stale=True) == b"a" * 1024 + b"\xa5" * 332
    assert cut.reachable((0, 0)) == {"old": 0}
    assert cut.reachable((1, 0)) == {"old": 0, "new": inode}
    assert cut.reachable((0, 1)) == {"old": inode}
    assert cut.reachable((1, 2)) == {"old": inode, "new": inode}


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"x"),
        lambda path: os.truncate(path, 0),
        lambda path: os.link(path, path.with_name("twin")),
        lambda path: path.open("a").close(),
    ],
)
def test_a_change_that_would_not_be_recorded_is_refused(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(AssertionError, match="changes the folder and is not recorded"):
        record(lambda: change(tmp_path / "file"), tmp_path)


def test_a_change_that_nobody_saw_is_found_at_the_end(tmp_path: Path) -> None:
    def write_by_memory_map() -> None:
        fd = os.open(tmp_path / "file", os.O_RDWR)
        with mmap.mmap(fd, 0) as mapped:
            mapped[0] = 0
        os.close(fd)

    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(AssertionError, match="file changed by a way that was not recorded"):
        record(write_by_memory_map, tmp_path)
