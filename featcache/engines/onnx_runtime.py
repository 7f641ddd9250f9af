"""The engine that hands the network to ONNX Runtime, exported in memory for batches of one shape.

The graph takes pixels as they are and normalises them itself. float32 only, on the CPU or CUDA. Does not know
whether the graph computes what the network does: `featcache.engines.agreement` looks.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as states
from torch import Tensor, nn

from featcache.backbones.backbone import Backbone, freeze
from featcache.backbones.nodes import Extractor, make_extractor
from featcache.engines.batch import checked_count, filled
from featcache.engines.devices import device_words, find_device
from featcache.errors import DeviceError
from featcache.spec import FeatureNode, Precision, Preprocessing

NAME = "onnx"

_INPUT = "pixels"
_OPSET = 17  # the first with layer normalisation as one operation
_LARGEST = 2_000_000_000  # bytes of weights; a protobuf holds 2 GiB

_BATCH_SIZE = {"cpu": 8, "cuda": 256}
_PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# Exporting runs the network's own Python and looks up each of its operations, which fails in many ways.
_EXPORT_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
    MemoryError,
)
_SESSION_ERRORS = (
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NotImplemented,
    states.RuntimeException,
    RuntimeError,
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
        self._session = session
        self._nodes = nodes
        self._size = crop_size
        self._device = device
        self._batch_size = batch_size

    @property
    def nodes(self) -> tuple[FeatureNode, ...]:
        return self._nodes

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def device(self) -> str:
        return device_words(self._device)

    def embed(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """{node key: float32 ndarray (B, D)} of uint8 pixels (B, S, S, 3), 1 <= B <= batch_size."""
        count = checked_count(pixels, size=self._size, batch_size=self._batch_size)
        images = np.ascontiguousarray(filled(pixels, batch_size=self._batch_size))
        outputs = self._session.run(None, {_INPUT: images})
        return {node.key: vectors[:count] for node, vectors in zip(self._nodes, outputs, strict=True)}


class _PixelsToVectors(nn.Module):
    """What is exported: uint8 (B, S, S, 3) to one (B, D) a node, normalised as the eager engine does it."""

    def __init__(self, extractor: Extractor, preprocessing: Preprocessing, device: torch.device) -> None:
        super().__init__()
        self.extractor = extractor
        self.mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        scaled = pixels.permute(0, 3, 1, 2).float().div(255)  # (B, 3, S, S)
        return tuple(self.extractor(scaled.sub(self.mean).div(self.std)).values())


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
    batch_size = batch_size or _BATCH_SIZE[found.type]
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
    tensors = list(chain(extractor.parameters(), extractor.buffers()))
    if sum(tensor.nbytes for tensor in tensors) > _LARGEST:
        raise DeviceError(f"{backbone.name} is too large for the engine {NAME}: pass another --engine")
    device = tensors[0].device if tensors else torch.device("cpu")
    size = backbone.preprocessing.crop_size
    pixels = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8, device=device)
    model = io.BytesIO()
    try:
        with _exporting():
            # The exporter that traces: of the two the one that needs no package but onnx, from torch 2.6 on.
            torch.onnx.export(
                _PixelsToVectors(extractor, backbone.preprocessing, device).eval(),
                (pixels,),
                model,  # type: ignore[arg-type]
                input_names=[_INPUT],
                output_names=[node.key for node in extractor.nodes],
                opset_version=_OPSET,
                dynamo=False,
            )
    except _EXPORT_ERRORS as error:
        raise _cannot_run(backbone, error) from error
    return model.getvalue()


@contextmanager
def _exporting() -> Iterator[None]:
    """Attention in single steps, for its fused form has no name in ONNX; none of the exporter's advice."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _session(model: bytes, backbone: Backbone, *, device: torch.device) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = _threads()
    # Threads that wait by spinning take the processors from the decoding threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings = {"device_id": str(device.index or 0), "use_tf32": "0"} if device.type == "cuda" else {}
    wanted = _PROVIDER[device.type]
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=[wanted], provider_options=[settings]
        )
    except _SESSION_ERRORS as error:
        raise _cannot_run(backbone, error) from error
    if session.get_providers()[0] != wanted:  # it goes on without, when the libraries of CUDA do not load
        raise DeviceError(f"ONNX Runtime cannot use {device}: pass --device cpu or another --engine")
    return session


def _threads() -> int:
    """Those of torch, which the user may have limited, but not more than the processors we may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(torch.get_num_threads(), allowed or 1)


def _cannot_run(backbone: Backbone, error: BaseException) -> DeviceError:
    lines = str(error).strip().splitlines()
    why = lines[0] if lines else type(error).__name__
    return DeviceError(f"the engine {NAME} cannot run {backbone.name} ({why}): pass another --engine")
