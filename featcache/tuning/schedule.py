"""Learning rates: by the depth of a block, and by the step. Numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from featcache.tuning.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear rise from 0 over the first steps, then half a cosine down to 0.

    Large first steps would spoil what the head was fitted to (Kumar et al., "Fine-tuning can distort
    pretrained features and underperform out-of-distribution", ICLR 2022).
    """

    steps: int
    warmup: int

    @classmethod
    def of(cls, settings: Settings, *, steps_an_epoch: int) -> Schedule:
        steps = settings.epochs * steps_an_epoch
        return cls(steps=steps, warmup=min(steps - 1, round(settings.warmup * steps)))

    def factor(self, step: int) -> float:
        """What the highest rates are multiplied by in step `step`, from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


def block_lr(settings: Settings, blocks_after: int) -> float:
    """The highest learning rate of a block with so many blocks between it and the head."""
    return settings.lr * settings.layer_decay**blocks_after
