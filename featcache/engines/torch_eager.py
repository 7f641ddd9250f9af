"""The engine that runs PyTorch as it is: every operation in turn, on the CPU, CUDA or MPS."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.backbones.backbone import Backbone, freeze
from featcache.backbones.nodes import Extractor, make_extractor
from featcache.engines.batch import checked_count, filled
from featcache.engines.devices import device_words, find_device
from featcache.spec import FeatureNode, Precision, Preprocessing

NAME = "torch-eager"

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# From one run on two busy cores before freed memory was kept; `scripts/bench_engine.py` measures it anew. The
# values for accelerators are guesses.
_BATCH_SIZE = {"cpu": 8, "cuda": 256, "mps": 64}


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
    ) -> None:
        freeze(extractor)
        self._extractor = extractor.to(device).to(memory_format=torch.channels_last)
        self._device = device
        self._dtype: torch.dtype = getattr(torch, precision)
        self._size = preprocessing.crop_size
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        self._batch_size = batch_size

    @property
    def nodes(self) -> tuple[FeatureNode, ...]:
        return self._extractor.nodes

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def device(self) -> str:
        return device_words(self._device)

    def embed(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """{node key: float32 ndarray (B, D)} of uint8 pixels (B, S, S, 3), 1 <= B <= batch_size."""
        count = checked_count(pixels, size=self._size, batch_size=self._batch_size)
        # Someone may have called .train() on the backbone since: batch-norm statistics must not move.
        self._extractor.eval()
        with torch.inference_mode(), self._arithmetic():
            vectors = self._extractor(self._normalised(pixels))
            return {key: value[:count].cpu().numpy() for key, value in vectors.items()}

    def _normalised(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(batch_size, 3, S, S), channels last in memory, bit for bit what torchvision's preset gives."""
        pixels = filled(pixels, batch_size=self._batch_size)
        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(self._device)
        scaled = images.permute(0, 3, 1, 2).float().div_(255)  # (B, 3, S, S)
        return scaled.sub_(self._mean).div_(self._std)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The precision asked for: autocast below float32, and no TF32 where float32 is meant."""
        reduced = self._dtype is not torch.float32
        with (
            torch.autocast(self._device.type, dtype=self._dtype if reduced else None, enabled=reduced),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            yield


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
        batch_size=batch_size or _BATCH_SIZE.get(found.type, _BATCH_SIZE["cpu"]),
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
