"""Which devices there are, in torch's words."""

from __future__ import annotations

import os

import torch

from featcache.errors import DeviceError


def find_device(asked: str) -> torch.device:
    """The device in torch's words, or the best there is for "auto"; `DeviceError` where it is absent."""
    there = _devices()
    if asked == "auto":
        return _device_of_rank(there[0])
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"there is no device {asked!r}; this machine has {', '.join(there)}") from error
    if device.type not in there or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise DeviceError(f"this machine has no {asked}: pass --device auto, or one of {', '.join(there)}")
    return device


def _device_of_rank(kind: str) -> torch.device:
    """Of several CUDA devices the one that torchrun means for this process."""
    rank = os.environ.get("LOCAL_RANK", "")
    several = kind == "cuda" and torch.cuda.device_count() > 1
    if not several or not rank.isdecimal() or int(rank) >= torch.cuda.device_count():
        return torch.device(kind)
    return torch.device(kind, int(rank))


def _devices() -> tuple[str, ...]:
    """The kinds of device that can be used now, the fastest first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return tuple(kind for kind, available in there.items() if available)


def device_words(device: torch.device) -> str:
    """The device for people and for the provenance of a store."""
    if device.type != "cuda":
        return device.type
    return f"{device} ({torch.cuda.get_device_name(device)})"
