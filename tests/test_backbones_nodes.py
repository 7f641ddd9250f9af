"""Nodes: every family gives what forward hooks see, pooled over the right axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featcache.backbones import Backbone, bundled, load_backbone, make_backbone, torchvision_rows
from featcache.backbones.nodes import list_nodes, make_extractor
from featcache.errors import BackboneError, UnknownNode
from featcache.spec import PENULTIMATE, FeatureNode, Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Preprocessing(resize_size=8, crop_size=8)

# One network a row of the torchvision family and one of the bundled: an inner node, how many features it has,
# and the axes over which its output is averaged ("cls" for the class token).
MEMBERS = {
    "alexnet": ("features.5", 192, (2, 3)),
    "convnext_tiny": ("features.1", 96, (2, 3)),
    "densenet121": ("features.denseblock1", 256, (2, 3)),
    "efficientnet_b0": ("features.3", 40, (2, 3)),
    "efficientnet_lite0": ("blocks.2", 40, (2, 3)),
    "googlenet": ("inception3a", 256, (2, 3)),
    "inception_v3": ("Mixed_5b", 256, (2, 3)),
    "mnasnet0_5": ("layers.8", 16, (2, 3)),
    "mobilenet_v2": ("features.3", 24, (2, 3)),
    "mobilenet_v3_small": ("features.2", 24, (2, 3)),
    "regnet_y_400mf": ("trunk_output.block2", 104, (2, 3)),
    "resnet18": ("layer3", 256, (2, 3)),
    "shufflenet_v2_x0_5": ("stage2", 48, (2, 3)),
    "squeezenet1_1": ("features.5", 128, (2, 3)),
    "swin_t": ("features.1", 96, (1, 2)),
    "vgg11": ("features.10", 256, (2, 3)),
    "vit_b_32": ("encoder.layers.encoder_layer_5", 768, "cls"),
}

LISTED = {
    **{name: width for row in torchvision_rows.ROWS for name, width in row.num_features.items()},
    **{name: row.num_features for name, row in bundled.ROWS.items()},
}


class Tokens(nn.Module):
    """A class token that is the brightest value, then a token a pixel."""

    def forward(self, images: Tensor) -> Tensor:
        patches = images.flatten(2).transpose(1, 2)  # (B, S * S, 3)
        return torch.cat([patches.amax(1, keepdim=True), patches], dim=1)


class Branching(nn.Module):
    """Looks at the values of its input, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images if images.sum() > 0 else -images)


class Recurrent(nn.Module):
    """Its inner module returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(64, 4)

    def forward(self, images: Tensor) -> Any:
        return self.gru(images.flatten(2))[0].flatten(1)


def small(name: str) -> Backbone:
    """A real network with random weights, on small images to be quick; a ViT takes one size only."""
    backbone = load_backbone(name, weights="random")
    size = backbone.preprocessing.crop_size if name.startswith("vit") else 96
    return replace(backbone, preprocessing=replace(backbone.preprocessing, crop_size=size))


def images_for(backbone: Backbone, count: int = 2) -> Tensor:
    size = backbone.preprocessing.crop_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def hooked(backbone: Backbone, node: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """The output of the submodule `node` and of the network, as seen by a forward hook."""
    seen: list[Tensor] = []
    handle = backbone.module.get_submodule(node).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.inference_mode():
        output = backbone.module(images)
    handle.remove()
    return seen[0], output


def extract(backbone: Backbone, nodes: list[str], images: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        found: dict[str, Tensor] = make_extractor(backbone, nodes)(images)
    return found


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_every_row_gives_its_penultimate_and_an_inner_node(name: str) -> None:
    node, width, pooled = MEMBERS[name]
    backbone = small(name)
    images = images_for(backbone, 1)
    inner, output = hooked(backbone, node, images)
    expected = inner[:, 0] if pooled == "cls" else inner.mean(pooled)
    extractor = make_extractor(backbone, ["penultimate", node])
    with torch.inference_mode():
        found = extractor(images)
    listed = LISTED[name]
    assert extractor.nodes == (
        FeatureNode(name="penultimate", num_features=listed),
        FeatureNode(name=node, pooling="cls" if pooled == "cls" else "avg", num_features=width),
    )
    assert torch.equal(found["penultimate"], output)
    assert torch.equal(found[extractor.nodes[1].key], expected)
    assert found["penultimate"].shape == (1, listed)


def test_max_and_average_of_one_node_come_from_one_pass() -> None:
    backbone = small("resnet18")
    images = torch.randn(2, 3, 64, 64)
    inner, output = hooked(backbone, "layer2", images)
    found = extract(backbone, ["layer2:max", "layer2", "penultimate", "flatten"], images)
    assert list(found) == ["layer2:max", "layer2:avg", "penultimate", "flatten"]
    assert torch.equal(found["layer2:max"], inner.amax((2, 3)))
    assert torch.equal(found["layer2:avg"], inner.mean((2, 3)))
    assert torch.equal(found["flatten"], output)


def test_a_node_asked_for_twice_comes_once() -> None:
    backbone = small("resnet18")
    extractor = make_extractor(backbone, ["layer3", "penultimate", "layer3:avg"])
    assert [node.key for node in extractor.nodes] == ["layer3:avg", "penultimate"]


def test_maps_with_channels_first_inside_a_channels_last_network_are_pooled_over_space() -> None:
    backbone = small("swin_t")
    found = {node.key: node.num_features for node in
             make_extractor(backbone, ["features.0.0", "permute", "norm", "avgpool"]).nodes}  # fmt: skip
    assert found == {"features.0.0:avg": 96, "permute:avg": 768, "norm:avg": 768, "avgpool:avg": 768}


def test_tokens_are_pooled_by_class_token_or_over_patches_alone() -> None:
    backbone = make_backbone(Tokens(), preprocessing=TINY, prefix_tokens=1)
    images = torch.rand(2, 3, 8, 8)
    nodes = ["penultimate", "penultimate:avg", "penultimate:max", "cat:cls"]
    found = extract(backbone, nodes, images)
    assert torch.equal(found["penultimate"], images.amax((2, 3)))
    assert torch.equal(found["cat:cls"], images.amax((2, 3)))
    assert torch.allclose(found["penultimate:avg"], images.mean((2, 3)))
    assert torch.equal(found["penultimate:max"], images.amax((2, 3)))


def test_tokens_without_a_class_token_are_averaged() -> None:
    backbone = make_backbone(Tokens(), preprocessing=TINY)
    images = torch.rand(2, 3, 8, 8)
    expected = (images.sum((2, 3)) + images.amax((2, 3))) / 65
    assert torch.allclose(extract(backbone, ["penultimate"], images)["penultimate"], expected)
    with pytest.raises(UnknownNode, match=r"no class token: ask for :avg or :max"):
        make_extractor(backbone, ["penultimate:cls"])


def test_a_feature_map_at_the_end_is_pooled() -> None:
    images = torch.rand(2, 3, 8, 8)
    first = make_backbone(nn.ReLU(), preprocessing=TINY)
    last = make_backbone(nn.ReLU(), preprocessing=replace(TINY, crop_size=3), layout="nhwc")
    assert torch.equal(extract(first, ["penultimate"], images)["penultimate"], images.mean((2, 3)))
    assert torch.equal(extract(last, ["penultimate"], images)["penultimate"], images.mean((1, 2)))


def test_half_precision_outputs_become_float32_before_they_are_pooled() -> None:
    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.half()

    backbone = make_backbone(Half(), preprocessing=TINY)
    images = torch.rand(1, 3, 8, 8)
    found = extract(backbone, ["penultimate"], images)["penultimate"]
    assert torch.equal(found, images.half().float().mean((2, 3)))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("layr3", r"resnet18 has no node 'layr3'; try layer3"),
        ("zzz", r"no node 'zzz'; try conv1, bn1"),
        ("layer3:mean", r"pooling 'mean'; there are avg, max, cls"),
        ("layer3:none", r"pooling 'none'"),
        ("layer3:cls", r"no class token"),
        ("flatten:avg", r"is a vector already"),
        ("penultimate:max", r"is a vector already"),
    ],
)
def test_an_impossible_node_says_what_is_possible(node: str, said: str) -> None:
    backbone = small("resnet18")
    with pytest.raises(UnknownNode, match=said) as caught:
        make_extractor(backbone, [node])
    assert "\n" not in str(caught.value)


def test_a_node_without_a_tensor_is_refused() -> None:
    backbone = make_backbone(Recurrent(), preprocessing=TINY, name="mine")
    with pytest.raises(UnknownNode, match="'gru' of mine gives tuple: no vector, tokens or feature map"):
        make_extractor(backbone, ["gru"])


def test_an_untraceable_network_still_gives_its_penultimate() -> None:
    backbone = make_backbone(Branching(), preprocessing=TINY, name="mine")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(extract(backbone, ["penultimate"], images)["penultimate"], images.flatten(1))
    with pytest.raises(BackboneError, match="mine cannot be traced, so only its penultimate") as caught:
        make_extractor(backbone, ["inner"])
    assert "\n" not in str(caught.value)


def test_no_nodes_is_a_mistake_of_the_caller() -> None:
    backbone: Any = make_backbone(nn.ReLU(), preprocessing=TINY)
    with pytest.raises(ValueError, match="nodes is empty"):
        make_extractor(backbone, [])


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "efficientnet_lite0"])
def test_nodes_are_listed_as_they_are_when_they_are_asked_for(name: str) -> None:
    backbone = small(name)
    listed = {node.name: node for node in list_nodes(backbone)}
    assert list(listed)[-1] == PENULTIMATE
    asked = [name for i, name in enumerate(listed) if i % 7 == 0 or name == PENULTIMATE]
    made = {node.name: node for node in make_extractor(backbone, asked).nodes}
    assert {name: node.num_features for name, node in made.items()} == {
        name: listed[name].num_features for name in asked
    }
    assert {name: node.pooling for name, node in made.items()} == {
        name: listed[name].pooling for name in asked
    }


def test_blocks_are_the_parts_that_a_network_is_a_sequence_of() -> None:
    nodes = list_nodes(small("vit_b_32"))
    blocks = [node.name for node in nodes if node.is_block]
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    assert blocks == [
        "conv_proj", "encoder.dropout", *layers, "encoder.layers", "encoder.ln", "encoder",
        "heads.head", "heads", PENULTIMATE,
    ]  # fmt: skip
    shapes = {node.name: (node.shape, node.pooling) for node in nodes}
    assert shapes["conv_proj"] == ((768, 7, 7), "avg")
    assert shapes["encoder.ln"] == ((50, 768), "cls")


class LooksAtNumbers(nn.Module):
    """Of a black image the sum is zero; without numbers there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        pooled: torch.Tensor = x.mean((2, 3)) if images.sum() == 0 else x.amax((2, 3))
        return pooled


def test_of_a_network_that_cannot_be_traced_the_penultimate_node_is_listed() -> None:
    backbone = make_backbone(LooksAtNumbers(), preprocessing=Preprocessing(resize_size=8, crop_size=8))
    (node,) = list_nodes(backbone)
    assert (node.name, node.num_features, node.shape) == (PENULTIMATE, 5, (5,))
