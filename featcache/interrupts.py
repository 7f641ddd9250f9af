"""Ctrl-C and SIGTERM as a request: the work in hand is finished first, then the signal has its way.

Knows signals only; what there is to finish, and when to look, is the caller's.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether a signal asked to stop, and which; to be polled between two pieces of work."""

    signum: signal.Signals | None = None  # the first that came
    # What `signal.getsignal` said of the signals that are handled.
    _formers: Mapping[signal.Signals, Any] = field(default_factory=dict, repr=False)
    _pid: int = field(default_factory=os.getpid, repr=False)
    _left: bool = field(default=False, repr=False)

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @property
    def _in_force(self) -> bool:
        # A forked child inherits the handler, but nobody there polls: terminating it must work at once.
        return not self._left and os.getpid() == self._pid

    def _leave(self) -> None:
        self._left = True

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None and self._in_force:
            self.signum = signal.Signals(signum)
            return
        former = self._formers[signal.Signals(signum)]
        if callable(former):
            former(signum, frame)
        else:
            signal.signal(signum, former)
            signal.raise_signal(signum)


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Let the first SIGINT or SIGTERM only be recorded; poll `.requested` and leave when it is true.

    A second signal acts at once, as it would have without this. On leaving, the former handlers are back
    and the recorded signal is raised again under them, unless the body raised already. An ignored signal
    stays ignored. Inside another `graceful_stop` this gives the outer one's request, which the outer one
    raises; outside the main thread, where Python lets no one handle signals, it gives one never requested.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    formers = {signum: signal.getsignal(signum) for signum in STOPPING}
    for former in formers.values():
        outer = getattr(former, "__self__", None)
        if isinstance(outer, StopRequest) and outer._in_force:
            yield outer
            return
    # None is a handler that was not installed from Python and so could not be put back.
    formers = {signum: former for signum, former in formers.items() if former not in (signal.SIG_IGN, None)}
    request = StopRequest(_formers=formers)
    with ExitStack() as stack:
        for signum, former in formers.items():
            stack.callback(signal.signal, signum, former)
            signal.signal(signum, request._receive)
        # Last in, first out: from here on a signal acts at once, so that none is recorded unseen.
        stack.callback(request._leave)
        yield request
    if request.signum is not None:
        signal.raise_signal(request.signum)
