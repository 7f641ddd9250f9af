"""A torch.export program (.pt2) from pixels to probabilities, for Python and for torch's runtimes without it.

The archive is a zip of the graph as JSON and the weights as raw bytes; `description.json` in it says what the
model is. Takes any number of images.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.torch_version import TorchVersion

from featcache.engines.pixels import CAPTURE_ERRORS, reason
from featcache.errors import ExportError
from featcache.exporting import Opened
from featcache.exporting.modules import PixelsToAnswers, example_pixels, given_pixels, head_module
from featcache.exporting.recipes import fill_from_pixels
from featcache.exporting.subject import PIXELS, Subject

_DESCRIPTION = "description.json"
_FIRST_WITHOUT_PICKLES = "2.9"  # torch's release; those before it pickle the weights

_GIVEN = {
    "uint8": 'torch.from_numpy(prepare("image.jpg").copy())[None]',
    "float": 'torch.from_numpy(prepare("image.jpg").copy())[None].permute(0, 3, 1, 2).float() / 255',
}
_RECIPE = """
import json

import numpy as np
import torch
from PIL import Image, ImageOps

about = {"description.json": ""}
program = torch.export.load(%(name)s, extra_files=about).module()
classes = json.loads(json.loads(about["description.json"])["classes"])


%(prepare)s


with torch.inference_mode():
    probabilities = program(%(given)s)[0]
probability, label = float(probabilities.max()), classes[int(probabilities.argmax())]
"""


def encode(subject: Subject) -> bytes:
    """The program, without the images it was traced with, which torch would pickle."""
    module = PixelsToAnswers(subject, head_module(subject, wanted_by="a torch program")).eval()
    _require_raw_weights(torch.__version__)
    batch = torch.export.Dim("batch", min=1)
    about = {**subject.describe(), "input": PIXELS[subject.pixels]}
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example_pixels(subject),), dynamic_shapes=({0: batch},))
    except CAPTURE_ERRORS as error:
        raise ExportError(
            f"{subject.where} cannot become a torch program ({reason(error)}): "
            "export it --to onnx or safetensors."
        ) from error
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which names files of this machine
    archive = io.BytesIO()
    torch.export.save(program, archive, extra_files={_DESCRIPTION: json.dumps(about)})
    return archive.getvalue()


def _require_raw_weights(version: str) -> None:
    """ExportError where this version of torch would write pickles, which no file of featcache holds."""
    if TorchVersion(version) < _FIRST_WITHOUT_PICKLES:
        raise ExportError(
            f"torch {version} pickles the weights of its programs, and featcache writes no pickles: "
            f"install torch {_FIRST_WITHOUT_PICKLES} or later, or export --to onnx or safetensors."
        )


def load(path: Path, subject: Subject) -> Opened:
    """`torch.export.load`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.11 warns of how it reads its own files
        program = torch.export.load(path).module()

    def answers(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.inference_mode():
            found = program(torch.from_numpy(given_pixels(subject, pixels)))
        probabilities: NDArray[np.float64] = found.double().numpy()
        return probabilities

    return Opened(answers=answers)


def recipe(subject: Subject, name: str) -> str:
    """torch, NumPy and Pillow."""
    preprocessing = subject.model.spec.preprocessing
    return fill_from_pixels(_RECIPE, preprocessing, name=name, given=_GIVEN[subject.pixels])
