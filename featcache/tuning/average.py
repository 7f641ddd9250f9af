"""Averages of weights: over the steps of a run, and between where it began and what it found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from featcache.tuning.network import Weights

# Shares of the tuned weights that are tried, the start first: it wins ties.
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def update_average(average: Weights, now: Mapping[str, Tensor], *, decay: float, step: int) -> None:
    """The exponential moving average after step `step`, from 0; early on it forgets its start faster."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, tensor in average.items():
            tensor.lerp_(now[name].detach(), share)


def interpolate(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> Weights:
    """Weights on the line from `start` to `tuned` (Wortsman et al., "Robust fine-tuning of zero-shot models",
    CVPR 2022).
    """
    return {name: torch.lerp(start[name], tuned[name], alpha) for name in start}
