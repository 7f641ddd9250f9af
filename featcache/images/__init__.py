"""Images: found by a source, identified by their bytes, decoded to the pixels a backbone expects.

A source is one way to say which images there are. A new one is a module with its `scan` and a row here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from featcache.errors import DataError
from featcache.images.folder import find_images, scan_folder
from featcache.images.manifest import scan_manifest
from featcache.images.paths import show_path
from featcache.records import Listing

__all__ = ["SOURCES", "Scan", "Source", "find_images", "scan_images"]


class Scan(Protocol):
    """Lists the images of a data set; DataError when it holds none or is not what it should be."""

    def __call__(self, data: Path, *, root: Path | None = None, follow_links: bool = False) -> Listing: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """One way to say which images there are."""

    name: str
    form: str  # what the user gives, in words
    accepts: Callable[[Path], bool]
    scan: Scan


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv" and os.path.isfile(path)


SOURCES = (
    Source(name="folder", form="a folder of class folders", accepts=os.path.isdir, scan=scan_folder),
    Source(name="csv", form="a .csv manifest with path,label[,split]", accepts=_is_csv, scan=scan_manifest),
)


def scan_images(data: Path, *, root: Path | None = None, follow_links: bool = False) -> Listing:
    """All images of the data set `data`, by the first source that accepts it.

    `root` is what the paths of a manifest are relative to, its own folder unless given. Links that lead out
    of the root are followed only with `follow_links`. Raises DataError, or ManifestError for bad lines.
    """
    for source in SOURCES:
        if source.accepts(data):
            return source.scan(data, root=root, follow_links=follow_links)
    try:
        os.stat(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{show_path(data)} is not there{_nearest(data)}") from error
    except OSError as error:
        raise DataError(f"{show_path(data)} cannot be read: {error.strerror}") from error
    raise DataError(f"{show_path(data)} is not {' or '.join(source.form for source in SOURCES)}")


def _nearest(path: Path) -> str:
    """Where a path that is not there stops being right, and what was perhaps meant."""
    absolute = path.absolute()
    missing = absolute
    while not os.path.exists(missing.parent):
        missing = missing.parent
    parent = missing.parent
    try:
        names = os.listdir(parent)
    except OSError:
        names = []
    close = difflib.get_close_matches(missing.name, names, n=1)
    if close:
        return f"; did you mean {show_path(parent / close[0])}?"
    return f"; {show_path(parent)} is, and has no {show_path(missing.name)}"
