"""`--engine auto`: the fastest engine that proves itself, looked for where the run is long enough to pay.

Measures engines and compares them with the reference, which is the eager engine in float32. Knows neither how
engines are made nor where images come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.engines.agreement import Agreement, Samples, compare_engines, noise, probe_pixels
from featcache.errors import DeviceError

# Look only where the eager engine would take this many times as long as looking does. Then looking has paid
# as soon as an engine is 4/3 times as fast, which ONNX Runtime was on every network measured on a CPU
# (docs/benchmarks.md), and where nothing is found the run takes a quarter longer at most.
WORTH = 4

# What making another engine takes, as measured for ONNX Runtime on two cores: importing and exporting, and
# the weights being written and read once more.
SETUP_SECONDS, SETUP_SECONDS_A_GIGABYTE = 2.0, 12.0

# Alternating batches an engine; its best one counts, for whatever else the machine does only ever slows down.
ROUNDS = 3

# Batches that go into looking at one engine: comparing, one to warm up and the rounds, for both of the two.
LOOKING_BATCHES = 2 * (ROUNDS + 2)

# An engine must be so much faster to take the reference's place: the timing is short, and the next run is to
# choose the same.
FASTER = 1.2


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """An engine, and why it is the one: in words, and for the provenance of a store."""

    engine: Engine
    said: str = ""  # empty where nothing was looked at
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    engine: Engine
    agreement: Agreement


def choose_engine(
    reference: Engine,
    *,
    names: Sequence[str],
    make: Callable[[str], Engine],
    images: int,
    weights_bytes: int,
    crop_size: int,
    samples: Samples | None = None,
) -> Choice:
    """The fastest of `reference` and the engines of `names` for a run of so many images.

    make: makes the engine of a name, or raises DeviceError, and then the engine is passed over.
    samples: some images of the run, to compare engines on.
    """
    if not names or not is_worth_looking(
        reference, images=images, weights_bytes=weights_bytes, size=crop_size
    ):
        return Choice(engine=reference)
    candidates, passed_over = _candidates(reference, names, make, probe_pixels(crop_size, samples))
    speeds = measure_speeds([reference, *(found.engine for found in candidates)], size=crop_size)
    best, agreement = reference, None
    for found in candidates:
        if speeds[found.engine.name] > speeds[best.name] * (FASTER if best is reference else 1):
            best, agreement = found.engine, found.agreement
    for found in candidates:
        if best is reference:
            passed_over[found.engine.name] = f"{speeds[found.engine.name]:,.1f} images/s, which is no faster"
    return Choice(
        engine=best,
        said=_words(best, reference, agreement, speeds, passed_over),
        record={
            "images_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
            "agreement": {found.engine.name: found.agreement.to_json() for found in candidates},
            "passed_over": passed_over,
        },
    )


def is_worth_looking(reference: Engine, *, images: int, weights_bytes: int, size: int) -> bool:
    """Whether `images` keep the reference busy for long enough to look for a faster engine."""
    batches = images / reference.batch_size
    if batches <= WORTH * LOOKING_BATCHES:
        return False  # however fast they are
    batch_seconds = _batch_seconds(reference, size=size)
    setup = SETUP_SECONDS + SETUP_SECONDS_A_GIGABYTE * weights_bytes / 1e9
    return batches * batch_seconds > WORTH * (setup + LOOKING_BATCHES * batch_seconds)


def _batch_seconds(engine: Engine, *, size: int) -> float:
    """Of the second batch, or of the first where that one is slow enough to tell."""
    pixels = noise(engine.batch_size, size)
    seconds = _seconds(engine, pixels)
    return seconds if seconds > 1 else _seconds(engine, pixels)


def measure_speeds(engines: Sequence[Engine], *, size: int) -> dict[str, float]:
    """{name: images per second} of the engines taking turns."""
    pixels = {engine.name: noise(engine.batch_size, size) for engine in engines}
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for engine in engines:
        engine.embed(pixels[engine.name])  # the first is slower
    for _ in range(ROUNDS):
        for engine in engines:
            seconds[engine.name].append(_seconds(engine, pixels[engine.name]))
    return {engine.name: engine.batch_size / min(seconds[engine.name]) for engine in engines}


def _seconds(engine: Engine, pixels: NDArray[np.uint8]) -> float:
    begun = time.perf_counter()
    engine.embed(pixels)
    return max(time.perf_counter() - begun, 1e-9)


def _candidates(
    reference: Engine, names: Sequence[str], make: Callable[[str], Engine], pixels: NDArray[np.uint8]
) -> tuple[list[_Candidate], dict[str, str]]:
    """Those that can be had and agree with the reference, and why the others do not come into question."""
    found, passed_over = [], {}
    for name in names:
        try:
            engine = make(name)
        except DeviceError as error:
            passed_over[name] = str(error)
            continue
        agreement = compare_engines(engine, reference, pixels)
        if agreement.passed:
            found.append(_Candidate(engine=engine, agreement=agreement))
        else:
            passed_over[name] = f"disagrees with {reference.name}: {agreement.describe()}"
    return found, passed_over


def _words(
    best: Engine,
    reference: Engine,
    agreement: Agreement | None,
    speeds: Mapping[str, float],
    passed_over: Mapping[str, str],
) -> str:
    if agreement is None:
        others = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
        return f"engine {best.name}, {speeds[best.name]:,.1f} images/s ({others})"
    return (
        f"engine {best.name}, {speeds[best.name]:,.1f} images/s where {reference.name} does "
        f"{speeds[reference.name]:,.1f}; against it over {agreement.images} images: {agreement.describe()}"
    )
