"""The first signal is a request, the second acts, and neither is ever lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import pytest

from featcache.interrupts import StopRequest, graceful_stop

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Terminated(KeyboardInterrupt):
    """What the former handler of SIGTERM raises in these tests."""


def terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """The handlers of a command: Ctrl-C and SIGTERM raise. They must be there again after each test."""
    # A shell that starts the tests in the background has Ctrl-C ignored.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
    }
    ours = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield ours
    after = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert after == ours


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def run_python(code: str, *, sigint: Any = signal.SIG_DFL) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, sys, time\nfrom featcache.interrupts import graceful_stop\n"
    return subprocess.run(
        [sys.executable, "-c", head + code],
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_the_first_signal_is_recorded_and_raised_once_the_work_is_done(
    signum: signal.Signals, raised: type[BaseException]
) -> None:
    seen = []

    def work() -> None:
        with graceful_stop() as stop:
            seen.append(stop.requested)
            send(signum)
            seen.append(stop.requested)
            seen.append(stop.signum)

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert caught.type is raised
    assert seen == [False, True, signum]


@pytest.mark.parametrize("within", [nullcontext, graceful_stop], ids=["alone", "within another"])
@pytest.mark.parametrize("first", SIGNALS)
def test_the_second_signal_acts_at_once(
    first: signal.Signals, within: Callable[[], AbstractContextManager[object]]
) -> None:
    seen = []

    def work() -> None:
        with within(), graceful_stop():
            send(first)
            seen.append("after the first")
            send(signal.SIGTERM)
            seen.append("after the second")

    with pytest.raises(Terminated):
        work()
    assert seen == ["after the first"]


def test_without_a_signal_nothing_happens() -> None:
    with graceful_stop() as stop:
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert not stop.requested
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_an_error_of_the_body_is_what_comes_out() -> None:
    def work() -> None:
        with graceful_stop():
            send(signal.SIGTERM)
            raise LookupError

    with pytest.raises(LookupError):
        work()


def test_leaving_by_return_raises_the_signal_too() -> None:
    def work() -> int:
        with graceful_stop() as stop:
            send(signal.SIGINT)
            while True:
                if stop.requested:
                    return 1

    with pytest.raises(KeyboardInterrupt):
        work()


def test_within_another_the_outer_one_raises() -> None:
    seen = []

    def work() -> None:
        with graceful_stop() as outer:
            with graceful_stop() as inner:
                send(signal.SIGTERM)
                seen.append(inner.requested)
            seen.append(outer.requested)

    with pytest.raises(Terminated):
        work()
    assert seen == [True, True]


def test_a_handler_put_in_between_is_kept() -> None:
    """A library's own handler, set within the outer context, is the former one of the inner context."""
    seen: list[int] = []
    with graceful_stop() as outer:
        mine = {signum: signal.signal(signum, lambda s, f: seen.append(s)) for signum in SIGNALS}
        with graceful_stop() as inner:
            send(signal.SIGINT)
            assert (inner.requested, outer.requested, seen) == (True, False, [])
        assert seen == [signal.SIGINT]
        for signum, handler in mine.items():
            signal.signal(signum, handler)


def test_a_former_handler_that_returns_is_called_by_every_further_signal() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    try:
        with graceful_stop():
            send(signal.SIGTERM)
            assert seen == []
            send(signal.SIGTERM)
            assert seen == [signal.SIGTERM]
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, terminate)


def test_a_signal_while_leaving_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the last look at `requested` and before the former handlers are back."""
    leave = StopRequest._leave

    def interrupted(stop: StopRequest) -> None:
        leave(stop)
        send(signal.SIGINT)

    monkeypatch.setattr(StopRequest, "_leave", interrupted)
    with pytest.raises(KeyboardInterrupt), graceful_stop() as stop:
        pass
    assert not stop.requested


def test_another_thread_gets_a_request_that_no_signal_makes(handlers: dict[int, Any]) -> None:
    seen = []

    def work() -> None:
        with graceful_stop() as stop:
            seen.append((stop.requested, {signum: signal.getsignal(signum) for signum in SIGNALS}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, handlers)]


def test_a_forked_child_can_be_terminated() -> None:
    """A worker of a pool inherits the handler; it must die of the first signal, not record it."""
    ran = run_python(
        "with graceful_stop() as stop:\n"
        " ready, tell = os.pipe()\n"
        " child = os.fork()\n"
        " if child == 0:\n"
        "  os.write(tell, b'.')\n"
        "  time.sleep(60)\n"
        "  os._exit(0)\n"
        " os.read(ready, 1)\n"
        " os.kill(child, signal.SIGTERM)\n"
        " print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.requested)"
    )
    assert ran.stdout == f"{-signal.SIGTERM} False\n", ran.stderr


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_default_action_is_taken_after_the_work(signum: signal.Signals) -> None:
    ran = run_python(
        f"signal.signal({signum:d}, signal.SIG_DFL)\n"
        f"with graceful_stop():\n os.kill(os.getpid(), {signum:d})\n print('finished', flush=True)"
    )
    assert (ran.stdout, ran.returncode) == ("finished\n", -signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_default_action_is_taken_at_once_by_the_second(signum: signal.Signals) -> None:
    ran = run_python(
        f"signal.signal({signum:d}, signal.SIG_DFL)\nwith graceful_stop():\n"
        f" os.kill(os.getpid(), {signum:d})\n print('once', flush=True)\n"
        f" os.kill(os.getpid(), {signum:d})\n print('twice', flush=True)"
    )
    assert (ran.stdout, ran.returncode) == ("once\n", -signum)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As in a job that a shell started in the background."""
    ran = run_python(
        "with graceful_stop() as stop:\n"
        " os.kill(os.getpid(), signal.SIGINT)\n os.kill(os.getpid(), signal.SIGINT)\n"
        " print(stop.requested, signal.getsignal(signal.SIGINT) is signal.SIG_IGN)\n"
        " os.kill(os.getpid(), signal.SIGTERM)\n print(stop.requested, flush=True)",
        sigint=signal.SIG_IGN,
    )
    assert (ran.stdout, ran.returncode) == ("False True\nTrue\n", -signal.SIGTERM), ran.stderr
