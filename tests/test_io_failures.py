"""Disks that fail: every I/O call of every kind of run, a disk that is really full, what cannot be read.

`scripts/fault_io.py` does the same with every call and error, and while recovering.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import io_failures
from faults.io_failures import (
    SHORT,
    TOY,
    Case,
    Fault,
    IoCalls,
    Scenario,
    Workload,
    calls_of_each_site,
    can_happen,
    mounted,
    quick_collections,
    remount,
    rows_of_store,
    run_case,
    small_blocks,
    watchdog,
)

from featcache import disk
from featcache.commands.embed import embed
from featcache.errors import DataError, DiskError, FeatcacheError
from featcache.images import identity
from featcache.model import Model
from featcache.records import RowStatus
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return Workload(tmp_path_factory.mktemp("io") / "work")


@pytest.fixture(scope="module")
def scenarios(workload: Workload) -> Iterator[dict[str, Scenario]]:
    made = workload.scenarios()
    with quick_collections():
        yield {scenario.name: scenario for scenario in made}


def require_none(cases: list[Case]) -> None:
    bad = [case for case in cases if case.violations]
    if bad:
        report = "\n".join(f"{case}\n    " + "\n    ".join(case.violations) for case in bad[:8])
        pytest.fail(f"{len(bad)} of {len(cases)} cases:\n{report}", pytrace=False)


WRITING = ("open", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "replace", "lockf")
# The calls on which an error is tried at every commit; the script tries every error on every call.
TRIED_ON: dict[str, tuple[str, ...]] = {
    "ENOSPC": WRITING,
    "EINTR": (*WRITING, "pread", "preadv", "close"),
}


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EINTR", SHORT])
def test_a_failing_call_costs_nothing_but_the_run(scenarios: dict[str, Scenario], error: str) -> None:
    """At every call site, once and for ever: one clear line or success, and the same command goes on."""
    firsts, lasts = calls_of_each_site(list(scenarios.values()))
    cases = [
        run_case(scenario, Fault(number, error, forever))
        for forever, places in ((False, firsts), (True, lasts))
        for scenario, number in places
        if can_happen(error, scenario.calls[number])
        and scenario.calls[number].name in TRIED_ON.get(error, scenario.calls[number].name)
    ]
    require_none(cases)
    assert len(cases) > 40


def test_the_recovery_may_fail_as_well(scenarios: dict[str, Scenario]) -> None:
    chosen = [
        (scenario, number)
        for name in ("create", "grow")
        for scenario in [scenarios[name]]
        for number, call in enumerate(scenario.calls)
        if call.name in ("pwrite", "fsync", "fdatasync", "replace", "posix_fallocate")
    ]
    errors = itertools.cycle(["EIO", "ENOSPC", "EDQUOT", "EROFS"])
    require_none(
        [
            run_case(scenario, Fault(number, error), Fault(number // 2 + 10, error, forever=True))
            for (scenario, number), error in zip(chosen[::2], errors, strict=False)
        ]
    )


def test_a_disk_that_takes_nothing_more_ends_the_run(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["create"]
    number = max(i for i, call in enumerate(scenario.calls) if call.name == "pwrite")
    case = run_case(scenario, Fault(number, io_failures.NOTHING, forever=True))
    require_none([case])
    assert case.outcome == "DiskError"


def test_a_quota_is_a_full_disk_to_the_user(scenarios: dict[str, Scenario]) -> None:
    scenario = scenarios["create"]
    number = next(i for i, call in enumerate(scenario.calls) if call.name == "posix_fallocate")
    case = run_case(scenario, Fault(number, "EDQUOT"))
    assert "quota exceeded" in case.message
    assert "free space" in case.message


# That the harness sees what it is for.


def test_the_harness_sees_a_sync_that_is_believed_at_the_second_try(
    scenarios: dict[str, Scenario], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync_twice(fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError:
            os.fdatasync(fd)

    monkeypatch.setattr(disk, "sync_data", sync_twice)
    monkeypatch.setattr("featcache.store.writer.sync_data", sync_twice)
    scenario = scenarios["create"]
    number = next(
        i for i, call in enumerate(scenario.calls) if call.name == "fdatasync" and "commit" in call.site
    )
    assert "lost by a failed sync" in " ".join(run_case(scenario, Fault(number, "EIO")).violations)


def test_the_harness_sees_a_short_write_that_is_not_gone_on_with(
    scenarios: dict[str, Scenario], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_once(fd: int, data: Any, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    monkeypatch.setattr("featcache.store.writer.write_at", write_once)
    scenario = scenarios["create"]
    number = next(i for i, call in enumerate(scenario.calls) if "write_block" in call.site)
    assert run_case(scenario, Fault(number, SHORT)).violations


def test_the_harness_sees_a_promise_that_is_not_kept(
    scenarios: dict[str, Scenario], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.store.writer.sync_data", lambda fd: None)
    monkeypatch.setattr(StoreWriter, "write_block", lambda self, block, **_: None)
    scenario = scenarios["continue"]
    number = len(scenario.calls) - 1
    assert "acknowledged rows are gone" in " ".join(run_case(scenario, Fault(number, "EIO")).violations)


# Signals.


def test_a_run_under_a_hail_of_signals_is_an_undisturbed_run(workload: Workload) -> None:
    """System calls that a signal interrupts are gone on with."""
    rung = 0

    def ring(*_: object) -> None:
        nonlocal rung
        rung += 1

    for path in workload.stores.iterdir():
        path.unlink()
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        with small_blocks():
            workload.embed()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung > 5
    assert rows_of_store(workload.store) == workload.expected["all"]


# What is read.


@pytest.mark.parametrize("error", ["EIO", "EACCES", "EINTR", SHORT])
def test_a_store_that_cannot_be_read_is_one_line(toy_store: Path, error: str) -> None:
    with IoCalls(toy_store.parent) as calm:
        FeatureStore.open(toy_store).features()
    require_clean_reading(lambda: FeatureStore.open(toy_store).features().X.sum(), toy_store, calm, error)


@pytest.mark.parametrize("error", ["EIO", "EACCES", "EINTR"])
def test_a_model_that_cannot_be_read_is_one_line(
    scenarios: dict[str, Scenario], workload: Workload, error: str
) -> None:
    scenarios["save a model"].reset()
    path = workload.stores / "toy.model"
    with IoCalls(path.parent) as calm:
        Model.load(path)
    require_clean_reading(lambda: len(Model.load(path).arrays), path, calm, error)


def require_clean_reading(read: Callable[[], Any], path: Path, calm: IoCalls, error: str) -> None:
    assert calm.calls
    expected = read()
    for number, call in enumerate(calm.calls):
        for forever in (False, True):
            try:
                with IoCalls(path.parent, Fault(number, error, forever)), watchdog():
                    got = read()
            except FeatcacheError as exc:
                assert error != SHORT, f"{call}: {exc}"  # noqa: PT017
                assert "\n" not in str(exc)  # noqa: PT017
                assert "Errno" not in str(exc), call  # noqa: PT017
                assert "damaged" not in str(exc), call  # noqa: PT017
            else:
                assert got == expected
            assert read() == expected


@pytest.mark.parametrize(
    ("function", "code", "status"),
    [
        *(
            (function, code, RowStatus.UNREADABLE)
            for function in ("open", "read", "fstat")
            for code in (errno.EIO, errno.EACCES, errno.ESTALE)
        ),
        ("open", errno.ENOENT, RowStatus.MISSING),
    ],
)
def test_an_image_that_cannot_be_read_costs_its_row_until_it_can(
    workload: Workload,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    code: int,
    status: RowStatus,
) -> None:
    store = tmp_path / "store.h5"

    def run() -> Any:
        return embed(workload.base / "all.csv", store, root=workload.photos, backbone=TOY, workers=1)

    plain = getattr(identity.os, function)

    def fail(target: Any, *more: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if path.endswith("03.png"):
            raise OSError(code, os.strerror(code), path)
        return plain(target, *more)

    with monkeypatch.context() as patch:
        patch.setattr(identity.os, function, fail)
        result = run()
    assert (result.embedded, result.failed) == (13, 1)
    assert FeatureStore.open(store).failed_rows() == [("03.png", status)]
    assert os.strerror(code).lower() in result.describe().lower() or status == RowStatus.MISSING
    result = run()
    assert (
        result.failed == 0 or status == RowStatus.MISSING
    )  # a file that was not there is looked for by stat
    if status != RowStatus.MISSING:
        assert rows_of_store(store) == workload.expected["all"]


def test_a_manifest_that_cannot_be_read_is_one_line(workload: Workload, tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="all.csv.*(Input/output error|cannot be)"),
        IoCalls(workload.base, Fault(0, "EIO", forever=True)),
    ):
        embed(workload.base / "all.csv", tmp_path / "s.h5", root=workload.photos, backbone=TOY)


@pytest.mark.parametrize("error", ["EIO", "EACCES"])
def test_weights_that_cannot_be_read_are_one_line(tmp_path: Path, error: str) -> None:
    import torch

    from featcache.backbones import load_backbone

    weights = tmp_path / "weights" / "squeezenet.pth"
    weights.parent.mkdir()
    torch.save(load_backbone("squeezenet1_1", weights="random").module.state_dict(), weights)

    def load() -> str:
        return load_backbone("squeezenet1_1", weights=str(weights)).weights.sha256

    with IoCalls(weights.parent) as calm:
        expected = load()
    for number, call in enumerate(calm.calls):
        for forever in (False, True):
            try:
                with IoCalls(weights.parent, Fault(number, error, forever)):
                    assert load() == expected
            except FeatcacheError as exc:
                assert "\n" not in str(exc), call  # noqa: PT017
    assert calm.calls


# Disks of their own.


@pytest.fixture
def small_disk(workload: Workload) -> Callable[..., Any]:
    """mounted(folder of the stores, options); skips where mounting is refused."""

    def mount(*options: str) -> Any:
        return mounted(workload.stores, *options)

    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with mount("-t", "tmpfs", "-o", "size=64k", "tmpfs"):
            pass
    except OSError as exc:
        pytest.skip(f"this machine refuses to mount: {exc}")
    return mount


SIZES = [*(f"nr_blocks={pages}" for pages in range(1, 12)), *(f"nr_inodes={n}" for n in range(2, 6))]


@pytest.mark.parametrize("name", ["create", "grow", "continue", "continue a growth", "save a model"])
@pytest.mark.parametrize("reserving", [True, False])
def test_a_full_disk_at_any_stage_is_one_line_and_more_space_goes_on(
    scenarios: dict[str, Scenario],
    small_disk: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    reserving: bool,
) -> None:
    """Disks of 1, 2, 3, … pages or names, so that space ends everywhere; with and without posix_fallocate."""
    scenario = scenarios[name]

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not reserving:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    outcomes = []
    for size in SIZES:
        with small_disk("-t", "tmpfs", "-o", size, "tmpfs"):
            try:
                scenario.reset()
            except OSError:
                continue  # not even what was there before has space
            with small_blocks():
                try:
                    scenario.run()
                    outcomes.append("done")
                except DiskError as exc:
                    outcomes.append("full")
                    assert "No space left" in str(exc)  # noqa: PT017
                    assert "free space" in str(exc)  # noqa: PT017
                    assert scenario.check_kept(set()) == []
                    remount(scenario.folder, "size=1M,nr_inodes=100")
                    scenario.run()
            assert scenario.check_end() == [], size
    assert {"full", "done"} <= set(outcomes), outcomes


def test_a_read_only_folder_is_one_line(
    scenarios: dict[str, Scenario], small_disk: Callable[..., Any], workload: Workload
) -> None:
    scenario = scenarios["grow"]
    with small_disk("-t", "tmpfs", "tmpfs"), small_blocks():
        scenario.reset()
        remount(scenario.folder, "ro")
        with pytest.raises(DiskError, match="Read-only file system.*again"):
            scenario.run()
        assert rows_of_store(workload.store) == workload.expected["some"]
        remount(scenario.folder, "rw")
        scenario.run()
        assert scenario.check_end() == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(
    scenarios: dict[str, Scenario], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    for scenario in scenarios.values():
        scenario.reset()
        with small_blocks():
            scenario.run()
        assert scenario.check_end() == []


def test_features_of_the_toy_backbone_differ_from_image_to_image(workload: Workload) -> None:
    """Rows in each other's place would not be seen otherwise."""
    vectors = [
        np.frombuffer(vector, np.float32).tolist() for vector, _, _ in workload.expected["all"].values()
    ]
    assert len({tuple(vector) for vector in vectors}) == len(vectors)
