"""What every engine asks of its pixels, and how a short batch is filled. Knows no network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def checked_count(pixels: NDArray[np.uint8], *, size: int, batch_size: int) -> int:
    """The number of images in `pixels`, which must be uint8 (B, size, size, 3), 1 <= B <= batch_size."""
    shape = (size, size, 3)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != shape:
        raise ValueError(f"pixels are uint8 of shape (B, {shape}), not {pixels.dtype} of {pixels.shape}")
    if not 1 <= len(pixels) <= batch_size:
        raise ValueError(f"a batch has 1 to {batch_size} images, not {len(pixels)}")
    return len(pixels)


def filled(pixels: NDArray[np.uint8], *, batch_size: int) -> NDArray[np.uint8]:
    """(batch_size, S, S, 3): a short batch is filled with black images, for kernels are chosen by shape."""
    missing = batch_size - len(pixels)
    return np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else pixels
