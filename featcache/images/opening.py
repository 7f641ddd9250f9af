"""From the bytes of an image file to its pixels, upright and RGB: the kinds of picture and what is refused.

What is wrong with a file is `Refused`, the only exception that leaves here. Knows one picture in memory:
nothing of files, sizes wanted or backbones.

The kind of picture is told by its first bytes, never by its name.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
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

from featcache.images import turbojpeg
from featcache.images.colour import UnsupportedColor, to_rgb
from featcache.records import RowStatus

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


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What puts a picture upright: Pillow's word for it, and the same for an array (H, W, 3)."""

    transpose: Image.Transpose
    of_array: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
    quarter: bool  # width and height change places


_TURNS: Mapping[int, _Turn] = {  # by EXIF orientation
    2: _Turn(transpose=Image.Transpose.FLIP_LEFT_RIGHT, quarter=False, of_array=lambda a: a[:, ::-1]),
    3: _Turn(transpose=Image.Transpose.ROTATE_180, quarter=False, of_array=lambda a: a[::-1, ::-1]),
    4: _Turn(transpose=Image.Transpose.FLIP_TOP_BOTTOM, quarter=False, of_array=lambda a: a[::-1]),
    5: _Turn(transpose=Image.Transpose.TRANSPOSE, quarter=True, of_array=lambda a: a.transpose(1, 0, 2)),
    6: _Turn(transpose=Image.Transpose.ROTATE_270, quarter=True, of_array=lambda a: np.rot90(a, -1)),
    7: _Turn(
        transpose=Image.Transpose.TRANSVERSE,
        quarter=True,
        of_array=lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    ),
    8: _Turn(transpose=Image.Transpose.ROTATE_90, quarter=True, of_array=lambda a: np.rot90(a)),
}


@dataclass(frozen=True, kw_only=True)
class _Format:
    """A kind of picture: how its first bytes look and what opens it."""

    name: str
    starts: tuple[bytes, ...]
    opens: Callable[[BytesIO], ImageFile.ImageFile]


# Pillow's own dispatch is not used: it knows formats that run other programs, and it warns of pictures
# that are well within the limit. A JPEG with several pictures is opened as its first.
_FORMATS = (
    _Format(name="JPEG", starts=(b"\xff\xd8\xff",), opens=JpegImageFile),
    _Format(name="PNG", starts=(b"\x89PNG\r\n\x1a\n",), opens=PngImageFile),
    _Format(name="GIF", starts=(b"GIF87a", b"GIF89a"), opens=GifImageFile),
    _Format(name="BMP", starts=(b"BM",), opens=BmpImageFile),
    _Format(name="WEBP", starts=(b"RIFF",), opens=WebPImageFile),
    _Format(name="TIFF", starts=(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), opens=TiffImageFile),
    _Format(name="PPM", starts=(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), opens=PpmImageFile),
)


class Refused(Exception):
    """The picture cannot be used; says why and how its row is marked."""

    def __init__(self, reason: str, status: RowStatus = RowStatus.UNDECODABLE) -> None:
        super().__init__(reason)
        self.status = status


class OpenImage:
    """An image whose header was read and found good, for one thread. Every method may raise Refused.

    shrink: 1, or the 2, 4 or 8 by which the decoder of a JPEG makes it smaller on the way.
    size: width and height of the whole upright image, not shrunk; upright once it was decoded.
    note: what the user should know of the picture, such as "first of 3 frames"; complete once it was decoded.
    """

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        self._data = data
        self._kind = _sniff(data)
        self.note: str | None = None
        with self._refusals():
            self._header = self._kind.opens(BytesIO(data))
            _check_size(self._header.size, max_pixels)
        self.size = self._stored_size = self._header.size

    def shrink_to(self, shorter: int) -> int:
        """The largest shrink that leaves at least `shorter` pixels of the shorter side."""
        if self._kind.name != "JPEG":
            return 1
        return next((s for s in (8, 4, 2) if min(self._stored_size) >= s * shorter), 1)

    def decode(self, *, shrink: int = 1) -> Image.Image:
        """The first frame, upright, RGB, decoded by Pillow."""
        with self._refusals(), self._fresh() as opened:
            if shrink > 1:
                width, height = opened.size
                opened.draft(None, (width // shrink, height // shrink))
            opened.load()
            image = to_rgb(opened, image_format=self._kind.name)
            if image is opened and self._kind.name != "JPEG":
                image = opened.copy()  # counting frames moves the opened file to others
            turn = self._turn_of(opened)
            self.note = _frame_note(opened)
            return image if turn is None else image.transpose(turn.transpose)

    def decode_to_array(self, *, shrink: int = 1) -> NDArray[np.uint8]:
        """The pixels of `decode` as an array (H, W, 3), by the fastest library that has the same ones."""
        pixels = None
        if self._kind.name == "JPEG" and self._header.mode in ("RGB", "L"):
            pixels = turbojpeg.decode(self._data, self._stored_size, shrink=shrink)
        if pixels is None:
            return np.array(self.decode(shrink=shrink))  # torch wants arrays that can be written
        turn = self._turn_of(self._header)
        return pixels if turn is None else turn.of_array(pixels)

    def _fresh(self) -> ImageFile.ImageFile:
        """The opened file before anything was decoded from it."""
        if self._header.tile:
            return self._header
        return self._kind.opens(BytesIO(self._data))

    def _turn_of(self, opened: ImageFile.ImageFile) -> _Turn | None:
        """What the EXIF orientation asks for, and of `size`; nothing where that is absent or damaged."""
        try:
            turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
        except _DAMAGE:
            return None
        self.size = self._stored_size[::-1] if turn is not None and turn.quarter else self._stored_size
        return turn

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            with _whole_images:
                yield
        except UnsupportedColor as error:
            raise Refused(str(error)) from error
        except Image.DecompressionBombError as error:
            raise Refused(f"too large: {_one_line(error)}", RowStatus.TOO_LARGE) from error
        except _DAMAGE as error:
            raise Refused(f"damaged {self._kind.name}: {_one_line(error)}") from error


def _sniff(data: bytes) -> _Format:
    """The format that the first bytes announce."""
    if not data:
        raise Refused("empty file")
    for kind in _FORMATS:
        if data.startswith(kind.starts):
            return kind
    start = data[:24].decode("ascii", errors="replace").strip().split("\n")[0].rstrip()
    if start.isprintable() and start.isascii() and start:
        raise Refused(f"not an image: begins with '{start}'")
    if data.startswith(b"\x89HDF"):
        raise Refused("a feature store, not an image: `featcache evaluate` takes it")
    raise Refused(f"not an image of a known format: begins with bytes {data[:8].hex(' ')}")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise Refused(f"no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise Refused(
            f"too large: {width:,} x {height:,} = {_in_millions(width * height)} pixels, "
            f"the limit is {_in_millions(max_pixels)}",
            RowStatus.TOO_LARGE,
        )


def _frame_note(opened: ImageFile.ImageFile) -> str | None:
    try:
        frames = getattr(opened, "n_frames", 1)
    except _DAMAGE:  # the first frame is whole, or it would not have come this far
        return "first of several frames, others damaged"
    return f"first of {frames} frames" if frames > 1 else None


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
