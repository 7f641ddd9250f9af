"""CRC-32 as zlib computes it, by the fastest library that is installed. Every one gives the same value."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from functools import cache

# They use the processor's carry-less multiplication, which zlib does on few systems. The first one is what
# the extra `fast` installs.
_HARDWARE = ("isal.isal_zlib", "zlib_ng.zlib_ng")

Crc32 = Callable[[bytes | memoryview, int], int]


@cache
def crc32_function() -> Crc32:
    """crc32(data, value so far) -> value."""
    for module in _HARDWARE:
        try:
            function: Crc32 = importlib.import_module(module).crc32
        except ImportError:
            continue
        return function
    return zlib.crc32
