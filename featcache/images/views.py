"""Which part of an image an augmented view shows: `random-resized-crop-flip-1` (`spec.AUGMENTATION`).

The draw depends on the image's bytes, the seed and the number of the view alone, so neither on the path nor
on the order, the machine or the libraries. Knows sizes, no pixels. A change here is a new name in
`spec.AUGMENTATION`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

# Half the default span of torchvision: a view is kept and learned from many times, and one of 8 % of a
# photograph rarely shows what its label says.
_AREA = (0.35, 1.0)  # share of the image
_ASPECT = (3 / 4, 4 / 3)  # width / height
_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The part of an upright image that a view shows, in whole pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left + self.width, self.top + self.height


def draw_cut(size: tuple[int, int], *, sha256: bytes, seed: int, view: int) -> Cut:
    """The cut of view `view`, from 1, of an image of `size` (width, height): torchvision's RandomResizedCrop
    and RandomHorizontalFlip, by numbers of our own.
    """
    width, height = size
    draws = _uniform(sha256, seed, view)
    flip = next(draws) < 0.5
    for _ in range(_TRIES):
        area = width * height * _between(_AREA, next(draws))
        aspect = math.exp(_between((math.log(_ASPECT[0]), math.log(_ASPECT[1])), next(draws)))
        across, along = next(draws), next(draws)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(along * (height - h + 1))
            return Cut(left=left, top=top, width=w, height=h, flip=flip)
    return _central(width, height, flip=flip)


def _central(width: int, height: int, *, flip: bool) -> Cut:
    """The largest part about the centre whose aspect is allowed, of an image where few cuts fit."""
    w = min(width, max(1, round(height * _ASPECT[1])))
    h = min(height, max(1, round(width / _ASPECT[0])))
    return Cut(left=(width - w) // 2, top=(height - h) // 2, width=w, height=h, flip=flip)


def _between(span: tuple[float, float], share: float) -> float:
    return span[0] + share * (span[1] - span[0])


def _uniform(sha256: bytes, seed: int, view: int) -> Iterator[float]:
    """Numbers in [0, 1) of 53 bits: the bytes of SHAKE-256 over what names the view."""
    words = 1 + 4 * _TRIES
    named = b"%s seed=%d view=%d" % (sha256, seed, view)
    stream = hashlib.shake_256(named).digest(8 * words)
    for at in range(0, len(stream), 8):
        yield (int.from_bytes(stream[at : at + 8], "little") >> 11) / (1 << 53)
