"""`featcache verify`: is a store what was written, are its images those embedded, does the network agree."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featcache.embedder import Embedder, ReadyEngine
from featcache.engines.agreement import LARGEST_DIFFERENCE, LOWEST_COSINE
from featcache.images.identity import ImageFailure, hash_image
from featcache.origin import find_origin, find_root, image_file
from featcache.pipeline import embed_files
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.records import RowStatus
from featcache.request import require_sizes
from featcache.store.blocks import BlockState
from featcache.store.reader import FeatureStore
from featcache.verification import DamagedRows, OtherImages, Recomputed, SourceCheck, VerifyResult

__all__ = ["VerifyResult", "verify"]


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
