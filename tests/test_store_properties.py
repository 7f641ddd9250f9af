"""Whatever happens to the files and to the runs, a store holds what a dictionary would.

A state machine adds, edits, touches, removes, renames, copies and relabels images, damages blocks, kills runs
at any forward pass or write, and embeds; the model is a dictionary from paths to what the data set says.
HYPOTHESIS_PROFILE=long runs many more examples, of another seed each time.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from faults.io_failures import TOY, small_blocks
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image

from featcache.commands.embed import embed
from featcache.engines.torch_eager import TorchEager
from featcache.errors import StoreError
from featcache.images.identity import file_stat
from featcache.store import lock
from featcache.store.blocks import BlockCheck
from featcache.store.layout import STAT_COLUMNS
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

FOLDERS = st.sampled_from(["a", "b", "c"])
LABELS = st.sampled_from(["cat", "dog", "eel"])
SPLITS = st.sampled_from(["", "train", "test"])
WHICH = st.integers(0, 999)
CONTENT = st.integers(0, 29)
BYTES = 400  # of every image file, so that an edit can keep the size


def picture(number: int) -> bytes:
    """A PNG of one colour, filled up to BYTES; its feature is that colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour(number)).save(buffer, "PNG")
    return buffer.getvalue().ljust(BYTES, b"\0")


def colour(number: int) -> tuple[int, int, int]:
    return number, 255 - 3 * number, 7 * number % 256


def feature_by_hand(number: int) -> list[float]:
    """The mean of each channel, scaled to [0, 1] and normalised with mean 0.5 and deviation 0.5."""
    return [(channel / 255 - 0.5) / 0.5 for channel in colour(number)]


@dataclass(frozen=True)
class Row:
    """What the data set says of a path: the number of the picture there, its label and split."""

    number: int
    label: str
    split: str


@cache
def feature(number: int) -> bytes:
    """The vector of a picture as a store of it alone has it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "one.png").write_bytes(PICTURES[number])
        (Path(folder) / "one.csv").write_text("path,label\none.png,x\n")
        output = Path(folder) / "one.h5"
        embed(Path(folder) / "one.csv", output, backbone=TOY, batch_size=2, workers=1)
        X = FeatureStore.open(output).features().X
        np.testing.assert_allclose(X[0], feature_by_hand(number), atol=1e-6)
        return X[0].tobytes()


PICTURES = [picture(number) for number in range(30)]
NUMBER_OF = {hashlib.sha256(data).digest(): number for number, data in enumerate(PICTURES)}


class Killed(BaseException):
    """Stands for a kill: whatever runs after it does not reach the disk."""


@contextmanager
def dying(*, at_pass: int | None = None, at_write: int | None = None) -> Iterator[None]:
    """Killed in forward pass or in disk write number n; from then on nothing changes a file."""
    dead = False
    counts = {"pass": 0, "write": 0}

    def count(what: str, limit: int | None) -> None:
        nonlocal dead
        counts[what] += 1
        if limit is not None and counts[what] > limit and not dead:
            dead = True
            raise Killed

    plain = TorchEager.embed

    def embed_or_die(engine: Any, pixels: Any) -> Any:
        count("pass", at_pass)
        return plain(engine, pixels)

    def mortal(real: Any, answer: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if not dead:
                count("write", at_write)
            return answer(*args) if dead else real(*args, **more)

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(TorchEager, "embed", embed_or_die))
        for name in ("ftruncate", "posix_fallocate", "fsync", "fdatasync", "replace", "unlink"):
            stack.enter_context(mock.patch.object(os, name, mortal(getattr(os, name), lambda *_: None)))
        stack.enter_context(
            mock.patch.object(os, "pwrite", mortal(os.pwrite, lambda fd, data, offset: len(data)))
        )
        yield


@contextmanager
def noting_opened(folder: Path) -> Iterator[set[str]]:
    """The files below `folder` that are opened, relative to it."""
    opened: set[str] = set()
    plain = os.open

    def note(path: Any, *args: Any, **more: Any) -> int:
        if str(path).startswith(f"{folder}{os.sep}"):
            opened.add(os.path.relpath(path, folder))
        return plain(path, *args, **more)

    with mock.patch.object(os, "open", note):
        yield opened


class StoreMachine(RuleBasedStateMachine):
    """`files` is the model: {relative path: Row}."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.photos, self.stores = self.base / "photos", self.base / "stores"
        self.manifest = self.base / "all.csv"
        self.stores.mkdir()
        self.store = self.stores / "store.h5"
        self.files: dict[str, Row] = {}
        self.served: dict[str, Row] | None = None  # what the store held when a run last ended
        self.named = 0

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    @initialize(numbers=st.lists(CONTENT, min_size=3, max_size=12))
    def begin(self, numbers: list[int]) -> None:
        for i, number in enumerate(numbers):
            self._write(self._new_path("ab"[i % 2], i * 83), Row(number, "cat", "train"))

    def _new_path(self, folder: str, place: int) -> str:
        self.named += 1
        return f"{folder}/{place % 1000:03d}-{self.named}.png"  # sorted in anywhere among the others

    def _pick(self, which: int) -> str:
        paths = sorted(self.files)
        return paths[which % len(paths)]

    def _write(self, path: str, row: Row) -> None:
        file = self.photos / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PICTURES[row.number])
        self.files[path] = row

    # What happens to the files.

    @rule(folder=FOLDERS, place=WHICH, number=CONTENT, label=LABELS, split=SPLITS)
    def add(self, folder: str, place: int, number: int, label: str, split: str) -> None:
        self._write(self._new_path(folder, place), Row(number, label, split))

    @rule(which=WHICH, number=CONTENT)
    def edit(self, which: int, number: int) -> None:
        path = self._pick(which)
        self._write(path, replace(self.files[path], number=number))

    @rule(which=WHICH, number=CONTENT)
    def edit_keeping_size_and_mtime(self, which: int, number: int) -> None:
        path = self._pick(which)
        before = (self.photos / path).stat()
        self._write(path, replace(self.files[path], number=number))
        os.utime(self.photos / path, ns=(before.st_atime_ns, before.st_mtime_ns))

    @rule(which=WHICH, seconds=st.integers(0, 10**9))
    def touch(self, which: int, seconds: int) -> None:
        os.utime(self.photos / self._pick(which), (seconds, seconds))

    @precondition(lambda self: len(self.files) > 1)
    @rule(which=WHICH)
    def remove(self, which: int) -> None:
        path = self._pick(which)
        (self.photos / path).unlink()
        del self.files[path]

    @rule(which=WHICH, folder=FOLDERS, place=WHICH)
    def rename(self, which: int, folder: str, place: int) -> None:
        path, target = self._pick(which), self._new_path(folder, place)
        (self.photos / target).parent.mkdir(exist_ok=True)
        (self.photos / path).rename(self.photos / target)
        self.files[target] = self.files.pop(path)

    @rule(which=WHICH, label=LABELS, split=SPLITS)
    def relabel(self, which: int, label: str, split: str) -> None:
        path = self._pick(which)
        self.files[path] = replace(self.files[path], label=label, split=split)

    @rule(which=WHICH, folder=FOLDERS, place=WHICH, label=LABELS)
    def copy(self, which: int, folder: str, place: int, label: str) -> None:
        self._write(self._new_path(folder, place), replace(self.files[self._pick(which)], label=label))

    @rule(which=WHICH, other=WHICH)
    def swap_names(self, which: int, other: int) -> None:
        a, b = self._pick(which), self._pick(other)
        if a != b:
            aside = self.photos / "aside"
            (self.photos / a).rename(aside)
            (self.photos / b).rename(self.photos / a)
            aside.rename(self.photos / b)
            first, second = self.files[a], self.files[b]
            self.files[a] = replace(first, number=second.number)
            self.files[b] = replace(second, number=first.number)

    # What happens to the store.

    @precondition(lambda self: self.served is not None)
    @rule(which=WHICH, byte=WHICH)
    def damage_a_block(self, which: int, byte: int) -> None:
        layout = read_layout(self.store)
        regions = [*layout.features.values(), layout.row_status, layout.sources]
        region = regions[which % len(regions)]
        offset = region.offset + byte * 7919 % (region.row_bytes * region.shape[0])
        with open(self.store, "r+b") as file:
            file.seek(offset)
            value = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([value ^ 1 << byte % 8]))
        self.served = None

    @rule(at=st.integers(0, 6))
    def kill_in_a_forward_pass(self, at: int) -> None:
        self._embed_killed(at_pass=at)

    @rule(at=st.integers(0, 40))
    def kill_in_a_write(self, at: int) -> None:
        self._embed_killed(at_write=at)

    def _embed_killed(self, **when: int) -> None:
        try:
            with dying(**when), small_blocks():
                self._embed()
        except Killed:
            lock._held.clear()  # as a process that is gone holds nothing
            self._check_that_the_old_store_is_served()
        else:
            self.served = dict(self.files)

    def _check_that_the_old_store_is_served(self) -> None:
        """A complete store stays the old one until the new one takes its name."""
        if self.served is not None:
            held = self._held(FeatureStore.open(self.store))
            assert held in (_expected(self.served), _expected(self.files))
            if held != _expected(self.served):
                self.served = dict(self.files)

    @rule()
    def run(self) -> None:
        digests, stats = self._known()
        with noting_opened(self.photos) as opened, small_blocks():
            result = self._embed()
        self.served = dict(self.files)

        # A row is computed when no store has a vector of these bytes, and never otherwise.
        to_compute = [path for path, row in self.files.items() if row.number not in digests]
        assert result.embedded == len(to_compute)
        assert result.reused == len(self.files) - len(to_compute)
        # A file is opened when no store knows it by path and stat, and never otherwise.
        assert opened == {path for path in self.files if (path, *self._stat(path)) not in stats}
        assert [path.name for path in self.stores.iterdir()] == ["store.h5"]

    # A single change between two runs, which would be rare among so many rules.

    @rule(which=WHICH, label=LABELS, split=SPLITS)
    def relabel_between_runs(self, which: int, label: str, split: str) -> None:
        self.run()
        self.relabel(which, label, split)
        self.run()

    @rule(which=WHICH, number=CONTENT)
    def edit_between_runs(self, which: int, number: int) -> None:
        self.run()
        self.edit_keeping_size_and_mtime(which, number)
        self.run()

    @rule(which=WHICH, other=WHICH)
    def swap_names_between_runs(self, which: int, other: int) -> None:
        self.run()
        self.swap_names(which, other)
        self.run()

    def _embed(self) -> Any:
        lines = [f"{path},{row.label},{row.split}" for path, row in self.files.items()]
        self.manifest.write_text("\n".join(["path,label,split", *lines]) + "\n")
        how: dict[str, Any] = {"backbone": TOY, "batch_size": 2, "workers": 1}
        return embed(self.manifest, self.store, root=self.photos, prune=True, **how)

    def _known(self) -> tuple[set[int], set[tuple[Any, ...]]]:
        """The pictures whose vectors an intact block of some store has, and the stats recorded for them."""
        digests: set[int] = set()
        stats: set[tuple[Any, ...]] = set()
        for path in self.stores.iterdir():
            if path.name == "store.h5" or (".growing" in path.name and ".creating" not in path.name):
                try:
                    layout = read_layout(path)
                except StoreError:
                    continue
                blocks, sources = BlockCheck(layout), layout.map(layout.sources)
                for block in filter(blocks.is_done, range(layout.n_blocks)):
                    for row in range(*layout.rows_of(block).indices(layout.n_rows)):
                        source = sources[row]
                        digests.add(NUMBER_OF[source["sha256"].tobytes()])
                        stats.add(
                            (
                                layout.table.ids[row],
                                *(int(source[k]) for k in STAT_COLUMNS),
                            )
                        )
        return digests, stats

    def _stat(self, path: str) -> tuple[int, int, int, int]:
        return file_stat((self.photos / path).stat()).as_tuple()

    @staticmethod
    def _held(store: FeatureStore) -> dict[str, tuple[str, str, bytes]]:
        features = store.features()
        return {
            path: (features.classes[features.y[row]], str(features.splits[row]), features.X[row].tobytes())
            for row, path in enumerate(features.ids)
        }

    @invariant()
    def the_store_holds_what_the_dictionary_holds(self) -> None:
        if self.served is not None:
            assert self._held(FeatureStore.open(self.store)) == _expected(self.served)


def _expected(files: dict[str, Row]) -> dict[str, tuple[str, str, bytes]]:
    return {path: (row.label, row.split, feature(row.number)) for path, row in files.items()}


settings.register_profile(
    "every commit",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    stateful_step_count=20,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("long", settings.get_profile("every commit"), derandomize=False, max_examples=2000)
TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "every commit"))
