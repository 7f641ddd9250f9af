"""A linear layer trained by minibatches of AdamW; torch is imported when it is fitted, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.base import LinearHead
from featcache.heads.standardize import Standardizer
from featcache.heads.trained import TrainedHead

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MinibatchHead(TrainedHead, LinearHead):
    """scores = z W^T + b on standardised features z, trained as `TrainedHead` says.

    W starts at zero and b at the logarithm of the classes' frequencies.

    Parameters
    ----------
    weight_decay : decoupled decay of the weights; the bias has none.
    lr : peak learning rate.
    epochs : passes over the training rows.
    batch_size : rows of one forward pass, at most the 256 of a step.
    label_smoothing : share of the target spread evenly over all classes.
    mixup : alpha of the Beta distribution that rows and targets are mixed by; 0 mixes none.
    class_weight : "balanced" gives every class the same weight, None every row; or a weight for each class.
    seed : of the order of the rows and what else is drawn.
    device : cpu, cuda, or auto, which takes a CUDA device where torch has one.
    temperature : what the scores are divided by before the softmax that makes them probabilities.
    """

    def __init__(
        self,
        weight_decay: float = 0.1,
        *,
        lr: float = 1e-3,
        epochs: int = 30,
        batch_size: int = 256,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        class_weight: str | Mapping[Any, float] | None = None,
        seed: int = 0,
        device: str = "auto",
        temperature: float = 1.0,
    ) -> None:
        self.weight_decay = weight_decay
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.class_weight = class_weight
        self.seed = seed
        self.device = device
        self.temperature = temperature

    def _network(self) -> _OneLayer:
        return _OneLayer()

    def _take(self, tensors: Sequence[NDArray[np.float64]], standardizer: Standardizer) -> None:
        weights, bias = tensors
        self.coef_, self.intercept_ = standardizer.fold(weights, bias)


class _OneLayer:
    """`Network`: F by C linear layers."""

    noise_width = 0

    def size(self, n_features: int, n_classes: int) -> int:
        return (n_features + 1) * n_classes

    def start(self, n_features: int, n_classes: int, generator: torch.Generator) -> list[Tensor]:
        import torch

        return [torch.zeros(n_classes, n_features), torch.zeros(n_classes)]

    def scores(self, weights: Sequence[Tensor], Z: Tensor, noise: Tensor | None) -> Tensor:
        W, b = weights  # (F, C, K, D), (F, C, K)
        return (W.flatten(1, 2) @ Z.mT).view(*b.shape, -1) + b.unsqueeze(3)
