"""`featcache verify`: is a store what was written, are its images those embedded, does the network agree."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.embedder import Embedder, ReadyEngine
from featcache.engines.agreement import LARGEST_DIFFERENCE, LOWEST_COSINE
from featcache.images.identity import ImageFailure, hash_image
from featcache.images.paths import show_path
from featcache.origin import find_origin, find_root, image_file
from featcache.pipeline import embed_files
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.records import RowStatus
from featcache.request import require_sizes
from featcache.store.blocks import BlockState
from featcache.store.reader import FeatureStore
from featcache.words import plural

_SHOWN = 10  # rows named in a list for a terminal; --json has all
_RATE_FROM = 50_000_000  # bytes; less is read too fast for its speed to mean anything


@dataclass(frozen=True, kw_only=True)
class DamagedRows:
    """One damaged block: rows first to last, by number and by id, and what is wrong with it."""

    first: int
    last: int
    first_id: str
    last_id: str
    why: str


@dataclass(kw_only=True)
class OtherImages:
    """The images that are not what was embedded, by id; of the unreadable ones with the reason."""

    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.missing) + len(self.changed) + len(self.unreadable)

    def add(self, path: str, found: ImageFailure | None, *, same_bytes: bool) -> None:
        """`found` is None for an image that was read, and then has other bytes."""
        if found is not None and found.status == RowStatus.MISSING:
            self.missing.append(path)
        elif found is None or (found.sha256 is not None and not same_bytes):
            self.changed.append(path)
        else:
            self.unreadable.append((path, found.reason))

    def describe(self) -> list[str]:
        return [
            *_named("missing", [(path, "") for path in self.missing]),
            *_named("changed", [(path, "") for path in self.changed]),
            *_named("unreadable", self.unreadable),
        ]


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """The images against the bytes that were embedded.

    not_compared: rows that are damaged or pending, or whose image could not be read when it was embedded.
    """

    same: int
    other: OtherImages
    not_compared: int


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Rows embedded again against the rows of the store, over all nodes.

    largest_difference, lowest_cosine: None where no row was compared. disagree: (id, largest |Δ|, cosine) of
    rows that are farther apart than two engines may be. other: the images that are not what was embedded.
    """

    rows: int
    largest_difference: float | None
    lowest_cosine: float | None
    disagree: tuple[tuple[str, float, float], ...]
    other: OtherImages


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was checked and what was found."""

    store: str
    rows: int
    blocks: int
    bytes: int
    seconds: float  # of comparing checksums
    damaged: tuple[DamagedRows, ...]
    pending: int  # rows
    failed: int  # rows that have no features, as was recorded
    sources: SourceCheck | None = None
    recomputed: Recomputed | None = None

    @property
    def sound(self) -> bool:
        """Whether all that was checked agrees; pending and failed rows are no disagreement."""
        return self.verdict in ("sound", "pending")

    @property
    def verdict(self) -> str:
        """`damaged`, `images differ`, `features differ`, `pending` or `sound`: the first that is the case."""
        if self.damaged:
            return "damaged"
        if self._images_differ:
            return "images differ"
        if self.recomputed and self.recomputed.disagree:
            return "features differ"
        return "pending" if self.pending else "sound"

    @property
    def _images_differ(self) -> bool:
        return any(check.other for check in (self.sources, self.recomputed) if check)

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = _finite({"sound": self.sound, "verdict": self.verdict, **asdict(self)})
        return said

    def describe(self) -> str:
        store = show_path(self.store)
        rate = self.bytes / 1e9 / max(self.seconds, 1e-9)
        speed = f" ({rate:.1f} GB/s)" if self.bytes >= _RATE_FROM else ""
        lines = [
            f"{store}: {plural(self.rows, 'row')} in {plural(self.blocks, 'block')}, "
            f"{self.bytes / 1e6:,.1f} MB checked in {self.seconds:.2f} s{speed}"
        ]
        lines += _named(
            "damaged",
            [
                (f"rows {d.first}-{d.last} ({show_path(d.first_id)} … {show_path(d.last_id)})", d.why)
                for d in self.damaged
            ],
        )
        if self.damaged:
            lines.append(f"  `featcache repair {store}` embeds just these rows again")
        if self.pending:
            lines.append(
                f"{plural(self.pending, 'row')} not embedded yet; unless a run is writing the store now, the "
                "same `featcache embed` goes on"
            )
        if self.failed:
            lines.append(
                f"{plural(self.failed, 'row')} without features, as recorded; `featcache info` names them"
            )
        if self.sources:
            lines += _source_lines(self.sources)
        if self.recomputed:
            lines += _recomputed_lines(self.recomputed)
        if self._images_differ:
            lines.append(
                f"  if the images have moved, pass --data DATA; else `featcache explain {store} --data DATA` "
                "says why, and `featcache embed` brings the store up to date"
            )
        return "\n".join([*lines, self._last_line()])

    def _last_line(self) -> str:
        if self.verdict == "pending":
            return f"sound so far, {plural(self.pending, 'row')} pending"
        return {
            "images differ": "sound, but not what the images are now",
            "features differ": "sound, but not what the network gives now",
        }.get(self.verdict, self.verdict)


def _finite(value: Any) -> Any:
    """Without the numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"  {title}: {show_path(name)}{why and ': '}{why}" for name, why in rows[:_SHOWN]]
    return lines + ([f"  … and {len(rows) - _SHOWN:,} more (--json lists all)"] if len(rows) > _SHOWN else [])


def _source_lines(found: SourceCheck) -> list[str]:
    lines = [f"{plural(found.same, 'image')} as embedded"]
    if found.not_compared:
        lines.append(
            f"{plural(found.not_compared, 'row')} not compared with the image: damaged, pending, or failed "
            "before the image was read"
        )
    if found.other:
        lines += [f"{plural(len(found.other), 'image')} not as embedded:", *found.other.describe()]
    return lines


def _recomputed_lines(found: Recomputed) -> list[str]:
    figures = ""
    if found.rows:
        figures = f": largest |Δ| {found.largest_difference:.2g}, lowest cosine {found.lowest_cosine:.7f}"
    lines = [f"{plural(found.rows, 'row')} embedded again and compared{figures}"]
    lines += _named(
        "disagrees",
        [(path, f"|Δ| {delta:.2g}, cosine {cosine:.5f}") for path, delta, cosine in found.disagree],
    )
    if found.other:
        lines.append(f"{plural(len(found.other), 'row')} not compared, the image not being as embedded:")
        lines += found.other.describe()
    return lines


def verify(
    store: str | os.PathLike[str],
    *,
    sources: bool = False,
    recompute: int = 0,
    data: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    backbone: str | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Compare every byte of `store` with its checksums; with `sources` every image with its recorded sha256.

    recompute: so many rows, drawn with `seed`, are embedded again and compared. data, root: where the images
    are now, when they have moved. weights, backbone: see `featcache.request.RecordedBackbone.load`.

    Damage in rows is part of the result. NotAStore, DamagedStore: it is in the structure, or there is none.
    """
    begun = time.perf_counter()
    workers = usable_processors() if workers is None else workers
    require_sizes(workers=workers, batch_size=batch_size)
    if recompute < 0:
        raise ValueError(f"0 rows or more can be embedded again, not {recompute}")
    opened = FeatureStore.open(store, check=False)
    states = opened.inspect()
    seconds = time.perf_counter() - begun
    ready = None
    if recompute:
        embedder = Embedder.of_store(
            opened, weights=weights, allowed=backbone, device=device, batch_size=batch_size
        )
        ready = embedder.engine_for(opened, output=opened.path)
    images = None
    if sources or recompute:
        origin = find_origin(opened, data=data, root=root)
        images = _Images(
            store=opened,
            root=find_root(opened, data=data, root=root),
            follow_links=origin["follow_links"],
            workers=workers,
            progress=progress or SilentProgress(),
        )
    return VerifyResult(
        store=str(opened.path),
        rows=len(opened),
        blocks=len(states),
        bytes=len(opened.layout.buffer),
        seconds=round(seconds, 4),
        damaged=_damaged(opened, states),
        pending=sum(_length(opened, b) for b, state in enumerate(states) if state is BlockState.PENDING),
        failed=len(opened.failed_rows()),
        sources=_check_sources(images) if images and sources else None,
        recomputed=_recompute(images, ready, count=recompute, seed=seed) if images and ready else None,
    )


def _length(store: FeatureStore, block: int) -> int:
    rows = store.layout.rows_of(block)
    return int(rows.stop - rows.start)


def _damaged(store: FeatureStore, states: Sequence[BlockState]) -> tuple[DamagedRows, ...]:
    ids = store.table.ids
    return tuple(
        DamagedRows(
            first=rows.start,
            last=rows.stop - 1,
            first_id=ids[rows.start],
            last_id=ids[rows.stop - 1],
            why=state.value,
        )
        for rows, state in ((store.layout.rows_of(b), s) for b, s in enumerate(states) if s.is_damage)
    )


@dataclass(frozen=True, kw_only=True)
class _Images:
    """The images of a store, and how they are read."""

    store: FeatureStore
    root: Path
    follow_links: bool
    workers: int
    progress: Progress

    def file(self, row: int) -> Path:
        return image_file(self.root, self.store.table.ids[row], follow_links=self.follow_links)

    def recorded_sha256(self, row: int) -> bytes:
        digest: bytes = self.store.sources["sha256"][row].tobytes()
        return digest


def _check_sources(images: _Images) -> SourceCheck:
    """Every image whose bytes were read when it was embedded, read again."""
    store = images.store
    rows = np.flatnonzero(store.done & store.sources["sha256"].any(axis=1)).tolist()
    other = OtherImages()
    images.progress.start("reading images", total=len(rows), unit="images")
    with ThreadPoolExecutor(images.workers) as pool:
        for row, identity in zip(rows, pool.map(hash_image, map(images.file, rows)), strict=True):
            same_bytes = identity.sha256 == images.recorded_sha256(row)
            if isinstance(identity, ImageFailure):
                other.add(store.table.ids[row], identity, same_bytes=same_bytes)
            elif not same_bytes:
                other.add(store.table.ids[row], None, same_bytes=False)
            images.progress.advance(1)
    images.progress.finish()
    return SourceCheck(same=len(rows) - len(other), other=other, not_compared=len(store) - len(rows))


def _recompute(images: _Images, ready: ReadyEngine, *, count: int, seed: int) -> Recomputed:
    """Embed `count` rows that have features again, drawn at random, and compare them with the store's."""
    store, ids = images.store, images.store.table.ids
    usable = np.flatnonzero(store.row_status == RowStatus.OK)
    rows = np.sort(np.random.default_rng(seed).permutation(usable)[:count]).tolist()
    compared: list[tuple[str, _Distance]] = []
    other = OtherImages()
    left = iter(rows)
    images.progress.start("embedding again", total=len(rows), unit="images")
    for batch in embed_files(
        [images.file(row) for row in rows],
        engine=ready.engine,
        pictures=store.spec.pictures(),
        decoder=ready.decoder,
        workers=images.workers,
    ):
        for place, outcome in enumerate(batch.outcomes):
            row = next(left)
            same_bytes = outcome.sha256 == images.recorded_sha256(row)
            if isinstance(outcome, ImageFailure):
                other.add(ids[row], outcome, same_bytes=same_bytes)
            elif not same_bytes:
                other.add(ids[row], None, same_bytes=False)
            else:
                vectors = {key: array[place] for key, array in batch.features.items()}
                compared.append((ids[row], _compare(store, row, vectors)))
        images.progress.advance(len(batch.outcomes))
    images.progress.finish()
    distances = [distance for _, distance in compared]
    return Recomputed(
        rows=len(compared),
        # numpy's max and min pass NaN on.
        largest_difference=float(np.max([d.largest for d in distances])) if distances else None,
        lowest_cosine=float(np.min([d.cosine for d in distances])) if distances else None,
        disagree=tuple((path, d.largest, d.cosine) for path, d in compared if not d.is_small),
        other=other,
    )


@dataclass(frozen=True, kw_only=True)
class _Distance:
    """Between two vectors, or of several pairs the largest; NaN where a vector has one."""

    largest: float  # |Δ|
    cosine: float
    of_length: float  # Euclidean, as a fraction of the length

    @property
    def is_small(self) -> bool:
        """Whether two engines, devices or library versions may be that far apart."""
        return self.cosine >= LOWEST_COSINE and self.of_length <= LARGEST_DIFFERENCE


def _compare(store: FeatureStore, row: int, vectors: Mapping[str, NDArray[np.float32]]) -> _Distance:
    """Over the nodes, in the store's dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        distances = []
        for key, vector in vectors.items():
            have = store.dataset(key)[row]
            distances.append(_distance(have.astype(np.float64), vector.astype(have.dtype).astype(np.float64)))
    return _Distance(
        largest=float(np.max([d.largest for d in distances])),
        cosine=float(np.min([d.cosine for d in distances])),
        of_length=float(np.max([d.of_length for d in distances])),
    )


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> _Distance:
    if np.array_equal(a, b):
        return _Distance(largest=0.0, cosine=1.0, of_length=0.0)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return _Distance(
        largest=float(np.abs(a - b).max()),
        cosine=float(a @ b) / lengths if lengths else 0.0,
        of_length=float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)),
    )
