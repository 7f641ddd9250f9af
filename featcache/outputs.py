"""Whether a file may be written where the user wants it, looked at before any work, and whose turn it is.

Knows stores and models by their first bytes, and what a writer makes by its first bytes or its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from featcache.disk import open_regular
from featcache.errors import DataError, DiskError, ModelError, StoreError
from featcache.images.paths import show_path
from featcache.model import begins_as_model
from featcache.store.files import begins_as_store

_BEGINNING = 4096  # bytes


def require_replaceable(path: Path, *, option: str, needed: Mapping[str, Path | None]) -> None:
    """Refuse a `path` where something would be lost, or that lies in no folder.

    option: which the user would choose another of. needed: {what it is, in words: file} of what the work
    reads. StoreError, ModelError, DataError: what would be replaced. DiskError: there is no folder.
    """
    _require_not_needed(path, option=option, needed=needed)
    _require_no_store(path, option=option)
    if begins_as_model(path):
        raise ModelError(
            f"{show_path(path)} is a model of featcache's, which would be replaced. Choose another {option}."
        )
    _require_place(path, option=option)


def require_model(path: Path, *, option: str, needed: Mapping[str, Path | None]) -> None:
    """Refuse a `path` for a model where anything but a model is, or beside it anything but its report.

    What is raised is as for `require_replaceable`.
    """
    _require_not_needed(path, option=option, needed=needed)
    report = path.with_name(f"{path.name}.json")
    for file, is_ours, what in ((path, begins_as_model, "model"), (report, _is_report, "report")):
        _require_no_store(file, option=option)
        _require_place(file, option=option)
        if _has_content(file) and not is_ours(file):
            raise _taken(file, f"no {what} of featcache's", option=option)


def require_csv(path: Path, header: str, *, option: str, needed: Mapping[str, Path | None]) -> None:
    """As `require_replaceable`, for a CSV: of files that are there, only one with this header is replaced.

    header: the line that a file to be written begins with. One that the user made is worth keeping.
    """
    require_replaceable(path, option=option, needed=needed)
    if _has_content(path) and not _begins_with(path, header.encode()):
        raise _taken(path, f"no CSV of this command's, which begins with {header.rstrip()}", option=option)


def require_own(path: Path, is_ours: Callable[[Path], bool], *, what: str, option: str) -> None:
    """DataError where a file that is there, and not empty, is none of those that featcache writes.

    what: they are, in words.
    """
    if _has_content(path) and not is_ours(path):
        raise _taken(path, f"no {what} of featcache's", option=option)


def require_exported(path: Path, card: Path, *, sign: str, option: str) -> None:
    """DataError where a file that is there has no card beside it, or where no card is what the card replaces.

    sign: words near the beginning of every card.
    """
    there = next((file for file in (path, card) if _has_content(file)), None)
    if there is not None and not _mentions(card, sign.encode()):
        raise _taken(there, f"no export of featcache's with its card {show_path(card)}", option=option)


def _taken(path: Path, what: str, *, option: str) -> DataError:
    return DataError(
        f"{show_path(path)} is there already and is {what}: it would be replaced. Choose another {option}."
    )


def _require_not_needed(path: Path, *, option: str, needed: Mapping[str, Path | None]) -> None:
    for what, file in needed.items():
        if file is not None and path.exists() and file.exists() and path.samefile(file):
            raise DataError(f"{show_path(path)} is {what}, which would be replaced. Choose another {option}.")


def _require_no_store(path: Path, *, option: str) -> None:
    if begins_as_store(path):
        raise StoreError(
            f"{show_path(path)} is a feature store, which would be replaced. Choose another {option}."
        )


def _require_place(path: Path, *, option: str) -> None:
    if path.is_dir():
        raise DiskError(f"{show_path(path)} is a folder. Name a file in it as {option}.")
    if not path.parent.is_dir():
        raise DiskError(
            f"{show_path(path)} cannot be written: there is no folder {show_path(path.parent)}. "
            f"Make the folder, or choose another {option}."
        )
    try:
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise DiskError(
            f"{show_path(path)} cannot be written: {error.strerror}. Choose another {option}."
        ) from error


def _has_content(path: Path) -> bool:
    """Whether something is there that is no empty file: a pipe or a device is no place for a file."""
    try:
        found = path.stat()
    except OSError:
        return False  # nothing is there, or writing will say what is wrong with it
    return found.st_size > 0 or not stat.S_ISREG(found.st_mode)


def _begins_with(path: Path, beginning: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def _mentions(path: Path, words: bytes) -> bool:
    try:
        with open_regular(path) as file:
            return words in file.read(_BEGINNING)
    except OSError:
        return False


def _is_report(path: Path) -> bool:
    """Whether a file is the report of `fit` or `finetune`, by the entries that both have."""
    try:
        with open_regular(path) as file:
            found = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"n_train", "scored_on", "notes"} <= found.keys()


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
