"""One ONNX graph from pixels to probabilities: normalisation, network, nodes, head and temperature in it.

Takes any number of images. What the head knows is in the graph; class names and preprocessing are in its
metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from torch import nn

from featcache.engines.onnx_graph import export_graph, fits_graph
from featcache.engines.onnx_runtime import SESSION_ERRORS
from featcache.engines.pixels import CAPTURE_ERRORS, reason
from featcache.engines.replicas import is_known
from featcache.errors import ExportError
from featcache.exporting import Answers, Opened
from featcache.exporting.estimators import FEATURES, append_estimator, has_estimator, require_convertible
from featcache.exporting.modules import PixelsToAnswers, example_pixels, given_pixels, head_module
from featcache.exporting.recipes import fill_from_pixels
from featcache.exporting.subject import PIXELS, Subject

INPUT, OUTPUT = "pixels", "probabilities"

_GIVEN = {
    "uint8": 'prepare("image.jpg")[None]',
    "float": '(prepare("image.jpg").transpose(2, 0, 1)[None] / 255).astype(np.float32)',
}
_RECIPE = """
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(%(name)s, providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])


%(prepare)s


pixels = %(given)s
(probabilities,) = session.run(["probabilities"], {"pixels": pixels})
probability, label = float(probabilities[0].max()), classes[int(probabilities[0].argmax())]
"""


def encode(subject: Subject) -> bytes:
    """The graph, found sound by onnx's checker."""
    if has_estimator(subject):
        require_convertible(subject)
        graph = append_estimator(_graph(subject, nn.Identity(), output=FEATURES), subject, output=OUTPUT)
    else:
        graph = _graph(subject, head_module(subject, wanted_by="an ONNX graph"), output=OUTPUT)
    about = {**subject.describe(), "input": f"{INPUT}: {PIXELS[subject.pixels]}"}
    onnx.helper.set_model_props(graph, about)
    onnx.checker.check_model(graph)
    encoded: bytes = graph.SerializeToString()
    return encoded


def load(path: Path, subject: Subject) -> Opened:
    """ONNX Runtime's session on the CPU."""
    answers = _run(path, subject, output=OUTPUT)
    if not has_estimator(subject):
        return Opened(answers=answers)
    graph = onnx.load_model(path)
    shape: list[str | int | None] = ["batch", subject.model.num_features]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, shape))
    return Opened(answers=answers, vectors=_run(graph.SerializeToString(), subject, output=FEATURES))


def _run(model: Path | bytes, subject: Subject, *, output: str) -> Answers:
    with _session_errors(subject):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def answers(pixels: NDArray[np.uint8]) -> NDArray[Any]:
        with _session_errors(subject):
            (found,) = session.run([output], {INPUT: given_pixels(subject, pixels)})
        return np.asarray(found)

    return answers


@contextmanager
def _session_errors(subject: Subject) -> Iterator[None]:
    try:
        yield
    except SESSION_ERRORS as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run {subject.where} ({reason(error)}): "
            "upgrade onnxruntime, or export --to torch or safetensors."
        ) from error


def recipe(subject: Subject, name: str) -> str:
    """ONNX Runtime, NumPy and Pillow."""
    preprocessing = subject.model.spec.preprocessing
    return fill_from_pixels(_RECIPE, preprocessing, name=name, given=_GIVEN[subject.pixels])


def _graph(subject: Subject, head: nn.Module, *, output: str) -> Any:
    """Pixels to what `head` makes of the features, as an onnx.ModelProto."""
    module = PixelsToAnswers(subject, head).eval()
    if not fits_graph(module):
        raise ExportError(
            f"{subject.where} is larger than the 2 GB of an ONNX file: export it --to torch or safetensors."
        )
    try:
        data = export_graph(
            module,
            example_pixels(subject),
            input_name=INPUT,
            output_names=[output],
            trusted=is_known(subject.backbone.module),
            any_batch=True,
        )
    except CAPTURE_ERRORS as error:
        raise ExportError(
            f"{subject.where} cannot become an ONNX graph ({reason(error)}): "
            "export it --to torch or safetensors."
        ) from error
    return onnx.load_model_from_string(data)
