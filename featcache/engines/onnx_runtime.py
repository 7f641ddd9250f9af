"""The engine that hands the network to ONNX Runtime, exported in memory for batches of one shape.

The graph takes pixels as they are and normalises them itself. float32 only, on the CPU or CUDA. Several
threads may run the session at once; on the CPU each computes alone on its processor. Does not know whether
the graph computes what the network does: `featcache.engines.agreement` looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as states

from featcache.backbones.backbone import Backbone, freeze
from featcache.backbones.nodes import Extractor, make_extractor
from featcache.engines.batch import checked_count, filled
from featcache.engines.devices import device_words, find_device
from featcache.engines.onnx_graph import export_graph, fits_graph
from featcache.engines.pixels import CAPTURE_ERRORS, PixelsToVectors, reason
from featcache.engines.replicas import is_known
from featcache.errors import DeviceError
from featcache.spec import FeatureNode, Precision

NAME = "onnx"

_INPUT = "pixels"

# The first is the default. Alone, batches of 1 are as fast as of 2; in a run, where a thread decodes between
# them, they were slower by up to 5 %.
BATCH_SIZES = {"cpu": (2, 4, 8), "cuda": (256, 64)}
CALLERS = {"cpu": 0, "cuda": 2}
_PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

SESSION_ERRORS = (
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NotImplemented,
    states.RuntimeException,
    RuntimeError,
    MemoryError,
)


class OnnxRuntime:
    """An exported extractor in its session. Batches have one shape: a short one is filled up."""

    name = NAME

    def __init__(
        self,
        session: Any,
        *,
        nodes: tuple[FeatureNode, ...],
        crop_size: int,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.nodes = nodes
        self.batch_size = batch_size
        self.device = device_words(device)
        self.callers = CALLERS[device.type]
        self._session = session
        self._size = crop_size

    def allocate(self) -> NDArray[np.uint8]:
        """Zeros (batch_size, S, S, 3)."""
        return np.zeros((self.batch_size, self._size, self._size, 3), dtype=np.uint8)

    def embed(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """{node key: float32 ndarray (B, D)} of uint8 pixels (B, S, S, 3), 1 <= B <= batch_size."""
        count = checked_count(pixels, size=self._size, batch_size=self.batch_size)
        images = np.ascontiguousarray(filled(pixels, batch_size=self.batch_size))
        try:
            outputs = self._session.run(None, {_INPUT: images})
        except SESSION_ERRORS as error:
            raise DeviceError(
                f"the engine {NAME} failed on {self.device} in a batch of {self.batch_size} images "
                f"({reason(error)}): pass a smaller --batch-size, or another --engine"
            ) from error
        return {node.key: vectors[:count] for node, vectors in zip(self.nodes, outputs, strict=True)}


def make(
    backbone: Backbone,
    *,
    nodes: Sequence[str],
    device: str,
    precision: Precision,
    batch_size: int | None,
) -> OnnxRuntime:
    """What `make_engine` calls."""
    if precision != "float32":
        raise DeviceError(f"the engine {NAME} computes in float32, not in {precision}: pass another --engine")
    found = find_device(device)
    _require_provider(found)
    extractor = make_extractor(backbone, nodes)
    batch_size = batch_size or BATCH_SIZES[found.type][0]
    model = _export(extractor, backbone, batch_size=batch_size)
    return OnnxRuntime(
        _session(model, backbone, device=found),
        nodes=extractor.nodes,
        crop_size=backbone.preprocessing.crop_size,
        device=found,
        batch_size=batch_size,
    )


def _require_provider(device: torch.device) -> None:
    there = onnxruntime.get_available_providers()
    if _PROVIDER.get(device.type) not in there:
        offered = [kind for kind, provider in _PROVIDER.items() if provider in there]
        raise DeviceError(
            f"the ONNX Runtime installed here runs on {' and '.join(offered)}, not on {device.type}: "
            "pass another --device or another --engine"
        )


def _export(extractor: Extractor, backbone: Backbone, *, batch_size: int) -> bytes:
    """The extractor as an ONNX model; `DeviceError` when it cannot be one."""
    freeze(extractor)
    if not fits_graph(extractor):
        raise DeviceError(f"{backbone.name} is too large for the engine {NAME}: pass another --engine")
    tensor = next(chain(extractor.parameters(), extractor.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    size = backbone.preprocessing.crop_size
    try:
        return export_graph(
            PixelsToVectors(extractor, backbone.preprocessing, device).eval(),
            torch.zeros(batch_size, size, size, 3, dtype=torch.uint8, device=device),
            input_name=_INPUT,
            output_names=[node.key for node in extractor.nodes],
            trusted=is_known(backbone.module),
        )
    except CAPTURE_ERRORS as error:
        raise _cannot_run(backbone, error) from error


def _session(model: bytes, backbone: Backbone, *, device: torch.device) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = 1  # other calls work beside it
    settings = {"device_id": str(device.index or 0), "use_tf32": "0"} if device.type == "cuda" else {}
    wanted = _PROVIDER[device.type]
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=[wanted], provider_options=[settings]
        )
    except SESSION_ERRORS as error:
        raise _cannot_run(backbone, error) from error
    if session.get_providers()[0] != wanted:  # it goes on without, when the libraries of CUDA do not load
        raise DeviceError(f"ONNX Runtime cannot use {device}: pass --device cpu or another --engine")
    return session


def _cannot_run(backbone: Backbone, error: BaseException) -> DeviceError:
    return DeviceError(
        f"the engine {NAME} cannot run {backbone.name} ({reason(error)}): pass another --engine"
    )
