"""`--engine auto`: the fastest engine that proves itself, looked for where the run is long enough to pay.

Measures engines, each at the batch sizes that suit it and with as many calls at once as a run makes, and
compares them with the eager engine in float32. Knows neither how engines are made nor where images come from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.engines.agreement import Agreement, Samples, compare_engines, noise, probe_pixels
from featcache.errors import DeviceError

# Look at an engine only where the run would take the eager engine so many times as long as looking takes, so
# that a run in which nothing is found takes a third longer at most.
WORTH = 3

# Alternating turns an engine; its best one counts, for whatever else the machine does only ever slows down.
ROUNDS = 3
TURN_SECONDS = 0.1  # at least, and at least one batch a thread
WARM_UP = 2  # turns that do not count
COMPARED = 16  # images that go through an engine and the one it is compared with, about

# Another engine must be so much faster to take the place of the eager one: the timing is short, and the next
# run is to choose the same.
FASTER = 1.1


@dataclass(frozen=True)
class Candidate:
    """An engine by name, and a batch size for it.

    setup_seconds: about what making it takes.
    """

    name: str
    batch_size: int
    setup_seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        return f"{self.name} in batches of {self.batch_size}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """An engine, and why it is the one: in words, and for the provenance of a store."""

    engine: Engine
    said: str = ""  # empty where nothing was looked at
    record: Mapping[str, Any] = field(default_factory=dict)


def choose_engine(
    reference: Engine,
    *,
    candidates: Sequence[Candidate],
    make: Callable[[Candidate], Engine],
    exact: Callable[[], Engine],
    images: int,
    crop_size: int,
    threads: int,
    samples: Samples | None = None,
) -> Choice:
    """The fastest of `reference` and the candidates for a run of so many images on so many processors.

    reference: the eager engine at the precision asked for. make: makes a candidate, or raises DeviceError,
    and then it is passed over. exact: the eager engine in float32, which engines must agree with; those in a
    lower precision at least as well as the reference does. samples: some images of the run, to compare
    engines on. The candidates are in the order in which they are worth a look.
    """
    candidates = worth_looking_at(candidates, reference, images=images, size=crop_size, threads=threads)
    if not candidates:
        return Choice(engine=reference)
    here = Candidate(reference.name, reference.batch_size)
    found = _Found(reference, exact(), probe_pixels(crop_size, samples))
    for candidate in candidates:
        found.look_at(candidate, make)
    speeds = measure_speeds(found.engines, size=crop_size, threads=threads)
    best = _fastest(speeds, here)
    return Choice(
        engine=found.engines[best],
        said=found.describe(best, speeds),
        record={
            "images_per_second": {str(candidate): round(speed, 1) for candidate, speed in speeds.items()},
            "agreement": {name: agreement.to_json() for name, agreement in found.agreements.items()},
            "passed_over": found.passed_over,
        },
    )


class _Found:
    """The engines that can be had and agree, and why the others do not come into question."""

    def __init__(self, reference: Engine, exact: Engine, pixels: NDArray[np.uint8]) -> None:
        self._reference, self._exact, self._pixels = reference, exact, pixels
        self.engines = {Candidate(reference.name, reference.batch_size): reference}
        self.agreements: dict[str, Agreement] = {}  # by name: another batch size changes rounding alone
        self.passed_over: dict[str, str] = {}
        if exact is not reference:
            self.agreements[reference.name] = compare_engines(reference, exact, pixels)

    def look_at(self, candidate: Candidate, make: Callable[[Candidate], Engine]) -> None:
        name = candidate.name
        if name in self.passed_over:
            return
        try:
            engine = make(candidate)
            if name != self._reference.name and name not in self.agreements:
                agreement = compare_engines(engine, self._exact, self._pixels)
                if not agreement.passed_like(self.agreements.get(self._reference.name)):
                    self.passed_over[name] = f"disagrees with {self._exact.name}: {agreement.describe()}"
                    return
                self.agreements[name] = agreement
        except DeviceError as error:
            if not any(known.name == name for known in self.engines):
                self.passed_over[name] = str(error)
            return
        self.engines[candidate] = engine

    def describe(self, best: Candidate, speeds: Mapping[Candidate, float]) -> str:
        said = f"engine {best}, {speeds[best]:,.1f} images/s"
        others = [f"{other} does {speed:,.1f}" for other, speed in speeds.items() if other.name != best.name]
        if others:
            said += f" where {', '.join(others)}"
        if best.name in self.agreements:
            agreement = self.agreements[best.name]
            said += f"; against {self._exact.name} in float32 over {agreement.images} images: "
            said += agreement.describe()
        return "; ".join([said, *(f"{name}: {why}" for name, why in self.passed_over.items())])


def _fastest(speeds: Mapping[Candidate, float], reference: Candidate) -> Candidate:
    def worth(candidate: Candidate) -> float:
        return speeds[candidate] / (FASTER if candidate.name != reference.name else 1)

    return max(speeds, key=worth)


def worth_looking_at(
    candidates: Sequence[Candidate], reference: Engine, *, images: int, size: int, threads: int
) -> list[Candidate]:
    """Those candidates, in their order, that `images` keep the reference busy for long enough to look at.

    One that takes too long to make does not keep those behind it from being looked at.
    """
    at_once = reference.callers or threads
    fewest = min((_images_looked_at(candidate, reference) for candidate in candidates), default=images)
    if images <= WORTH * at_once * fewest:
        return []  # however fast they are
    an_image = _batch_seconds(reference, size=size) / reference.batch_size
    left = images * an_image / at_once / WORTH
    left -= _looking_seconds(Candidate(reference.name, reference.batch_size), an_image)
    found = []
    for candidate in candidates:
        seconds = _looking_seconds(candidate, an_image)
        if seconds <= left:
            left -= seconds
            found.append(candidate)
    return found


def _images_looked_at(candidate: Candidate, reference: Engine) -> int:
    """How many images a thread computes while a candidate is looked at, about."""
    return COMPARED + (ROUNDS + WARM_UP) * (candidate.batch_size + reference.batch_size)


def _looking_seconds(candidate: Candidate, an_image: float) -> float:
    """About what it takes to make a candidate and to measure it, where an image takes one thread so long."""
    turn = max(TURN_SECONDS, candidate.batch_size * an_image)
    made = candidate.setup_seconds + COMPARED * an_image if candidate.setup_seconds else 0.0
    return made + (ROUNDS + WARM_UP) * turn


def _batch_seconds(engine: Engine, *, size: int) -> float:
    """Of the second batch, or of the first where that one is slow enough to tell, on one thread of it."""
    from featcache.engines.replicas import one_thread_of_torch, threads_of_torch_kept

    pixels = noise(engine.batch_size, size)
    with threads_of_torch_kept():
        if not engine.callers:
            one_thread_of_torch()
        seconds = _seconds(engine, pixels)
        return seconds if seconds > 1 else _seconds(engine, pixels)


def measure_speeds(engines: Mapping[Candidate, Engine], *, size: int, threads: int) -> dict[Candidate, float]:
    """Images per second of engines that take turns, each called from as many threads as in a run."""
    best = dict.fromkeys(engines, 0.0)
    most = max(engine.callers or threads for engine in engines.values())
    with calling_threads(most) as pool:
        turns = {
            candidate: _Turn(engine, pool, size=size, threads=threads)
            for candidate, engine in engines.items()
        }
        for _ in range(ROUNDS):
            for candidate, turn in turns.items():
                best[candidate] = max(best[candidate], turn.take())
    return best


@contextmanager
def calling_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads to call an engine from, as those of a run do: each runs torch's operations alone."""
    from featcache.engines.replicas import one_thread_of_torch, threads_of_torch_kept

    with threads_of_torch_kept(), ThreadPoolExecutor(count, initializer=one_thread_of_torch) as pool:
        yield pool


class _Turn:
    """An engine to be called from several threads at once for a while."""

    def __init__(self, engine: Engine, pool: ThreadPoolExecutor, *, size: int, threads: int) -> None:
        self._engine, self._pool = engine, pool
        self._at_once = engine.callers or threads
        self._pixels = noise(engine.batch_size, size)
        self._batches = 1
        for _ in range(WARM_UP):  # the first is slower: it makes what each thread needs
            seconds = self._run()
        self._batches = max(1, round(TURN_SECONDS / seconds))

    def take(self) -> float:
        """Images per second."""
        return self._at_once * self._batches * self._engine.batch_size / self._run()

    def _run(self) -> float:
        together = threading.Barrier(self._at_once + 1)

        def call() -> None:
            together.wait()
            for _ in range(self._batches):
                self._engine.embed(self._pixels)

        calls = [self._pool.submit(call) for _ in range(self._at_once)]
        together.wait()
        begun = time.perf_counter()
        for running in calls:
            running.result()
        return max(time.perf_counter() - begun, 1e-9)


def _seconds(engine: Engine, pixels: NDArray[np.uint8]) -> float:
    begun = time.perf_counter()
    engine.embed(pixels)
    return max(time.perf_counter() - begun, 1e-9)
