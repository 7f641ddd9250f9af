"""Block records: what a block of rows holds and the checksums that prove it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DiskError
from featcache.records import RowStatus
from featcache.store.checksum import crc32_function
from featcache.store.layout import RECORD_DTYPE, Region, StoreLayout

MAGIC = b"FCB1"
DONE = 1
_CHECKED_AT_ONCE = 1 << 20  # bytes; they stay in the processor's cache between reading and checking
_MAY_BE_DONE = np.isin(np.arange(256), [status for status in RowStatus if status is not RowStatus.PENDING])
_CHECKERS = 4  # threads; more of them only wait for memory


class BlockState(Enum):
    """What a block's record and bytes say of each other; the value is the reason in words."""

    PENDING = "not embedded yet"
    DONE = "as written"
    BAD_RECORD = "its record is not one that was written"
    BAD_COLUMNS = "row status or image identities do not match their checksum"
    BAD_FEATURES = "features do not match their checksum"
    UNREADABLE = "the disk does not give it"

    @property
    def is_damage(self) -> bool:
        return self not in (BlockState.PENDING, BlockState.DONE)


def make_record(
    *, first_row: int, rows: int, features_crc: int, columns_crc: int, sequence: int
) -> NDArray[Any]:
    """The 64 bytes that declare a block done; the last field is a CRC-32 of the others."""
    record = np.zeros(1, RECORD_DTYPE)
    record[0] = (MAGIC, DONE, first_row, rows, features_crc, columns_crc, sequence, 0)
    record["record_crc"] = zlib.crc32(record.tobytes()[:60])
    return record


def chain_crc(*arrays: NDArray[Any], start: int = 0) -> int:
    """CRC-32 over the bytes of arrays, one after another, going on from `start`."""
    crc32, value = crc32_function(), start
    for array in arrays:
        value = crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value


def spec_crc(layout: StoreLayout) -> int:
    """What the checksum of every block's features begins with, so that they pass for no other spec's."""
    return zlib.crc32(layout.fingerprint.encode())


class BlockCheck:
    """Compares the blocks of a store with their records, as the records were when this was made."""

    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout
        self._features = tuple(layout.features.values())
        self._records = layout.read(layout.blocks)

    @property
    def last_sequence(self) -> int:
        """Of the intact records: a damaged one may say anything."""
        declared = (block for block in range(self._layout.n_blocks) if self.is_declared(block))
        return max((int(self._records["sequence"][block]) for block in declared), default=0)

    def is_empty(self, block: int) -> bool:
        """Whether nothing was ever declared of this block: its record is all zeros."""
        return not any(self._records[block].tobytes())

    def is_declared(self, block: int) -> bool:
        """Whether the block has an intact record for just these rows."""
        record = self._records[block]
        rows = self._layout.rows_of(block)
        return bool(
            record["magic"] == MAGIC
            and record["state"] == DONE
            and record["first_row"] == rows.start
            and record["rows"] == rows.stop - rows.start
            and record["record_crc"] == zlib.crc32(record.tobytes()[:60])
        )

    def has_sound_columns(self, block: int) -> bool:
        columns = (self._layout.row_status, self._layout.sources)
        if self._crc(columns, block) != int(self._records[block]["columns_crc"]):
            return False
        # Under a right checksum only a forged file has rows of no known status.
        status = self._layout.read(self._layout.row_status, self._layout.rows_of(block))
        return bool(_MAY_BE_DONE[status].all())

    def has_sound_features(self, block: int) -> bool:
        crc = self._crc(self._features, block, start=spec_crc(self._layout))
        return crc == int(self._records[block]["features_crc"])

    def is_done(self, block: int) -> bool:
        """Whether the block is declared and every byte agrees with its checksums."""
        return self.state_of(block) is BlockState.DONE

    def state_of(self, block: int) -> BlockState:
        if self.is_empty(block):
            return BlockState.PENDING
        if not self.is_declared(block):
            return BlockState.BAD_RECORD
        try:
            if not self.has_sound_columns(block):
                return BlockState.BAD_COLUMNS
            return BlockState.DONE if self.has_sound_features(block) else BlockState.BAD_FEATURES
        except DiskError:
            return BlockState.UNREADABLE

    def states(self) -> list[BlockState]:
        """The state of every block; reads and checks the whole store, on several threads where that pays."""
        blocks = range(self._layout.n_blocks)
        if len(blocks) < 2:
            return [self.state_of(block) for block in blocks]
        with ThreadPoolExecutor(_CHECKERS) as pool:
            return list(pool.map(self.state_of, blocks))

    def pending(self) -> Iterator[int]:
        """The blocks to compute: never declared, or declared by a record their data does not match."""
        return (block for block, state in enumerate(self.states()) if state is not BlockState.DONE)

    def _crc(self, regions: Sequence[Region], block: int, *, start: int = 0) -> int:
        """CRC-32 of a block's rows of some datasets, one after another, read in parts."""
        crc32, value = crc32_function(), start
        rows = self._layout.rows_of(block)
        for region in regions:
            step = max(1, _CHECKED_AT_ONCE // max(region.row_bytes, 1))
            for first in range(rows.start, rows.stop, step):
                part = self._layout.read(region, slice(first, min(first + step, rows.stop)))
                value = crc32(part.reshape(-1).view(np.uint8).data, value)
        return value
