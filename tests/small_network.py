"""A backbone of one's own to be fine-tuned: five blocks at 16 px, with a batch norm and a residual branch.

FAIL_AT in the environment kills the process, as by `kill -9`, in that pass over the last block, from 1.
"""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor, nn

from featcache.backbones import Backbone, make_backbone
from featcache.spec import Preprocessing

PIXELS = Preprocessing(resize_size=16, crop_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

stem_passes: list[int] = []  # the batch sizes that the first layer has seen


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.second(self.relu(self.first(x))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(Residual(8), nn.Conv2d(8, 12, 3, stride=2, padding=1), Residual(12))
        self.last = nn.Sequential(nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.relu(self.norm(self.stem(images))))
        return self.last(x).mean((2, 3))  # (B, 16)


def die_at(network: Small) -> None:
    passes = 0

    def count(module: nn.Module, gradients: object, outputs: object) -> None:
        nonlocal passes
        passes += 1
        if passes == int(os.environ["FAIL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

    network.last[0].register_full_backward_hook(count)


def small() -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Small()
    network.stem.register_forward_pre_hook(lambda _, images: stem_passes.append(len(images[0])))
    if "FAIL_AT" in os.environ:
        die_at(network)
    return make_backbone(network, preprocessing=PIXELS, label="seed 0")
