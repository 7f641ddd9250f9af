"""A weights file that is elsewhere now: known by its bytes, and found there from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featcache import embedder
from featcache.backbones import load_backbone
from featcache.commands.embed import embed
from featcache.commands.explain import explain
from featcache.commands.fit import fit
from featcache.commands.predict import predict
from featcache.commands.verify import verify
from featcache.errors import BackboneError
from featcache.sharding import Shard
from featcache.store.reader import FeatureStore

SMALL = "squeezenet1_1"
ONE: dict[str, Any] = {"workers": 1, "engine": "torch-eager", "decoder": "exact", "batch_size": 2}


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    return save_images(4, lambda i: f"{'ab'[i % 2]}/{i}.png")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "old" / "w.pth"
    path.parent.mkdir()
    torch.save(load_backbone(SMALL, weights="random").module.state_dict(), path)
    return path


@pytest.fixture
def store(photos: Path, weights: Path, tmp_path: Path) -> Path:
    embed(photos, tmp_path / "s.h5", backbone=SMALL, weights=str(weights), **ONE)
    return tmp_path / "s.h5"


def move(weights: Path) -> Path:
    new = weights.parent.with_name("new") / "v.pth"
    new.parent.mkdir()
    return weights.rename(new)


def recorded(store: Path) -> tuple[str, str, str]:
    """Where the store says that its weights were asked for and read, and how they are called."""
    provenance = FeatureStore.open(store).provenance
    return provenance["request"]["weights"], provenance["weights"]["path"], provenance["weights"]["label"]


def refuse_to_load(*_: Any, **__: Any) -> None:
    raise AssertionError("the weights were loaded")


def test_it_is_known_by_its_bytes_and_its_place_recorded(
    photos: Path, weights: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = FeatureStore.open(store).features()
    new = move(weights)
    monkeypatch.setattr(embedder, "load_backbone", refuse_to_load)
    result = embed(photos, store, weights=str(new), **ONE)
    assert (result.embedded, result.reused) == (0, 4)
    assert f"the weights file is {new}; {weights}, where it was, has it no more" in result.notes
    assert recorded(store) == (str(new), str(new), "v.pth")
    after = FeatureStore.open(store).features()
    assert after.ids == before.ids
    assert (after.X == before.X).all()
    kept = store.read_bytes()
    assert embed(photos, store, **ONE).reused == 4
    assert store.read_bytes() == kept
    assert sorted(path.name for path in store.parent.glob("s.h5*")) == ["s.h5"]


def test_where_it_was_loaded_for_proof_its_place_is_recorded_too(
    photos: Path, weights: Path, store: Path
) -> None:
    state = torch.load(weights)
    weights.unlink()
    new = weights.with_suffix(".pt")  # the same weights in other bytes
    torch.save({"state_dict": state}, new)
    result = embed(photos, store, weights=str(new), **ONE)
    assert (result.embedded, result.reused) == (0, 4)
    assert recorded(store) == (str(new), str(new), "w.pt")
    assert embed(photos, store, **ONE).reused == 4


def test_rows_that_changed_meanwhile_do_not_keep_the_place_from_being_recorded(
    photos: Path, weights: Path, store: Path
) -> None:
    new = move(weights)
    (photos / "a" / "0.png").rename(photos / "a" / "renamed.png")
    assert embed(photos, store, weights=str(new), **ONE).reused == 4
    assert recorded(store) == (str(new), str(new), "v.pth")
    assert verify(store, recompute=2, data=photos).sound


def test_a_copy_is_the_same_and_the_first_place_stays(photos: Path, weights: Path, store: Path) -> None:
    copy = weights.with_name("copy.pth")
    copy.write_bytes(weights.read_bytes())
    kept = store.read_bytes()
    result = embed(photos, store, weights=str(copy), **ONE)
    assert (result.reused, store.read_bytes()) == (4, kept)
    assert not any("where it was" in note for note in result.notes)
    weights.write_bytes(b"something else")
    assert embed(photos, store, weights=str(copy), **ONE).reused == 4
    assert recorded(store)[0] == str(copy)


def test_a_run_that_is_only_to_say_what_it_would_do_says_it(photos: Path, weights: Path, store: Path) -> None:
    new, kept = move(weights), store.read_bytes()
    result = embed(photos, store, weights=str(new), dry_run=True, **ONE)
    assert any(str(new) in note for note in result.notes)
    assert store.read_bytes() == kept
    assert explain(store, weights=str(new)).differences == ()


@pytest.mark.parametrize("index", [0, 1])
def test_shards_of_a_store_that_has_its_rows_record_it(
    photos: Path, weights: Path, store: Path, index: int
) -> None:
    new = move(weights)
    embed(photos, store, weights=str(new), shard=Shard(index=index, count=2), **ONE)
    assert recorded(store) == (str(new), str(new), "v.pth")


def test_until_then_it_is_said_which_file_is_missing(
    photos: Path, weights: Path, store: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m.model"
    fit(store, model, head="ncm", curve=False)
    new, image = move(weights), photos / "a" / "0.png"
    said = f"was made with the weights file {weights}, which is not there .*pass --weights FILE"
    with pytest.raises(BackboneError, match=f"s.h5 {said}"):
        embed(photos, store, **ONE)
    with pytest.raises(BackboneError, match=f"s.h5 {said}"):
        verify(store, recompute=1)
    with pytest.raises(BackboneError, match=f"m.model {said}"):
        predict(model, [image])
    assert predict(model, [image], weights=str(new)).failed == 0
