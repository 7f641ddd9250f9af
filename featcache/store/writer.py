"""Writing rows into a created store: `pwrite` at known offsets, one block at a time, one sync a group.

The CRC in a block's record is what makes a single sync enough: whatever order the disk chooses, a record
whose data did not arrive is recognised on resume and its block computed again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.disk import disk_errors, sync_data, sync_directory, write_at
from featcache.errors import DiskError
from featcache.records import RowStatus
from featcache.store.blocks import BlockCheck, chain_crc, make_record, spec_crc
from featcache.store.layout import Region, StoreLayout

GROUP_BYTES = 16 << 20
GROUP_SECONDS = 5.0


class StoreWriter:
    """The one writer of a store; the caller holds the store's lock."""

    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout
        self._failed = False
        self._sequence = BlockCheck(layout).last_sequence
        self._unsynced: list[int] = []  # blocks
        self._unsynced_bytes = 0
        self._synced_at = time.monotonic()
        with disk_errors(layout.path, doing="opening"):
            self._fd = os.open(layout.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with self._at_the_disk("syncing"):
                # Whoever wrote the store before may have been killed before its sync: what it wrote, the
                # name of the file included, is read from memory and may not be on the disk.
                sync_data(self._fd)
                sync_directory(layout.path.parent)
        except DiskError:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._failed:
                self.commit()
        finally:
            self._close()

    def _close(self) -> None:
        with suppress(OSError):  # what was to be kept is synced
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
            features_crc=chain_crc(*ordered, start=spec_crc(layout)),
            columns_crc=chain_crc(row_status, sources),
            sequence=self._sequence,
        )
        with self._at_the_disk("writing"):
            for array, region in zip(ordered, layout.features.values(), strict=True):
                self._write(array, region, rows.start)
            self._write(row_status, layout.row_status, rows.start)
            self._write(sources, layout.sources, rows.start)
            self._write(record, layout.blocks, block)
        self._unsynced.append(block)
        if self._unsynced_bytes >= GROUP_BYTES or time.monotonic() - self._synced_at >= GROUP_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Return once every block written so far survives a kill and a power cut."""
        if self._unsynced:
            try:
                with self._at_the_disk("syncing"):
                    sync_data(self._fd)
            except DiskError:
                self._withdraw()
                raise
            self._unsynced.clear()
            self._unsynced_bytes = 0
        self._synced_at = time.monotonic()

    def _withdraw(self) -> None:
        """Take back the records of blocks whose sync failed, so that they are computed and written anew.

        A kernel reports a failed sync once and takes the pages for written: whoever read them from memory
        now would believe in blocks that are not on the disk.
        """
        region = self._layout.blocks
        with suppress(OSError):
            for block in self._unsynced:
                write_at(self._fd, bytes(region.row_bytes), region.offset + block * region.row_bytes)
        self._unsynced.clear()

    @contextmanager
    def _at_the_disk(self, doing: str) -> Iterator[None]:
        """One line for a failure, after which nothing is acknowledged any more."""
        if self._failed:
            raise ValueError("this writer has failed before; open the store again")
        try:
            with disk_errors(self._layout.path, doing=doing):
                yield
        except DiskError:
            self._failed = True
            raise

    def _write(self, array: NDArray[Any], region: Region, row: int) -> None:
        data = np.ascontiguousarray(array).tobytes()
        self._unsynced_bytes += write_at(self._fd, data, region.offset + row * region.row_bytes)
