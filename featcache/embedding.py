"""Carrying out a plan: a store made, filled, grown and named, so that only its pending rows are computed.

Knows neither how images are listed nor how the plan came about; the caller holds the store's lock.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import versions
from featcache.disk import disk_errors
from featcache.errors import StoreError, TooManyFailures
from featcache.filling import StoreFilling
from featcache.images.decode import load_image
from featcache.images.identity import ImageFailure
from featcache.images.paths import resolve, show_path
from featcache.interrupts import StopRequest, graceful_stop
from featcache.pipeline import EmbeddedBatch, StageSeconds, embed_files
from featcache.progress import Progress
from featcache.records import RowStatus
from featcache.request import Embedder, recorded_batch_size
from featcache.reuse import ReusePlan
from featcache.spec import FeatureSpec
from featcache.store.files import StoreFiles
from featcache.store.layout import create_store
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

_SHOWN = 10  # failures named in a summary
UNRECORDED = "an unrecorded engine"
SAMPLES = 4  # pictures of a run on which an engine proves itself
# About; a multiple of the batch size, so that a resumed run forms the same batches. So many a kill costs, and
# Ctrl-C waits for: some seconds on a slow processor. On disk a block costs 64 bytes.
BLOCK_ROWS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedded:
    """What a carried out plan came to.

    status: uint8 ndarray (n_rows,). reasons: {row: why it failed}, for rows computed now.
    """

    plan: ReusePlan
    status: NDArray[np.uint8]
    reasons: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    images_per_second: float = 0.0
    slowest_stage: str = ""

    @property
    def computed(self) -> int:
        """The rows that have features since this run."""
        return int((self.status[self.plan.pending] == RowStatus.OK).sum())

    @property
    def reused(self) -> int:
        return int(((self.plan.origin_store >= 0) & (self.status == RowStatus.OK)).sum())

    def failures(self, *, of_this_run: bool = False) -> list[tuple[str, str]]:
        """(path, why) of every row that was tried, or was tried by this run, and has no features."""
        failed = (self.status != RowStatus.OK) & (self.status != RowStatus.PENDING)
        rows = np.flatnonzero(failed & (self.plan.origin_store < 0) if of_this_run else failed)
        ids = self.plan.table.ids
        return [
            (ids[row], self.reasons.get(int(row), RowStatus(int(self.status[row])).words)) for row in rows
        ]


@dataclass(kw_only=True)
class Embedding:
    """One run over one store.

    data: where the images are, for the provenance of a new file. keep_growths: leave unfinished growths that
    are not of this run, for their rows are not all in the plan. count_known_failures: whether `max_failures`
    is also for rows that failed in an earlier run.
    """

    files: StoreFiles
    embedder: Embedder
    data: Mapping[str, Any]
    workers: int
    max_failures: float
    progress: Progress
    keep_growths: bool = False
    count_known_failures: bool = True

    def carry_out(self, plan: ReusePlan, spec: FeatureSpec) -> Embedded:
        """Bring the store to what `plan` says, within a file that has just its rows or in a new one.

        TooManyFailures: more rows failed than `max_failures` allows; what was embedded is kept.
        """
        stores = [cache.store for cache in plan.caches]
        index = next((i for i in range(len(stores)) if plan.can_continue(i)), None)
        if index is not None and stores[index].complete:
            self.files.take_name(stores[index].path, keep_growths=self.keep_growths)
            embedded = Embedded(plan=plan, status=plan.reused_status)
            self._stop_if_too_many(embedded)
            return embedded
        self._settle_engine(plan, spec, stores if index is None else [stores[index]])
        target = stores[index] if index is not None else self._create(plan, spec)
        filling = StoreFilling(plan, target)
        stages = StageSeconds()
        begun = time.perf_counter()
        self._fill(filling, stages)
        seconds = time.perf_counter() - begun
        with disk_errors(target.path, doing="reading"):
            in_place = target.layout.buffer.is_still(target.path)
        if not in_place:
            raise StoreError(
                f"{target.path} was moved or replaced while it was written. What was embedded is where it "
                "was moved to, if anywhere: move it back, then run the same command again."
            )
        self.files.take_name(target.path, keep_growths=self.keep_growths)
        embedded = _so_far(filling)
        slowest = max(stages.as_dict(), key=lambda name: stages.as_dict()[name])
        return Embedded(
            plan=plan,
            status=filling.status,
            reasons=filling.reasons,
            notes=tuple(filling.notes()),
            images_per_second=round(len(plan.pending) / seconds, 2) if embedded.computed else 0.0,
            slowest_stage=slowest,
        )

    def _settle_engine(self, plan: ReusePlan, spec: FeatureSpec, stores: Sequence[FeatureStore]) -> None:
        """Make ready the engine for the pending rows: that of the last of `stores` to go on with, if any."""
        if not len(plan.pending):
            return

        def samples() -> NDArray[np.uint8]:
            return _some_pictures(plan, spec)

        if stores:
            ready = self.embedder.engine_for(stores[-1], output=self.files.output, samples=samples)
        else:
            ready = self.embedder.choose_engine(images=len(plan.pending), samples=samples)
        if ready.said:
            self.progress.note(ready.said)

    def _create(self, plan: ReusePlan, spec: FeatureSpec) -> FeatureStore:
        """A new store for the plan's rows: under the output's name if that is free, beside it otherwise."""
        with disk_errors(self.files.output, doing="creating"):
            path = self.files.next_growth if self.files.output.exists() else self.files.output
        old = plan.last_provenance
        # Where no row is computed the engine that was made ready, for the spec alone, has no part in it.
        ready = self.embedder.ready if len(plan.pending) or "engine" not in old else None
        batch_size = ready.engine.batch_size if ready else recorded_batch_size(old) or BLOCK_ROWS
        engine = ready.engine.name if ready else old["engine"]
        provenance = {
            "request": self.embedder.request.as_json(),
            "weights": ready.weights if ready else old["weights"],
            "versions": versions.installed(),
            "engine": engine,
            "engine_choice": dict(ready.why) if ready else old.get("engine_choice", {}),
            "earlier_engines": earlier_engines(plan, engine),
            "device": ready.engine.device if ready else old["device"],
            "batch_size": batch_size,
            "data": dict(self.data),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": _command(),
        }
        create_store(
            path,
            spec=spec,
            table=plan.table,
            provenance=provenance,
            block_rows=batch_size * max(1, BLOCK_ROWS // batch_size),
        )
        return FeatureStore.open(path, check=False)

    def _fill(self, filling: StoreFilling, stages: StageSeconds) -> None:
        """Compute and write all rows, or as many as are written when a signal asks to stop."""
        if len(filling.plan.pending):
            self.progress.start("embedding", total=len(filling.plan.pending), unit="images")
        try:
            with graceful_stop() as stop, StoreWriter(filling.target.layout) as writer:
                self._fill_until(stop, filling, writer, stages)
            if not filling.finished:
                raise KeyboardInterrupt  # whoever handled the signal before us let the process go on
        except KeyboardInterrupt as exc:
            kept, rows = filling.written_rows, len(filling.plan.table.ids)
            exc.add_note(
                f"{kept:,} of {rows:,} rows are kept; run the same command again to go on"
                if kept
                else f"none of {rows:,} rows is kept; the same command begins again"
            )
            raise
        finally:
            self.progress.finish()

    def _fill_until(
        self, stop: StopRequest, filling: StoreFilling, writer: StoreWriter, stages: StageSeconds
    ) -> None:
        said = False
        with closing(self._batches(filling.plan, stages)) as batches:
            for batch in batches:
                if stop.requested and not filling.in_progress:
                    return
                if stop.requested and not said:
                    self.progress.note(
                        f"stopping after {filling.rows_to_finish:,} more images, when this block is written; "
                        f"Ctrl-C again stops at once and loses {filling.rows_at_risk:,}"
                    )
                    said = True
                filling.add(batch)
                begun = time.perf_counter()
                written = self._write_ready(filling, writer, stop)
                stages.writing += time.perf_counter() - begun
                self.progress.advance(len(batch.outcomes), stages=stages.as_dict())
                if stop.requested and written:
                    return
        self._write_ready(filling, writer, stop)  # where every row is reused there was no batch

    def _batches(self, plan: ReusePlan, stages: StageSeconds) -> Generator[EmbeddedBatch]:
        ready = self.embedder.ready
        if ready is None:
            return
        yield from embed_files(
            [resolve(plan.root, plan.table.ids[row]) for row in plan.pending],
            engine=ready.engine,
            preprocessing=ready.spec.preprocessing,
            workers=self.workers,
            stages=stages,
        )

    def _write_ready(self, filling: StoreFilling, writer: StoreWriter, stop: StopRequest) -> int:
        written = 0
        while filling.write_next(writer):
            written += 1
            if stop.requested:
                break
        if written:
            self._stop_if_too_many(_so_far(filling))
        return written

    def _stop_if_too_many(self, embedded: Embedded) -> None:
        failures = embedded.failures(of_this_run=not self.count_known_failures)
        rows = len(embedded.status)
        if len(failures) <= max(1, self.max_failures * rows):
            return
        shown = "; ".join(f"{show_path(path)}: {why}" for path, why in failures[:5])
        raise TooManyFailures(
            f"{len(failures):,} of {rows:,} images failed, "
            f"more than the {self.max_failures:.1%} allowed: {shown}{'; …' if len(failures) > 5 else ''}. "
            "Mend or remove them, or allow more with --max-failures, then run the same command again: "
            "what was embedded is kept."
        )


def failure_lines(failures: Sequence[tuple[str, str]], *, store: str) -> list[str]:
    """The first rows that have no features, as (path, why), for a terminal."""
    lines = [f"  failed: {show_path(path)}: {why}" for path, why in failures[:_SHOWN]]
    more = len(failures) - _SHOWN
    return lines + ([f"  … and {more:,} more; `featcache info {store}` lists them"] if more > 0 else [])


def _command() -> str:
    """How this process was called, as far as it is of use to a reader."""
    program, *arguments = sys.argv or [""]
    return shlex.join([Path(program).name, *arguments])[:2000]


def _some_pictures(plan: ReusePlan, spec: FeatureSpec) -> NDArray[np.uint8]:
    """(up to 4, S, S, 3) of those to embed, from all over the data set."""
    size, ids = spec.preprocessing.crop_size, plan.table.ids
    rows = plan.pending[:: max(1, len(plan.pending) // SAMPLES)][:SAMPLES].tolist()
    images = [load_image(resolve(plan.root, ids[row]), spec.preprocessing) for row in rows]
    pixels = [image.pixels for image in images if not isinstance(image, ImageFailure)]
    return np.stack([np.zeros((size, size, 3), dtype=np.uint8), *pixels])[1:]


def earlier_engines(plan: ReusePlan, engine: str) -> list[str]:
    """The engines besides `engine` that made rows the plan reuses, as far as their stores say."""
    names: list[Any] = []
    for index in np.unique(plan.origin_store[plan.origin_store >= 0]).tolist():
        store = plan.caches[index].store
        recorded = store.provenance if store.sealed else {"engine": UNRECORDED}
        earlier = recorded.get("earlier_engines")
        names += [recorded.get("engine"), *(earlier if isinstance(earlier, list) else ())]
    return sorted({name for name in names if isinstance(name, str) and name != engine})


def _so_far(filling: StoreFilling) -> Embedded:
    return Embedded(plan=filling.plan, status=filling.status, reasons=filling.reasons)
