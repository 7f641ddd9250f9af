"""A network with its normalisation inside, for engines that hand the whole to a compiler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featcache.backbones.nodes import Extractor
from featcache.spec import Preprocessing

# Capturing a graph runs the network's own Python and looks up each operation, which fails in many ways.
CAPTURE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
    MemoryError,
)


class PixelsToVectors(nn.Module):
    """uint8 (B, S, S, 3) to one (B, D) a node, normalised as the eager engine does it."""

    def __init__(self, extractor: Extractor, preprocessing: Preprocessing, device: torch.device) -> None:
        super().__init__()
        self.extractor = extractor
        self.mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.of_unit(pixels.permute(0, 3, 1, 2).float().div(255))

    def of_unit(self, scaled: Tensor) -> tuple[Tensor, ...]:
        """The same of (B, 3, S, S) between 0 and 1."""
        return tuple(self.extractor(scaled.sub(self.mean).div(self.std)).values())


def reason(error: BaseException) -> str:
    """The first line of what a compiler says, for people."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
