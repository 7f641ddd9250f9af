"""The rows that several stores share, joined by the bytes of their images.

Knows the rows of opened stores; not what their features are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import StoreError
from featcache.store.features import FeatureSet
from featcache.words import show_text


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedRows:
    """The same images in several feature sets.

    rows: of each set, indices (n_shared,), in one order, that of the first set. left_out: rows of each set
    that another one lacks. like: the first set, whose classes, ids and labels are those of all.
    """

    rows: tuple[NDArray[np.int64], ...]
    left_out: tuple[int, ...]
    like: FeatureSet

    def of(self, features: FeatureSet, which: int) -> FeatureSet:
        """The shared rows of the set of this number, or of other nodes of its store."""
        rows, first = self.rows[which], self.rows[0]
        return replace(
            features,
            X=_take(features.X, rows),
            views=tuple(_take(view, rows) for view in features.views),
            y=self.like.y[first],
            classes=self.like.classes,
            ids=tuple(self.like.ids[row] for row in first),
            splits=self.like.splits[first],
            sha256=self.like.sha256[first],
        )


def join_rows(sets: Sequence[FeatureSet], names: Sequence[str]) -> SharedRows:
    """Join by sha256; of an image that is there several times, the first to the first, by their ids.

    names: of the sets, for messages. StoreError: no image is in all of them, or they disagree on the class or
    the split of one.
    """
    keys = _number_rows(sets)
    shared = np.isin(keys[0], keys[1]) if len(keys) > 1 else np.ones(len(keys[0]), dtype=bool)
    for other in keys[2:]:
        shared &= np.isin(keys[0], other)
    first = np.flatnonzero(shared)
    if not len(first):
        raise StoreError(
            f"no image is in all of {', '.join(names)}. Embed the same images with each backbone."
        )
    rows = [first]
    for other in keys[1:]:
        order = np.argsort(other)
        rows.append(order[np.searchsorted(other[order], keys[0][first])])
    for which in range(1, len(sets)):
        _require_same_facts(sets, names, rows, which)
    return SharedRows(rows=tuple(rows), left_out=tuple(len(one) - len(first) for one in sets), like=sets[0])


def _number_rows(sets: Sequence[FeatureSet]) -> list[NDArray[np.int64]]:
    """The same number for the same image in all sets, another for each time it is in one."""
    digests = np.concatenate([np.ascontiguousarray(one.sha256).view("V32").ravel() for one in sets])
    image = np.unique(digests, return_inverse=True)[1].ravel()
    ends = np.cumsum([len(one) for one in sets])[:-1]
    numbered = [(one.ids, part) for one, part in zip(sets, np.split(image, ends), strict=True)]
    most = max(len(one) for one in sets)
    return [part * most + _times_before(part, ids) for ids, part in numbered]


def _times_before(image: NDArray[np.int64], ids: Sequence[str]) -> NDArray[np.int64]:
    """How many rows of the same image have a lower id."""
    order = np.lexsort((np.array(ids), image))
    times = np.empty(len(image), dtype=np.int64)
    times[order] = np.arange(len(image)) - np.searchsorted(image[order], image[order])
    return times


def _require_same_facts(
    sets: Sequence[FeatureSet], names: Sequence[str], rows: Sequence[NDArray[np.int64]], which: int
) -> None:
    one, other = sets[0], sets[which]
    for what, have, has in (
        ("class", _labels(one)[rows[0]], _labels(other)[rows[which]]),
        ("split", one.splits[rows[0]], other.splits[rows[which]]),
    ):
        differing = np.flatnonzero(have != has)
        if len(differing):
            at = differing[0]
            raise StoreError(
                f"{names[0]} and {names[which]} disagree on the {what} of {len(differing):,} of "
                f"{len(have):,} images; {show_text(one.ids[rows[0][at]])} is in "
                f"{show_text(have[at]) or 'none'} and {show_text(has[at]) or 'none'}. "
                "Embed both from the same data; `featcache explain` compares two stores."
            )


def _labels(features: FeatureSet) -> NDArray[np.str_]:
    """The name of the class of each row, "" for none."""
    return np.array([*features.classes, ""])[features.y]


def _take(X: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """These rows; the array itself where they are all of it in order."""
    whole = len(rows) == len(X) and bool((np.diff(rows) == 1).all())
    return X if whole else X[rows]
