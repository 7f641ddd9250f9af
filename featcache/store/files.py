"""The names around a store: the store itself, its growths and its shards, finished or not. Knows no rows.

A growth that no longer fits is not replaced but joined by a further one, since its rows may be in no other
file. A shard is a store of its own beside the store, with growths and a lock of its own.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from featcache.disk import disk_errors, open_regular, replace_durably, sync_file
from featcache.errors import DamagedStore, NotAStore, StoreError
from featcache.store.hdf5 import SIGNATURE
from featcache.store.reader import FeatureStore


def begins_as_store(path: Path) -> bool:
    """Whether a file is there whose first bytes are those of every store; what follows may be anything."""
    try:
        with open_regular(path) as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False  # nothing of ours; opening or writing will say what is wrong with it


@dataclass(frozen=True)
class StoreFiles:
    """The files of one store. `output` is its name, which it gets once it is complete."""

    output: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Self:
        """The files of the store at `path`; of a link, those of the store it leads to."""
        return cls(Path(os.path.realpath(path)) if os.path.islink(path) else Path(path))

    @property
    def growths(self) -> list[Path]:
        """The unfinished growths there are, oldest first: `STORE.growing`, `STORE.growing.1`, …

        A kill while they were removed may have left a later one without an earlier.
        """
        return [self._growth(number) for number in self._growth_numbers()]

    @property
    def next_growth(self) -> Path:
        return self._growth(max(self._growth_numbers(), default=-1) + 1)

    @property
    def half_created(self) -> list[Path]:
        """Files that a killed run had not given their name yet; they hold nothing."""
        return [
            self.output.with_name(match[0]) for match in self._matches(r"(\.growing(\.[1-9]\d*)?)?\.creating")
        ]

    def _growth_numbers(self) -> list[int]:
        return sorted(int(match[1] or 0) for match in self._matches(r"\.growing(?:\.([1-9]\d*))?"))

    def _matches(self, ending: str) -> list[re.Match[str]]:
        """The files beside the store whose name is the store's with such an ending. DiskError."""
        pattern = re.compile(re.escape(self.output.name) + ending)
        with disk_errors(self.output, doing="listing what is beside"):
            try:
                names = os.listdir(self.output.parent)
            except FileNotFoundError:
                return []
        return [match for name in names if (match := pattern.fullmatch(name))]

    def _growth(self, number: int) -> Path:
        return self.output.with_name(self.output.name + ".growing" + (f".{number}" if number else ""))

    def shard(self, index: int, count: int) -> Self:
        """The files of one of `count` shards: `STORE.shard-0-of-3`, …"""
        return type(self)(self.output.with_name(f"{self.output.name}.shard-{index}-of-{count}"))

    @property
    def shards(self) -> dict[tuple[int, int], Self]:
        """The shards that left anything, be it a lock file, by (count, index)."""
        pattern = r"\.shard-(0|[1-9]\d*)-of-([1-9]\d*)(\.growing(\.[1-9]\d*)?)?(\.creating)?(\.lock)?"
        found = {(int(match[2]), int(match[1])) for match in self._matches(pattern)}
        return {(count, index): self.shard(index, count) for count, index in sorted(found) if index < count}

    def has(self, path: Path) -> bool:
        """Whether the file at `path` is the store or a growth of it, and not merely beside it."""
        return path == self.output or path in self.growths

    def open_all(self, *, without_shards_of: int | None = None) -> list[FeatureStore]:
        """Unfinished growths, the newest first, so that its rows are found first; then the store itself.

        Shards come between them, but not those of so many. One whose seal is broken is among them for its
        rows. A growth or shard damaged otherwise is passed over: what it held is computed again. Blocks are
        not checked.
        """
        stores = []
        with disk_errors(self.output, doing="opening"):
            self.require_no_folders()
            for path in reversed(self.growths):
                with suppress(StoreError):
                    stores.append(FeatureStore.salvage(path))
            for (count, _), files in self.shards.items():
                if count != without_shards_of:
                    stores += files._open_as_shard()
            if self.output.exists():
                stores.append(FeatureStore.salvage(self.output))
        return stores

    def _open_as_shard(self) -> list[FeatureStore]:
        """All files of a shard, or none of one that is damaged beyond use or was joined meanwhile."""
        try:
            return self.open_all()
        except DamagedStore:
            return []
        except NotAStore:
            if os.path.lexists(self.output):
                raise
            return []

    def require_no_folders(self) -> None:
        """StoreError where a folder has the name of an unfinished store, which will be needed or removed."""
        for path in (*self.half_created, *self.growths):
            if path.is_dir() and not path.is_symlink():
                raise StoreError(
                    f"{path} is a folder, and its name is that of an unfinished store. "
                    "Move or remove it, then run the same command again."
                )

    def sync(self) -> None:
        """Return once what the store holds survives a power cut, whoever wrote it."""
        with disk_errors(self.output, doing="syncing"):
            sync_file(self.output)

    def take_name(self, path: Path, *, keep_growths: bool = False) -> None:
        """Let the complete store at `path` take the store's name; then remove growths, unless they are kept.

        Readers of the old file keep it.
        """
        with disk_errors(self.output, doing="renaming"):
            growths = [] if keep_growths else self.growths
            sync_file(path)  # a run killed before its last sync may have written what this one found
            if path != self.output:
                replace_durably(path, self.output)
            for left in (*self.half_created, *reversed(growths)):
                left.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the store and its growths, itself last, so that after a kill the rest is still found."""
        with disk_errors(self.output, doing="removing"):
            for left in (*self.half_created, *reversed(self.growths), self.output):
                left.unlink(missing_ok=True)
