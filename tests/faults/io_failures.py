"""Runs of featcache in which the k-th I/O call fails, and what must be true afterwards.

Knows the functions of the standard library that reach a disk, and what a store must hold; nothing of how
featcache is built inside. Everything runs in this process, so that a case costs milliseconds.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import itertools
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from featcache.commands import embed as embed_command
from featcache.commands.embed import embed
from featcache.errors import FeatcacheError
from featcache.heads.ridge import RidgeHead
from featcache.model import Model
from featcache.store import lock
from featcache.store import writer as store_writer
from featcache.store.blocks import BlockCheck
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

SECONDS_TO_HANG = 20

# What a call can do besides failing with an errno.
SHORT, NOTHING, DONE_YET_EIO = "short", "nothing", "done yet EIO"
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EINTR", SHORT, NOTHING, DONE_YET_EIO)

# Calls by the place of their path or descriptor; those in _PARTIAL may do less than they were asked.
_BY_PATH = (
    "open", "stat", "lstat", "unlink", "remove", "replace", "rename", "link", "mkdir", "truncate",
    "scandir", "listdir", "readlink", "access", "statvfs",
)  # fmt: skip
_BY_DESCRIPTOR = (
    "read", "pread", "preadv", "readv", "write", "pwrite", "pwritev", "writev", "ftruncate",
    "posix_fallocate", "fsync", "fdatasync", "fstat", "fchmod", "fstatvfs", "copy_file_range", "lseek",
    "dup", "close",
)  # fmt: skip
_PARTIAL = {"read": 1, "pread": 1, "preadv": 1, "write": 1, "pwrite": 1, "copy_file_range": 2}
_KINDS = ("creating", "growing", "lock", "model", "h5")  # by the ending of their names
_SYNCS = ("fsync", "fdatasync")


@dataclass(frozen=True)
class Fault:
    """Call number `at` of a run, from 0, fails with `error`, and so do all after it if `forever`."""

    at: int
    error: str
    forever: bool = False

    def __str__(self) -> str:
        return f"{self.error} {'from' if self.forever else 'at'} {self.at}"


@dataclass(frozen=True)
class Call:
    """One I/O call as it was met: the function, what it was about, and who in featcache made it."""

    name: str
    about: str
    site: str

    def __str__(self) -> str:
        return f"{self.name} of the {self.about} in {self.site}"


class Hung(BaseException):
    """The run was still busy after SECONDS_TO_HANG."""


class IoCalls:
    """Counts the I/O calls on files below `folder` while it is entered, and lets one of them fail.

    calls: every call so far. hit: the first that failed. lost: of this run and those before it.
    """

    def __init__(self, folder: Path, fault: Fault | None = None, *, lost: Lost | None = None) -> None:
        self.folder = os.path.realpath(folder)
        self.fault = fault
        self.calls: list[Call] = []
        self.hit: Call | None = None
        self.lost = lost if lost is not None else Lost()
        self._stack = ExitStack()

    def __enter__(self) -> IoCalls:
        for name in _BY_PATH:
            self._patch(os, name, self._path_of_name)
        for name in _BY_DESCRIPTOR:
            if hasattr(os, name):
                self._patch(os, name, self._path_of_descriptor)
        for name in ("lockf", "flock", "fcntl"):
            self._patch(fcntl, name, self._path_of_descriptor)
        for kind in mmap.mmap.__subclasses__():
            self._stack.enter_context(mock.patch.object(kind, "__new__", self._mapping()))
        opened = self._failing(io.open, "open()", self._path_of_name)
        self._stack.enter_context(mock.patch("builtins.open", opened))
        self._stack.enter_context(mock.patch.object(io, "open", opened))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _patch(self, module: Any, name: str, path_of: Callable[[tuple[Any, ...]], str | None]) -> None:
        call = self._failing(getattr(module, name), name, path_of)
        self._stack.enter_context(mock.patch.object(module, name, call))

    def _mapping(self) -> Callable[..., Any]:
        """The making of a map, where the map of a file is a call."""
        meet = self._failing(lambda fd: None, "mmap", self._path_of_descriptor)

        def make(kind: type, fd: int, *args: Any, **more: Any) -> Any:
            if fd != -1:
                meet(fd)
            return mmap.mmap.__new__(kind, fd, *args, **more)

        return make

    def _failing(
        self, real: Callable[..., Any], name: str, path_of: Callable[[tuple[Any, ...]], str | None]
    ) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            path = path_of(args)
            site = path and _site()
            if not path or not site:
                return real(*args, **more)
            met = Call(name, self._role(path), site)
            number = len(self.calls)
            self.calls.append(met)
            if self._fails(number, name):
                self.hit = self.hit or met
                return self._fail(real, name, args, more)
            result = real(*args, **more)
            self.lost.saw(name, args, result)
            return result

        return call

    def _fails(self, number: int, name: str) -> bool:
        fault = self.fault
        if fault is None or number < fault.at or (number > fault.at and not fault.forever):
            return False
        return fault.error not in (SHORT, NOTHING) or name in _PARTIAL

    def _fail(self, real: Callable[..., Any], name: str, args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        assert self.fault is not None
        error = self.fault.error
        if error in (SHORT, NOTHING):
            if error == NOTHING:
                return b"" if name in ("read", "pread") else 0
            result = real(*_halved(name, args), **more)
            self.lost.saw(name, args, result)
            return result
        if name == "close" or error == DONE_YET_EIO:  # Linux frees the descriptor whatever close reports
            result = real(*args, **more)
            self.lost.saw(name, args, result)
            if name in ("open", "open()", "dup"):
                os.close(result) if isinstance(result, int) else result.close()
        if name in _SYNCS:
            self.lost.sync_failed(args[0])
        code = errno.EIO if error == DONE_YET_EIO else getattr(errno, error)
        raise OSError(code, os.strerror(code), *([args[0]] if name in _BY_PATH else []))

    def _role(self, path: str) -> str:
        if path == self.folder:
            return "folder"
        name = os.path.basename(path)
        return next((f"{kind} file" for kind in _KINDS if re.search(rf"\.{kind}\b", name)), "file")

    def _path_of_name(self, args: tuple[Any, ...]) -> str | None:
        if isinstance(args[0], int):
            return self._path_of_descriptor(args)
        return self._within(os.path.abspath(os.fsdecode(args[0])))

    def _path_of_descriptor(self, args: tuple[Any, ...]) -> str | None:
        fd = args[0] if isinstance(args[0], int) else args[0].fileno()
        try:
            return self._within(_readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
        except OSError:
            return None

    def _within(self, path: str) -> str | None:
        return path if path == self.folder or path.startswith(self.folder + os.sep) else None


class Lost:
    """Byte ranges of files whose sync failed and that were not written again since, kept by inode.

    The page cache has them and the disk may not, whatever a later sync says ("fsyncgate").
    """

    def __init__(self) -> None:
        self._unsynced: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
        self._lost: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)

    def saw(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "pwrite" and result:
            inode, written = _inode(args[0]), (args[2], args[2] + result)
            self._unsynced[inode].add(written)
            self._lost[inode] = {
                rest for one in self._lost[inode] for rest in _minus(one, written) if rest[0] < rest[1]
            }
        elif name in _SYNCS:
            self._unsynced[_inode(args[0])].clear()

    def sync_failed(self, fd: int) -> None:
        inode = _inode(fd)
        self._lost[inode] |= self._unsynced.pop(inode, set())

    def of(self, path: Path) -> list[tuple[int, int]]:
        status = _stat(path)
        return sorted(self._lost[status.st_dev, status.st_ino])


# The originals, for what must not be counted.
_readlink, _stat, _fstat = os.readlink, os.stat, os.fstat


def _inode(fd: int) -> tuple[int, int]:
    status = _fstat(fd)
    return status.st_dev, status.st_ino


def _minus(one: tuple[int, int], other: tuple[int, int]) -> Iterator[tuple[int, int]]:
    yield one[0], min(one[1], max(one[0], other[0]))
    yield max(one[0], min(one[1], other[1])), one[1]


def _halved(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that does half of what it was asked, at least one byte."""
    place = _PARTIAL[name]
    asked = args[place]
    half: Any
    if isinstance(asked, int):
        half = max(1, asked // 2)
    elif name == "preadv":
        half = [memoryview(asked[0])[: max(1, len(asked[0]) // 2)]]
    else:
        view = memoryview(asked).cast("B")
        half = view[: max(1, len(view) // 2)]
    return (*args[:place], half, *args[place + 1 :])


def _site() -> str:
    """The three innermost functions of featcache below which this call is; "" where there is none."""
    frame: Any = sys._getframe(2)
    names: list[str] = []
    while frame is not None and len(names) < 3:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("featcache."):
            name = f"{module.rpartition('.')[2]}.{frame.f_code.co_qualname.rpartition('.')[2]}"
            if name not in names[-1:]:
                names.append(name)
        frame = frame.f_back
    return " < ".join(names)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Every case collects garbage to count open files; what there is already is left out of it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def watchdog() -> Iterator[None]:
    """Hung is raised in the run when it takes too long. For the main thread."""

    def bark(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Acknowledged:
    """The ids of the rows that `commit` has vouched for while this is entered."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Acknowledged:
        written: dict[StoreWriter, set[str]] = defaultdict(set)
        write_block, commit = StoreWriter.write_block, StoreWriter.commit

        def write_and_note(writer: StoreWriter, block: int, **columns: Any) -> None:
            layout = writer._layout
            mine = set(layout.table.ids[layout.rows_of(block)])
            written[writer] |= mine
            try:
                write_block(writer, block, **columns)
            except BaseException:
                written[writer] -= mine - self.ids
                raise

        def commit_and_note(writer: StoreWriter) -> None:
            commit(writer)
            self.ids |= written[writer]

        self._stack.enter_context(mock.patch.object(StoreWriter, "write_block", write_and_note))
        self._stack.enter_context(mock.patch.object(StoreWriter, "commit", commit_and_note))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@contextmanager
def small_blocks(*, block_rows: int = 4, group_bytes: int = 400) -> Iterator[None]:
    """Blocks and groups so small that a handful of images has several of each."""
    with ExitStack() as stack:
        owner = sys.modules.get("featcache.embedding")
        owner = owner if hasattr(owner, "BLOCK_ROWS") else embed_command
        stack.enter_context(mock.patch.object(owner, "BLOCK_ROWS", block_rows))
        stack.enter_context(mock.patch.object(store_writer, "GROUP_BYTES", group_bytes))
        yield


Rows = dict[str, tuple[bytes, str, bytes]]  # id -> features, label, sources


def rows_of_store(path: Path) -> Rows:
    """All rows of a complete store, after every check."""
    store = FeatureStore.open(path)
    features = store.features()
    sources = store.sources
    return {
        name: (features.X[row].tobytes(), features.classes[features.y[row]], sources[row].tobytes())
        for row, name in enumerate(features.ids)
    }


def done_rows(path: Path) -> dict[str, bytes]:
    """The features of each row of a store whose block agrees with its checksums."""
    layout = read_layout(path)
    blocks = BlockCheck(layout)
    X = layout.map(next(iter(layout.features.values())))
    return {
        layout.table.ids[row]: X[row].tobytes()
        for block in range(layout.n_blocks)
        if blocks.is_done(block)
        for row in range(*layout.rows_of(block).indices(layout.n_rows))
    }


@dataclass
class Scenario:
    """A run to disturb: what is in the folder before it, the call, and what must be there at its end."""

    name: str
    folder: Path  # the only files that are counted
    product: Path  # the file that the run makes
    before: Path  # a copy of the folder as the run finds it
    run: Callable[[], Any]
    check_end: Callable[[], list[str]]
    check_kept: Callable[[set[str]], list[str]]
    leaves_temporaries: bool = False  # of a name that no later run knows, where removing them fails
    calls: list[Call] = field(default_factory=list)

    def reset(self) -> None:
        """Bring the folder back to what it was before the run."""
        lock._held.clear()  # a lock that a case did not give back is its own violation, not that of the next
        for path in self.folder.iterdir():
            path.unlink()
        shutil.copytree(self.before, self.folder, dirs_exist_ok=True)  # it may be a disk of its own


Place = tuple[Scenario, int]  # a scenario and the number of a call in it


@dataclass
class Case:
    """One disturbed run, with its recovery."""

    scenario: Scenario
    faults: tuple[Fault, ...]
    hit: Call | None = None
    outcome: str = ""  # the class of the error; "succeeded"
    message: str = ""
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", then ".join(map(str, self.faults))
        said = f": {self.message[:300]}" if self.message else ""
        return f"{self.scenario.name}: {faults} ({self.hit}) -> {self.outcome}{said}"


def run_case(scenario: Scenario, *faults: Fault) -> Case:
    """Run the scenario once for each fault, then undisturbed, and note everything that is not as promised."""
    case = Case(scenario, faults)
    lost = Lost()
    acknowledged: set[str] = set()
    scenario.reset()
    with small_blocks():
        for fault in faults:
            _run_disturbed(case, fault, lost, acknowledged)
            case.violations += scenario.check_kept(acknowledged)
        try:
            with IoCalls(scenario.folder, lost=lost), watchdog():
                scenario.run()
        except (Exception, Hung) as exc:  # noqa: BLE001 - whatever it is, it is reported
            case.violations.append(f"the undisturbed run then failed: {_said(exc)}")
        else:
            unremovable = scenario.leaves_temporaries and any(fault.forever for fault in faults)
            case.violations += _finished(scenario) if unremovable else scenario.check_end()
            # A disk that takes nothing more does not take the withdrawal of what it did not sync either.
            for start, stop in [] if any(fault.forever for fault in faults) else lost.of(scenario.product):
                case.violations.append(
                    f"bytes {start}-{stop} were lost by a failed sync and not written again"
                )
    return case


def _run_disturbed(case: Case, fault: Fault, lost: Lost, acknowledged: set[str]) -> None:
    scenario = case.scenario
    gc.collect()
    open_before = _open_files(scenario.folder)
    calls = IoCalls(scenario.folder, fault, lost=lost)
    message = ""
    try:
        with watchdog(), Acknowledged() as acks, calls:
            scenario.run()
        outcome = "succeeded"
        case.violations += [f"it said to have succeeded, but {what}" for what in _finished(scenario)]
    except FeatcacheError as exc:
        outcome, message = type(exc).__name__, str(exc)
        case.violations += [f"{flaw}: {message!r}" for flaw in _flaws_of_message(message)]
        if fault.error == SHORT:
            case.violations.append(f"a call that did half must be looped over, got {_said(exc)}")
        elif fault.error != NOTHING and outcome in ("NotAStore", "DamagedStore", "ModelError"):
            case.violations.append(f"an I/O error is taken for damage: {_said(exc)}")
    except (Exception, Hung) as exc:  # noqa: BLE001
        outcome, message = type(exc).__name__, _said(exc)
        case.violations.append(f"neither success nor a FeatcacheError: {_said(exc)}{_last_frame(exc)}")
    acknowledged |= acks.ids
    case.hit = case.hit or calls.hit
    case.outcome, case.message = case.outcome or outcome, case.message or message
    gc.collect()
    leaked = _open_files(scenario.folder) - open_before
    case.violations += [f"left open: {path}" for path in leaked]


def _finished(scenario: Scenario) -> list[str]:
    # What cleaning up could not remove because of the fault is removed by the next run.
    return [what for what in scenario.check_end() if not what.startswith("left over")]


def _flaws_of_message(message: str) -> list[str]:
    flaws = [] if message and "\n" not in message else ["not one line"]
    flaws += ["a bare errno"] if "Errno" in message else []
    says_what_to_do = re.search(r"\bagain\b|[Ww]ait|[Dd]elete|Restore|`featcache|--output", message)
    return flaws + ([] if says_what_to_do else ["the message does not say what to do"])


def _said(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc)[:300]}"


def _last_frame(exc: BaseException) -> str:
    trace, last = exc.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith("featcache."):
            last = f" at {trace.tb_frame.f_globals['__name__']}:{trace.tb_lineno}"
        trace = trace.tb_next
    return last


def _open_files(folder: Path) -> Counter[str]:
    """What of the folder this process has open, a map without a descriptor included in none."""
    found: Counter[str] = Counter()
    prefix = os.path.realpath(folder)
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = _readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith(prefix):
            found[os.path.relpath(target, prefix)] += 1
    return found


TOY = "channel_mean:channel_mean"


class Workload:
    """Images and manifests under `base`, and the runs over them that are to be disturbed."""

    def __init__(self, base: Path, *, images: int = 14) -> None:
        self.base = base
        self.photos = base / "photos"
        self.stores = base / "stores"
        self.store = self.stores / "store.h5"
        self.names = [f"{i:02d}.png" for i in range(images)]
        self.photos.mkdir(parents=True)
        self.stores.mkdir()
        for i, name in enumerate(self.names):
            pixels = np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.photos / name)
        # The smaller one lacks three images, and calls one by another label.
        self._write_manifest("all.csv", self.names)
        self._write_manifest("some.csv", [*self.names[:2], *self.names[5:]], relabelled=self.names[6])
        self.expected = {name: self._calm(name) for name in ("all", "some")}

    def embed(self, manifest: str = "all", **more: Any) -> Any:
        path = self.base / f"{manifest}.csv"
        more = {"batch_size": 2, "workers": 1, "backbone": TOY, "prune": True, **more}
        return embed(path, self.store, root=self.photos, **more)

    def scenarios(self) -> list[Scenario]:
        """Creating, growing, continuing either, finding nothing to do, and saving a model."""
        made = [
            self._of("create", []),
            self._of("grow", ["some"]),
            self._of("continue", [("all", 3)]),
            self._of("continue a growth", ["some", ("all", 1)]),
            self._of("replace a growth", [("some", None), ("all", 1)], runs="some"),
            self._of("nothing to do", ["all"]),
            self._model(),
        ]
        for scenario in made:
            scenario.reset()
            with small_blocks(), IoCalls(scenario.folder) as calls:
                scenario.run()
            scenario.calls = calls.calls
            flaws = scenario.check_end()
            if flaws:
                raise AssertionError(f"{scenario.name}: undisturbed, yet {flaws}")
        return made

    def _write_manifest(self, name: str, images: Sequence[str], *, relabelled: str = "") -> None:
        labels = {image: f"c{int(image[:2]) % 2}" for image in images} | (
            {relabelled: "c2"} if relabelled else {}
        )
        lines = [f"{image},{labels[image]}" for image in images]
        (self.base / name).write_text("\n".join(["path,label", *lines]) + "\n")

    def _calm(self, manifest: str) -> Rows:
        with small_blocks():
            self.embed(manifest)
        rows = rows_of_store(self.store)
        self._clear()
        return rows

    def _clear(self) -> None:
        shutil.rmtree(self.stores)
        self.stores.mkdir()

    def _of(self, name: str, history: Iterable[Any], *, runs: str = "all") -> Scenario:
        """A run of embed, after runs of manifests: each to its end, or to the n-th forward pass."""
        self._clear()
        with small_blocks():
            for step in history:
                manifest, passes = step if isinstance(step, tuple) else (step, None)
                with stopping_after(passes), suppress(KeyboardInterrupt):
                    self.embed(manifest)
        before = self.base / f"before {name}"
        shutil.copytree(self.stores, before)
        old = None
        if self.store.exists() and FeatureStore.open(self.store).complete:
            old = rows_of_store(self.store)
        return Scenario(
            name=name,
            folder=self.stores,
            product=self.store,
            before=before,
            run=lambda: self.embed(runs),
            check_end=lambda: self._check_end(runs),
            check_kept=lambda acknowledged: self._check_kept(acknowledged, old),
        )

    def _check_end(self, manifest: str) -> list[str]:
        flaws = []
        left = sorted(path.name for path in self.stores.iterdir() if path != self.store)
        flaws += [f"left over: {', '.join(left)}"] if left else []
        try:
            rows = rows_of_store(self.store)
        except FeatcacheError as exc:
            return [*flaws, f"the store cannot be read: {_said(exc)}"]
        if rows != self.expected[manifest]:
            wrong = [
                key
                for key in rows | self.expected[manifest]
                if rows.get(key) != self.expected[manifest].get(key)
            ]
            flaws.append(f"rows differ from an undisturbed run: {', '.join(wrong[:5])}")
        return flaws

    def _check_kept(self, acknowledged: set[str], old: Rows | None) -> list[str]:
        flaws = []
        found: dict[str, bytes] = {}
        for path in self.stores.iterdir():
            if path.name == self.store.name or re.search(r"\.growing(\.\d+)?$", path.name):
                try:
                    found |= done_rows(path)
                except FeatcacheError as exc:
                    flaws.append(f"{path.name} cannot be read: {_said(exc)}")
        everything = self.expected["all"] | self.expected["some"]
        wrong = [name for name, vector in found.items() if vector != everything[name][0]]
        flaws += [f"wrong features in {', '.join(wrong[:5])}"] if wrong else []
        missing = sorted(acknowledged - found.keys())
        flaws += [f"acknowledged rows are gone: {', '.join(missing[:5])}"] if missing else []
        if old is not None:
            served = rows_of_store(self.store)
            if served != old and served != self.expected["all"]:
                flaws.append("the store is neither the old one nor the new one")
        return flaws

    def _model(self) -> Scenario:
        self._clear()
        with small_blocks():
            self.embed()
        store = FeatureStore.open(self.store)
        features = store.features()
        path = self.stores / "toy.model"
        models = [_toy_model(features, store.provenance, alpha) for alpha in (1.0, 2.0)]
        self._clear()
        models[0].save(path)
        before = self.base / "before save"
        shutil.copytree(self.stores, before)

        def saved() -> int | None:
            """Which of the models the file is; the order of its metadata differs from save to save."""
            model = Model.load(path)
            is_it = [
                model.params == one.params
                and all(np.array_equal(model.arrays[k], one.arrays[k]) for k in one.arrays)
                for one in models
            ]
            return is_it.index(True) if any(is_it) else None

        def check_kept(_: set[str]) -> list[str]:
            return ["the model is neither the old nor the new one"] if saved() is None else []

        def check_end() -> list[str]:
            left = sorted(other.name for other in self.stores.iterdir() if other != path)
            flaws = [f"left over: {', '.join(left)}"] if left else []
            return flaws + ([] if saved() == 1 else ["the model is not the new one"])

        return Scenario(
            name="save a model",
            folder=self.stores,
            product=path,
            before=before,
            run=lambda: models[1].save(path),
            check_end=check_end,
            check_kept=check_kept,
            leaves_temporaries=True,
        )


def _toy_model(features: Any, provenance: Any, alpha: float) -> Model:
    head = RidgeHead(alpha=alpha).fit(np.asarray(features.X, dtype=np.float64), features.y)
    arrays, rest = head.to_arrays()
    return Model(
        head_name="ridge", params={"alpha": alpha}, arrays=arrays, rest=rest, classes=features.classes,
        spec=features.spec, nodes=features.nodes, provenance=provenance, metrics={}, chosen={},
    )  # fmt: skip


@contextmanager
def stopping_after(passes: int | None) -> Iterator[None]:
    """KeyboardInterrupt in the forward pass after so many; None never."""
    from featcache.engines.torch_eager import TorchEager

    plain = TorchEager.embed
    left = itertools.count() if passes is None else iter(range(passes))

    def embed_or_stop(engine: Any, pixels: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return plain(engine, pixels)

    with mock.patch.object(TorchEager, "embed", embed_or_stop):
        yield


def calls_of_each_site(scenarios: Sequence[Scenario]) -> tuple[list[Place], list[Place]]:
    """The first call of every site in the first scenario that has it, and the last in the last."""
    first: dict[Call, Place] = {}
    last: dict[Call, Place] = {}
    for scenario in scenarios:
        for number, call in enumerate(scenario.calls):
            first.setdefault(call, (scenario, number))
            last[call] = (scenario, number)
    return list(first.values()), list(last.values())


def can_happen(error: str, call: Call) -> bool:
    """Whether a call can do less than it was asked, where that is the error."""
    return error not in (SHORT, NOTHING) or call.name in _PARTIAL


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own on `folder`, by the options of mount(8). OSError where that is not allowed."""
    _mount(*options, str(folder))
    try:
        yield
    finally:
        gc.collect()  # maps that are still held keep a disk busy
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system while it is in use."""
    _mount("-o", f"remount,{options}", str(folder))


def _mount(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as exc:
        raise OSError(f"mount {' '.join(arguments)}: {exc.stderr.strip()}") from exc


def numbers_of_sites(calls: Sequence[Call]) -> list[int]:
    """The number of the first and of the last call of every site."""
    first: dict[Call, int] = {}
    last: dict[Call, int] = {}
    for number, call in enumerate(calls):
        first.setdefault(call, number)
        last[call] = number
    return sorted({*first.values(), *last.values()})
