"""How many processes were launched to train together, as torchrun's variables say it. Knows no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from featcache.errors import DataError, DiskError, FeatcacheError

_OF_ONE = (DataError, DiskError)  # of a file that one process alone may have met


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """1 where this process is alone."""
    return int(environment.get("WORLD_SIZE", "1"))


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that says and writes what was done."""
    return environment.get("RANK", "0") == "0"


def tells_for_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one of its machine that says what all of them have met."""
    return environment.get("LOCAL_RANK", "0") == "0"


@contextmanager
def errors_told_once(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Mark errors that every process of the run has, in all but the first of each machine."""
    try:
        yield
    except FeatcacheError as error:
        if not isinstance(error, _OF_ONE) and not tells_for_machine(environment):
            error.told_elsewhere = True
        raise
