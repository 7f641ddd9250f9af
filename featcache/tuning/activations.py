"""Where the activations at the cut come from: a store that is made once, or the images each time.

The choice is measured: batches of decoding and of the frozen part against what the disk writes and reads.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbones import Backbone
from featcache.backbones.cut import Tail
from featcache.backbones.nodes import Extractor, make_extractor
from featcache.disk import disk_errors
from featcache.embedder import Embedder
from featcache.embedding import Embedding
from featcache.errors import DataError, SpecMismatch, TooManyFailures
from featcache.images.decode import LoadedPictures, load_pictures
from featcache.images.identity import ImageFailure
from featcache.images.paths import resolve, show_path
from featcache.model import Model
from featcache.progress import Progress
from featcache.records import Listing, RowStatus
from featcache.request import EmbedRequest, recorded_decoder
from featcache.spec import Picture
from featcache.store.features import FeatureSet
from featcache.store.files import StoreFiles
from featcache.store.layout import RowTable
from featcache.store.reader import FeatureStore
from featcache.together import carry_out
from featcache.tuning.asked import Asked, Cache
from featcache.tuning.dataset import DataSet, without_vectors
from featcache.tuning.ranks import Message, Ranks
from featcache.tuning.settings import Settings
from featcache.tuning.sources import Batch, LiveActivations, Source, StoredActivations
from featcache.update import update_store
from featcache.words import plural

_MEASURED = 2  # batches, after one that warms up
_PROBE_BYTES = 1 << 24  # at least so much is written and read to know the disk
_SHOWN = 10  # images that cannot be used
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

    asked: Asked
    model: Model
    backbone: Backbone
    tail: Tail
    data: DataSet
    store: Path
    workers: int
    ranks: Ranks
    progress: Progress

    @property
    def settings(self) -> Settings:
        return self.asked.settings

    def prepare(self, *, begun_with: Mapping[str, Any]) -> Prepared:
        """Decide, say so, and make ready.

        begun_with: what the run of a checkpoint did, if there is one. DataError, DiskError, BackboneError:
        what stands in the way.
        """
        cache = self.asked.cache
        if cache == "auto" and isinstance(begun_with.get("cached"), bool) and self.tail.key:
            cache = "yes" if begun_with["cached"] else "no"  # what was measured once may be otherwise now
        cached, said = self.ranks.from_first(lambda: Message(self._decide(cache))).plain
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
        listing = self.data.listing
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
        files = self._some_usable(listing)
        size = max(1, len(files) // (1 + _MEASURED))
        rows = np.resize(np.arange(len(files)), (1 + _MEASURED, size))
        batches = [Batch(of_batch) for of_batch in rows]
        marks = []
        for activations in self._live(files).stream(batches):
            activations.sum().item()  # waits for a device that computes beside us
            marks.append(time.perf_counter())
        return (marks[-1] - marks[0]) / (_MEASURED * size)

    def _some_usable(self, listing: Listing) -> list[Path]:
        """Files to measure with, from all over the data; DataError where none of those can be decoded."""
        count = min(len(listing.records), (1 + _MEASURED) * self.settings.batch_size)
        spread = np.unique(np.linspace(0, len(listing.records) - 1, count).astype(np.int64))
        files = [resolve(listing.root, listing.records[row].path) for row in spread.tolist()]
        with ThreadPoolExecutor(self.workers, "look") as pool:
            reasons = [
                found.reason if isinstance(found, ImageFailure) else None
                for found in pool.map(self._load_plain, files)
            ]
        usable = [file for file, reason in zip(files, reasons, strict=True) if reason is None]
        if not usable:
            raise DataError(
                f"none of {plural(len(files), 'image')} can be used, first {show_path(files[0])}: "
                f"{reasons[0]}. Mend or remove them."
            )
        return usable

    def _load_plain(self, file: Path) -> LoadedPictures | ImageFailure:
        plain = (Picture(preprocessing=self.model.spec.preprocessing),)
        return load_pictures(file, plain, decoder=recorded_decoder(self.model.provenance))

    def _bytes_an_image(self) -> int:
        return int(np.prod(self.tail.shape)) * np.dtype(self.asked.store_dtype).itemsize

    # From a store

    def _from_store(self, said: str) -> Prepared:
        notes = self.ranks.from_first(lambda: Message(self._embed())).plain
        store = FeatureStore.open(self.store, check=self.ranks.is_first)
        index = np.flatnonzero(store.row_status == RowStatus.OK)
        images = without_vectors(
            store.table, index, sha256=np.array(store.sources["sha256"][index]), model=self.model
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
            store_dtype=self.asked.store_dtype,
            said=said,
            notes=tuple(notes),
        )

    def _embed(self) -> tuple[str, ...]:
        """Bring the store up to date, as `featcache embed` would."""
        recorded = self.model.request
        embedder = Embedder(
            EmbedRequest(
                backbone=recorded["backbone"],
                weights=recorded.get("weights"),
                seed=recorded.get("seed", 0),
                nodes=(self.tail.key,),
                precision=self.settings.precision,
                store_dtype=self.asked.store_dtype,
                views=self.settings.views,
                jpeg=self.model.spec.preprocessing.jpeg,
            ),
            backbone=self.backbone,
            device=str(self.ranks.device),
            engine=self.asked.engine,
            decoder=recorded_decoder(self.model.provenance),
            workers=self.workers,
        )
        run = Embedding(
            files=StoreFiles.at(self.store),
            embedder=embedder,
            data=self.data.origin,
            workers=self.workers,
            max_failures=self.asked.max_failures,
            progress=self.progress,
            prune=True,
        )
        try:
            result = carry_out(update_store(run, lambda: self.data.listing))
        except SpecMismatch as error:
            raise SpecMismatch(
                f"{show_path(self.store)} holds activations for another model or other options: {error} "
                "Or remove it."
            ) from error
        self._require_finite(result.failures)
        return (*result.notes, *_failure_notes(result.failures))

    def _require_finite(self, failures: Iterable[tuple[str, str]]) -> None:
        words = RowStatus.NON_FINITE.words
        if self.asked.store_dtype == "float16" and any(why == words for _, why in failures):
            raise DataError(
                f"activations at {self.tail.key} are beyond the range of float16: "
                f"remove {show_path(self.store)} and pass --store-dtype float32."
            )

    # From the images

    def _from_images(self, said: str) -> Prepared:
        listing = self.data.listing
        looked = self.ranks.from_first(lambda: self._identify(listing))
        failed = {int(row): why for row, why in looked.plain.items()}
        usable = np.setdiff1d(np.arange(len(listing.records)), list(failed))
        table = RowTable.from_records(listing.records, listing.classes)
        images = without_vectors(table, usable, sha256=looked.arrays["sha256"][usable], model=self.model)
        files = [resolve(listing.root, path) for path in images.ids]
        failures = [(listing.records[row].path, why) for row, why in failed.items()]
        return Prepared(
            images=images,
            source=self._live(files),
            cached=False,
            store=None,
            store_dtype="",
            said=said,
            notes=(*listing.notes, *_failure_notes(failures)),
        )

    def _identify(self, listing: Listing) -> Message:
        """The sha256 of every image, and by row why some cannot be used: each is decoded once to know."""
        sha256 = np.zeros((len(listing.records), 32), dtype=np.uint8)
        failed: dict[str, str] = {}
        self.progress.start("looking at images", total=len(listing.records), unit="images")
        with ThreadPoolExecutor(self.workers, "look") as pool:
            files = [resolve(listing.root, record.path) for record in listing.records]
            for row, loaded in enumerate(pool.map(self._load_plain, files)):
                if isinstance(loaded, ImageFailure):
                    failed[str(row)] = loaded.reason
                else:
                    sha256[row] = np.frombuffer(loaded.sha256, dtype=np.uint8)
                self.progress.advance(1)
        self.progress.finish()
        allowed = self.asked.max_failures
        if len(failed) > max(1, allowed * len(listing.records)):
            first, why = next(iter(failed.items()))
            raise TooManyFailures(
                f"{len(failed):,} of {len(listing.records):,} images cannot be used, more than the "
                f"{allowed:.1%} allowed, first {show_path(listing.records[int(first)].path)}: {why}. "
                "Mend or remove them, or allow more with --max-failures."
            )
        return Message(failed, {"sha256": sha256})

    def _live(self, files: list[Path]) -> LiveActivations:
        return LiveActivations(
            files,
            preprocessing=self.model.spec.preprocessing,
            decoder=recorded_decoder(self.model.provenance),
            prefix=self._prefix,
            augment=self.settings.views > 1,
            trivial=self.settings.trivial_augment,
            seed=self.settings.seed,
            precision=self.settings.precision,
            workers=self.workers,
            device=self.ranks.device,
        )

    @cached_property
    def _prefix(self) -> Extractor | None:
        """The frozen part on its device; None where there is none."""
        if not self.tail.key:
            return None
        extractor = make_extractor(self.backbone, [self.tail.key])
        return extractor.to(self.ranks.device).to(memory_format=torch.channels_last)


def _failure_notes(failures: Sequence[tuple[str, str]]) -> list[str]:
    shown = [f"failed: {show_path(path)}: {why}" for path, why in failures[:_SHOWN]]
    more = len(failures) - _SHOWN
    return shown if more <= 0 else [*shown, f"and {more:,} more failed"]


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
