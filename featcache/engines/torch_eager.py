"""The engine that runs PyTorch as it is: every operation in turn, on the CPU, CUDA or MPS.

Several threads may call it at once. On the CPU each computes alone on its processor. On CUDA each has a
stream of its own and memory that is pinned, so that the copies of one batch pass beside the arithmetic of
another.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.backbones.backbone import Backbone, freeze
from featcache.backbones.nodes import Extractor, make_extractor
from featcache.engines.batch import checked_count, filled
from featcache.engines.devices import device_words, find_device
from featcache.engines.replicas import Replicas, is_known
from featcache.errors import DeviceError
from featcache.spec import FeatureNode, Precision, Preprocessing

NAME = "torch-eager"

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# The first is the default. Those for accelerators are guesses.
BATCH_SIZES = {"cpu": (8, 2), "cuda": (256, 64, 1024), "mps": (64,)}
CALLERS = {"cpu": 0, "cuda": 3, "mps": 1}


class TorchEager:
    """An extractor on its device. Batches have one shape: a short one is filled with black images."""

    name = NAME

    def __init__(
        self,
        extractor: Extractor,
        *,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Precision,
        batch_size: int,
        copies: bool,
    ) -> None:
        freeze(extractor)
        self.nodes: tuple[FeatureNode, ...] = extractor.nodes
        self.batch_size = batch_size
        self.device = device_words(device)
        self.callers = CALLERS[device.type]
        self._device = device
        self._dtype: torch.dtype = getattr(torch, precision)
        self._size = preprocessing.crop_size
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        on_device = extractor.to(device).to(memory_format=torch.channels_last)
        probe = torch.linspace(-1, 1, 3 * self._size**2, device=device).view(1, 3, self._size, self._size)
        self._replicas = Replicas(on_device, probe=probe, copies=copies)

    def allocate(self) -> NDArray[np.uint8]:
        """Zeros (batch_size, S, S, 3) where the device copies from fastest."""
        shape = (self.batch_size, self._size, self._size, 3)
        pinned = self._device.type == "cuda"
        pixels: NDArray[np.uint8] = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned).numpy()
        return pixels

    def embed(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """{node key: float32 ndarray (B, D)} of uint8 pixels (B, S, S, 3), 1 <= B <= batch_size."""
        count = checked_count(pixels, size=self._size, batch_size=self.batch_size)
        pixels = filled(pixels, batch_size=self.batch_size)
        try:
            with torch.inference_mode(), self._queue() as queue:
                vectors = {key: self._fetch(value) for key, value in self._run(self._send(pixels)).items()}
                _wait_for(queue)
        except RuntimeError as error:
            if not _is_lack_of_memory(error):
                raise
            raise DeviceError(
                f"{self.device} has not enough memory for batches of {self.batch_size} images: "
                "pass a smaller --batch-size"
            ) from error
        return {key: value[:count].numpy() for key, value in vectors.items()}

    def _send(self, pixels: NDArray[np.uint8]) -> Tensor:
        """uint8 (batch_size, S, S, 3) on the device."""
        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        return images.to(self._device, non_blocking=True)

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        """{node key: (batch_size, D)} of what was sent."""
        with self._arithmetic(), self._replicas.own() as own:
            vectors: dict[str, Tensor] = own(self._normalised(images))
            return vectors

    def _normalised(self, images: Tensor) -> Tensor:
        """(batch_size, 3, S, S), channels last in memory, bit for bit what torchvision's preset gives."""
        scaled = images.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, S, S)
        return scaled.sub_(self._mean).div_(self._std)

    def _fetch(self, vectors: Tensor) -> Tensor:
        """(B, D) on its way to the host; there once the queue is waited for."""
        if self._device.type != "cuda":
            return vectors.cpu()
        return torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True).copy_(
            vectors, non_blocking=True
        )

    @contextmanager
    def _queue(self) -> Iterator[Any]:
        """The stream of the calling thread, where the device has streams."""
        if self._device.type != "cuda":
            yield None
            return
        stream = _streams.of_thread(self._device)
        with torch.cuda.stream(stream):
            yield stream

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The precision asked for: autocast below float32, and no TF32 where float32 is meant."""
        reduced = self._dtype is not torch.float32
        exact = _without_tf32 if self._device.type == "cuda" else nullcontext()
        with (
            torch.autocast(self._device.type, dtype=self._dtype if reduced else None, enabled=reduced),
            exact,
        ):
            yield


def _is_lack_of_memory(error: RuntimeError) -> bool:
    """Only CUDA has an exception for it."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


class _Streams:
    """A CUDA stream for each thread and device."""

    def __init__(self) -> None:
        self._local = threading.local()

    def of_thread(self, device: torch.device) -> torch.cuda.Stream:
        streams: dict[str, torch.cuda.Stream] = self._local.__dict__
        if str(device) not in streams:
            streams[str(device)] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return streams[str(device)]


_streams = _Streams()


def _wait_for(stream: Any) -> None:
    """Until all that was asked of the stream is done, without keeping a processor busy."""
    if stream is not None:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        done.synchronize()


class _WithoutTF32:
    """While entered, cuDNN computes float32 in float32.

    The switch is one for all threads: the first to enter saves it, the last to leave puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = (False, False)

    def __enter__(self) -> None:
        flags = torch.backends.cudnn
        with self._lock:
            if self._inside == 0:
                self._saved = (flags.allow_tf32, flags.deterministic)
                flags.allow_tf32, flags.deterministic = False, True
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = self._saved


_without_tf32 = _WithoutTF32()


def make(
    backbone: Backbone,
    *,
    nodes: Sequence[str],
    device: str,
    precision: Precision,
    batch_size: int | None,
) -> TorchEager:
    """What `make_engine` calls."""
    found = find_device(device)
    if found.type == "cpu":
        keep_freed_memory()
    return TorchEager(
        make_extractor(backbone, nodes),
        preprocessing=backbone.preprocessing,
        device=found,
        precision=precision,
        batch_size=batch_size or BATCH_SIZES[found.type][0],
        copies=is_known(backbone.module),
    )


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed activations for the next batch instead of unmapping it.

    Every batch needs the same buffers again, and mapping them anew costs a page fault for each 4 KiB.
    `scripts/bench_engine.py` measures it. Holds for the whole process; elsewhere does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_ARENA_MAX, 1)  # those of further threads would give it back all the same
