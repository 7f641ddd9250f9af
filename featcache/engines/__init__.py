"""Engines: how the forward pass is run. Pixels in, feature vectors out; knows no files and no store.

This module is the registry and imports no torch; an engine is one module with a function `make`, and a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DeviceError
from featcache.spec import PENULTIMATE, FeatureNode, Precision

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """Where an engine is, and the libraries it needs beyond featcache's own: those of its extra.

    setup_seconds, setup_seconds_a_gigabyte: about what making it takes on two processors, and more for each
    gigabyte of weights.
    """

    module: str
    setup_seconds: float = 0.0
    setup_seconds_a_gigabyte: float = 0.0
    precisions: tuple[Precision, ...] = get_args(Precision)
    needs: tuple[str, ...] = ()
    extra: str = ""


DEFAULT_ENGINE = "torch-eager"  # the one the others must agree with
AUTO = "auto"  # no engine: the fastest of them that proves itself

ENGINES = {
    DEFAULT_ENGINE: EngineRow(module="featcache.engines.torch_eager"),
    "torch-compiled": EngineRow(module="featcache.engines.torch_compiled", setup_seconds=12.0),
    "onnx": EngineRow(
        module="featcache.engines.onnx_runtime",
        setup_seconds=0.5,
        setup_seconds_a_gigabyte=6.0,  # they are written and read once more
        precisions=("float32",),
        needs=("onnx", "onnxruntime"),
        extra="featcache[onnx]",
    ),
}


class Engine(Protocol):
    """A backbone ready to run on one device. Several threads may call `embed` at once.

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

    @property
    def callers(self) -> int:
        """How many threads should call `embed` beside those that decode.

        0: it computes on the processors, one thread a call, and the threads that decode are to call it.
        """

    def allocate(self) -> NDArray[np.uint8]:
        """An array (batch_size, S, S, 3) in memory that suits the device, to be used for many batches."""

    def embed(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """{node key: (B, D)} of RGB images (B, S, S, 3), resized and cropped, 1 <= B <= batch_size."""


def require_engine(name: str) -> EngineRow:
    """The row of that name; `DeviceError` when there is none, or when a library that it needs is not here."""
    row = ENGINES.get(name)
    if row is None:
        raise DeviceError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    if missing := _missing_libraries(row):
        raise DeviceError(
            f"the engine {name} needs {' and '.join(missing)}, not installed here: pip install '{row.extra}'"
        )
    return row


def other_engines(precision: Precision = "float32") -> tuple[str, ...]:
    """Those besides the default one that compute in `precision` and whose libraries are installed here."""
    return tuple(
        name
        for name, row in ENGINES.items()
        if name != DEFAULT_ENGINE and precision in row.precisions and not _missing_libraries(row)
    )


def _missing_libraries(row: EngineRow) -> list[str]:
    return [library for library in row.needs if find_spec(library) is None]


MAX_BATCH_SIZE = 65_536


def device_kind(device: str) -> str:
    """Its kind in torch's words, from what `Engine.device` says: `cuda` of `cuda:0 (NVIDIA H100)`."""
    return device.partition(" ")[0].partition(":")[0]


def batch_sizes(name: str, device: str) -> tuple[int, ...]:
    """The batch sizes worth trying for the engine of that name, its default first.

    device: a device's kind in torch's words, "cpu" or "cuda".
    """
    sizes: dict[str, tuple[int, ...]] = importlib.import_module(require_engine(name).module).BATCH_SIZES
    return sizes.get(device, ())


def setup_seconds(name: str, *, weights_bytes: int) -> float:
    """About what making the engine of that name takes, for a network of that size."""
    row = require_engine(name)
    return row.setup_seconds + row.setup_seconds_a_gigabyte * weights_bytes / 1e9


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
    Raises `DeviceError` for an engine that cannot be had here, or a device or precision that it cannot run;
    `UnknownNode` or `BackboneError` for the nodes.
    """
    row = require_engine(engine)
    if precision not in get_args(Precision):
        raise DeviceError(f"there is no precision {precision!r}; there are {', '.join(get_args(Precision))}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is at least 1, not {batch_size}")
    module = importlib.import_module(row.module)
    made: Engine = module.make(
        backbone, nodes=nodes, device=device, precision=precision, batch_size=batch_size
    )
    return made
