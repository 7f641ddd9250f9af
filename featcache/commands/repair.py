"""`featcache repair`: the damaged, failed and pending rows of a store embedded again, and nothing else.

Needs the images and the backbone, but no listing: the store's own ids say which images there are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.embedder import Embedder
from featcache.embedding import Embedded, Embedding, failure_lines
from featcache.errors import DiskError, StoreError
from featcache.images.paths import show_path
from featcache.needs import Need, look_for_needs
from featcache.origin import find_origin
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.records import RowStatus
from featcache.request import RecordedBackbone, require_sizes
from featcache.reuse import CachedRows, ReusePlan
from featcache.store.blocks import BlockCheck
from featcache.store.files import StoreFiles
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore
from featcache.together import carry_out
from featcache.words import plural

_KEPT = ("shard", "merged")  # of the provenance, whatever rows are embedded again


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """What a repair did. The rows to embed again are damaged + pending + failed_before.

    failed: rows without features now. other_bytes: rows of damaged blocks whose image is not the recorded one
    and was embedded as it is now. missing, changed: sound rows whose file is not there, or is no longer the
    recorded one, which are left alone; None where the images were not looked for.
    """

    rows: int
    embedded: int
    damaged: int
    pending: int
    failed_before: int
    failed: int
    other_bytes: int
    missing: int | None
    changed: int | None
    seconds: float
    fingerprint: str
    store: str
    failures: tuple[tuple[str, str], ...] = ()  # (path, why)
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """The documented keys, in order."""
        return {
            name: getattr(self, name)
            for name in (
                "rows", "embedded", "damaged", "pending", "failed_before", "failed", "other_bytes",
                "missing", "changed", "seconds", "fingerprint", "store", "dry_run",
            )
        }  # fmt: skip

    def describe(self) -> str:
        """The summary for a terminal."""
        parts = [
            f"{count:,} {words}"
            for count, words in (
                (self.damaged, "of damaged blocks"),
                (self.pending, "not embedded yet"),
                (self.failed_before, "that failed before"),
            )
            if count
        ]
        rows, failed = plural(self.rows, "row"), plural(self.failed, "row")
        if parts:
            done = f"{self.embedded:,} {'to embed' if self.dry_run else 'embedded'} again"
            lines = [f"{rows}: {done} ({', '.join(parts)}), {self.failed:,} without features"]
        elif self.failed:
            lines = [f"{rows}: no block is damaged or pending; {failed} failed before and would fail again"]
        else:
            lines = [f"nothing to repair: no block is damaged or pending, no row failed ({rows})"]
        lines += failure_lines(self.failures, store=self.store)
        lines += [f"  {note}" for note in self.notes]
        if self.dry_run:
            lines.append("nothing was written (--dry-run)")
        elif parts:
            lines.append(f"{show_path(self.store)}: repaired in {self.seconds:.1f} s")
        return "\n".join(lines)


def repair(
    store: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    max_failures: float = 0.01,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RepairResult:
    """Embed the rows of `store` again whose block is damaged or pending, and those that failed.

    data, root: where the images are, when they are not where they were embedded from.
    backbone: must repeat a store's own `module:function` to allow that code to be run.
    weights: the backbone's weights file, where it has moved. max_failures: as for `embed`; rows that have
        failed before do not count.

    A row that failed is only written again when its image can be used now. Sound rows are left as they are,
    whatever became of their images. Raises NotAStore, DamagedStore (the structure is damaged, which is beyond
    repair), DataError (the images are not there), StoreError, BackboneError, StoreLocked, TooManyFailures,
    DiskError; every acknowledged block is kept and the same call goes on from there.
    """
    begun = time.perf_counter()
    workers = usable_processors() if workers is None else workers
    require_sizes(workers=workers, batch_size=batch_size)
    files = StoreFiles.at(store)
    with nullcontext() if dry_run else write_lock(files.output):
        files.require_no_folders()
        opened = FeatureStore.open(files.output, check=False)

        def bring_transform() -> None:
            RecordedBackbone.of_store(opened).load(weights=weights, allowed=backbone)

        need = look_for_needs(opened, bring_transform, data=data, root=root, workers=workers)
        if dry_run or need.root is None or not len(need.rows):
            if not dry_run:
                files.sync()  # what is found sound may have been written by a repair killed before its sync
            result = _nothing_done(need, dry_run=dry_run)
        else:
            run = Embedding(
                files=files,
                embedder=Embedder.of_store(
                    opened, weights=weights, allowed=backbone, device=device, batch_size=batch_size
                ),
                data=find_origin(opened, data=data, root=root),
                workers=workers,
                max_failures=max_failures,
                progress=progress or SilentProgress(),
                keep_growths=True,
                count_known_failures=False,
                also_recorded={name: opened.provenance[name] for name in _KEPT if name in opened.provenance},
            )
            plan = _plan(need, need.root, _growth_to_continue(files, need))
            recorded = _recorded_sha256(opened, need.damaged)
            embedded = carry_out(run.carry_out(plan, opened.spec))
            result = _repaired(need, run, embedded, _other_bytes(files, recorded))
    return replace(result, seconds=round(time.perf_counter() - begun, 3))


def _growth_to_continue(files: StoreFiles, need: Need) -> CachedRows | None:
    """What an interrupted repair has left: the newest growth, if it holds just the rows of this store.

    A growth of `embed` holds rows of other images, or newer ones of these; it is left to `embed`.
    """
    for path in files.growths[-1:] if len(need.failed_before) else ():
        with suppress(StoreError):
            growth = CachedRows(FeatureStore.open(path, check=False))
            if _has_same_rows(growth, need):
                return growth
    return None


def _has_same_rows(growth: CachedRows, need: Need) -> bool:
    cache = need.cache
    if growth.store.fingerprint != cache.store.fingerprint or not growth.store.table.equals(
        cache.store.table
    ):
        return False
    copied = growth.done.copy()
    copied[need.rows] = False
    return bool(
        np.array_equal(growth.status[copied], cache.status[copied])
        and np.array_equal(growth.sources[copied], cache.sources[copied])
    )


def _plan(need: Need, root: Path, growth: CachedRows | None) -> ReusePlan:
    """Every row from where it is, except those to embed again: only what an earlier repair embedded."""
    caches = (need.cache,) if growth is None else (growth, need.cache)
    plan = ReusePlan.nothing_known(root, need.cache.store.table, caches)
    again = np.zeros(len(need.cache.done), dtype=bool)
    again[need.rows] = True
    for index, cache in reversed(list(enumerate(caches))):
        taken = np.flatnonzero(cache.done & (~again | (cache.status == RowStatus.OK)))
        plan.origin_store[taken], plan.origin_row[taken] = index, taken
        plan.sources[taken] = cache.sources[taken]
    return plan


def _recorded_sha256(store: FeatureStore, damaged: NDArray[np.intp]) -> dict[int, bytes]:
    """{row: sha256} of the rows of damaged blocks of which only the features are damaged."""
    check, layout = BlockCheck(store.layout), store.layout
    recorded: dict[int, bytes] = {}
    for block in np.unique(damaged // layout.block_rows).tolist():
        with suppress(DiskError):
            if check.is_declared(block) and check.has_sound_columns(block):
                rows = layout.rows_of(block)
                digests = layout.read(layout.sources, rows)["sha256"]
                known = np.flatnonzero(digests.any(axis=1)).tolist()
                recorded |= {rows.start + i: digests[i].tobytes() for i in known}
    return recorded


def _other_bytes(files: StoreFiles, recorded: Mapping[int, bytes]) -> list[str]:
    """The ids of the rows that have features of other bytes than were recorded."""
    if not recorded:
        return []
    store = FeatureStore.open(files.output, check=False)
    have = store.sources["sha256"]
    return [
        store.table.ids[row]
        for row, digest in recorded.items()
        if store.row_status[row] == RowStatus.OK and have[row].tobytes() != digest
    ]


def _repaired(need: Need, run: Embedding, embedded: Embedded, other_bytes: Sequence[str]) -> RepairResult:
    notes = [*embedded.notes, *_engine_note(need.cache.store, run)]
    if other_bytes:
        notes.append(
            f"{plural(len(other_bytes), 'row')} of damaged blocks embedded from an image that is not the "
            f"recorded one (first: {show_path(other_bytes[0])})"
        )
    reasons = {**need.failing, **embedded.reasons}
    return _result(
        need,
        embedded=embedded.computed,
        failures=replace(embedded, reasons=reasons).failures(),
        notes=notes,
        other_bytes=len(other_bytes),
    )


def _nothing_done(need: Need, *, dry_run: bool) -> RepairResult:
    ids = need.cache.store.table.ids
    failures = [(ids[row], why) for row, why in need.failing.items()]
    return _result(need, embedded=len(need.rows) if dry_run else 0, failures=failures, dry_run=dry_run)


def _engine_note(store: FeatureStore, run: Embedding) -> list[str]:
    ready, recorded = run.embedder.ready, store.provenance
    had = [recorded.get("engine"), recorded.get("device")]
    if ready is None or had == [ready.engine.name, ready.engine.device]:
        return []
    return [
        f"the other rows were embedded by {had[0]} on {had[1]}, these by {ready.engine.name} on "
        f"{ready.engine.device}: their last digits may differ"
    ]


def _result(
    need: Need,
    *,
    embedded: int,
    failures: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
    other_bytes: int = 0,
    dry_run: bool = False,
) -> RepairResult:
    store = need.cache.store
    left_alone = [
        f"{plural(count, 'sound row')} left alone whose image {what}"
        for count, what in (
            (need.missing, "is not there"),
            (need.changed, "has not the recorded size, times and inode"),
        )
        if count
    ]
    if left_alone:
        notes = [*notes, *left_alone, "`featcache embed` brings the store up to date with its images"]
    return RepairResult(
        rows=len(store),
        embedded=embedded,
        damaged=len(need.damaged),
        pending=len(need.pending),
        failed_before=len(need.failed_before),
        failed=len(failures),
        other_bytes=other_bytes,
        missing=need.missing,
        changed=need.changed,
        seconds=0.0,
        fingerprint=store.fingerprint,
        store=str(store.path),
        failures=tuple(failures),
        notes=tuple(notes),
        dry_run=dry_run,
    )
