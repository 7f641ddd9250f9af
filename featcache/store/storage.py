"""The bytes below a store: a file mapped and read, and a file still in memory. Knows no structure."""

from __future__ import annotations

import errno
import io
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self

_PAGE = 1 << 16  # bytes


class ReadsInto(Protocol):
    """Bytes that can be read from a place."""

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill all of `target` from `offset` on. OSError where that cannot be."""


class MappedFile(mmap.mmap):
    """A file as it was found, whatever takes its name later: mapped for serving, and read for checking.

    A page that the disk cannot give kills a process that touches it in a map; `read_into` raises OSError.
    """

    _file: io.FileIO

    @classmethod
    def of(cls, fd: int) -> Self:
        """Map the open file; the caller keeps its own descriptor."""
        mapped = cls(fd, 0, access=mmap.ACCESS_READ)
        mapped._file = _KeptFile(os.dup(fd), "rb")
        return mapped

    def is_still(self, path: Path) -> bool:
        """Whether `path` leads to this very file."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Close it now, where nobody holds an array of it."""
        self._file.close()
        self.close()

    def read_into(self, target: memoryview, offset: int) -> None:
        if not 0 <= offset <= len(self) - len(target):
            raise OSError(f"the file ends at byte {len(self):,}")
        while target:
            got = os.preadv(self._file.fileno(), [target], offset)
            if not got:  # cut short since it was mapped
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            target, offset = target[got:], offset + got


class _KeptFile(io.FileIO):
    """Closed with the last array that uses the map, which nobody can close by hand: no warning is due."""

    def __del__(self) -> None:
        self.close()


class SparseBytes(io.RawIOBase):
    """A file in memory that costs only what was written to it; libhdf5 lays a store out in one.

    libhdf5 on a full disk can crash the process; in memory it cannot fail.
    """

    def __init__(self) -> None:
        self.size = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}

    def extents(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of all that was written, in order; the rest is zeros."""
        for number, page in sorted(self._pages.items()):
            yield number * _PAGE, bytes(page[: self.size - number * _PAGE])

    def read_into(self, target: memoryview, offset: int) -> None:
        for number, inside, part in _by_page(target, offset):
            page = self._pages.get(number)
            part[:] = bytes(len(part)) if page is None else page[inside : inside + len(part)]

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        for number, inside, part in _by_page(memoryview(data).cast("B"), offset):
            self._pages.setdefault(number, bytearray(_PAGE))[inside : inside + len(part)] = part
        self.size = max(self.size, offset + len(data))

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        self.read_into(memoryview(target).cast("B"), self._position)
        self._position += len(target)
        return len(target)

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        self.write_at(self._position, data)
        self._position += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size


def _by_page(view: memoryview, offset: int) -> Iterator[tuple[int, int, memoryview]]:
    """(page, offset within it, part of `view`) for a range that begins at `offset`."""
    while view:
        number, inside = divmod(offset, _PAGE)
        part = view[: _PAGE - inside]
        yield number, inside, part
        view, offset = view[len(part) :], offset + len(part)
