"""Writing rows into a created store: `pwrite` at known offsets, one block at a time, one sync a group.

The CRC in a block's record is what makes a single sync enough: whatever order the disk chooses, a record
whose data did not arrive is recognised on resume and its block computed again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.disk import disk_errors
from featcache.records import RowStatus
from featcache.store.blocks import BlockCheck, chain_crc, make_record
from featcache.store.layout import Region, StoreLayout

GROUP_BYTES = 16 << 20
GROUP_SECONDS = 5.0


class StoreWriter:
    """The one writer of a store; the caller holds the store's lock."""

    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout
        self._sequence = BlockCheck(layout).last_sequence
        self._unsynced_bytes = 0
        self._synced_at = time.monotonic()
        with disk_errors(layout.path, doing="opening"):
            self._fd = os.open(layout.path, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.commit()
        finally:
            os.close(self._fd)

    def write_block(
        self,
        block: int,
        *,
        features: Mapping[str, NDArray[Any]],
        row_status: NDArray[np.uint8],
        sources: NDArray[Any],
    ) -> None:
        """Write one whole block and declare it done; it is acknowledged by the next `commit`.

        features: {node key: (rows, num_features)} in the store's dtype, NaN in rows that are not OK and
        finite in those that are; ValueError otherwise. row_status: (rows,). sources: (rows,) of SOURCE_DTYPE.
        """
        layout = self._layout
        rows = layout.rows_of(block)
        n = rows.stop - rows.start
        ok = row_status == RowStatus.OK
        ordered = [features[key] for key in layout.features]
        for array, region in zip(ordered, layout.features.values(), strict=True):
            if array.shape != (n, *region.shape[1:]) or array.dtype != region.dtype:
                raise ValueError(
                    f"block {block} wants {(n, *region.shape[1:])} {region.dtype}, not {array.shape}"
                )
            if not np.isfinite(array[ok]).all() or not np.isnan(array[~ok]).all():
                raise ValueError(f"block {block}: rows are finite where OK and NaN where not")
        if (row_status == RowStatus.PENDING).any() or len(row_status) != n or len(sources) != n:
            raise ValueError(f"block {block} is written once all of its {n} rows are known")
        self._sequence += 1
        record = make_record(
            first_row=rows.start,
            rows=n,
            features_crc=chain_crc(*ordered),
            columns_crc=chain_crc(row_status, sources),
            sequence=self._sequence,
        )
        with disk_errors(layout.path, doing="writing"):
            for array, region in zip(ordered, layout.features.values(), strict=True):
                self._write(array, region, rows.start)
            self._write(row_status, layout.row_status, rows.start)
            self._write(sources, layout.sources, rows.start)
            self._write(record, layout.blocks, block)
        if self._unsynced_bytes >= GROUP_BYTES or time.monotonic() - self._synced_at >= GROUP_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Return once every block written so far survives a kill and a power cut."""
        if self._unsynced_bytes:
            with disk_errors(self._layout.path, doing="syncing"):
                _sync_data(self._fd)
            self._unsynced_bytes = 0
        self._synced_at = time.monotonic()

    def _write(self, array: NDArray[Any], region: Region, row: int) -> None:
        data = memoryview(np.ascontiguousarray(array).tobytes())
        offset = region.offset + row * region.row_bytes
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written
            self._unsynced_bytes += written


def _sync_data(fd: int) -> None:
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)
