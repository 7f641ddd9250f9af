"""The fast decoder against the exact one, several pictures from one decoding, and JPEGs shrunk on the way.

How far the two are apart on real photographs, in features as well, is what `scripts/prove_decoders.py` says.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import center_crop
from torchvision.transforms.functional import resize as resize_by_torchvision

from featcache.images import identity, opening, resize, turbojpeg
from featcache.images.decode import LoadedPictures, load_image, load_pictures
from featcache.images.opening import OpenImage
from featcache.spec import Picture, Preprocessing

needs_simplejpeg = pytest.mark.skipif(not turbojpeg.AVAILABLE, reason="simplejpeg is not installed")

PRE = Preprocessing(resize_size=64, crop_size=56)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "TICK_NS", 0)  # nothing edits these files behind our back


def photograph(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Smooth colours, hard edges and fine texture, as photographs have them."""
    rng = np.random.default_rng(seed)

    def coarse(cells: int, resample: Image.Resampling) -> np.ndarray:
        colours = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        return np.asarray(colours.resize((width, height), resample), dtype=float)

    scene = 0.6 * coarse(6, Image.Resampling.BICUBIC) + 0.4 * coarse(9, Image.Resampling.NEAREST)
    return Image.fromarray(np.clip(scene + rng.normal(0, 12, (height, width, 1)), 0, 255).astype(np.uint8))


def save(folder: Path, image: Image.Image, image_format: str = "JPEG", **options: Any) -> Path:
    path = folder / f"picture.{image_format}"
    image.save(path, image_format, **options)
    return path


def both(path: Path, preprocessing: Preprocessing, *, view: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The exact pixels and the fast ones, as whole numbers with a sign."""
    pictures = [Picture(preprocessing=preprocessing, view=view)]
    exact = load_pictures(path, pictures)
    fast = load_pictures(path, pictures, decoder="fast")
    assert isinstance(exact, LoadedPictures)
    assert isinstance(fast, LoadedPictures)
    assert (fast.sha256, fast.stat, fast.note) == (exact.sha256, exact.stat, exact.note)
    pixels = fast.pixels[0]
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert pixels.dtype == np.uint8
    return exact.pixels[0].astype(int), pixels.astype(int)


# --- how far apart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 400), (256, 300)])
@pytest.mark.parametrize(("interpolation", "bound"), [("bilinear", 1), ("bicubic", 2)])
def test_on_photographs_few_pixels_differ_and_by_little(
    tmp_path: Path, size: tuple[int, int], interpolation: Any, bound: int
) -> None:
    pre = Preprocessing(resize_size=256, crop_size=224, interpolation=interpolation)
    exact, fast = both(save(tmp_path, photograph(*size), quality=90), pre)
    assert np.abs(exact - fast).max() <= bound
    assert (exact != fast).mean() < 0.01


@pytest.mark.parametrize("size", [(40, 30), (31, 57), (1, 1), (5, 9), (200, 3), (24, 24), (1, 700), (900, 3)])
@pytest.mark.parametrize("sizes", [(32, 24), (24, 32), (17, 11), (17, 24)])
def test_tiny_long_and_padded_pictures_differ_by_one_at_most(
    tmp_path: Path, size: tuple[int, int], sizes: tuple[int, int]
) -> None:
    path = save(tmp_path, photograph(*size), "PNG")
    exact, fast = both(path, Preprocessing(resize_size=sizes[0], crop_size=sizes[1]))
    assert np.abs(exact - fast).max() <= 1


# The modes that Pillow does not write in a format.
NOT_WRITTEN = {
    "JPEG": ("P", "RGBA", "LA", "I;16"),
    "PNG": ("CMYK",),
    "GIF": ("CMYK",),
    "BMP": ("LA", "CMYK", "I;16"),
    "WEBP": (),
    "TIFF": (),
    "PPM": ("P", "LA", "CMYK"),
}


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [
        (image_format, mode)
        for image_format, without in NOT_WRITTEN.items()
        for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16")
        if mode not in without
    ],
)
def test_every_mode_of_every_format_differs_by_one_at_most(
    tmp_path: Path, image_format: str, mode: str
) -> None:
    grey16 = np.linspace(0, 65535, 90 * 120).astype(np.uint16).reshape(90, 120)
    image = Image.fromarray(grey16) if mode == "I;16" else photograph(120, 90).convert(mode)
    exact, fast = both(save(tmp_path, image, image_format), PRE)
    assert np.abs(exact - fast).max() <= 1


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_turned_pictures_differ_by_one_at_most(
    tmp_path: Path, image_format: str, orientation: int, view: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact, fast = both(save(tmp_path, photograph(150, 101), image_format, exif=exif), PRE, view=view)
    assert np.abs(exact - fast).max() <= 1
    assert view > 0 or (exact != fast).mean() < 0.03


@pytest.mark.parametrize("view", [1, 2, 3])
@pytest.mark.parametrize(("interpolation", "bound"), [("bilinear", 1), ("bicubic", 8)])
def test_views_differ_by_little(tmp_path: Path, view: int, interpolation: Any, bound: int) -> None:
    path = save(tmp_path, photograph(150, 101))
    exact, fast = both(path, replace(PRE, interpolation=interpolation), view=view)
    assert np.abs(exact - fast).max() <= bound
    assert np.abs(exact - fast).mean() < 0.3


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("interpolation", ["nearest", "lanczos", "box", "hamming"])
def test_what_torch_does_not_antialias_goes_the_exact_way(
    tmp_path: Path, interpolation: Any, view: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, photograph(150, 101), exif=exif)
    exact, fast = both(path, replace(PRE, interpolation=interpolation), view=view)
    assert np.array_equal(exact, fast)


def test_a_tall_picture_goes_the_exact_way(tmp_path: Path) -> None:
    exact, fast = both(save(tmp_path, photograph(70, 180)), replace(PRE, interpolation="bicubic"))
    assert np.array_equal(exact, fast)


def test_a_very_long_picture_goes_the_exact_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "_MAX_RESIZED", 5_000)
    exact, fast = both(save(tmp_path, photograph(150, 80), "PNG"), PRE)
    assert np.array_equal(exact, fast)


def test_the_exact_decoder_does_without_torch(tmp_path: Path) -> None:
    path = save(tmp_path, photograph(20, 20))
    code = (
        "import sys\nfrom featcache.spec import Preprocessing\n"
        "from featcache.images.decode import load_image\n"
        f"load_image({str(path)!r}, Preprocessing(resize_size=8, crop_size=8)); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# --- simplejpeg -----------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "as RGB": {"keep_rgb": True},
    "coarse": {"quality": 20},
}


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_has_the_same_pixels_without_simplejpeg(
    tmp_path: Path, kind: str, mode: str, shrink: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photograph(133, 91).convert(mode)
    data = save(tmp_path, image, **KINDS[kind]).read_bytes()
    with_it = OpenImage(data, max_pixels=10**6).decode_to_array(shrink=shrink)
    monkeypatch.setattr(turbojpeg, "AVAILABLE", False)
    without = OpenImage(data, max_pixels=10**6).decode_to_array(shrink=shrink)
    assert with_it.shape == (-(-91 // shrink), -(-133 // shrink), 3)
    assert np.array_equal(with_it, without)


def refuse(*_args: object, **_options: object) -> None:
    raise AssertionError("decoded by Pillow")


@needs_simplejpeg
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_is_decoded_by_simplejpeg(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, photograph(60, 40).convert(mode))
    monkeypatch.setattr(OpenImage, "decode", refuse)
    load_image(path, PRE, decoder="fast")


@needs_simplejpeg
def test_what_simplejpeg_objects_to_is_left_to_pillow(tmp_path: Path) -> None:
    data = save(tmp_path, photograph(60, 40)).read_bytes()
    for said in (data[:-300], data[: len(data) // 2], b"", data[:200] + b"\xff\xc0" + data[200:]):
        assert turbojpeg.decode(said, (60, 40)) is None
    for size in ((59, 40), (60, 39), (40, 60), (120, 80), (6000, 1)):
        assert turbojpeg.decode(data, size) is None
    assert turbojpeg.decode(data, (60, 40)) is not None


# --- several pictures, one decoding ---------------------------------------------------------------------


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By how much each decoding by Pillow shrank, in order."""
    seen: list[int] = []
    decode: Callable[..., Image.Image] = OpenImage.decode

    def counted(image: OpenImage, *, shrink: int = 1) -> Image.Image:
        seen.append(shrink)
        return decode(image, shrink=shrink)

    monkeypatch.setattr(opening.OpenImage, "decode", counted)
    return seen


PICTURES = (
    Picture(preprocessing=PRE),
    Picture(preprocessing=replace(PRE, crop_size=48)),
    Picture(preprocessing=replace(PRE, resize_size=80)),
    Picture(preprocessing=replace(PRE, interpolation="bicubic")),
    Picture(preprocessing=PRE, view=1),
    Picture(preprocessing=PRE, view=1, seed=5),
    Picture(preprocessing=replace(PRE, jpeg="scaled")),
    Picture(preprocessing=replace(PRE, mean=(0.5, 0.5, 0.5)), seed=3),
)


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_several_pictures_are_those_made_one_by_one(tmp_path: Path, decoder: Any) -> None:
    path = save(tmp_path, photograph(600, 420), "JPEG")
    together = load_pictures(path, PICTURES, decoder=decoder)
    assert isinstance(together, LoadedPictures)
    for picture, pixels in zip(PICTURES, together.pixels, strict=True):
        alone = load_pictures(path, [picture], decoder=decoder)
        assert isinstance(alone, LoadedPictures)
        assert np.array_equal(pixels, alone.pixels[0])
    assert together.pixels[-1] is together.pixels[0], "only the mean differs, and a seed that draws nothing"
    assert len({pixels.tobytes() for pixels in together.pixels}) == 7


def test_an_image_is_decoded_once_for_all_its_pictures(tmp_path: Path, decodings: list[int]) -> None:
    path = save(tmp_path, photograph(600, 420))
    load_pictures(path, [picture for picture in PICTURES if picture.preprocessing.jpeg == "full"])
    assert decodings == [1]
    load_pictures(path, PICTURES)
    assert sorted(decodings) == [1, 1, 2]


# --- scaled ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shrink"),
    [
        ((300, 255), 1),
        ((300, 256), 2),
        ((700, 511), 2),
        ((512, 700), 4),
        ((800, 533), 4),
        ((1100, 1024), 8),
    ],
)
def test_a_scaled_jpeg_keeps_twice_what_it_is_resized_to(
    tmp_path: Path, size: tuple[int, int], shrink: int, decodings: list[int]
) -> None:
    image = photograph(*size)
    scaled = replace(PRE, jpeg="scaled")
    path = save(tmp_path, image)
    exact, fast = both(path, scaled)
    assert decodings[0] == shrink
    with Image.open(path) as opened:
        whole = resize_by_torchvision(opened.convert("RGB"), [64])
    with Image.open(path) as opened:
        opened.draft("RGB", (2 * 64, 2 * 64))  # Pillow's own rule, which knows only sizes to keep
        shrunk = opened.convert("RGB").resize(whole.size, Image.Resampling.BILINEAR)
        wanted = np.asarray(center_crop(shrunk, [56]))
    assert np.array_equal(exact, wanted)
    assert np.abs(exact - fast).max() <= 1
    assert np.array_equal(exact, both(path, PRE)[0]) == (shrink == 1)


def test_other_formats_are_never_scaled(tmp_path: Path) -> None:
    path = save(tmp_path, photograph(600, 420), "PNG")
    for scaled, full in zip(both(path, replace(PRE, jpeg="scaled")), both(path, PRE), strict=True):
        assert np.array_equal(scaled, full)


def test_a_scaled_jpeg_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, photograph(800, 533), exif=exif)
    for scaled, full in zip(both(path, replace(PRE, jpeg="scaled")), both(path, PRE), strict=True):
        assert np.abs(scaled - full).mean() < 3
