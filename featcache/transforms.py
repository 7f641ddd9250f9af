"""Transforms of the user's own, by name: Python that makes the pixels of a backbone's input from an image.

A name in a file is never a reason to run code: a transform is known here once the user's own code brought it.
Knows nothing of images.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featcache.errors import BackboneError

Transform = Callable[[Any], Any]

_KNOWN: dict[str, Transform] = {}


def know_transform(transform: Transform) -> str:
    """The name of a function at the top of a module, `module:function@digits`, which stands in a spec.

    The digits are of the sha256 of the file that the function is in: an edit there makes other features.
    ValueError for a callable that is not such a function, BackboneError where the file is no longer the one
    that it was first known from: what runs would not be what is recorded.
    """
    module, function = (
        getattr(transform, "__module__", ""),
        getattr(transform, "__qualname__", "<a callable>"),
    )
    if not inspect.isfunction(transform) or "<" in function or "." in function:
        raise ValueError(
            f"a transform is a function written at the top of a module, which has a name to be found by; "
            f"{function} is none. Write `def transform(image): ...` there."
        )
    digits = hashlib.sha256(Path(inspect.getfile(transform)).read_bytes()).hexdigest()[:16]
    name = f"{module}:{function}@{digits}"
    if any(known is transform and known_as != name for known_as, known in _KNOWN.items()):
        raise BackboneError(
            f"the file of the transform {module}:{function} was changed since this process imported it. "
            "Start Python anew, so that what runs is what is recorded."
        )
    _KNOWN[name] = transform
    return name


def find_transform(name: str) -> Transform:
    """The transform of that name; ValueError unless the user's own code brought it, as it is in the name."""
    if name not in _KNOWN:
        raise ValueError(
            f"the transform {name} is not here: its code was changed, or was not named to be run"
        )
    return _KNOWN[name]


def import_transform(name: str) -> None:
    """Know this one too, which the user's own code brought to the process that names it."""
    if name not in _KNOWN:
        module, _, function = name.partition("@")[0].partition(":")
        know_transform(getattr(importlib.import_module(module), function))
