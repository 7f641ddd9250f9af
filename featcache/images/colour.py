"""Every mode of picture as 8-bit RGB: the policy `rgb-over-white-1` (`spec.COLOR_POLICY`).

    RGB                          as it is; 16-bit RGB is read by Pillow as its upper 8 bits
    1, L                         the same value in all three channels
    16-bit grey                  value * 255 / 65535, rounded (12-bit grey: value * 255 / 4095)
    P                            the colours of its palette
    alpha of any kind            composited on white
    CMYK, YCbCr, LAB, HSV        Pillow's conversion
    float, 32-bit integer        refused: nothing says which values are black and white

Colour profiles are ignored. Knows pictures in memory, not files. A change here that changes pixels is a new
name in `spec.COLOR_POLICY`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE = 258  # the TIFF tag
_FORMATS_OF_16_BIT_I = ("PNG", "PPM")  # mode "I" holds 16-bit values when it comes from these


class UnsupportedColor(ValueError):
    """A mode of picture that has no defined 8-bit RGB; says which."""


def to_rgb(image: Image.Image, *, image_format: str) -> Image.Image:
    """The loaded `image` in mode RGB. Raises UnsupportedColor, and whatever Pillow raises on damaged data."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise UnsupportedColor("a float image: its values for black and white are not defined")
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in _FORMATS_OF_16_BIT_I):
        return _from_grey16(image)
    if image.mode == "I":
        raise UnsupportedColor("a 32-bit integer image: its values for black and white are not defined")
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _from_grey16(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)  # (H, W)
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    white = (1 << bits) - 1
    grey = ((values * 255 + white // 2) // white).clip(max=255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    pixels = image.convert("LA") if image.mode == "La" else image
    pixels = pixels.convert("RGBA")
    white = Image.new("RGBA", pixels.size, "white")
    return Image.alpha_composite(white, pixels).convert("RGB")
