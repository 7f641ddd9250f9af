"""TrivialAugment: one change of an image, drawn with its strength (Müller and Hutter, ICCV 2021).

The operations and strengths are those of the paper's wide space, as torchvision has it. Knows pixels only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

Pixels = NDArray[np.uint8]

STRENGTHS = 31  # of each operation


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
    """`inverse`: of each pixel (x, y) of the result, where it is from: (ax + by + c, dx + ey + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, inverse)


@dataclass(frozen=True)
class Operation:
    """`apply` with a strength from `weakest` to `strongest`, of either sign where it is `signed`."""

    apply: Callable[[Image.Image, float], Image.Image]
    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False


OPERATIONS = {
    "identity": Operation(lambda image, _: image),
    "shear x": Operation(lambda image, s: _affine(image, 1, s, 0, 0, 1, 0), 0, 0.99, True),
    "shear y": Operation(lambda image, s: _affine(image, 1, 0, 0, s, 1, 0), 0, 0.99, True),
    "translate x": Operation(lambda image, s: _affine(image, 1, 0, -int(s), 0, 1, 0), 0, 32, True),
    "translate y": Operation(lambda image, s: _affine(image, 1, 0, 0, 0, 1, -int(s)), 0, 32, True),
    "rotate": Operation(lambda image, s: image.rotate(s), 0, 135, True),
    "brightness": Operation(lambda image, s: ImageEnhance.Brightness(image).enhance(1 + s), 0, 0.99, True),
    "colour": Operation(lambda image, s: ImageEnhance.Color(image).enhance(1 + s), 0, 0.99, True),
    "contrast": Operation(lambda image, s: ImageEnhance.Contrast(image).enhance(1 + s), 0, 0.99, True),
    "sharpness": Operation(lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + s), 0, 0.99, True),
    "posterize": Operation(lambda image, s: ImageOps.posterize(image, round(s)), 8, 2),
    "solarize": Operation(lambda image, s: ImageOps.solarize(image, math.ceil(s)), 255, 0),
    "autocontrast": Operation(lambda image, _: ImageOps.autocontrast(image)),
    "equalize": Operation(lambda image, _: ImageOps.equalize(image)),
}


def augment(pixels: Pixels, draw: np.random.Generator) -> Pixels:
    """`pixels` (H, W, 3) after one operation, drawn with its strength and sign."""
    operation = list(OPERATIONS.values())[int(draw.integers(len(OPERATIONS)))]
    share = int(draw.integers(STRENGTHS)) / (STRENGTHS - 1)
    strength = operation.weakest + share * (operation.strongest - operation.weakest)
    if operation.signed and draw.integers(2):
        strength = -strength
    return np.array(operation.apply(Image.fromarray(pixels), strength))
