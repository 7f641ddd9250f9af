"""Rows on their way into a store: computed ones from the pipeline, reused ones from older stores.

Batches arrive in the order of the pending rows, and a block is written as soon as all of its rows are
known, so that no more than the blocks touched by one batch are held in memory.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.images.identity import ImageFailure
from featcache.images.paths import show_path
from featcache.lanes import EmbeddedBatch, EmbeddedImage
from featcache.records import RowStatus
from featcache.reuse import ReusePlan
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter


class StoreFilling:
    """What is known of every row of `target` so far.

    status: uint8 ndarray (n_rows,), PENDING until a row's batch came. reasons: {row: why it failed}.
    """

    def __init__(self, plan: ReusePlan, target: FeatureStore) -> None:
        self.plan, self.target = plan, target
        layout = target.layout
        self.status = plan.reused_status
        self.reasons: dict[int, str] = {}
        self.written_rows = layout.n_rows
        self._frames: list[str] = []
        self._sources = plan.sources.copy()
        self._expected = deque(plan.pending.tolist())
        self._todo: deque[int] = deque()
        for block in range(layout.n_blocks):
            if not target.done[layout.rows_of(block)].all():
                self._todo.append(block)
                self.written_rows -= self._length(block)
        self._computed: dict[int, dict[str, NDArray[Any]]] = {}  # block -> {node key: (rows, num_features)}

    def add(self, batch: EmbeddedBatch) -> None:
        """Take the next batch of pending rows."""
        rows = np.array([self._expected.popleft() for _ in batch.outcomes])
        for row, outcome in zip(rows.tolist(), batch.outcomes, strict=True):
            self._note_outcome(row, outcome)
        features = {key: self._to_store_dtype(array, rows) for key, array in batch.features.items()}
        block_rows = self.target.layout.block_rows
        for block in np.unique(rows // block_rows).tolist():
            inside = rows // block_rows == block
            arrays = self._computed.setdefault(block, self._empty(block))
            for key, array in features.items():
                arrays[key][rows[inside] - block * block_rows] = array[inside]

    @property
    def finished(self) -> bool:
        """Whether every block is written."""
        return not self._todo

    @property
    def in_progress(self) -> bool:
        """Whether rows were computed whose block is not written yet."""
        return bool(self._computed)

    @property
    def rows_at_risk(self) -> int:
        """Rows that were computed and whose block is not written yet."""
        return sum(self._count_computed(self.target.layout.rows_of(block)) for block in self._computed)

    @property
    def rows_to_finish(self) -> int:
        """Rows still to be computed before the block in progress can be written."""
        rows = (self.target.layout.rows_of(block) for block in list(self._computed)[:1])
        return sum(int(np.count_nonzero(self.status[block] == RowStatus.PENDING)) for block in rows)

    def _count_computed(self, rows: slice) -> int:
        computed = (self.plan.origin_store[rows] < 0) & (self.status[rows] != RowStatus.PENDING)
        return int(np.count_nonzero(computed))

    def write_next(self, writer: StoreWriter) -> bool:
        """Write the next block if all of its rows are known; whether it was written."""
        if not self._todo or self._has_pending(self._todo[0]):
            return False
        block = self._todo.popleft()
        rows = self.target.layout.rows_of(block)
        arrays = self._computed.pop(block, None) or self._empty(block)
        self._copy_reused(rows, arrays)
        status = self.status[rows]
        for array in arrays.values():
            array[status != RowStatus.OK] = np.nan
        writer.write_block(block, features=arrays, row_status=status, sources=self._sources[rows])
        self.written_rows += self._length(block)
        return True

    def notes(self) -> list[str]:
        """What the user should know of images that did not fail."""
        notes = []
        if self._frames:
            first = self._frames[0]
            notes.append(f"{len(self._frames):,} images have several frames; the first was used ({first}, …)")
        overflown = int((self.status == RowStatus.NON_FINITE).sum())
        if overflown and self.target.spec.store_dtype == "float16":
            notes.append(f"{overflown:,} rows do not fit float16; embed with --store-dtype float32")
        return notes

    def _note_outcome(self, row: int, outcome: EmbeddedImage | ImageFailure) -> None:
        digest = outcome.sha256 or bytes(32)
        self._sources[row] = (np.frombuffer(digest, np.uint8), *outcome.stat.as_tuple())
        if isinstance(outcome, ImageFailure):
            self.status[row] = outcome.status
            self.reasons[row] = outcome.reason
            return
        self.status[row] = RowStatus.OK
        if outcome.note:
            self._frames.append(f"{show_path(self.plan.table.ids[row])}: {outcome.note}")

    def _to_store_dtype(self, array: NDArray[np.float32], rows: NDArray[Any]) -> NDArray[Any]:
        """The batch as it is stored; rows that overflow or were never finite become NON_FINITE."""
        with np.errstate(over="ignore"):
            stored = array.astype(next(iter(self.target.layout.features.values())).dtype)
        for row in rows[~np.isfinite(stored).all(axis=1)].tolist():
            if self.status[row] == RowStatus.OK:
                self.status[row] = RowStatus.NON_FINITE
                self.reasons[row] = f"its features are not finite in {stored.dtype.name}"
        return stored

    def _copy_reused(self, rows: slice, arrays: dict[str, NDArray[Any]]) -> None:
        origin_store, origin_row = self.plan.origin_store[rows], self.plan.origin_row[rows]
        for index, cache in enumerate(self.plan.caches):
            here = np.flatnonzero(origin_store == index)
            for key, array in arrays.items():
                array[here] = cache.store.dataset(key)[origin_row[here]]

    def _has_pending(self, block: int) -> bool:
        return bool((self.status[self.target.layout.rows_of(block)] == RowStatus.PENDING).any())

    def _empty(self, block: int) -> dict[str, NDArray[Any]]:
        return {
            key: np.full((self._length(block), *region.shape[1:]), np.nan, dtype=region.dtype)
            for key, region in self.target.layout.features.items()
        }

    def _length(self, block: int) -> int:
        rows = self.target.layout.rows_of(block)
        return int(rows.stop - rows.start)
