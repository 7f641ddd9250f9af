"""What the tail is fed with: activations from a store, or images decoded and run through the frozen part.

Rows are indices into the images of the run. A batch is ready before it is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.backbones.nodes import Extractor
from featcache.engines.replicas import one_thread_of_torch, threads_of_torch_kept
from featcache.errors import DataError
from featcache.images.decode import Decoder, load_pictures
from featcache.images.identity import ImageFailure
from featcache.images.paths import show_path
from featcache.spec import Picture, Preprocessing
from featcache.tuning.trivial import augment as augment_pixels

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # batches that are made ready beside the one in work


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows whose activations are wanted. epoch: of the augmented pictures to be seen; None for plain ones."""

    rows: NDArray[np.int64]
    epoch: int | None = None


class Source(Protocol):
    """Where activations come from."""

    def stream(self, batches: Sequence[Batch]) -> Generator[Tensor]:
        """The activations (n, values) of each batch in turn, float32, on the device that trains."""


class StoredActivations:
    """From a store's memory maps: no image is opened and no frozen layer runs.

    views: arrays (n_rows, values), one a view, the plain one first. index: the store's row of each image.
    """

    def __init__(
        self,
        views: Sequence[NDArray[np.floating]],
        index: NDArray[np.int64],
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._views, self._index, self._seed, self._device = views, index, seed, device

    def stream(self, batches: Sequence[Batch]) -> Generator[Tensor]:
        with ThreadPoolExecutor(1, thread_name_prefix="activations") as pool:
            for activations in _ahead(pool, self._read, batches):
                yield torch.from_numpy(activations).to(self._device)

    def _read(self, batch: Batch) -> NDArray[np.float32]:
        view_of = drawn_views(len(self._index), views=len(self._views), epoch=batch.epoch, seed=self._seed)[
            batch.rows
        ]
        found = np.empty((len(batch.rows), self._views[0].shape[1]), dtype=np.float32)
        for view in np.unique(view_of).tolist():
            of_view = view_of == view
            found[of_view] = self._views[view][self._index[batch.rows[of_view]]]
        return found


@lru_cache(maxsize=2)  # asked for by every batch of an epoch
def drawn_views(images: int, *, views: int, epoch: int | None, seed: int) -> NDArray[np.int64]:
    """Which view of each image an epoch sees; the plain one, 0, where there is no epoch."""
    if epoch is None or views == 1:
        return np.zeros(images, dtype=np.int64)
    return np.random.default_rng([seed, epoch, 1]).integers(views, size=images)


class LiveActivations:
    """From the images themselves, decoded for each batch and run through the frozen part, if there is one.

    With `augment` an epoch sees a view of its own of every image; `trivial` changes it by TrivialAugment.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        preprocessing: Preprocessing,
        decoder: Decoder,
        prefix: Extractor | None,
        augment: bool,
        trivial: bool,
        seed: int,
        precision: str,
        workers: int,
        device: torch.device,
    ) -> None:
        self._files, self._preprocessing, self._decoder = files, preprocessing, decoder
        self._prefix, self._augment, self._seed, self._device = prefix, augment, seed, device
        self._trivial, self._workers = trivial, workers
        self._reduced = getattr(torch, precision) if precision != "float32" else None
        mean, std = (torch.tensor(v, device=device) for v in (preprocessing.mean, preprocessing.std))
        self._mean, self._std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)

    def stream(self, batches: Sequence[Batch]) -> Generator[Tensor]:
        with (
            threads_of_torch_kept(),
            ThreadPoolExecutor(self._workers, "decode", initializer=one_thread_of_torch) as pool,
        ):
            for pixels in self._decoded(pool, batches):
                yield self._through_prefix(torch.from_numpy(pixels).to(self._device))

    def _decoded(self, pool: ThreadPoolExecutor, batches: Sequence[Batch]) -> Iterator[NDArray[np.uint8]]:
        images = ((batch, row) for batch in batches for row in batch.rows.tolist())
        ahead = _AHEAD * max((len(batch.rows) for batch in batches), default=1)
        loaded = _ahead(pool, lambda image: self._load(*image), images, ahead=ahead)
        for batch in batches:
            yield np.stack([next(loaded) for _ in batch.rows])

    def _load(self, batch: Batch, row: int) -> NDArray[np.uint8]:
        view = 1 + batch.epoch if self._augment and batch.epoch is not None else 0
        picture = Picture(preprocessing=self._preprocessing, view=view, seed=self._seed)
        loaded = load_pictures(self._files[row], (picture,), decoder=self._decoder)
        if isinstance(loaded, ImageFailure):
            raise DataError(
                f"{show_path(self._files[row])} cannot be used any more: {loaded.reason}. "
                "Mend or remove it, then run the same command again."
            )
        if not self._trivial or batch.epoch is None:
            return loaded.pixels[0]
        return augment_pixels(loaded.pixels[0], np.random.default_rng([self._seed, batch.epoch, row, 3]))

    def _through_prefix(self, pixels: Tensor) -> Tensor:
        """(B, values) of uint8 pixels (B, S, S, 3)."""
        images = pixels.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, S, S)
        images = images.sub_(self._mean).div_(self._std)
        if self._prefix is None:
            return images
        reduced = self._reduced
        with torch.no_grad(), torch.autocast(self._device.type, reduced, enabled=reduced is not None):
            (activations,) = self._prefix(images).values()
        found: Tensor = activations
        return found


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], *, ahead: int = _AHEAD
) -> Iterator[R]:
    """`pool.map`, with no more than `ahead` results waiting to be taken."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
