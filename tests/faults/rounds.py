"""Many rounds of `kills` or `power_cuts`, spread over processes, told as they go and summed up at the end."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from dataclasses import dataclass, field

import h5py
import numpy as np
import torch

from faults.kills import FINISHED, Outcome, summarise

BATCH = 5  # rounds a job does before it reports
TELL_SECONDS = 5.0

Work = Callable[[str, str, range], list[Outcome]]  # (folder, seed, numbers of the rounds)


def parser_of_rounds(description: str, *, rounds: int) -> ArgumentParser:
    parser = ArgumentParser(description=description, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", help="where the stores are made; default: the folder of temporary files")
    return parser


@dataclass(kw_only=True)
class LongRun:
    """One run of a script: `stops` is the word for what happens to a child, `say` takes lines."""

    options: Namespace
    stops: str
    say: Callable[[str], None]
    outcomes: list[Outcome] = field(default_factory=list)
    _begun: float = field(default_factory=time.monotonic)
    _told: float = 0.0

    def do(self, work: Work) -> int:
        """All rounds; the exit code."""
        options = self.options
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        last = options.first + options.rounds
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="featcache-rounds-") as folder:
            asked = (
                (folder, options.seed, range(start, min(start + BATCH, last)))
                for start in range(options.first, last, BATCH)
            )
            try:
                for outcomes in in_processes(work, asked, jobs=options.jobs):
                    self.outcomes += outcomes
                    self._tell(outcomes)
            except KeyboardInterrupt:
                self.say("\ninterrupted; so far:")
            finally:
                code = self._sum_up()
        return code

    def _tell(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            for violation in outcome.violations:
                self.say(f"VIOLATION in round {outcome.round} ({outcome.kind}): {violation}")
                self.say(
                    f"  again: {sys.argv[0]} --seed {self.options.seed} --first {outcome.round} --rounds 1"
                )
        seconds = time.monotonic() - self._begun
        if seconds - self._told < TELL_SECONDS:
            return
        self._told = seconds
        done, stopped = len(self.outcomes), sum(outcome.stopped for outcome in self.outcomes)
        violations = sum(len(outcome.violations) for outcome in self.outcomes)
        left = seconds / done * (self.options.rounds - done)
        self.say(
            f"{done:,} of {self.options.rounds:,} rounds, {stopped:,} {self.stops}, {violations} violations, "
            f"{seconds:,.0f} s, {left / 60:.0f} min left",
        )

    def _sum_up(self) -> int:
        figures = summarise(self.outcomes, stops=self.stops)
        self.say("")
        for name, count in figures.items():
            self.say(f"{name:44} {count:10,}")
        tried = figures[self.stops] + figures[f"stopped: {FINISHED}"]
        self.say(f"{'met before the run had finished':44} {figures[self.stops] / max(1, tried):10.1%}")
        self.say(f"{'seconds':44} {time.monotonic() - self._begun:10,.0f}")
        self.say(
            f"{platform.platform()}, {len(os.sched_getaffinity(0))} processors, "
            f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
            f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
        )
        return 1 if figures["violations"] or not self.outcomes else 0


def in_processes(
    work: Work, asked: Iterable[tuple[str, str, range]], *, jobs: int
) -> Iterator[list[Outcome]]:
    """What `work` returns for each of the arguments `asked`, as it comes; as many ahead as there are jobs."""
    # Forked, so that each job has imported torch and has run nothing of it.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        running: set[Future[list[Outcome]]] = set()
        for arguments in asked:
            running.add(pool.submit(work, *arguments))
            if len(running) < jobs:
                continue
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(running))
