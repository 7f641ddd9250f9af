"""A walk below a folder: which files are images by name, which links may be followed.

Knows names and file stats; opens no image, and knows nothing of classes or splits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featcache.errors import DataError
from featcache.images.identity import file_stat
from featcache.images.paths import is_inside, show_path
from featcache.records import NO_FILE, FileStat

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pnm"),
)
_KINDS_NAMED = 5  # extensions that a note of skipped files names


@dataclass(frozen=True, kw_only=True, slots=True)
class _Folder:
    """A folder still to be listed."""

    path: str  # as the system has it
    prefix: str  # relative to the root, with its separator; "" for the root
    chain: frozenset[tuple[int, int]]  # (device, inode) of the folder and all above it


@dataclass(kw_only=True)
class Walk:
    """One walk below a folder, and what it passed over on the way."""

    follow_links: bool
    skipped: Counter[str] = field(default_factory=Counter)  # by extension
    links_out: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def images(self, root: Path) -> Iterator[tuple[str, FileStat]]:
        """Each image by name: its path relative to `root`, and its stat. In no order."""
        real_root = os.path.realpath(root)
        top = _Folder(path=os.fspath(root), prefix="", chain=frozenset([_device_inode(os.stat(root))]))
        folders = [top]
        while folders:
            folder = folders.pop()
            for entry in self._entries(folder):
                name = entry.name
                if name.startswith(".") or name == "__MACOSX":
                    continue
                is_link = entry.is_symlink()
                if _is_folder(entry):
                    below = self._below(folder, entry, is_link=is_link, real_root=real_root)
                    if below is not None:
                        folders.append(below)
                elif not _is_image_name(name):
                    self.skipped[os.path.splitext(name)[1].lower()] += 1
                elif is_link and self._leads_out(entry, real_root):
                    self.links_out.append(folder.prefix + name)
                else:
                    yield folder.prefix + name, _entry_stat(entry)

    def notes(self) -> list[str]:
        """What the user should know of what was passed over, one line each."""
        notes = []
        if self.skipped:
            count = self.skipped.total()
            is_are = "file that is not an image" if count == 1 else "files that are not images"
            notes.append(f"skipped {count:,} {is_are} by name: {_kinds(self.skipped)}")
        if self.links_out:
            said = counted(self.links_out, "link out of the folder", "links out of the folder")
            notes.append(f"{said} not followed; --follow-links follows them")
        if self.loops:
            said = counted(self.loops, "link back to a folder above", "links back to a folder above")
            notes.append(f"{said} not followed")
        if self.unreadable:
            notes.append(f"{counted(self.unreadable, 'folder', 'folders')} could not be read and left out")
        return notes

    def _entries(self, folder: _Folder) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder.path) as entries:
                return list(entries)
        except OSError as error:
            if not folder.prefix:
                raise DataError(f"{show_path(folder.path)} cannot be listed: {error.strerror}") from error
            self.unreadable.append(folder.prefix)
            return []

    def _below(
        self, folder: _Folder, entry: os.DirEntry[str], *, is_link: bool, real_root: str
    ) -> _Folder | None:
        relative = folder.prefix + entry.name
        if is_link and self._leads_out(entry, real_root):
            self.links_out.append(relative)
            return None
        try:
            here = _device_inode(entry.stat())
        except OSError:
            self.unreadable.append(relative)
            return None
        if here in folder.chain:
            self.loops.append(relative)
            return None
        return _Folder(path=entry.path, prefix=relative + os.sep, chain=folder.chain | {here})

    def _leads_out(self, entry: os.DirEntry[str], real_root: str) -> bool:
        return not self.follow_links and not is_inside(os.path.realpath(entry.path), real_root)


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points at itself
        return False


def _entry_stat(entry: os.DirEntry[str]) -> FileStat:
    try:
        return file_stat(entry.stat())
    except OSError:  # a broken link, or gone since it was listed: the row will say so
        return NO_FILE


def _device_inode(result: os.stat_result) -> tuple[int, int]:
    return result.st_dev, result.st_ino


def no_images(data: Path, notes: Sequence[str]) -> str:
    """The message for a folder below which there is no image."""
    looked_for = f"no images under {show_path(data)}: looked for files ending in {' '.join(EXTENSIONS)}"
    return "; ".join([looked_for, *notes])


def counted(paths: Sequence[str], one: str, many: str) -> str:
    """`3 links (first: a/b.jpg)`, the first in the order of the paths."""
    return f"{len(paths):,} {one if len(paths) == 1 else many} (first: {show_path(min(paths))})"


def _kinds(skipped: Counter[str]) -> str:
    ranked = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    said = [f"{count:,} {show_path(kind) or 'without extension'}" for kind, count in ranked[:_KINDS_NAMED]]
    rest = sum(count for _, count in ranked[_KINDS_NAMED:])
    return ", ".join([*said, f"{rest:,} of other kinds"] if rest else said)
