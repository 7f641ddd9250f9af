"""A backbone with other tensors than it was loaded with: those of a fine-tuned network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.backbones.backbone import STEP_COUNTER, Backbone, WeightsIdentity, freeze, weights_digest
from featcache.errors import BackboneError

if TYPE_CHECKING:
    from torch import nn


def with_tensors(backbone: Backbone, tensors: Mapping[str, NDArray[Any]], *, label: str) -> Backbone:
    """The same network, frozen, with these tensors (`network_tensors`); BackboneError where they do not fit.

    label: where they are from, in words.
    """
    import torch

    wanted = {
        name: tuple(value.shape)
        for name, value in backbone.module.state_dict().items()
        if name.rpartition(".")[2] != STEP_COUNTER
    }
    given = {name: array.shape for name, array in tensors.items() if name.rpartition(".")[2] != STEP_COUNTER}
    if differing := sorted(name for name in wanted | given if wanted.get(name) != given.get(name)):
        raise BackboneError(
            f"{label} holds tensors of another network than {backbone.name}: {', '.join(differing[:3])} "
            "missing, unexpected or of another shape. Use the library versions it was made with."
        )
    state = backbone.module.state_dict()  # with the versions of its modules, which MNASNet asks for
    state.update({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()})
    backbone.module.load_state_dict(state)
    freeze(backbone.module)
    return replace(backbone, weights=tuned_identity(backbone, label=label))


def tuned_identity(backbone: Backbone, *, label: str) -> WeightsIdentity:
    """The identity of the weights that the network has now, after training."""
    digest = weights_digest(backbone.module)
    if backbone.code_sha256:
        digest = hashlib.sha256((digest + backbone.code_sha256).encode()).hexdigest()
    return WeightsIdentity(source="tuned", label=label, sha256=digest)


def network_tensors(module: nn.Module) -> dict[str, NDArray[Any]]:
    """The state dict as arrays, in the order of the network."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}
