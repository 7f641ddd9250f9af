"""What bfloat16 would bring on these processors: how much faster a network is, and how near its features.

Some images go through both engines in turns, from as many threads at once as in a run, for about a second.
Knows neither how engines are made nor where images come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.engines.agreement import Agreement, Vectors, compare_vectors, embed_pixels
from featcache.engines.choice import calling_threads
from featcache.spec import Precision

LOWER: Precision = "bfloat16"
FASTER = 1.2  # at least, to be worth other features
IMAGES = 8  # full batches, of whatever size an engine takes by itself on processors

_SECONDS = 1.0  # of turns; where the first of each takes as long, it is the only one
_TURNS = 3  # at most, besides the first


@dataclass(frozen=True, kw_only=True)
class LowerPrecision:
    """A network in a lower precision beside itself in float32.

    times_as_fast: None where it does not agree, for then it was not measured.
    """

    precision: Precision
    agreement: Agreement
    times_as_fast: float | None

    @property
    def pays(self) -> bool:
        return self.times_as_fast is not None and self.times_as_fast >= FASTER

    def to_json(self) -> dict[str, Any]:
        times = self.times_as_fast
        return {
            "precision": self.precision,
            "times_as_fast": times and round(times, 3),
            "agrees": self.agreement.passed,
            **self.agreement.to_json(),
        }


def try_lower_precision(
    lower: Engine, exact: Engine, pixels: NDArray[np.uint8], *, threads: int
) -> LowerPrecision:
    """`lower` beside `exact`, which computes in float32, on IMAGES images made of `pixels` (B, S, S, 3)."""
    pixels = np.resize(pixels, (IMAGES, *pixels.shape[1:]))  # again from the first where they are fewer
    with calling_threads(threads) as pool:

        def turn(engine: Engine) -> tuple[float, Vectors]:
            begun = time.perf_counter()
            calls = [pool.submit(embed_pixels, engine, pixels) for _ in range(threads)]
            found = [call.result() for call in calls]
            return max(time.perf_counter() - begun, 1e-9), found[0]

        exact_seconds, expected = turn(exact)
        seconds, found = turn(lower)
        agreement = compare_vectors(found, expected, images=IMAGES)
        if not agreement.passed:
            return LowerPrecision(precision=LOWER, agreement=agreement, times_as_fast=None)
        if exact_seconds + seconds < _SECONDS:  # what each thread needs was made in it
            exact_seconds, seconds = _best_turns(lambda: (turn(exact)[0], turn(lower)[0]))
    return LowerPrecision(precision=LOWER, agreement=agreement, times_as_fast=exact_seconds / seconds)


def _best_turns(take: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """The least seconds of each of two engines that take turns."""
    begun = time.perf_counter()
    turns = [take()]
    while len(turns) < _TURNS and time.perf_counter() - begun < _SECONDS:
        turns.append(take())
    return min(first for first, _ in turns), min(second for _, second in turns)
