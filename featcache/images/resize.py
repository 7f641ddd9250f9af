"""From the pixels of an image to those of a backbone's input: resized, cut out, padded.

Two ways to the same geometry, that of torchvision's `ImageClassification` preset and `resized_crop`:

    exact   by Pillow, which is torchvision on a PIL image, bit for bit
    fast    by torch's antialiasing interpolation of uint8, which is torchvision on a tensor

Both resize one axis, round to whole values, and resize the other. Where they begin with the same axis the
fast pixels are at most 1 of 255 from the exact ones (bilinear) or 2 (bicubic), and few differ. Pillow 13
begins with the other axis in tall pictures, which therefore go the exact way, and in some views: there up to
a third of the values differ, by 1 (bilinear), or by more at hard edges (bicubic).

A picture whose resized form has more than `_MAX_RESIZED` pixels is exact to within rounding only. Knows
pictures in memory.

torch's interpolation takes as many threads as torch is set to: who calls from several threads sets one
(`torch.set_num_threads`), each in its own thread.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.images.views import Cut
from featcache.spec import Preprocessing

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width, height

_MAX_RESIZED = 25_000_000  # pixels of a resized picture, of which only the centre is wanted
_TALL = 2  # height / width from which Pillow may resize the columns first
_TORCH_MODES = ("bilinear", "bicubic")  # that torch antialiases; the others go the exact way


class Canvas(Protocol):
    """An upright RGB image, of which pictures (crop_size, crop_size, 3) are made.

    Where it was shrunk before, it is resized as the `whole` size says: a rounded side must not move the crop.
    """

    @property
    def size(self) -> Size: ...

    def plain(self, preprocessing: Preprocessing) -> Pixels:
        """The shorter side resized to `resize_size`, of that the centre, padded with black."""

    def view(self, cut: Cut, preprocessing: Preprocessing) -> Pixels:
        """The part `cut` resized to the square, whatever its aspect."""


class PillowCanvas:
    """The exact way."""

    def __init__(self, image: Image.Image, *, whole: Size) -> None:
        self._image = image
        self._whole = whole
        self.size: Size = image.size

    def plain(self, preprocessing: Preprocessing) -> Pixels:
        size = _resized(self._whole, preprocessing.resize_size)
        crop, resample = preprocessing.crop_size, _resample(preprocessing)
        if size[0] * size[1] > _MAX_RESIZED:
            return np.array(_resize_centre(self._image, size, crop, resample))
        return np.array(_centre_crop(self._image.resize(size, resample), crop))

    def view(self, cut: Cut, preprocessing: Preprocessing) -> Pixels:
        crop = preprocessing.crop_size
        # Cut before resizing, as torchvision does: Pillow's `box` would look at pixels outside it.
        image = self._image.crop(cut.box).resize((crop, crop), _resample(preprocessing))
        return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if cut.flip else image)


class TorchCanvas:
    """The fast way, for an array (H, W, 3)."""

    def __init__(self, pixels: Pixels, *, whole: Size) -> None:
        self._pixels = pixels
        self._whole = whole
        self.size: Size = (pixels.shape[1], pixels.shape[0])

    def plain(self, preprocessing: Preprocessing) -> Pixels:
        size = _resized(self._whole, preprocessing.resize_size)
        crop = preprocessing.crop_size
        long = size[0] * size[1] > _MAX_RESIZED or size[1] >= _TALL * size[0]
        if long or preprocessing.interpolation not in _TORCH_MODES:
            return self._exact().plain(preprocessing)
        return _centre_of(_interpolate(self._pixels, size, preprocessing.interpolation), crop)

    def view(self, cut: Cut, preprocessing: Preprocessing) -> Pixels:
        if preprocessing.interpolation not in _TORCH_MODES:
            return self._exact().view(cut, preprocessing)
        part = self._pixels[cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]
        crop = preprocessing.crop_size
        square = _interpolate(part, (crop, crop), preprocessing.interpolation)
        return np.array(square[:, ::-1] if cut.flip else square, order="C")

    def _exact(self) -> PillowCanvas:
        return PillowCanvas(Image.fromarray(self._pixels), whole=self._whole)


def _resample(preprocessing: Preprocessing) -> Image.Resampling:
    return Image.Resampling[preprocessing.interpolation.upper()]


def _resized(size: Size, shorter: int) -> Size:
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _interpolate(pixels: Pixels, size: Size, mode: str) -> Pixels:
    """`pixels` (H, W, 3) resized to `size` by torch, antialiased.

    A picture that was put upright is a view of another order in memory. A mirrored one is resized as it lies,
    and the small result mirrored. A quarter turn cannot wait: the axes would be resized in the other order.
    """
    import torch
    from torch.nn.functional import interpolate

    mirror = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in pixels.strides[:2])
    # The batch of one is put in front before the axes are turned: that way round torch sees channels last,
    # else it takes the result apart into planes.
    batch = torch.from_numpy(_in_order(pixels[mirror]))[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    resized = interpolate(batch, size=size[::-1], mode=mode, antialias=True, align_corners=False)
    array: Pixels = resized.permute(0, 2, 3, 1).numpy()[0]
    return array[mirror]


def _in_order(pixels: Pixels) -> Pixels:
    """`pixels` (H, W, 3) in the order of memory, copied only where they are not."""
    whole = np.ascontiguousarray(pixels.view("V3"))  # numpy copies three bytes at once faster than one by one
    return whole.view(np.uint8)


def _centre_of(pixels: Pixels, crop: int) -> Pixels:
    """`_centre_crop` of an array (H, W, 3)."""
    height, width = pixels.shape[:2]
    if min(height, width) < crop:
        above, before = max(crop - height, 0) // 2, max(crop - width, 0) // 2
        padded = np.zeros((max(height, crop), max(width, crop), 3), dtype=np.uint8)
        padded[above : above + height, before : before + width] = pixels
        pixels = padded
    top, left = _offset(pixels.shape[0], crop), _offset(pixels.shape[1], crop)
    return np.array(pixels[top : top + crop, left : left + crop], order="C")


def _centre_crop(image: Image.Image, crop: int) -> Image.Image:
    if min(image.size) < crop:
        padded = Image.new("RGB", (max(image.width, crop), max(image.height, crop)))
        padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
        image = padded
    left, top = _offset(image.width, crop), _offset(image.height, crop)
    return image.crop((left, top, left + crop, top + crop))


def _offset(length: int, crop: int) -> int:
    return round((length - crop) / 2.0)


def _resize_centre(image: Image.Image, size: Size, crop: int, resample: Image.Resampling) -> Image.Image:
    """What `resize` and `_centre_crop` give for a very long image, without the part that is cut away.

    Equal to within rounding: the positions of the samples are the same, their weights are computed from a
    shorter origin.
    """
    spans = [_centre_span(old, new, crop) for old, new in zip(image.size, size, strict=True)]
    (left, right, from_x, to_x, out_x), (top, bottom, from_y, to_y, out_y) = spans
    part = image.crop((left, top, right, bottom))
    return _centre_crop(part.resize((out_x, out_y), resample, box=(from_x, from_y, to_x, to_y)), crop)


def _centre_span(old: int, new: int, crop: int) -> tuple[int, int, float, float, int]:
    """Along one axis: the part of the source to keep, the box in it, and how many pixels that becomes."""
    out = min(new, crop)
    scale = old / new  # source pixels for each resized one
    start = _offset(new, crop) if new > crop else 0
    reach = int(4 * max(scale, 1.0)) + 1  # the widest filter, Lanczos, reaches 3 pixels
    first = max(0, int(start * scale) - reach)
    last = min(old, int((start + out) * scale) + 1 + reach)
    return first, last, start * scale - first, min((start + out) * scale - first, last - first), out
