"""Pixels of plain JPEGs by simplejpeg, where it is installed: those of Pillow, without its detours.

What libjpeg-turbo as much as warns of is left to Pillow, whose judgement counts. Knows bytes in memory.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from numpy.typing import NDArray

AVAILABLE = importlib.util.find_spec("simplejpeg") is not None


def decode(data: bytes, size: tuple[int, int], *, shrink: int = 1) -> NDArray[np.uint8] | None:
    """RGB uint8 ndarray (H, W, 3) of a JPEG of `size` (width, height), each side divided by `shrink`.

    None where simplejpeg is not installed, or has anything to say against the file.
    """
    if not AVAILABLE:
        return None
    import simplejpeg

    width, height = (-(-side // shrink) for side in size)
    # A buffer of one's own: a forged file may announce another size to simplejpeg than it did to Pillow.
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    try:
        # Of the scales that leave this many pixels it takes the smallest, which is 1/shrink.
        decoded = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=pixels)
    except (ValueError, RuntimeError):
        return None
    return pixels if decoded.shape == pixels.shape else None
