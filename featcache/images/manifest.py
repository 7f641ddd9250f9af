"""Images from a CSV manifest with the columns path, label and, where wanted, split. Opens no image.

    path,label,split
    cats/1.jpg,cat,train
    unknown/2.jpg,,

UTF-8, with or without a byte order mark. Paths are relative to the folder of the CSV, or to another root,
with `/` between folders and `\\\\` and `\\xNN` as `images.paths` has them. All bad lines are gathered and
refused together, before any image is touched.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featcache.errors import DataError, ManifestError
from featcache.images.identity import file_stat
from featcache.images.labels import lookalikes, split_named
from featcache.images.paths import escape_path, is_inside, show_path, unescape_path
from featcache.records import NO_FILE, SPLITS, FileStat, ImageRecord, Listing

_NEEDED = ("path", "label")
_COLUMNS = (*_NEEDED, "split")
_EXPECTED = "the first line is path,label or path,label,split"
_LINES_NAMED = 5  # bad lines that the error shows


class _BadLine(ValueError):
    """One line of a manifest cannot be used; says why."""


def scan_manifest(data: Path, *, root: Path | None = None, follow_links: bool = False) -> Listing:
    """The images that the CSV `data` lists. One that is not on disk stays in, with the stat `NO_FILE`.

    Raises ManifestError for bad lines, all of them at once, and for a file that is no such CSV; DataError
    when the file cannot be read or `root` is no folder.
    """
    folder = data.parent if root is None else root
    if not os.path.isdir(folder):
        raise DataError(f"the root {show_path(folder)} is not a folder")
    manifest = _Manifest(data=data, files=_Files(folder, follow_links=follow_links))
    header, lines = _read_lines(manifest)
    for number, cells in lines:
        manifest.add(number, header, cells)
    manifest.check_labels()
    if manifest.bad:
        raise ManifestError(manifest.describe_bad())
    if not manifest.records:
        raise ManifestError(f"{show_path(data)} lists no images: there is nothing below its header")
    records = sorted(manifest.records.values(), key=lambda record: record.path)
    classes = tuple(sorted({record.label for record in records if record.label is not None}))
    return Listing(
        root=folder.absolute(), records=tuple(records), classes=classes, notes=_header_notes(data, header)
    )


class _Files:
    """The files below a root: their stats, and whether a link takes them out of it."""

    def __init__(self, root: Path, *, follow_links: bool) -> None:
        self._root = os.fspath(root)
        self._real_root = os.path.realpath(root)
        self._follow_links = follow_links
        self._real_folders: dict[str, str] = {}

    def stat(self, path: str) -> FileStat:
        """The stat of the file at a relative path, or NO_FILE; _BadLine when it lies outside the root."""
        full = os.path.join(self._root, path)
        try:
            found = os.lstat(full)
            is_link = stat.S_ISLNK(found.st_mode)
        except OSError:
            found, is_link = None, False
        if not self._follow_links and not is_inside(self._real_path(full, is_link=is_link), self._real_root):
            raise _BadLine("a link leads out of the root; --follow-links follows it")
        try:
            return file_stat(os.stat(full) if is_link or found is None else found)
        except OSError:
            return NO_FILE

    def _real_path(self, full: str, *, is_link: bool) -> str:
        if is_link:
            return os.path.realpath(full)
        folder, name = os.path.split(full)
        if folder not in self._real_folders:  # once a folder: it costs a system call for each level
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], name)


@dataclass(kw_only=True)
class _Manifest:
    """The lines read so far, good and bad."""

    data: Path
    files: _Files
    records: dict[str, ImageRecord] = field(default_factory=dict)  # by path
    lines: dict[str, int] = field(default_factory=dict)  # by path: the line that named it first
    labelled: list[tuple[int, str]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, header: Sequence[str], cells: Sequence[str]) -> None:
        try:
            row = _row(header, cells)
            if row["label"]:
                self.labelled.append((number, row["label"]))
            self._add_record(number, row)
        except _BadLine as error:
            self.bad.append((number, str(error)))

    def _add_record(self, number: int, row: Mapping[str, str]) -> None:
        relative = _relative_path(row["path"])
        path = escape_path(relative)
        if path in self.lines:
            raise _BadLine(f"path {_quoted(path)} is on line {self.lines[path]} already")
        self.lines[path] = number
        self.records[path] = ImageRecord(
            path=path,
            stat=self.files.stat(relative),
            label=_label(row["label"]),
            split=_split(row.get("split", "")),
        )

    def check_labels(self) -> None:
        """Of labels that look alike the most frequent is right, the first if equal; others are bad."""
        counts = Counter(label for _, label in self.labelled)
        meant: dict[str, str] = {}
        for group in lookalikes(counts):
            right = max(group, key=lambda label: counts[label])
            meant |= {label: right for label in group if label != right}
        self.bad += [
            (number, f"unknown class {_quoted(label)} (did you mean {_quoted(meant[label])}?)")
            for number, label in self.labelled
            if label in meant
        ]

    def describe_bad(self) -> str:
        self.bad.sort()
        count = "1 bad line" if len(self.bad) == 1 else f"{len(self.bad):,} bad lines"
        said = [f"line {number}: {reason}" for number, reason in self.bad[:_LINES_NAMED]]
        if len(self.bad) > _LINES_NAMED:
            said.append(f"and {len(self.bad) - _LINES_NAMED:,} more")
        return "\n  ".join([f"{show_path(self.data)} has {count}; nothing was read from it:", *said])


def _read_lines(manifest: _Manifest) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header, and each further line that is not blank with its number, counted from 1."""
    try:
        raw = manifest.data.read_bytes()
    except OSError as error:
        raise DataError(f"{show_path(manifest.data)} cannot be read: {error.strerror}") from error
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ManifestError(f"{show_path(manifest.data)} is UTF-16: save it as UTF-8")
    # Bytes that are not UTF-8 become surrogates here, so that every bad line can be named.
    text = io.StringIO(raw.decode("utf-8-sig", errors="surrogateescape"), newline="")
    lines = _numbered(text, manifest.bad)
    number, header = next(lines, (1, []))
    if not header:
        raise ManifestError(f"{show_path(manifest.data)} is empty: {_EXPECTED}")
    missing = [name for name in _NEEDED if name not in header]
    twice = [name for name in _COLUMNS if header.count(name) > 1]
    if missing or twice:
        problem = f"no column {_names(missing)}" if missing else f"the column {_names(twice)} twice"
        raise ManifestError(
            f"{show_path(manifest.data)} has {problem}: line {number} names {_names(header)}; {_EXPECTED}"
        )
    return header, lines


def _numbered(text: io.StringIO, bad: list[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(text, strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:  # an open quote: where the next line begins is anyone's guess
        bad.append((number, f"not CSV from here on: {error}"))


def _row(header: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise _BadLine(f"{len(cells)} fields, the header has {len(header)}")
    if not all(map(_is_utf8, cells)):
        raise _BadLine("not UTF-8")
    return {name: cell for name, cell in zip(header, cells, strict=True) if name in _COLUMNS}


def _is_utf8(cell: str) -> bool:
    return cell.isascii() or not any("\udc80" <= character <= "\udcff" for character in cell)


def _relative_path(text: str) -> str:
    """The path below the root, as the system has it, without `.` and `..`."""
    if not text:
        raise _BadLine("the path is empty")
    try:
        raw = unescape_path(text)
    except ValueError as error:
        raise _BadLine(
            f"path {_quoted(text)} has a backslash: write / between folders, \\\\ for a real backslash"
        ) from error
    if "\0" in raw:
        raise _BadLine(f"path {_quoted(text)} has a zero byte")
    if posixpath.isabs(raw):
        raise _BadLine(f"path {_quoted(text)} is absolute; paths are relative to the root")
    path = posixpath.normpath(raw)
    if path.split("/", 1)[0] == "..":
        raise _BadLine(f"path {_quoted(text)} leads out of the root")
    return path


def _label(text: str) -> str | None:
    if "\0" in text:
        raise _BadLine("the label holds a NUL byte, which no class name can")
    if text and not text.strip():
        raise _BadLine("the label is only white space; leave it empty for an image without one")
    return text or None


def _split(text: str) -> str | None:
    split = split_named(text)
    if text and split is None:
        raise _BadLine(f"unknown split {_quoted(text)} (expected {', '.join(SPLITS)} or nothing)")
    return split


def _header_notes(data: Path, header: Sequence[str]) -> tuple[str, ...]:
    extra = [name for name in header if name not in _COLUMNS]
    return (f"ignored in {show_path(data)}: {_names(extra)}",) if extra else ()


def _names(names: Sequence[str]) -> str:
    return ", ".join(_quoted(name) for name in names) or "nothing"


def _quoted(text: str) -> str:
    return f"'{show_path(text)}'"
