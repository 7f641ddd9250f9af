"""Decoding in processes: a picture that crashes its decoder, or never ends, costs its row and not the run.

What is to know of pictures is in the function that the processes run (`serving`); this knows processes: when
they are started, asked, given up and ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from featcache.errors import DeviceError
from featcache.images.decode import MAX_PIXELS, Decoder, LoadedPictures
from featcache.images.exchange import SharedPixels, anonymous_file, as_line, pictures_to_json, transforms_of
from featcache.images.identity import ImageFailure, read_image
from featcache.records import NO_FILE, FileStat, RowStatus
from featcache.spec import Picture
from featcache.transforms import find_transform

_START = (
    "import json, sys; settings = json.loads(sys.argv[1]); sys.path[:] = settings['path']; "
    "from featcache.images.serving import serve; serve(settings)"
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # there is a process for each thread
_START_SECONDS = 120  # a large library may come from a cold disk
_ATTEMPTS = 3
_END_SECONDS = 5  # inside a system call that cannot be interrupted, a process outlives its kill


class IsolatedDecoder:
    """`load_pictures` in a process of its own for each call under way, from any number of threads.

    decoder, max_pixels: as for `load_pictures`. seconds: how long an image may take, from its request to its
    pixels. load: "module:function", imported in the processes only, to be called there as `load_pictures` is.
    """

    def __init__(
        self,
        *,
        decoder: Decoder = "exact",
        seconds: float,
        max_pixels: int = MAX_PIXELS,
        load: str = "featcache.images.decode:load_pictures",
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"an image may take a positive number of seconds, not {seconds}")
        self._seconds = seconds
        self._settings = {"load": load, "options": {"decoder": decoder, "max_pixels": max_pixels}}
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._closed = False

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, path: str | Path, pictures: Sequence[Picture]) -> LoadedPictures | ImageFailure:
        """What `load_pictures` answers; an ImageFailure too where the process dies or takes too long.

        Raises ValueError as `load_pictures` does, RuntimeError with the traceback for anything else that is
        raised there or when this is closed, and DeviceError when there can be no process.
        """
        pictures = tuple(pictures)
        for name in transforms_of(pictures):
            find_transform(name)  # a process imports what it is asked for: nothing that is not known here
        said = ""
        for _ in range(_ATTEMPTS):
            worker = self._take()
            try:
                worker.ask(path, pictures)
                outcome = worker.answer(pictures, self._seconds)
            except TimeoutError:
                reason = f"took more than {self._seconds:g} s to decode"
                return self._failed(worker, path, RowStatus.TOO_SLOW, reason)
            except MemoryError:
                return self._failed(worker, path, RowStatus.UNDECODABLE, "not enough memory to decode it")
            except _Gone as gone:
                if worker.has_begun():
                    return self._failed(worker, path, RowStatus.UNDECODABLE)
                said = str(gone)  # that was no fault of the image
                self._end(worker)
            except BaseException:  # its answer may still be to come
                self._end(worker)
                raise
            else:
                self._give_back(worker)
                return outcome
        raise DeviceError(
            f"a process that decodes images does not start: {said}. Mend that, or decode in threads."
        )

    def close(self) -> None:
        """End all processes, those that are decoding as well: the calls that wait for these raise."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()
        for worker in idle:
            worker.end()

    def _take(self) -> _Worker:
        """One that is idle and alive, or a new one."""
        while True:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the decoder is closed")
                if not self._idle:
                    worker = _Worker(self._settings)
                    self._workers.add(worker)
                    return worker
                worker = self._idle.pop()
            if worker.alive():
                return worker
            self._end(worker)

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.end()

    def _failed(
        self, worker: _Worker, path: str | Path, status: RowStatus, reason: str | None = None
    ) -> ImageFailure:
        """The failure of the image at `path`, with which `worker` ended or is ended."""
        cause = self._end(worker)
        with self._lock:
            if self._closed:
                raise RuntimeError("the decoder is closed")
        reason = reason or f"its decoder died ({cause or 'it cannot be ended'})"
        if cause is None:  # it hangs in the file system, where reading the file would hang as well
            return ImageFailure(status=status, reason=reason, stat=NO_FILE)
        read = read_image(path)
        return ImageFailure(status=status, reason=reason, stat=read.stat, sha256=read.sha256)

    def _end(self, worker: _Worker) -> str | None:
        """How the process ended, or None when it did not yet."""
        with self._lock:
            self._workers.discard(worker)
        return worker.end()


class _Gone(Exception):
    """The process ended; says what it wrote to its standard error before it was ready."""


class _Worker:
    """The near end of a process that decodes one image at a time."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Start the process, without waiting until it is ready. DeviceError when it cannot be started."""
        self._ready = False
        with ExitStack() as stack:
            try:
                self._start(stack, settings)
            except OSError as error:
                raise DeviceError(
                    f"a process that decodes images cannot be started: {error.strerror}. Use fewer workers."
                ) from error
            self._held = stack.pop_all()

    def _start(self, stack: ExitStack, settings: Mapping[str, Any]) -> None:
        self._pixels = SharedPixels(anonymous_file())
        stack.callback(self._pixels.close)
        near, far = socket.socketpair()
        self._socket = stack.enter_context(near)
        self._lines = stack.enter_context(near.makefile("rb"))
        with far:
            passed = (far.fileno(), self._pixels.descriptor)
            given: dict[str, Any] = {
                "socket": passed[0],
                "pixels": passed[1],
                "path": [*(entry for entry in sys.path if isinstance(entry, str)), os.getcwd()],
                "warnings": list(_warning_filters()),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps({**given, **settings})],
                stdin=subprocess.PIPE,  # never written to: open as long as we are there
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                env=os.environ | _ONE_THREAD,
                process_group=0,  # where Ctrl-C of a terminal does not come
            )
        for pipe in (self._process.stdin, self._process.stderr):
            if pipe is not None:
                stack.enter_context(pipe)

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, path: str | Path, pictures: tuple[Picture, ...]) -> None:
        """Hand over a request, once the process is ready. Raises _Gone when there is no one to take it."""
        self._pixels.hold(pictures)
        self._pixels.taken_up = False
        where = os.fsencode(path if os.path.isabs(path) else Path.cwd() / path)
        request = {"path": where.decode("latin-1"), "pictures": pictures_to_json(pictures)}
        try:
            if not self._ready:
                self._await_start()
            self._socket.sendall(as_line(request))
        except OSError as error:
            raise _Gone("it takes no request") from error

    def has_begun(self) -> bool:
        """Whether the process took up what it was asked."""
        return self._pixels.taken_up

    def answer(self, pictures: tuple[Picture, ...], seconds: float) -> LoadedPictures | ImageFailure:
        """The outcome of the request. TimeoutError, _Gone, or what was raised in the process."""
        self._socket.settimeout(seconds)
        answer = self._read()
        if "raised" in answer:
            raise _exception(**answer)
        status = RowStatus(answer["status"])
        stat = FileStat(**answer["stat"])
        sha256 = None if answer["sha256"] is None else bytes.fromhex(answer["sha256"])
        if status is not RowStatus.OK:
            return ImageFailure(status=status, reason=answer["said"], stat=stat, sha256=sha256)
        shared = self._pixels.hold(pictures)
        copies = {place: shared[place].copy() for place in set(answer["pixels"])}
        pixels = tuple(copies[place] for place in answer["pixels"])
        return LoadedPictures(pixels=pixels, sha256=sha256 or b"", stat=stat, note=answer["said"])

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str | None:
        """Kill the process if it lives and let go of all it had; how it ended, None when it did not yet."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._held.close()
        code = self._process.returncode
        if code is None:
            return None
        if code >= 0:
            return f"exit status {code}"
        # Those for real-time use have no names.
        return next((named.name for named in signal.Signals if named == -code), f"signal {-code}")

    def _await_start(self) -> None:
        self._socket.settimeout(_START_SECONDS)
        try:
            self._read()
        except _Gone as gone:
            self._process.kill()
            stderr = self._process.stderr
            said = stderr.read().decode(errors="replace").strip() if stderr else ""
            raise _Gone(said.rpartition("\n")[2] or "it ended at once") from gone
        self._ready = True

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionError as error:
            raise _Gone from error
        if not line.endswith(b"\n"):
            raise _Gone
        answer: dict[str, Any] = json.loads(line)
        return answer


def _exception(raised: str, said: str, trace: str) -> Exception:
    """What `load` raised in a process: as it was where a caller may expect it, else with its traceback."""
    if raised in ("ValueError", "MemoryError"):
        return {"ValueError": ValueError, "MemoryError": MemoryError}[raised](said)
    error = RuntimeError(f"decoding raised {raised}")
    error.add_note(trace)
    return error


def _warning_filters() -> Iterator[tuple[str, str, str, str, int]]:
    """This process's filters of warnings, so that what is an error here is one there."""
    filters: Any = warnings.filters
    for action, message, category, module, line in filters:
        named = f"{category.__module__}:{category.__qualname__}"
        yield action, _pattern(message), named, _pattern(module), line


def _pattern(compiled: Any) -> str:
    return getattr(compiled, "pattern", compiled) or ""
