"""Writing so that a crash leaves the old file or the new one, and so that a failure is one line.

Every call that changes a store or a model is made here: a crash or a failing disk strikes at one of these.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from featcache.errors import DiskError

_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.ENOENT: "make the folder",
    errno.EACCES: "allow writing there",
    errno.EPERM: "allow writing there",
}


class NotARegularFile(OSError):
    """A folder, a pipe, a device: what is no file of ours."""

    strerror = "it is not a regular file"


@contextmanager
def disk_errors(path: Path, *, doing: str) -> Iterator[None]:
    """Turn an OSError into the one line a user needs."""
    try:
        yield
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else str(exc)
        raise DiskError(
            f"{doing} {path} failed: {reason}. What was acknowledged is kept; "
            f"{_REMEDIES.get(exc.errno or 0, 'mend that')} or choose another --output, "
            "then run the same command again."
        ) from exc


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the disk into one line; one without a number is about the file and goes on."""
    try:
        yield
    except OSError as exc:
        if exc.errno is None:
            raise
        raise DiskError(
            f"reading {path} failed: {os.strerror(exc.errno)}. Mend that, then run the same command again."
        ) from exc


def open_regular(path: Path) -> FileIO:
    """Open a file for reading. NotARegularFile, or another OSError where it cannot be read.

    Whoever hands over a pipe, a device or a folder must not make us wait, or read for ever.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ELOOP):  # a socket or a device without driver; a link to itself
            raise NotARegularFile from exc
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotARegularFile
        return FileIO(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def keep_standard_streams() -> None:
    """Occupy the descriptors 0 to 2, should they be closed.

    A file of ours would get their numbers, and what some library then writes to its stderr would land in it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def create_whole(path: Path, size: int, extents: Iterable[tuple[int, bytes]], *, temporary: Path) -> None:
    """Write a file of `size` bytes, zeros but for `extents` of (offset, bytes), then give it its name.

    Its disk space is taken before anything is written, where the file system can do that. Until it is whole
    it is called `temporary`; one of that name, left by a kill, is removed.
    """
    temporary.unlink(missing_ok=True)
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            take_space(fd, size)
            for offset, data in extents:
                write_at(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)
        replace_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def take_space(fd: int, size: int) -> None:
    """Reserve the whole file, so that a full disk is met here and not in the middle of the run."""
    os.ftruncate(fd, size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as exc:
        # Some file systems cannot reserve. A full disk is met at a later write then, as a clean error too.
        if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def write_at(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of `data` at `offset`; the number of bytes."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(fd, left, offset)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left, offset = left[written:], offset + written
    return len(data)


def sync_data(fd: int) -> None:
    """Return once what was written to the file survives a power cut."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def sync_file(path: Path) -> None:
    """Return once the file and its name survive a power cut, whoever wrote them."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(path.parent)


def replace_durably(source: Path, target: Path) -> None:
    """Give `source` the name `target` in one step that survives a power cut once this returns."""
    os.replace(source, target)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending; what is written there gets the name at the end.

    After an exception nothing new is left, and what had the name keeps it. DiskError: it cannot be given.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with disk_errors(path, doing="writing"):
            sync_file(temporary)
            replace_durably(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is the old file or the new one, whole, whatever happens. DiskError."""
    # A name of its own: nothing keeps two processes from writing the same file, and the last one wins.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with disk_errors(path, doing="writing"):
        create_whole(path, len(data), [(0, data)], temporary=temporary)
