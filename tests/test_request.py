"""What can be asked for: mistakes of a caller are named, and what a store records can be asked for again."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import make_toy_store, toy_spec

from featcache.cli import main
from featcache.commands.embed import embed
from featcache.errors import BackboneError, DeviceError, StoreError
from featcache.options import EmbedOptions
from featcache.request import EmbedRequest, absolute_weights
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
