"""What goes into a pass over images and what comes out of it, for each store that the pass fills."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.images.identity import ImageFailure
from featcache.records import FileStat
from featcache.spec import Picture


@dataclass(frozen=True, kw_only=True)
class EmbeddedImage:
    """What is kept of an image once its pixels are in a batch."""

    sha256: bytes  # of the bytes that were decoded, 32 bytes
    stat: FileStat
    note: str | None = None


Outcome = EmbeddedImage | ImageFailure


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedBatch:
    """Consecutive images of a lane, in order.

    outcomes: for each image its identity or its failure. features: {node key: float32 ndarray
    (n, num_features)}, one a node and view, meaningless in the rows that failed.
    """

    outcomes: Sequence[Outcome]
    features: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lane:
    """One store's part of a pass over files: which it embeds, what is made of each, and by which engine.

    rows: indices of the files, ascending. pictures: of each image, one for each view.
    """

    engine: Engine
    pictures: tuple[Picture, ...]
    rows: Sequence[int]


@dataclass
class Stages:
    """Seconds that the threads of a run were busy in each stage, and how many threads a stage has.

    Decoding includes reading. What decodes and what computes are the same threads on the processors.
    """

    decoding: float = 0.0
    forward: float = 0.0
    writing: float = 0.0
    decoding_threads: int = 1
    forward_threads: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, decoding: float = 0.0, forward: float = 0.0) -> None:
        with self._lock:
            self.decoding += decoding
            self.forward += forward

    def summary(self, seconds: float) -> dict[str, float]:
        """For each stage the share of `seconds` that its threads were busy in it."""
        return {name: min(1.0, busy / max(seconds, 1e-9)) for name, busy in self.as_dict().items()}

    def as_dict(self) -> dict[str, float]:
        """Seconds that each stage would take if it alone kept its threads busy: the longest is the wall."""
        return {
            "decoding": self.decoding / self.decoding_threads,
            "forward": self.forward / self.forward_threads,
            "writing": self.writing,
        }
