"""Block records: what a block of rows holds and the checksums that prove it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.store.layout import RECORD_DTYPE, StoreLayout

MAGIC = b"FCB1"
DONE = 1


def make_record(
    *, first_row: int, rows: int, features_crc: int, columns_crc: int, sequence: int
) -> NDArray[Any]:
    """The 64 bytes that declare a block done; the last field is a CRC-32 of the others."""
    record = np.zeros(1, RECORD_DTYPE)
    record[0] = (MAGIC, DONE, first_row, rows, features_crc, columns_crc, sequence, 0)
    record["record_crc"] = zlib.crc32(record.tobytes()[:60])
    return record


def chain_crc(*arrays: NDArray[Any]) -> int:
    """CRC-32 over the bytes of arrays, one after another."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, value)
    return value


class BlockCheck:
    """Compares the blocks of a store with their records, through memory maps."""

    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout
        self._features = [layout.map(region) for region in layout.features.values()]
        self._status = layout.map(layout.row_status)
        self._sources = layout.map(layout.sources)
        self._records = layout.map(layout.blocks)

    @property
    def last_sequence(self) -> int:
        return int(self._records["sequence"].max(initial=0))

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
        rows = self._layout.rows_of(block)
        return chain_crc(self._status[rows], self._sources[rows]) == int(self._records[block]["columns_crc"])

    def has_sound_features(self, block: int) -> bool:
        rows = self._layout.rows_of(block)
        return chain_crc(*(node[rows] for node in self._features)) == int(
            self._records[block]["features_crc"]
        )

    def is_done(self, block: int) -> bool:
        """Whether the block is declared and every byte agrees with its checksums."""
        return self.is_declared(block) and self.has_sound_columns(block) and self.has_sound_features(block)

    def pending(self) -> Iterator[int]:
        """The blocks to compute: never declared, or declared by a record their data does not match."""
        return (block for block in range(self._layout.n_blocks) if not self.is_done(block))
