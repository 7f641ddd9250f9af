"""Carrying out a plan for one store: made or gone on with, and named once its pending rows are computed.

Knows neither how images are listed nor how the plan came about, nor what fills the store, which is
`featcache.together`. The caller holds the store's lock.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache import versions
from featcache.disk import disk_errors
from featcache.embedder import Embedder, ReadyEngine
from featcache.errors import StoreError, TooManyFailures
from featcache.filling import StoreFilling
from featcache.images.decode import Decoder
from featcache.images.identity import ImageFailure
from featcache.images.paths import resolve, show_path
from featcache.lanes import Stages
from featcache.pipeline import Load, decoding, load_in_time
from featcache.progress import Progress
from featcache.records import RowStatus
from featcache.request import recorded_batch_size, recorded_decoder
from featcache.reuse import ReusePlan
from featcache.spec import FeatureSpec, Picture
from featcache.store.creating import create_store
from featcache.store.files import StoreFiles
from featcache.store.reader import FeatureStore

_SHOWN = 10  # failures named in a summary
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
    stages: Mapping[str, float] = field(default_factory=dict)  # by `Stages.summary`

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

    data: where the images are, for the provenance of a new file. isolate: decode in processes. prune: let the
    rows of images that are gone go, however many. also_recorded: what else is to stand there. keep_growths:
    leave unfinished growths that are not of this run, for their rows are not all in the plan.
    count_known_failures: whether `max_failures` is also for rows that failed in an earlier run.
    """

    files: StoreFiles
    embedder: Embedder
    data: Mapping[str, Any]
    workers: int
    max_failures: float
    progress: Progress
    isolate: bool = False
    prune: bool = False
    keep_growths: bool = False
    count_known_failures: bool = True
    also_recorded: Mapping[str, Any] = field(default_factory=dict)

    def carry_out(self, plan: ReusePlan, spec: FeatureSpec) -> CarryOut:
        """Bring the store to what `plan` says, within a file that has just its rows or in a new one.

        To be driven by `featcache.together`: yields None before anything is made, and then the store to be
        filled before it goes on, where there is one. TooManyFailures: more rows failed than `max_failures`
        allows; what was embedded is kept.
        """
        stores = [cache.store for cache in plan.caches]
        yield None  # other stores of the run may not even be planned yet, and refuse
        index = self._to_continue(plan)
        if index is not None and stores[index].complete:
            self.files.take_name(stores[index].path, keep_growths=self.keep_growths)
            embedded = Embedded(plan=plan, status=plan.reused_status)
            self.stop_if_too_many(embedded)
            return embedded
        self._settle_engine(plan, spec, stores if index is None else [stores[index]])
        target = stores[index] if index is not None else self._create(plan, spec)
        opened = OpenedStore(self, StoreFilling(plan, target))
        yield opened
        with disk_errors(target.path, doing="reading"):
            in_place = target.layout.buffer.is_still(target.path)
        if not in_place:
            raise StoreError(
                f"{target.path} was moved or replaced while it was written. What was embedded is where it "
                "was moved to, if anywhere: move it back, then run the same command again."
            )
        self.files.take_name(target.path, keep_growths=self.keep_growths)
        return opened.embedded()

    def _can_continue(self, plan: ReusePlan, index: int) -> bool:
        """Whether to go on within a file of the plan; never within one that only lends its rows.

        Nor within one that sends whoever looks for its weights to where they are no more.
        """
        store = plan.caches[index].store
        ours = self.files.has(store.path) and plan.can_continue(index)
        return ours and not self.embedder.left_place(store)

    def settle_engine(self, plan: ReusePlan, spec: FeatureSpec) -> None:
        """Make ready the engine for the pending rows: that of the store to go on with, if there is one."""
        stores = [cache.store for cache in plan.caches]
        index = self._to_continue(plan)
        self._settle_engine(plan, spec, stores if index is None else [stores[index]])

    def _to_continue(self, plan: ReusePlan) -> int | None:
        """The first of the plan's stores that the run can go on within."""
        return next((i for i in range(len(plan.caches)) if self._can_continue(plan, i)), None)

    def _settle_engine(self, plan: ReusePlan, spec: FeatureSpec, stores: Sequence[FeatureStore]) -> None:
        """Make ready the engine for the pending rows: that of the last of `stores` to go on with, if any."""
        if not len(plan.pending):
            return

        def samples(decoder: Decoder) -> NDArray[np.uint8]:
            with decoding(decoder, isolate=self.isolate) as load:
                return some_pictures(plan, spec, load)

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
        decoder = ready.decoder if ready else recorded_decoder(old)
        provenance = {
            "request": self.embedder.request.as_json(),
            "weights": self.embedder.weights or (ready.weights if ready else old.get("weights")),
            "versions": versions.installed(),
            "engine": engine,
            "decoder": decoder,
            "engine_choice": dict(ready.why) if ready else old.get("engine_choice", {}),
            "earlier_engines": earlier(plan, "engine", engine),
            "earlier_decoders": earlier(plan, "decoder", decoder),
            "device": ready.engine.device if ready else old.get("device"),
            "batch_size": batch_size,
            "data": dict(self.data),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": _command(),
            **self.also_recorded,
        }
        create_store(
            path,
            spec=spec,
            table=plan.table,
            provenance=provenance,
            block_rows=batch_size * max(1, BLOCK_ROWS // batch_size),
        )
        return FeatureStore.open(path, check=False)

    def stop_if_too_many(self, embedded: Embedded) -> None:
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


@dataclass(eq=False)
class OpenedStore:
    """A store on the way to what its plan says.

    seconds, stages: of the pass that filled it, which may have filled others too.
    """

    embedding: Embedding
    filling: StoreFilling
    seconds: float = 0.0
    stages: Stages = field(default_factory=Stages)

    @property
    def ready(self) -> ReadyEngine | None:
        """What computes its pending rows; None where there are none."""
        return self.embedder.ready if len(self.filling.plan.pending) else None

    @property
    def embedder(self) -> Embedder:
        return self.embedding.embedder

    def so_far(self) -> Embedded:
        filling = self.filling
        return Embedded(plan=filling.plan, status=filling.status, reasons=filling.reasons)

    def embedded(self) -> Embedded:
        """What came of it, once it is filled."""
        found = replace(self.so_far(), notes=tuple(self.filling.notes()))
        if not found.computed:
            return found
        speed = round(len(found.plan.pending) / max(self.seconds, 1e-9), 2)
        return replace(found, images_per_second=speed, stages=self.stages.summary(self.seconds))


# Returns what came of it.
CarryOut = Generator[OpenedStore | None, None, Embedded]


def failure_lines(failures: Sequence[tuple[str, str]], *, store: str) -> list[str]:
    """The first rows that have no features, as (path, why), for a terminal."""
    lines = [f"  failed: {show_path(path)}: {why}" for path, why in failures[:_SHOWN]]
    more = len(failures) - _SHOWN
    return lines + ([f"  … and {more:,} more; `featcache info {store}` lists them"] if more > 0 else [])


def _command() -> str:
    """How this process was called, as far as it is of use to a reader."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    return shlex.join(["featcache" if name == "__main__.py" else name, *arguments])[:2000]


def some_pictures(plan: ReusePlan, spec: FeatureSpec, load: Load) -> NDArray[np.uint8]:
    """(up to 4, S, S, 3) of those to embed, from all over the data set."""
    size, ids = spec.preprocessing.crop_size, plan.table.ids
    rows = plan.pending[:: max(1, len(plan.pending) // SAMPLES)][:SAMPLES].tolist()
    plain = (Picture(preprocessing=spec.preprocessing),)
    loaded = [load_in_time(load, resolve(plan.root, ids[row]), plain) for row in rows]
    pixels = [image.pixels[0] for image in loaded if not isinstance(image, ImageFailure)]
    return np.stack([np.zeros((size, size, 3), dtype=np.uint8), *pixels])[1:]


def earlier(plan: ReusePlan, what: Literal["engine", "decoder"], now: str) -> list[str]:
    """The engines or decoders besides `now` that made rows the plan reuses, as far as their stores say."""
    names: list[Any] = []
    for index in np.unique(plan.origin_store[plan.origin_store >= 0]).tolist():
        store = plan.caches[index].store
        recorded = store.provenance if store.sealed else {what: f"an unrecorded {what}"}
        before = recorded.get(f"earlier_{what}s")
        names += [recorded.get(what), *(before if isinstance(before, list) else ())]
    return sorted({name for name in names if isinstance(name, str) and name != now})
