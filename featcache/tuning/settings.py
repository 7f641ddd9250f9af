"""What decides the result of fine-tuning, as the user may set it. Knows no torch and no files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from featcache.spec import Precision

Start = Literal["refit", "model", "random"]
BatchNorm = Literal["frozen", "trained"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Equal settings on equal data give equal weights on a CPU, whatever interrupts the run.

    start: the head to begin with: that of the model fitted again without the choice rows, so that they stay
        unseen; that of the model as it is; or random weights, to see what a fitted head is worth.
    lr, head_lr: the highest learning rates of the last block and of the head. layer_decay: what the rate is
        multiplied by from a block to the one before it. warmup: the share of the steps on which the rates
        rise from 0; after them they fall to 0 along a cosine.
    clip: the highest norm of the gradient, 0 for none. ema: the share of the old weights in their moving
        average, which is what is scored and kept; 0 for none. mixup: alpha of the Beta distribution, 0 for
        none.
    views: pictures of each image to train on, see the command. trivial_augment: change each of them in a way
        drawn anew every epoch, for which images must be decoded every epoch.
    patience: epochs that are no better on the choice rows after which training ends.
    """

    unfreeze: str = "last:4"
    start: Start = "refit"
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    head_lr: float = 1e-3
    layer_decay: float = 0.8
    warmup: float = 0.1
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    mixup: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    views: int = 1
    trivial_augment: bool = False
    batch_norm: BatchNorm = "frozen"
    precision: Precision = "float32"
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("views", 1), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a whole number from {least}, not {value!r}")
        for name, most in (("layer_decay", 1), ("warmup", 1), ("label_smoothing", 1), ("ema", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is from 0 to {most}, not {getattr(self, name)!r}")
        for name in ("lr", "head_lr", "weight_decay", "mixup", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is a number of at least 0, not {getattr(self, name)!r}")
        if self.start not in get_args(Start) or self.batch_norm not in get_args(BatchNorm):
            raise ValueError(f"start {self.start!r} or batch_norm {self.batch_norm!r} is not known")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is float32 or bfloat16, not {self.precision!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
