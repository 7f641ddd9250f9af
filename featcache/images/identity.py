"""What an image file is: its bytes, their sha256, and its stat, read so that the three belong together.

Knows files, not pictures.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from featcache.records import NO_FILE, FileStat, RowStatus

MAX_FILE_BYTES = 1 << 30
TICK_NS = 20_000_000  # Linux stamps files to the last tick, 10 ms apart at the slowest setting

# A named pipe without a writer would block an ordinary open for ever.
_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True)
class ImageFailure:
    """Why an image has no features: the state of its row and one short line for the report."""

    status: RowStatus
    reason: str
    stat: FileStat
    sha256: bytes | None = None  # of the bytes read, 32 bytes; None where they could not be read


@dataclass(frozen=True, kw_only=True)
class ImageIdentity:
    """The bytes of an image file, named."""

    sha256: bytes  # 32 bytes
    stat: FileStat


@dataclass(frozen=True, kw_only=True)
class ImageBytes:
    """An image file as it was in one moment."""

    data: bytes = field(repr=False)
    sha256: bytes  # of `data`, 32 bytes
    stat: FileStat


def hash_image(path: str | Path) -> ImageIdentity | ImageFailure:
    """The identity of the file at `path`. A file that cannot be read is an answer, not an exception."""
    read = read_image(path)
    return read if isinstance(read, ImageFailure) else ImageIdentity(sha256=read.sha256, stat=read.stat)


def read_image(path: str | Path) -> ImageBytes | ImageFailure:
    """All bytes of the regular file at `path`, unless it changes while it is read. Follows links."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return ImageFailure(status=RowStatus.MISSING, reason="the file is not there", stat=NO_FILE)
    except OSError as error:
        return _unreadable(error)
    try:
        return _read(descriptor)
    except OSError as error:
        return _unreadable(error)
    finally:
        os.close(descriptor)


def file_stat(result: os.stat_result) -> FileStat:
    """The part of a stat that tells whether a file is still the same."""
    return FileStat(
        size=result.st_size,
        mtime_ns=_int64(result.st_mtime_ns),
        ctime_ns=_int64(result.st_ctime_ns),
        inode=_int64(result.st_ino),
    )


def _int64(value: int) -> int:
    """As a store keeps it; a file may be dated later than 2262."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _read(descriptor: int) -> ImageBytes | ImageFailure:
    opened = os.fstat(descriptor)
    before = file_stat(opened)
    if not stat.S_ISREG(opened.st_mode):
        return ImageFailure(status=RowStatus.UNREADABLE, reason="not a regular file", stat=before)
    if before.size > MAX_FILE_BYTES:
        reason = f"a file of {before.size:,} bytes; the limit is {MAX_FILE_BYTES:,}"
        return ImageFailure(status=RowStatus.TOO_LARGE, reason=reason, stat=before)
    _let_tick_pass(before)
    data = _read_all(descriptor, before.size)
    after = file_stat(os.fstat(descriptor))
    sha256 = hashlib.sha256(data).digest()
    if before != after or len(data) != after.size:
        reason = "the file changed while it was read"
        return ImageFailure(status=RowStatus.CHANGED, reason=reason, stat=after, sha256=sha256)
    return ImageBytes(data=data, sha256=sha256, stat=after)


def _let_tick_pass(stamped: FileStat) -> None:
    """Wait until a later write would get another time stamp than the one about to be recorded.

    Stamps move with a clock that ticks: an edit within the tick that keeps the size would never be seen.
    """
    age = time.time_ns() - max(stamped.mtime_ns, stamped.ctime_ns)
    if 0 <= age < TICK_NS:
        time.sleep((TICK_NS - age) / 1e9)


def _read_all(descriptor: int, size: int) -> bytes:
    """The `size` bytes of a file, fewer where it ends early, one more where it goes on."""
    data = os.read(descriptor, size + 1)
    if len(data) in (0, size):
        return data
    parts = [data]  # a network file system may hand over less than was asked for
    left = size + 1 - len(data)
    while left > 0 and (part := os.read(descriptor, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _unreadable(error: OSError) -> ImageFailure:
    # Opening a socket, or a device that has no driver, is ENXIO.
    reason = "not a regular file" if error.errno == errno.ENXIO else f"cannot be read: {error.strerror}"
    return ImageFailure(status=RowStatus.UNREADABLE, reason=reason, stat=NO_FILE)
