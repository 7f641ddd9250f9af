"""The versions a store or model records beside its numbers, read without importing the libraries."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

_RECORDED = (
    *("featcache", "torch", "torchvision", "timm", "onnx", "onnxruntime"),
    *("numpy", "pillow", "h5py", "scikit-learn"),
)
# A change of these may change what a backbone's name or seed stands for.
_DECIDING = ("featcache", "torch", "torchvision", "timm")


def installed() -> dict[str, str]:
    """{distribution: version} of the libraries that are here."""
    found = {}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def same_backbone_libraries(recorded: Mapping[str, object]) -> bool:
    """Whether the libraries that define backbones are the recorded ones."""
    now = installed()
    return all(now.get(name) == recorded.get(name) for name in _DECIDING)
