"""A model of a disk whose power is cut: which folders may be found afterwards, given what was synced.

What was synced is there. Of everything later, per file and for the names, anything may be there or not:

- Writes. Each may be lost, or there in some of its 512-byte sectors only: a disk writes one sector whole or
  not at all, and in any order. A lost write leaves what was there before; `stale` also lets it leave foreign
  bytes where the file had none before, as file systems do that do not order data before sizes (ext4 with
  data=writeback).
- Sizes. A file may have grown without its data (`sizes`), or not have grown, which loses what lies beyond.
- Two writes of one byte are never swapped: the page cache holds the later one only.
- Names, as a journal has them (ext4, XFS, Btrfs): the operations since the last fsync of the folder, up to
  some moment, none after it.
- Names, as POSIX has them, which promises no order without an fsync: any subset; and a rename may be there by
  half, the new name made and the old one not yet gone (ext2). The reverse half, which would lose a file by a
  rename, is done by no file system.

A sync of a file says nothing of its name. Sectors do not change by themselves, and a sync that returned is
true: disks that lie are not in this model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from faults.crash_recording import (
    DataOp,
    Enter,
    Mark,
    NameOp,
    Op,
    Recording,
    Remove,
    Rename,
    Resize,
    Sync,
    SyncNames,
    Write,
    apply_data,
    apply_names,
)

SECTOR = 512  # bytes
LOST, THERE, HALF = 0, 1, 2  # what became of a name operation; HALF is for a rename only
_NO_BYTES, _STALE_BYTES = b"\0", b"\xa5"
_EXHAUSTIVE_NAMES = 5  # with more operations on names than that, their subsets are not all tried


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of everything that was not synced; with the recording and the cut it gives the state.

    data: for each file, for each operation a mask of the sectors that are there, bit 0 the first.
    """

    names: tuple[int, ...]
    data: Mapping[int, tuple[int, ...]]
    sizes: bool = False
    stale: bool = False


@dataclass
class Cut:
    """The power goes after `at` operations: what is on the disk for certain, and what may be."""

    at: int
    names: dict[str, int]
    images: dict[int, bytes]
    unsynced_names: list[NameOp] = field(default_factory=list)
    unsynced_data: dict[int, list[DataOp]] = field(default_factory=dict)
    issued_names: dict[str, int] = field(default_factory=dict)  # as the process itself sees them

    def reachable(self, fates: Sequence[int]) -> dict[str, int]:
        """The names after the cut."""
        names = dict(self.names)
        for op, fate in zip(self.unsynced_names, fates, strict=True):
            if fate == HALF and isinstance(op, Rename):
                names[op.target] = op.inode
            elif fate:
                apply_names(names, op)
        return names

    def image(self, inode: int, fate: Fate) -> bytes:
        """The bytes of a file after the cut."""
        base, ops = self.images.get(inode, b""), self.unsynced_data.get(inode, ())
        masks = fate.data.get(inode)
        if not ops or masks is None:
            return base
        image, fill = bytearray(base), _STALE_BYTES if fate.stale else _NO_BYTES
        for op, mask in zip(ops, masks, strict=True):
            if isinstance(op, Write):
                _write_some(image, op, mask, fate.sizes, fill)
            elif mask or fate.sizes:
                _grow(image, op.size, fill)
                if mask and isinstance(op, Resize):
                    del image[op.size :]
        return bytes(image)

    def everything(self) -> Fate:
        """What a kill leaves: the page cache survives."""
        data = {i: tuple(full(op) for op in ops) for i, ops in self.unsynced_data.items()}
        return Fate(names=(THERE,) * len(self.unsynced_names), data=data)

    @property
    def pieces(self) -> int:
        """How much is undecided: sectors and operations on names."""
        sectors = sum(full(op).bit_length() for ops in self.unsynced_data.values() for op in ops)
        return sectors + len(self.unsynced_names)


def _write_some(image: bytearray, op: Write, mask: int, sizes: bool, fill: bytes) -> None:
    end = op.offset + len(op.data)
    if mask == full(op):
        _grow(image, op.offset, fill)
        image[op.offset : end] = op.data
        return
    if sizes:
        _grow(image, end, fill)
    for bit in range(mask.bit_length()):
        if mask >> bit & 1:
            start, stop = _sector_range(op, bit)
            _grow(image, stop, fill)
            image[start:stop] = op.data[start - op.offset : stop - op.offset]


def _grow(image: bytearray, size: int, fill: bytes) -> None:
    if size > len(image):
        image.extend(fill * (size - len(image)))


def _sector_range(op: Write, bit: int) -> tuple[int, int]:
    sector = op.offset // SECTOR + bit
    return max(op.offset, sector * SECTOR), min(op.offset + len(op.data), (sector + 1) * SECTOR)


def full(op: DataOp) -> int:
    """The mask of an operation that is wholly there."""
    if not isinstance(op, Write):
        return 1
    return (1 << ((op.offset + len(op.data) - 1) // SECTOR - op.offset // SECTOR + 1)) - 1


def cuts(recording: Recording) -> Iterator[Cut]:
    """One for every moment between two operations, the last one after all of them.

    An acknowledgement counts from the moment it was given, so the cut lies behind it.
    """
    names, issued = dict(recording.names), dict(recording.names)
    images = dict(recording.contents)
    loose_names: list[NameOp] = []
    loose: dict[int, list[DataOp]] = {}
    for at in range(len(recording.ops) + 1):
        following = recording.ops[at] if at < len(recording.ops) else None
        if following is None or not isinstance(following, Mark):
            yield Cut(
                at=at,
                names=dict(names),
                images=dict(images),
                unsynced_names=list(loose_names),
                unsynced_data={i: list(ops) for i, ops in loose.items() if ops},
                issued_names=dict(issued),
            )
        if following is not None:
            _advance(following, names, images, loose_names, loose)
            if isinstance(following, Enter | Rename | Remove):
                apply_names(issued, following)


def _advance(
    op: Op,
    names: dict[str, int],
    images: dict[int, bytes],
    loose_names: list[NameOp],
    loose: dict[int, list[DataOp]],
) -> None:
    if isinstance(op, Enter | Rename | Remove):
        loose_names.append(op)
    elif isinstance(op, SyncNames):
        for name_op in loose_names:
            apply_names(names, name_op)
        loose_names.clear()
    elif isinstance(op, Sync):
        image = bytearray(images.get(op.inode, b""))
        for data_op in loose.pop(op.inode, ()):
            apply_data(image, data_op)
        images[op.inode] = bytes(image)
    elif not isinstance(op, Mark):
        loose.setdefault(op.inode, []).append(op)


def canonical_fates(cut: Cut) -> Iterator[Fate]:
    """Nothing, everything, each operation alone, all but each, each write torn at every sector; each once."""
    seen = set()
    for fate in _with_doubles(cut):
        key = (fate.names, tuple(fate.data.items()), fate.sizes, fate.stale)
        if key not in seen:
            seen.add(key)
            yield fate


def _with_doubles(cut: Cut) -> Iterator[Fate]:
    everything, journal = cut.everything(), list(_journal(cut))
    nothing = {i: (0,) * len(ops) for i, ops in cut.unsynced_data.items()}
    for names in _all_names(cut):
        yield Fate(names=names, data=everything.data)
        for sizes, stale in _beyond(cut, *cut.unsynced_data):
            yield Fate(names=names, data=nothing, sizes=sizes, stale=stale)
    for inode, ops in cut.unsynced_data.items():
        for masks in _data_fates(ops):
            for rest in (everything.data, nothing):
                for names in (journal[0], journal[-1]):
                    for sizes, stale in _beyond(cut, inode):
                        yield Fate(names=names, data={**rest, inode: masks}, sizes=sizes, stale=stale)


def _beyond(cut: Cut, *inodes: int) -> Iterator[tuple[bool, bool]]:
    """(sizes, stale): they make a difference only where a file grew since it was synced."""
    yield False, False
    for inode in inodes:
        base = len(cut.images.get(inode, b""))
        ends = (
            op.offset + len(op.data) if isinstance(op, Write) else op.size for op in cut.unsynced_data[inode]
        )
        if max(ends) > base:
            yield from ((True, False), (True, True))
            return


def _data_fates(ops: Sequence[DataOp]) -> Iterator[tuple[int, ...]]:
    whole = tuple(full(op) for op in ops)
    nothing = (0,) * len(ops)
    for number, mask in enumerate(whole):
        sectors = mask.bit_length()
        torn = {(1 << cut) - 1 for cut in range(sectors + 1)} | {1 << bit for bit in range(sectors)}
        for some in sorted(torn | {mask & ~part for part in torn}):
            yield (*whole[:number], some, *whole[number + 1 :])
            yield (*nothing[:number], some, *nothing[number + 1 :])
        yield (*whole[: number + 1], *nothing[number + 1 :])  # in the order they were made, up to here


def is_journaled(names: Sequence[int]) -> bool:
    """Whether the operations on names are there up to some moment, and none after it."""
    return HALF not in names and list(names) == sorted(names, reverse=True)


def _journal(cut: Cut) -> Iterator[tuple[int, ...]]:
    n = len(cut.unsynced_names)
    return ((THERE,) * there + (LOST,) * (n - there) for there in range(n + 1))


def _all_names(cut: Cut) -> Iterator[tuple[int, ...]]:
    choices = [(LOST, THERE, HALF) if isinstance(op, Rename) else (LOST, THERE) for op in cut.unsynced_names]
    if len(choices) <= _EXHAUSTIVE_NAMES:
        yield from itertools.product(*choices)
        return
    yield from _journal(cut)
    for number, fates in enumerate(choices):
        for fate in fates:
            for rest in (LOST, THERE):
                yield (rest,) * number + (fate,) + (rest,) * (len(choices) - number - 1)


def random_fate(cut: Cut, seed: str) -> Fate:
    """One of all the states there may be; the same for the same seed."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        there = rng.randrange(len(cut.unsynced_names) + 1)
        names = tuple(THERE if number < there else LOST for number in range(len(cut.unsynced_names)))
    else:
        names = tuple(rng.choice((LOST, THERE, _half(op))) for op in cut.unsynced_names)
    (draw,) = rng.choices((_draw_sectors, _draw_moments, _draw_writes, _draw_few), (5, 3, 1, 1))
    data = {i: draw(ops, rng) for i, ops in cut.unsynced_data.items()}
    return Fate(names=names, data=data, sizes=rng.random() < 0.5, stale=rng.random() < 0.25)


def _half(op: NameOp) -> int:
    return HALF if isinstance(op, Rename) else THERE


def _draw_writes(ops: Sequence[DataOp], rng: random.Random) -> tuple[int, ...]:
    """Each operation wholly there or not."""
    share = rng.random()
    return tuple(full(op) if rng.random() < share else 0 for op in ops)


def _draw_sectors(ops: Sequence[DataOp], rng: random.Random) -> tuple[int, ...]:
    """Each sector of each operation there or not."""
    return tuple(full(op) & (rng.getrandbits(full(op).bit_length()) | _bit_or_none(rng)) for op in ops)


def _bit_or_none(rng: random.Random) -> int:
    return -1 if rng.random() < 0.5 else 0


def _draw_few(ops: Sequence[DataOp], rng: random.Random) -> tuple[int, ...]:
    """All there but one or two sectors: the states that look most as if nothing was lost."""
    masks = [full(op) for op in ops]
    for _ in range(rng.randrange(1, 3)):
        number = rng.randrange(len(ops))
        masks[number] &= ~(1 << rng.randrange(full(ops[number]).bit_length()))
    return tuple(masks)


def _draw_moments(ops: Sequence[DataOp], rng: random.Random) -> tuple[int, ...]:
    """Each sector of the file as it was at some moment: the page cache, written back in pieces."""
    moments: dict[int, int] = {}
    masks = []
    for number, op in enumerate(ops):
        mask = 0
        first = op.offset // SECTOR if isinstance(op, Write) else 0
        for bit in range(full(op).bit_length()):
            moment = moments.setdefault(first + bit, rng.randrange(len(ops) + 1))
            mask |= (number < moment) << bit
        masks.append(mask)
    return tuple(masks)
