"""An engine that runs no network: the mean of each colour, as slow or as wrong as a test wants it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from featcache.spec import FeatureNode

SIZE = 4


class FakeEngine:
    """The mean of each colour, after `seconds`, and then spoilt."""

    device = "cpu"
    nodes = (FeatureNode(name="penultimate", num_features=3),)

    def __init__(
        self,
        name: str = "fake",
        *,
        spoil: Callable[[np.ndarray], np.ndarray] = lambda vectors: vectors,
        seconds: float = 0.0,
        batch_size: int = 2,
        callers: int = 0,
        size: int = SIZE,
    ) -> None:
        self.name, self.batch_size, self.callers = name, batch_size, callers
        self.calls = 0
        self.allocated = 0
        self.threads: set[str] = set()  # the names of those that called
        self._spoil, self._seconds, self._size = spoil, seconds, size
        self._lock = threading.Lock()

    def allocate(self) -> np.ndarray:
        self.allocated += 1
        return np.zeros((self.batch_size, self._size, self._size, 3), dtype=np.uint8)

    def embed(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        assert 1 <= len(pixels) <= self.batch_size
        assert pixels.shape[1:] == (self._size, self._size, 3)
        with self._lock:
            self.calls += 1
            self.threads.add(threading.current_thread().name)
        time.sleep(self._seconds)
        return {"penultimate": self._spoil(pixels.mean((1, 2)).astype(np.float32))}
