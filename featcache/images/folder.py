"""Images from a folder of class folders. Knows names and file stats; opens no image.

    root/cat/1.jpg  root/dog/deep/er/2.png              class = first folder
    root/train/cat/1.jpg  root/val/dog/2.png            the same below split folders

Images directly in the root or in a split folder have no label.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from featcache.errors import DataError
from featcache.images.labels import lookalikes, split_named
from featcache.images.paths import escape_path, show_path
from featcache.images.walk import Walk, counted, no_images
from featcache.records import FileStat, ImageRecord, Listing


def scan_folder(data: Path, *, root: Path | None = None, follow_links: bool = False) -> Listing:
    """Every image below the folder `data`, labelled by its class folder.

    Raises DataError when there are none, when split folders lie beside others that hold images, or when
    `root` is another folder than `data`.
    """
    if root is not None and os.path.realpath(root) != os.path.realpath(data):
        raise DataError(f"{show_path(data)} is a folder and its own root; another root is for CSV manifests")
    walk = Walk(follow_links=follow_links)
    found = list(walk.images(data))
    if not found:
        raise DataError(no_images(data, walk.notes()))
    folders = {_folder_of(path) for path, _ in found}
    with_splits = _has_splits(data, {folder.split(os.sep, 1)[0] for folder in folders if folder})
    meanings = {folder: _meaning(folder, with_splits=with_splits) for folder in folders}
    records = [_record(path, state, meanings[_folder_of(path)]) for path, state in found]
    records.sort(key=attrgetter("path"))
    classes = tuple(sorted({record.label for record in records if record.label is not None}))
    notes = (*walk.notes(), *_label_notes(records, classes))
    return Listing(
        root=data.absolute(),
        records=tuple(records),
        classes=classes,
        notes=notes,
        unlisted=tuple(escape_path(os.path.join(folder, "")) for folder in walk.unreadable),
    )


def find_images(paths: Sequence[Path], *, follow_links: bool = False) -> tuple[list[Path], list[str]]:
    """The images to predict, and notes: files as given, whatever their names; folders in depth, by extension.

    Raises DataError for a path that is not there, and when folders are given and no image is found at all.
    """
    images: list[Path] = []
    notes: list[str] = []
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{show_path(path)} is not there: give image files, or folders of images")
        if not os.path.isdir(path):
            images.append(path)
            continue
        walk = Walk(follow_links=follow_links)
        found = sorted(name for name, _ in walk.images(path))
        images += [path / name for name in found]
        notes += walk.notes() if found else [no_images(path, walk.notes())]
    if paths and not images:
        raise DataError("; ".join(notes))
    return images, notes


def _folder_of(path: str) -> str:
    """The relative path of the folder an image is in; "" for the root."""
    return path.rpartition(os.sep)[0]


def _meaning(folder: str, *, with_splits: bool) -> tuple[str | None, str | None]:
    """The label and the split of the images in a folder."""
    folders = folder.split(os.sep) if folder else []
    split = split_named(folders.pop(0)) if with_splits and folders else None
    return (escape_path(folders[0]) if folders else None), split


def _record(path: str, state: FileStat, meaning: tuple[str | None, str | None]) -> ImageRecord:
    label, split = meaning
    return ImageRecord(escape_path(path), state, label, split)


def _has_splits(data: Path, folders: set[str]) -> bool:
    """Whether the folders of the root that hold images are splits; DataError where only some of them are."""
    splits = sorted(name for name in folders if split_named(name))
    others = sorted(folders.difference(splits))
    if splits and others:
        raise DataError(
            f"{show_path(data)} has split folders ({_first(splits)}) beside others with images "
            f"({_first(others)}): move the others into a split folder or out of the data, rename a class "
            "named like a split, or list the images in a CSV manifest"
        )
    return bool(splits)


def _label_notes(records: Sequence[ImageRecord], classes: Sequence[str]) -> list[str]:
    notes = [
        f"the classes {', '.join(repr(name) for name in group)} differ only in case or white space; "
        "they are kept apart"
        for group in lookalikes(classes)
    ]
    bare = [record.path for record in records if record.label is None]
    if classes and bare:
        notes.append(f"{counted(bare, 'image', 'images')} outside the class folders: without a label")
    if not classes:
        notes.append("no class folders, so no image has a label: features can be made, but no head be fitted")
    return notes


def _first(names: Sequence[str], *, limit: int = 3) -> str:
    said = ", ".join(show_path(name) for name in names[:limit])
    return said if len(names) <= limit else f"{said}, and {len(names) - limit} more"
