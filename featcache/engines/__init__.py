"""Engines: how the forward pass is run. Pixels in, feature vectors out; knows no files and no store.

This module is the registry and imports no torch; an engine is one module with a function `make`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DeviceError
from featcache.spec import PENULTIMATE, FeatureNode, Precision

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone

DEFAULT_ENGINE = "torch-eager"

# {name: module with `make`}
ENGINES = {"torch-eager": "featcache.engines.torch_eager"}


class Engine(Protocol):
    """A backbone ready to run on one device.

    The vector of an image depends on the image alone: not on its neighbours in the batch nor its place there.
    """

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str:
        """In words, for people and for the provenance of a store."""

    @property
    def nodes(self) -> tuple[FeatureNode, ...]: ...

    @property
    def batch_size(self) -> int: ...

    def embed(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """{node key: (B, D)} of RGB images (B, S, S, 3), resized and cropped, 1 <= B <= batch_size."""


def make_engine(
    backbone: Backbone,
    *,
    nodes: Sequence[str] = (PENULTIMATE,),
    device: str = "auto",
    precision: Precision = "float32",
    batch_size: int | None = None,
    engine: str = DEFAULT_ENGINE,
) -> Engine:
    """The engine of that name, ready to run `backbone` up to `nodes`.

    device: "auto" takes CUDA, then Apple's MPS, then the CPU; otherwise a device in torch's words ("cuda:1").
    precision: the dtype of the network's arithmetic; vectors come back as float32 in any case.
    batch_size: images a forward pass; None for what suits the device.
    Raises `DeviceError` for a device this machine has not, `UnknownNode` or `BackboneError` for the nodes.
    """
    if engine not in ENGINES:
        raise DeviceError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is at least 1, not {batch_size}")
    module = importlib.import_module(ENGINES[engine])
    made: Engine = module.make(
        backbone, nodes=nodes, device=device, precision=precision, batch_size=batch_size
    )
    return made
