"""What a network gives for rows it is not trained on, and how good that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import nn

from featcache.tuning.network import TunedNetwork
from featcache.tuning.ranks import Ranks
from featcache.tuning.sources import Batch, Source

_ROWS = 256  # in one pass


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good weights are on rows they were not trained on."""

    accuracy: float
    nll: float

    @classmethod
    def of(cls, scores: NDArray[np.float64], y: NDArray[np.int64]) -> Score:
        """Of scores (n, n_classes) and labels; a class that is not known, -1, counts as an error."""
        nll = -log_softmax(scores, axis=1)[np.arange(len(y)), y]
        known = y >= 0
        hits = (scores.argmax(axis=1) == y) & known
        return cls(accuracy=float(hits.mean()), nll=float(np.where(known, nll, -math.log(1e-15)).mean()))

    def beats(self, other: Score | None) -> bool:
        """By accuracy, and where that is the same by log-loss; what is not finite beats nothing."""
        if not math.isfinite(self.nll):
            return False
        return other is None or (self.accuracy, -self.nll) > (other.accuracy, -other.nll)


@dataclass(frozen=True, eq=False)
class Computing:
    """Passes over the plain pictures of rows, each computed by one of the ranks."""

    source: Source
    ranks: Ranks

    def scores(self, network: TunedNetwork, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scores (n, n_classes) of these rows; the network is left in evaluation mode."""
        network.training_mode(False)
        return self.over(rows, network, width=network.head.out_features)

    def over(self, rows: NDArray[np.int64], module: nn.Module, *, width: int) -> NDArray[np.float64]:
        """(n, width): what `module` gives for the activations of these rows."""
        own = np.arange(len(rows))[self.ranks.rank :: self.ranks.count]
        places = [own[start : start + _ROWS] for start in range(0, len(own), _ROWS)]
        found = torch.zeros(len(rows), width, device=self.ranks.device)
        with torch.inference_mode():
            stream = self.source.stream([Batch(rows[place]) for place in places])
            for place, activations in zip(places, stream, strict=True):
                found[torch.from_numpy(place)] = module(activations).float()
            values: NDArray[np.float64] = self.ranks.add_up(found).cpu().numpy().astype(np.float64)
        return values
