"""Stores filled together: one pass over the images for all, in which each image is read and decoded once.

Drives what `Embedding.carry_out` begins. A pass ends early where a signal asks for it, once each store's
block in progress is written.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self, TypeVar, overload

from featcache.embedding import OpenedStore
from featcache.images.paths import resolve, show_path
from featcache.interrupts import StopRequest, graceful_stop
from featcache.lanes import EmbeddedBatch, Lane, Stages
from featcache.pipeline import decoding, embed_lanes
from featcache.progress import Progress
from featcache.reuse import ReusePlan
from featcache.store.writer import StoreWriter

R = TypeVar("R")


def carry_out(run: Generator[OpenedStore | None, None, R]) -> R:
    """The result of a run over one store."""
    return carry_out_together([run])[0]


def carry_out_together(runs: Sequence[Generator[OpenedStore | None, None, R]]) -> list[R]:
    """The results of runs over several stores, filled in one pass wherever they are to be filled.

    Whatever is raised, in a run or while filling, all of them are closed; every acknowledged block is kept.
    """
    results: dict[int, R] = {}
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(closing(run))
        while len(results) < len(runs):
            steps = []
            for index, run in enumerate(runs):
                if index not in results:
                    try:
                        steps.append(next(run))
                    except StopIteration as finished:
                        results[index] = finished.value
            _fill([step for step in steps if step is not None])
    return [results[index] for index in range(len(runs))]


def _fill(opened: Sequence[OpenedStore]) -> None:
    """Write all rows, or as many as are written when a signal asks to stop."""
    pending = sum(len(store.filling.plan.pending) for store in opened)
    if not opened:
        return
    progress = opened[0].embedding.progress
    if pending:
        progress.start("embedding", total=pending, unit="images" if len(opened) == 1 else "rows")
    try:
        with graceful_stop() as stop, ExitStack() as stack:
            for by_decoder in _passes(opened):
                filled = [
                    _Filled(store, stack.enter_context(StoreWriter(store.filling.target.layout)))
                    for store in by_decoder
                ]
                _Pass(filled, stop, progress).run()
        if not all(store.filling.finished for store in opened):
            raise KeyboardInterrupt  # whoever handled the signal before us let the process go on
    except KeyboardInterrupt as exc:
        for store in opened:
            exc.add_note(_what_is_kept(store, of_several=len(opened) > 1))
        raise
    finally:
        progress.finish()


def _passes(opened: Sequence[OpenedStore]) -> Iterator[list[OpenedStore]]:
    """The stores that one pass can fill: an image is decoded in one way in a pass."""

    def decoder(store: OpenedStore) -> str:
        return store.ready.decoder if store.ready else ""

    for _, group in groupby(sorted(opened, key=decoder), key=decoder):
        yield list(group)


def _what_is_kept(store: OpenedStore, *, of_several: bool) -> str:
    kept, rows = store.filling.written_rows, len(store.filling.plan.table.ids)
    where = f"{show_path(store.embedding.files.output)}: " if of_several else ""
    if not kept:
        return f"{where}none of {rows:,} rows is kept; the same command begins again"
    return f"{where}{kept:,} of {rows:,} rows are kept; run the same command again to go on"


@dataclass(eq=False)
class _Filled:
    """A store that is being filled. closed: a stop was asked for, and its last block is written."""

    store: OpenedStore
    writer: StoreWriter
    closed: bool = False

    @property
    def is_over(self) -> bool:
        """Whether a pass that is to stop need not wait for this store."""
        return self.closed or self.store.filling.finished or self.store.ready is None


class _Pass:
    """One pass over the images that any of the stores lacks."""

    def __init__(self, filled: Sequence[_Filled], stop: StopRequest, progress: Progress) -> None:
        self._filled, self._stop, self._progress = filled, stop, progress
        self._stages = Stages()
        self._said = False

    def run(self) -> None:
        begun = time.perf_counter()
        with closing(self._batches()) as batches:
            for index, batch in batches:
                self._take(self._filled[index], batch)
                if self._stop.requested and all(filled.is_over for filled in self._filled):
                    break
            else:
                for filled in self._filled:  # where every row is reused there was no batch
                    self._write(filled)
        for filled in self._filled:
            filled.store.seconds, filled.store.stages = time.perf_counter() - begun, self._stages

    def _batches(self) -> Generator[tuple[int, EmbeddedBatch]]:
        """(index of the store, its next batch) of all stores that lack any row."""
        engines = {i: filled.store.ready for i, filled in enumerate(self._filled) if filled.store.ready}
        if not engines:
            return
        files = _Files.lacked_by([self._filled[i].store.filling.plan for i in engines])
        lanes = [
            Lane(engine=ready.engine, pictures=ready.spec.pictures(), rows=rows)
            for ready, rows in zip(engines.values(), files.rows, strict=True)
        ]
        embedding = self._filled[0].store.embedding
        decoder = next(ready.decoder for ready in engines.values())
        with ExitStack() as stack:
            load = stack.enter_context(decoding(decoder, isolate=embedding.isolate))
            passing = embed_lanes(files, lanes, load=load, workers=embedding.workers, stages=self._stages)
            stack.enter_context(closing(passing))
            of_lane = list(engines)
            for lane, batch in passing:
                yield of_lane[lane], batch

    def _take(self, filled: _Filled, batch: EmbeddedBatch) -> None:
        filling = filled.store.filling
        filled.closed = filled.closed or (self._stop.requested and not filling.in_progress)
        if filled.closed:
            return
        if self._stop.requested and not self._said:
            self._say_what_is_finished()
        filling.add(batch)
        begun = time.perf_counter()
        written = self._write(filled)
        self._stages.writing += time.perf_counter() - begun
        self._progress.advance(len(batch.outcomes), stages=self._stages.as_dict())
        filled.closed = bool(self._stop.requested and written)

    def _say_what_is_finished(self) -> None:
        fillings = [filled.store.filling for filled in self._filled if not filled.closed]
        to_finish = sum(filling.rows_to_finish for filling in fillings)
        at_risk = sum(filling.rows_at_risk for filling in fillings)
        self._progress.note(
            f"stopping after {to_finish:,} more images, when this block is written; "
            f"Ctrl-C again stops at once and loses {at_risk:,}"
        )
        self._said = True

    def _write(self, filled: _Filled) -> int:
        """Write the blocks whose rows are all known; how many that were."""
        written = 0
        while filled.store.filling.write_next(filled.writer):
            written += 1
            if self._stop.requested:
                break
        if written:
            filled.store.embedding.stop_if_too_many(filled.store.so_far())
        return written


class _Files(Sequence[Path]):
    """The files of a pass in the order of their ids, in which every store lists them.

    rows: for each store the indices of those it lacks. A path is made when it is asked for: there may be
    millions of them.
    """

    def __init__(self, images: Sequence[tuple[str, Path]], rows: Sequence[Sequence[int]]) -> None:
        self._images, self.rows = images, rows

    @classmethod
    def lacked_by(cls, plans: Sequence[ReusePlan]) -> Self:
        lacked = [[(plan.table.ids[row], plan.root) for row in plan.pending.tolist()] for plan in plans]
        if len(plans) == 1:
            return cls(lacked[0], [range(len(lacked[0]))])
        images = sorted({image for images in lacked for image in images})
        place = {image: row for row, image in enumerate(images)}
        return cls(images, [[place[image] for image in images] for images in lacked])

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image, root = self._images[index]
        return resolve(root, image)
