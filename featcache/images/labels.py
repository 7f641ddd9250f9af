"""The words of a listing: which names mean a split, which labels are the same word written differently."""

from __future__ import annotations

from collections.abc import Iterable

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def split_named(name: str) -> str | None:
    """The split that a folder or a cell of this name means, in any case; None where it means none."""
    return SPLIT_NAMES.get(name.casefold())


def lookalikes(labels: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of distinct labels that differ only in case or surrounding white space, in order met."""
    groups: dict[str, dict[str, None]] = {}
    for label in labels:
        groups.setdefault(label.strip().casefold(), {})[label] = None
    return [tuple(group) for group in groups.values() if len(group) > 1]
