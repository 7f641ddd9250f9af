"""200 times kill -9 at random instants of create, fill, grow, repair and of their resumption.

`scripts/fault_kill.py` does the same for long.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from faults.kills import SABOTAGES, Outcome, kill_rounds, summarise
from faults.power_cuts import cut_rounds, why_not

KILLS = 200
JOBS = min(2, len(os.sched_getaffinity(0)))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that have never run torch, as those that fork children must be."""
    with ProcessPoolExecutor(JOBS, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where that can be: syncs cost no time there, and a kill loses nothing anyway."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="featcache-kills-") as folder:
        yield Path(folder)


def rounds_until_killed(pool: ProcessPoolExecutor, folder: Path, kills: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    numbers = count(0, 5)
    while sum(outcome.stopped for outcome in outcomes) < kills:
        starts = [next(numbers) for _ in range(2 * JOBS)]
        asked = [pool.submit(kill_rounds, str(folder), "0", range(start, start + 5)) for start in starts]
        for future in asked:
            outcomes += future.result()
    return outcomes


def test_nothing_is_lost_and_nothing_is_wrong_after_200_kills(
    pool: ProcessPoolExecutor, folder: Path
) -> None:
    outcomes = rounds_until_killed(pool, folder, KILLS)
    assert [(outcome.round, outcome.violations) for outcome in outcomes if outcome.violations] == []
    figures = summarise(outcomes)
    for phase in ("no file yet", "creating", "filling", "growing", "repairing", "ending"):
        assert figures[f"stopped: {phase}"], figures
    assert figures["recoveries stopped as well"] > KILLS / 10, figures
    assert figures["stopped: finished before"] < KILLS / 2, figures


@pytest.mark.parametrize("fault", SABOTAGES)
def test_a_fault_put_into_featcache_is_found(pool: ProcessPoolExecutor, folder: Path, fault: str) -> None:
    asked = [pool.submit(kill_rounds, str(folder), "0", range(n, n + 6), fault) for n in (0, 6)]
    assert [violation for future in asked for outcome in future.result() for violation in outcome.violations]


def test_what_was_acknowledged_survives_power_cuts(tmp_path: Path) -> None:
    """A few; `scripts/fault_power_cut.py` makes many."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        reason = pool.submit(why_not, str(tmp_path)).result()
        if reason:
            pytest.skip(f"power cannot be cut here: {reason}")
        outcomes = pool.submit(cut_rounds, str(tmp_path), "0", range(6)).result()
    assert [(outcome.round, outcome.violations) for outcome in outcomes if outcome.violations] == []
