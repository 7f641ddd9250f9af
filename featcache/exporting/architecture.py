"""How the network of a backbone is built without featcache, whole, with a last layer for the model's classes.

A family of networks that others can build is a row of `_FAMILIES`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, nn

from featcache.backbones import Backbone, bundled, torchvision
from featcache.errors import ExportError
from featcache.exporting.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The call that builds a network with random weights, as Python for people and as a function.

    classifier: the path of its last layer.
    """

    imports: str
    call: str
    build: Callable[[], nn.Module]
    classifier: str


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """A layer of a network that is replaced, as Python for people and as a module."""

    path: str
    code: str
    layer: nn.Module


def find_architecture(backbone: Backbone) -> Architecture | None:
    """How others build this network; None where only its owner can."""
    if backbone.classifier is None:
        return None
    for owns, describe in _FAMILIES:
        if owns(backbone.name):
            return describe(backbone, backbone.classifier)
    return None


def require_architecture(subject: Subject) -> Architecture:
    """`find_architecture`, or ExportError where only its owner can build the network."""
    found = find_architecture(subject.backbone)
    if found is None:
        raise ExportError(
            f"{subject.where} is of {subject.backbone.name}, which is no network of torchvision or timm: "
            "export it --to onnx, torch or safetensors."
        )
    return found


def _of_torchvision(backbone: Backbone, classifier: str) -> Architecture:
    size = backbone.preprocessing.crop_size
    arguments = {"weights": None, **torchvision.builder_arguments(backbone.name, image_size=size)}
    said = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return Architecture(
        imports="from torchvision import models",
        call=f'models.get_model("{backbone.name}", {said})',
        build=lambda: torchvision.build(backbone.name, image_size=size),
        classifier=classifier,
    )


def _of_timm(backbone: Backbone, classifier: str) -> Architecture:
    return Architecture(
        imports="import timm",
        call=f'timm.create_model("{bundled.ROWS[backbone.name].timm_name}", pretrained=False)',
        build=lambda: bundled.build(backbone.name),
        classifier=classifier,
    )


_FAMILIES: tuple[tuple[Callable[[str], bool], Callable[[Backbone, str], Architecture]], ...] = (
    (bundled.owns, _of_timm),
    (torchvision.owns, _of_torchvision),
)


def last_layers(whole: nn.Module, path: str, *, num_features: int, num_classes: int) -> list[Replacement]:
    """What takes the place of the classifier at `path`: a linear layer, or a convolution where it was one.

    What follows a convolution must be linear as well, so that pooling its scores is scoring pooled features.
    """
    if not isinstance(whole.get_submodule(path), nn.Conv2d):
        layer = nn.Linear(num_features, num_classes)
        return [Replacement(path=path, code=f"nn.Linear({num_features}, {num_classes})", layer=layer)]
    parent, _, own = path.rpartition(".")
    convolution = nn.Conv2d(num_features, num_classes, kernel_size=1)
    code = f"nn.Conv2d({num_features}, {num_classes}, kernel_size=1)"
    children = list(whole.get_submodule(parent).named_children())
    after = children[[name for name, _ in children].index(own) + 1 :]
    return [
        Replacement(path=path, code=code, layer=convolution),
        *(
            Replacement(path=f"{parent}.{name}".lstrip("."), code="nn.Identity()", layer=nn.Identity())
            for name, _ in takewhile(lambda child: isinstance(child[1], nn.ReLU), after)
        ),
    ]


def with_layers(whole: nn.Module, replacements: list[Replacement]) -> nn.Module:
    """The same network with these layers."""
    for replacement in replacements:
        whole.set_submodule(replacement.path, replacement.layer)
    return whole


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of just these, and of the versions of the modules, which safetensors lack."""
    state = OrderedDict(tensors)
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]  # where torch keeps them
    module.load_state_dict(state)


def loading_code(module: nn.Module, *, name: str, tensors: str) -> str:
    """Python that puts the tensors of the expression `tensors` into the network called `name`."""
    if type(module)._load_from_state_dict is nn.Module._load_from_state_dict:
        return f"{name}.load_state_dict({tensors})"
    # Such a network, MNASNet of torchvision's, asks which version of it the tensors are of.
    return f"state = {name}.state_dict()\nstate.update({tensors})\n{name}.load_state_dict(state)"


def licence_named(backbone: str, label: str) -> str | None:
    """Where torchvision says the licence of these weights of its network is; None where it says nothing."""
    if not torchvision.owns(backbone):
        return None
    return next((one.licence for one in torchvision.published(backbone) if one.label == label), None)


def attribute(path: str) -> str:
    """A path of torch as Python after the name of the network: `.heads.head`, `.classifier[6]`."""
    return re.sub(r"\.(\d+)", r"[\1]", f".{path}")
