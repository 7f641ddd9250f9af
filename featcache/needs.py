"""What a store needs: the rows to embed again, and what became of the others' images. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.images.decode import load_pictures
from featcache.images.identity import ImageFailure, file_stat
from featcache.images.paths import resolve, show_path
from featcache.origin import find_root, follows_links, image_file
from featcache.pipeline import load_in_time
from featcache.records import NO_FILE, FileStat, RowStatus
from featcache.reuse import CachedRows
from featcache.spec import Picture
from featcache.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True, eq=False)
class Need:
    """What a store needs. damaged, pending, failed_before: int64 ndarrays, the rows to embed again.

    failing: {row: why} of sound rows that have no features and still cannot have them.
    """

    cache: CachedRows
    root: Path | None  # None: the images were not needed, and are not where they were
    damaged: NDArray[np.intp]
    pending: NDArray[np.intp]
    failed_before: NDArray[np.intp]
    failing: Mapping[int, str]
    missing: int | None
    changed: int | None

    @property
    def rows(self) -> NDArray[np.intp]:
        return np.concatenate([self.damaged, self.pending, self.failed_before])


def look_for_needs(
    store: FeatureStore,
    bring_transform: Callable[[], None],
    *,
    data: str | os.PathLike[str] | None,
    root: str | os.PathLike[str] | None,
    workers: int,
) -> Need:
    """bring_transform: imports what makes pictures, where failed rows are looked at again. DataError: images
    are needed, and are not in `data` or where they were.
    """
    cache = CachedRows(store)
    lost = np.flatnonzero(~cache.done)
    failed = np.flatnonzero(cache.done & (cache.status != RowStatus.OK))
    folder: Path | None = None
    with nullcontext() if len(lost) or len(failed) or data is not None else suppress(DataError):
        folder = find_root(store, data=data, root=root)
    is_damaged = np.array([cache.is_damaged(row) for row in lost.tolist()], dtype=bool)
    failing: dict[int, str] = {}
    missing, changed = None, None
    if folder is not None:
        _require_images(store, lost, folder, follow_links=follows_links(store))
        if len(failed) and store.spec.preprocessing.transform:
            bring_transform()  # which makes the pictures that failed
        failing = _still_failing(cache, failed, folder, workers=workers)
        missing, changed = _count_changed(cache, folder)
    return Need(
        cache=cache,
        root=folder,
        damaged=lost[is_damaged],
        pending=lost[~is_damaged],
        failed_before=np.array([row for row in failed.tolist() if row not in failing], dtype=np.intp),
        failing=failing,
        missing=missing,
        changed=changed,
    )


def _require_images(store: FeatureStore, rows: NDArray[np.intp], root: Path, *, follow_links: bool) -> None:
    """Refuse a folder that has none of the images: their rows would be written as missing."""
    ids = [store.table.ids[row] for row in rows.tolist()]
    files = [image_file(root, path, follow_links=follow_links) for path in ids]
    if files and not any(map(os.path.exists, files)):
        raise DataError(
            f"none of the images to embed again ({len(files):,}, first {show_path(ids[0])}) "
            f"is in {show_path(root)}. Pass the folder they are in now as --data DATA."
        )


def _still_failing(cache: CachedRows, rows: NDArray[np.intp], root: Path, *, workers: int) -> dict[int, str]:
    """{row: why} of the failed rows whose image cannot be used now either."""
    store = cache.store
    follow_links = follows_links(store)
    plain = (Picture(preprocessing=store.spec.preprocessing),)

    def why(row: int) -> str | None:
        file = image_file(root, store.table.ids[row], follow_links=follow_links)
        image = load_in_time(load_pictures, file, plain)  # one that hung before may hang again
        if isinstance(image, ImageFailure):
            return image.reason
        # It was decoded before too; the same bytes give the same features, which are none.
        same_bytes = cache.sources["sha256"][row].tobytes() == image.sha256
        if cache.status[row] == RowStatus.NON_FINITE and same_bytes:
            return RowStatus.NON_FINITE.words
        return None

    with ThreadPoolExecutor(workers) as pool:
        reasons = zip(rows.tolist(), pool.map(why, rows.tolist()), strict=True)
        return {row: reason for row, reason in reasons if reason is not None}


def _count_changed(cache: CachedRows, root: Path) -> tuple[int, int]:
    """The sound rows whose file is not there, and those whose file has not the recorded stat."""
    ids = cache.store.table.ids
    stats = {row: _stat(root, ids[row]) for row in np.flatnonzero(cache.status == RowStatus.OK).tolist()}
    missing = sum(stat == NO_FILE for stat in stats.values())
    return missing, sum(not cache.has_stat(row, stat) for row, stat in stats.items()) - missing


def _stat(root: Path, path: str) -> FileStat:
    try:
        return file_stat(os.stat(resolve(root, path)))
    except (OSError, ValueError):
        return NO_FILE
