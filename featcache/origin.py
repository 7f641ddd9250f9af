"""Where the images of a store are: below the folder it records, or the one named now. Opens no image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.errors import DataError
from featcache.images.paths import is_inside, resolve, show_path
from featcache.store.reader import FeatureStore


def describe_origin(data: Path, root: Path | None, *, follow_links: bool) -> dict[str, Any]:
    """What a store's provenance says of it, with absolute paths."""
    return {
        "path": str(data.absolute()),
        "root": None if root is None else str(root.absolute()),
        "follow_links": follow_links,
    }


def recorded_origin(store: FeatureStore) -> Mapping[str, Any] | None:
    """What `describe_origin` gave when the store was made; None where the store does not say it."""
    found = store.provenance.get("data")
    if not isinstance(found, Mapping) or not isinstance(found.get("path"), str):
        return None
    return found if isinstance(found.get("root"), str | None) else None


def follows_links(store: FeatureStore) -> bool:
    """Whether links that lead out of the root were followed when the store was made."""
    return (recorded_origin(store) or {}).get("follow_links") is True


def find_origin(
    store: FeatureStore,
    *,
    data: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Where the images are: as the store records it, or at `data` where that is given.

    DataError: nothing is recorded or given, or what is, is not there.
    """
    recorded = recorded_origin(store) or {}
    if data is None and not recorded:
        raise DataError(
            f"{show_path(store.path)} does not say where its images are: pass --data DATA, the folder or CSV "
            "they were embedded from."
        )
    if root is None and data is None:
        root = recorded.get("root")
    origin = describe_origin(
        Path(recorded["path"] if data is None else data),
        None if root is None else Path(root),
        follow_links=follows_links(store),
    )
    if not os.path.isdir(_root_of(origin)):
        were, remedy = "were", "Pass where they are now as --data DATA."
        if data is not None or root is not None:
            were, remedy = "should be", "Give the folder they are in, or the CSV that lists them."
        raise DataError(
            f"{show_path(store.path)}: its images {were} in {show_path(_root_of(origin))}, which is not "
            f"there. {remedy}"
        )
    return origin


def find_root(
    store: FeatureStore,
    *,
    data: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder that the store's ids are relative to; see `find_origin`."""
    return _root_of(find_origin(store, data=data, root=root))


def _root_of(origin: Mapping[str, Any]) -> Path:
    if origin["root"] is not None:
        return Path(origin["root"])
    path = Path(origin["path"])
    is_manifest = path.suffix.lower() == ".csv" and not path.is_dir()
    return path.parent if is_manifest else path


def image_file(root: Path, path: str, *, follow_links: bool) -> Path:
    """The file of a row, by its id; DataError when the id or a link leads out of `root`.

    A store is not trusted to name files: what its ids lead to is what a scan of `root` could have found.
    """
    try:
        file = resolve(root, path)
        inside = is_inside(os.path.normpath(file), os.path.normpath(root))
        if inside and not follow_links:
            inside = is_inside(os.path.realpath(file), os.path.realpath(root))
    except ValueError as exc:
        raise DataError(f"{show_path(path)} is no path of a file: its image is not read.") from exc
    if not inside:
        raise DataError(f"{show_path(path)} leads out of {show_path(root)}: its image is not read.")
    return file
