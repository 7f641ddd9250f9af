"""A backbone whose process is killed, as by `kill -9`, in its n-th forward pass of several images.

n is KILL_AT in the environment; 0 never kills. KILL_WITH names another signal.
"""

from __future__ import annotations

import itertools
import os
import signal

import torch
from torch import nn

from featcache.backbones import Backbone, make_backbone
from featcache.spec import Preprocessing

_passes = itertools.count(1)  # of all copies of the network, from whatever thread


class Killed(nn.Module):
    """A small convolution, so that features depend on every pixel in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A pass of one image is a probe, of the output's width or of a copy.
        if len(x) > 1 and next(_passes) == int(os.environ.get("KILL_AT", "0")):
            os.kill(os.getpid(), getattr(signal, os.environ.get("KILL_WITH", "SIGKILL")))
        return self.stem(x).relu().mean((2, 3))  # (B, 8)


def backbone() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Killed()
    return make_backbone(module, preprocessing=Preprocessing(resize_size=20, crop_size=16))
