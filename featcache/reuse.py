"""Which rows of a data set are in the cache already: a listing joined to stores by identity, not position.

A row is taken from a store when the file's path, size, times and inode are the ones recorded, or else when
the sha256 of its bytes, read now, is: so that a touched, renamed, moved or copied image costs one read, and
an edited one is computed anew. Damaged blocks offer nothing, and a store with a broken seal knows its sound
rows by those sha256 alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.images.identity import ImageFailure, hash_image
from featcache.images.paths import resolve
from featcache.records import FileStat, ImageRecord, Listing, RowStatus
from featcache.store.layout import NO_SPLIT, SOURCE_DTYPE, STAT_COLUMNS, RowTable
from featcache.store.reader import FeatureStore
from featcache.words import name_some, plural

# What became of these images is decided by their bytes alone; the other failures are tried again.
_DECIDED_BY_BYTES = (RowStatus.OK, RowStatus.UNDECODABLE, RowStatus.TOO_LARGE, RowStatus.NON_FINITE)
_ROW_COLUMNS = ("origin_store", "origin_row", "sources", "by_stat", "relabelled_rows")  # of a plan


class Reason(Enum):
    """Why a row is reused or computed; the value says it in words."""

    SAME_STAT = "size, mtime, ctime and inode are the recorded ones"
    SAME_BYTES = "touched: the bytes are the recorded ones"
    OTHER_PATH = "renamed or copied: the bytes are known under another path"
    SALVAGED = "the bytes are known in an unfinished store whose seal is broken"
    SAME_FAILURE = "failed before, and nothing has changed"
    NEW = "new"
    EDITED = "the bytes changed"
    DAMAGED = "its block is damaged"
    PENDING = "not embedded yet"
    FAILED_BEFORE = "failed before, and is tried again"

    @property
    def is_reuse(self) -> bool:
        """Whether the row is taken from a store, be it that it has features or that it has none."""
        return self in (
            Reason.SAME_STAT, Reason.SAME_BYTES, Reason.OTHER_PATH, Reason.SALVAGED, Reason.SAME_FAILURE,
        )  # fmt: skip


class CachedRows:
    """The rows a store can vouch for, found by path or by content.

    done: bool ndarray (n_rows,). status: uint8 ndarray (n_rows,), PENDING where not done. sources: structured
    ndarray (n_rows,) of SOURCE_DTYPE, zero where not done.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        states = store.inspect()
        self.done = store.done
        self.status = store.row_status
        self.sources = np.zeros(len(store), SOURCE_DTYPE)
        self.sources[self.done] = store.sources[self.done]
        self._damaged = [state.is_damage for state in states]

    @cached_property
    def by_path(self) -> dict[str, int]:
        """The rows by path; none without a seal."""
        ids = self.store.table.ids
        known = np.flatnonzero(self.done).tolist() if self.store.sealed else ()
        return {ids[row]: row for row in known}

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Every row by its path, whether the store can vouch for it or not; none without a seal."""
        if not self.store.sealed:
            return {}
        return {path: row for row, path in enumerate(self.store.table.ids)}

    @cached_property
    def by_sha256(self) -> dict[bytes, int]:
        rows = np.flatnonzero(np.isin(self.status, _DECIDED_BY_BYTES))
        digests = self.sources["sha256"]
        return {digests[row].tobytes(): int(row) for row in rows}

    def is_damaged(self, row: int) -> bool:
        """Whether the row's block was written and is no longer what was written."""
        return self._damaged[self.block_of(row)]

    @property
    def has_damage(self) -> bool:
        return any(self._damaged)

    def block_of(self, row: int) -> int:
        return row // self.store.layout.block_rows

    def rows_of(self, paths: tuple[str, ...]) -> NDArray[np.int64]:
        """int64 ndarray (n_paths,): the row of each path, -1 where the store cannot vouch for one."""
        if self.store.sealed and paths == self.store.table.ids:
            return np.where(self.done, np.arange(len(paths)), -1)
        return np.fromiter((self.by_path.get(path, -1) for path in paths), np.int64, len(paths))

    @cached_property
    def _stats(self) -> list[tuple[int, ...]]:
        return list(zip(*(self.sources[name].tolist() for name in STAT_COLUMNS), strict=True))

    def has_stat(self, row: int, stat: FileStat) -> bool:
        return self._stats[row] == stat.as_tuple()


@dataclass(frozen=True, kw_only=True, eq=False)
class ReusePlan:
    """For each row of the new table: the store and row that has its features, or none.

    origin_store, origin_row: int64 ndarrays (n_rows,), -1 = to be computed. sources: structured ndarray
    (n_rows,) of SOURCE_DTYPE, filled for reused rows with the file's stat as it is now.
    """

    root: Path  # the ids are relative to it
    table: RowTable
    caches: tuple[CachedRows, ...]
    origin_store: NDArray[np.int64]
    origin_row: NDArray[np.int64]
    sources: NDArray[Any]
    by_stat: NDArray[np.bool_]  # (n_rows,): reused without opening the file
    relabelled_rows: NDArray[np.bool_]  # (n_rows,): reused under another label or split
    removed_ids: tuple[str, ...] = ()  # of the last store, which is the one under the output's name
    lost_labels: tuple[str, ...] = ()  # ids of reused rows that have a label there, and none now
    lost_splits: tuple[str, ...] = ()

    @classmethod
    def nothing_known(cls, root: Path, table: RowTable, caches: tuple[CachedRows, ...]) -> Self:
        """The plan that computes every row."""
        n = len(table.ids)
        return cls(
            root=root,
            table=table,
            caches=caches,
            origin_store=np.full(n, -1, dtype=np.int64),
            origin_row=np.full(n, -1, dtype=np.int64),
            sources=np.zeros(n, SOURCE_DTYPE),
            by_stat=np.zeros(n, dtype=bool),
            relabelled_rows=np.zeros(n, dtype=bool),
        )

    def only(self, rows: NDArray[np.intp]) -> Self:
        """The plan for some of its rows, in order."""
        table = self.table
        return replace(
            self,
            table=replace(
                table,
                ids=tuple(table.ids[row] for row in rows.tolist()),
                labels=table.labels[rows],
                splits=table.splits[rows],
            ),
            **{name: getattr(self, name)[rows] for name in _ROW_COLUMNS},
        )

    @property
    def pending(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.origin_store < 0)

    @property
    def reread(self) -> int:
        """Reused rows whose file's stat was not the recorded one, known by their bytes instead."""
        return int(((self.origin_store >= 0) & ~self.by_stat).sum())

    @property
    def relabelled(self) -> int:
        return int(self.relabelled_rows.sum())

    @property
    def removed(self) -> int:
        return len(self.removed_ids)

    @property
    def knows_last(self) -> bool:
        """Whether the last store, if there is one, says which images its rows are of."""
        return not self.caches or self.caches[-1].store.sealed

    @property
    def last_provenance(self) -> Mapping[str, Any]:
        """That of the last store that a seal vouches for; empty where there is none."""
        stores = (cache.store for cache in reversed(self.caches))
        return next((store.provenance for store in stores if store.sealed), {})

    def notes(self) -> list[str]:
        """What the user should know of the stores that rows come from, and of what rows lose."""
        return [*self._seal_notes(), *self._damage_notes(), *self._loss_notes()]

    def _seal_notes(self) -> list[str]:
        rows = np.bincount(self.origin_store[self.origin_store >= 0], minlength=len(self.caches)).tolist()
        return [
            f"the seal of {cache.store.path} was broken: {count:,} of its rows are taken over, known by the "
            "sha256 of their images"
            for cache, count in zip(self.caches, rows, strict=True)
            if not cache.store.sealed
        ]

    def _damage_notes(self) -> list[str]:
        if not any(cache.has_damage for cache in self.caches):
            return []
        found = filter(None, (self._last_known(self.table.ids[i]) for i in self.pending.tolist()))
        blocks = [(id(cache), cache.block_of(row)) for cache, row in found if cache.is_damaged(row)]
        if not blocks:
            return []
        damaged, rows = len(set(blocks)), len(blocks)
        whose = "was damaged: its" if damaged == 1 else "were damaged: their"
        again = "is embedded again" if rows == 1 else "are embedded again"
        return [f"{plural(damaged, 'block')} {whose} {plural(rows, 'row')} {again}"]

    def _loss_notes(self) -> list[str]:
        lost = {"label": self.lost_labels, "split": self.lost_splits}
        said = [
            f"{plural(len(ids), 'row loses its', 'rows lose their')} {what}"
            for what, ids in lost.items()
            if ids
        ]
        named = list(dict.fromkeys((*self.lost_labels, *self.lost_splits)))
        return [f"{' and '.join(said)}: {name_some(named, limit=3)}"] if said else []

    def reason(self, i: int) -> Reason:
        """Why row `i` is reused or computed."""
        path, index, row = self.table.ids[i], int(self.origin_store[i]), int(self.origin_row[i])
        if index < 0:
            return self._reason_to_compute(path)
        cache = self.caches[index]
        if cache.status[row] != RowStatus.OK:
            return Reason.SAME_FAILURE
        if self.by_stat[i]:
            return Reason.SAME_STAT
        if not cache.store.sealed:
            return Reason.SALVAGED
        return Reason.SAME_BYTES if cache.store.table.ids[row] == path else Reason.OTHER_PATH

    def _reason_to_compute(self, path: str) -> Reason:
        known = self._last_known(path)
        if known is None:
            return Reason.NEW
        cache, row = known
        if not cache.done[row]:
            return Reason.DAMAGED if cache.is_damaged(row) else Reason.PENDING
        return Reason.EDITED if cache.status[row] == RowStatus.OK else Reason.FAILED_BEFORE

    def _last_known(self, path: str) -> tuple[CachedRows, int] | None:
        """Its row in the store under the output's name, which comes last, before unfinished growths."""
        rows = ((cache, cache.row_of.get(path)) for cache in reversed(self.caches))
        return next(((cache, row) for cache, row in rows if row is not None), None)

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
        if not cache.store.sealed or not cache.store.table.equals(self.table):
            return False
        done = np.flatnonzero(cache.done)
        return bool(
            np.all(self.origin_store[done] == index)
            and np.array_equal(self.origin_row[done], done)
            and np.array_equal(self.sources[done], cache.sources[done])
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
    plan = ReusePlan.nothing_known(
        listing.root, RowTable.from_records(listing.records, listing.classes), caches
    )
    _take_by_stat(plan, listing.records)
    unknown = np.flatnonzero(~plan.by_stat & ~_were_too_slow(plan)).tolist()
    # Where there is nothing to find the run itself will read and hash every file.
    if unknown and any(cache.by_path or cache.by_sha256 for cache in caches):
        _take_by_content(plan, listing.records, unknown, workers=workers, on_read=on_read)
    return _compare_with_last(plan)


def _were_too_slow(plan: ReusePlan) -> NDArray[np.bool_]:
    """(n_rows,): the images that took too long to read the last time, which may hang for ever."""
    slow = np.zeros(len(plan.table.ids), dtype=bool)
    for cache in plan.caches:
        if (cache.status == RowStatus.TOO_SLOW).any():
            rows = cache.rows_of(plan.table.ids)
            slow |= (rows >= 0) & (cache.status[rows] == RowStatus.TOO_SLOW)
    return slow


def holds_just(store: FeatureStore, listing: Listing) -> bool:
    """Whether `store` has the rows of `listing`, all of them and no others, each file known by its stat."""
    table = RowTable.from_records(listing.records, listing.classes)
    if not (store.sealed and store.complete and store.table.equals(table)):
        return False
    plan = ReusePlan.nothing_known(listing.root, table, (CachedRows(store),))
    _take_by_stat(plan, listing.records)
    return bool(plan.by_stat.all())


def _take_by_stat(plan: ReusePlan, records: Sequence[ImageRecord]) -> None:
    n = len(records)
    stats = {
        name: np.fromiter(map(attrgetter(f"stat.{name}"), records), np.int64, n) for name in STAT_COLUMNS
    }
    for index, cache in enumerate(plan.caches):
        rows = cache.rows_of(plan.table.ids)
        here = np.flatnonzero((rows >= 0) & ~plan.by_stat)
        rows = rows[here]
        same = np.isin(cache.status[rows], (*_DECIDED_BY_BYTES, RowStatus.MISSING))
        for name, column in stats.items():
            same &= cache.sources[name][rows] == column[here]
        _take(plan, here[same], index, rows[same])
        plan.by_stat[here[same]] = True


def _take_by_content(
    plan: ReusePlan,
    records: Sequence[ImageRecord],
    unknown: Sequence[int],
    *,
    workers: int,
    on_read: Callable[[int], None] | None,
) -> None:
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(hash_image, (resolve(plan.root, records[i].path) for i in unknown))
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
                _take(plan, i, index, row)
                for name, value in zip(STAT_COLUMNS, identity.stat.as_tuple(), strict=True):
                    plan.sources[name][i] = value
                break


def _take(plan: ReusePlan, here: Any, index: int, rows: Any) -> None:
    """Take some rows of a store, or one, for as many of the plan."""
    plan.origin_store[here], plan.origin_row[here] = index, rows
    plan.sources[here] = plan.caches[index].sources[rows]


def _compare_with_last(plan: ReusePlan) -> ReusePlan:
    """The plan with what changed against the last store, which is the one under the output's name."""
    if not plan.caches or not plan.knows_last:
        return plan
    cache = plan.caches[-1]
    old, new = cache.store.table, plan.table
    if old.equals(new) and cache.done.all():
        return plan
    last_rows: dict[int, int] = {}  # of the reused rows that are there, by their rows in the plan
    renamed: Counter[bytes] = Counter()
    for i in np.flatnonzero(plan.origin_store >= 0).tolist():
        row = cache.by_path.get(new.ids[i])
        if row is None:
            digest = plan.sources["sha256"][i].tobytes()
            renamed[digest] += 1
            row = cache.by_sha256.get(digest)
        if row is not None:
            last_rows[i] = row
    kept, removed = set(new.ids), []
    for row, path in enumerate(old.ids):
        digest = cache.sources["sha256"][row].tobytes()
        if path in kept:
            continue
        if renamed[digest]:
            renamed[digest] -= 1
        else:
            removed.append(path)
    return _compare_names(replace(plan, removed_ids=tuple(removed)), old, last_rows)


def _compare_names(plan: ReusePlan, old: RowTable, last_rows: Mapping[int, int]) -> ReusePlan:
    """The plan with what became of labels and splits. last_rows: {row of the plan: row of the old table}."""
    before, now = _names(old), _names(plan.table)
    lost: tuple[list[str], list[str]] = [], []
    for i, row in last_rows.items():
        plan.relabelled_rows[i] = before[row] != now[i]
        for ids, had, has in zip(lost, before[row], now[i], strict=True):
            if had is not None and has is None:
                ids.append(plan.table.ids[i])
    return replace(plan, lost_labels=tuple(lost[0]), lost_splits=tuple(lost[1]))


def _names(table: RowTable) -> list[tuple[str | None, int | None]]:
    """(label, split) of every row."""
    splits = [None if code == NO_SPLIT else code for code in table.splits.tolist()]
    return list(zip(table.label_names(), splits, strict=True))
