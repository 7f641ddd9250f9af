"""`featcache verify`: is a store what was written, are its images those embedded, does the network agree."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import Engine
from featcache.images.identity import ImageFailure, hash_image
from featcache.origin import find_origin, find_root, image_file
from featcache.pipeline import default_workers, embed_files
from featcache.progress import Progress, SilentProgress
from featcache.records import RowStatus
from featcache.request import Embedder
from featcache.store.blocks import BlockState
from featcache.store.reader import FeatureStore

SAME_COSINE = 0.9999  # what two engines, devices or library versions must agree to, row by row
_OTHER_BYTES = "its bytes are not those that were embedded"
_SHOWN = 10  # rows named in a list for a terminal; --json has all


@dataclass(frozen=True, kw_only=True)
class DamagedRows:
    """One damaged block: rows first to last, by number and by id, and what is wrong with it."""

    first: int
    last: int
    first_id: str
    last_id: str
    why: str


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """The images against the bytes that were embedded. `differ` has (id, what was found)."""

    same: int
    differ: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Rows embedded again against the rows of the store, over all nodes.

    disagree: (id, largest |Δ|, cosine) of rows whose cosine is below SAME_COSINE. left_out: (id, why) of rows
    whose image is no longer what was embedded.
    """

    rows: int
    largest_difference: float
    lowest_cosine: float
    disagree: tuple[tuple[str, float, float], ...]
    left_out: tuple[tuple[str, str], ...]


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
        return not (
            self.damaged
            or (self.sources and self.sources.differ)
            or (self.recomputed and self.recomputed.disagree)
        )

    def to_json(self) -> dict[str, Any]:
        return {"sound": self.sound, **asdict(self)}

    def describe(self) -> str:
        speed = self.bytes / 1e9 / max(self.seconds, 1e-9)
        lines = [
            f"{self.store}: {self.rows:,} rows in {self.blocks:,} blocks, {self.bytes / 1e6:,.1f} MB checked "
            f"in {self.seconds:.2f} s ({speed:.1f} GB/s)"
        ]
        lines += _named(
            "damaged",
            [(f"rows {d.first}-{d.last} ({d.first_id} … {d.last_id})", d.why) for d in self.damaged],
        )
        if self.damaged:
            lines.append(f"  `featcache repair {self.store}` embeds just these rows again")
        if self.pending:
            lines.append(f"{self.pending:,} rows are not embedded yet; the same `featcache embed` goes on")
        if self.failed:
            lines.append(f"{self.failed:,} rows have no features, as recorded; `featcache info` names them")
        if self.sources:
            lines.append(f"{self.sources.same:,} images are the bytes that were embedded")
            lines += _named("another image", self.sources.differ)
        if self.recomputed:
            lines += _recomputed_lines(self.recomputed)
        return "\n".join([*lines, "sound" if self.sound else "not sound"])


def _named(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"  {title}: {name}: {why}" for name, why in rows[:_SHOWN]]
    return lines + ([f"  … and {len(rows) - _SHOWN:,} more (--json lists all)"] if len(rows) > _SHOWN else [])


def _recomputed_lines(found: Recomputed) -> list[str]:
    lines = [
        f"{found.rows:,} rows embedded again: largest |Δ| {found.largest_difference:.2g}, "
        f"lowest cosine {found.lowest_cosine:.7f}"
    ]
    lines += _named(
        "disagrees",
        [(path, f"|Δ| {delta:.2g}, cosine {cosine:.5f}") for path, delta, cosine in found.disagree],
    )
    return lines + _named("not compared", found.left_out)


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
    opened = FeatureStore.open(store, check=False)
    states = opened.inspect()
    seconds = time.perf_counter() - begun
    engine = None
    if recompute:
        embedder = Embedder.of_store(
            opened, weights=weights, allowed=backbone, device=device, batch_size=batch_size
        )
        engine = embedder.engine_for(opened, output=opened.path).engine
    images = None
    if sources or recompute:
        origin = find_origin(opened, data=data, root=root)
        images = _Images(
            store=opened,
            root=find_root(opened, data=data, root=root),
            follow_links=origin["follow_links"],
            workers=workers or default_workers(),
            progress=progress or SilentProgress(),
        )
    return VerifyResult(
        store=str(opened.path),
        rows=len(opened),
        blocks=len(states),
        bytes=os.path.getsize(opened.path),
        seconds=round(seconds, 4),
        damaged=_damaged(opened, states),
        pending=sum(_length(opened, b) for b, state in enumerate(states) if state is BlockState.PENDING),
        failed=len(opened.failed_rows()),
        sources=_check_sources(images) if images and sources else None,
        recomputed=_recompute(images, engine, count=recompute, seed=seed) if images and engine else None,
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
    differ = []
    images.progress.start("reading images", total=len(rows), unit="images")
    with ThreadPoolExecutor(images.workers) as pool:
        for row, identity in zip(rows, pool.map(hash_image, map(images.file, rows)), strict=True):
            if isinstance(identity, ImageFailure):
                differ.append((store.table.ids[row], identity.reason))
            elif identity.sha256 != images.recorded_sha256(row):
                differ.append((store.table.ids[row], _OTHER_BYTES))
            images.progress.advance(1)
    images.progress.finish()
    return SourceCheck(same=len(rows) - len(differ), differ=tuple(differ))


def _recompute(images: _Images, engine: Engine, *, count: int, seed: int) -> Recomputed:
    """Embed `count` rows that have features again, drawn at random, and compare them with the store's."""
    store, ids = images.store, images.store.table.ids
    usable = np.flatnonzero(store.row_status == RowStatus.OK)
    rows = np.sort(np.random.default_rng(seed).permutation(usable)[:count]).tolist()
    compared: list[tuple[str, float, float]] = []
    left_out: list[tuple[str, str]] = []
    left = iter(rows)
    images.progress.start("embedding again", total=len(rows), unit="images")
    for batch in embed_files(
        [images.file(row) for row in rows],
        engine=engine,
        preprocessing=store.spec.preprocessing,
        workers=images.workers,
    ):
        for place, outcome in enumerate(batch.outcomes):
            row = next(left)
            if isinstance(outcome, ImageFailure):
                left_out.append((ids[row], outcome.reason))
            elif outcome.sha256 != images.recorded_sha256(row):
                left_out.append((ids[row], _OTHER_BYTES))
            else:
                vectors = {key: array[place] for key, array in batch.features.items()}
                compared.append((ids[row], *_compare(store, row, vectors)))
        images.progress.advance(len(batch.outcomes))
    images.progress.finish()
    return Recomputed(
        rows=len(compared),
        largest_difference=max((delta for _, delta, _ in compared), default=0.0),
        lowest_cosine=min((cosine for _, _, cosine in compared), default=1.0),
        disagree=tuple(row for row in compared if not row[2] >= SAME_COSINE),
        left_out=tuple(left_out),
    )


def _compare(
    store: FeatureStore, row: int, vectors: Mapping[str, NDArray[np.float32]]
) -> tuple[float, float]:
    """The largest |Δ| and the lowest cosine over the nodes, in the store's dtype."""
    pairs = []
    for key, vector in vectors.items():
        have = store.map(key)[row]
        with np.errstate(over="ignore"):
            pairs.append((have.astype(np.float64), vector.astype(have.dtype).astype(np.float64)))
    return max(float(np.abs(a - b).max()) for a, b in pairs), min(_cosine(a, b) for a, b in pairs)


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if np.array_equal(a, b):
        return 1.0
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0
