"""From image files to feature vectors: decoding threads ahead of the forward pass, in the files' order.

Threads suffice: reading, decoding and resizing release the GIL, and each writes its picture straight into
the batch. Whatever the number of threads, an image has its fixed place in a batch of fixed shape.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.images.decode import load_image
from featcache.images.identity import ImageFailure
from featcache.records import FileStat
from featcache.spec import Preprocessing

BATCHES_AHEAD = 3  # decoded or being decoded while one is in the forward pass; bounds the memory


@dataclass(frozen=True, kw_only=True)
class EmbeddedImage:
    """What is kept of an image once its pixels are in a batch."""

    sha256: bytes  # of the bytes that were decoded, 32 bytes
    stat: FileStat
    note: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedBatch:
    """Consecutive images of a run, in order.

    outcomes: for each image its identity or its failure. features: {node key: float32 ndarray
    (n, num_features)}, meaningless in the rows that failed.
    """

    outcomes: Sequence[EmbeddedImage | ImageFailure]
    features: Mapping[str, NDArray[np.float32]]


@dataclass
class StageSeconds:
    """Wall seconds the run has spent in each stage; decoding is the time the forward pass waited for it."""

    decoding: float = 0.0
    forward: float = 0.0
    writing: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(eq=False)
class _Filling:
    """A batch whose pictures are still being decoded."""

    pixels: NDArray[np.uint8]
    images: list[Future[EmbeddedImage | ImageFailure]] = field(default_factory=list)


def default_workers() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def embed_files(
    files: Sequence[Path],
    *,
    engine: Engine,
    preprocessing: Preprocessing,
    workers: int,
    stages: StageSeconds | None = None,
) -> Iterator[EmbeddedBatch]:
    """Yield the features of `files` in order, `engine.batch_size` at a time.

    A file that cannot be read or decoded costs its own row: its outcome is an ImageFailure.
    """
    stages = stages if stages is not None else StageSeconds()
    size = preprocessing.crop_size
    starts = iter(range(0, len(files), engine.batch_size))
    ahead: deque[_Filling] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def fill(start: int) -> _Filling:
        chosen = files[start : start + engine.batch_size]
        filling = _Filling(np.zeros((len(chosen), size, size, 3), dtype=np.uint8))
        for slot, file in enumerate(chosen):
            filling.images.append(pool.submit(_load_into, filling.pixels[slot], file, preprocessing))
        return filling

    try:
        while True:
            while len(ahead) <= BATCHES_AHEAD and (start := next(starts, None)) is not None:
                ahead.append(fill(start))
            if not ahead:
                return
            filling = ahead.popleft()
            begun = time.perf_counter()
            outcomes = [image.result() for image in filling.images]
            decoded = time.perf_counter()
            features = engine.embed(filling.pixels)
            stages.decoding += decoded - begun
            stages.forward += time.perf_counter() - decoded
            yield EmbeddedBatch(outcomes=outcomes, features=features)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _load_into(
    pixels: NDArray[Any], file: Path, preprocessing: Preprocessing
) -> EmbeddedImage | ImageFailure:
    image = load_image(file, preprocessing)
    if isinstance(image, ImageFailure):
        return image
    pixels[:] = image.pixels
    return EmbeddedImage(sha256=image.sha256, stat=image.stat, note=image.note)
