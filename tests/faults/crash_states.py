"""Power cuts at every moment of every command that writes: what is found afterwards keeps the promises.

A command runs once with its calls recorded (`crash_recording`); every state a disk may be in when the power
goes after any of them (`crash_disk`) is then checked, without a disk, by the code that checks a real store:

1. Under the store's name is no file, where none was acknowledged, or a whole store, the old or the new one.
2. Every row acknowledged before the cut is done, with the right bytes, in the store or an unfinished growth.
3. No block passes for done whose bytes are not the right ones.
4. On a part of the states the same command runs again to its end: leftovers do not stop it, it computes no
   more than what was never acknowledged, and it leaves what an undisturbed run leaves, byte for byte.

A run that goes on from a state is recorded as well, and cut in turn; so is one that follows a kill, which
leaves in the page cache what no disk has yet.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
import torch
from conftest import make_toy_store, toy_block
from gaussians import PROVENANCE, gaussian_features
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from faults.crash_disk import Cut, Fate, canonical_fates, cuts, is_journaled, random_fate
from faults.crash_recording import Created, Finished, Kept, Op, Recording, go_on, record
from featcache import embedding
from featcache.backbones import Backbone, make_backbone
from featcache.commands.embed import embed
from featcache.commands.repair import repair
from featcache.errors import FeatcacheError, ModelError, StoreError
from featcache.fitting import Wishes, fit_features
from featcache.model import Model
from featcache.records import RowStatus
from featcache.spec import Preprocessing
from featcache.store import writer as writer_module
from featcache.store.blocks import BlockCheck
from featcache.store.layout import SOURCE_DTYPE, Region, StoreLayout
from featcache.store.lock import write_lock
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

STORE, MODEL, CREATING = "s.h5", "m.model", ".creating"
N_IMAGES, BLOCK_ROWS, GROUP_BYTES = 40, 8, 7000  # bytes: two blocks of 8 rows make a commit group
_LEFTOVER = re.compile(r"s\.h5(\.growing(\.\d+)?)?(\.creating)? is left over")
_FAILURES = (FeatcacheError, OSError, LookupError, RuntimeError, TypeError, ValueError)
_REMEMBERED = 20_000  # images that need not be judged again
_MANY = 24  # sectors; a cut with more of them undecided is not looked at more often
_MOST_VIOLATIONS = 50  # of one recording; a broken protocol has thousands


class SmallPicture(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images, (2, 1)).flatten(1)  # (B, 3, 8, 8) -> (B, 96)


def small_picture() -> Backbone:
    """A backbone whose blocks of 8 rows are several sectors long, and no two rows alike."""
    return make_backbone(
        SmallPicture(),
        preprocessing=Preprocessing(resize_size=8, crop_size=8, mean=(0.5,) * 3, std=(0.5,) * 3),
        label="no weights",
    )


@dataclass(frozen=True, kw_only=True)
class Violation:
    """What was wrong in one state, and how to make the state again.

    place: "CUT:STATE", where STATE is the number of a canonical one (c12), the seed of a random one (r0.17.3)
    or a kill without a power cut (k); behind a slash follows the cut of the run that went on from there.
    """

    protocol: str
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.protocol}, {self.place}: {self.what}"


@dataclass(kw_only=True)
class Protocol:
    """A command in a folder: what is there before, what runs, and what an undisturbed run leaves.

    run: works in the folder and tells how many rows it computed. target: the one file of interest.
    """

    name: str
    start: Mapping[str, bytes]
    run: Callable[[Path], int]
    target: str = STORE
    leaves: Mapping[str, bytes] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------- right answers


@dataclass(frozen=True, kw_only=True)
class RightRows:
    """The bytes of each row, by id: (features of every node, status, source)."""

    rows: Mapping[str, tuple[tuple[bytes, ...], bytes, bytes]]

    @classmethod
    def of(cls, path: Path) -> RightRows:
        store = FeatureStore.open(path)
        layout = store.layout
        columns = [layout.map(r) for r in (*layout.features.values(), layout.row_status, layout.sources)]
        rows = {}
        for row, name in enumerate(layout.table.ids):
            *features, status, source = (column[row].tobytes() for column in columns)
            rows[name] = (tuple(features), status, source)
        return cls(rows=rows)

    def of_block(self, layout: StoreLayout, block: int) -> bytes:
        """A block's bytes as `StoreFile.bytes_of` takes them from a file."""
        rows = [self.rows[name] for name in layout.table.ids[layout.rows_of(block)]]
        nodes = (b"".join(row[0][node] for row in rows) for node in range(len(layout.features)))
        return b"".join((*nodes, b"".join(row[1] for row in rows), b"".join(row[2] for row in rows)))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file of a state offers: ids of the rows that are done, or why it offers none."""

    ids: frozenset[str] = frozenset()
    unusable: str | None = None
    wrong: tuple[str, ...] = ()


class _InPlace(Region):
    def read(self, buffer: Any, rows: slice = slice(None)) -> NDArray[Any]:
        return self.map(buffer)[rows]


class StoreFile:
    """A store's file as it was created, to judge images of it without opening each."""

    def __init__(self, content: bytes, right: RightRows, folder: Path) -> None:
        self._right, self._folder = right, folder
        path = folder / "created.h5"
        path.write_bytes(content)
        layout = read_layout(path)
        path.unlink()
        # An image is looked at many times: its records are read where they are, not copied.
        layout = self._layout = replace(layout, buffer=None, blocks=_InPlace(**vars(layout.blocks)))
        self._columns = (*layout.features.values(), layout.row_status, layout.sources)
        self._size = len(content)
        ends = sorted((r.offset, r.offset + r.nbytes) for r in (*self._columns, layout.blocks))
        starts = [0, *(stop for _, stop in ends)]
        self._static = [
            (start, stop, content[start:stop])
            for start, stop in zip(starts, [start for start, _ in ends] + [len(content)], strict=True)
        ]
        self._blocks = [right.of_block(layout, block) for block in range(layout.n_blocks)]
        self._ids = [frozenset(layout.table.ids[layout.rows_of(b)]) for b in range(layout.n_blocks)]
        self._unions: dict[tuple[int, ...], frozenset[str]] = {}
        self._known: dict[int, Found] = {}

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(self._layout.table.ids)

    def ids_of(self, blocks: tuple[int, ...]) -> frozenset[str]:
        if blocks not in self._unions:
            self._unions[blocks] = frozenset().union(*(self._ids[block] for block in blocks))
        return self._unions[blocks]

    def judge(self, image: bytes) -> Found:
        """What featcache finds in the file; the same image is looked at once."""
        key = hash(image)
        if key not in self._known:
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            self._known[key] = self._judge(image)
        return self._known[key]

    def _judge(self, image: bytes) -> Found:
        if len(image) != self._size or any(image[start:stop] != was for start, stop, was in self._static):
            return self._open(image)
        check = BlockCheck(replace(self._layout, buffer=image))
        done = [block for block in range(self._layout.n_blocks) if check.is_done(block)]
        wrong = [block for block in done if self._bytes_of(block, image) != self._blocks[block]]
        return Found(
            ids=self.ids_of(tuple(block for block in done if block not in wrong)),
            wrong=tuple(f"block {block} passes for done and holds other bytes" for block in wrong),
        )

    def _bytes_of(self, block: int, image: bytes) -> bytes:
        rows = self._layout.rows_of(block)
        return b"".join(
            image[r.offset + rows.start * r.row_bytes : r.offset + rows.stop * r.row_bytes]
            for r in self._columns
        )

    def _open(self, image: bytes) -> Found:
        """The structure is not as it was created, and must not open."""
        path = self._folder / "altered.h5"
        path.write_bytes(image)
        try:
            read_layout(path)
        except StoreError as exc:
            return Found(unusable=f"{type(exc).__name__}: {exc}")
        finally:
            path.unlink()
        return Found(wrong=("its structure is altered, and it opens",))


# ------------------------------------------------------------------------------------------------- judging


@dataclass(kw_only=True)
class Tally:
    """What was looked at, and what was wrong."""

    protocol: str
    operations: int = 0
    cuts: int = 0
    exhaustive: int = 0
    random: int = 0
    again: int = 0  # states of runs that went on from a state, cut in their turn
    distinct: int = 0
    resumed: int = 0
    violations: list[Violation] = field(default_factory=list)
    violating: int = 0  # states; the first few are in `violations`

    @property
    def states(self) -> int:
        return self.exhaustive + self.random + self.again

    def add_again(self, at: str, other: Tally) -> None:
        """The states of a run that went on from the state `at` of this recording."""
        self.again += other.states
        self.distinct += other.distinct
        for violation in other.violations:
            self.note(f"{at}/{violation.place}", [violation.what])
        self.violating += other.violating - len(other.violations)

    def note(self, place: str, wrong: Sequence[str]) -> None:
        self.violating += bool(wrong)
        for what in wrong[: _MOST_VIOLATIONS - len(self.violations)]:
            self.violations.append(Violation(protocol=self.protocol, place=place, what=what))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is looked at.

    draws: random states. resume_every: on one of so many new states the command runs again. kill_every: on
    one of so many cuts it also runs again after a mere kill. again: random states of each run that goes on.
    """

    draws: int = 0
    seed: int = 0
    exhaustive: bool = False
    resume_every: int = 0
    kill_every: int = 0
    again: int = 0


@dataclass(kw_only=True)
class Experiment:
    """A recorded run of a protocol, and every way to cut it."""

    protocol: Protocol
    recording: Recording
    bench: Bench
    after: int = 0  # operations that are of a run before, which was killed; they are not cut
    left: Mapping[int, bytes] = field(default_factory=dict)  # {inode: bytes} of the files that run left
    _seen: set[int] = field(default_factory=set)
    _names: set[frozenset[tuple[str, int]]] = field(default_factory=set)

    @cached_property
    def cuts(self) -> list[Cut]:
        return [cut for cut in cuts(self.recording) if cut.at >= self.after]

    @cached_property
    def files(self) -> dict[int, StoreFile]:
        """The stores there were or came to be, by inode."""
        if self.protocol.target != STORE:
            return {}
        contents = {**self.recording.contents, **self.left}
        for at, mark in enumerate(self.recording.ops):
            if isinstance(mark, Created):
                cut = next(cut for cut in cuts(self.recording) if cut.at > at)
                contents[mark.inode] = cut.image(mark.inode, cut.everything())
        files = {}
        for inode, content in contents.items():
            with suppress(StoreError):  # half of one, which an earlier cut left
                files[inode] = StoreFile(content, self.bench.right_rows(self.protocol), self.bench.folder)
        return files

    @cached_property
    def _final(self) -> int | None:
        return self.cuts[-1].issued_names.get(self.protocol.target)

    @cached_property
    def _wanted(self) -> frozenset[str]:
        return self.files[self._final].ids if self._final in self.files else frozenset()

    def promised(self, cut: Cut) -> frozenset[str]:
        """The ids of rows that were acknowledged, by this run or an earlier one, and are still wanted."""
        ids: frozenset[str] = frozenset()
        for inode, content in self.recording.contents.items():
            if inode in self.files:
                ids |= self.files[inode].judge(content).ids
        for mark in self.recording.ops[: cut.at]:
            if isinstance(mark, Finished):
                return self._wanted
            if isinstance(mark, Kept):
                ids |= self.files[mark.inode].ids_of(mark.blocks)
        return ids & self._wanted

    def judge(self, cut: Cut, fate: Fate, promised: frozenset[str]) -> tuple[int, list[str]]:
        """(digest of the state, what is wrong with it)."""
        names = cut.reachable(fate.names)
        images = {inode: cut.image(inode, fate) for inode in set(names.values())}
        digest = hash((tuple(sorted(names.items())), *(hash(images[i]) for i in sorted(images))))
        if self.protocol.target == MODEL:
            return digest, self._judge_model(cut, names, images)
        return digest, self._judge_store(cut, names, images, promised) if self.files else []

    def _judge_store(
        self, cut: Cut, names: Mapping[str, int], images: Mapping[int, bytes], promised: frozenset[str]
    ) -> list[str]:
        ops = self.recording.ops[: cut.at]
        wrong = []
        created = {mark.name: mark.inode for mark in ops if isinstance(mark, Created)}
        if STORE not in names and (STORE in self.recording.names or STORE in created):
            wrong.append("the store is gone")
        for name, inode in created.items():
            if inode in cut.issued_names.values() and inode not in names.values():
                wrong.append(f"{name} was acknowledged and is gone")
        if isinstance(ops[-1] if ops else None, Finished) and names.get(STORE) != self._final:
            wrong.append("the command had returned, and the store is not the new one")
        ids: frozenset[str] = frozenset()
        for name in _stores_of(names):
            file = self.files.get(names[name])
            found = file.judge(images[names[name]]) if file else Found(unusable="was never acknowledged")
            ids |= found.ids
            wrong += [f"{name}: {what}" for what in found.wrong]
            if found.unusable and name == STORE:
                wrong.append(f"the store is no store: {found.unusable}")
        if lost := promised - ids:
            wrong.append(f"{len(lost)} acknowledged rows are lost, the first of them {min(lost)}")
        return wrong

    def _judge_model(self, cut: Cut, names: Mapping[str, int], images: Mapping[int, bytes]) -> list[str]:
        content = images[names[MODEL]] if MODEL in names else None
        new, old = self.protocol.leaves[MODEL], self.protocol.start.get(MODEL)
        first = self.recording.names.get(MODEL)
        older = None if first is None else self.recording.contents[first]
        allowed = (new,) if cut is self.cuts[-1] else (older, old, new)
        return [] if content in allowed else ["the model file is neither the old one nor the new one"]

    # ------------------------------------------------------------------------------------ running again

    def resume(self, cut: Cut, fate: Fate, promised: frozenset[str]) -> tuple[list[str], Experiment | None]:
        """Run the command on the state: what is wrong, and that run as an experiment of its own."""
        with self.bench.new_folder() as folder:
            names = cut.reachable(fate.names)
            start = {name: cut.image(inode, fate) for name, inode in names.items()}
            _put_files(folder, names, start)
            counted: list[int] = []
            try:
                if STORE in names and self.files:
                    _open_plainly(folder / STORE)
                recording = record(lambda: counted.append(self.protocol.run(folder)), folder)
            except _FAILURES as exc:
                return [f"the next run fails: {type(exc).__name__}: {exc}"], None
            wrong = self.bench.differences(folder, self.protocol)
            if not is_journaled(fate.names):
                # Where operations on names are not kept in order, a temporary name may stay that the next run
                # does not come by: it serves nobody, and costs space.
                wrong = [what for what in wrong if not _LEFTOVER.fullmatch(what)]
            leaves = _contents(folder) if self.protocol.target == MODEL else self.protocol.leaves
            most = len(self._wanted - promised)
            if counted[0] > most:
                wrong.append(f"{counted[0]} rows computed, where only {most} were not acknowledged")
        then = replace(self.protocol, start=start, leaves=leaves)
        return wrong, Experiment(protocol=then, recording=recording, bench=self.bench)

    def killed(self, cut: Cut) -> tuple[list[str], Experiment | None]:
        """The command killed at the cut, run again, and the power cut during that run or after it."""
        everything = cut.everything()
        wrong, again = self.resume(cut, everything, self.promised(cut))
        if again is None:
            return wrong, None
        recording = go_on(self.recording, cut.at, cut.issued_names, again.recording)
        left = {inode: cut.image(inode, everything) for inode in cut.issued_names.values()}
        return wrong, replace(again, recording=recording, after=cut.at, left=left)

    # -------------------------------------------------------------------------------------- all of them

    def explore(self, plan: Plan, tally: Tally | None = None) -> Tally:
        """Look at every state the plan asks for. tally: an earlier one, to go on with."""
        tally = tally or Tally(protocol=self.protocol.name)
        tally.operations, tally.cuts = self.recording.disk_ops, len(self.cuts)
        shares = _shares([min(cut.pieces, _MANY) for cut in self.cuts], plan.draws)
        for number, (cut, share) in enumerate(zip(self.cuts, shares, strict=True)):
            promised = self.promised(cut)
            for state, fate in _numbered(cut, share, plan):
                tally.exhaustive += state[0] == "c"
                tally.random += state[0] == "r"
                digest, wrong = self.judge(cut, fate, promised)
                tally.note(f"{cut.at}:{state}", wrong)
                if digest in self._seen:
                    continue
                self._seen.add(digest)
                tally.distinct += 1
                if plan.resume_every and self._is_due(cut, fate, plan):
                    self._go_on(tally, f"{cut.at}:{state}", plan, self.resume(cut, fate, promised))
            if plan.kill_every and number % plan.kill_every == 0:
                self._go_on(tally, f"{cut.at}:k", plan, self.killed(cut))
        return tally

    def _is_due(self, cut: Cut, fate: Fate, plan: Plan) -> bool:
        """Whether the command runs again: on a share of the states, and once on every set of names."""
        names = frozenset(cut.reachable(fate.names).items())
        new = names not in self._names
        self._names.add(names)
        return new or len(self._seen) % plan.resume_every == 0

    def _go_on(self, tally: Tally, at: str, plan: Plan, ran: tuple[list[str], Experiment | None]) -> None:
        wrong, then = ran
        tally.resumed += 1
        tally.note(at, wrong)
        if then and plan.again:
            tally.add_again(at, then.explore(Plan(draws=plan.again, seed=plan.seed)))

    def find(self, place: str) -> list[str]:
        """What is wrong in the state that a violation names, and with the run that goes on from it."""
        step, _, rest = place.partition("/")
        at, _, state = step.partition(":")
        cut = next(cut for cut in self.cuts if cut.at == int(at))
        if state == "k":
            wrong, then = self.killed(cut)
        else:
            fate = random_fate(cut, state) if state[0] == "r" else list(canonical_fates(cut))[int(state[1:])]
            promised = self.promised(cut)
            wrong, then = self.resume(cut, fate, promised)
            wrong = [*self.judge(cut, fate, promised)[1], *wrong]
        return then.find(rest) if rest and then else wrong


def _numbered(cut: Cut, draws: int, plan: Plan) -> Iterator[tuple[str, Fate]]:
    if plan.exhaustive:
        yield from ((f"c{number}", fate) for number, fate in enumerate(canonical_fates(cut)))
    for number in range(draws):
        state = f"r{plan.seed}.{cut.at}.{number}"
        yield state, random_fate(cut, state)


def _shares(pieces: Sequence[int], draws: int) -> list[int]:
    """So many draws each, by how much is undecided; none where nothing is."""
    total = sum(pieces)
    if not total:
        return [0] * len(pieces)
    whole = [draws * number // total for number in pieces]
    whole[pieces.index(max(pieces))] += draws - sum(whole)
    return whole


def _stores_of(names: Mapping[str, int]) -> list[str]:
    """The store and the growths that the next run will find: they are counted without a gap."""
    found = [STORE] if STORE in names else []
    growth, number = f"{STORE}.growing", 1
    while growth in names:
        found.append(growth)
        growth, number = f"{STORE}.growing.{number}", number + 1
    return found


def _put_files(folder: Path, names: Mapping[str, int], contents: Mapping[str, bytes]) -> None:
    first: dict[int, Path] = {}
    for name, inode in names.items():
        if inode in first:
            os.link(first[inode], folder / name)
        else:
            first[inode] = folder / name
            first[inode].write_bytes(contents[name])


def _open_plainly(path: Path) -> None:
    """As somebody without featcache would, and as featcache does."""
    with h5py.File(path, "r") as file:
        for node in file["features"].values():
            node[:]
    FeatureStore.open(path, check=False)


# ----------------------------------------------------------------------------------------------- protocols


class Bench:
    """The images, their lists and the protocols, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._images = folder / "images"
        self._images.mkdir()
        for i in range(N_IMAGES):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self._images / f"{i:02d}.png")
        self._right: dict[str, RightRows] = {}

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def _list(self, name: str, rows: Sequence[int], label: str = "c") -> Path:
        path = self.folder / f"{name}.csv"
        path.write_text("path,label\n" + "".join(f"{i:02d}.png,{label}{i % 2}\n" for i in rows))
        return path

    def _embed(self, listing: Path) -> Callable[[Path], int]:
        def run(folder: Path) -> int:
            result = embed(
                listing,
                folder / STORE,
                root=self._images,
                backbone=f"{__name__}:small_picture",
                batch_size=BLOCK_ROWS,
                workers=1,
                prune=True,
            )
            return result.embedded

        return run

    def _repair(self, folder: Path) -> int:
        backbone = f"{__name__}:small_picture"
        return repair(folder / STORE, root=self._images, backbone=backbone, workers=1).embedded

    @cached_property
    def protocols(self) -> dict[str, Protocol]:
        return {protocol.name: protocol for protocol in self._protocols()}

    def experiment(self, name: str, alter: Callable[[Op], Op | None] = lambda op: op) -> Experiment:
        """Run a protocol undisturbed, recorded. alter: what a worse protocol does instead of a call."""
        protocol = self.protocols[name]
        recording, leaves = self._record(protocol)
        ops = tuple(op for op in map(alter, recording.ops) if op is not None)
        return Experiment(
            protocol=replace(protocol, leaves=leaves), recording=replace(recording, ops=ops), bench=self
        )

    def _record(self, protocol: Protocol) -> tuple[Recording, dict[str, bytes]]:
        with self.new_folder() as folder:
            for name, content in protocol.start.items():
                (folder / name).write_bytes(content)
            recording = record(lambda: protocol.run(folder), folder)
            return recording, _contents(folder)

    def _protocols(self) -> Iterator[Protocol]:
        few, many = self._list("few", range(0, 32)), self._list("many", range(4, 40))
        most = self._list("most", range(0, 40))
        relabelled = self._list("relabelled", range(0, 32), label="d")
        self._right[STORE] = self._right_rows(self._embed(most))

        fill = Protocol(name="create and fill", start={}, run=self._embed(few))
        yield fill
        half, whole = self._cut_at_commit(fill, 1), self._record(fill)[1]
        yield Protocol(name="resume", start=half, run=self._embed(few))
        yield Protocol(name="recompute a damaged block", start=_damage(whole), run=self._embed(few))
        yield Protocol(name="repair a damaged block", start=_damage(whole), run=self._repair)
        grow = Protocol(name="grow", start=whole, run=self._embed(many))
        yield grow
        half_grown = self._cut_at_commit(grow, 1)
        yield Protocol(name="growth resumed", start=half_grown, run=self._embed(many))
        yield Protocol(name="relabel", start=whole, run=self._embed(relabelled))
        other = Protocol(name="", start=half_grown, run=self._embed(most))
        yield Protocol(
            name="remove leftover growths",
            start=self._cut_at_commit(other, 1),
            run=self._embed(self._list("last", range(2, 40))),
        )
        yield Protocol(name="create and fill two nodes", start={}, run=_fill_toy_store)
        models = [_model_bytes(classes) for classes in (2, 3)]
        yield Protocol(
            name="save a model", start={MODEL: models[0]}, run=lambda f: _save_model(f, 3), target=MODEL
        )
        yield Protocol(name="first model", start={}, run=lambda f: _save_model(f, 3), target=MODEL)
        yield Protocol(name="lock", start={}, run=_lock_and_unlock)

    def _right_rows(self, run: Callable[[Path], int]) -> RightRows:
        with self.new_folder() as folder:
            run(folder)
            return RightRows.of(folder / STORE)

    def right_rows(self, protocol: Protocol) -> RightRows:
        if protocol.run is not _fill_toy_store:
            return self._right[STORE]
        if "toy" not in self._right:
            self._right["toy"] = self._right_rows(_fill_toy_store)
        return self._right["toy"]

    def _cut_at_commit(self, protocol: Protocol, number: int) -> dict[str, bytes]:
        """The folder a kill leaves in the middle of the group after so many commits."""
        recording, _ = self._record(protocol)
        kept = [at for at, op in enumerate(recording.ops) if isinstance(op, Kept)]
        cut = next(cut for cut in cuts(recording) if cut.at >= kept[number - 1] + 4)
        everything = cut.everything()
        return {name: cut.image(inode, everything) for name, inode in cut.issued_names.items()}

    def differences(self, folder: Path, protocol: Protocol) -> list[str]:
        """What an undisturbed run leaves and this one did not, or the other way round."""
        names = {path.name for path in folder.iterdir()}
        wrong = [f"{name} is left over" for name in sorted(names - set(protocol.leaves))]
        if protocol.target == MODEL:
            # A name of its own for each save: nobody may remove those of others, who may be at work.
            wrong = [what for what in wrong if not what.startswith(f".{MODEL}.")]
        wrong += [f"{name} is missing" for name in sorted(set(protocol.leaves) - names)]
        if protocol.target in names & set(protocol.leaves):
            with self.new_folder() as other:
                (other / protocol.target).write_bytes(protocol.leaves[protocol.target])
                compare = _compare_models if protocol.target == MODEL else _compare_stores
                wrong += compare(folder / protocol.target, other / protocol.target)
        return wrong


def _compare_stores(path: Path, undisturbed: Path) -> list[str]:
    try:
        mine, theirs = FeatureStore.open(path), FeatureStore.open(undisturbed)
    except StoreError as exc:
        return [f"the next run leaves a store that does not open: {exc}"]
    wrong = [] if mine.table.equals(theirs.table) else ["ids, labels or splits differ"]
    for name in (*(node.key for node in theirs.spec.nodes), "row_status", "sources"):
        here, there = (
            store.map(name) if name in store.layout.features else getattr(store, name)
            for store in (mine, theirs)
        )
        if here.tobytes() != there.tobytes():
            wrong.append(f"{name} differs from that of an undisturbed run")
    return wrong


def _compare_models(path: Path, undisturbed: Path) -> list[str]:
    """Their content: the order of a safetensors file's metadata is another each time."""
    try:
        mine, theirs = Model.load(path), Model.load(undisturbed)
    except ModelError as exc:
        return [f"the model does not load: {exc}"]
    same = all(np.array_equal(mine.arrays[name], array) for name, array in theirs.arrays.items())
    return [] if same and mine.classes == theirs.classes else ["the model is another one"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _damage(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The store with bits flipped all over its second block."""
    content = bytearray(files[STORE])
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        file.write(content)
        file.flush()
        region = next(iter(read_layout(Path(file.name)).features.values()))
    start = region.offset + BLOCK_ROWS * region.row_bytes
    for place in range(start, start + BLOCK_ROWS * region.row_bytes, 100):
        content[place] ^= 4
    return {**files, STORE: bytes(content)}


def _fill_toy_store(folder: Path) -> int:
    """Create a store of two nodes, or go on with it, by the store's own functions alone."""
    path, rows = folder / STORE, 0
    with write_lock(path), patch.object(writer_module, "GROUP_BYTES", 700):
        if not path.exists():
            make_toy_store(path, n=24, fill=False)
        store = FeatureStore.open(path, check=False)
        with StoreWriter(store.layout) as writer:
            for block in list(BlockCheck(store.layout).pending()):
                writer.write_block(block, **_toy_rows(store, block))
                rows += len(_toy_rows(store, block)["row_status"])
    return rows


def _toy_rows(store: FeatureStore, block: int) -> dict[str, Any]:
    """Some rows failed, and every source is another."""
    rows = store.layout.rows_of(block)
    status = np.full(rows.stop - rows.start, RowStatus.OK, dtype=np.uint8)
    status[rows.start % 3] = RowStatus.UNDECODABLE
    features = toy_block(store, block)
    for array in features.values():
        array[status != RowStatus.OK] = np.nan
    sources = np.zeros(len(status), SOURCE_DTYPE)
    sources["size"] = np.arange(rows.start, rows.stop)
    sources["sha256"] = np.arange(rows.start, rows.stop)[:, None]
    return {"features": features, "row_status": status, "sources": sources}


def _save_model(folder: Path, classes: int) -> int:
    _model(classes).save(folder / MODEL)
    return 0


@cache
def _model(classes: int) -> Model:
    return fit_features(gaussian_features(k=classes, d=40), Wishes(head="ncm"), provenance=PROVENANCE)[1]


def _model_bytes(classes: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder), classes)
        return Path(folder, MODEL).read_bytes()


def _lock_and_unlock(folder: Path) -> int:
    with write_lock(folder / STORE):
        return 0


@contextmanager
def open_bench(folder: Path | None = None) -> Iterator[Bench]:
    """A bench with blocks and commit groups so small that every moment of a run can be cut."""
    with ExitStack() as stack:
        if folder is None:
            memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        stack.enter_context(patch.object(embedding, "BLOCK_ROWS", BLOCK_ROWS))
        stack.enter_context(patch.object(writer_module, "GROUP_BYTES", GROUP_BYTES))
        stack.enter_context(patch.object(writer_module, "GROUP_SECONDS", float("inf")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        yield Bench(folder)
