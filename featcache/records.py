"""What is known about one image, whoever asks: its record in a listing, its state in a store.

Knows nothing of decoding or HDF5; `images` makes records, `store` keeps them. What there is one of for every
image is a tuple: a frozen dataclass takes more than twice as long to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "val", "test")


class RowStatus(IntEnum):
    """The state of a row of a store. The numbers are part of the file format: never reuse one."""

    PENDING = 0
    OK = 1
    UNDECODABLE = 2
    MISSING = 3
    TOO_LARGE = 4
    NON_FINITE = 5
    CHANGED = 6  # the file changed while it was read
    UNREADABLE = 7  # no permission, not a regular file, or an I/O error
    TOO_SLOW = 8  # reading or decoding it took longer than an image may take

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")


class FileStat(NamedTuple):
    """What the file system says of a file; equal stats mean the bytes need not be read again.

    The inode tells two files apart that have all else in common and were exchanged by renaming their folders.
    """

    size: int  # bytes, -1 where there is no file
    mtime_ns: int
    ctime_ns: int
    inode: int

    def as_tuple(self) -> tuple[int, int, int, int]:
        """In the order of the columns of a store."""
        return self


NO_FILE = FileStat(size=-1, mtime_ns=0, ctime_ns=0, inode=0)


class ImageRecord(NamedTuple):
    """One image of a listing. `path` is its identity: relative to the root, POSIX, escaped to valid UTF-8."""

    path: str
    stat: FileStat
    label: str | None = None
    split: str | None = None  # one of SPLITS


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All images of a data set, sorted by path, with what the scan wants the user to know."""

    root: Path
    records: tuple[ImageRecord, ...]
    classes: tuple[str, ...]  # sorted; the label of row i is classes.index(label)
    notes: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()  # beginnings of the paths of images that could not be looked for
