"""The designs of networks in torchvision, a row each: what its own lists do not say of them.

Where the classifier sits, how feature maps and tokens lie in memory, what the builder must be told, which
names published files have for tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from featcache.backbones.backbone import Layout


@dataclass(frozen=True, kw_only=True)
class Row:
    """What networks of one design have in common."""

    classifier: str  # path of the last layer, which is replaced by the identity
    num_features: Mapping[str, int]  # {name: width of the penultimate output}
    layout: Layout = "nchw"
    other_layout_nodes: tuple[str, ...] = ()
    prefix_tokens: int = 0
    build: Mapping[str, object] = field(default_factory=dict)  # arguments of torchvision's builder
    sized: bool = False  # the builder takes image_size: position embeddings have one row a patch
    training_only: tuple[str, ...] = ()  # submodules that files carry and evaluation never uses
    renames: Mapping[str, str] = field(
        default_factory=dict
    )  # {old name in published files: today's}, regexes


# Without init_weights=False both are drawn by a slow truncated normal. transform_input turns the preset's
# normalisation into the one these two were trained with: part of the network, whichever weights it carries.
_INCEPTION = {"init_weights": False, "aux_logits": False, "transform_input": True}

ROWS = (
    Row(classifier="classifier.6", num_features={"alexnet": 4096}),
    Row(
        classifier="classifier.6",
        num_features=dict.fromkeys(
            ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"), 4096
        ),
    ),
    Row(
        classifier="classifier.2",
        num_features={
            "convnext_tiny": 768,
            "convnext_small": 768,
            "convnext_base": 1024,
            "convnext_large": 1536,
        },
    ),
    Row(
        classifier="classifier",
        num_features={"densenet121": 1024, "densenet161": 2208, "densenet169": 1664, "densenet201": 1920},
        renames={r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)": r"\1\2"},
    ),
    Row(
        classifier="classifier.1",
        num_features={
            "efficientnet_b0": 1280,
            "efficientnet_b1": 1280,
            "efficientnet_b2": 1408,
            "efficientnet_b3": 1536,
            "efficientnet_b4": 1792,
            "efficientnet_b5": 2048,
            "efficientnet_b6": 2304,
            "efficientnet_b7": 2560,
            "efficientnet_v2_s": 1280,
            "efficientnet_v2_m": 1280,
            "efficientnet_v2_l": 1280,
        },
    ),
    Row(
        classifier="fc",
        num_features={"googlenet": 1024},
        build=_INCEPTION,
        training_only=("aux1", "aux2"),
    ),
    Row(
        classifier="fc",
        num_features={"inception_v3": 2048},
        build=_INCEPTION,
        training_only=("AuxLogits",),
    ),
    Row(classifier="classifier.5", num_features={"maxvit_t": 512}),
    Row(
        classifier="classifier.1",
        num_features=dict.fromkeys(("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"), 1280),
    ),
    Row(classifier="classifier.1", num_features={"mobilenet_v2": 1280}),
    Row(classifier="classifier.3", num_features={"mobilenet_v3_small": 1024, "mobilenet_v3_large": 1280}),
    Row(
        classifier="fc",
        num_features={
            "regnet_x_400mf": 400,
            "regnet_x_800mf": 672,
            "regnet_x_1_6gf": 912,
            "regnet_x_3_2gf": 1008,
            "regnet_x_8gf": 1920,
            "regnet_x_16gf": 2048,
            "regnet_x_32gf": 2520,
            "regnet_y_400mf": 440,
            "regnet_y_800mf": 784,
            "regnet_y_1_6gf": 888,
            "regnet_y_3_2gf": 1512,
            "regnet_y_8gf": 2016,
            "regnet_y_16gf": 3024,
            "regnet_y_32gf": 3712,
            "regnet_y_128gf": 7392,
        },
    ),
    Row(
        classifier="fc",
        num_features={
            "resnet18": 512,
            "resnet34": 512,
            "resnet50": 2048,
            "resnet101": 2048,
            "resnet152": 2048,
            "resnext50_32x4d": 2048,
            "resnext101_32x8d": 2048,
            "resnext101_64x4d": 2048,
            "wide_resnet50_2": 2048,
            "wide_resnet101_2": 2048,
        },
    ),
    Row(
        classifier="fc",
        num_features={
            "shufflenet_v2_x0_5": 1024,
            "shufflenet_v2_x1_0": 1024,
            "shufflenet_v2_x1_5": 1024,
            "shufflenet_v2_x2_0": 2048,
        },
    ),
    # The classifier is a convolution before the pooling; with the identity there, 512 channels are pooled.
    Row(classifier="classifier.1", num_features={"squeezenet1_0": 512, "squeezenet1_1": 512}),
    Row(
        classifier="head",
        num_features={
            "swin_t": 768,
            "swin_s": 768,
            "swin_b": 1024,
            "swin_v2_t": 768,
            "swin_v2_s": 768,
            "swin_v2_b": 1024,
        },
        layout="nhwc",
        other_layout_nodes=("features.0.0", "permute", "avgpool"),
    ),
    Row(
        classifier="heads.head",
        num_features={"vit_b_16": 768, "vit_b_32": 768, "vit_l_16": 1024, "vit_l_32": 1024, "vit_h_14": 1280},
        prefix_tokens=1,
        sized=True,
        renames={r"\.mlp\.linear_1\.": ".mlp.0.", r"\.mlp\.linear_2\.": ".mlp.3."},
    ),
)

ROW_OF = {name: row for row in ROWS for name in row.num_features}
