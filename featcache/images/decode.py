"""From an image file to the pixels of a backbone's input, uint8, before normalisation.

The file is read once and decoded once for all pictures asked of it; the sha256 is of exactly the bytes that
were decoded. What is wrong with a file is an `ImageFailure`, never an exception. Knows one image at a time:
nothing of listings, stores or batches.

A decoder is how the pixels are come by, not which: both judge files alike, and "fast" keeps within the bound
that `images.resize` names. JPEGs are shrunk by their decoder only where the preprocessing says "scaled".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.images.identity import ImageFailure, read_image
from featcache.images.opening import OpenImage, Refused
from featcache.images.own import OwnCanvas
from featcache.images.resize import Canvas, PillowCanvas, TorchCanvas
from featcache.images.views import draw_cut
from featcache.records import FileStat
from featcache.spec import COLOR_POLICY, EXIF_POLICY, Picture, Preprocessing
from featcache.transforms import find_transform

Decoder = Literal["exact", "fast"]

MAX_PIXELS = 100_000_000

# A shrunk JPEG keeps twice the pixels it will be resized to: resizing still averages over several, which
# hides most of what shrinking did, and the smallest view that is drawn is as large as the plain picture.
SCALED_KEEPS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPictures:
    """The preprocessed pictures of an image and the identity of the bytes they come from.

    pixels: uint8 ndarrays (crop_size, crop_size, 3), RGB, not normalised, in the order asked for; those of
    pictures that are alike are one array.
    sha256: 32 bytes.
    note: what the user should know of the image, such as "first of 3 frames".
    """

    pixels: tuple[NDArray[np.uint8], ...]
    sha256: bytes
    stat: FileStat
    note: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedImage:
    """The plain picture of an image; the fields are those of LoadedPictures."""

    pixels: NDArray[np.uint8]
    sha256: bytes
    stat: FileStat
    note: str | None = None


def load_image(
    path: str | Path,
    preprocessing: Preprocessing,
    *,
    decoder: Decoder = "exact",
    max_pixels: int = MAX_PIXELS,
) -> LoadedImage | ImageFailure:
    """`load_pictures` of the plain picture alone."""
    plain = Picture(preprocessing=preprocessing)
    loaded = load_pictures(path, (plain,), decoder=decoder, max_pixels=max_pixels)
    if isinstance(loaded, ImageFailure):
        return loaded
    return LoadedImage(pixels=loaded.pixels[0], sha256=loaded.sha256, stat=loaded.stat, note=loaded.note)


def load_pictures(
    path: str | Path,
    pictures: Sequence[Picture],
    *,
    decoder: Decoder = "exact",
    max_pixels: int = MAX_PIXELS,
) -> LoadedPictures | ImageFailure:
    """Read, identify and decode the image at `path`, and make `pictures` of it.

    Raises ValueError for preprocessing that this version cannot do; never for what is in the file. May be
    called from several threads: most of the time is spent in C without the interpreter lock.
    """
    for picture in pictures:
        _check_preprocessing(picture.preprocessing)
    canvas_of = _CANVASES[decoder]
    read = read_image(path)
    if isinstance(read, ImageFailure):
        return read
    try:
        image = OpenImage(read.data, max_pixels=max_pixels)
        pixels = _make(image, pictures, canvas_of, sha256=read.sha256)
    except Refused as refused:
        return ImageFailure(status=refused.status, reason=str(refused), stat=read.stat, sha256=read.sha256)
    return LoadedPictures(pixels=pixels, sha256=read.sha256, stat=read.stat, note=image.note)


def silence_pillow_warnings() -> None:
    """Stop Pillow's warnings of odd files in this process; for the one who owns the process, once.

    They repeat what is judged here, and filters are shared by all threads, so decoding leaves them alone.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _pillow_canvas(image: OpenImage, shrink: int) -> Canvas:
    decoded = image.decode(shrink=shrink)
    return PillowCanvas(decoded, whole=image.size)


def _torch_canvas(image: OpenImage, shrink: int) -> Canvas:
    decoded = image.decode_to_array(shrink=shrink)
    return TorchCanvas(decoded, whole=image.size)


def _own_canvas(image: OpenImage, shrink: int) -> Canvas:
    return OwnCanvas(image.decode(shrink=shrink))


_CANVASES: Mapping[Decoder, Callable[[OpenImage, int], Canvas]] = {
    "exact": _pillow_canvas,
    "fast": _torch_canvas,
}


def _check_preprocessing(preprocessing: Preprocessing) -> None:
    if (preprocessing.color, preprocessing.exif) != (COLOR_POLICY, EXIF_POLICY):
        raise ValueError(
            f"this version decodes with {COLOR_POLICY} and {EXIF_POLICY}, "
            f"not {preprocessing.color} and {preprocessing.exif}"
        )
    if preprocessing.transform:
        find_transform(preprocessing.transform)
    if not preprocessing.antialias:
        raise ValueError("resizing always antialiases; preprocessing with antialias=False is not available")


def _make(
    image: OpenImage,
    pictures: Sequence[Picture],
    canvas_of: Callable[[OpenImage, int], Canvas],
    *,
    sha256: bytes,
) -> tuple[NDArray[np.uint8], ...]:
    """The pixels of each picture; what several have in common is done once. Raises Refused."""
    canvases: dict[tuple[int, bool], Canvas] = {}  # by how much the decoder shrinks, and by whose transform
    made: dict[object, NDArray[np.uint8]] = {}
    keys = [_pixels_key(picture) for picture in pictures]
    for picture, key in zip(pictures, keys, strict=True):
        shrink = _shrink(image, picture.preprocessing)
        own = bool(picture.preprocessing.transform)
        if (shrink, own) not in canvases:
            canvases[shrink, own] = (_own_canvas if own else canvas_of)(image, shrink)
        if key not in made:
            made[key] = _picture(canvases[shrink, own], picture, sha256)
    return tuple(made[key] for key in keys)


def _pixels_key(picture: Picture) -> object:
    """What the pixels depend on; the rest of the preprocessing is done with them later."""
    pre = picture.preprocessing
    seed = picture.seed if picture.view else 0
    return pre.resize_size, pre.crop_size, pre.interpolation, pre.jpeg, pre.transform, picture.view, seed


def _shrink(image: OpenImage, preprocessing: Preprocessing) -> int:
    if preprocessing.jpeg == "full" or preprocessing.transform:  # which is to see the whole picture
        return 1
    return image.shrink_to(SCALED_KEEPS * preprocessing.resize_size)


def _picture(canvas: Canvas, picture: Picture, sha256: bytes) -> NDArray[np.uint8]:
    if picture.view == 0:
        return canvas.plain(picture.preprocessing)
    cut = draw_cut(canvas.size, sha256=sha256, seed=picture.seed, view=picture.view)
    return canvas.view(cut, picture.preprocessing)
