"""From an image file to the pixels of a backbone's input, uint8, before normalisation.

The file is read once; the sha256 is of exactly the bytes that were decoded. What is wrong with a file is an
`ImageFailure`, never an exception. Knows one image at a time: nothing of listings, stores or batches.

The kind of picture is told by its first bytes, never by its name. Geometry is that of torchvision's
`ImageClassification` preset on a PIL image, bit for bit, where the resized picture has at most
`_MAX_RESIZED` pixels.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from featcache.images.colour import UnsupportedColor, to_rgb
from featcache.images.identity import ImageBytes, ImageFailure, read_image
from featcache.records import FileStat, RowStatus
from featcache.spec import COLOR_POLICY, EXIF_POLICY, Preprocessing

MAX_PIXELS = 100_000_000

_MAX_RESIZED = 25_000_000  # pixels of a resized picture, of which only the centre is wanted

# What Pillow raises on damaged files, found by corrupting files of every format. Its warnings are
# exceptions in a process that asked for that.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)

_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class _Format:
    """A kind of picture: how its first bytes look and what opens it."""

    name: str
    starts: tuple[bytes, ...]
    opens: Callable[[BytesIO], ImageFile.ImageFile]


# Pillow's own dispatch is not used: it knows formats that run other programs, and it warns of pictures
# that are well within MAX_PIXELS. A JPEG with several pictures is opened as its first.
_FORMATS = (
    _Format(name="JPEG", starts=(b"\xff\xd8\xff",), opens=JpegImageFile),
    _Format(name="PNG", starts=(b"\x89PNG\r\n\x1a\n",), opens=PngImageFile),
    _Format(name="GIF", starts=(b"GIF87a", b"GIF89a"), opens=GifImageFile),
    _Format(name="BMP", starts=(b"BM",), opens=BmpImageFile),
    _Format(name="WEBP", starts=(b"RIFF",), opens=WebPImageFile),
    _Format(name="TIFF", starts=(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), opens=TiffImageFile),
    _Format(name="PPM", starts=(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), opens=PpmImageFile),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedImage:
    """The preprocessed pixels of an image and the identity of the bytes they come from.

    pixels: uint8 ndarray of shape (crop_size, crop_size, 3), RGB, not normalised.
    sha256: 32 bytes.
    note: what the user should know of the picture, such as "first of 3 frames".
    """

    pixels: NDArray[np.uint8]
    sha256: bytes
    stat: FileStat
    note: str | None = None


class _Refused(Exception):
    """The picture cannot be used; says why and how its row is marked."""

    def __init__(self, reason: str, status: RowStatus = RowStatus.UNDECODABLE) -> None:
        super().__init__(reason)
        self.status = status


def load_image(
    path: str | Path, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> LoadedImage | ImageFailure:
    """Read, identify, decode and preprocess the image at `path`.

    Raises ValueError for preprocessing that this version cannot do; never for what is in the file. May be
    called from several threads: most of the time is spent in C without the interpreter lock.
    """
    _check_preprocessing(preprocessing)
    read = read_image(path)
    if isinstance(read, ImageFailure):
        return read
    try:
        image, note = _decode(read, max_pixels=max_pixels)
        pixels = _resize_and_crop(image, preprocessing)
    except _Refused as refused:
        return ImageFailure(status=refused.status, reason=str(refused), stat=read.stat, sha256=read.sha256)
    return LoadedImage(pixels=np.array(pixels), sha256=read.sha256, stat=read.stat, note=note)


def silence_pillow_warnings() -> None:
    """Stop Pillow's warnings of odd files in this process; for the one who owns the process, once.

    They repeat what is judged here, and filters are shared by all threads, so decoding leaves them alone.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _check_preprocessing(preprocessing: Preprocessing) -> None:
    if (preprocessing.color, preprocessing.exif) != (COLOR_POLICY, EXIF_POLICY):
        raise ValueError(
            f"this version decodes with {COLOR_POLICY} and {EXIF_POLICY}, "
            f"not {preprocessing.color} and {preprocessing.exif}"
        )
    if not preprocessing.antialias:
        raise ValueError("resizing always antialiases; preprocessing with antialias=False is not available")


def _decode(read: ImageBytes, *, max_pixels: int) -> tuple[Image.Image, str | None]:
    """The first frame as upright RGB, and a note. Raises _Refused."""
    kind = _sniff(read.data)
    try:
        with _whole_images, kind.opens(BytesIO(read.data)) as opened:
            _check_size(opened.size, max_pixels)
            opened.load()
            image = to_rgb(opened, image_format=kind.name)
            if image is opened:
                image = opened.copy()  # counting frames moves the opened file to others
            return _upright(image, opened), _frame_note(opened)
    except UnsupportedColor as error:
        raise _Refused(str(error)) from error
    except Image.DecompressionBombError as error:
        raise _Refused(f"too large: {_one_line(error)}", RowStatus.TOO_LARGE) from error
    except _DAMAGE as error:
        raise _Refused(f"damaged {kind.name}: {_one_line(error)}") from error


def _sniff(data: bytes) -> _Format:
    """The format that the first bytes announce."""
    if not data:
        raise _Refused("empty file")
    for kind in _FORMATS:
        if data.startswith(kind.starts):
            return kind
    start = data[:24].decode("ascii", errors="replace").strip().split("\n")[0].rstrip()
    if start.isprintable() and start.isascii() and start:
        raise _Refused(f"not an image: begins with '{start}'")
    raise _Refused(f"not an image of a known format: begins with bytes {data[:8].hex(' ')}")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _Refused(f"no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise _Refused(
            f"too large: {width:,} x {height:,} = {_in_millions(width * height)} pixels, "
            f"the limit is {_in_millions(max_pixels)}",
            RowStatus.TOO_LARGE,
        )


def _upright(image: Image.Image, opened: ImageFile.ImageFile) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is where that is absent or damaged."""
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        transpose = _TRANSPOSES.get(orientation)
    except _DAMAGE:
        return image
    return image if transpose is None else image.transpose(transpose)


def _frame_note(opened: ImageFile.ImageFile) -> str | None:
    try:
        frames = getattr(opened, "n_frames", 1)
    except _DAMAGE:  # the first frame is whole, or it would not have come this far
        return "first of several frames, others damaged"
    return f"first of {frames} frames" if frames > 1 else None


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Shorter side to `resize_size`, then the centre square of `crop_size`, padded with black."""
    width, height = _resized(image.size, preprocessing.resize_size)
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    crop = preprocessing.crop_size
    if width * height > _MAX_RESIZED:
        return _resize_centre(image, (width, height), crop, resample)
    return _centre_crop(image.resize((width, height), resample), crop)


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _centre_crop(image: Image.Image, crop: int) -> Image.Image:
    if min(image.size) < crop:
        padded = Image.new("RGB", (max(image.width, crop), max(image.height, crop)))
        padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
        image = padded
    left, top = _offset(image.width, crop), _offset(image.height, crop)
    return image.crop((left, top, left + crop, top + crop))


def _offset(length: int, crop: int) -> int:
    return round((length - crop) / 2.0)


def _resize_centre(
    image: Image.Image, size: tuple[int, int], crop: int, resample: Image.Resampling
) -> Image.Image:
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


class _WholeImages:
    """While entered, Pillow refuses truncated files, even in a process that told it to accept them.

    The switch is one for all threads: the first to enter saves it, the last to leave puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._saved

    def renew_lock(self) -> None:
        self._lock = threading.Lock()


_whole_images = _WholeImages()
# Another thread may have held the lock at the moment of the fork; in the child nobody would release it.
os.register_at_fork(after_in_child=_whole_images.renew_lock)


def _in_millions(count: int) -> str:
    return f"{count / 1e6:,.1f} million".replace(".0 million", " million")


def _one_line(error: BaseException, *, limit: int = 100) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
