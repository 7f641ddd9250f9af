"""One writer at a time: a kernel lock beside the store, gone with the process that holds it.

The lock is a POSIX record lock, which forked children do not inherit and the kernel frees at kill -9. It lies
on a file of its own, `STORE.h5.lock`, because growing puts a new file under the store's name. That file is
removed by its holder; whoever locked a file that is no longer there begins again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from featcache.disk import disk_errors
from featcache.errors import StoreLocked

# Closing any descriptor of a file drops all record locks this process has on it, so a second lock of the
# same store in one process must be refused before its file is opened.
_held: set[Path] = set()
_held_guard = threading.Lock()


@contextmanager
def write_lock(store: Path) -> Iterator[None]:
    """Hold the exclusive right to write `store`; StoreLocked says who has it otherwise."""
    path = store.with_name(store.name + ".lock").absolute()
    with _held_guard:
        if path in _held:
            raise StoreLocked(f"{store} is being written by this process already.")
        _held.add(path)
    try:
        fd = _acquire(path, store)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)
    finally:
        with _held_guard:
            _held.discard(path)


def _acquire(path: Path, store: Path) -> int:
    while True:
        with disk_errors(path, doing="locking"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_there(path, fd):
                _sign(fd)
                return fd
        except OSError as exc:
            holder = os.pread(fd, 4096, 0)
            os.close(fd)
            if exc.errno not in (errno.EACCES, errno.EAGAIN):
                with disk_errors(path, doing="locking"):
                    raise
            raise StoreLocked(
                f"{store} is being written{_describe(holder)}. "
                "Wait until it ends, or stop it: its lock goes with it."
            ) from exc
        os.close(fd)


def _is_still_there(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _sign(fd: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(holder).encode(), 0)


def _describe(raw: bytes) -> str:
    try:
        holder = json.loads(raw)
        return f" by process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return " by another process"
