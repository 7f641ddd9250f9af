"""From image files to feature vectors, for one store or for several in one pass over the files.

Threads suffice: reading, decoding, resizing and the forward pass release the interpreter lock, and each
picture is written straight into its batch. On the processors the threads that decode also run the network,
one thread a call, so that no processor waits for another; a device of its own is fed by threads of its own.
Whatever the number of threads, an image has its fixed place in a batch of fixed shape.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.images.decode import Decoder, LoadedPictures, load_pictures
from featcache.images.identity import ImageFailure
from featcache.images.isolated import IsolatedDecoder
from featcache.lanes import EmbeddedBatch, EmbeddedImage, Lane, Outcome, Stages
from featcache.records import NO_FILE, RowStatus
from featcache.spec import Picture, view_key

# Of a lane: filling, full or computed, besides those in the forward pass; bounds the memory.
BATCHES_AHEAD = 3
PICTURES_AHEAD = 48  # at least so many are in work for a lane, however small its batches are
# That a thread which decodes has decoded before it goes over to the network, for it finds its caches cold.
PICTURES_IN_TURN = 16
IMAGE_SECONDS = 60.0  # to read and decode one image; one that takes longer costs its row
# In a process: less than its thread may take, so that the process is ended and not the thread left behind.
_IN_PROCESS_SECONDS = IMAGE_SECONDS - 10
_CLOSING_SECONDS = 5.0  # that a pass which ends early waits for what is in work
_LOOK_SECONDS = 0.5  # between two looks at how long the images in work have taken
_TAKE_SECONDS = 0.02  # between two looks at what is computed, where no thread waits

Load = Callable[[Path, Sequence[Picture]], LoadedPictures | ImageFailure]


def embed_files(
    files: Sequence[Path],
    *,
    engine: Engine,
    pictures: Sequence[Picture],
    decoder: Decoder,
    workers: int,
) -> Iterator[EmbeddedBatch]:
    """Yield the features of `files` in order, some at a time.

    A file that cannot be read or decoded costs its own row: its outcome is an ImageFailure.
    """
    lane = Lane(engine=engine, pictures=tuple(pictures), rows=range(len(files)))
    for _, batch in embed_lanes(files, [lane], load=loader(decoder), workers=workers):
        yield batch


def loader(decoder: Decoder) -> Load:
    """What reads and decodes in the thread that asks for it."""

    def load(file: Path, pictures: Sequence[Picture]) -> LoadedPictures | ImageFailure:
        return load_pictures(file, pictures, decoder=decoder)

    return load


@contextmanager
def decoding(decoder: Decoder, *, isolate: bool) -> Iterator[Load]:
    """What reads and decodes an image: in the thread that asks for it, or in processes."""
    if not isolate:
        yield loader(decoder)
        return
    with IsolatedDecoder(decoder=decoder, seconds=_IN_PROCESS_SECONDS) as processes:
        yield processes.load


def load_in_time(load: Load, file: Path, pictures: Sequence[Picture]) -> LoadedPictures | ImageFailure:
    """What `load` says or raises, unless it takes longer than an image may: its thread is left behind."""
    said: Future[LoadedPictures | ImageFailure] = Future()

    def decode() -> None:
        try:
            said.set_result(_load_in_memory(load, file, pictures))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            said.set_exception(error)

    threading.Thread(target=decode, name="decode", daemon=True).start()
    done, _ = wait([said], IMAGE_SECONDS)
    return said.result() if done else _too_slow()


def _load_in_memory(load: Load, file: Path, pictures: Sequence[Picture]) -> LoadedPictures | ImageFailure:
    """What `load` says; the failure of the image where there is not enough memory."""
    try:
        return load(file, pictures)
    except MemoryError:
        reason = "there is not enough memory to decode it"
        return ImageFailure(status=RowStatus.TOO_LARGE, reason=reason, stat=NO_FILE)


def embed_lanes(
    files: Sequence[Path],
    lanes: Sequence[Lane],
    *,
    load: Load,
    workers: int,
    stages: Stages | None = None,
) -> Generator[tuple[int, EmbeddedBatch]]:
    """Yield (index of the lane, its next images) until every lane has all of its rows.

    Each file is read and decoded once for all lanes that want it. load: what does that, from any thread.
    """
    # Imported here, for torch is slow to import, and whoever has nothing to embed does without.
    from featcache.engines.replicas import threads_of_torch_kept

    with threads_of_torch_kept():
        run = _Pass(files, lanes, load=load, workers=workers, stages=stages or Stages())
        try:
            yield from run.batches()
        finally:
            run.close()


@dataclass(eq=False)
class _Batch:
    """A batch of a lane on its way: pixels come in from several threads, then features.

    pixels: one uint8 ndarray (batch_size, S, S, 3) a view.
    """

    lane: int
    pixels: list[NDArray[np.uint8]]
    outcomes: list[Outcome | None]
    missing: int  # pictures still to come
    features: Mapping[str, NDArray[np.float32]] | None = None


@dataclass(eq=False)
class _Image:
    """A file to decode, and the places its pictures go to: (batch, slot) for each lane that wants it."""

    file: Path
    places: list[tuple[_Batch, int]]
    settled: bool = False  # its outcome is known, be it that nobody waits for it any more


class _Worker(threading.Thread):
    """A thread that decodes, and on the processors computes. A daemon: one that hangs holds nobody up."""

    def __init__(self, run: _Pass) -> None:
        super().__init__(name="decode", daemon=True)
        self._run = run
        self.image: _Image | None = None
        self.begun = 0.0
        self.computing = False
        self.left_behind = False

    def run(self) -> None:
        self._run.work(self)


class _Pass:
    """One pass over the files. All state is guarded by `_lock`; work is done outside of it.

    Who takes what is computed is not woken for every batch, for that would take a processor from those that
    compute: it looks every `_TAKE_SECONDS`, and at once where a thread has nothing to do.
    """

    def __init__(
        self, files: Sequence[Path], lanes: Sequence[Lane], *, load: Load, workers: int, stages: Stages
    ) -> None:
        self._files, self._lanes, self._load, self._stages = files, lanes, load, stages
        self._lock = threading.RLock()
        self._jobs = threading.Condition(self._lock)  # there is something to do
        self._idle = threading.Condition(self._lock)  # a thread has nothing to do, or all of them are over
        self._wanted = _by_file(lanes)
        self._next: tuple[int, list[int]] | None = next(self._wanted, None)
        self._todo: deque[_Image] = deque()
        self._full: list[deque[_Batch]] = [deque() for _ in lanes]  # to be computed
        self._open: list[deque[_Batch]] = [deque() for _ in lanes]  # not yielded yet, in order
        self._spare: list[list[list[NDArray[np.uint8]]]] = [[] for _ in lanes]  # pixels of batches gone by
        self._placed = [0] * len(lanes)
        self._error: BaseException | None = None
        self._closing = False
        self._looked = time.monotonic()
        self._workers = [_Worker(self) for _ in range(workers)]
        self._callers = [
            threading.Thread(target=self._call, args=(index,), name="forward", daemon=True)
            for index, lane in enumerate(lanes)
            for _ in range(lane.engine.callers)
        ]
        # The lanes whose batches are computed by the threads that decode.
        self._shared = [index for index, lane in enumerate(lanes) if not lane.engine.callers]
        stages.decoding_threads = workers
        stages.forward_threads = len(self._callers) or workers
        for thread in (*self._workers, *self._callers):
            thread.start()

    def batches(self) -> Iterator[tuple[int, EmbeddedBatch]]:
        while True:
            with self._lock:
                self._place_images()
                if self._next is None and not any(self._open):
                    return
                ready = self._take_ready()
                if not ready:
                    if self._error is not None:
                        raise self._error
                    self._idle.wait(_TAKE_SECONDS)
                    self._look_for_slow_images()
            for lane, batches in ready:
                yield lane, _joined(batches)

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._todo.clear()
            self._jobs.notify_all()
        until = time.monotonic() + min(IMAGE_SECONDS, _CLOSING_SECONDS)
        for thread in (*self._workers, *self._callers):
            thread.join(max(0.0, until - time.monotonic()))

    # What the threads do

    def work(self, worker: _Worker) -> None:
        from featcache.engines.replicas import one_thread_of_torch

        with self._errors_told():
            one_thread_of_torch()
            while not worker.left_behind:
                job = self._next_job(worker)
                if isinstance(job, _Batch):
                    self._compute(job)
                else:
                    self._decode(job, worker)

    def _call(self, lane: int) -> None:
        with self._errors_told():
            while True:
                self._compute(self._next_full(lane))

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        """An error in a thread is raised by the one that takes the batches."""
        with suppress(_Over):
            try:
                yield
            except _Over:
                raise
            except BaseException as error:
                with self._lock:
                    self._error = self._error or error
                    self._closing = True
                    self._jobs.notify_all()
                    self._idle.notify()
                raise _Over from error

    def _next_job(self, worker: _Worker) -> _Batch | _Image:
        """Images until some batches are full, then these."""
        with self._lock:
            while not self._closing:
                full = next((self._full[lane] for lane in self._shared if self._full[lane]), None)
                worker.computing = full is not None and (
                    worker.computing or not self._todo or self._pictures_waiting() >= PICTURES_IN_TURN
                )
                if full is not None and worker.computing:
                    return full.popleft()
                if self._todo:
                    worker.begun = time.monotonic()
                    worker.image = self._todo.popleft()
                    return worker.image
                self._wait_for_job()
            raise _Over

    def _next_full(self, lane: int) -> _Batch:
        with self._lock:
            while not self._closing:
                if self._full[lane]:
                    return self._full[lane].popleft()
                self._wait_for_job()
            raise _Over

    def _pictures_waiting(self) -> int:
        """Of the batches that the threads which decode may compute."""
        return sum(self._lanes[lane].engine.batch_size * len(self._full[lane]) for lane in self._shared)

    def _wait_for_job(self) -> None:
        self._idle.notify()
        self._jobs.wait()

    def _decode(self, image: _Image, worker: _Worker) -> None:
        begun = time.perf_counter()
        pictures = _distinct(p for batch, _ in image.places for p in self._lanes[batch.lane].pictures)
        loaded = _load_in_memory(self._load, image.file, pictures)
        self._stages.add(decoding=time.perf_counter() - begun)
        found = {} if isinstance(loaded, ImageFailure) else dict(zip(pictures, loaded.pixels, strict=True))
        with self._lock:
            worker.image = None
            if image.settled:
                return
            image.settled = True
        for batch, slot in image.places:
            for pixels, picture in zip(batch.pixels, self._lanes[batch.lane].pictures, strict=True):
                if found:
                    pixels[slot] = found[picture]
        self._settle(image, loaded)

    def _settle(self, image: _Image, loaded: LoadedPictures | ImageFailure) -> None:
        outcome = loaded if isinstance(loaded, ImageFailure) else _without_pixels(loaded)
        with self._lock:
            for batch, slot in image.places:
                batch.outcomes[slot] = outcome
                batch.missing -= 1
                if not batch.missing:
                    self._full[batch.lane].append(batch)
                    self._jobs.notify_all()

    def _compute(self, batch: _Batch) -> None:
        lane, count = self._lanes[batch.lane], len(batch.outcomes)
        begun = time.perf_counter()
        features: dict[str, NDArray[np.float32]] = {}
        for view, pixels in enumerate(batch.pixels):
            found = lane.engine.embed(pixels[:count])
            features |= {view_key(key, view): vectors for key, vectors in found.items()}
        self._stages.add(forward=time.perf_counter() - begun)
        with self._lock:
            self._spare[batch.lane].append(batch.pixels)
            batch.pixels, batch.features = [], features

    # What the thread that takes the batches does, holding the lock

    def _place_images(self) -> None:
        """Give every image its places, for as many as may be in work at once."""
        placed = False
        while self._next is not None and all(self._has_room(lane) for lane in self._next[1]):
            index, wanting = self._next
            self._todo.append(_Image(self._files[index], [self._place(lane) for lane in wanting]))
            self._next = next(self._wanted, None)
            placed = True
        if placed:
            self._jobs.notify_all()

    def _has_room(self, lane: int) -> bool:
        """Whether the lane may take another image."""
        engine, open_ = self._lanes[lane].engine, self._open[lane]
        ahead = engine.callers or len(self._workers)
        most = max(BATCHES_AHEAD + ahead, -(-PICTURES_AHEAD // engine.batch_size))
        return self._placed[lane] % engine.batch_size != 0 or len(open_) < most

    def _place(self, lane: int) -> tuple[_Batch, int]:
        """The next place of the lane, in a new batch where the last is full."""
        size, rows = self._lanes[lane].engine.batch_size, self._lanes[lane].rows
        slot = self._placed[lane] % size
        if slot == 0:
            count = min(size, len(rows) - self._placed[lane])
            self._open[lane].append(_Batch(lane, self._new_pixels(lane), [None] * count, missing=count))
        self._placed[lane] += 1
        return self._open[lane][-1], slot

    def _new_pixels(self, lane: int) -> list[NDArray[np.uint8]]:
        if self._spare[lane]:
            return self._spare[lane].pop()
        return [self._lanes[lane].engine.allocate() for _ in self._lanes[lane].pictures]

    def _take_ready(self) -> list[tuple[int, list[_Batch]]]:
        """Of each lane the batches that are computed, as far as none before them is missing."""
        ready: list[tuple[int, list[_Batch]]] = []
        for index, open_ in enumerate(self._open):
            batches = []
            while open_ and open_[0].features is not None:
                batches.append(open_.popleft())
            if batches:
                ready.append((index, batches))
        return ready

    def _look_for_slow_images(self) -> None:
        """Give up images that have taken too long; their threads are left behind and replaced."""
        now = time.monotonic()
        since = now - self._looked
        if since < _LOOK_SECONDS:
            return
        if since > 2 * _LOOK_SECONDS:  # the process was stopped, or whoever takes batches was busy
            for worker in self._workers:
                worker.begun += since
        self._looked = now
        for worker in list(self._workers):
            image = worker.image
            if image is None or image.settled or now - worker.begun <= IMAGE_SECONDS:
                continue
            image.settled = worker.left_behind = True
            replacement = _Worker(self)
            self._workers[self._workers.index(worker)] = replacement
            replacement.start()
            self._settle(image, _too_slow())


def _joined(batches: Sequence[_Batch]) -> EmbeddedBatch:
    """Consecutive batches of a lane, all of them computed, as one."""
    parts = [batch.features or {} for batch in batches]
    return EmbeddedBatch(
        outcomes=[outcome for batch in batches for outcome in batch.outcomes if outcome is not None],
        features={key: np.concatenate([part[key] for part in parts]) for key in parts[0]},
    )


class _Over(Exception):
    """The pass is over: a thread that waits for work has none."""


def _too_slow() -> ImageFailure:
    reason = f"took more than {IMAGE_SECONDS:g} s to read and decode"
    return ImageFailure(status=RowStatus.TOO_SLOW, reason=reason, stat=NO_FILE)


def _by_file(lanes: Sequence[Lane]) -> Iterator[tuple[int, list[int]]]:
    """(file, lanes that want it) in the order of the files."""
    rows = [iter(lane.rows) for lane in lanes]
    heads = [next(it, None) for it in rows]
    while any(head is not None for head in heads):
        first = min(head for head in heads if head is not None)
        wanting = [lane for lane, head in enumerate(heads) if head == first]
        for lane in wanting:
            heads[lane] = next(rows[lane], None)
        yield int(first), wanting


def _distinct(pictures: Iterable[Picture]) -> list[Picture]:
    return list(dict.fromkeys(pictures))


def _without_pixels(loaded: LoadedPictures) -> EmbeddedImage:
    return EmbeddedImage(sha256=loaded.sha256, stat=loaded.stat, note=loaded.note)
