"""What a network gives for rows it is not trained on, and how good that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
    """How good weights are on rows they were not trained on. hits: which are right, where that is kept."""

    accuracy: float
    nll: float
    hits: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, scores: NDArray[np.float64], y: NDArray[np.int64]) -> Score:
        """Of scores (n, n_classes) and labels; a class that is not known, -1, counts as an error."""
        nll = -log_softmax(scores, axis=1)[np.arange(len(y)), y]
        known = y >= 0
        hits = (scores.argmax(axis=1) == y) & known
        losses = np.where(known, nll, -math.log(1e-15))
        return cls(accuracy=float(hits.mean()), nll=float(losses.mean()), hits=hits)

    def beats(self, other: Score | None) -> bool:
        """By accuracy, and where that is the same by log-loss; what is not finite beats nothing."""
        return bool(self.lead_over(other))

    def lead_over(self, other: Score | None) -> str:
        """By what it beats the other, in words; "" where it does not."""
        if not math.isfinite(self.nll):
            return ""
        if other is None:
            return "the first"
        if self.accuracy != other.accuracy:
            return "by accuracy" if self.accuracy > other.accuracy else ""
        return "by log-loss at the same accuracy" if self.nll < other.nll else ""

    def clearly_beats(self, other: Score) -> bool:
        """By more rows than one standard error of their difference; both are of the same rows.

        Of rows on which two models differ, each is a coin toss where neither is better (McNemar,
        Psychometrika 1947).
        """
        if self.hits is None or other.hits is None:
            raise ValueError("scores without their rows cannot be compared row by row")
        difference = self.hits.astype(np.int64) - other.hits
        return float(difference.sum()) > math.sqrt(np.abs(difference).sum())


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
