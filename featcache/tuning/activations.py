"""Where the activations at the cut come from: a store that is made once, or the images each time.

The choice is measured: batches of decoding and of the frozen part against what the disk writes and reads.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.backbones import Backbone
from featcache.backbones.cut import Tail
from featcache.backbones.nodes import make_extractor
from featcache.disk import disk_errors
from featcache.embedder import Embedder, ReadyEngine
from featcache.embedding import Embedding
from featcache.errors import DataError, SpecMismatch
from featcache.images import scan_images
from featcache.images.decode import load_pictures
from featcache.images.identity import ImageFailure
from featcache.images.paths import resolve, show_path
from featcache.model import Model
from featcache.origin import describe_origin
from featcache.progress import Progress
from featcache.records import Listing, RowStatus
from featcache.request import EmbedRequest, recorded_decoder
from featcache.spec import FeatureNode, FeatureSpec, Picture, StoreDtype
from featcache.store.features import FeatureSet
from featcache.store.files import StoreFiles
from featcache.store.layout import NO_SPLIT, RowTable
from featcache.store.reader import FeatureStore
from featcache.together import carry_out
from featcache.tuning.ranks import Ranks
from featcache.tuning.settings import Settings
from featcache.tuning.sources import Batch, LiveActivations, Source, StoredActivations
from featcache.update import update_store

Cache = Literal["auto", "yes", "no"]

_MEASURED = 2  # batches, after one that warms up
_PROBE_BYTES = 1 << 24  # at least so much is written and read to know the disk
_SPARE = 1.1  # the share of the space a store needs that must be free


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """The images of a run and the source of their activations. images: without vectors, which have no use."""

    images: FeatureSet
    source: Source
    cached: bool
    store: str | None
    store_dtype: str  # of the activations; "" where they are computed each time
    said: str  # why it is that source
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Preparation:
    """What is to be fine-tuned on what, up to the activations."""

    model: Model
    backbone: Backbone
    tail: Tail
    settings: Settings
    data: Path
    root: Path | None
    follow_links: bool
    store: Path
    store_dtype: StoreDtype
    engine: str
    workers: int
    ranks: Ranks
    progress: Progress
    _listing: Listing | None = field(default=None, init=False)

    def prepare(self, cache: Cache, *, begun_with: Mapping[str, Any]) -> Prepared:
        """Decide, say so, and make ready.

        begun_with: what the run of a checkpoint did, if there is one. DataError, DiskError, BackboneError:
        what stands in the way.
        """
        if cache == "auto" and isinstance(begun_with.get("cached"), bool) and self.tail.key:
            cache = "yes" if begun_with["cached"] else "no"  # what was measured once may be otherwise now
        cached, said = self.ranks.from_first(lambda: self._decide(cache))
        if self.ranks.is_first:
            self.progress.note(said)
        return self._from_store(said) if cached else self._from_images(said)

    # Deciding

    def _decide(self, cache: Cache) -> tuple[bool, str]:
        if self.settings.trivial_augment:
            if cache == "yes":
                raise DataError(
                    "TrivialAugment changes every image every epoch, so activations cannot be cached: "
                    "leave --cache yes or --trivial-augment away."
                )
            return False, "not cached: TrivialAugment changes every image every epoch"
        if not self.tail.key:
            return False, "nothing is frozen, so there is nothing to cache: images are decoded every epoch"
        listing = self._listed()
        count, bytes_an_image = len(listing.records) * self.settings.views, self._bytes_an_image()
        needed = count * bytes_an_image
        if cache == "no":
            return False, "not cached, as asked: images are decoded and the frozen part computed every epoch"
        if self.store.exists():
            return True, f"activations are cached in {show_path(self.store)}"
        with disk_errors(self.store, doing="looking for space for"):
            free = shutil.disk_usage(self.store.absolute().parent).free
        takes = f"{needed / 1e6:,.1f} MB in {show_path(self.store)}, {free / 1e9:,.1f} GB are free"
        if cache == "yes":
            return True, f"cached, as asked: {takes}"
        if needed * _SPARE > free:
            return False, f"not cached: it would take {takes}"
        return self._measure(listing, count, bytes_an_image, takes)

    def _measure(self, listing: Listing, count: int, bytes_an_image: int, takes: str) -> tuple[bool, str]:
        prefix_seconds = self._seconds_an_image(listing)
        speed = disk_speed(self.store, least=max(_PROBE_BYTES, self.settings.batch_size * bytes_an_image))
        reads = self.settings.epochs * len(listing.records)
        live = reads * prefix_seconds
        moving = bytes_an_image / speed.write, bytes_an_image / speed.read
        cached = count * (prefix_seconds + moving[0]) + reads * moving[1]
        measured = (
            f"decoding and the frozen part take {1e3 * prefix_seconds:.2f} ms an image, "
            f"reading its {bytes_an_image / 1e3:,.0f} KB {1e3 * moving[1]:.2f} ms at "
            f"{speed.read / 1e6:,.0f} MB/s: about {cached:,.0f} s with a cache, {live:,.0f} s without"
        )
        if cached < live:
            return True, f"cached: {measured}; it takes {takes}"
        return False, f"not cached: {measured}"

    def _seconds_an_image(self, listing: Listing) -> float:
        files = [resolve(listing.root, record.path) for record in listing.records]
        size = max(1, min(self.settings.batch_size, len(files) // (1 + _MEASURED)))
        spread = np.linspace(0, len(files) - 1, (1 + _MEASURED) * size).astype(np.int64)
        batches = [Batch(rows) for rows in np.split(spread, 1 + _MEASURED)]
        marks = []
        for activations in self._live(files).stream(batches):
            activations.sum().item()  # waits for a device that computes beside us
            marks.append(time.perf_counter())
        return (marks[-1] - marks[0]) / (_MEASURED * size)

    def _bytes_an_image(self) -> int:
        return int(np.prod(self.tail.shape)) * np.dtype(self.store_dtype).itemsize

    # From a store

    def _from_store(self, said: str) -> Prepared:
        notes = self.ranks.from_first(self._embed)
        store = FeatureStore.open(self.store, check=self.ranks.is_first)
        index = np.flatnonzero(store.row_status == RowStatus.OK)
        names = np.array([*("train", "val", "test"), ""])
        splits = np.where(store.table.splits == NO_SPLIT, 3, store.table.splits)
        images = _images(
            ids=tuple(store.table.ids[row] for row in index.tolist()),
            y=store.table.labels[index],
            classes=store.classes,
            splits=names[splits[index]],
            sha256=np.array(store.sources["sha256"][index]),
            spec=self.model.spec,
            nodes=self.model.nodes,
        )
        source = StoredActivations(
            [store.map(self.tail.key, view=view) for view in range(self.settings.views)],
            index,
            seed=self.settings.seed,
            device=self.ranks.device,
        )
        return Prepared(
            images=images,
            source=source,
            cached=True,
            store=str(self.store),
            store_dtype=self.store_dtype,
            said=said,
            notes=notes,
        )

    def _embed(self) -> tuple[str, ...]:
        """Bring the store up to date, as `featcache embed` would."""
        recorded = self.model.request
        embedder = _EmbedderOf(
            self.backbone,
            EmbedRequest(
                backbone=recorded["backbone"],
                weights=recorded.get("weights"),
                seed=recorded.get("seed", 0),
                nodes=(self.tail.key,),
                precision=self.settings.precision,
                store_dtype=self.store_dtype,
                views=self.settings.views,
                jpeg=self.model.spec.preprocessing.jpeg,
            ),
            device=str(self.ranks.device),
            engine=self.engine,
            decoder=recorded_decoder(self.model.provenance),
            workers=self.workers,
        )
        run = Embedding(
            files=StoreFiles.at(self.store),
            embedder=embedder,
            data=describe_origin(self.data, self.root, follow_links=self.follow_links),
            workers=self.workers,
            max_failures=0.01,
            progress=self.progress,
        )
        try:
            result = carry_out(update_store(run, self._listed))
        except SpecMismatch as error:
            raise SpecMismatch(
                f"{show_path(self.store)} holds activations for another model or other options: {error} "
                "Or remove it."
            ) from error
        self._require_finite(result.failures)
        return result.notes

    def _require_finite(self, failures: Iterable[tuple[str, str]]) -> None:
        words = RowStatus.NON_FINITE.words
        if self.store_dtype == "float16" and any(why == words for _, why in failures):
            raise DataError(
                f"activations at {self.tail.key} are beyond the range of float16: "
                f"remove {show_path(self.store)} and pass --store-dtype float32."
            )

    # From the images

    def _from_images(self, said: str) -> Prepared:
        listing = self._listed()
        sha256, failed = self.ranks.from_first(lambda: self._identify(listing))
        usable = [row for row in range(len(listing.records)) if row not in failed]
        table = RowTable.from_records(tuple(listing.records[row] for row in usable), listing.classes)
        images = _images(
            ids=table.ids,
            y=table.labels,
            classes=listing.classes,
            splits=np.array([listing.records[row].split or "" for row in usable]),
            sha256=sha256[usable],
            spec=self.model.spec,
            nodes=self.model.nodes,
        )
        files = [resolve(listing.root, path) for path in table.ids]
        shown = [f"failed: {show_path(listing.records[row].path)}: {why}" for row, why in failed.items()]
        return Prepared(
            images=images,
            source=self._live(files),
            cached=False,
            store=None,
            store_dtype="",
            said=said,
            notes=(*listing.notes, *shown[:10]),
        )

    def _identify(self, listing: Listing) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """The sha256 of every image, and why some cannot be used: each is decoded once to know."""
        plain = (Picture(preprocessing=self.model.spec.preprocessing),)
        decoder = recorded_decoder(self.model.provenance)
        sha256 = np.zeros((len(listing.records), 32), dtype=np.uint8)
        failed: dict[int, str] = {}
        self.progress.start("looking at images", total=len(listing.records), unit="images")
        with ThreadPoolExecutor(self.workers, "look") as pool:
            files = [resolve(listing.root, record.path) for record in listing.records]
            load = partial(load_pictures, pictures=plain, decoder=decoder)
            for row, loaded in enumerate(pool.map(load, files)):
                if isinstance(loaded, ImageFailure):
                    failed[row] = loaded.reason
                else:
                    sha256[row] = np.frombuffer(loaded.sha256, dtype=np.uint8)
                self.progress.advance(1)
        self.progress.finish()
        if len(failed) > max(1, 0.01 * len(listing.records)):
            row, why = next(iter(failed.items()))
            raise DataError(
                f"{len(failed):,} of {len(listing.records):,} images cannot be used, first "
                f"{show_path(listing.records[row].path)}: {why}. Mend or remove them."
            )
        return sha256, failed

    def _live(self, files: list[Path]) -> LiveActivations:
        prefix = None
        if self.tail.key:
            prefix = make_extractor(self.backbone, [self.tail.key]).to(self.ranks.device)
            prefix = prefix.to(memory_format=torch.channels_last)
        return LiveActivations(
            files,
            preprocessing=self.model.spec.preprocessing,
            decoder=recorded_decoder(self.model.provenance),
            prefix=prefix,
            augment=self.settings.views > 1,
            trivial=self.settings.trivial_augment,
            seed=self.settings.seed,
            precision=self.settings.precision,
            workers=self.workers,
            device=self.ranks.device,
        )

    def _listed(self) -> Listing:
        if self._listing is None:
            self._listing = scan_images(self.data, root=self.root, follow_links=self.follow_links)
        return self._listing


class _EmbedderOf(Embedder):
    """An embedder of a backbone that is here already, whatever weights its name would have."""

    def __init__(self, backbone: Backbone, request: EmbedRequest, **options: object) -> None:
        super().__init__(request, **options)  # type: ignore[arg-type]
        self._backbone = backbone

    def load(self, *, batch_size: int | None = None) -> ReadyEngine:
        return self._use(self._backbone, batch_size=batch_size)


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second."""

    write: float
    read: float


def disk_speed(beside: Path, *, least: int) -> DiskSpeed:
    """How fast `least` bytes are written to the disk of `beside`, and read again from it. DiskError."""
    data = np.random.default_rng(0).bytes(least)
    with (
        disk_errors(beside, doing="measuring the disk for"),
        tempfile.TemporaryFile(dir=beside.absolute().parent) as file,
    ):

        def write_out() -> None:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

        write = _seconds(write_out)
        if hasattr(os, "posix_fadvise"):  # else what is read may come from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        read = _seconds(file.read)
    return DiskSpeed(write=least / write, read=least / read)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return max(time.perf_counter() - begun, 1e-9)


def _images(
    *,
    ids: tuple[str, ...],
    y: NDArray[np.int64],
    classes: tuple[str, ...],
    splits: NDArray[np.str_],
    sha256: NDArray[np.uint8],
    spec: FeatureSpec,
    nodes: tuple[FeatureNode, ...],
) -> FeatureSet:
    return FeatureSet(
        X=np.empty((len(y), 0), dtype=np.float32),
        y=y,
        classes=classes,
        ids=ids,
        splits=splits,
        sha256=sha256,
        nodes=nodes,
        spec=spec,
    )
