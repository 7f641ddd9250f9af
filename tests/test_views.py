"""Augmented views: what is drawn, what becomes of it, and what a spec with views says."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import toy_spec
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop

from featcache.images import identity
from featcache.images.decode import LoadedPictures, load_pictures
from featcache.images.views import Cut, draw_cut
from featcache.spec import AUGMENTATION, FeatureSpec, Picture, Preprocessing, spec_differences

GOLDEN = Path(__file__).parent / "golden" / "format-1" / "complete.h5"
PRE = Preprocessing(resize_size=32, crop_size=24)

# Of an image of 120 x 90 whose sha256 is all zeros, by seed 0.
PINNED = [
    Cut(left=4, top=6, width=89, height=84, flip=False),
    Cut(left=15, top=5, width=97, height=78, flip=False),
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "TICK_NS", 0)  # nothing edits these files behind our back


@pytest.fixture
def path(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def cut(size: tuple[int, int] = (120, 90), *, image: int = 0, seed: int = 0, view: int = 1) -> Cut:
    return draw_cut(size, sha256=image.to_bytes(32, "big"), seed=seed, view=view)


def load(path: Path, *pictures: Picture) -> list[np.ndarray]:
    loaded = load_pictures(path, pictures)
    assert isinstance(loaded, LoadedPictures)
    return list(loaded.pixels)


# --- the draw -------------------------------------------------------------------------------------------


def test_a_draw_depends_on_the_bytes_the_seed_and_the_view_alone() -> None:
    drawn = [cut(image=i, seed=s, view=v) for i in range(3) for s in range(3) for v in (1, 2, 3)]
    again = [cut(image=i, seed=s, view=v) for i in range(3) for s in range(3) for v in (1, 2, 3)]
    assert drawn == again
    assert len(set(drawn)) == 27
    assert cut(seed=1, view=11) != cut(seed=11, view=1)


def test_the_draw_of_this_name_is_this_draw() -> None:
    assert AUGMENTATION == "random-resized-crop-flip-1", "stores hold views of this draw: never change it"
    assert [cut(view=view) for view in (1, 2)] == PINNED


def test_cuts_lie_within_the_image_and_have_the_areas_and_aspects_they_should() -> None:
    for image in range(500):
        one = cut((400, 300), image=image)
        left, top, right, bottom = one.box
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        assert 0.345 <= one.width * one.height / (400 * 300) <= 1
        assert 0.74 <= one.width / one.height <= 1.35


def test_cuts_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.35, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )  # top, left, height, width
    cuts = [cut((400, 300), image=image) for image in range(3000)]
    ours = np.array([(c.top, c.left, c.height, c.width) for c in cuts])
    deviation = np.hypot(theirs.std(0), ours.std(0)) / math.sqrt(3000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * deviation).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.08)
    assert abs(np.mean([c.flip for c in cuts]) - 0.5) < 4 * 0.5 / math.sqrt(3000)


def test_cuts_reach_every_edge() -> None:
    cuts = [cut((12, 12), image=image) for image in range(200)]
    narrow = [(c.left, 12 - c.box[2]) for c in cuts if c.width < 12]
    low = [(c.top, 12 - c.box[3]) for c in cuts if c.height < 12]
    assert {min(gaps) for gaps in zip(*narrow, strict=True)} == {0}
    assert {min(gaps) for gaps in zip(*low, strict=True)} == {0}


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (7, 600)])
def test_every_image_has_views_as_torchvision_falls_back(size: tuple[int, int]) -> None:
    width, height = size
    for view in range(1, 20):
        one = cut(size, view=view)
        assert one.width >= 1
        assert one.height >= 1
        assert one.box[2] <= width
        assert one.box[3] <= height
    if max(size) > 100:
        image = torch.zeros(1, height, width)
        top, left, h, w = RandomResizedCrop.get_params(image, [0.35, 1.0], [3 / 4, 4 / 3])
        assert (one.top, one.left, one.height, one.width) == (top, left, max(1, h), max(1, w))


# --- the pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("view", range(1, 6))
def test_a_view_is_torchvisions_resized_crop_of_the_cut(path: Path, view: int, interpolation: Any) -> None:
    pre = replace(PRE, interpolation=interpolation)
    loaded = load_pictures(path, [Picture(preprocessing=pre, view=view, seed=3)])
    assert isinstance(loaded, LoadedPictures)
    one = draw_cut((120, 90), sha256=loaded.sha256, seed=3, view=view)
    with Image.open(path) as image:
        wanted = resized_crop(
            image, one.top, one.left, one.height, one.width, [24, 24], InterpolationMode(interpolation)
        )
    assert np.array_equal(loaded.pixels[0], np.asarray(hflip(wanted) if one.flip else wanted))


def test_some_views_are_mirrored_and_some_are_not() -> None:
    assert {cut(view=view).flip for view in range(1, 10)} == {True, False}


def test_views_do_not_depend_on_the_path_or_on_what_else_is_asked(path: Path, tmp_path: Path) -> None:
    pictures = toy_spec(preprocessing=PRE, views=4, views_seed=2).pictures()
    together = load(path, *pictures)
    backwards = load(path, *reversed(pictures))
    copy = shutil.copy(path, tmp_path / "another name.png")
    for picture, pixels, reversed_pixels in zip(pictures, together, reversed(backwards), strict=True):
        assert np.array_equal(pixels, reversed_pixels)
        assert np.array_equal(pixels, load(copy, picture)[0])
    assert len({pixels.tobytes() for pixels in together}) == 4


def test_the_first_view_is_the_plain_picture_whatever_the_seed(path: Path) -> None:
    plain = load(path, Picture(preprocessing=PRE))[0]
    assert np.array_equal(load(path, Picture(preprocessing=PRE, seed=9))[0], plain)


def test_views_are_counted_from_0() -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        Picture(preprocessing=PRE, view=-1)


# --- the spec -------------------------------------------------------------------------------------------


def test_a_spec_without_views_is_written_as_before_there_were_any() -> None:
    with h5py.File(GOLDEN) as file:
        text, fingerprint = file.attrs["spec"].decode(), file.attrs["fingerprint"].decode()
    spec = FeatureSpec.from_json(text)
    assert (spec.views, spec.views_seed, spec.augmentation, spec.preprocessing.jpeg) == (1, 0, "", "full")
    assert (spec.to_json(), spec.fingerprint()) == (text, fingerprint)


def test_what_draws_no_view_changes_no_fingerprint() -> None:
    assert toy_spec(views_seed=5, augmentation="x") == toy_spec()
    assert toy_spec(views_seed=5).fingerprint() == toy_spec().fingerprint()


def test_views_their_seed_their_draw_and_scaling_are_in_the_fingerprint() -> None:
    specs = [
        toy_spec(),
        toy_spec(views=2),
        toy_spec(views=3),
        toy_spec(views=2, views_seed=1),
        toy_spec(views=2, augmentation="random-resized-crop-flip-2"),
        toy_spec(preprocessing=replace(toy_spec().preprocessing, jpeg="scaled")),
    ]
    assert len({spec.fingerprint() for spec in specs}) == len(specs)
    assert all(spec_differences(specs[0], spec) for spec in specs[1:])
    assert [FeatureSpec.from_json(spec.to_json()) for spec in specs] == specs
    assert toy_spec(views=2).augmentation == AUGMENTATION


def test_a_spec_says_which_pictures_it_is_of() -> None:
    pictures = toy_spec(preprocessing=PRE, views=3, views_seed=7).pictures()
    assert pictures == tuple(Picture(preprocessing=PRE, view=view, seed=7) for view in range(3))
    with pytest.raises(ValueError, match="this version draws views with random-resized-crop-flip-1, not x"):
        toy_spec(views=2, augmentation="x").pictures()


@pytest.mark.parametrize("change", [{"views": 0}, {"views": 1.5}, {"views_seed": -1}, {"views": "2"}])
def test_a_spec_of_no_views_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is a whole number from"):
        toy_spec(**change)


def test_jpegs_are_full_or_scaled() -> None:
    with pytest.raises(ValueError, match="jpeg 'half' is none of"):
        replace(PRE, jpeg="half")  # type: ignore[arg-type]
