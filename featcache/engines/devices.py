"""Which devices there are, in torch's words."""

from __future__ import annotations

import os

import torch

from featcache.errors import DeviceError

# In the words of `torch.cpu.get_capabilities`; the last is ARM's.
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


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


def has_bfloat16_instructions() -> bool:
    """Whether the processors compute in bfloat16, as far as torch knows, and torch has what uses that."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return any(capabilities().get(name) for name in _BFLOAT16)
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # earlier versions, of x86 alone
    return asked is not None and bool(asked())


def device_words(device: torch.device) -> str:
    """The device for people and for the provenance of a store."""
    if device.type != "cuda":
        return device.type
    return f"{device} ({torch.cuda.get_device_name(device)})"
