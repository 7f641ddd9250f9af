"""Pictures by a transform of the user's own, which is judged by what it returns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.images.opening import Refused
from featcache.images.views import Cut
from featcache.spec import Preprocessing
from featcache.transforms import find_transform


class OwnCanvas:
    """A `resize.Canvas` of a decoded image; augmented views are cut out and flipped first."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    def plain(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        return _transformed(self.image, preprocessing)

    def view(self, cut: Cut, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        part = self.image.crop(cut.box)
        if cut.flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _transformed(part, preprocessing)


def _transformed(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """What the transform makes of the image; Refused, at the cost of its row, where that is no picture."""
    name, size = preprocessing.transform, preprocessing.crop_size
    transform = find_transform(name)
    try:
        pixels = np.asarray(transform(image.copy()))
    except MemoryError:
        raise
    except Exception as error:  # code of the user's own may raise anything
        said = " ".join(str(error).split())[:100]
        raise Refused(f"the transform {name} raised {type(error).__name__}: {said}") from error
    if pixels.shape != (size, size, 3) or pixels.dtype != np.uint8:
        raise Refused(
            f"the transform {name} returned {pixels.dtype} of shape {pixels.shape}, not uint8 of "
            f"({size}, {size}, 3)"
        )
    return np.array(pixels, order="C")  # its own: the transform may fill one array over and over
