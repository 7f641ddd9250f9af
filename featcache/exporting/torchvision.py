"""A state dict for the whole network with a new last layer, which plain torchvision or timm loads.

    model = models.get_model("resnet18", weights=None)
    model.fc = nn.Linear(512, 10)
    model.load_state_dict(load_file("FILE"))

Its outputs are the logits whose softmax is the model's probabilities, temperature included. What only
training uses, the auxiliary classifiers of GoogLeNet and Inception, is not part of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.functional import normalize

from featcache.errors import ExportError
from featcache.exporting import Opened
from featcache.exporting.architecture import (
    Architecture,
    Replacement,
    attribute,
    last_layers,
    load_tensors,
    loading_code,
    require_architecture,
    with_layers,
)
from featcache.exporting.recipes import OPEN_IMAGE, READ_CLASSES, TRANSFORM, fill, python_text
from featcache.exporting.subject import Subject
from featcache.exporting.tensors import encode_tensors

_RECIPE = """
import json

import torch
%(imports)s
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

model = %(call)s
%(replacements)s
%(loading)s
model.eval()
%(read_classes)s
%(transform)s


%(open_image)s


with torch.inference_mode():
    probabilities = model(transform(open_image("image.jpg"))[None])[0].softmax(0)
probability, label = float(probabilities.max()), classes[int(probabilities.argmax())]
"""


def encode(subject: Subject) -> bytes:
    """The state dict as safetensors, the description in its metadata."""
    architecture = require_architecture(subject)
    weight, bias = subject.linear(wanted_by="a state dict")
    if not subject.is_whole_network:
        nodes = ", ".join(node.key for node in subject.model.nodes)
        raise ExportError(
            f"{subject.where} is fitted on {nodes}, which is not where the last layer sits: "
            "export it --to onnx, torch or safetensors, or fit it on penultimate."
        )
    model, layers = _whole(subject, architecture)
    names = [f"{layers[0].path}.{name}" for name in ("weight", "bias")]
    last = {
        name: torch.from_numpy(np.asarray(array)) for name, array in zip(names, (weight, bias), strict=True)
    }
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    last = {name: array.view(shapes[name]) for name, array in last.items()}
    load_tensors(model, {**subject.backbone.module.state_dict(), **last})
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return encode_tensors(tensors, subject.describe())


def load(path: Path, subject: Subject) -> Opened:
    """The network built anew, with every tensor from the file."""
    model, _ = _whole(subject, require_architecture(subject))
    load_tensors(model, load_file(path))
    model.eval()
    preprocessing = subject.model.spec.preprocessing

    def answers(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div(255)
        with torch.inference_mode():
            logits = model(normalize(images, list(preprocessing.mean), list(preprocessing.std)))
            found: NDArray[np.float64] = logits.softmax(1).double().numpy()
        return found

    return Opened(answers=answers)


def recipe(subject: Subject, name: str) -> str:
    """Torchvision's or timm's own code."""
    architecture = require_architecture(subject)
    whole, layers = _whole(subject, architecture)
    lines = [f"model{attribute(layer.path)} = {layer.code}" for layer in layers]
    code = _RECIPE % {
        "imports": architecture.imports,
        "call": architecture.call,
        "replacements": "\n".join(lines),
        "loading": loading_code(whole, name="model", tensors=f"load_file({python_text(name)})"),
        "read_classes": READ_CLASSES % {"name": python_text(name)},
        "open_image": OPEN_IMAGE,
        "transform": fill(TRANSFORM, subject.model.spec.preprocessing),
    }
    return code.strip()


def _whole(subject: Subject, architecture: Architecture) -> tuple[nn.Module, list[Replacement]]:
    """The whole network with random weights and its new last layers."""
    with torch.random.fork_rng(devices=[]):
        whole = architecture.build()
        layers = last_layers(
            whole,
            architecture.classifier,
            num_features=subject.model.num_features,
            num_classes=len(subject.model.classes),
        )
    return with_layers(whole, layers), layers
