"""A network as an ONNX graph, made in memory from the trace of one run. Knows no session and no file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

OPSET = 17  # the first with layer normalisation as one operation

_LARGEST = 2_000_000_000  # bytes of weights; a protobuf holds 2 GiB


def fits_graph(module: nn.Module) -> bool:
    """Whether the weights are few enough for one ONNX model."""
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers())) <= _LARGEST


def export_graph(
    module: nn.Module,
    example: Tensor,
    *,
    input_name: str,
    output_names: Sequence[str],
    trusted: bool,
    any_batch: bool = False,
) -> bytes:
    """The frozen `module` as an ONNX model that takes what is shaped like `example`.

    any_batch: the first axis of the input and of all outputs may be of any length. trusted: nothing in the
    module decides by what is in the images.
    Raises one of `CAPTURE_ERRORS` when it cannot be one.
    """
    model = io.BytesIO()
    names = (input_name, *output_names)
    with _exporting() as advice:
        # The exporter that traces: of the two the one that needs no package but onnx, from torch 2.6 on.
        torch.onnx.export(
            module,
            (example,),
            model,  # type: ignore[arg-type]
            input_names=[input_name],
            output_names=list(output_names),
            opset_version=OPSET,
            dynamic_axes={name: {0: "batch"} for name in names} if any_batch else None,
            dynamo=False,
        )
    if not trusted:
        _require_one_way(advice)
    return model.getvalue()


def _require_one_way(advice: Sequence[warnings.WarningMessage]) -> None:
    """ValueError where the trace may follow what the images happened to be, and not their shapes alone."""
    for given in advice:
        if str(given.message).startswith("Converting a tensor to a Python"):
            raise ValueError("its Python may decide by what is in the images, which a graph cannot")


@contextmanager
def _exporting() -> Iterator[Sequence[warnings.WarningMessage]]:
    """Attention in single steps, for its fused form has no name in ONNX; the advice is kept back."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(record=True) as advice, torch.no_grad():
            warnings.simplefilter("always")
            yield advice
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
