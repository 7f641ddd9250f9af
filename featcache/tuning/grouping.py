"""Which images of a run belong together, so that no group is on both sides of a split.

Knows what is grouped by names and what by vectors; the groups themselves are those of `evaluate.groups`.
"""

from __future__ import annotations

import hashlib

from featcache.evaluate.groups import SIMILAR, find_groups
from featcache.evaluate.splits import Groups
from featcache.store.features import FeatureSet


def named_groups(by: str | None, images: FeatureSet) -> Groups | None:
    """The groups that paths and tables tell; None where none are asked for, or vectors are to tell them."""
    return None if by is None or needs_vectors(by) else find_groups(by, images)


def needs_vectors(by: str) -> bool:
    """Whether the features of the images tell the groups."""
    return by.partition(":")[0] == SIMILAR


def groups_digest(groups: Groups | None) -> str | None:
    """Of which images are together, in hexadecimal digits; None where nothing is grouped."""
    return None if groups is None else hashlib.sha256(groups.index.astype("<i8").tobytes()).hexdigest()
