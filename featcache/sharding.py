"""A data set embedded by several processes: who embeds which images, and who joins what they made.

Ranks agree on nothing but names of files and sha256 of ids: each writes a store of its own beside the store,
and whoever finishes last finds all of them complete. Knows no engine and no pixels.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from featcache.disk import disk_errors
from featcache.errors import DamagedStore, StoreLocked
from featcache.images.paths import show_path
from featcache.records import Listing
from featcache.reuse import ReusePlan, holds_just, plan_reuse
from featcache.store.files import StoreFiles
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore
from featcache.words import plural

MOST = 1 << 16  # shards; each is a file, and whoever joins them has all of them open
PATIENCE = 60.0  # seconds; ranks that finish together look one after another
OWN_PATIENCE = 5.0  # seconds; whoever joined the shard holds its lock while removing it
_POLL = 0.05
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of `count` equal parts of a data set, numbered from 0 as ranks are."""

    index: int
    count: int
    taken_from: str = field(default="", compare=False)  # the variables of the environment, in words

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MOST:
            raise ValueError(
                f"there is no shard {self.index}/{self.count}: shards are 0/N to N-1/N of up to {MOST:,}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard of "2/8", the third of eight; ValueError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
        if not match:
            raise ValueError(f"{text!r} is not INDEX/COUNT, such as 2/8 for the third of eight")
        return cls(index=int(match[1]), count=int(match[2]))

    @property
    def is_everything(self) -> bool:
        return self.count == 1

    def owns(self, image: str) -> bool:
        """Whether the image of this id is in the shard."""
        return shard_of_image(image, self.count) == self.index

    def part_of(self, listing: Listing) -> Listing:
        return replace(listing, records=tuple(found for found in listing.records if self.owns(found.path)))

    def record(self, *, elsewhere: int) -> dict[str, Any]:
        """For the provenance of a shard. elsewhere: images of it whose rows other files beside it have."""
        return {"shard": {"index": self.index, "count": self.count, "elsewhere": elsewhere}}

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, kw_only=True)
class RecordedShard:
    """What the provenance of a shard says of it."""

    index: int
    count: int
    elsewhere: int

    @classmethod
    def of_store(cls, store: FeatureStore) -> Self | None:
        """None where the store does not say that it is one."""
        found = store.provenance.get("shard")
        fields = [found.get(name) for name in cls.__annotations__] if isinstance(found, Mapping) else []
        numbers = [n for n in fields if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62]
        if len(numbers) != 3 or not numbers[0] < numbers[1] <= MOST:
            return None
        return cls(index=numbers[0], count=numbers[1], elsewhere=numbers[2])


def shard_of_image(image: str, count: int) -> int:
    """Which of `count` shards the image of this id is in: by the id alone, whatever else is listed."""
    return int.from_bytes(hashlib.sha256(image.encode()).digest()[:8], "big") % count


def shard_of_environment(environment: Mapping[str, str]) -> Shard | None:
    """The shard that a launcher gives this process: torchrun, Slurm's tasks, Slurm's arrays, or both.

    None where there is one process only, or where the variables contradict each other.
    """
    levels = [_array_task(environment), _torchrun_rank(environment) or _slurm_task(environment)]
    found = [level for level in levels if level is not None and not level.is_everything]
    if not found:
        return None
    index, count = 0, 1
    for level in found:
        index, count = index * level.count + level.index, count * level.count
    if count > MOST:
        return None
    return Shard(index=index, count=count, taken_from=" and ".join(level.taken_from for level in found))


def _torchrun_rank(environment: Mapping[str, str]) -> Shard | None:
    return _shard_from(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"), "RANK, WORLD_SIZE")


def _slurm_task(environment: Mapping[str, str]) -> Shard | None:
    # A batch script has SLURM_NTASKS too, and there is one of it; only a step has the second.
    tasks = _number(environment, "SLURM_NTASKS")
    if tasks != _number(environment, "SLURM_STEP_NUM_TASKS"):
        return None
    return _shard_from(_number(environment, "SLURM_PROCID"), tasks, "SLURM_PROCID, SLURM_NTASKS")


def _array_task(environment: Mapping[str, str]) -> Shard | None:
    task, first, last = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX"))
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
    if task is None or first is None or last is None or last < first:
        return None
    count = (last - first) // step + 1
    # An array of 0,3,7 has numbers that say nothing of how many tasks there are before one.
    if _number(environment, "SLURM_ARRAY_TASK_COUNT") not in (None, count) or (task - first) % step:
        return None
    return _shard_from((task - first) // step, count, "the SLURM_ARRAY_TASK variables")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _shard_from(index: int | None, count: int | None, taken_from: str) -> Shard | None:
    if index is None or count is None or not 0 <= index < count <= MOST:
        return None
    return Shard(index=index, count=count, taken_from=taken_from)


def plan_part(
    listing: Listing,
    stores: Sequence[FeatureStore],
    *,
    shard: Shard,
    part: StoreFiles,
    workers: int,
) -> tuple[ReusePlan, int]:
    """The plan for the rows that `shard` is to have, and how many of its images other files have.

    stores: those of `part`, the shard's own files, first; a row of another is left where it is.
    """
    plan = plan_reuse(shard.part_of(listing), stores, workers=workers)
    own = [index for index, cache in enumerate(plan.caches) if part.has(cache.store.path)]
    here = np.flatnonzero((plan.origin_store < 0) | np.isin(plan.origin_store, own))
    removed = tuple(path for path in plan.removed_ids if shard.owns(path))
    return replace(plan.only(here), removed_ids=removed), len(plan.table.ids) - len(here)


@contextmanager
def wait_for_lock(store: Path, *, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of a store that other ranks have for a moment; StoreLocked where it takes longer."""
    until = time.monotonic() + (PATIENCE if seconds is None else seconds)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(write_lock(store))
                break
            except StoreLocked:
                if time.monotonic() >= until:
                    raise
            time.sleep(_POLL)
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """Whether it is a rank's turn to join all shards into the store.

    why_not: in words; "" where it is. joined: whether another rank has done it. ids: all those of the shards.
    """

    why_not: str = ""
    joined: bool = False
    ids: frozenset[str] = frozenset()

    def unlisted(self, listing: Listing) -> str:
        """Why the shards cannot be joined by what was listed here; "" where they can."""
        lost = sorted(self.ids - {found.path for found in listing.records})
        if not lost:
            return ""
        return (
            f"not joined: {plural(len(lost), 'image')} of the shards, first {show_path(lost[0])}, cannot be "
            "seen from here. Make them seen, or run the command of every shard again, which leaves out what "
            "was removed"
        )


@contextmanager
def turn_to_join(files: StoreFiles, shard: Shard, listing: Listing, *, fingerprint: str) -> Iterator[Turn]:
    """Hold the lock of the store and say whether all its shards are complete, or else what is waited for.

    The caller's own shard is complete and no longer locked. Of ranks that finish together each looks in turn,
    so that the last one finds the others complete, or joined. Complete shards need no locks to be read: they
    do not change, and whoever brings one up to date makes another file.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(wait_for_lock(files.output))
        except StoreLocked as exc:
            turn = Turn(why_not=f"not joined: {exc}")
        else:
            turn = _look(files, shard, listing, fingerprint)
        yield turn


def _look(files: StoreFiles, shard: Shard, listing: Listing, fingerprint: str) -> Turn:
    is_there = files.output.exists()
    if is_there and not files.shard(shard.index, shard.count).output.exists():
        return Turn(why_not=f"joined into {show_path(files.output)} by another rank", joined=True)
    parts = [files.shard(index, shard.count) for index in range(shard.count)]
    if not (waits := _waits_for(parts, fingerprint)):
        shards = [FeatureStore.open(part.output, check=False) for part in parts]
        return Turn(ids=frozenset(path for store in shards for path in store.table.ids))
    # Who joined may have left this shard behind, whose lock was held until now.
    if is_there and holds_just(FeatureStore.salvage(files.output), listing):
        return Turn()
    return Turn(why_not=waits)


def remove_shards(files: StoreFiles, read: Sequence[FeatureStore]) -> None:
    """Remove the shards beside a complete store that holds the rows of all files in `read`.

    Those that a process is writing are left to it, and those that have become others since.
    """
    with disk_errors(files.output, doing="removing the shards of"):
        shards = files.shards
        if not shards:
            return
        is_read = {store.path for store in read if store.layout.buffer.is_still(store.path)}
        for part in shards.values():
            with suppress(StoreLocked), write_lock(part.output):
                if {path for path in (part.output, *part.growths) if path.exists()} <= is_read:
                    part.remove()


def _waits_for(parts: Sequence[StoreFiles], fingerprint: str) -> str:
    """Which shards are not complete; "" where all are."""
    states = [_state(part, index, len(parts), fingerprint) for index, part in enumerate(parts)]
    unfinished = [f"{index}/{len(parts)} ({state})" for index, state in enumerate(states) if state]
    if not unfinished:
        return ""
    more = ", …" if len(unfinished) > _NAMED else ""
    return (
        f"not joined yet, {len(unfinished):,} of {len(parts):,} shards not complete: "
        f"{', '.join(unfinished[:_NAMED])}{more}. The last one to finish joins them"
    )


def _state(part: StoreFiles, index: int, count: int, fingerprint: str) -> str:
    """What a shard lacks to be joined, in words; "" where that is nothing."""
    if not part.output.exists():
        return "not begun"
    try:
        store = FeatureStore.open(part.output, check=False)
    except DamagedStore:
        return "damaged"
    recorded = RecordedShard.of_store(store)
    if recorded is None or (recorded.index, recorded.count) != (index, count):
        return "made as something else"
    if store.fingerprint != fingerprint:
        return "of another spec"
    if part.growths or not store.complete:
        return f"{int(store.done.sum()):,} of {len(store):,} rows"
    return ""


def processors_of_rank(processors: int, environment: Mapping[str, str] = os.environ) -> int:
    """This process's share of the processors that torchrun's ranks on one machine have in common."""
    return max(1, processors // (_number(environment, "LOCAL_WORLD_SIZE") or 1))
