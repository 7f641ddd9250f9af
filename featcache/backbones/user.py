"""A network of the user's own, named "module:function". Only ever runs code that the user named."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from featcache.backbones.backbone import Backbone, BackboneInfo, PublishedWeights
from featcache.errors import BackboneError, UnknownBackbone

TITLE = "user"

_CODE: dict[object, str] = {}  # {function: sha256 of its file when it was first called}


def names() -> tuple[str, ...]:
    """None: only the user knows them."""
    return ()


def owns(name: str) -> bool:
    """Whether the name is written module:function."""
    return ":" in name


def load(name: str, *, weights: str | None, seed: int) -> Backbone:
    """What the user's function returns, under the name it was asked for by."""
    if weights is not None:
        raise BackboneError(f"{name} brings its own weights: load them in your function, without --weights")
    with _current_directory_importable():
        function = _find_function(name)
        source = _source(function)
        _require_unchanged(function, source, name=name)
        backbone = function()
    if not isinstance(backbone, Backbone):
        raise BackboneError(
            f"{name} returned {type(backbone).__name__}, where a Backbone was expected: "
            "return make_backbone(module, preprocessing=...)"
        )
    # Weights alone do not say what a network of the user's own computes; the file that defines it does.
    both = hashlib.sha256(backbone.weights.sha256.encode() + source).hexdigest() if source else ""
    identity = replace(backbone.weights, sha256=both or backbone.weights.sha256)
    code = hashlib.sha256(source).hexdigest() if source else ""
    return replace(backbone, name=name, weights=identity, code_sha256=code)


def infos() -> tuple[BackboneInfo, ...]:
    """None: only the user knows them."""
    return ()


def published(name: str) -> tuple[PublishedWeights, ...]:
    """None: what the function loads is its own affair."""
    return ()


def locate(name: str, *, file_name: str | None) -> Path | None:
    """None: what the function reads is its own affair."""
    return None


def _find_function(name: str) -> Callable[[], object]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UnknownBackbone(f"{name!r} is no backbone of your own: write module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BackboneError(f"{name}: cannot import {module_name} from {os.getcwd()}: {error}") from error
    function: Callable[[], object] | None = getattr(module, function_name, None)
    if not callable(function):
        offered = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise BackboneError(
            f"{name}: {module_name} has no function {function_name!r}; it has {', '.join(offered) or 'none'}"
        )
    return function


def _source(function: Callable[[], object]) -> bytes:
    """The file that defines the function; nothing where there is none."""
    try:
        return Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError):
        return b""


def _require_unchanged(function: Callable[[], object], source: bytes, *, name: str) -> None:
    """Refuse code that was edited since this process imported it: what runs would not be what is recorded."""
    code = hashlib.sha256(source).hexdigest()
    if source and _CODE.setdefault(function, code) != code:
        raise BackboneError(
            f"the file of {name} was changed since this process imported it. Start Python anew, so that what "
            "runs is what is recorded."
        )


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
