"""Simulate power cuts for long: what a disk may hold at any moment of any command that writes.

    python scripts/fault_crash_states.py [--states 1000000] [--seed 0] [--jobs 2]
    python scripts/fault_crash_states.py --protocol grow --replay 17:r0.17.3

tests/faults/crash_disk.py says what a disk may do, tests/faults/crash_states.py what is checked in every
state. On one of --resume-every new states the command is run again to its end, and cut again in turn; so it
is after a mere kill at every cut. --states counts different states; those that look like an earlier one come
on top.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import h5py
import numpy
import torch
from faults.crash_states import Bench, Plan, Tally, open_bench

SHOWN = 10  # violations of one protocol
BATCH = 4_000  # random states of a protocol between two looks at the clock
STALE = 0.02  # a protocol of whose draws fewer are new has shown what it has
COLUMNS = (
    "operations", "cuts", "exhaustive", "random", "again", "distinct", "resumed", "violating",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """The share of one process."""

    protocols: tuple[str, ...]
    states: int
    seed: int
    resume_every: int
    again: int


def explore(task: Task) -> list[Tally]:
    """Every canonical state of the protocols, then random ones until there are enough, or Ctrl-C."""
    tallies = {name: Tally(protocol=name) for name in task.protocols}
    with open_bench() as bench:
        try:
            _explore(bench, task, tallies)
        except KeyboardInterrupt:
            print("interrupted: what was done so far follows", flush=True)
    return list(tallies.values())


def _explore(bench: Bench, task: Task, tallies: Mapping[str, Tally]) -> None:
    reporter = Reporter(tallies)
    plan = Plan(
        exhaustive=True, seed=task.seed, resume_every=task.resume_every, kill_every=1, again=task.again
    )
    experiments = {name: bench.experiment(name) for name in task.protocols}
    for name, experiment in experiments.items():
        experiment.explore(plan, tallies[name])
        reporter.say(name)
    for number in itertools.count():
        for name, experiment in list(experiments.items()):
            if reporter.distinct >= task.states:
                return
            before = tallies[name].distinct
            seed = task.seed * 1_000_000 + number
            plan = Plan(draws=BATCH, seed=seed, resume_every=task.resume_every, again=task.again)
            experiment.explore(plan, tallies[name])
            reporter.say(name)
            if tallies[name].distinct - before < STALE * BATCH:
                del experiments[name]
        if not experiments:
            return


class Reporter:
    """A line every few seconds, and at once where something is wrong."""

    def __init__(self, tallies: Mapping[str, Tally]) -> None:
        self._tallies = tallies
        self._said_at, self._violating = 0.0, 0

    @property
    def distinct(self) -> int:
        return sum(tally.distinct for tally in self._tallies.values())

    def say(self, name: str) -> None:
        violating = sum(tally.violating for tally in self._tallies.values())
        if time.monotonic() - self._said_at < 5 and violating == self._violating:
            return
        print(f"{self.distinct:>12,} states, {violating} in violation; last: {name}", flush=True)
        self._said_at, self._violating = time.monotonic(), violating


def table(tallies: list[Tally]) -> str:
    rows = [("protocol", *COLUMNS)]
    rows += [(t.protocol, *(f"{getattr(t, name):,}" for name in COLUMNS)) for t in tallies]
    rows.append(("together", *(f"{sum(getattr(t, name) for t in tallies):,}" for name in COLUMNS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def summary(tallies: list[Tally], seconds: float) -> str:
    looked_at = sum(tally.states for tally in tallies)
    return (
        f"{looked_at:,} states looked at in {seconds:,.0f} s, {looked_at / seconds:,.0f} a second; "
        f"{sum(tally.distinct for tally in tallies):,} different ones; "
        f"{sum(tally.resumed for tally in tallies):,} runs resumed; "
        f"{sum(tally.violating for tally in tallies):,} states in violation"
    )


def replay(protocol: str, place: str) -> int:
    with open_bench() as bench:
        wrong = bench.experiment(protocol).find(place)
    print("\n".join(wrong) or "nothing is wrong in this state")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--states", type=int, default=1_000_000, help="different states to look at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes; the protocols are dealt out to them")
    parser.add_argument("--resume-every", type=int, default=100, metavar="N")
    parser.add_argument(
        "--again", type=int, default=100, metavar="N", help="random states of each run resumed"
    )
    parser.add_argument("--protocol", action="append", help="only this one; may be repeated")
    parser.add_argument("--replay", metavar="PLACE", help="one state of --protocol, as a violation names it")
    options = parser.parse_args()
    if options.replay:
        return replay(options.protocol[0], options.replay)
    begun = time.monotonic()
    with open_bench() as bench:
        names = options.protocol or list(bench.protocols)
    tasks = [
        Task(
            protocols=tuple(names[job :: options.jobs]),
            states=options.states // options.jobs,
            seed=options.seed,
            resume_every=options.resume_every,
            again=options.again,
        )
        for job in range(options.jobs)
    ]
    if options.jobs == 1:
        tallies = explore(tasks[0])
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(explore, task) for task in tasks]
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes end by it, with their tallies
            tallies = [tally for future in futures for tally in future.result()]
    seconds = time.monotonic() - begun
    print(table(tallies))
    for tally in tallies:
        for violation in tally.violations[:SHOWN]:
            print(violation)
    print(f"seed {options.seed}: {summary(tallies, seconds)}")
    print(
        f"{platform.platform()}; Python {platform.python_version()}, h5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}, numpy {numpy.__version__}, torch {torch.__version__}"
    )
    return 1 if any(tally.violating for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
