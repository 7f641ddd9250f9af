"""The network that is trained: a tail of the backbone and the head on it. Knows no data and no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featcache.backbones.cut import Tail
from featcache.tuning.schedule import block_lr
from featcache.tuning.settings import Settings

Weights = dict[str, Tensor]


class TunedNetwork(nn.Module):
    """Activations at the cut, (B, values), to scores of the classes, (B, n_classes).

    All modules stay in evaluation mode, so that batch-norm statistics are frozen and nothing is dropped; with
    `batch_norm` "trained" the statistics of the tail move.
    """

    def __init__(self, tail: Tail, head: nn.Linear, settings: Settings) -> None:
        super().__init__()
        self.tail, self.head = tail, head
        self._moving = [
            module
            for module in tail.modules()
            if settings.batch_norm == "trained" and isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self.requires_grad_(True)
        self.training_mode(False)

    @property
    def moving(self) -> list[Tensor]:
        """The statistics of batch norms that move."""
        return [
            buffer for module in self._moving for buffer in module.buffers() if buffer.is_floating_point()
        ]

    def forward(self, activations: Tensor) -> Tensor:
        scores: Tensor = self.head(self.tail(activations))
        return scores

    def training_mode(self, training: bool) -> None:
        self.eval()
        for module in self._moving:
            module.train(training)

    def groups(self, settings: Settings) -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer: rates by depth, no decay of norms and biases."""
        by_kind: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.tail.parameters():
            rate = block_lr(settings, self.tail.depth.get(id(parameter), 0))
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            by_kind.setdefault((rate, decay), []).append(parameter)
        groups = [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in by_kind.items()
        ]
        return [
            *groups,
            {"params": [self.head.weight], "lr": settings.head_lr, "weight_decay": settings.weight_decay},
            {"params": [self.head.bias], "lr": settings.head_lr, "weight_decay": 0.0},
        ]

    def weights(self) -> Weights:
        """What training changes, by name: the tensors themselves."""
        return dict(self._changing())

    def copy_weights(self) -> Weights:
        return {name: tensor.detach().clone() for name, tensor in self._changing()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._changing():
                tensor.copy_(weights[name])

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        moving = {id(buffer) for buffer in self.moving}
        for name, buffer in self.named_buffers():
            if id(buffer) in moving:
                yield name, buffer
