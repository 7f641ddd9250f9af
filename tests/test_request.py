"""What can be asked for: mistakes of a caller are named, and what a store records can be asked for again."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_toy_store, toy_records, toy_spec
from test_salvage import flip_in
from torchvision.models import squeezenet1_1

from featcache.cli import main
from featcache.commands import plan as plan_module
from featcache.commands.embed import embed
from featcache.errors import BackboneError, DataError, DeviceError, SpecMismatch, StoreError
from featcache.options import EmbedOptions
from featcache.progress import SilentProgress
from featcache.request import EmbedRequest, absolute_weights
from featcache.store.creating import create_store
from featcache.store.layout import RowTable
from featcache.store.reader import FeatureStore


@pytest.mark.parametrize(
    ("option", "error", "said"),
    [
        ({"seed": -1}, ValueError, "a seed is a whole number from 0"),
        ({"seed": 1 << 63}, ValueError, "a seed is a whole number from 0"),
        ({"seed": True}, ValueError, "a seed is a whole number from 0"),
        ({"precision": "float64"}, ValueError, "precision is one of .*float16.*, not 'float64'"),
        ({"store_dtype": "int8"}, ValueError, "store_dtype is one of .*, not 'int8'"),
        ({"jpeg": True}, ValueError, "jpeg is one of .*, not True"),
        ({"nodes": "layer4"}, TypeError, r"a sequence of names, such as \['layer4'\]"),
        ({"workers": 0}, ValueError, "workers are at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size is 1 to"),
        ({"engine": "abacus"}, DeviceError, "abacus"),
        ({"engin": "onnx"}, TypeError, "engin"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_anything_is_done(
    tmp_path: Path, option: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        embed(tmp_path / "no such folder", tmp_path / "s.h5", **option)


def test_the_options_are_those_of_embed_with_the_same_defaults() -> None:
    documented = {
        name: parameter.default
        for name, parameter in inspect.signature(embed).parameters.items()
        if name not in ("data", "output", "backbone")
    }
    ours = {field.name: field.default for field in fields(EmbedOptions)}
    assert MISSING not in ours.values()
    assert ours == documented
    text = inspect.getdoc(embed)
    assert text is not None
    assert [name for name in ("prune", "views", "shard", "max_failures") if f"{name}:" not in text] == []


def test_plan_hands_on_what_it_takes_with_the_same_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def options(**named: Any) -> EmbedOptions:
        given.update(named)
        return EmbedOptions(**named)

    monkeypatch.setattr(plan_module, "EmbedOptions", options)
    with pytest.raises(DataError, match="is not there"):
        plan_module.plan(tmp_path / "no such folder")
    own = EmbedOptions(max_failures=1.0)
    assert given == {name: getattr(own, name) for name in given}
    taken = set(inspect.signature(plan_module.plan).parameters) - {"data", "output", "backbone"}
    assert set(given) == taken | {"max_failures"}


def test_a_seed_that_torch_cannot_take_is_wrong_usage(tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, ["embed", str(tmp_path), "-o", "s.h5", "--seed", str(1 << 63)])
    assert ran.exit_code == 2
    assert "--seed" in ran.stderr


def test_weights_in_a_home_that_is_nobodys_are_not_there() -> None:
    assert absolute_weights("~nobody-at-all/w.pth") == "~nobody-at-all/w.pth"
    with pytest.raises(BackboneError, match="there is no weights file ~nobody-at-all/w.pth"):
        EmbedOptions(weights="~nobody-at-all/w.pth").run(
            "resnet18", data=Path(), output="s.h5"
        ).embedder.load()


def test_a_store_of_what_nobody_can_ask_for_is_refused_in_one_line(tmp_path: Path) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=2, spec=toy_spec(compute_dtype="float8"))
    with pytest.raises(StoreError, match="holds what no request makes: precision is one of"):
        EmbedRequest.of_store(FeatureStore.open(path))


ASKED: dict[str, Any] = {
    "backbone": "small_network:small", "seed": 3, "nodes": ("layers.0", "layers.1:max"), "views": 2,
    "store_dtype": "float16", "precision": "bfloat16", "jpeg": "scaled",
}  # fmt: skip
ONE: dict[str, Any] = {"device": "cpu", "workers": 1, "engine": "torch-eager", "decoder": "exact"}


class Told(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def made(tmp_path: Path, save_images: Callable[..., Path]) -> tuple[Path, Path]:
    """Images, and a store of them with no default in it."""
    photos = save_images(4, lambda i: f"{'ab'[i % 2]}/{i}.png")
    embed(photos, tmp_path / "s.h5", **ASKED, **ONE)
    return photos, tmp_path / "s.h5"


def test_what_is_not_named_is_the_stores_own(
    made: tuple[Path, Path], save_image: Callable[..., Path]
) -> None:
    photos, store = made
    before, told = FeatureStore.open(store).fingerprint, Told()
    save_image(photos / "a" / "new.png", seed=9)
    result = embed(photos, store, backbone=ASKED["backbone"], progress=told, **ONE)
    assert (result.embedded, result.fingerprint) == (1, before)
    own = (
        "goes on as it was made: --backbone small_network:small --node layers.0 --node layers.1:max --seed 3 "
        "--views 2 --precision bfloat16 --store-dtype float16 --jpeg-scaled"
    )
    assert [note for note in told.notes if "goes on" in note] == [f"{store} {own}"]
    assert plan_module.plan(photos, store, backbone=ASKED["backbone"], **ONE).fingerprint == before
    # Code is run only where it is named.
    with pytest.raises(StoreError, match="repeat it as --backbone small_network:small to allow it"):
        embed(photos, store, **ONE)


def test_what_is_named_is_not_the_stores_own(made: tuple[Path, Path]) -> None:
    photos, store = made
    named = Told()
    embed(photos, store, progress=named, **ASKED, **ONE)
    for name, value, said in (
        ("views", 1, "views"),
        ("precision", "float32", "compute_dtype"),
        ("nodes", ("layers.1:max",), "nodes"),
    ):
        with pytest.raises(SpecMismatch, match=said):
            embed(photos, store, progress=named, **{"backbone": ASKED["backbone"], name: value}, **ONE)
    assert not [note for note in named.notes if "goes on" in note]
    # Nothing of one backbone is asked of another.
    with pytest.raises(SpecMismatch, match="channel_mean"):
        embed(photos, store, backbone="channel_mean:channel_mean", **ONE)


def test_a_backbone_of_torchvision_need_not_be_named_again(
    tmp_path: Path, save_images: Callable[..., Path]
) -> None:
    photos = save_images(2, lambda i: f"{'ab'[i]}/{i}.png")
    asked = ["embed", str(photos), "-o", str(tmp_path / "s.h5"), "-q", "--json"]
    named = ["--backbone", "squeezenet1_1", "--weights", "random", "--seed", "2"]
    first = CliRunner().invoke(main, [*asked, *named])
    again = CliRunner().invoke(main, asked)
    assert (first.exit_code, again.exit_code) == (0, 0), again.output
    assert json.loads(again.stdout)["reused"] == 2
    planned = CliRunner().invoke(main, ["plan", *asked[1:]])
    assert json.loads(planned.stdout)["known"] == 2


def test_a_store_that_cannot_say_what_it_was_made_with_spells_what_its_features_are_of(
    made: tuple[Path, Path],
) -> None:
    photos, store = made
    flip_in(store, "ids")
    broken = store.read_bytes()
    for ask in (embed, plan_module.plan):
        with pytest.raises(StoreError, match="its seal is broken") as said:
            ask(photos, store, **ONE)
        assert "\n" not in str(said.value)
        assert "resnet18" not in str(said.value)
    assert store.read_bytes() == broken
    spelled = re.search(r"pass (.*), and the --weights, --seed or NAME@WEIGHTS of then", str(said.value))
    assert spelled is not None
    asked = ["embed", str(photos), "-o", str(store), "--decoder", "exact", *shlex.split(spelled[1]), "--json"]
    assert json.loads(CliRunner().invoke(main, asked).stdout)["reused"] == 4


def test_a_forged_store_that_no_options_ask_for_names_its_backbone(tmp_path: Path) -> None:
    store = make_toy_store(tmp_path / "s.h5", n=2, spec=toy_spec(compute_dtype="float8"))
    flip_in(store, "ids")
    with pytest.raises(StoreError, match="its seal is broken.* pass --backbone toy, and the --weights"):
        embed(tmp_path, store, **ONE)


def test_a_store_that_never_said_it_names_its_backbone(made: tuple[Path, Path], tmp_path: Path) -> None:
    create_store(
        tmp_path / "made.h5",
        spec=toy_spec(),
        table=RowTable.from_records(toy_records(2), ("c0", "c1")),
        provenance={},
        block_rows=4,
    )
    said = r"made.h5 does not say what it was made with, .* of toy\. .* pass --backbone toy"
    with pytest.raises(StoreError, match=said):
        embed(made[0], tmp_path / "made.h5", **ONE)


def test_a_weights_file_that_changed_in_place_is_named(
    tmp_path: Path, save_images: Callable[..., Path]
) -> None:
    photos, store = save_images(2, lambda i: f"{'ab'[i]}/{i}.png"), tmp_path / "s.h5"
    weights, networks = tmp_path / "w.pth", [squeezenet1_1() for _ in range(2)]
    torch.save(networks[0].state_dict(), weights)
    embed(photos, store, backbone="squeezenet1_1", weights=str(weights), **ONE)
    torch.save(networks[1].state_dict(), weights)
    with pytest.raises(SpecMismatch, match=r"w.pth has changed since \S+s.h5 was made with it.*--output"):
        embed(photos, store, **ONE)
    torch.save(networks[1].state_dict(), tmp_path / "other.pth")
    with pytest.raises(SpecMismatch, match="of another spec: weights_sha256"):
        embed(photos, store, weights=str(tmp_path / "other.pth"), **ONE)
    torch.save(networks[0].state_dict(), weights)
    assert embed(photos, store, **ONE).reused == 2


def test_a_plan_without_a_store_is_of_none(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    photos, store = made
    store.rename(store.with_name("STORE.h5"))
    monkeypatch.chdir(store.parent)
    own = FeatureStore.open("STORE.h5").fingerprint
    assert plan_module.plan(photos, backbone=ASKED["backbone"], **ONE).fingerprint != own
