"""Decoding: what every kind of picture becomes, and what every kind of bad file gets, by either decoder."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as torchvision_functional
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import center_crop, normalize, to_tensor

from featcache.images import decode, identity, opening, resize
from featcache.images.decode import Decoder, LoadedImage, load_image
from featcache.images.identity import ImageFailure, ImageIdentity, hash_image
from featcache.records import RowStatus
from featcache.spec import Preprocessing

SMALL = Preprocessing(resize_size=8, crop_size=8)
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
DECODERS = get_args(Decoder)


def _noise(width: int, height: int, *, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def _encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _file(folder: Path, data: bytes, *, name: str = "picture.jpg") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _load(path: Path, preprocessing: Preprocessing = SMALL) -> LoadedImage:
    loaded = load_image(path, preprocessing)
    assert isinstance(loaded, LoadedImage), loaded
    return loaded


def _failure(path: Path, **options: int) -> ImageFailure:
    failures = [load_image(path, SMALL, decoder=decoder, **options) for decoder in DECODERS]
    failure = failures[0]
    assert isinstance(failure, ImageFailure)
    assert "\n" not in failure.reason
    assert [(f.status, f.reason) for f in failures[1:]] == [(failure.status, failure.reason)]
    return failure


def _pixels(folder: Path, image: Image.Image, image_format: str = "PNG", **options: object) -> np.ndarray:
    """The pixels of an 8 x 8 picture after a round trip, untouched by resizing."""
    path = _file(folder, _encoded(image, image_format, **options))
    pixels = _load(path).pixels
    fast = load_image(path, SMALL, decoder="fast").pixels
    assert np.abs(fast - pixels.astype(int)).max() <= (0 if image.size == (8, 8) else 1)
    return pixels


# --- geometry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (31, 57), (1, 1), (5, 9), (200, 3), (24, 24)])
@pytest.mark.parametrize("sizes", [(32, 24), (24, 32), (17, 11)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_pixels_are_those_of_torchvision(
    tmp_path: Path, size: tuple[int, int], sizes: tuple[int, int], interpolation: str
) -> None:
    image = _noise(*size)
    resize_size, crop_size = sizes
    mode = InterpolationMode(interpolation)
    wanted = np.asarray(center_crop(torchvision_functional.resize(image, [resize_size], mode), [crop_size]))
    preprocessing = Preprocessing(
        resize_size=resize_size, crop_size=crop_size, interpolation=InterpolationMode(interpolation).value
    )
    loaded = _load(_file(tmp_path, _encoded(image, "PNG")), preprocessing)
    assert loaded.pixels.dtype == np.uint8
    assert np.array_equal(loaded.pixels, wanted)


def test_the_input_of_the_network_is_that_of_torchvisions_preset(tmp_path: Path) -> None:
    image = _noise(53, 71)
    path = _file(tmp_path, _encoded(image, "JPEG"))
    preset = ImageClassification(crop_size=24, resize_size=32)
    wanted = preset(Image.open(path))
    loaded = _load(path, Preprocessing(resize_size=32, crop_size=24))
    ours = normalize(to_tensor(loaded.pixels), preset.mean, preset.std)
    assert ours.equal(wanted)


@pytest.mark.parametrize("orientation", [3, 5, 6])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_turned_pictures_are_resized_as_torchvision_resizes_upright_ones(
    tmp_path: Path, image_format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _file(tmp_path, _encoded(_noise(61, 40), image_format, exif=exif))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    wanted = np.asarray(center_crop(torchvision_functional.resize(upright, [32]), [24]))
    assert np.array_equal(_load(path, Preprocessing(resize_size=32, crop_size=24)).pixels, wanted)


@pytest.mark.parametrize("size", [(3, 900), (900, 3), (1, 700), (2, 2)])
@pytest.mark.parametrize("sizes", [(32, 24), (24, 32)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_a_very_long_image_is_resized_in_its_centre_only(
    tmp_path: Path,
    size: tuple[int, int],
    sizes: tuple[int, int],
    interpolation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = _file(tmp_path, _encoded(_noise(*size), "PNG"))
    preprocessing = Preprocessing(
        resize_size=sizes[0], crop_size=sizes[1], interpolation=InterpolationMode(interpolation).value
    )
    whole = _load(path, preprocessing).pixels
    monkeypatch.setattr(resize, "_MAX_RESIZED", 1)
    centre = _load(path, preprocessing).pixels
    assert np.abs(whole.astype(int) - centre).max() <= 1  # the last bit of a weight


def test_an_image_of_1_by_5000_does_not_take_a_gigabyte(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(5000).reshape(5000, 1).astype(np.uint8))
    loaded = _load(_file(tmp_path, _encoded(grey, "PNG")), Preprocessing(resize_size=256, crop_size=224))
    assert loaded.pixels.shape == (224, 224, 3)
    assert set(np.unique(loaded.pixels)) <= {195, 196}  # the centre is pixel 2500 = 196 modulo 256


@pytest.mark.parametrize("change", [{"antialias": False}, {"color": "rgb-over-black"}, {"exif": "ignore"}])
def test_preprocessing_of_another_version_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = _file(tmp_path, _encoded(_noise(8, 8), "PNG"))
    with pytest.raises(ValueError, match=r"not available|this version decodes"):
        load_image(path, replace(SMALL, **change))


# --- identity -------------------------------------------------------------------------------------------


def test_the_sha256_and_stat_are_of_the_bytes_decoded(tmp_path: Path) -> None:
    path = _file(tmp_path, _encoded(_noise(8, 8), "JPEG"))
    found = path.stat()
    stat = identity.file_stat(found)
    loaded = _load(path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert loaded.stat == stat
    assert hash_image(path) == ImageIdentity(sha256=loaded.sha256, stat=stat)


def test_a_file_is_not_read_within_the_tick_of_its_stamps(tmp_path: Path) -> None:
    """Where stamps tick, an edit right after reading would carry the same ones."""
    path = tmp_path / "young.png"
    path.write_bytes(b"young")
    found = hash_image(path)
    assert isinstance(found, ImageIdentity)
    assert time.time_ns() - found.stat.ctime_ns >= identity.TICK_NS
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 3600 * 10**9))
    begun = time.monotonic()
    hash_image(path)
    assert time.monotonic() - begun < 5, "a stamp in the future is not waited for"


def test_an_undecodable_file_keeps_its_sha256(tmp_path: Path) -> None:
    path = _file(tmp_path, b"no picture")
    assert _failure(path).sha256 == hashlib.sha256(b"no picture").digest()


def test_a_file_handed_over_in_parts_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, _encoded(_noise(8, 8), "PNG"))
    whole = _load(path)
    read = os.read
    monkeypatch.setattr(identity.os, "read", lambda descriptor, count: read(descriptor, min(count, 50)))
    assert _load(path).sha256 == whole.sha256


def _change_while_read(path: Path, monkeypatch: pytest.MonkeyPatch, change: bytes, *, mode: str) -> None:
    read = os.read

    def read_then_change(descriptor: int, count: int) -> bytes:
        data = read(descriptor, count)
        with open(path, mode) as file:
            file.write(change)
        os.utime(path, ns=(5, 5))
        return data

    monkeypatch.setattr(identity.os, "read", read_then_change)


@pytest.mark.parametrize("mode", ["ab", "r+b", "wb"])
def test_a_file_that_changes_while_it_is_read_is_marked_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    path = _file(tmp_path, _encoded(_noise(8, 8), "PNG"))
    _change_while_read(path, monkeypatch, b"x", mode=mode)
    failure = _failure(path)
    assert failure.status is RowStatus.CHANGED
    assert "changed while it was read" in failure.reason


# --- bad files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_truncated_file_is_undecodable(tmp_path: Path, image_format: str) -> None:
    data = _encoded(_noise(64, 64), image_format)
    failure = _failure(_file(tmp_path, data[: len(data) // 2]))
    assert failure.status is RowStatus.UNDECODABLE
    assert failure.reason.startswith(f"damaged {image_format}: ")


def test_a_truncated_file_is_undecodable_whatever_the_process_told_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = _encoded(_noise(64, 64), "JPEG")
    path = _file(tmp_path, data[: len(data) // 2])
    assert "truncated" in _failure(path).reason
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # the process keeps what it asked for


def test_threads_do_not_give_the_switch_back_while_another_decodes() -> None:
    switch = opening._WholeImages()
    inside, leave = threading.Event(), threading.Event()

    def decode_slowly() -> None:
        with switch:
            inside.set()
            leave.wait(5)

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        thread = threading.Thread(target=decode_slowly)
        thread.start()
        inside.wait(5)
        with switch:
            pass
        still_strict = not ImageFile.LOAD_TRUNCATED_IMAGES
        leave.set()
        thread.join()
        assert still_strict
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html>\n<html>404", "not an image: begins with '<!DOCTYPE html>'"),
        (b"\0" * 100, "begins with bytes 00 00 00 00 00 00 00 00"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image: begins with '%!PS-Adobe"),
        (b"BM and then text that only begins like a bitmap", "damaged BMP"),
        (b"P5\n0 0\n255\n", "damaged PPM"),
    ],
    ids=["empty", "html", "zeros", "postscript", "text", "no-pixels"],
)
def test_a_file_that_is_no_image_is_undecodable(tmp_path: Path, data: bytes, reason: str) -> None:
    failure = _failure(_file(tmp_path, data))
    assert failure.status is RowStatus.UNDECODABLE
    assert reason in failure.reason


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    image = _noise(8, 8)
    path = _file(tmp_path, _encoded(image, "PNG"), name="really-a-png.jpg")
    assert np.array_equal(_load(path).pixels, np.asarray(image))


def test_a_missing_file_is_marked_missing(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    _file(tmp_path, b"", name="file")
    for name in ("gone.jpg", "broken.jpg", "file/below.jpg"):
        assert _failure(tmp_path / name).status is RowStatus.MISSING


def test_a_directory_or_a_device_is_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path, Path(os.devnull)):
        failure = _failure(path)
        assert (failure.status, failure.reason) == (RowStatus.UNREADABLE, "not a regular file")


def test_a_fifo_is_unreadable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    failure = _failure(path)
    assert (failure.status, failure.reason) == (RowStatus.UNREADABLE, "not a regular file")


@pytest.mark.parametrize("call", ["open", "read"])
def test_a_file_that_may_not_or_cannot_be_read_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = _file(tmp_path, _encoded(_noise(8, 8), "PNG"))
    monkeypatch.setattr(identity.os, call, refuse)
    failure = _failure(path)
    assert (failure.status, failure.reason) == (RowStatus.UNREADABLE, "cannot be read: Permission denied")


def test_a_file_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jpg"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    failure = _failure(path)
    assert failure.status is RowStatus.TOO_LARGE
    assert "1,099,511,627,776 bytes" in failure.reason


def test_a_decompression_bomb_is_too_large_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = b"P5\n20000 10000\n255\n"  # a header with no pixels behind it: decoding would fail otherwise
    failure = _failure(_file(tmp_path, bomb))
    assert failure.status is RowStatus.TOO_LARGE
    assert "20,000 x 10,000 = 200 million pixels, the limit is 100 million" in failure.reason


def test_an_image_within_the_limit_is_decoded_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above this, refuses above twice this
    path = _file(tmp_path, _encoded(_noise(40, 40), "PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _load(path)
    assert _failure(path, max_pixels=1599).status is RowStatus.TOO_LARGE


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_never_raises(tmp_path: Path, image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "TICK_NS", 0)  # nothing edits these files behind our back
    rng = np.random.default_rng(0)
    data = _encoded(_noise(24, 16), image_format)
    statuses = set()
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 200), size=rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        path = _file(tmp_path, bytes(damaged[: rng.integers(1, 2 * len(data))]))
        answer, fast = (load_image(path, SMALL, decoder=decoder) for decoder in DECODERS)
        statuses.add(answer.status if isinstance(answer, ImageFailure) else RowStatus.OK)
        if isinstance(answer, ImageFailure):
            assert fast == answer
        else:
            assert np.abs(fast.pixels - answer.pixels.astype(int)).max() <= 1
    assert RowStatus.UNDECODABLE in statuses
    assert statuses <= {RowStatus.OK, RowStatus.UNDECODABLE, RowStatus.TOO_LARGE}


# --- colour ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_is_decoded(tmp_path: Path, image_format: str) -> None:
    pixels = _pixels(tmp_path, Image.new("RGB", (8, 8), (250, 20, 100)), image_format)
    assert np.abs(pixels.astype(int) - (250, 20, 100)).max() <= 4  # JPEG and WebP lose a little


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(tmp_path: Path, mode: str) -> None:
    image = _noise(8, 8).convert(mode)
    assert np.array_equal(_pixels(tmp_path, image), np.asarray(image.convert("RGB")))


BEFORE_13 = int(PIL.__version__.split(".")[0]) < 13  # Pillow's releases that cannot read their own YCbCr


@pytest.mark.parametrize(
    "mode",
    [
        "CMYK",
        pytest.param("YCbCr", marks=pytest.mark.skipif(BEFORE_13, reason="written as a damaged TIFF")),
    ],
)
def test_other_colour_spaces_are_converted(tmp_path: Path, mode: str) -> None:
    image = _noise(8, 8).convert(mode)
    pixels = _pixels(tmp_path, image, "TIFF")
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_alpha_is_composited_on_white_and_hides_what_is_behind_it(tmp_path: Path) -> None:
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[..., 0] = 200  # red, with less and less alpha
    rgba[..., 3] = [0, 0, 51, 51, 102, 204, 255, 255]
    pixels = _pixels(tmp_path, Image.fromarray(rgba))
    alpha = rgba[..., 3:] / 255
    wanted = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels - wanted).max() <= 1
    assert (pixels[:, :2] == 255).all()


def test_grey_with_alpha_is_composited_on_white(tmp_path: Path) -> None:
    grey = Image.merge("LA", [Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 0)])
    assert (_pixels(tmp_path, grey) == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_colour_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (8, 8), (10, 10, 10))
    image.paste((90, 90, 90), (0, 0, 4, 8))
    image = image.convert("L").convert(mode)
    colour = image.getpixel((0, 0))
    pixels = _pixels(tmp_path, image, transparency=colour)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 10).all()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_saturated(tmp_path: Path, image_format: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = _pixels(tmp_path, Image.fromarray(values), image_format)
    assert np.array_equal(pixels[..., 0], np.rint(values * (255 / 65535)))
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_a_transparent_16_bit_grey_is_white(tmp_path: Path) -> None:
    values = np.full((8, 8), 300, dtype=np.uint16)
    values[:, :3] = 5000
    assert (_pixels(tmp_path, Image.fromarray(values), transparency=5000)[:, :3] == 255).all()


@pytest.mark.parametrize(("dtype", "word"), [(np.float32, "float"), (np.int32, "32-bit integer")])
def test_float_and_32_bit_images_are_refused(tmp_path: Path, dtype: type, word: str) -> None:
    path = _file(tmp_path, _encoded(Image.fromarray(np.ones((8, 8), dtype=dtype)), "TIFF"))
    failure = _failure(path)
    assert failure.status is RowStatus.UNDECODABLE
    assert f"a {word} image" in failure.reason


# --- frames and orientation -----------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_taken_and_reported(tmp_path: Path, image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "red", "black")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = _encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    loaded = _load(_file(tmp_path, data))
    assert (loaded.pixels == 255).all()
    assert loaded.note == "first of 3 frames"


def test_a_single_frame_has_no_note(tmp_path: Path) -> None:
    for image_format in FORMATS:
        assert _load(_file(tmp_path, _encoded(_noise(8, 8), image_format))).note is None


_TURNED_BACK = {  # what the viewer must do to the stored pixels, by EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", _TURNED_BACK)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_transposed(tmp_path: Path, orientation: int, image_format: str) -> None:
    image = _noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    pixels = _pixels(tmp_path, image, image_format, exif=exif, **options)
    assert np.array_equal(pixels, _TURNED_BACK[orientation](np.asarray(image)))


def test_exif_orientation_of_a_jpeg_is_transposed_before_it_is_resized(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 16), "black")
    image.paste("white", (20, 0, 40, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the right half becomes the lower half
    pixels = _pixels(tmp_path, image, "JPEG", exif=exif)
    assert pixels[0].max() < 30
    assert pixels[-1].min() > 225


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x09"]
)
def test_broken_exif_does_not_fail_the_image(tmp_path: Path, exif: bytes) -> None:
    image = Image.new("RGB", (8, 8), "white")
    assert (_pixels(tmp_path, image, "JPEG", exif=exif) == 255).all()


def test_pillows_warnings_can_be_silenced_by_the_owner_of_the_process(tmp_path: Path) -> None:
    path = _file(tmp_path, _encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09"))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        load_image(path, SMALL)
        before = len(shown)
        decode.silence_pillow_warnings()
        load_image(path, SMALL)
    assert before > 0
    assert len(shown) == before
