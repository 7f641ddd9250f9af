"""Rows that belong together, so that no group is on both sides of a split: one series, patient, near-copies.

Knows paths as ids, CSV files and vectors; of labels only whether there is one.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from featcache.errors import HeadError
from featcache.evaluate.splits import Groups
from featcache.images.paths import show_path
from featcache.progress import Progress, SilentProgress
from featcache.store.features import FeatureSet
from featcache.words import name_some, plural, show_text

FOLDER, SIMILAR = "folder", "similar"
COSINE = 0.97  # from which images count as similar
NEARLY_ALL = 0.95  # of the rows in one group: similarity tells nothing there
BLOCK = 1024  # rows whose similarities are held at a time: 4 MB, and 70 MB where all are alike
_NAMED = 3  # ids that an error shows


def find_groups(by: str, features: FeatureSet, *, progress: Progress | None = None) -> Groups:
    """The groups of the rows by one of these.

    `folder`: the folder an image lies in. `folder:N`: the N-th folder of its path, from 1.
    `FILE.csv:COLUMN`: what that column says of the path in the column `path`. `similar`, or `similar:0.97`:
    images whose features have that cosine at least, and what these tie together. A row without a label that
    has no place in it is a group of its own.
    HeadError: there is no such grouping of these images.
    """
    kind, _, detail = by.partition(":")
    if kind == FOLDER:
        return _by_name(_folders(features, detail), features.ids, by=by)
    if kind == SIMILAR:
        return _similar(features, _cosine(detail), by=by, progress=progress or SilentProgress())
    path, colon, column = by.rpartition(":")
    if colon and path.lower().endswith(".csv"):
        return _by_name(_column(features, Path(path), column.strip()), features.ids, by=by)
    raise HeadError(
        f"there is no grouping by {show_text(by)}. Group by folder, folder:N, FILE.csv:COLUMN, similar or "
        f"similar:{COSINE}."
    )


def _by_name(names: Sequence[str | None], ids: Sequence[str], *, by: str) -> Groups:
    own = [f"\0{path}" if name is None else name for name, path in zip(names, ids, strict=True)]
    distinct, index = np.unique(np.array(own, dtype=object), return_inverse=True)
    digests = b"".join(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in distinct)
    keys = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
    return Groups(index=index.astype(np.int64), keys=keys, by=by)


def _folders(features: FeatureSet, which: str) -> list[str | None]:
    ids = features.ids
    if not which:
        return [str(PurePosixPath(path).parent) for path in ids]
    if not which.isdecimal() or int(which) < 1:
        raise HeadError(f"folder:N counts the folders of a path from 1, not {show_text(which)}.")
    level = int(which)
    parts = [PurePosixPath(path).parts[:-1] for path in ids]
    _refuse(
        [ids[row] for row in np.flatnonzero(features.y >= 0) if len(parts[row]) < level],
        why=(f"lies in fewer than {plural(level, 'folder')}", f"lie in fewer than {plural(level, 'folder')}"),
        then="Group by a folder that all images have.",
    )
    # By its name alone: one patient under several classes is one group.
    return [folders[level - 1] if len(folders) >= level else None for folders in parts]


def _column(features: FeatureSet, path: Path, column: str) -> list[str | None]:
    if not column:
        raise HeadError(f"no column of {show_path(path)} is named. Group by {show_path(path)}:COLUMN.")
    found = _read_column(path, column)
    labelled = [features.ids[row] for row in np.flatnonzero(features.y >= 0)]
    _refuse(
        [name for name in labelled if len(found[name]) > 1],
        why=_has(f"several {show_text(column)} in {show_path(path)}"),
        then="Give every path one row, or the same value in all of them.",
    )
    _refuse(
        [name for name in labelled if not found[name]],
        why=_has(f"no {show_text(column)} in {show_path(path)}"),
        then="Its column path holds paths as the store has them, from the folder that was embedded.",
    )
    return [next(iter(found[name])) if len(found[name]) == 1 else None for name in features.ids]


def _read_column(path: Path, column: str) -> Mapping[str, set[str]]:
    """What the column says of each path: nothing, a value or several."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            missing = [name for name in ("path", column) if name not in header]
            if missing:
                raise HeadError(
                    f"{show_path(path)} has no column {show_text(missing[0])}; it has "
                    f"{', '.join(map(show_text, header)) or 'none'}."
                )
            for row in reader:
                if value := (row[column] or "").strip():
                    found[os.path.normpath(row["path"] or "")].add(value)
            return found
    except OSError as error:
        raise HeadError(f"{show_path(path)} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise HeadError(f"{show_path(path)} is not a CSV in UTF-8: {error}.") from error


def _has(what: str) -> tuple[str, str]:
    return f"has {what}", f"have {what}"


def _refuse(ids: Sequence[str], *, why: tuple[str, str], then: str) -> None:
    """HeadError where there are any. why: of one image, and of several."""
    if ids:
        said = f"{plural(len(ids), 'image')} {why[0] if len(ids) == 1 else why[1]}"
        raise HeadError(f"{said}: {name_some(ids, limit=_NAMED)}. {then}")


def _cosine(text: str) -> float:
    try:
        value = float(text) if text else COSINE
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise HeadError(f"similar:COSINE is a number between 0 and 1, not {show_text(text)}.")
    return value


def say_alike(groups: Groups) -> str:
    """What to know of groups by similarity of which one holds nearly all rows; "" where none does."""
    sizes = np.bincount(groups.index)
    if groups.by.partition(":")[0] != SIMILAR or sizes.max(initial=0) < NEARLY_ALL * len(groups.index):
        return ""
    return (
        f"{groups.by} finds {sizes.max():,} of the {len(groups.index):,} rows alike: these features do not "
        "tell the images apart. Embed with trained weights, or group by a higher cosine or by folders"
    )


def _similar(features: FeatureSet, least: float, *, by: str, progress: Progress) -> Groups:
    """Connected components of the graph of similar images; a group is told by its lowest digest."""
    unit = _unit_rows(features.X)
    n = len(unit)
    index = np.arange(n)  # the part of each row so far
    starts = range(0, n, BLOCK)
    progress.start("comparing images", total=len(starts), unit="blocks")
    for start in starts:
        rows = unit[start : start + BLOCK]
        for other in range(start, n, BLOCK):
            first, second = np.nonzero(rows @ unit[other : other + BLOCK].T >= least)
            index = _merge(index, index[first + start], index[second + other])
        progress.advance(1)
    progress.finish()
    _, index = np.unique(index, return_inverse=True)
    count = int(index.max(initial=-1)) + 1
    order = np.argsort(np.ascontiguousarray(features.sha256).view("V32").ravel(), kind="stable")
    lowest = np.empty(count, dtype=np.int64)
    lowest[index[order[::-1]]] = order[::-1]
    return Groups(index=index.astype(np.int64), keys=features.sha256[lowest], by=by)


def _merge(index: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """`index` with the parts `one` and `other`, pair by pair, made one."""
    apart = one != other
    if not apart.any():
        return index
    n = len(index)
    ties = coo_array((np.ones(int(apart.sum()), dtype=bool), (one[apart], other[apart])), shape=(n, n))
    merged: NDArray[np.int64] = connected_components(ties, directed=False)[1].astype(np.int64)[index]
    return merged


def _unit_rows(X: NDArray[Any]) -> NDArray[np.float32]:
    rows = X.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(rows, norms, out=rows, where=norms > 0)
    return unit
