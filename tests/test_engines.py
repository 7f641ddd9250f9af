"""Engines: the vector is the right one, and depends on the image alone."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from featcache.backbones import Backbone, load_backbone, make_backbone
from featcache.cli import main
from featcache.engines import AUTO, ENGINES, batch_sizes, device_kind, make_engine, other_engines
from featcache.engines.agreement import LOWEST_COSINE, compare_engines
from featcache.errors import DeviceError
from featcache.spec import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

TOY = "channel_mean:channel_mean"


def pixels(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def small(name: str, *, size: int, weights: str | None = "random") -> Backbone:
    """A real network on small images, to be quick."""
    backbone = load_backbone(name, weights=weights)
    return replace(backbone, preprocessing=replace(backbone.preprocessing, crop_size=size))


# The compiled engine takes seconds to make: test_engines_compiled.py.
@pytest.fixture(params=[name for name in ENGINES if name != "torch-compiled"])
def engine_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    for library in ENGINES[name].needs:
        pytest.importorskip(library)
    return name


@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_toy_feature_is_the_normalised_mean_of_each_channel(engine_name: str, count: int) -> None:
    engine = make_engine(load_backbone(TOY), batch_size=4, engine=engine_name)
    images = pixels(count)
    found = engine.embed(images)
    expected = (images.astype(np.float64).mean((1, 2)) / 255 - 0.5) / 0.5
    assert list(found) == ["penultimate"]
    assert found["penultimate"].shape == (count, 3)
    assert found["penultimate"].dtype == np.float32
    np.testing.assert_allclose(found["penultimate"], expected, atol=1e-6)


def test_the_backbone_always_sees_the_full_batch() -> None:
    seen = []

    class Recorder(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(tuple(images.shape))
            return images.mean((2, 3))

    engine = make_engine(
        make_backbone(Recorder(), preprocessing=Preprocessing(resize_size=8, crop_size=8)), batch_size=5
    )
    seen.clear()
    for count in (1, 4, 5):
        engine.embed(pixels(count))
    assert seen == [(5, 3, 8, 8)] * 3


def test_normalised_pixels_are_those_of_torchvisions_preset_bit_for_bit() -> None:
    size = 32
    preprocessing = Preprocessing(resize_size=size, crop_size=size)
    engine = make_engine(make_backbone(nn.Flatten(), preprocessing=preprocessing), batch_size=2)
    image = np.stack([pixels(1, size)[0], np.arange(size * size * 3).reshape(size, size, 3).astype(np.uint8)])
    preset = ImageClassification(crop_size=size, resize_size=size)
    expected = np.stack([preset(Image.fromarray(one)).flatten().numpy() for one in image])
    np.testing.assert_array_equal(engine.embed(image)["penultimate"], expected)


@pytest.mark.parametrize(
    ("name", "weights", "size"),
    [("resnet18", "random", 64), ("efficientnet_lite0", None, 64), ("vit_b_32", "random", 224)],
)
def test_a_vector_does_not_depend_on_neighbours_place_or_filling(
    engine_name: str, name: str, weights: str | None, size: int
) -> None:
    engine = make_engine(small(name, size=size, weights=weights), batch_size=4, engine=engine_name)
    images = pixels(4, size)
    together = engine.embed(images)["penultimate"]
    order = np.random.default_rng(1).permutation(4)
    np.testing.assert_array_equal(engine.embed(images[order])["penultimate"], together[order])
    np.testing.assert_array_equal(engine.embed(images[3:])["penultimate"], together[3:])
    np.testing.assert_array_equal(engine.embed(images[1:3])["penultimate"], together[1:3])


@pytest.mark.parametrize(
    ("name", "size", "nodes"),
    [
        ("resnet18", 64, ("penultimate", "layer2:max", "layer3")),
        ("efficientnet_lite0", 64, ("penultimate",)),
        ("swin_t", 64, ("penultimate", "features.1:max")),  # channels last, attention in windows
        ("vit_b_32", 224, ("penultimate", "encoder.layers.encoder_layer_1:avg")),
    ],
)
def test_every_engine_agrees_with_the_eager_one(
    engine_name: str, name: str, size: int, nodes: tuple[str, ...]
) -> None:
    backbone = small(name, size=size)
    reference = make_engine(backbone, nodes=nodes, batch_size=4)
    engine = make_engine(backbone, nodes=nodes, batch_size=3, engine=engine_name)
    images = pixels(5, size)
    agreement = compare_engines(engine, reference, images)
    assert agreement.passed
    for key in [node.key for node in engine.nodes]:
        ours = np.concatenate([engine.embed(part)[key] for part in (images[:3], images[3:])])
        theirs = np.concatenate([reference.embed(part)[key] for part in (images[:4], images[4:])])
        # Measured: 2e-6 of the largest value; LOWEST_COSINE is what is promised.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
        cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosines.min() >= LOWEST_COSINE


def test_an_engine_is_made_without_a_word(
    engine_name: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Exporters have much to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_engine(small("resnet18", size=32), batch_size=2, engine=engine_name).embed(pixels(1, 32))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_making_an_engine_leaves_attention_as_fast_as_it_was(engine_name: str) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    make_engine(load_backbone(TOY), batch_size=1, engine=engine_name)
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_another_batch_size_changes_a_vector_by_rounding_alone(engine_name: str, name: str) -> None:
    backbone = small(name, size=64)
    images = pixels(7, 64)
    vectors = [
        np.concatenate([engine.embed(images[i : i + size])["penultimate"] for i in range(0, 7, size)])
        for size in (1, 7, 32)
        for engine in [make_engine(backbone, batch_size=size, engine=engine_name)]
    ]
    for other in vectors[1:]:
        # Measured: 1e-6 of the largest value; kernels chosen by the batch's shape add in another order.
        np.testing.assert_allclose(other, vectors[0], rtol=0, atol=1e-5 * np.abs(vectors[0]).max())


def test_head_on_features_equals_the_frozen_network_with_a_new_last_layer() -> None:
    torch.manual_seed(0)
    whole = models.resnet18(weights=None)
    whole.fc = nn.Linear(512, 10)
    backbone = load_backbone("resnet18", weights="random")
    original = {**whole.state_dict(), **backbone.module.state_dict()}
    assert {k for k in original if k not in backbone.module.state_dict()} == {"fc.weight", "fc.bias"}
    whole.load_state_dict(original)
    whole.eval()
    images = pixels(4, 224)
    features = make_engine(backbone, batch_size=4).embed(images)["penultimate"]
    W, b = whole.fc.weight.detach().numpy(), whole.fc.bias.detach().numpy()
    preset = ImageClassification(crop_size=224, resize_size=224)
    with torch.inference_mode():
        expected = whole(torch.stack([preset(Image.fromarray(image)) for image in images])).numpy()
    np.testing.assert_allclose(features @ W.T + b, expected, atol=1e-5)


def test_batch_norm_statistics_stay_even_if_someone_trains_the_module(engine_name: str) -> None:
    backbone = small("resnet18", size=32)
    nodes = ("penultimate", "layer1")
    engine = make_engine(backbone, nodes=nodes, batch_size=4, engine=engine_name)
    before = {key: value.clone() for key, value in backbone.module.state_dict().items()}
    first = engine.embed(pixels(4, 32))
    backbone.module.train()
    second = engine.embed(pixels(4, 32))
    assert all(torch.equal(value, before[key]) for key, value in backbone.module.state_dict().items())
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_several_nodes_come_back_in_the_order_asked_for(engine_name: str) -> None:
    nodes = ("layer2:max", "penultimate")
    engine = make_engine(small("resnet18", size=32), nodes=nodes, batch_size=2, engine=engine_name)
    found = engine.embed(pixels(2, 32))
    assert list(found) == [node.key for node in engine.nodes] == ["layer2:max", "penultimate"]
    assert [found[node.key].shape for node in engine.nodes] == [(2, 128), (2, 512)]


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_lower_precision_is_near_but_not_float32(precision: Any, tolerance: float) -> None:
    backbone = small("resnet18", size=32)
    images = pixels(2, 32)
    exact = make_engine(backbone, batch_size=2).embed(images)["penultimate"]
    rough = make_engine(backbone, batch_size=2, precision=precision).embed(images)["penultimate"]
    difference = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 0 < difference < tolerance
    assert rough.dtype == np.float32


def test_an_engine_describes_itself(engine_name: str) -> None:
    engine = make_engine(load_backbone(TOY), device="cpu", engine=engine_name)
    assert (engine.name, engine.device) == (engine_name, "cpu")
    assert engine.batch_size >= 1
    assert [node.num_features for node in engine.nodes] == [3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu"}, "no device 'gpu'; this machine has .*cpu"),
        ({"device": "cuda:99"}, "this machine has no cuda:99: pass --device auto"),
        ({"device": "meta"}, "this machine has no meta"),
        ({"precision": "int8"}, "no precision 'int8'; there are float32, bfloat16, float16"),
        ({"engine": "steam"}, "no engine 'steam'; there are torch-eager, torch-compiled, onnx"),
    ],
)
def test_what_the_machine_has_not_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        make_engine(load_backbone(TOY), **options)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (pixels(5), "1 to 4 images, not 5"),
        (pixels(0), "1 to 4 images, not 0"),
        (pixels(2, 9), "uint8 of shape"),
        (pixels(2).astype(np.float32), "not float32"),
        (pixels(2)[0], "uint8 of shape"),
    ],
)
def test_wrong_pixels_are_a_mistake_of_the_caller(engine_name: str, images: np.ndarray, said: str) -> None:
    engine = make_engine(load_backbone(TOY), batch_size=4, engine=engine_name)
    with pytest.raises(ValueError, match=said):
        engine.embed(images)


@pytest.mark.parametrize("said", ["cuda", "cuda:1", "cuda (NVIDIA H100)", "cuda:0 (NVIDIA H100: 80 GB)"])
def test_the_kind_of_a_device_is_told_from_its_words(said: str) -> None:
    assert device_kind(said) == "cuda"
    assert batch_sizes("torch-eager", device_kind(said))


def test_a_batch_size_below_one_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_engine(load_backbone(TOY), batch_size=0)


def test_read_only_pixels_are_left_as_they_are(engine_name: str) -> None:
    images = pixels(4)
    images.flags.writeable = False
    before = images.copy()
    make_engine(load_backbone(TOY), batch_size=4, engine=engine_name).embed(images)
    np.testing.assert_array_equal(images, before)


def test_the_command_line_offers_every_engine() -> None:
    (option,) = [option for option in main.commands["embed"].params if option.name == "engine"]
    assert list(option.type.choices) == [AUTO, *ENGINES]  # type: ignore[attr-defined]
    assert option.default == AUTO


def test_an_engine_whose_library_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featcache.engines.find_spec", lambda name: None)
    assert other_engines() == ("torch-compiled",)
    with pytest.raises(DeviceError, match=r"needs onnx and onnxruntime, .*: pip install 'featcache\[onnx\]'"):
        make_engine(load_backbone(TOY), engine="onnx")


class Greedy(nn.Module):
    """Wants more memory than any machine has, but not for the one image on which copies are compared."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 1:
            torch.empty(1 << 50)
        return images.mean((2, 3))


def test_a_lack_of_memory_is_one_line() -> None:
    backbone = make_backbone(Greedy(), preprocessing=Preprocessing(resize_size=8, crop_size=8))
    engine = make_engine(backbone, device="cpu", batch_size=4)
    with pytest.raises(
        DeviceError, match="cpu has not enough memory for batches of 4 images: pass a smaller"
    ):
        engine.embed(pixels(1))


def test_another_error_in_the_network_is_not_taken_for_a_lack_of_memory() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 1:
                raise RuntimeError("a fault of the network")
            return images.mean((2, 3))

    backbone = make_backbone(Broken(), preprocessing=Preprocessing(resize_size=8, crop_size=8))
    with pytest.raises(RuntimeError, match="a fault of the network"):
        make_engine(backbone, device="cpu", batch_size=4).embed(pixels(1))


class Unexportable(nn.Module):
    """ONNX has no singular values."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.svdvals(images.mean(1))  # (B, 3, S, S) -> (B, S)


class TestOnnxRuntime:
    """What only the engine that exports can meet."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_another_precision_is_one_line(self, precision: Any) -> None:
        with pytest.raises(DeviceError, match=f"computes in float32, not in {precision}"):
            make_engine(load_backbone(TOY), engine="onnx", precision=precision)

    def test_a_network_that_cannot_be_exported_is_one_line(self) -> None:
        backbone = make_backbone(
            Unexportable(), preprocessing=Preprocessing(resize_size=8, crop_size=8), name="odd"
        )
        make_engine(backbone, batch_size=2).embed(pixels(1))
        with pytest.raises(DeviceError, match=r"cannot run odd \(.*svd.*\): pass another --engine") as raised:
            make_engine(backbone, batch_size=2, engine="onnx")
        assert len(str(raised.value).splitlines()) == 1

    def test_a_network_whose_way_depends_on_the_images_is_not_exported(self) -> None:
        class Branching(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images.mean((2, 3)) * (2 if images.mean() > 0 else 1)

        backbone = make_backbone(
            Branching(), preprocessing=Preprocessing(resize_size=8, crop_size=8), name="odd"
        )
        with pytest.raises(
            DeviceError, match="cannot run odd .its Python may decide by what is in the images"
        ):
            make_engine(backbone, batch_size=2, engine="onnx")

    def test_a_network_larger_than_a_protobuf_is_not_even_exported(self) -> None:
        with torch.device("meta"):
            layer = nn.Linear(40_000, 20_000)

        class Large(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unused = layer

            def forward(self, images: Tensor) -> Tensor:
                return images.mean((2, 3))

        toy = load_backbone(TOY)
        with pytest.raises(DeviceError, match="too large"):
            make_engine(replace(toy, module=Large()), batch_size=1, engine="onnx")

    def test_a_session_that_fails_is_one_line(self) -> None:
        from featcache.engines import onnx_runtime

        class Failing:
            def run(self, *_: object) -> None:
                raise onnx_runtime.states.RuntimeException("Failed to allocate memory for 9 bytes\nat line 1")

        engine = onnx_runtime.OnnxRuntime(
            Failing(), nodes=(), crop_size=8, device=torch.device("cpu"), batch_size=2
        )
        with pytest.raises(
            DeviceError, match=r"onnx failed on cpu in a batch of 2 images \(Failed .* 9 bytes\): pass"
        ):
            engine.embed(pixels(1))

    def test_it_uses_no_more_threads_than_torch(self) -> None:
        engine: Any = make_engine(load_backbone(TOY), engine="onnx")
        assert engine._session.get_session_options().intra_op_num_threads == torch.get_num_threads() == 1
