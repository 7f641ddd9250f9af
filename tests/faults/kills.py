"""kill -9 at random instants of a real `embed`, and what must hold after each.

A round takes a small data set through create, fill, grow or repair in a chain of child processes. All but the
last are killed, so that a resumed run is often killed as well; the last ends by itself. After every kill the
folder is judged with the store's own reader and with plain h5py; after the last run it must hold one store,
equal to that of an undisturbed run, and nothing else.

The process that forks the children has imported torch but never run it, so that a child costs milliseconds
and starts with no threads of torch. Knows processes and stores; on which file system a store lies, and
whether what was not synced survives the end of a run, is for `power_cuts` to know.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import channel_mean  # noqa: F401  (imported before the fork, not in each child)
import h5py
import numpy as np
import numpy.ma
import torch
from PIL import Image

from featcache import embedding
from featcache.commands.embed import embed
from featcache.engines import torch_eager
from featcache.errors import DamagedStore, FeatcacheError, IncompleteStore, StoreError, StoreLocked
from featcache.progress import SilentProgress
from featcache.store import writer
from featcache.store.blocks import BlockCheck, BlockState
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore

BACKBONE = "channel_mean:channel_mean"
BATCH_SIZE = 4
MAX_KILLS = 5  # of one round, in a row
HANG_SECONDS = 60.0
STORE = "store.h5"
KINDS = ("fill", "grow", "repair")
STEPS = {"fill": 14, "grow": 22, "repair": 8}  # about as many calls on files as a run makes

_OURS = re.compile(r"store\.h5((\.growing(\.\d+)?)?(\.creating)?|\.lock)")
_F_SETPIPE_SZ = 1031


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A data set on disk, and the store an undisturbed run makes of it."""

    path: Path
    columns: Mapping[str, bytes]  # name -> all bytes, of what must be equal after whatever happened
    rows: frozenset[tuple[str, bytes]]  # (id, sha256 of the image)

    @property
    def digests(self) -> frozenset[bytes]:
        return frozenset(digest for _, digest in self.rows)


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """How one round embeds."""

    workers: int
    block_rows: int
    group_bytes: int
    group_seconds: float

    def group_rows(self, row_bytes: int) -> int:
        """No more rows than these are written between two syncs."""
        block_bytes = self.block_rows * row_bytes + 64
        return -(-self.group_bytes // block_bytes) * self.block_rows


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a run is stopped: `delay` seconds after it reports `event`, or right before its `step`-th call
    that opens, renames or removes a file in the store's folder."""

    event: str = "its end"
    delay: float = 0.0
    step: int | None = None


@dataclass(kw_only=True)
class Outcome:
    """What one round saw."""

    round: int
    kind: str
    phases: list[str] = field(default_factory=list)  # of each run that was to be stopped
    recoveries_stopped: int = 0
    resumes: int = 0
    recomputed: int = 0  # rows, the most of any resumption
    violations: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)  # whatever else is counted
    seconds: float = 0.0

    @property
    def stopped(self) -> int:
        """Runs that were stopped before they had ended."""
        return sum(phase != FINISHED for phase in self.phases)


FINISHED = "finished before"
MOST_RECOMPUTED = "rows computed again, the most of a run"
PHASES = ("no file yet", "creating", "filling", "growing", "repairing", "taking the name", "ending", FINISHED)


class Run:
    """A child process that embeds, and what it has told so far. Ended by `finish` or `kill`."""

    def __init__(self, work: Callable[[Callable[..., None]], None], *, log: Path) -> None:
        self.reports: list[dict[str, Any]] = []
        self._buffer, self._ended = b"", False
        self._fd, out = os.pipe()
        fcntl.fcntl(out, _F_SETPIPE_SZ, 1 << 20)  # the child never waits for its reader
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._fd)
            _be_the_child(work, out, log)
        os.close(out)
        self.log = log

    def wait_for(self, event: str, seconds: float) -> bool:
        """Whether the child has reported `event`; False when the time is over or the child has ended."""
        deadline = time.monotonic() + seconds
        while not self.told(event):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0] or not self._read():
                return self.told(event)
        return True

    def told(self, event: str) -> bool:
        return any(report["say"] == event for report in self.reports)

    def finish(self) -> int:
        """Wait for the child's own end: its exit status, or the number of a signal as a negative number."""
        self.wait_for("its end", HANG_SECONDS)
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.reports.append({"say": "hung"})
        return self._reap()

    def kill(self) -> int:
        """SIGKILL, now."""
        os.kill(self.pid, signal.SIGKILL)
        while self._read():
            pass
        return self._reap()

    def _read(self) -> bool:
        data = os.read(self._fd, 1 << 16)
        self._ended = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.reports += [json.loads(line) for line in lines]
        return bool(data)

    def _reap(self) -> int:
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _be_the_child(work: Callable[[Callable[..., None]], None], out: int, log: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(to, 1)
        os.dup2(to, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)

        def tell(say: str, **more: object) -> None:
            report = {"say": say, "at": time.monotonic(), **more}
            os.write(out, json.dumps(report).encode() + b"\n")

        work(tell)
        code = 0
    finally:
        if code:
            with open(log, "a") as file:
                traceback.print_exc(file=file)
        os._exit(code)


class _TellingProgress(SilentProgress):
    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell, self._left = tell, 0

    def start(self, label: str, *, total: int, unit: str) -> None:
        self._left = total
        self._tell("total", rows=total)

    def advance(self, count: int, *, stages: Mapping[str, float] | None = None) -> None:
        self._left -= count
        self._tell("computed" if self._left else "last rows", rows=count)


def _tell_of_files(tell: Callable[..., None], folder: str, *, last_step: int | None) -> None:
    """Report creating and renaming, and die before the `last_step`-th call on a file of `folder`.

    The interpreter's own audit events say so: nothing of featcache is replaced.
    """
    seen: set[str] = set()
    steps = 0

    def once(event: str) -> None:
        if event not in seen:
            seen.add(event)
            tell(event)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event not in ("open", "os.rename", "os.remove") or not str(arguments[0]).startswith(folder):
            return
        steps += 1
        if steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename":
            source = os.fspath(arguments[0])
            once("created" if source.endswith(".creating") else "naming")
        elif str(arguments[0]).endswith(".creating"):
            once("creating")

    sys.addaudithook(hear)


def _tell_of_blocks(tell: Callable[..., None]) -> None:
    """Report the blocks that `commit` has acknowledged."""
    real_write, real_commit = writer.StoreWriter.write_block, writer.StoreWriter.commit
    written: list[int] = []

    def write_block(self: writer.StoreWriter, block: int, **arrays: Any) -> None:
        written.append(block)  # before: the call ends with a commit when the group is full
        real_write(self, block, **arrays)

    def commit(self: writer.StoreWriter) -> None:
        real_commit(self)
        tell("acknowledged", uuid=self._layout.uuid, blocks=written)
        written.clear()

    writer.StoreWriter.write_block = write_block  # type: ignore[method-assign]
    writer.StoreWriter.commit = commit  # type: ignore[method-assign]


def embedding_work(
    data: Path,
    store: Path,
    knobs: Knobs,
    *,
    backbone: str = BACKBONE,
    last_step: int | None = None,
    sabotage: Callable[[], None] | None = None,
) -> Callable[[Callable[..., None]], None]:
    """What a child does: the real `embed`, with small blocks and groups, telling how far it is."""

    def work(tell: Callable[..., None]) -> None:
        embedding.BLOCK_ROWS = knobs.block_rows
        writer.GROUP_BYTES = knobs.group_bytes
        writer.GROUP_SECONDS = knobs.group_seconds
        if sabotage:
            sabotage()
        _tell_of_files(tell, str(store.parent), last_step=last_step)
        _tell_of_blocks(tell)
        tell("started")
        result = embed(
            data,
            store,
            backbone=backbone,
            device="cpu",
            batch_size=BATCH_SIZE,
            workers=knobs.workers,
            max_failures=0.5,
            prune=True,  # the next data set may have few images of the last one
            decoder="fast",  # left to itself it is chosen by each data set's own images
            progress=_TellingProgress(tell),
        )
        tell("result", **{k: getattr(result, k) for k in ("rows", "embedded", "reused", "failed")})

    return work


@dataclass
class Pace:
    """How long a run takes on this machine, as it is now: moments are drawn to meet running runs."""

    setup: float = 0.05  # seconds until the first image is asked for
    row: float = 0.001  # seconds a row

    def learn(self, run: Run) -> None:
        at = {report["say"]: report["at"] for report in run.reports if "at" in report}
        totals = [report["rows"] for report in run.reports if report["say"] == "total"]
        if not totals or totals[0] < 4 * BATCH_SIZE or "last rows" not in at:
            return
        self.setup += 0.2 * (at["total"] - at["started"] - self.setup)
        self.row += 0.2 * ((at["last rows"] - at["total"]) / totals[0] - self.row)


class Bench:
    """Data sets, what undisturbed runs make of them, and how long those take."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: str = "0",
        rows: tuple[int, int] = (50, 100),
        backbone: str = BACKBONE,
        n_trees: int = 5,
    ) -> None:
        self.folder, self.backbone = folder, backbone
        self.logs = folder / "logs"
        self.calm = folder / "calm"
        for path in (self.logs, self.calm):
            path.mkdir(parents=True)
        self.pace = Pace()
        self.vectors: dict[bytes, tuple[int, bytes]] = {}  # sha256 -> status, features
        gc.collect()
        gc.freeze()  # so that children do not copy pages for the collector's sake
        rng = Random(f"trees {seed}")
        folders = [*_plant(folder / "trees", rng, n_trees=n_trees, rows=rows)]
        self.trees = [self._embed_undisturbed(path) for path in folders]

    def _embed_undisturbed(self, data: Path) -> Tree:
        store = self.calm / f"{data.name}.h5"
        knobs = Knobs(workers=1, block_rows=BATCH_SIZE, group_bytes=1 << 20, group_seconds=60.0)
        run = self.start(data, store, knobs)
        if run.finish() != 0:
            raise RuntimeError(f"the undisturbed run failed: {run.log.read_text()}")
        self.pace.learn(run)
        opened = FeatureStore.open(store)
        digests = opened.sources["sha256"]
        features = opened.map()
        for row in range(len(opened)):
            vector = (int(opened.row_status[row]), features[row].tobytes())
            if self.vectors.setdefault(digests[row].tobytes(), vector) != vector:
                raise RuntimeError("one image has two vectors: the toy backbone depends on its batch")
        return Tree(path=data, columns=columns_of(opened), rows=_rows_of(opened))

    def start(self, data: Path, store: Path, knobs: Knobs, **more: Any) -> Run:
        """A child that embeds; `more` is for `embedding_work`."""
        work = embedding_work(data, store, knobs, backbone=self.backbone, **more)
        return Run(work, log=self.logs / "child.log")

    def calm_store(self, tree: Tree) -> Path:
        return self.calm / f"{tree.path.name}.h5"


def _plant(folder: Path, rng: Random, *, n_trees: int, rows: tuple[int, int]) -> Iterator[Path]:
    """Data sets that differ by images added, removed, edited, renamed and relabelled.

    An image they share is one file with several names, so that its stat is the same in each.
    """
    pool = folder / "pool"
    pool.mkdir(parents=True)
    images = [_draw_image(pool / f"{i}.png", i, rng) for i in range(2 * rows[1])]
    for number in range(n_trees):
        tree = folder / f"tree{number}"
        names = rng.sample(range(len(images)), rng.randint(*rows))
        for place, i in enumerate(sorted(names)):
            renamed = rng.random() < 0.1
            label = f"class{(i + rng.randrange(2) * renamed) % 3}"
            # A place named by its order, now and then, holds another image in every tree: an edit.
            name = f"{label}/place{place:03d}.png" if rng.random() < 0.1 else f"{label}/{i:03d}.png"
            target = tree / (f"new-{name}".replace("/", "-") if renamed and rng.random() < 0.2 else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(images[i], target)
            if rng.random() < 0.03:
                os.link(images[i], target.with_name(f"copy-{target.name}"))
        yield tree


def _draw_image(path: Path, number: int, rng: Random) -> Path:
    if rng.random() < 0.04:
        path.write_bytes(b"\x89PNG\r\n\x1a\n not a picture %d" % number)
        return path
    size = rng.randint(8, 16)
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def columns_of(store: FeatureStore) -> dict[str, bytes]:
    """All that must be equal between a store that was disturbed and one that was not."""
    table = store.table
    return {
        **{f"features/{node.key}": store.map(node.key).tobytes() for node in store.spec.nodes},
        "row_status": store.row_status.tobytes(),
        "sha256": np.ascontiguousarray(store.sources["sha256"]).tobytes(),
        "ids": json.dumps(table.ids).encode(),
        "classes": json.dumps(table.classes).encode(),
        "labels": table.labels.tobytes(),
        "splits": table.splits.tobytes(),
    }


def _rows_of(store: FeatureStore) -> frozenset[tuple[str, bytes]]:
    digests = store.sources["sha256"]
    return frozenset((name, digests[row].tobytes()) for row, name in enumerate(store.table.ids))


@dataclass(kw_only=True)
class Round:
    """One chain of runs on one store. `judge` is called after each stop, `judge_finished` after the last."""

    bench: Bench
    folder: Path
    knobs: Knobs
    tree: Tree
    kind: str
    rng: Random
    outcome: Outcome
    keeps_unsynced: bool = True  # whether what was written and not synced survives the stop
    sabotage: Callable[[], None] | None = None
    former: Tree | None = None  # the tree of the store that is being grown
    old_bytes: bytes | None = None
    old_reader: FeatureStore | None = None
    damaged: set[int] = field(default_factory=set)
    acknowledged: dict[str, set[int]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)  # digests of acknowledged rows
    named: bool = False  # whether a growth may have taken the store's name
    trees: list[Tree] = field(default_factory=list)
    at_most: int | None = None  # rows the next run may have to compute
    left: int | None = None  # rows the last run had not computed

    @property
    def store(self) -> Path:
        return self.folder / STORE

    def prepare(self) -> None:
        """Put the finished store there that is to be grown or repaired."""
        self.trees = [self.tree]
        if self.kind == "fill":
            return
        if self.kind == "grow":
            self.former = self.rng.choice([tree for tree in self.bench.trees if tree is not self.tree])
            self.trees.insert(0, self.former)
        shutil.copyfile(self.bench.calm_store(self.former or self.tree), self.store)
        opened = FeatureStore.open(self.store)
        self.seen = {opened.sources["sha256"][row].tobytes() for row in range(len(opened))}
        if self.kind == "repair":
            digests = opened.sources["sha256"].copy()
            self.damaged = damage_blocks(self.store, self.rng)
            for block in self.damaged:
                self.seen -= {digest.tobytes() for digest in digests[opened.layout.rows_of(block)]}
            return
        self.old_bytes = self.store.read_bytes()
        if self.keeps_unsynced:  # a file system cannot be unmounted while a file of it is mapped
            self.old_reader = opened

    def start(self, *, last_step: int | None = None) -> Run:
        more = {"last_step": last_step, "sabotage": self.sabotage}
        return self.bench.start(self.tree.path, self.store, self.knobs, **more)

    def change_tree(self) -> None:
        """Ask for other images while a growth is unfinished; as likely as not, for those of the old store."""
        others = [tree for tree in self.bench.trees if tree is not self.tree]
        if self.former in others and self.rng.random() < 0.5:
            others = [self.former]
        self.tree = self.rng.choice(others)
        self.trees.append(self.tree)
        self.at_most = self.left = None

    def phase(self, run: Run) -> str:
        """How far a run had come when it was stopped, by what it had told."""
        if run.told("result"):
            return FINISHED
        if run.told("naming"):
            return "taking the name"
        if run.told("last rows"):
            return "ending"
        if run.told("total"):
            return {"fill": "filling", "grow": "growing", "repair": "repairing"}[self.kind]
        return "creating" if run.told("creating") else "no file yet"

    def draw_moment(self) -> Moment:
        """An instant within the setting up or the embedding, or close to where files are made and named."""
        rng, pace, fresh = self.rng, self.bench.pace, not self.store.exists()
        where = rng.random()
        if where < 0.1:
            return Moment(step=rng.randint(1, STEPS[self.kind]))
        if where < 0.25:
            return Moment(event="started", delay=rng.random() * pace.setup)
        if where < 0.7:
            return Moment(event="total", delay=rng.random() * pace.row * self._rows_to_compute())
        event = rng.choice(("creating", "naming", "last rows")) if self.kind == "grow" else "last rows"
        if fresh and rng.random() < 0.6:
            event = "creating"
        return Moment(event=event, delay=rng.random() * rng.choice((0.0001, 0.0004, 0.002)))

    def _rows_to_compute(self) -> int:
        if self.left is not None:
            return self.left
        return len(self.tree.digests - self.seen)

    def hear(self, run: Run) -> None:
        """Learn from a run what it acknowledged and how many rows it found to compute."""
        self.named |= run.told("naming")
        for report in run.reports:
            if report["say"] == "acknowledged" and report["blocks"]:
                self.acknowledged.setdefault(report["uuid"], set()).update(report["blocks"])
        totals = [report["rows"] for report in run.reports if report["say"] == "total"]
        if not totals:
            return
        total = totals[0]
        if self.at_most is not None and self.left is not None:
            self.outcome.recomputed = max(self.outcome.recomputed, total - self.left)
            if total > self.at_most:
                self.blame(f"{total} rows are computed after a stop, where {self.at_most} were left at most")
        computed = sum(r["rows"] for r in run.reports if r["say"] in ("computed", "last rows"))
        if self.at_most is not None and not computed:
            return  # nor had it synced what a killed run left unsynced
        self.left = total - computed
        self.at_most = self.left + self.rows_at_risk() - 1

    def rows_at_risk(self) -> int:
        """Of rows that were computed: those of the block in flight, and of the group that is not synced."""
        if self.keeps_unsynced:
            return self.knobs.block_rows
        return self.knobs.block_rows + self.knobs.group_rows(self.row_bytes())

    def row_bytes(self) -> int:
        layout = FeatureStore.open(self.bench.calm_store(self.tree), check=False).layout
        regions = (*layout.features.values(), layout.row_status, layout.sources)
        return sum(region.row_bytes for region in regions)

    def blame(self, what: str) -> None:
        self.outcome.violations.append(what)

    def judge(self, run: Run) -> None:
        """What must hold after `run` was stopped."""
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):
                self.blame(f"{path.name} was left behind")
        names = [self.store, *sorted(self.folder.glob(f"{STORE}.growing*"), reverse=True)]
        stores = [self._judge_store(p) for p in names if p.exists() and not p.name.endswith(".creating")]
        there = {store.layout.uuid: store for store in stores if store}
        if self.kind != "fill" and self.store not in [store.path for store in there.values()]:
            self.blame("the store is not there any more")
        if self.acknowledged.keys() - there.keys() and not self.named:
            self.blame("a file is gone that has acknowledged blocks")
        if run.told("total") and len(there) < (2 if self.kind == "grow" else 1) and not self.named:
            self.blame("a file is gone that had been created")
        have: set[bytes] = set()
        for store in there.values():
            have |= self._judge_blocks(store)
        lost = (self.seen & self.tree.digests) - have
        if lost:
            self.blame(f"{len(lost)} images that were acknowledged are in no file")
        self._judge_old_store(stores[0] if stores else None)
        if self.rng.random() < 0.5:  # otherwise the next run meets the lock file as it was left
            self._judge_lock()

    def _judge_store(self, path: Path) -> FeatureStore | None:
        """A file that has its name is whole in structure."""
        try:
            with h5py.File(path, "r", locking=False) as file:
                shapes = [
                    file[name].shape for name in ("ids", "row_status", "sources", "features/penultimate")
                ]
            store = FeatureStore.open(path, check=False)
        except (OSError, KeyError, StoreError) as exc:
            self.blame(f"{path.name} does not open: {exc}")
            return None
        if any(shape[0] != len(store) for shape in shapes):
            self.blame(f"{path.name}: plain h5py sees {shapes} of {len(store)} rows")
        return store

    def _judge_blocks(self, store: FeatureStore) -> set[bytes]:
        """The digests of the sound rows, each of which must be what an undisturbed run computes."""
        check, name = BlockCheck(store.layout), store.path.name
        done = {block for block in range(store.layout.n_blocks) if check.is_done(block)}
        broken = {b for b in range(store.layout.n_blocks) if b not in done and not check.is_empty(b)}
        acknowledged = self.acknowledged.get(store.layout.uuid, set())
        if acknowledged - done:
            self.blame(f"{name}: acknowledged blocks {sorted(acknowledged - done)} are lost")
        if self.keeps_unsynced and broken - self.damaged:
            self.blame(f"{name}: blocks {sorted(broken - self.damaged)} are damaged")
        self._judge_serving(store, broken=bool(broken), complete=len(done) == store.layout.n_blocks)
        known = frozenset[tuple[str, bytes]]().union(*(tree.rows for tree in self.trees))
        digests, features, status = (
            store.sources["sha256"],
            store.map(),
            store.layout.map(store.layout.row_status),
        )
        have: set[bytes] = set()
        for block in done:
            rows = store.layout.rows_of(block)
            for row in range(rows.start, rows.stop):
                digest = digests[row].tobytes()
                have.add(digest)
                if (store.table.ids[row], digest) not in known:
                    self.blame(f"{name}: row {row} is of another image")
                elif self.bench.vectors[digest] != (int(status[row]), features[row].tobytes()):
                    self.blame(f"{name}: row {row} is not what its image gives")
            if block in acknowledged:
                self.seen |= {digest.tobytes() for digest in digests[rows]}
        return have

    def _judge_serving(self, store: FeatureStore, *, broken: bool, complete: bool) -> None:
        """A damaged or unfinished store never hands out all its features."""
        said: type[FeatcacheError] | None = None
        try:
            FeatureStore.open(store.path).features()
        except (DamagedStore, IncompleteStore) as exc:
            said = type(exc)
        expected = DamagedStore if broken else None if complete else IncompleteStore
        if said is not expected:
            self.blame(f"{store.path.name}: opening says {said}, where {expected} was expected")

    def _judge_old_store(self, store: FeatureStore | None) -> None:
        if self.old_reader and self.former and columns_of(self.old_reader) != self.former.columns:
            self.blame("a reader of the old store sees other bytes")
        if self.kind != "grow" or store is None or self.store.read_bytes() == self.old_bytes:
            return
        if not store.complete:
            self.blame("the old store was changed, or an unfinished one took its name")

    def _judge_lock(self) -> None:
        try:
            with write_lock(self.store):
                pass
        except StoreLocked as exc:
            self.blame(f"the lock is held after the kill: {exc}")

    def judge_finished(self, run: Run, code: int) -> None:
        """What must hold once a run has ended by itself."""
        if code != 0:
            last = (run.log.read_text().splitlines() or ["it said nothing"])[-1]
            hung = "hung" if run.told("hung") else f"ended with {code}"
            self.blame(f"the resumed run {hung}: {last[:400]}")
            return
        left = sorted(path.name for path in self.folder.iterdir())
        if left != [STORE]:
            self.blame(f"the finished run leaves {left}")
        store = self._judge_store(self.store)
        if store is None:
            return
        self._judge_blocks(store)
        columns = columns_of(store)
        different = [name for name, data in self.tree.columns.items() if columns.get(name) != data]
        if different or columns.keys() != self.tree.columns.keys():
            self.blame(f"{', '.join(different)} differ from those of an undisturbed run")
        result = next(report for report in run.reports if report["say"] == "result")
        if result["embedded"] + result["reused"] + result["failed"] != len(store):
            self.blame(f"the counts of {result} do not sum to {len(store)}")
        found = sum(report["rows"] for report in run.reports if report["say"] == "total")
        if result["embedded"] > found:
            self.blame(f"{result['embedded']} rows were embedded, where {found} were to be computed")
        if self.outcome.phases[-1:] == [FINISHED] and found:
            self.blame(f"{found} rows were computed again though the last run had finished")


def damage_blocks(path: Path, rng: Random) -> set[int]:
    """Flip one bit in a column of one to three blocks; which blocks."""
    layout = FeatureStore.open(path).layout
    blocks = set(rng.sample(range(layout.n_blocks), rng.randint(1, 3)))
    with open(path, "r+b") as file:
        for block in blocks:
            columns = [*layout.features.values(), layout.row_status, layout.sources, layout.blocks]
            region = rng.choice(columns)
            row = block if region is layout.blocks else layout.rows_of(block).start
            offset = region.offset + row * region.row_bytes + rng.randrange(region.row_bytes)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return blocks


def draw_knobs(rng: Random, group_bytes: tuple[int, ...] = (600, 2000, 6000, 1 << 24)) -> Knobs:
    return Knobs(
        workers=rng.choice((1, 3)),
        block_rows=rng.choice((BATCH_SIZE, 2 * BATCH_SIZE)),
        group_bytes=rng.choice(group_bytes),
        group_seconds=rng.choice((0.004, 60.0)),
    )


def draw_round(bench: Bench, number: int, *, seed: str, folder: Path, **more: Any) -> Round:
    """The round of this number: the same seed draws the same round, though not the same nanosecond."""
    rng = Random(f"{seed} {number}")
    kind = rng.choices(KINDS, weights=(45, 40, 15))[0]
    return Round(
        bench=bench,
        folder=folder,
        knobs=draw_knobs(rng),
        tree=rng.choice(bench.trees),
        kind=kind,
        rng=rng,
        outcome=Outcome(round=number, kind=kind),
        **more,
    )


@contextmanager
def round_folder(bench: Bench, number: int) -> Iterator[Path]:
    """A new folder, removed afterwards."""
    folder = bench.folder / f"round{number}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def kill_round(
    bench: Bench,
    number: int,
    *,
    seed: str = "0",
    sabotage: Callable[[], None] | None = None,
) -> Outcome:
    """One round: runs that are killed, then one that is not; its violations are in the outcome."""
    begun = time.monotonic()
    with round_folder(bench, number) as folder:
        this = draw_round(bench, number, seed=seed, folder=folder, sabotage=sabotage)
        outcome = this.outcome
        this.prepare()
        for attempt in range(this.rng.choice((1, 1, 1, 2, 2, 3, MAX_KILLS))):
            moment = this.draw_moment()
            run = this.start(last_step=moment.step)
            if run.wait_for(moment.event, HANG_SECONDS):
                wait(moment.delay)
            run.kill()
            outcome.phases.append(this.phase(run))
            outcome.resumes += attempt > 0
            this.hear(run)
            if outcome.phases[-1] == FINISHED:
                break
            outcome.recoveries_stopped += attempt > 0
            this.judge(run)
            if this.kind == "grow" and this.rng.random() < 0.2 and not has_name(this):
                this.change_tree()
        run_to_the_end(this)
    outcome.seconds = time.monotonic() - begun
    return outcome


def leave_signals_to_the_owner() -> None:
    """In a process of a pool: a round under way ends, and the pool's owner asks for no further one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_benches: dict[str, Bench] = {}  # of this process


def kill_rounds(folder: str, seed: str, numbers: range, sabotage: str | None = None) -> list[Outcome]:
    """Some rounds, in a process of a pool; its data sets are kept from one call to the next."""
    if folder not in _benches:
        leave_signals_to_the_owner()
        _benches[folder] = Bench(Path(tempfile.mkdtemp(dir=folder)), seed=seed)
    fault = SABOTAGES[sabotage] if sabotage else None
    return [kill_round(_benches[folder], number, seed=seed, sabotage=fault) for number in numbers]


def has_name(this: Round) -> bool:
    """Whether the growth has taken the store's name already."""
    return this.store.read_bytes() != this.old_bytes


def run_to_the_end(this: Round) -> None:
    run = this.start()
    code = run.finish()
    this.bench.pace.learn(run)
    this.outcome.resumes += 1
    this.hear(run)
    this.judge_finished(run, code)


def _skip_blocks() -> None:
    real = writer.StoreWriter.write_block

    def write_block(self: writer.StoreWriter, block: int, **arrays: Any) -> None:
        if block % 3 != 1:
            real(self, block, **arrays)

    writer.StoreWriter.write_block = write_block  # type: ignore[method-assign]


def _forget_blocks() -> None:
    BlockCheck.state_of = lambda *_: BlockState.PENDING  # type: ignore[method-assign]


def _change_with_the_process() -> None:
    real = torch_eager.TorchEager.embed

    def embed_otherwise(self: torch_eager.TorchEager, pixels: Any) -> Any:
        return {key: array + os.getpid() % 7 for key, array in real(self, pixels).items()}

    torch_eager.TorchEager.embed = embed_otherwise  # type: ignore[method-assign]


def _copy_for_rename() -> None:
    def copy(source: Path, target: Path) -> None:
        data = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            for start in range(0, len(data), 1024):
                file.write(data[start : start + 1024])
                time.sleep(0.001)
        os.unlink(source)

    os.replace = copy  # type: ignore[assignment]


def _remove_nothing() -> None:
    os.unlink = os.remove = lambda *_, **__: None  # type: ignore[assignment]


# Faults put into featcache, each of which the rounds must find.
SABOTAGES: dict[str, Callable[[], None]] = {
    "acknowledge blocks that were not written": _skip_blocks,
    "compute everything again": _forget_blocks,
    "compute other features in each process": _change_with_the_process,
    "copy instead of renaming": _copy_for_rename,
    "leave files behind": _remove_nothing,
}


def wait(seconds: float) -> None:
    """Sleep; spin where the sleep is shorter than what the kernel makes of it."""
    end = time.perf_counter() + seconds
    if seconds > 0.002:
        time.sleep(seconds - 0.001)
    while time.perf_counter() < end:
        pass


def summarise(outcomes: Iterable[Outcome], *, stops: str = "kills") -> dict[str, int]:
    """The figures of many rounds, in the order in which they are told."""
    figures = dict.fromkeys(("rounds", stops, *(f"stopped: {phase}" for phase in PHASES)), 0)
    figures |= dict.fromkeys(("resumed runs", "recoveries stopped as well", MOST_RECOMPUTED, "violations"), 0)
    for outcome in outcomes:
        figures["rounds"] += 1
        figures[stops] += outcome.stopped
        for phase in outcome.phases:
            figures[f"stopped: {phase}"] += 1
        figures["resumed runs"] += outcome.resumes
        figures["recoveries stopped as well"] += outcome.recoveries_stopped
        figures[MOST_RECOMPUTED] = max(figures[MOST_RECOMPUTED], outcome.recomputed)
        figures["violations"] += len(outcome.violations)
        for name, count in outcome.figures.items():
            figures[name] = figures.get(name, 0) + count
    return figures
