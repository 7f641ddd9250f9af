"""A linear layer trained by minibatches of AdamW; torch is imported when it is fitted, not before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.heads.base import LinearHead, require_count, require_positive
from featcache.heads.standardize import Standardizer

STEP_ROWS = 256


class MinibatchHead(LinearHead):
    """torch.nn.Linear on standardised features, cross-entropy, AdamW with a cosine schedule.

    The weights start at zero and the rows are drawn by a generator of its own, so that the seed decides
    everything and the global generators of torch and numpy are not touched. A step is taken for every 256
    rows, whatever `batch_size`: larger steps are gathered from several batches, so that the batch size
    decides memory and not the result, and the learning rate needs no scaling with it.

    Parameters
    ----------
    weight_decay : decoupled decay of the weights; the bias has none.
    lr : peak learning rate.
    epochs : passes over the training rows.
    batch_size : rows of one forward pass, at most the 256 of a step.
    seed : of the order of the rows.
    """

    def __init__(
        self,
        weight_decay: float = 0.1,
        *,
        lr: float = 1e-3,
        epochs: int = 30,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.weight_decay = weight_decay
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.seed = seed

    def _fit(self, X: NDArray[Any], codes: NDArray[np.intp]) -> None:
        self._check_params()
        standardizer = Standardizer.of(X)
        rows = np.concatenate([chunk.astype(np.float32) for chunk in standardizer.chunks(X)])
        weights, bias = self._train(rows, codes)
        self.coef_, self.intercept_ = standardizer.fold(weights, bias)

    def _check_params(self) -> None:
        require_positive("weight_decay", self.weight_decay, zero=True)
        require_positive("lr", self.lr)
        require_count("epochs", self.epochs)
        require_count("batch_size", self.batch_size)
        require_count("seed", self.seed, least=0)

    def _train(
        self, rows: NDArray[np.float32], codes: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        import torch

        Z, targets = torch.from_numpy(rows), torch.from_numpy(codes.astype(np.int64))
        # Built without storage, since the constructor fills it from the global generator.
        layer = torch.nn.Linear(Z.shape[1], len(self.classes_), device="meta").to_empty(device="cpu")
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        groups = [
            {"params": [layer.weight], "weight_decay": self.weight_decay},
            {"params": [layer.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        steps = self.epochs * -(-len(Z) // STEP_ROWS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(Z), generator=generator)
            for rows_of_step in torch.split(order, STEP_ROWS):
                optimizer.zero_grad()
                for index in torch.split(rows_of_step, self.batch_size):
                    loss = torch.nn.functional.cross_entropy(layer(Z[index]), targets[index], reduction="sum")
                    torch.autograd.backward(loss / len(rows_of_step))
                optimizer.step()
                schedule.step()
        weight, bias = layer.weight.detach(), layer.bias.detach()
        return weight.numpy().astype(np.float64), bias.numpy().astype(np.float64)
