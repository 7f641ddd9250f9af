"""A network of one hidden layer, trained by minibatches of AdamW and predicting without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.heads.base import CHUNK_VALUES, require_count
from featcache.heads.standardize import Standardizer
from featcache.heads.trained import TrainedHead, require_share

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MLPHead(TrainedHead):
    """scores = relu(z W1^T + b1) W2^T + b2 on standardised features z, trained as `TrainedHead` says.

    W1 starts as He et al., "Delving deep into rectifiers", ICCV 2015, have it, and W2 at zero, so that the
    first probabilities are the frequencies of the classes.

    Parameters
    ----------
    weight_decay : decoupled decay of the weights; the biases have none.
    lr : peak learning rate.
    width : hidden units.
    dropout : share of hidden units left out of a row's training step.
    epochs : passes over the training rows.
    batch_size : rows of one forward pass, at most the 256 of a step.
    label_smoothing : share of the target spread evenly over all classes.
    mixup : alpha of the Beta distribution that rows and targets are mixed by; 0 mixes none.
    class_weight : "balanced" gives every class the same weight, None every row; or a weight for each class.
    seed : of the first weights, the order of the rows and what else is drawn.
    device : cpu, cuda, or auto, which takes a CUDA device where torch has one.
    temperature : what the scores are divided by before the softmax that makes them probabilities.

    Attributes: hidden_ (width, n_features), hidden_bias_ (width,), output_ (n_classes, width) and
    output_bias_ (n_classes,), float64, on raw features.
    """

    hidden_: NDArray[np.float64]
    hidden_bias_: NDArray[np.float64]
    output_: NDArray[np.float64]
    output_bias_: NDArray[np.float64]

    def __init__(
        self,
        weight_decay: float = 1.0,
        *,
        lr: float = 1e-3,
        width: int = 256,
        dropout: float = 0.5,
        epochs: int = 20,
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
        self.width = width
        self.dropout = dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.class_weight = class_weight
        self.seed = seed
        self.device = device
        self.temperature = temperature

    def column_scores(self, X: NDArray[Any]) -> NDArray[np.float64]:
        scores = np.empty((len(X), len(self.output_)))
        step = max(CHUNK_VALUES // max(*self.hidden_.shape, 1), 1)
        for start in range(0, len(X), step):
            hidden = X[start : start + step].astype(np.float64) @ self.hidden_.T  # (B, H)
            hidden += self.hidden_bias_
            np.maximum(hidden, 0.0, out=hidden)
            scores[start : start + step] = hidden @ self.output_.T + self.output_bias_
        return scores

    def shift_scores(self, offsets: NDArray[np.float64]) -> None:
        self.output_bias_ = self.output_bias_ + offsets * self.temperature

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        return {
            "hidden": self.hidden_,
            "hidden_bias": self.hidden_bias_,
            "output": self.output_,
            "output_bias": self.output_bias_,
        }, {}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], rest: Mapping[str, Any], *, params: Mapping[str, Any]
    ) -> Self:
        head = cls(**params)
        head.hidden_, head.hidden_bias_ = arrays["hidden"], arrays["hidden_bias"]
        head.output_, head.output_bias_ = arrays["output"], arrays["output_bias"]
        head._restore(n_classes=head.output_.shape[0], n_features=head.hidden_.shape[1])
        return head

    def _check_params(self) -> None:
        super()._check_params()
        require_count("width", self.width)
        require_share("dropout", self.dropout)

    def _network(self) -> _OneHidden:
        return _OneHidden(width=int(self.width), dropout=float(self.dropout))

    def _take(self, tensors: Sequence[NDArray[np.float64]], standardizer: Standardizer) -> None:
        hidden, hidden_bias, self.output_, self.output_bias_ = tensors
        self.hidden_, self.hidden_bias_ = standardizer.fold(hidden, hidden_bias)


@dataclass(frozen=True, kw_only=True)
class _OneHidden:
    """`Network`: F by C networks of one hidden layer."""

    width: int
    dropout: float

    @property
    def noise_width(self) -> int:
        return self.width if self.dropout else 0

    def size(self, n_features: int, n_classes: int) -> int:
        return (n_features + 1) * self.width + (self.width + 1) * n_classes

    def start(self, n_features: int, n_classes: int, generator: torch.Generator) -> list[Tensor]:
        import torch

        hidden = torch.randn(self.width, n_features, generator=generator) * math.sqrt(2 / n_features)
        output = torch.zeros(n_classes, self.width)
        return [hidden, torch.zeros(self.width), output, torch.zeros(n_classes)]

    def scores(self, weights: Sequence[Tensor], Z: Tensor, noise: Tensor | None) -> Tensor:
        W1, b1, W2, b2 = weights  # (F, C, H, D), (F, C, H), (F, C, K, H), (F, C, K)
        hidden = (W1.flatten(1, 2) @ Z.mT).view(*b1.shape, -1)  # (F, C, H, B)
        hidden = (hidden + b1.unsqueeze(3)).relu()
        if noise is not None:
            hidden = hidden * ((noise >= self.dropout).to(hidden) / (1 - self.dropout))
        return W2 @ hidden + b2.unsqueeze(3)
