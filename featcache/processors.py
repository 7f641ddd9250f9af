"""How many processors there are to work on."""

from __future__ import annotations

import os


def usable_processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
