"""A transform of the user's own: what it makes is embedded, its code is part of the fingerprint."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from own_transform import negative, negative_mean
from PIL import Image

from featcache.commands.embed import embed
from featcache.commands.fit import fit
from featcache.commands.predict import predict
from featcache.commands.repair import repair
from featcache.errors import BackboneError, FeatcacheError, SpecMismatch
from featcache.images.decode import LoadedPictures, load_pictures
from featcache.images.identity import ImageFailure
from featcache.images.views import draw_cut
from featcache.spec import FeatureSpec, Picture, Preprocessing
from featcache.store.reader import FeatureStore
from featcache.transforms import find_transform, know_transform

OWN = "own_transform:negative_mean"


@pytest.fixture
def data(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    for seed in range(12):
        save_image(tmp_path / f"data/c{seed % 2}/{seed:02d}.png", seed=seed)
    return tmp_path / "data"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of code of its own, as a user has it; what it defines is forgotten afterwards."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("mine", None)


def write_code(folder: Path, *, shift: int) -> None:
    sys.modules.pop("mine", None)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    (folder / "shifting.py").write_text(
        f"import numpy as np\ndef shift(image):\n    return np.asarray(image.resize((8, 8))) // 2 + {shift}\n"
    )
    sys.modules.pop("shifting", None)
    (folder / "mine.py").write_text(
        "from channel_mean import ChannelMean\nfrom shifting import shift\n"
        "from featcache.backbones import make_backbone\nfrom featcache.spec import Preprocessing\n"
        "def made():\n    return make_backbone(ChannelMean(), transform=shift,\n"
        "        preprocessing=Preprocessing(resize_size=8, crop_size=8))\n"
    )


def by_hand(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = negative(image.convert("RGB"))
    return (pixels / 255.0).mean(axis=(0, 1)) * 2 - 1


@pytest.mark.parametrize("isolate", [False, True])
def test_what_it_returns_is_what_the_network_sees(data: Path, tmp_path: Path, isolate: bool) -> None:
    embed(data, tmp_path / "s.h5", backbone=OWN, isolate=isolate)
    features = FeatureStore.open(tmp_path / "s.h5").features()
    expected = np.stack([by_hand(data / name) for name in features.ids])
    np.testing.assert_allclose(features.X, expected, atol=1e-6)


def test_views_are_cut_and_flipped_before_it(data: Path) -> None:
    preprocessing = negative_mean().preprocessing
    path = data / "c0/00.png"
    loaded = load_pictures(path, [Picture(preprocessing=preprocessing, view=2, seed=5)], decoder="fast")
    with Image.open(path) as image:
        cut = draw_cut(image.size, sha256=loaded.sha256, seed=5, view=2)
        part = image.convert("RGB").crop(cut.box)
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if cut.flip else part
    np.testing.assert_array_equal(loaded.pixels[0], negative(part))  # type: ignore[union-attr]


def test_a_picture_it_fails_on_costs_its_row(
    data: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    save_image(data / "c0/odd.png", size=(13, 13))
    result = embed(data, tmp_path / "s.h5", backbone=OWN)
    assert result.failed == 1
    assert re.search("negative@.* raised RuntimeError: thirteen", result.describe())


def wrong_type(image: Image.Image) -> object:
    return np.zeros((8, 8, 3), dtype=np.float32)


def wrong_shape(image: Image.Image) -> object:
    return image


@pytest.mark.parametrize(
    ("function", "words"),
    [(wrong_type, r"returned float32"), (wrong_shape, r"shape \(20, 24, 3\), not uint8")],
)
def test_what_is_no_picture_is_said(data: Path, function: Callable[..., object], words: str) -> None:
    name = know_transform(function)
    wanted = Picture(preprocessing=Preprocessing(resize_size=8, crop_size=8, transform=name))
    outcome = load_pictures(data / "c0/00.png", [wanted])
    assert isinstance(outcome, ImageFailure)
    assert re.search(words, outcome.reason)


def test_an_edit_of_its_file_is_another_fingerprint(data: Path, tmp_path: Path, here: Path) -> None:
    write_code(here, shift=0)
    embed(data, tmp_path / "s.h5", backbone="mine:made")
    fit(tmp_path / "s.h5", tmp_path / "m.model", head="ncm")
    write_code(here, shift=9)
    with pytest.raises(SpecMismatch, match="transform"):
        embed(data, tmp_path / "s.h5", backbone="mine:made")
    made_by = "pictures made by shifting:shift@.*here it is shifting:shift@"
    with pytest.raises(BackboneError, match=made_by):
        predict(tmp_path / "m.model", [data], backbone="mine:made")
    write_code(here, shift=0)
    assert predict(tmp_path / "m.model", [data], backbone="mine:made").failed == 0


def test_a_name_in_a_file_runs_nothing(data: Path, tmp_path: Path) -> None:
    embed(data, tmp_path / "s.h5", backbone=OWN)
    fit(tmp_path / "s.h5", tmp_path / "m.model", head="ncm")
    with pytest.raises(FeatcacheError, match="not trusted to name code"):
        predict(tmp_path / "m.model", [data])
    with pytest.raises(ValueError, match="is not here"):
        find_transform("os:system@0000000000000000")


def test_only_a_function_with_a_name_is_taken() -> None:
    with pytest.raises(ValueError, match="at the top of a module"):
        know_transform(lambda image: image)
    with pytest.raises(ValueError, match="at the top of a module"):
        know_transform(np.asarray)


def test_specs_without_one_keep_their_bytes() -> None:
    plain = FeatureSpec(
        backbone="toy",
        weights_sha256="0" * 64,
        nodes=(),
        preprocessing=Preprocessing(resize_size=8, crop_size=8),
    )
    own = replace(plain, preprocessing=replace(plain.preprocessing, transform="a:b@c"))
    assert "transform" not in plain.to_json()
    assert FeatureSpec.from_json(own.to_json()) == own
    assert own.fingerprint() != plain.fingerprint()


FILLED = np.zeros((8, 8, 3), dtype=np.uint8)


def fill_one_array(image: Image.Image) -> np.ndarray:
    FILLED[:] = image.getpixel((0, 0))
    return FILLED


def test_a_picture_stays_as_it_is_when_the_next_one_is_made(
    data: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    name = know_transform(fill_one_array)
    wanted = [Picture(preprocessing=Preprocessing(resize_size=8, crop_size=8, transform=name))]
    loaded = load_pictures(data / "c0/00.png", wanted)
    assert isinstance(loaded, LoadedPictures)
    first = loaded.pixels[0]
    before = first.copy()
    load_pictures(data / "c1/01.png", wanted)
    np.testing.assert_array_equal(first, before)


def test_code_that_was_edited_since_it_was_imported_is_not_run_as_what_it_is_now(
    data: Path, tmp_path: Path, here: Path
) -> None:
    write_code(here, shift=0)
    embed(data, tmp_path / "s.h5", backbone="mine:made")
    for name in ("shifting", "mine"):
        text = (here / f"{name}.py").read_text()
        (here / f"{name}.py").write_text(text + "\n# edited\n")
        with pytest.raises(BackboneError, match=f"the file of .*{name[:4]}.* was changed since this process"):
            embed(data, tmp_path / "other.h5", backbone="mine:made")
        (here / f"{name}.py").write_text(text)
    assert embed(data, tmp_path / "s.h5", backbone="mine:made").reused == 12


def test_repair_tries_pictures_of_it_again(
    data: Path, tmp_path: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, store = data / "c0/odd.png", tmp_path / "s.h5"
    save_image(odd, size=(13, 13))
    assert embed(data, store, backbone=OWN).failed == 1
    save_image(odd, size=(14, 14))
    monkeypatch.setattr("featcache.transforms._KNOWN", {})  # as in a process of its own
    with pytest.raises(FeatcacheError, match="not trusted to name code"):
        repair(store)
    assert repair(store, backbone=OWN).embedded == 1
