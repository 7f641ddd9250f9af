"""The engine whose network PyTorch's compiler has written anew: in C++ for the CPU, in Triton for CUDA.

The network is captured as one graph, with its normalisation, for batches of one shape, so that nothing is
compiled once images come, and several threads may run it at once. Does not know whether the code computes
what the network does: `featcache.engines.agreement` looks.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import compile as compile_graph

from featcache.backbones.backbone import Backbone
from featcache.backbones.nodes import Extractor, make_extractor
from featcache.engines.devices import find_device
from featcache.engines.pixels import CAPTURE_ERRORS, PixelsToVectors, reason
from featcache.engines.replicas import one_thread_of_torch, threads_of_torch_kept
from featcache.engines.torch_eager import TorchEager, keep_freed_memory
from featcache.errors import DeviceError
from featcache.spec import Precision

NAME = "torch-compiled"

# One for a kind of device, for each would be compiled to be tried. That for CUDA is a guess.
BATCH_SIZES = {"cpu": (4,), "cuda": (256,)}

# Weights become constants, so that batch norms are folded into convolutions and weights packed for them once.
# Without Triton's autotuning, which takes minutes, and without CUDA graphs, which belong to one thread.
_OPTIONS: dict[str, dict[str, Any]] = {
    # All in C++, for the calls between Python's kernels would keep other threads waiting for its lock.
    "cpu": {"freezing": True, "cpp_wrapper": True, "cpp.threads": 1},
    "cuda": {"freezing": True},
}

# The environment variable that names the compiler of C++, or the one that Triton starts its kernels with.
_COMPILER = {"cpu": ("CXX", "clang++" if sys.platform == "darwin" else "g++"), "cuda": ("CC", "gcc")}

# Compiling writes files and runs programs.
_COMPILE_ERRORS = (*CAPTURE_ERRORS, OSError, subprocess.SubprocessError)

Compiled = Callable[[Tensor], Sequence[Tensor]]


class TorchCompiled(TorchEager):
    """A compiled extractor on its device."""

    name = NAME

    def __init__(
        self,
        extractor: Extractor,
        backbone: Backbone,
        *,
        device: torch.device,
        precision: Precision,
        batch_size: int,
    ) -> None:
        super().__init__(
            extractor,
            preprocessing=backbone.preprocessing,
            device=device,
            precision=precision,
            batch_size=batch_size,
            copies=False,  # it is the compiled graph that runs
        )
        module = PixelsToVectors(extractor, backbone.preprocessing, device).eval()
        pixels = torch.from_numpy(self.allocate()).to(device)
        try:
            with _quiet(), torch.no_grad():
                with self._arithmetic():
                    self._compiled: Compiled = _compile(module, pixels)
                self._run(pixels)  # the first call of a kernel may still prepare it
        except _COMPILE_ERRORS as error:
            raise DeviceError(
                f"the engine {NAME} cannot run {backbone.name} ({reason(error)}): pass --engine torch-eager"
            ) from error

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        # The casts of autocast are in the graph already.
        with self._arithmetic(), torch.autocast(self._device.type, enabled=False):
            vectors = self._compiled(images)
        return {node.key: value for node, value in zip(self.nodes, vectors, strict=True)}


def make(
    backbone: Backbone,
    *,
    nodes: Sequence[str],
    device: str,
    precision: Precision,
    batch_size: int | None,
) -> TorchCompiled:
    """What `make_engine` calls."""
    found = find_device(device)
    _require_compiler(found.type)
    if found.type == "cpu":
        keep_freed_memory()
    return TorchCompiled(
        make_extractor(backbone, nodes),
        backbone,
        device=found,
        precision=precision,
        batch_size=batch_size or BATCH_SIZES[found.type][0],
    )


def _compile(module: PixelsToVectors, pixels: Tensor) -> Compiled:
    # Not in the temporary directory: the code would lie under a name that others may take first.
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "featcache" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    graph: Any = torch.export.export(module, (pixels,), strict=False).module()
    _lay_out_inputs_of_layers(graph)
    with threads_of_torch_kept():
        if pixels.device.type == "cpu":
            one_thread_of_torch()  # as it will be run
        compiled: Compiled = compile_graph(graph, [pixels], options=_OPTIONS[pixels.device.type])
    return compiled


def _lay_out_inputs_of_layers(graph: Any) -> None:
    """Have the input of every linear layer contiguous.

    One that is not, as in attention over (tokens, B, D), becomes a batched product with a copy of the layer's
    weights for each of the batch.
    """
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        with graph.graph.inserting_before(node):
            laid_out = graph.graph.call_function(torch.ops.aten.contiguous.default, (node.args[0],))
        node.update_arg(0, laid_out)
    graph.recompile()


def _require_compiler(device: str) -> None:
    """`DeviceError` where what compiling needs is missing, before any time is spent."""
    if device not in _OPTIONS:
        raise DeviceError(
            f"the engine {NAME} runs on {' and '.join(_OPTIONS)}, not on {device}: pass another --engine"
        )
    if device == "cuda" and find_spec("triton") is None:
        raise DeviceError(
            f"the engine {NAME} needs triton on {device}: pip install triton, or pass another --engine"
        )
    variable, default = _COMPILER[device]
    compiler = os.environ.get(variable, default).split() or [default]
    if shutil.which(compiler[0]) is None:
        raise DeviceError(
            f"the engine {NAME} needs a compiler, and there is no {compiler[0]} here: "
            f"install it, name another in {variable}, or pass another --engine"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise DeviceError(
            f"the engine {NAME} needs Python's headers, and Python.h is not here: "
            "install them (python3-dev), or pass another --engine"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """None of the compiler's advice, unless it was asked for."""
    handlers = [] if "TORCH_LOGS" in os.environ else list(logging.getLogger("torch").handlers)
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
