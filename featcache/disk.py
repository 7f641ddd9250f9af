"""Writing so that a crash leaves the old file or the new one, and so that a failure is one line."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featcache.errors import DiskError

_REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.ENOENT: "make the folder",
    errno.EACCES: "allow writing there",
    errno.EPERM: "allow writing there",
}


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


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is the old file or the new one, whole, whatever happens. DiskError."""
    temporary: str | None = None
    with disk_errors(path, doing="writing"):
        try:
            fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(fd, "wb") as file:
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            temporary = None
            sync_directory(path.parent)
        finally:
            if temporary is not None:
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
