"""What a backbone is: a frozen network without its classifier, and the identity of its weights.

Knows nothing of where networks come from; the families do. Imports torch only when a backbone is made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from featcache.errors import BackboneError
from featcache.spec import Pooling, Preprocessing
from featcache.transforms import Transform, know_transform

if TYPE_CHECKING:
    from torch import nn

Layout = Literal["nchw", "nhwc"]
WeightsSource = Literal["torchvision", "bundled", "file", "random", "user", "tuned"]

# Counts training steps; evaluation never reads it, and some checkpoints lack it.
STEP_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class WeightsIdentity:
    """Which weights a backbone carries.

    `sha256` is over the tensors of the network without its classifier, so the same weights in another file
    format have the same digest; `file_sha256` is over the bytes of the file at `path`, where there is one.
    """

    source: WeightsSource
    label: str  # "IMAGENET1K_V1", "seed 0", or the name of the file
    sha256: str
    path: str | None = None
    file_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What symbolic tracing must step over, because its Python depends on the values of tensors."""

    leaf_modules: tuple[type[nn.Module], ...] = ()
    leaf_functions: tuple[object, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A frozen network without its classifier: images (B, 3, crop, crop) in, features out.

    `layout` says where feature maps keep their channels, except for those of `other_layout_nodes`.
    `prefix_tokens` counts the tokens before the patches in (B, tokens, D) outputs, the first being the class
    token; with any, tokens are pooled by taking the class token, without, by averaging.
    `classifier` is the path of the layer that was taken out, None where that is not known; `code_sha256` is
    of the file that defines a network of the user's own.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights: WeightsIdentity
    layout: Layout = "nchw"
    other_layout_nodes: tuple[str, ...] = ()
    prefix_tokens: int = 0
    trace: TraceOptions = TraceOptions()
    classifier: str | None = None
    code_sha256: str = ""

    @property
    def token_pooling(self) -> Pooling:
        """How (B, tokens, D) outputs become vectors unless a node says otherwise."""
        return "cls" if self.prefix_tokens else "avg"

    def layout_of(self, node: str) -> Layout:
        """Where the feature map at `node` keeps its channels."""
        if node not in self.other_layout_nodes:
            return self.layout
        return "nchw" if self.layout == "nhwc" else "nhwc"


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """A row of the list of backbones: what is known without building the network."""

    name: str
    family: str
    num_features: int | None  # of the penultimate output; None for a network newer than our table
    num_params: int  # of the whole pretrained network
    weights: str  # where they come from, in words
    available: bool  # the pretrained weights are on this machine


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """Pretrained weights that a backbone can be had with, known without building the network."""

    label: str  # what follows NAME@; "" where there is one set of weights only
    default: bool
    source: str  # where the file comes from: a URL, or a pip package in words
    file: str  # its name
    folder: str | None  # where it is looked for; None where that is a package's own affair
    megabytes: float | None
    top1: float | None  # accuracy on ImageNet as published, a fraction
    licence: str | None  # as its publisher says; None where that says nothing
    available: bool  # it is on this machine


def weights_digest(module: nn.Module) -> str:
    """sha256 over (key, dtype, shape, raw bytes) of every tensor, by name, step counters aside."""
    import torch

    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        if key.rpartition(".")[2] == STEP_COUNTER:
            continue
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def freeze(module: nn.Module) -> nn.Module:
    """The same module in evaluation mode, with no parameter that asks for a gradient."""
    return module.eval().requires_grad_(False)


def without_module(module: nn.Module, path: str) -> nn.Module:
    """The same module with the submodule at `path` replaced by the identity."""
    from torch import nn

    module.set_submodule(path, nn.Identity())
    return module


def make_backbone(
    module: nn.Module,
    *,
    preprocessing: Preprocessing,
    name: str | None = None,
    label: str = "",
    layout: Layout = "nchw",
    prefix_tokens: int = 0,
    transform: Transform | None = None,
) -> Backbone:
    """A backbone from a network of your own, which must have lost its classifier already.

    The network is frozen and its weights are digested. `label` says in words which weights they are.
    transform: a function of your own at the top of a module, from an upright RGB `PIL.Image` to its pixels,
        uint8 of shape (crop_size, crop_size, 3), as an array or another `PIL.Image`, instead of resizing and
        cropping; mean and std of `preprocessing` are applied afterwards.
    """
    from torch import nn

    if not isinstance(module, nn.Module):
        raise BackboneError(f"a backbone is made from a torch.nn.Module, not from {type(module).__name__}")
    freeze(module)
    name = name or type(module).__name__
    if transform is not None:
        preprocessing = replace(preprocessing, transform=know_transform(transform))
    identity = WeightsIdentity(source="user", label=label or name, sha256=weights_digest(module))
    return Backbone(
        name=name,
        module=module,
        preprocessing=preprocessing,
        weights=identity,
        layout=layout,
        prefix_tokens=prefix_tokens,
    )
