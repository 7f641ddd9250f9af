"""What a process that decodes and the one that asks it hand each other, in both directions.

Requests and outcomes are lines of JSON, pixels lie in memory that both map. Knows neither of the two.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.spec import Picture, Preprocessing


class SharedPixels:
    """Pictures in memory that two processes map; both hold the same ones in the same order.

    The first byte says whether a request was taken up: whether its image is to blame when the process ends.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = self._map(1)

    @property
    def taken_up(self) -> bool:
        return self._memory[0] == 1

    @taken_up.setter
    def taken_up(self, value: bool) -> None:
        self._memory[0] = int(value)

    def hold(self, pictures: Sequence[Picture]) -> list[NDArray[np.uint8]]:
        """The arrays of the pictures, each uint8 of shape (crop_size, crop_size, 3)."""
        sides = [picture.preprocessing.crop_size for picture in pictures]
        sizes = [side * side * 3 for side in sides]
        needed = 1 + sum(sizes)
        if needed > len(self._memory):
            self._memory = self._map(needed)
        return [
            np.frombuffer(self._memory, np.uint8, size, start).reshape(side, side, 3)
            for side, size, start in zip(sides, sizes, accumulate(sizes, initial=1), strict=False)
        ]

    def _map(self, size: int) -> mmap.mmap:
        if os.fstat(self.descriptor).st_size < size:
            os.ftruncate(self.descriptor, size)
        return mmap.mmap(self.descriptor, size)

    def close(self) -> None:
        del self._memory
        os.close(self.descriptor)


def anonymous_file() -> int:
    """A descriptor of a file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("featcache-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def as_line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


@lru_cache(maxsize=16)
def pictures_to_json(pictures: tuple[Picture, ...]) -> str:
    return json.dumps([asdict(picture) for picture in pictures])


@lru_cache(maxsize=16)
def pictures_from_json(described: str) -> tuple[Picture, ...]:
    return tuple(
        Picture(**raw | {"preprocessing": Preprocessing(**raw["preprocessing"])})
        for raw in json.loads(described)
    )


def transforms_of(pictures: Sequence[Picture]) -> set[str]:
    return {picture.preprocessing.transform for picture in pictures} - {""}
