"""Whether a file may be written where the user wants it, looked at before any work, and whose turn it is.

Knows stores and models by their first bytes, and what a writer makes by its first bytes or its name.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from featcache.disk import open_regular
from featcache.errors import DataError, DiskError, ModelError, StoreError
from featcache.images.paths import show_path
from featcache.model import begins_as_model
from featcache.store.files import begins_as_store


def require_replaceable(path: Path, *, option: str, needed: Mapping[str, Path | None]) -> None:
    """Refuse a `path` where something would be lost, or that lies in no folder.

    option: which the user would choose another of. needed: {what it is, in words: file} of what the work
    reads. StoreError, ModelError, DataError: what would be replaced. DiskError: there is no folder.
    """
    end = f"which would be replaced. Choose another {option}."
    for what, file in needed.items():
        if file is not None and path.exists() and file.exists() and path.samefile(file):
            raise DataError(f"{show_path(path)} is {what}, {end}")
    if begins_as_store(path):
        raise StoreError(f"{show_path(path)} is a feature store, {end}")
    if begins_as_model(path):
        raise ModelError(f"{show_path(path)} is a model of featcache's, {end}")
    if not path.parent.is_dir():
        raise DiskError(
            f"{show_path(path)} cannot be written: there is no folder {show_path(path.parent)}. "
            f"Make the folder, or choose another {option}."
        )


def require_csv(path: Path, *, option: str, needed: Mapping[str, Path | None]) -> None:
    """As `require_replaceable`, for a CSV: of files that are there, only one of that name is replaced.

    A photograph or a report that is named by mistake begins as anything, and a CSV as anything too.
    """
    require_replaceable(path, option=option, needed=needed)
    if path.is_dir():
        raise DiskError(f"{show_path(path)} is a folder. Name a file in it as {option}.")
    if path.exists() and path.suffix.lower() != ".csv":
        raise DataError(
            f"{show_path(path)} is there already and is no .csv file: it would be replaced. Choose another "
            f"{option}."
        )


def require_beginning(path: Path, beginning: bytes, *, option: str) -> None:
    """DataError where a file that is there, and not empty, begins otherwise than what is to replace it."""
    try:
        with open_regular(path) as file:
            found = file.read(len(beginning))
    except OSError:
        return  # nothing is there, or writing will say what is wrong with it
    if found not in (b"", beginning):
        raise DataError(
            f"{show_path(path)} is there already and is no {path.suffix} file, whatever its name: it would "
            f"be replaced. Choose another {option}."
        )


@contextmanager
def turn_in(folder: Path) -> Iterator[None]:
    """Wait until nobody else is here, so that files that belong together get their names together.

    Where the file system has no locks, nobody waits.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
