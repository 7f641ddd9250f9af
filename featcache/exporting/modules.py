"""Heads as modules of torch: feature vectors (B, D) in, probabilities (B, K) out, for graphs that hold both.

Knows the formulas of the heads; each is proven against the head itself by whoever exports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featcache.engines.pixels import PixelsToVectors
from featcache.errors import ExportError
from featcache.exporting.subject import Subject


class SoftmaxHead(nn.Module):
    """softmax(X @ W.T + b)."""

    def __init__(self, weight: Any, bias: Any) -> None:
        super().__init__()
        self.linear = linear_layer(weight, bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return torch.softmax(self.linear(vectors), dim=1)


class VotingHead(nn.Module):
    """The votes of `featcache.heads.neighbors.NeighborsHead`, in float32."""

    vectors: Tensor
    labels: Tensor

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.k = min(head.k, len(head.vectors_))
        self.n_classes = len(head.classes_)
        self.T, self.temperature = float(head.T), float(head.temperature)
        self.register_buffer("vectors", torch.from_numpy(np.asarray(head.vectors_, dtype=np.float32)))
        self.register_buffer("labels", torch.from_numpy(np.asarray(head.labels_, dtype=np.int64)))

    def forward(self, vectors: Tensor) -> Tensor:
        norms = vectors.square().sum(1, keepdim=True).sqrt()
        unit = vectors / torch.where(norms > 0, norms, torch.ones_like(norms))
        top, nearest = (unit @ self.vectors.T).topk(self.k, dim=1)  # (B, k)
        weights = torch.softmax(top / self.T, dim=1)
        votes = weights.new_zeros(weights.shape[0], self.n_classes)
        votes = votes.scatter_add(1, self.labels[nearest], weights)
        probabilities = (self.k * votes + 1 / self.n_classes) / (self.k + 1)
        return torch.softmax(probabilities.log() / self.temperature, dim=1)


class HiddenLayerHead(nn.Module):
    """The network of `featcache.heads.mlp.MLPHead`: a linear layer, ReLU, and another."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.hidden = linear_layer(head.hidden_, head.hidden_bias_)
        self.output = linear_layer(head.output_ / head.temperature, head.output_bias_ / head.temperature)

    def forward(self, vectors: Tensor) -> Tensor:
        return torch.softmax(self.output(self.hidden(vectors).relu()), dim=1)


class PixelsToAnswers(nn.Module):
    """Pixels, as `Subject.pixels` says, to what `head` makes of their feature vectors."""

    def __init__(self, subject: Subject, head: nn.Module) -> None:
        super().__init__()
        preprocessing = subject.backbone.preprocessing
        self.network = PixelsToVectors(subject.extractor, preprocessing, torch.device("cpu"))
        self.head = head
        self.takes_float = subject.pixels == "float"
        self.rounds = subject.rounds

    def forward(self, pixels: Tensor) -> Tensor:
        vectors = self.network.of_unit(pixels) if self.takes_float else self.network(pixels)
        features = torch.cat(vectors, dim=1)  # (B, D)
        if self.rounds:
            features = features.half().float()
        answers: Tensor = self.head(features)
        return answers


def linear_layer(weight: Any, bias: Any) -> nn.Linear:
    """The layer of torch with these weights (K, D) and biases (K,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.asarray(weight)))
        layer.bias.copy_(torch.from_numpy(np.asarray(bias)))
    return layer


def _linear(head: Any) -> nn.Module:
    return SoftmaxHead(*head.as_linear())


# By the name of the head; linear ones are known by what they can do.
_MODULES: dict[str, Callable[[Any], nn.Module]] = {"knn": VotingHead, "mlp": HiddenLayerHead}


def head_module(subject: Subject, *, wanted_by: str) -> nn.Module:
    """The head of the model, frozen; ExportError for one that torch does not compute."""
    head, name = subject.model.head, subject.model.head_name
    make = _linear if hasattr(head, "as_linear") else _MODULES.get(name)
    if make is None:
        raise ExportError(
            f"{subject.where} has a {name} head, which {wanted_by} cannot hold: export it --to onnx."
        )
    return make(head).eval().requires_grad_(False)


def example_pixels(subject: Subject) -> Tensor:
    """Two black images, as the graph takes them."""
    size = subject.crop_size
    if subject.pixels == "float":
        return torch.zeros(2, 3, size, size)
    return torch.zeros(2, size, size, 3, dtype=torch.uint8)


def given_pixels(subject: Subject, pixels: Any) -> Any:
    """uint8 ndarray (B, S, S, 3) as the graph takes it."""
    if subject.pixels == "uint8":
        return np.ascontiguousarray(pixels)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
