"""The head to begin with: a fitted linear head as a torch layer whose softmax is the head's probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featcache.errors import HeadError, ModelError
from featcache.heads import build_head
from featcache.heads.base import LinearHead
from featcache.model import Model

# The score of a class that a head does not know, where the others' scores have the mean 0: its probability is
# below 5e-5, and a few steps can raise it.
UNKNOWN_SCORE = -10.0


def linear_head(model: Model, *, where: str) -> LinearHead:
    """The model's head; ModelError where it is not linear, so that no layer can be made of it."""
    head = model.head
    if not isinstance(head, LinearHead):
        raise ModelError(
            f"{where} has the head {model.head_name}, and fine-tuning begins with a linear one: fit a "
            "linear head first: featcache fit STORE --head logistic -o OTHER.model, and fine-tune that."
        )
    return head


def refit_head(model: Model, X: NDArray[np.float32], y: NDArray[np.int64], *, where: str) -> LinearHead:
    """A head of the model's kind and parameters fitted on X (n_samples, n_features) and y (n_samples,)."""
    try:
        head = build_head(model.head_name, model.params, seed=0).fit(X, y)
    except ValueError as error:
        raise HeadError(
            f"the {model.head_name} head of {where} cannot be fitted again without the choice rows: "
            f"{' '.join(str(error).split())}. Begin with it as it is: --start model."
        ) from error
    if not isinstance(head, LinearHead):
        raise ModelError(f"{where} has the head {model.head_name}, which is not linear.")
    return head


def make_layer(
    weights: NDArray[np.float64], bias: NDArray[np.float64], *, columns: Sequence[int], n_classes: int
) -> nn.Linear:
    """A layer of `n_classes` outputs from `LinearHead.as_linear`, which has folded in all there is to fold.

    columns: of the head's classes; the others are all but impossible.
    """
    layer = _empty_layer(weights.shape[1], n_classes)
    # The mean over the classes changes no probability, and without it scores have a scale of their own.
    whole_w = np.zeros((n_classes, weights.shape[1]))
    whole_b = np.full(n_classes, UNKNOWN_SCORE)
    whole_w[list(columns)] = weights - weights.mean(axis=0)
    whole_b[list(columns)] = bias - bias.mean()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(whole_w))
        layer.bias.copy_(torch.from_numpy(whole_b))
    return layer


def random_layer(num_features: int, n_classes: int, *, seed: int) -> nn.Linear:
    """A layer as torch initialises one, drawn by a generator of its own."""
    layer = _empty_layer(num_features, n_classes)
    generator = torch.Generator().manual_seed(seed)
    bound = num_features**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def _empty_layer(num_features: int, n_classes: int) -> nn.Linear:
    """Without storage first, since the constructor fills it from the global generator."""
    return nn.Linear(num_features, n_classes, device="meta").to_empty(device="cpu")
