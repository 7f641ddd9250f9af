"""`featcache merge`: stores of one spec joined by identity into one, without images, weights or torch.

For shards that were made where no disk is common; where there is one, `featcache embed --shard` joins them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.embedder import Embedder
from featcache.embedding import Embedding
from featcache.errors import IncompleteStore, SpecMismatch, StoreError
from featcache.images.paths import show_path
from featcache.origin import recorded_origin
from featcache.progress import SilentProgress
from featcache.records import SPLITS, RowStatus
from featcache.request import EmbedRequest
from featcache.reuse import CachedRows, ReusePlan
from featcache.sharding import RecordedShard, shard_of_image
from featcache.spec import describe_differences
from featcache.store.files import StoreFiles
from featcache.store.layout import NO_LABEL, NO_SPLIT, RowTable
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore
from featcache.together import carry_out
from featcache.words import plural, show_text

_RECORDED = ("request", "weights", "engine", "device")  # what any store says of its making


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge did. shared: rows that more than one store had. failed: rows without features."""

    rows: int
    stores: int
    shared: int
    failed: int
    written: bool  # False: the output had just these rows already
    fingerprint: str
    store: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The documented keys, in order."""
        return {name: getattr(self, name) for name in self.__annotations__}

    def describe(self) -> str:
        """The summary for a terminal."""
        shared = f", {self.shared:,} of them in more than one" if self.shared else ""
        failed = f", {self.failed:,} without features" if self.failed else ""
        store = show_path(self.store)
        done = f"{store}: made in {self.seconds:.1f} s" if self.written else f"{store} has them already"
        lines = [f"{plural(self.rows, 'row')} of {plural(self.stores, 'store')}{shared}{failed}"]
        return "\n".join([*lines, f"{done}; fingerprint {self.fingerprint[:12]}"])


def merge(stores: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> MergeResult:
    """Join complete `stores` of one spec into the store `output`, each image once, by its id.

    Of rows with the same id and the same bytes the first one that has features is taken. `output` may be one
    of the stores. Raises NotAStore, DamagedStore, IncompleteStore, SpecMismatch, StoreLocked, DiskError;
    StoreError: two stores disagree on an image, a shard is missing, or `output` holds something else.
    """
    begun = time.perf_counter()
    files = StoreFiles.at(output)
    with write_lock(files.output):
        opened = [FeatureStore.open(path) for path in _once_each(stores)]
        _require_one_spec(opened)
        _require_complete(opened)
        caches = tuple(CachedRows(store) for store in opened)
        plan, shared = _plan(caches)
        _require_whole_shards(opened, plan.table.ids)
        plan = _go_on(plan, files)
        _require_replaceable(plan, files)
        written = not _is_there(plan, files)
        carry_out(_embedding(files, opened).carry_out(plan, opened[0].spec))
    return MergeResult(
        rows=len(plan.table.ids),
        stores=len(opened),
        shared=shared,
        failed=int((plan.reused_status != RowStatus.OK).sum()),
        written=written,
        fingerprint=opened[0].fingerprint,
        store=str(files.output),
        seconds=round(time.perf_counter() - begun, 3),
    )


def _once_each(stores: Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not stores:
        raise ValueError("there is nothing to merge")
    return list({os.path.realpath(path): Path(path) for path in stores}.values())


def _require_one_spec(stores: Sequence[FeatureStore]) -> None:
    first = stores[0]
    for store in stores[1:]:
        if said := describe_differences(store.spec, first.spec):
            raise SpecMismatch(
                f"{show_path(store.path)} holds other features than {show_path(first.path)}: {said}. "
                "Merge stores of one spec; `featcache explain` compares two."
            )


def _require_complete(stores: Sequence[FeatureStore]) -> None:
    for store in stores:
        if unrecorded := [name for name in _RECORDED if name not in store.provenance]:
            raise StoreError(
                f"{show_path(store.path)} does not record its {unrecorded[0]}. Make it anew, or leave it out."
            )
        if not store.complete:
            raise IncompleteStore(
                f"{show_path(store.path)} is not complete: {int((~store.done).sum()):,} of {len(store):,} "
                "rows are pending. Run the `featcache embed` that began it again, then merge."
            )


def _require_whole_shards(stores: Sequence[FeatureStore], ids: Sequence[str]) -> None:
    """Refuse a part of the shards of one run, or shards without the stores that had some of their rows."""
    shards = {store: recorded for store in stores if (recorded := RecordedShard.of_store(store))}
    for count in sorted({recorded.count for recorded in shards.values()}):
        there = {recorded.index for recorded in shards.values() if recorded.count == count}
        missing = [f"{index}/{count}" for index in range(count) if index not in there]
        if missing:
            raise StoreError(
                f"{len(missing):,} of {count:,} shards are missing: {', '.join(missing[:5])}"
                f"{', …' if len(missing) > 5 else ''}. Name them too."
            )
        owned = np.bincount([shard_of_image(path, count) for path in ids], minlength=count)
        for store, recorded in shards.items():
            if recorded.count == count:
                _require_the_rest(store, recorded, images=int(owned[recorded.index]))


def _require_the_rest(store: FeatureStore, recorded: RecordedShard, *, images: int) -> None:
    """Refuse a shard without the stores whose rows it left where they were."""
    lacking = len(store) + recorded.elsewhere - images
    if lacking > 0:
        raise StoreError(
            f"{show_path(store.path)} left {plural(lacking, 'row')} in other stores that were beside it, and "
            "those named here do not have them. Name the store it was to become part of too."
        )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Where the row of an image is."""

    store: int
    row: int


def _plan(caches: tuple[CachedRows, ...]) -> tuple[ReusePlan, int]:
    """Every id once, from the first store that has features of it; how many ids several stores have."""
    found: dict[str, _Found] = {}
    shared = set()
    for index, cache in enumerate(caches):
        for row, path in enumerate(cache.store.table.ids):
            there = found.setdefault(path, here := _Found(store=index, row=row))
            if there is here:
                continue
            shared.add(path)
            _require_same_image(caches, path, there, here)
            status = caches[there.store].status[there.row]
            if status != RowStatus.OK and cache.status[row] == RowStatus.OK:
                found[path] = here
    ids = tuple(sorted(found))
    plan = ReusePlan.nothing_known(Path(), _table(caches, ids, found), caches)
    plan.origin_store[:] = [found[path].store for path in ids]
    plan.origin_row[:] = [found[path].row for path in ids]
    for index, cache in enumerate(caches):
        here_too = plan.origin_store == index
        plan.sources[here_too] = cache.sources[plan.origin_row[here_too]]
    return plan, len(shared)


def _require_same_image(caches: Sequence[CachedRows], path: str, one: _Found, two: _Found) -> None:
    facts = [_facts(caches[found.store], found.row) for found in (one, two)]
    for name, have, other in zip(("label", "split", "sha256"), *facts, strict=True):
        if have != other and (name != "sha256" or (have and other)):
            a, b = (show_path(caches[found.store].store.path) for found in (one, two))
            raise StoreError(
                f"{show_path(path)} has the {name} {show_text(have or 'none')} in {a} and "
                f"{show_text(other or 'none')} in {b}. Embed again what is out of date, or leave it out."
            )


def _facts(cache: CachedRows, row: int) -> tuple[str, str, str]:
    """Label, split and the bytes that decided the row, each "" for none."""
    table = cache.store.table
    label, split = int(table.labels[row]), int(table.splits[row])
    digest = cache.sources["sha256"][row]
    is_known = digest.any() and cache.status[row] != RowStatus.CHANGED
    return (
        "" if label == NO_LABEL else table.classes[label],
        "" if split == NO_SPLIT else SPLITS[split],
        digest.tobytes().hex()[:12] if is_known else "",
    )


def _table(caches: Sequence[CachedRows], ids: tuple[str, ...], found: dict[str, _Found]) -> RowTable:
    classes = tuple(sorted({name for cache in caches for name in cache.store.classes}))
    number = {name: i for i, name in enumerate(classes)}
    numbers = [np.array([*(number[name] for name in c.store.classes), NO_LABEL]) for c in caches]
    where = [found[path] for path in ids]
    labels = [numbers[w.store][caches[w.store].store.table.labels[w.row]] for w in where]
    splits = [caches[w.store].store.table.splits[w.row] for w in where]
    return RowTable(
        ids=ids,
        labels=np.array(labels, dtype=np.int64),
        splits=np.array(splits, dtype=np.uint8),
        classes=classes,
    )


def _go_on(plan: ReusePlan, files: StoreFiles) -> ReusePlan:
    """The plan that goes on with what a killed merge left, where its rows are those of the plan."""
    for store in files.open_all():
        cache = CachedRows(store)
        done = np.flatnonzero(cache.done)
        if (
            files.has(store.path)
            and store.fingerprint == plan.caches[0].store.fingerprint
            and store.table.equals(plan.table)
            and np.array_equal(cache.sources["sha256"][done], plan.sources["sha256"][done])
            and np.array_equal(cache.status[done], plan.reused_status[done])
        ):
            return _prefer(plan, cache, done)
    return plan


def _prefer(plan: ReusePlan, cache: CachedRows, rows: NDArray[np.intp]) -> ReusePlan:
    preferring = replace(plan, caches=(*plan.caches, cache))
    preferring.origin_store[rows], preferring.origin_row[rows] = len(plan.caches), rows
    preferring.sources[rows] = cache.sources[rows]
    return preferring


def _is_there(plan: ReusePlan, files: StoreFiles) -> bool:
    last = len(plan.caches) - 1
    store = plan.caches[last].store
    return store.path == files.output and store.complete and plan.can_continue(last)


def _require_replaceable(plan: ReusePlan, files: StoreFiles) -> None:
    if not files.output.exists():
        return
    known = {os.path.realpath(cache.store.path) for cache in plan.caches}
    if os.path.realpath(files.output) not in known:
        raise StoreError(
            f"{show_path(files.output)} exists, and is neither one of the stores to merge nor what they "
            "make. Name it as one of them, or choose another --output."
        )


def _embedding(files: StoreFiles, stores: Sequence[FeatureStore]) -> Embedding:
    """What carries out a plan of which no row is computed."""
    origins = [recorded_origin(store) for store in stores]
    return Embedding(
        files=files,
        embedder=Embedder(EmbedRequest.of_store(stores[0])),
        data=dict(origins[0] or {}) if all(origin == origins[0] for origin in origins) else {},
        workers=1,
        max_failures=1.0,
        progress=SilentProgress(),
        keep_growths=True,
        also_recorded={"merged": [store.layout.uuid for store in stores]},
    )
