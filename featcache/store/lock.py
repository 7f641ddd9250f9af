"""One writer at a time: a kernel lock beside the store, gone with the process that holds it.

The lock is a POSIX record lock, which children do not inherit and the kernel frees at kill -9. It lies on a
file of its own, `STORE.h5.lock`, because growing puts a new file under the store's name. That file is
removed by its holder; whoever locked a file that is no longer there begins again. What it contains names the
holder and decides nothing, but where record locks do not reach other machines: there the file itself is the
lock, to all but the running kernel that signed it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import secrets
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from featcache.disk import disk_errors, keep_standard_streams, sync_data, write_at
from featcache.errors import DiskError, StoreLocked
from featcache.store.filesystem import filesystem_of

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ATTEMPTS = 100  # one is lost when a holder removes the file between two of our steps
# What that looks like: plainly, on NFS, and where the protocol knows no better (a name taken, on sshfs).
_VANISHED = {errno.ENOENT, errno.ESTALE, errno.EPERM}
_LONGEST = 4096  # bytes of a signature; a longer file is somebody's data and is not overwritten
_HELD_ELSEWHERE = {errno.EACCES, errno.EAGAIN}
_CANNOT_LOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}

# Closing any descriptor of a file drops all record locks this process has on it. So what is held here must
# not even be opened again, by whatever path: known by path and by (st_dev, st_ino) of store and lock file.
_held: set[Path | tuple[int, int]] = set()
_held_guard = threading.Lock()


def _hold_nothing() -> None:
    """In a forked child: no lock came along, and the thread that may have had the guard did not either."""
    global _held_guard
    _held_guard = threading.Lock()
    _held.clear()


os.register_at_fork(after_in_child=_hold_nothing)


@contextmanager
def write_lock(store: Path) -> Iterator[None]:
    """Hold the exclusive right to write `store`; StoreLocked says who has it otherwise."""
    keep_standard_streams()
    real = Path(os.path.realpath(store))
    path = real.with_name(real.name + ".lock")
    with _held_guard:
        names: set[Path | tuple[int, int]] = {path, *_identities(real, path)}
        if names & _held:
            raise StoreLocked(f"{store} is being written by this process already. Wait until that ends.")
        with disk_errors(path, doing="locking"):
            fd = _acquire(path, store)
        names |= _identities(path)
        _held.update(names)
    pid = os.getpid()
    try:
        yield
    finally:
        try:
            # A forked child that leaves this block has nothing to release.
            if os.getpid() == pid:
                _remove(path, fd)
        finally:
            with _held_guard:
                with suppress(OSError):  # the kernel has freed the lock whatever it says
                    os.close(fd)
                _held.difference_update(names)


def _identities(*paths: Path) -> set[tuple[int, int]]:
    found = set()
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)
            found.add((status.st_dev, status.st_ino))
    return found


def _acquire(path: Path, store: Path) -> int:
    mine = _Signature.of_this_process(path.parent)
    for attempt in range(_ATTEMPTS):
        try:
            with ExitStack() as stack:
                fd = _open(path, mine)
                stack.callback(os.close, fd)
                if _take(fd, path, store, mine):
                    stack.pop_all()
                    return fd
        except OSError as exc:
            if exc.errno not in _VANISHED or attempt + 1 == _ATTEMPTS:
                raise
    raise StoreLocked(f"{path} vanished whenever it was to be locked. Run the same command again.")


def _open(path: Path, mine: _Signature) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # Opening asks the server whether the file exists; looking first might only ask a cache.
        fd = os.open(path, flags | (os.O_CREAT if mine.locks_reach_others else 0), 0o666)
    except FileNotFoundError:
        _create_signed(path, mine)
        fd = os.open(path, flags)
    except OSError as exc:
        if os.path.lexists(path):
            raise _no_lock_file(path, exc.strerror or str(exc)) from exc
        raise
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LONGEST:
            raise _no_lock_file(path, "it is something else than a lock file")
        stack.pop_all()
    return fd


def _create_signed(path: Path, mine: _Signature) -> None:
    """Make the lock file with its signature in one step, so that nobody ever meets it unsigned."""
    signed = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    _write_new(signed, mine)
    try:
        os.link(signed, path)
    except OSError:
        # Without hard links there is a moment without signature, in which other machines are refused.
        if not os.path.lexists(path):
            with suppress(FileExistsError):
                _write_new(path, mine)
    finally:
        os.unlink(signed)


def _write_new(path: Path, mine: _Signature) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _sign(fd, mine)
    finally:
        os.close(fd)


def _no_lock_file(path: Path, reason: str) -> DiskError:
    owner = ""
    with suppress(OSError, KeyError):
        uid = os.lstat(path).st_uid
        owner = f" (of user {pwd.getpwuid(uid).pw_name})" if uid != os.geteuid() else ""
    return DiskError(
        f"{path}{owner} cannot be locked: {reason}. "
        "Have it removed if no process writes the store, or choose another --output."
    )


def _take(fd: int, path: Path, store: Path, mine: _Signature) -> bool:
    """Lock and sign the opened file; False when it has lost its name meanwhile."""
    _lock(fd, path, store)
    if not _is_still_there(path, fd):
        return False
    _refuse_other_machines(_Signature.read(fd), mine, path, store)
    try:
        _sign(fd, mine)
    except OSError:
        _remove(path, fd)
        raise
    return True


def _lock(fd: int, path: Path, store: Path) -> None:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in _HELD_ELSEWHERE:
            raise StoreLocked(
                f"{store} is being written by {_Signature.read(fd) or 'another process'}. "
                "Wait until it ends, or stop it: its lock goes with it."
            ) from exc
        if exc.errno not in _CANNOT_LOCK:
            raise
        raise DiskError(
            f"{path} cannot be locked: this file system cannot lock ({os.strerror(exc.errno)}). "
            "Write the store on another disk and move it there."
        ) from exc


def _is_still_there(path: Path, fd: int) -> bool:
    """Whether the locked file has its name. NFS may remember the name, but asks anew for what is locked."""
    opened = os.fstat(fd)
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), opened) and opened.st_nlink > 0
    except FileNotFoundError:
        return False


def _remove(path: Path, fd: int) -> None:
    with suppress(OSError):  # a file that stays behind is locked by nobody
        if _is_still_there(path, fd):
            os.unlink(path)


@dataclass(frozen=True, kw_only=True)
class _Signature:
    """Who holds the lock, and who can tell by the record lock whether it still does."""

    pid: int
    host: str
    since: str
    kernel: str  # the boot of the kernel and the mount there: where a record lock is always seen
    locks_reach_others: bool

    @classmethod
    def of_this_process(cls, folder: Path) -> _Signature:
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            kernel=f"{_running_kernel()} {os.stat(folder).st_dev}",
            locks_reach_others=filesystem_of(folder).locks_reach_others,
        )

    @classmethod
    def read(cls, fd: int) -> _Signature | None:
        try:
            fields = json.loads(os.pread(fd, _LONGEST, 0))
            found = cls(**{name: fields[name] for name in cls.__annotations__})
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        texts = (found.host, found.since, found.kernel)
        plain = all(isinstance(text, str) and text.isprintable() for text in texts)
        return found if plain and isinstance(found.pid, int) else None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def _running_kernel() -> str:
    """Host names are shared by machines and changed by containers; the id of the boot is neither."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


def _sign(fd: int, mine: _Signature) -> None:
    data = json.dumps(asdict(mine)).encode()
    write_at(fd, data, 0)
    # Not for nothing: a new file without hard links may meanwhile be signed by another process.
    if os.fstat(fd).st_size > len(data):
        os.ftruncate(fd, len(data))
    if not mine.locks_reach_others:
        sync_data(fd)  # to where the other machines read it


def _refuse_other_machines(found: _Signature | None, mine: _Signature, path: Path, store: Path) -> None:
    if mine.locks_reach_others and (found is None or found.locks_reach_others):
        return
    if found is None or found.kernel != mine.kernel:
        raise StoreLocked(
            f"{store} is being written by {found or 'an unnamed process'}, whose lock is not seen from here. "
            f"Wait until it ends; if it runs no more, delete {path} and run the same command again."
        )
