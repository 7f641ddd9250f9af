"""How a long run tells that it is alive: a bar on a terminal, lines in a log, or nothing.

Progress is written to stderr, so that stdout holds results only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO


class Progress(Protocol):
    """What a long run calls. `advance` is cheap: implementations limit how often they write."""

    def start(self, label: str, *, total: int, unit: str) -> None: ...

    def advance(self, count: int, *, stages: Mapping[str, float] | None = None) -> None:
        """`count` more units are done; `stages` holds the seconds spent so far in each stage."""

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        """One line that stays on the screen."""


class SilentProgress:
    """Says nothing."""

    def start(self, label: str, *, total: int, unit: str) -> None:
        pass

    def advance(self, count: int, *, stages: Mapping[str, float] | None = None) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, message: str) -> None:
        pass


class _Rate:
    """Counts units and words the state of the run; shared by the bar and the log."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.started = time.monotonic()
        self.slowest = ""

    def add(self, count: int, stages: Mapping[str, float] | None) -> None:
        self.done += count
        if stages and any(stages.values()):
            self.slowest = max(stages, key=lambda name: stages[name])

    def describe(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        left = f", {_clock((self.total - self.done) / rate)} left" if 0 < self.done < self.total else ""
        slowest = f", mostly {self.slowest}" if self.slowest else ""
        return f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s{slowest}{left}"


class TerminalProgress:
    """A bar that redraws itself in place, ten times a second at most."""

    WIDTH = 24

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._rate: _Rate | None = None
        self._drawn = 0.0
        self._length = 0

    def start(self, label: str, *, total: int, unit: str) -> None:
        self._rate = _Rate(label, total, unit)
        self._draw(force=True)

    def advance(self, count: int, *, stages: Mapping[str, float] | None = None) -> None:
        if self._rate:
            self._rate.add(count, stages)
            self._draw(force=False)

    def finish(self) -> None:
        if self._rate:
            self._draw(force=True)
            self._stream.write("\n")
            self._stream.flush()
            self._rate, self._length = None, 0

    def note(self, message: str) -> None:
        self._stream.write("\r" + " " * self._length + "\r" + message + "\n")
        self._draw(force=True)

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        if self._rate is None or (not force and now - self._drawn < 0.1):
            return
        filled = self.WIDTH * self._rate.done // max(self._rate.total, 1)
        bar = "█" * filled + "░" * (self.WIDTH - filled)
        text = f"{self._rate.label} {bar} {self._rate.describe()}"
        self._stream.write("\r" + text + " " * max(self._length - len(text), 0))
        self._stream.flush()
        self._drawn, self._length = now, len(text)


class LogProgress:
    """A line now and then, for output that is not a terminal."""

    def __init__(self, stream: TextIO | None = None, *, every: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._every = every  # seconds between lines
        self._rate: _Rate | None = None
        self._said = 0.0

    def start(self, label: str, *, total: int, unit: str) -> None:
        self._rate = _Rate(label, total, unit)
        self._said = time.monotonic()

    def advance(self, count: int, *, stages: Mapping[str, float] | None = None) -> None:
        if self._rate:
            self._rate.add(count, stages)
            if time.monotonic() - self._said >= self._every:
                self._say()

    def finish(self) -> None:
        if self._rate:
            self._say()
            self._rate = None

    def note(self, message: str) -> None:
        self._stream.write(message + "\n")
        self._stream.flush()

    def _say(self) -> None:
        if self._rate:
            self._said = time.monotonic()
            self.note(f"{self._rate.label}: {self._rate.describe()}")


def make_progress(*, quiet: bool = False) -> Progress:
    """The progress that suits stderr: a bar on a terminal, lines otherwise, nothing when `quiet`."""
    if quiet or sys.stderr is None:  # None: it was closed
        return SilentProgress()
    return TerminalProgress() if sys.stderr.isatty() else LogProgress()


def _clock(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"
