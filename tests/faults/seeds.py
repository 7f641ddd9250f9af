"""A long run of rounds, each drawn by a seed: its arguments, its end by Ctrl-C, a line now and then."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterator, Sequence

SHOWN_EVERY = 5.0  # seconds


def parser_of_seeds(doc: str, *, rounds: int = 10_000) -> argparse.ArgumentParser:
    """doc: of the script, of which the first line is shown."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat the one round of this seed")
    return parser


def seeds_of(asked: argparse.Namespace) -> Sequence[int]:
    return range(asked.seed, asked.seed + asked.rounds) if asked.only is None else [asked.only]


def each_seed(
    seeds: Sequence[int], *, so_far: Callable[[], str], say: Callable[[str], None]
) -> Iterator[int]:
    """The seeds one by one, until Ctrl-C; meanwhile what was done so far, in words, is said."""
    interrupted: list[int] = []
    # An exception would be lost where it meets a hook of fork.
    signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    shown = time.monotonic()
    for seed in seeds:
        if interrupted:
            say("interrupted")
            return
        yield seed
        if time.monotonic() - shown > SHOWN_EVERY:
            shown = time.monotonic()
            say(f"… {so_far()}")
