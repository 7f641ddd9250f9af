"""How far the decoders are from torchvision's own preset on real photographs, in pixels and in features.

    python scripts/prove_decoders.py FOLDER [--limit 500] [--backbone resnet18]…

The reference is what a tutorial has: images opened by PIL, turned as their EXIF says, through the backbone's
`ImageClassification`, through the network in float32. Networks whose weights are not on this machine get
seeded random ones. `scaled` is the fast decoder with JPEGs shrunk on the way.

Pixels are counted from 0 to 255. The lowest cosine is of one image's feature vector.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from featcache.backbones import Backbone
    from featcache.images.decode import Decoder
    from featcache.spec import JpegScale, Preprocessing

    Pixels = NDArray[np.uint8]

BACKBONES = ("efficientnet_lite0", "resnet18", "resnet50")
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to the pixels."""

    name: str
    decoder: Decoder
    jpeg: JpegScale = "full"


WAYS = (
    Way(name="exact", decoder="exact"),
    Way(name="fast", decoder="fast"),
    Way(name="scaled", decoder="fast", jpeg="scaled"),
)


@dataclass
class Distance:
    """From the reference, over all images."""

    largest: int = 0
    shares: list[float] = field(default_factory=list)  # of the values of an image that differ
    cosines: list[float] = field(default_factory=list)

    def add_pixels(self, reference: Pixels, pixels: Pixels) -> None:
        apart = np.abs(reference.astype(int) - pixels)
        self.largest = max(self.largest, int(apart.max()))
        self.shares.append(float((apart > 0).mean()))

    def __str__(self) -> str:
        return (
            f"{self.largest:>7} {statistics.mean(self.shares):>11.3%} {max(self.shares):>9.2%} "
            f"{min(self.cosines):>13.8f} {statistics.mean(self.cosines):>12.8f}"
        )


def find_photographs(folder: Path, limit: int) -> list[Path]:
    """At most `limit` images of all class folders, evenly spread."""
    from torchvision.datasets.folder import is_image_file

    files = sorted(path for path in folder.rglob("*") if is_image_file(path.name))
    if not files:
        raise SystemExit(f"{folder} holds no images; give a folder of class folders")
    return files[:: max(1, len(files) // limit)][:limit]


def reference_pictures(files: Sequence[Path], pre: Preprocessing) -> Iterator[torch.Tensor]:
    """Normalised float32 tensors (3, crop, crop) by PIL and torchvision alone."""
    from PIL import Image, ImageOps
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(
        crop_size=pre.crop_size,
        resize_size=pre.resize_size,
        mean=pre.mean,
        std=pre.std,
        interpolation=InterpolationMode(pre.interpolation),
    )
    for file in files:
        with Image.open(file) as image:
            yield preset(ImageOps.exif_transpose(image).convert("RGB"))


def our_pictures(file: Path, pre: Preprocessing) -> dict[str, Pixels]:
    from featcache.images.decode import load_image
    from featcache.images.identity import ImageFailure

    pictures = {}
    for way in WAYS:
        loaded = load_image(file, replace(pre, jpeg=way.jpeg), decoder=way.decoder)
        if isinstance(loaded, ImageFailure):
            raise SystemExit(f"{file}: {loaded.reason}; take it out of the folder")
        pictures[way.name] = loaded.pixels
    return pictures


def compare(backbone: Backbone, files: Sequence[Path]) -> dict[str, Distance]:
    import torch

    pre = backbone.preprocessing
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (pre.mean, pre.std))
    distances = {way.name: Distance() for way in WAYS}
    references = reference_pictures(files, pre)
    for start in range(0, len(files), BATCH):
        chosen = files[start : start + BATCH]
        wanted = torch.stack([next(references) for _ in chosen])  # (B, 3, S, S)
        reference_pixels = ((wanted * std + mean) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        ours = [our_pictures(file, pre) for file in chosen]
        features = embed(backbone, wanted)
        seen = dict(zip((reference.tobytes() for reference in reference_pixels), features, strict=True))
        for name, distance in distances.items():
            pixels = np.stack([pictures[name] for pictures in ours])  # (B, S, S, 3)
            for reference, picture in zip(reference_pixels, pixels, strict=True):
                distance.add_pixels(reference, picture)
            # Pictures that were seen have their features; most scaled ones are the fast ones.
            new = [i for i, picture in enumerate(pixels) if picture.tobytes() not in seen]
            if new:
                batch = (torch.from_numpy(pixels[new]).permute(0, 3, 1, 2) / 255 - mean) / std
                seen |= zip((pixels[i].tobytes() for i in new), embed(backbone, batch), strict=True)
            vectors = torch.stack([seen[picture.tobytes()] for picture in pixels])  # (B, D)
            distance.cosines += torch.cosine_similarity(features, vectors).tolist()
    return distances


def embed(backbone: Backbone, batch: torch.Tensor) -> torch.Tensor:
    """Feature vectors (B, D) in double precision, so that the cosine is not rounded."""
    import torch

    with torch.inference_mode():
        return backbone.module(batch.contiguous(memory_format=torch.channels_last)).flatten(1).double()


def load(name: str) -> Backbone:
    import torch

    from featcache.backbones import load_backbone
    from featcache.errors import WeightsUnavailable

    try:
        backbone = load_backbone(name)
    except WeightsUnavailable:
        backbone = load_backbone(name, weights="random", seed=0)
    backbone.module.to(memory_format=torch.channels_last)
    return backbone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="images, evenly spread over the folder")
    parser.add_argument("--backbone", action="append", help="may be repeated")
    given = parser.parse_args()
    files = find_photographs(given.folder, given.limit)
    print(f"{len(files)} images of {given.folder}")
    print(f"{'':43} largest  differing  at most  lowest cosine  mean cosine")
    for name in given.backbone or BACKBONES:
        backbone = load(name)
        for way, distance in compare(backbone, files).items():
            said = f"{name} ({backbone.weights.label}, {backbone.preprocessing.interpolation})"
            print(f"{said:43} {way:7} {distance}", flush=True)


if __name__ == "__main__":
    main()
