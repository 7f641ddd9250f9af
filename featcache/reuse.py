"""Which rows of a data set are in the cache already: a listing joined to stores by identity, not position.

A row is taken from a store when the file's path, size, mtime and ctime are the ones recorded, or else when
the sha256 of its bytes, read now, is: so that a touched, renamed, moved or copied image costs one read, and
an edited one is computed anew. Damaged blocks offer nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.images.identity import ImageFailure, hash_image
from featcache.images.paths import resolve
from featcache.records import FileStat, ImageRecord, Listing, RowStatus
from featcache.store.blocks import BlockCheck
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore

# What became of these images is decided by their bytes alone; the other failures are tried again.
_DECIDED_BY_BYTES = (RowStatus.OK, RowStatus.UNDECODABLE, RowStatus.TOO_LARGE, RowStatus.NON_FINITE)


class CachedRows:
    """The rows a store can vouch for, found by path or by content."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        layout = store.layout
        self.done = np.ones(len(store), dtype=bool)
        for block in BlockCheck(layout).pending():
            self.done[layout.rows_of(block)] = False
        self.status = np.where(self.done, layout.map(layout.row_status), RowStatus.PENDING)
        rows = np.flatnonzero(self.done)
        ids = store.table.ids
        self.by_path = {ids[row]: int(row) for row in rows}
        self._stats = list(
            zip(*(store.sources[name].tolist() for name in ("size", "mtime_ns", "ctime_ns")), strict=True)
        )

    @cached_property
    def by_sha256(self) -> dict[bytes, int]:
        rows = np.flatnonzero(np.isin(self.status, _DECIDED_BY_BYTES))
        digests = self.store.sources["sha256"]
        return {digests[row].tobytes(): int(row) for row in rows}

    def has_stat(self, row: int, stat: FileStat) -> bool:
        return self._stats[row] == (stat.size, stat.mtime_ns, stat.ctime_ns)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReusePlan:
    """For each row of the new table: the store and row that has its features, or none.

    origin_store, origin_row: int64 ndarrays (n_rows,), -1 = to be computed. sources: structured ndarray
    (n_rows,) of SOURCE_DTYPE, filled for reused rows with the file's stat as it is now.
    """

    listing: Listing
    table: RowTable
    caches: tuple[CachedRows, ...]
    origin_store: NDArray[np.int64]
    origin_row: NDArray[np.int64]
    sources: NDArray[Any]
    reread: int  # reused rows whose file's stat was not the recorded one, known by their bytes instead
    relabelled: int
    removed: int

    @property
    def pending(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.origin_store < 0)

    @property
    def reused_status(self) -> NDArray[np.uint8]:
        """uint8 ndarray (n_rows,): the status of reused rows, PENDING elsewhere."""
        status = np.full(len(self.table.ids), RowStatus.PENDING, dtype=np.uint8)
        for index, cache in enumerate(self.caches):
            here = self.origin_store == index
            status[here] = cache.status[self.origin_row[here]]
        return status

    def can_continue(self, index: int) -> bool:
        """Whether store `index` has just this plan's rows, so that the run can go on within it."""
        cache = self.caches[index]
        if not cache.store.table.equals(self.table):
            return False
        done = np.flatnonzero(cache.done)
        return bool(
            np.all(self.origin_store[done] == index)
            and np.array_equal(self.origin_row[done], done)
            and np.array_equal(self.sources[done], cache.store.sources[done])
        )


def plan_reuse(
    listing: Listing,
    stores: Sequence[FeatureStore],
    *,
    workers: int,
    on_read: Callable[[int], None] | None = None,
) -> ReusePlan:
    """Decide for every image of `listing` whether one of `stores`, first match wins, has its row.

    Files known by their stat are not opened; `on_read` is told of each file that had to be.
    """
    caches = tuple(CachedRows(store) for store in stores)
    n = len(listing.records)
    plan = ReusePlan(
        listing=listing,
        table=RowTable.from_records(listing.records, listing.classes),
        caches=caches,
        origin_store=np.full(n, -1, dtype=np.int64),
        origin_row=np.full(n, -1, dtype=np.int64),
        sources=np.zeros(n, SOURCE_DTYPE),
        reread=0,
        relabelled=0,
        removed=0,
    )
    unknown = [i for i, record in enumerate(listing.records) if not _take_by_stat(plan, i, record)]
    if not any(cache.by_path for cache in caches):
        unknown = []  # nothing to find: the run itself will read and hash every file
    _take_by_content(plan, unknown, workers=workers, on_read=on_read)
    return _count(plan, reread=int((plan.origin_store[unknown] >= 0).sum()) if unknown else 0)


def _take_by_stat(plan: ReusePlan, i: int, record: ImageRecord) -> bool:
    for index, cache in enumerate(plan.caches):
        row = cache.by_path.get(record.path)
        if row is None or not cache.has_stat(row, record.stat):
            continue
        if cache.status[row] in (*_DECIDED_BY_BYTES, RowStatus.MISSING):
            _take(plan, i, index, row, record.stat)
            return True
    return False


def _take_by_content(
    plan: ReusePlan, unknown: Sequence[int], *, workers: int, on_read: Callable[[int], None] | None
) -> None:
    root, records = plan.listing.root, plan.listing.records
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(hash_image, (_file(root, records[i]) for i in unknown))
        for i, identity in zip(unknown, found, strict=True):
            if on_read:
                on_read(1)
            for index, cache in enumerate(plan.caches):
                if isinstance(identity, ImageFailure):
                    row = cache.by_path.get(records[i].path)
                    if row is None or cache.status[row] != identity.status:
                        continue
                else:
                    row = cache.by_sha256.get(identity.sha256)
                    if row is None:
                        continue
                _take(plan, i, index, row, identity.stat)
                break


def _file(root: Path, record: ImageRecord) -> Path:
    return resolve(root, record.path)


def _take(plan: ReusePlan, i: int, index: int, row: int, stat: FileStat) -> None:
    plan.origin_store[i], plan.origin_row[i] = index, row
    digest = plan.caches[index].store.sources["sha256"][row]
    plan.sources[i] = (digest, stat.size, stat.mtime_ns, stat.ctime_ns)


def _count(plan: ReusePlan, *, reread: int) -> ReusePlan:
    """The plan with what changed against the last store, which is the one under the output's name."""
    if not plan.caches:
        return plan
    cache = plan.caches[-1]
    old, new = cache.store.table, plan.table
    old_names = list(zip(old.label_names(), old.splits.tolist(), strict=True))
    new_names = list(zip(new.label_names(), new.splits.tolist(), strict=True))
    relabelled = 0
    renamed: Counter[bytes] = Counter()
    for i in np.flatnonzero(plan.origin_store >= 0).tolist():
        row = cache.by_path.get(new.ids[i])
        if row is None:
            digest = plan.sources["sha256"][i].tobytes()
            renamed[digest] += 1
            row = cache.by_sha256.get(digest)
        relabelled += row is not None and old_names[row] != new_names[i]
    kept = set(new.ids)
    gone = Counter(
        cache.store.sources["sha256"][row].tobytes() for row, path in enumerate(old.ids) if path not in kept
    )
    return replace(plan, reread=reread, relabelled=relabelled, removed=(gone - renamed).total())
