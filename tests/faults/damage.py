"""Damage that chance does to a store at rest: bits that flip, sectors that are lost, writes that went astray.

Knows where the parts of a store lie and what each kind of damage leaves behind. A round damages one copy in
place, asks featcache about it, compares the answer with the bytes that differ, and puts the bytes back.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from conftest import toy_records, toy_spec
from gaussians import PROVENANCE

from faults.structure import find_checked
from featcache.commands.verify import verify
from featcache.errors import DamagedStore, StoreError
from featcache.records import RowStatus
from featcache.spec import FeatureNode
from featcache.store.creating import create_store
from featcache.store.layout import SOURCE_DTYPE, Region, RowTable, StoreLayout
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

SECTOR, PAGE = 512, 4096  # bytes
N_ROWS, BLOCK_ROWS = 400, 8
STATIC = ("labels", "splits", "ids", "classes", "seal")
ROW_DATASETS = ("row_status", "sources", "blocks")


@dataclass(frozen=True)
class Change:
    """Bytes to put at an offset; with `size` also the length that the file gets."""

    offset: int
    data: bytes
    size: int | None = None


@dataclass(frozen=True)
class Versions:
    """A complete store and what the same file held before: stale writes come from these."""

    now: bytes
    older: tuple[bytes, ...]  # filled otherwise, half filled, never filled


def make_versions(path: Path) -> Versions:
    """Make a store at `path`, keeping its bytes as it fills; the last version is what is there."""
    spec = toy_spec(
        nodes=(
            FeatureNode(name="penultimate", num_features=16),
            FeatureNode(name="stem", pooling="max", num_features=7),
        )
    )
    table = RowTable.from_records(toy_records(N_ROWS), ("c0", "c1"))
    create_store(path, spec=spec, table=table, provenance=PROVENANCE, block_rows=BLOCK_ROWS)
    empty = path.read_bytes()
    n_blocks = N_ROWS // BLOCK_ROWS
    fill(path, range(0, n_blocks, 2), seed=1)
    half = path.read_bytes()
    fill(path, range(1, n_blocks, 2), seed=1)
    other = path.read_bytes()
    fill(path, range(n_blocks), seed=2)
    return Versions(now=path.read_bytes(), older=(other, half, empty))


def fill(path: Path, blocks: range, *, seed: int) -> None:
    """Write these blocks; every row of every dataset depends on the seed. One row in nine has failed."""
    layout = read_layout(path)
    with StoreWriter(layout) as writer:
        for block in blocks:
            rng = np.random.default_rng((seed, block))
            rows = layout.rows_of(block)
            n = rows.stop - rows.start
            status = np.where(rng.random(n) < 1 / 9, RowStatus.UNDECODABLE, RowStatus.OK).astype(np.uint8)
            features = {
                key: rng.normal(size=(n, region.shape[1])).astype(region.dtype)
                for key, region in layout.features.items()
            }
            for array in features.values():
                array[status != RowStatus.OK] = np.nan
            sources = np.frombuffer(rng.bytes(n * SOURCE_DTYPE.itemsize), SOURCE_DTYPE)
            writer.write_block(block, features=features, row_status=status, sources=sources)


def parts_of(path: Path, whole: bytes) -> dict[str, list[range]]:
    """Every byte of the store under the name of the part it belongs to."""
    layout = read_layout(path)
    parts = {f"features/{key}": [_bytes(region)] for key, region in layout.features.items()}
    parts |= {name: [_bytes(getattr(layout, name))] for name in ROW_DATASETS}
    parts |= {name: [place] for name, place in _static_places(path).items()}
    parts["superblock"] = [range(48)]
    taken = sorted((r for ranges in parts.values() for r in ranges), key=lambda r: r.start)
    free = list(_between(taken, len(whole)))
    checked = sorted((c.start, c.stop) for c in find_checked(whole) if c.start)
    parts["metadata"] = [range(*both) for both in checked]
    covered = sorted([*taken, *parts["metadata"]], key=lambda r: r.start)
    parts["gaps"] = list(_between(covered, len(whole)))
    if sum(map(len, free)) != sum(map(len, parts["gaps"])) + sum(map(len, parts["metadata"])):
        raise ValueError("the parts of the store overlap")
    return parts


def _static_places(path: Path) -> dict[str, range]:
    import h5py

    with h5py.File(path, locking=False) as file:
        return {
            name: range(file[name].id.get_offset(), file[name].id.get_offset() + file[name].nbytes)
            for name in STATIC
        }


def _bytes(region: Region) -> range:
    return range(region.offset, region.offset + region.row_bytes * region.shape[0])


def _between(taken: list[range], size: int) -> Iterator[range]:
    at = 0
    for part in taken:
        if at < part.start:
            yield range(at, part.start)
        at = max(at, part.stop)
    if at < size:
        yield range(at, size)


Kind = Callable[[random.Random, int, Versions], Change]


def _one_bit(rng: random.Random, at: int, store: Versions) -> Change:
    return Change(at, bytes([store.now[at] ^ (1 << rng.randrange(8))]))


def _several_bits(rng: random.Random, at: int, store: Versions) -> Change:
    data = bytearray(store.now[at : at + 64])
    for _ in range(rng.randint(2, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return Change(at, bytes(data))


def _filled(byte: int, unit: int) -> Kind:
    def change(rng: random.Random, at: int, store: Versions) -> Change:
        start = at // unit * unit
        return Change(start, bytes([byte]) * len(store.now[start : start + unit]))

    return change


def _ones(rng: random.Random, at: int, store: Versions) -> Change:
    return Change(at, b"\xff" * len(store.now[at : at + rng.randint(1, 40)]))


def _truncated(rng: random.Random, at: int, store: Versions) -> Change:
    return Change(at, b"", size=at)


def _extended(rng: random.Random, at: int, store: Versions) -> Change:
    added = rng.choice([1, SECTOR, PAGE])
    return Change(len(store.now), bytes(added), size=len(store.now) + added)


def _astray(unit: int) -> Kind:
    """The bytes of another place of the same file."""

    def change(rng: random.Random, at: int, store: Versions) -> Change:
        start = at // unit * unit
        source = rng.randrange(len(store.now) // unit) * unit
        data = store.now[source : source + unit]
        return Change(start, data[: len(store.now) - start])

    return change


def _stale(unit: int) -> Kind:
    """The bytes that an older version of the file had here."""

    def change(rng: random.Random, at: int, store: Versions) -> Change:
        start = at // unit * unit
        return Change(start, rng.choice(store.older)[start : start + unit])

    return change


def _swapped(rng: random.Random, at: int, store: Versions) -> Change:
    """Two neighbouring pieces exchanged, as when two writes took each other's place."""
    length = rng.choice([8, 64, 128, SECTOR])
    start = min(at, len(store.now) - 2 * length)
    first, second = store.now[start : start + length], store.now[start + length : start + 2 * length]
    return Change(start, second + first)


KINDS: dict[str, Kind] = {
    "one bit": _one_bit,
    "2-8 bits": _several_bits,
    "0xff bytes": _ones,
    "sector of zeros": _filled(0, SECTOR),
    "page of zeros": _filled(0, PAGE),
    "cut short": _truncated,
    "made longer": _extended,
    "sector astray": _astray(SECTOR),
    "page astray": _astray(PAGE),
    "stale sector": _stale(SECTOR),
    "stale page": _stale(PAGE),
    "swapped": _swapped,
}


def choose_change(rng: random.Random, part: list[range], kind: str, store: Versions) -> Change | None:
    """Damage of this kind in this part that changes at least one byte; None when chance finds none."""
    for _ in range(50):
        place = rng.choices(part, weights=[len(r) for r in part])[0]
        change = KINDS[kind](rng, rng.choice(place), store)
        if change.size is not None or change.data != store.now[change.offset :][: len(change.data)]:
            return change
    return None


class Damaged:
    """A file with a change made in it, put back at the end."""

    def __init__(self, path: Path, change: Change, whole: bytes) -> None:
        self._path, self._change, self._whole = path, change, whole

    def __enter__(self) -> Self:
        with open(self._path, "r+b") as file:
            os.pwrite(file.fileno(), self._change.data, self._change.offset)
            if self._change.size is not None:
                file.truncate(self._change.size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        start = self._change.offset
        stop = len(self._whole) if self._change.size is not None else start + len(self._change.data)
        with open(self._path, "r+b") as file:
            file.truncate(len(self._whole))
            os.pwrite(file.fileno(), self._whole[start:stop], start)


@dataclass(frozen=True)
class Truth:
    """What the undamaged store holds, and how its bytes map to blocks."""

    layout: StoreLayout
    features: dict[str, np.ndarray]
    usable: np.ndarray
    versions: Versions

    @classmethod
    def of(cls, path: Path, versions: Versions) -> Self:
        store = FeatureStore.open(path)
        return cls(
            layout=store.layout,
            features={key: np.array(store.map(key)) for key in store.layout.features},
            usable=np.array(store.row_status == RowStatus.OK),
            versions=versions,
        )

    def rows(self, blocks: set[int]) -> set[int]:
        slices = (self.layout.rows_of(block) for block in blocks)
        return {row for rows in slices for row in range(rows.start, rows.stop)}

    def hit_by(self, change: Change) -> tuple[set[int], set[int]] | None:
        """(damaged blocks, blocks whose record is now empty); None where more than rows is hit."""
        if change.size is not None:
            return None
        now = self.versions.now[change.offset :][: len(change.data)]
        differ = np.flatnonzero(np.frombuffer(now, "u1") != np.frombuffer(change.data, "u1")) + change.offset
        blocks: set[int] = set()
        in_rows = np.zeros(len(differ), dtype=bool)
        layout = self.layout
        for region in (*layout.features.values(), layout.row_status, layout.sources, layout.blocks):
            inside = (differ >= region.offset) & (differ < _bytes(region).stop)
            in_rows |= inside
            rows = (differ[inside] - region.offset) // region.row_bytes
            blocks |= set((rows if region is layout.blocks else rows // layout.block_rows).tolist())
        if not in_rows.all():
            return None
        after = bytearray(self.versions.now)
        after[change.offset : change.offset + len(change.data)] = change.data
        records = region.map(bytes(after))
        empty = {block for block in blocks if not any(records[block].tobytes())}
        return blocks - empty, empty


def find_fault(path: Path, truth: Truth, change: Change) -> str | None:
    """What featcache gets wrong about the store with this change in it; None when it is right.

    A change outside of the rows must be refused as such. One in the rows must be reported with just the rows
    of the blocks it is in, and no other row be kept back. A record of which nothing is left makes its rows
    pending: they must not be served.
    """
    hit = truth.hit_by(change)
    if hit is None:
        return _wrongly_opened(path)
    damaged, empty = hit
    return (
        _wrong_refusal(path, truth, damaged)
        or _wrong_verdict(path, truth, damaged, empty)
        or _wrong_service(path, truth, damaged | empty)
    )


def _wrongly_opened(path: Path) -> str | None:
    try:
        FeatureStore.open(path, check=False)
    except StoreError as error:
        return None if "\n" not in str(error) else f"not one line: {str(error)!r}"
    return "not detected: damage outside of the rows"


def _wrong_refusal(path: Path, truth: Truth, damaged: set[int]) -> str | None:
    """Opening, which names the first few ranges."""
    try:
        FeatureStore.open(path)
    except DamagedStore as error:
        said = re.search(r"rows ([-0-9, ]+)(…?)", str(error))
        if said is None:
            return f"damage in rows is reported without them: {error}"
        got, wanted = _named_rows(said[1]), truth.rows(damaged)
        return None if got == wanted or (said[2] and got < wanted) else f"rows {said[1]} are blamed"
    return f"not detected at opening: damage in blocks {sorted(damaged)[:5]}" if damaged else None


def _wrong_verdict(path: Path, truth: Truth, damaged: set[int], empty: set[int]) -> str | None:
    """`featcache verify`, which names them all."""
    result = verify(path)
    got = {row for rows in result.damaged for row in range(rows.first, rows.last + 1)}
    if got != truth.rows(damaged) or result.sound != (not damaged):
        return f"verify blames {len(got)} rows, not {len(truth.rows(damaged))}"
    if result.pending != len(truth.rows(empty)):
        return f"verify says {result.pending} rows are pending, not {len(truth.rows(empty))}"
    return None


def _wrong_service(path: Path, truth: Truth, lost: set[int]) -> str | None:
    """What is still served once the damage is known: all other rows, as they were."""
    store = FeatureStore.open(path, check=False)
    store.inspect()
    usable = truth.usable.copy()
    usable[list(truth.rows(lost))] = False
    rows = np.flatnonzero(usable)
    for key, expected in truth.features.items():
        served = store.features(key, partial=True)
        if not np.array_equal(served.X, expected[rows]):
            return f"other rows of {key} are served than the sound ones"
        if served.ids != tuple(truth.layout.table.ids[row] for row in rows):
            return "the rows that are served have other ids"
    return None


def _named_rows(text: str) -> set[int]:
    ranges = re.findall(r"(\d+)-(\d+)", text)
    return {row for first, last in ranges for row in range(int(first), int(last) + 1)}
