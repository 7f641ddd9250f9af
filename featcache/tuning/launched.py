"""How many processes were launched to train together, as torchrun's variables say it. Knows no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """1 where this process is alone."""
    return int(environment.get("WORLD_SIZE", "1"))


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that says and writes what was done."""
    return environment.get("RANK", "0") == "0"
