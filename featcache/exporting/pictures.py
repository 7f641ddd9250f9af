"""The images an export is checked on: the user's, some of those the model was made from, or seeded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.images import find_images, scan_images
from featcache.images.decode import load_image
from featcache.images.identity import ImageFailure
from featcache.images.paths import resolve
from featcache.model import Model
from featcache.request import recorded_decoder

MOST = 100  # of the user's images
FEW = 32  # where the user names none


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """uint8 pixels (N, S, S, 3), as the backbone sees them, and in words what they are."""

    pixels: NDArray[np.uint8]
    words: str

    def __len__(self) -> int:
        return len(self.pixels)


def gather_pictures(model: Model, images: Sequence[Path]) -> Pictures:
    """Up to 100 of `images`, files and folders, evenly; without any, what the model itself leads to.

    DataError: an image named by the user is not there, or none of them can be read.
    """
    if images:
        files, _ = find_images(images)
        pixels = _decode(model, _spread(files, MOST))
        if not len(pixels):
            raise DataError(f"none of the {len(files)} images given can be read: name others with --images")
        return Pictures(pixels=pixels, words=f"{len(pixels)} of the {len(files):,} images given")
    files = _of_origin(model.provenance.get("data"))
    pixels = _decode(model, _spread(files, FEW))
    if len(pixels):
        return Pictures(pixels=pixels, words=f"{len(pixels)} of the {len(files):,} images it was made from")
    made = _seeded(FEW, model.spec.preprocessing.crop_size)
    return Pictures(pixels=made, words=f"{FEW} pictures of seeded colours, as its images are not there")


def _of_origin(data: Any) -> list[Path]:
    """The images of the data set that the provenance of a store names; none where they are not there."""
    if not isinstance(data, Mapping) or not isinstance(data.get("path"), str):
        return []
    root = data.get("root")
    try:
        listing = scan_images(
            Path(data["path"]),
            root=Path(root) if isinstance(root, str) else None,
            follow_links=data.get("follow_links") is True,
        )
        return [resolve(listing.root, record.path) for record in listing.records]
    except (DataError, ValueError):  # a path that is none, such as one with a zero byte
        return []


def _spread(files: Sequence[Path], most: int) -> list[Path]:
    """At most so many, from all of the list."""
    chosen = np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)
    return [files[i] for i in chosen]


def _decode(model: Model, files: Sequence[Path]) -> NDArray[np.uint8]:
    preprocessing = model.spec.preprocessing
    decoder = recorded_decoder(model.provenance)
    loaded = (load_image(file, preprocessing, decoder=decoder) for file in files)
    pixels = [image.pixels for image in loaded if not isinstance(image, ImageFailure)]
    size = preprocessing.crop_size
    return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), dtype=np.uint8)


def _seeded(count: int, size: int) -> NDArray[np.uint8]:
    """Patches of colour, (count, size, size, 3), each picture of its own tint."""
    rng = np.random.default_rng(0)
    tint = rng.integers(0, 192, (count, 1, 1, 3))
    coarse = tint + rng.integers(0, 64, (count, 8, 8, 3))
    patch = -(-size // 8)
    return coarse.repeat(patch, axis=1).repeat(patch, axis=2)[:, :size, :size].astype(np.uint8)
