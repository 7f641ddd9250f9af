"""What a row is known by: everything that determines a feature changes its key, and nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import toy_spec
from faults.io_failures import TOY, stopping_after
from PIL import Image

from featcache import pipeline, versions
from featcache.commands.embed import EmbedResult, embed
from featcache.engines import torch_eager
from featcache.engines.torch_eager import TorchEager
from featcache.errors import SpecMismatch, StoreLocked
from featcache.images import identity
from featcache.images.identity import ImageIdentity, hash_image
from featcache.spec import FeatureNode, FeatureSpec, Preprocessing, spec_differences
from featcache.store.reader import FeatureStore

SMALL = "squeezenet1_1"

# For every field values that differ from the base's. A field without a row fails the test.
BASE = toy_spec(preprocessing=Preprocessing(resize_size=10, crop_size=8))
NODES = BASE.nodes
MUTATIONS: dict[type, dict[str, list[Any]]] = {
    FeatureSpec: {
        "backbone": ["toy2", "Toy", "", "toy "],
        "weights_sha256": ["0" * 63 + "1", "1" + "0" * 63, "0" * 63],
        "nodes": [NODES[:1], NODES[1:], NODES[::-1], (*NODES, FeatureNode(name="x", num_features=1))],
        "preprocessing": [],  # field by field below
        "compute_dtype": ["bfloat16", "float16"],
        "store_dtype": ["float16"],
        "views": [2, 3],
        # Where there is one view these draw nothing; tests/test_views.py has them where there are more.
        "views_seed": [],
        "augmentation": [],
    },
    Preprocessing: {
        "resize_size": [8, 9, 11],
        "crop_size": [7, 10],
        "interpolation": ["nearest", "bicubic", "lanczos", "box", "hamming"],
        "antialias": [False],
        "mean": [(0.485, 0.456, 0.40600001), (0.456, 0.485, 0.406), (0.0, 0.456, 0.406)],
        "std": [(0.229, 0.224, 0.2250001), (0.224, 0.229, 0.225), (1.0, 0.224, 0.225)],
        "color": ["rgb-over-white-2", "rgb-over-black-1"],
        "exif": ["ignore"],
        "jpeg": ["scaled"],
        "transform": ["mine:shift@0123456789abcdef"],
    },
    FeatureNode: {
        "name": ["penultimate2", "penultimate:max", "pen"],
        "pooling": ["avg", "max", "cls"],
        "num_features": [4, 33],
    },
}


def mutants() -> dict[str, FeatureSpec]:
    """{what was changed: the spec}."""
    made = {"nothing": BASE}
    for field, values in MUTATIONS[FeatureSpec].items():
        for value in values:
            made[f"{field} = {value}"] = dataclasses.replace(BASE, **{field: value})
    for field, values in MUTATIONS[Preprocessing].items():
        for value in values:
            changed = dataclasses.replace(BASE.preprocessing, **{field: value})
            made[f"preprocessing.{field} = {value}"] = dataclasses.replace(BASE, preprocessing=changed)
    for field, values in MUTATIONS[FeatureNode].items():
        for value in values:
            changed = dataclasses.replace(NODES[0], **{field: value})
            made[f"nodes[0].{field} = {value}"] = dataclasses.replace(BASE, nodes=(changed, NODES[1]))
    # Values that only changed places.
    swapped = dataclasses.replace(
        BASE.preprocessing, mean=BASE.preprocessing.std, std=BASE.preprocessing.mean
    )
    made["mean and std swapped"] = dataclasses.replace(BASE, preprocessing=swapped)
    swapped = dataclasses.replace(BASE.preprocessing, resize_size=8, crop_size=10)
    made["sizes swapped"] = dataclasses.replace(BASE, preprocessing=swapped)
    return made


@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_field_has_a_mutation(kind: type) -> None:
    assert set(MUTATIONS[kind]) == {field.name for field in dataclasses.fields(kind)}


def test_a_field_of_the_spec_that_is_a_type_of_its_own_is_mutated_field_by_field() -> None:
    nested = {type(value) for value in vars(BASE).values() if dataclasses.is_dataclass(value)}
    nested |= {type(node) for node in BASE.nodes}
    assert nested | {FeatureSpec} == set(MUTATIONS)


def test_every_mutation_has_a_fingerprint_of_its_own() -> None:
    by_fingerprint: dict[str, str] = {}
    for what, spec in mutants().items():
        clash = by_fingerprint.setdefault(spec.fingerprint(), what)
        assert clash == what, f"{what} and {clash} have one fingerprint"
    assert len(by_fingerprint) > 40


def test_every_mutation_is_named_to_the_user() -> None:
    for what, spec in mutants().items():
        assert bool(spec_differences(BASE, spec)) == (what != "nothing"), what


def test_a_fingerprint_survives_the_way_through_a_file() -> None:
    for what, spec in mutants().items():
        again = FeatureSpec.from_json(spec.to_json())
        assert (again, again.fingerprint()) == (spec, spec.fingerprint()), what


def test_equal_specs_have_one_fingerprint_however_their_numbers_are_written() -> None:
    def spec_of(mean: tuple[Any, ...], std: tuple[Any, ...]) -> FeatureSpec:
        return toy_spec(preprocessing=Preprocessing(resize_size=8, crop_size=8, mean=mean, std=std))

    assert spec_of((0, 0, 0), (1, 1, 1)).fingerprint() == spec_of((0.0,) * 3, (1.0,) * 3).fingerprint()


# The bytes of an image.


def tiny_png(colour: tuple[int, int, int] = (10, 200, 90)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images of equal size in bytes, in two classes."""
    for i in range(4):
        path = tmp_path / "photos" / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny_png((i, 50 * i, 255 - i)).ljust(100, b"\0"))
    return tmp_path / "photos"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.h5"


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes in the same file, of the same size and mtime."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_every_byte_of_an_image_is_in_its_key(photos: Path, store: Path) -> None:
    embed(photos, store, backbone=TOY)
    path = photos / "c0" / "0.png"
    original = path.read_bytes()
    keys = {hashlib.sha256(original).digest()}
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << position % 8
        overwrite(path, bytes(changed))
        read = hash_image(path)
        assert isinstance(read, ImageIdentity)
        keys.add(read.sha256)
        dry = embed(photos, store, backbone=TOY, dry_run=True)
        assert (dry.embedded, dry.reused) == (1, 3), f"byte {position}"
    assert len(keys) == len(original) + 1
    overwrite(path, original)
    assert embed(photos, store, backbone=TOY, dry_run=True).reused == 4


@pytest.mark.parametrize("change", ["a byte more", "a byte less", "empty"])
def test_bytes_added_or_cut_are_in_the_key(photos: Path, store: Path, change: str) -> None:
    embed(photos, store, backbone=TOY)
    path = photos / "c0" / "0.png"
    data = path.read_bytes()
    path.write_bytes({"a byte more": data + b"\0", "a byte less": data[:-1], "empty": b""}[change])
    assert embed(photos, store, backbone=TOY, dry_run=True).reused == 3


def test_two_images_of_one_size_and_mtime_that_change_names_keep_their_features(
    photos: Path, store: Path
) -> None:
    a, b = photos / "c0" / "0.png", photos / "c1" / "1.png"
    for path in (a, b):
        os.utime(path, (1, 1))
    embed(photos, store, backbone=TOY)
    before = vectors(store)
    aside = photos / "aside"
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    with no_decoding():
        embed(photos, store, backbone=TOY)
    after = vectors(store)
    assert (after["c0/0.png"], after["c1/1.png"]) == (before["c1/1.png"], before["c0/0.png"])
    assert before["c0/0.png"] != before["c1/1.png"]


def test_an_image_changed_between_a_kill_and_its_resume_is_not_taken_from_the_kill(
    photos: Path, store: Path
) -> None:
    with (
        mock.patch("featcache.embedding.BLOCK_ROWS", 2),
        stopping_after(1),
        pytest.raises(KeyboardInterrupt),
    ):
        embed(photos, store, backbone=TOY, batch_size=2, workers=1, decoder="exact")
    assert FeatureStore.open(store).done.tolist() == [True, True, False, False]
    overwrite(photos / "c0" / "0.png", tiny_png((99, 99, 99)).ljust(100, b"\0"))
    result = embed(photos, store, backbone=TOY, batch_size=2, workers=1)
    assert (result.embedded, result.reused) == (3, 1)
    np.testing.assert_allclose(vectors(store)["c0/0.png"], [(99 / 255 - 0.5) / 0.5] * 3, atol=1e-6)


# What must not matter.


@contextmanager
def no_decoding() -> Iterator[None]:
    def refuse(path: Path, *_: object) -> None:
        raise AssertionError(f"{path} was decoded")

    with mock.patch.object(pipeline, "load_pictures", refuse):
        yield


@contextmanager
def no_reading() -> Iterator[None]:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was opened")

    with mock.patch.object(identity, "read_image", refuse), no_decoding():
        yield


def vectors(path: Path) -> dict[str, list[float]]:
    features = FeatureStore.open(path).features()
    return dict(zip(features.ids, features.X.tolist(), strict=True))


def other_versions() -> dict[str, str]:
    return dict.fromkeys(INSTALLED, "99.0")


INSTALLED = versions.installed()


@pytest.mark.parametrize(
    ("knob", "patches"),
    [
        ({"batch_size": 1}, {}),
        ({"batch_size": 3}, {}),
        ({"workers": 1}, {}),
        ({"workers": 5}, {}),
        ({"device": "cpu"}, {}),
        ({"seed": 7}, {}),  # of random weights, which this backbone has none of
        ({"max_failures": 1.0}, {}),
        ({"follow_links": True}, {}),
        ({}, {(TorchEager, "name"): "another engine"}),
        ({}, {(torch_eager, "device_words"): lambda device: "cuda:0 (another machine)"}),
        ({}, {(versions, "installed"): other_versions}),
        ({}, {(os, "getcwd"): lambda: "/"}),
    ],
    ids=lambda value: ", ".join(str(key) for key in value) or "-",
)
def test_what_does_not_determine_features_opens_no_image(
    photos: Path, store: Path, knob: dict[str, Any], patches: dict[tuple[Any, str], Any]
) -> None:
    first = embed(photos, store, backbone=TOY)
    with pytest.MonkeyPatch.context() as patch, no_reading():
        for (owner, name), value in patches.items():
            patch.setattr(owner, name, value)
        again = embed(photos, store, backbone=TOY, **knob)
    assert (again.embedded, again.reused) == (0, 4)
    assert again.fingerprint == first.fingerprint


def test_another_engine_or_device_makes_a_store_of_the_same_fingerprint(
    photos: Path, store: Path, tmp_path: Path
) -> None:
    first = embed(photos, store, backbone=TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEager, "name", "another engine")
        patch.setattr(torch_eager, "device_words", lambda device: "cuda:0 (another machine)")
        patch.setattr(versions, "installed", other_versions)
        other = embed(photos, tmp_path / "other.h5", backbone=TOY)
    assert other.fingerprint == first.fingerprint
    assert FeatureStore.open(tmp_path / "other.h5").provenance["engine"] == "another engine"


@pytest.mark.parametrize(
    "change", ["the store is renamed", "the store is in another folder", "by a relative path"]
)
def test_where_the_store_lies_does_not_matter(
    photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    embed(photos, store, backbone=TOY)
    target = {"the store is renamed": tmp_path / "renamed.h5", "by a relative path": store}.get(
        change, tmp_path / "folder" / "s.h5"
    )
    target.parent.mkdir(exist_ok=True)
    store.rename(target)
    if change == "by a relative path":
        monkeypatch.chdir(tmp_path)
        photos, target = Path("photos"), Path("store.h5")
    with no_reading():
        assert embed(photos, target, backbone=TOY).reused == 4


def test_the_order_of_a_manifest_does_not_matter(photos: Path, store: Path, tmp_path: Path) -> None:
    lines = [f"c{i % 2}/{i}.png,c{i % 2}" for i in range(4)]
    manifest = tmp_path / "all.csv"
    manifest.write_text("\n".join(["path,label", *lines]))
    first = embed(manifest, store, backbone=TOY, root=photos)
    kept = store.read_bytes()
    manifest.write_text("\n".join(["path,label", *reversed(lines)]))
    with no_reading():
        again = embed(manifest, store, backbone=TOY, root=photos)
    assert (again.reused, again.fingerprint) == (4, first.fingerprint)
    assert store.read_bytes() == kept


def test_the_order_in_which_a_folder_is_listed_does_not_matter(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(photos, store, backbone=TOY)
    kept, plain = store.read_bytes(), os.scandir

    @contextmanager
    def backwards(path: Any) -> Iterator[Any]:
        with plain(path) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    with no_reading():
        assert embed(photos, store, backbone=TOY).reused == 4
    assert store.read_bytes() == kept


def test_a_row_does_not_depend_on_what_else_is_in_the_data_set(photos: Path, tmp_path: Path) -> None:
    def embed_killed_backbone(data: Path, output: Path) -> EmbedResult:
        return embed(data, output, backbone="killed_backbone:backbone", batch_size=4)

    embed_killed_backbone(photos, tmp_path / "all.h5")
    for path in (photos / "c0").iterdir():
        path.unlink()
    embed_killed_backbone(photos, tmp_path / "some.h5")
    whole, some = vectors(tmp_path / "all.h5"), vectors(tmp_path / "some.h5")
    assert len(some) == 2
    assert {name: whole[name] for name in some} == some


# The weights.


def test_weights_swapped_under_the_same_file_name_are_refused_and_not_served(
    photos: Path, store: Path, tmp_path: Path
) -> None:
    import torch

    from featcache.backbones import load_backbone

    weights = tmp_path / "weights.pth"

    def save_weights(seed: int) -> bytes:
        torch.save(load_backbone(SMALL, weights="random", seed=seed).module.state_dict(), weights)
        os.utime(weights, (1, 1))
        return weights.read_bytes()

    mine = save_weights(0)
    first = embed(photos, store, backbone=SMALL, weights=str(weights))
    kept = store.read_bytes()
    assert len(save_weights(1)) == len(mine)
    with pytest.raises(SpecMismatch, match="weights.pth has changed since .*Choose another --output"):
        embed(photos, store, backbone=SMALL, weights=str(weights))
    assert store.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "store.h5", "weights.pth"]
    weights.write_bytes(mine)
    with no_reading():
        again = embed(photos, store, backbone=SMALL, weights=str(weights))
    assert (again.reused, again.fingerprint) == (4, first.fingerprint)
    moved = weights.rename(tmp_path / "moved.pth")
    with no_reading():
        assert embed(photos, store, backbone=SMALL, weights=str(moved)).reused == 4


@pytest.mark.parametrize("bit", [0, 31])
def test_one_bit_of_one_weight_is_in_the_fingerprint(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch, bit: int
) -> None:
    import killed_backbone
    import torch

    embed(photos, store, backbone="killed_backbone:backbone")
    plain = killed_backbone.Killed.__init__

    def with_one_bit_flipped(self: Any) -> None:
        plain(self)
        flat = self.stem.bias.data.view(torch.int32)
        flat[3] ^= -(2**31) if bit == 31 else 1 << bit

    monkeypatch.setattr(killed_backbone.Killed, "__init__", with_one_bit_flipped)
    with pytest.raises(SpecMismatch, match="weights_sha256"):
        embed(photos, store, backbone="killed_backbone:backbone")


# Two at once.


def test_of_runs_at_once_one_writes_and_the_others_are_refused(photos: Path, store: Path) -> None:
    gate = threading.Barrier(4)
    outcomes: list[str] = []

    def run() -> None:
        gate.wait()
        try:
            embed(photos, store, backbone=TOY, workers=1)
            outcomes.append("done")
        except StoreLocked:
            outcomes.append("refused")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"done", "refused"}
    assert len(outcomes) == 4
    assert "done" in outcomes
    assert len(vectors(store)) == 4
    assert sorted(path.name for path in store.parent.iterdir()) == ["photos", "store.h5"]


def test_a_run_refused_by_another_changes_nothing(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run begins in the middle of the first one's forward pass."""
    plain, refused = TorchEager.embed, []

    def embed_again_meanwhile(self: TorchEager, pixels: Any) -> Any:
        with pytest.raises(StoreLocked):
            embed(photos, store, backbone=TOY, batch_size=2)
        refused.append(sorted(path.name for path in store.parent.iterdir()))
        return plain(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEager, "embed", embed_again_meanwhile)
        assert embed(photos, store, backbone=TOY, batch_size=2, workers=1, decoder="exact").embedded == 4
    assert refused == [["photos", "store.h5", "store.h5.lock"]] * 2
    assert embed(photos, store, backbone=TOY).reused == 4
