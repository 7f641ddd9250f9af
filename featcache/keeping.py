"""Rows that a run would remove, and when it must not: where their images may well be there, or meant to be.

Knows listings and plans; removes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from featcache.errors import DataError
from featcache.images.paths import show_path
from featcache.records import Listing, RowStatus
from featcache.reuse import CachedRows, ReusePlan
from featcache.store.files import StoreFiles
from featcache.words import plural

# Of the rows with features of one store: so many are not removed, unless that is asked for. A data set that
# is tidied up keeps most of its images; another one, or one of two classes by itself, does not. Computing the
# rows again costs what the store did; saying --prune costs a word.
TOO_MANY_REMOVED = 0.5


def require_listed(listing: Listing, plan: ReusePlan, files: StoreFiles) -> None:
    """Refuse to remove rows because their folder cannot be listed: the images may well be there."""
    if not listing.unlisted:
        return
    output, lost_ids = files.output, set(plan.removed_ids)
    for cache in plan.caches:
        if not files.has(cache.store.path):  # a shard, to be removed once its rows are taken over
            lost_ids |= set(cache.store.table.ids) - {found.path for found in listing.records}
    for folder in listing.unlisted:
        if not plan.knows_last:
            raise DataError(
                f"the folder {show_path(folder)} cannot be listed, and {output}, whose seal is broken, may "
                "have rows of images in it. Allow reading it, or remove it, then run the same command again."
            )
        lost = sum(path.startswith(folder) for path in lost_ids)
        if lost:
            raise DataError(
                f"the folder {show_path(folder)} cannot be listed, and {lost:,} rows of {output} are of "
                "images in it. Allow reading it, or remove it, then run the same command again."
            )


def require_kept(
    listing: Listing, plan: ReusePlan, caches: Iterable[CachedRows], *, data: str | Path
) -> None:
    """DataError where half of the rows with features of a store among `caches`, or more, are of images that
    are not in `data`; or any, where `data` has no splits and the store had: it is one of its parts.

    An image that is known under another path, or there with other bytes, is not gone.
    """
    one_part = bool(plan.lost_splits) and not any(found.split for found in listing.records)
    for cache in caches:
        lost, rows = _count_lost(cache, listing, plan)
        if lost and (one_part or lost >= TOO_MANY_REMOVED * rows):
            others = ", and the others would lose their splits" if one_part else ""
            raise DataError(
                f"{lost:,} of the {plural(rows, 'row')} with features in {show_path(cache.store.path)} "
                f"are of images that are not in {show_path(data)}, and would be removed{others}. Choose "
                "another --output for another data set, or pass --prune to remove them."
            )


def _count_lost(cache: CachedRows, listing: Listing, plan: ReusePlan) -> tuple[int, int]:
    """How many rows with features the run would lose of how many, as far as it matters."""
    usable = np.flatnonzero(cache.status == RowStatus.OK)
    if cache.store.sealed:
        listed = {found.path for found in listing.records}
        ids = cache.store.table.ids
        gone = np.array([row for row in usable.tolist() if ids[row] not in listed], dtype=np.intp)
    else:
        gone = usable
    if len(gone) < TOO_MANY_REMOVED * len(usable):
        return len(gone), len(usable)  # no need to look for them under other paths
    taken = plan.sources["sha256"][plan.origin_store >= 0]
    known = {digest.tobytes() for digest in taken}
    digests = cache.sources["sha256"]
    return sum(digests[row].tobytes() not in known for row in gone.tolist()), len(usable)
