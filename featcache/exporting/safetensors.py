"""The tensors of network and head in one safetensors file, with a description in its metadata.

    network.NAME      the state dict of the network without its last layer
    head.weight (K, D), head.bias (K,)    of linear heads: probabilities are softmax(X @ weight.T + bias)
    head.NAME         the arrays of other heads, by their names in a model file

`head` in the metadata is JSON: its name, parameters and formula.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.special import softmax
from torch import Tensor

from featcache.backbones.nodes import make_extractor
from featcache.engines.pixels import PixelsToVectors
from featcache.errors import ExportError
from featcache.exporting import Opened
from featcache.exporting.architecture import attribute, find_architecture, load_tensors, loading_code
from featcache.exporting.recipes import OPEN_IMAGE, READ_CLASSES, TRANSFORM, fill, python_text
from featcache.exporting.subject import Subject
from featcache.exporting.tensors import encode_tensors
from featcache.heads import find_head

_NETWORK, _HEAD = "network.", "head."
_LINEAR = "softmax(features @ weight.T + bias)"

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

tensors = load_file(%(name)s)
%(build)s
prefix = "network."
own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
%(loading)s
network.eval()
%(read_classes)s
%(transform)s


%(open_image)s


with torch.inference_mode():
    features = network(transform(open_image("image.jpg"))[None])
    logits = features @ tensors["head.weight"].T + tensors["head.bias"]
probabilities = logits[0].softmax(0)
probability, label = float(probabilities.max()), classes[int(probabilities.argmax())]
"""


def encode(subject: Subject) -> bytes:
    """The file. Trees and other estimators of scikit-learn are no tensors."""
    arrays, about = _head(subject)
    tensors: dict[str, Tensor] = {
        # Copies, for a network of the user's own may use one tensor twice, which safetensors refuses.
        _NETWORK + name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in subject.backbone.module.state_dict().items()
    }
    tensors |= {_HEAD + name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}
    return encode_tensors(tensors, {**subject.describe(), "head": json.dumps(about)})


def load(path: Path, subject: Subject) -> Opened:
    """A copy of the network with every tensor from the file, and the head from its arrays."""
    tensors = load_file(path)
    blank = copy.deepcopy(subject.backbone.module)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    load_tensors(blank, _part(tensors, _NETWORK))
    backbone = replace(subject.backbone, module=blank)
    extractor = make_extractor(backbone, [node.key for node in subject.model.nodes])
    network = PixelsToVectors(extractor, subject.model.spec.preprocessing, torch.device("cpu")).eval()
    head = {name: tensor.numpy() for name, tensor in _part(tensors, _HEAD).items()}

    def answers(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.inference_mode():
            vectors = network(torch.from_numpy(np.ascontiguousarray(pixels)))
        return _probabilities(subject, head, torch.cat(vectors, dim=1).numpy())

    return Opened(answers=answers)


def recipe(subject: Subject, name: str) -> str:
    """torchvision's or timm's own code for linear heads on penultimate features; else what is in the file."""
    architecture = find_architecture(subject.backbone)
    if architecture is None or not subject.is_whole_network or not hasattr(subject.model.head, "as_linear"):
        return _listing(name)
    code = _RECIPE % {
        "imports": architecture.imports,
        "build": f"network = {architecture.call}\n"
        f"network{attribute(architecture.classifier)} = nn.Identity()",
        "name": python_text(name),
        "loading": loading_code(subject.backbone.module, name="network", tensors="own"),
        "read_classes": READ_CLASSES % {"name": python_text(name)},
        "open_image": OPEN_IMAGE,
        "transform": fill(TRANSFORM, subject.model.spec.preprocessing),
    }
    return code.strip()


def _listing(name: str) -> str:
    return f"""from safetensors import safe_open

with safe_open({python_text(name)}, framework="np") as file:
    print(file.metadata())
    for key in file.keys():
        print(key, file.get_slice(key).get_shape())"""


def _head(subject: Subject) -> tuple[Mapping[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of the head and what is said of it."""
    model, head = subject.model, subject.model.head
    if hasattr(head, "as_linear"):
        weight, bias = head.as_linear()
        about = {"name": model.head_name, "formula": _LINEAR}
        return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}, about
    if "skops" in model.arrays:
        raise ExportError(
            f"{subject.where} has a {model.head_name} head, which is not made of tensors: "
            "export it --to onnx."
        )
    return model.arrays, {"name": model.head_name, "params": dict(model.params), "rest": dict(model.rest)}


def _probabilities(
    subject: Subject, head: Mapping[str, NDArray[Any]], features: NDArray[np.float32]
) -> NDArray[np.float64]:
    """What the head's arrays from the file make of features (B, D)."""
    if "weight" in head:
        found: NDArray[np.float64] = softmax(features @ head["weight"].T + head["bias"], axis=1)
        return found
    model = subject.model
    rebuilt = find_head(model.head_name).load().from_arrays(head, model.rest, params=model.params)
    return rebuilt.predict_proba(features)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
