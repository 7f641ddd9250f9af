"""Weight files: found, identified by their bytes, read without running code, and fitted onto a network.

Knows no family of networks. Finding and hashing a file needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.backbones.backbone import STEP_COUNTER, WeightsIdentity, WeightsSource, weights_digest
from featcache.disk import open_regular
from featcache.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor, nn

RANDOM = "random"
# By what the provenance says of where the weights are from; a licence is only named where it is known.
LICENCES: Mapping[str, str] = {
    "bundled": "Apache-2.0, as the pip package they come in says",
    "torchvision": "torchvision names the data and the recipe of each set of weights in its documentation "
    "(https://pytorch.org/vision/stable/models.html); read that and the terms of ImageNet before you ship",
    "file": "not recorded: ask whoever made the file",
    "random": "none: they were drawn at random",
    "user": "yours: they came with your own code",
    "tuned": "that of the weights the first fine-tuning began with, which this model does not name",
}
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PARALLEL_PREFIX = "module."

# What torch.load and safetensors raise on damaged or foreign bytes depends on where reading stumbles.
_READ_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
)


def hub_checkpoints() -> Path:
    """The folder in which torch.hub keeps downloaded weights, found as torch.hub finds it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints"


def require_file(weights: str) -> Path:
    """The path of a weights file named by the user; `BackboneError` when there is none."""
    try:
        path = Path(weights).expanduser()
        open_regular(path).close()
    except (OSError, RuntimeError, ValueError) as error:  # of a home that is nobody's; of a zero byte
        reason = getattr(error, "strerror", error)
        raise BackboneError(
            f"there is no weights file {weights} ({reason}): give the path of a .safetensors, "
            f".pth or .pt file, or {RANDOM!r}; a pretrained variant is part of the name, as in "
            "resnet50@IMAGENET1K_V1"
        ) from error
    return path


def file_sha256(path: Path) -> str:
    """sha256 of the bytes of a file, 64 hexadecimal digits."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BackboneError(
            f"the weights file {path} cannot be read: {error.strerror}. "
            "Mend that and run the same command again."
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file, by name, in the file's order.

    A checkpoint's wrapper ("state_dict") and the prefix of a parallel model ("module.") are taken off.
    Never unpickles code. `BackboneError` when the file is damaged or something else than tensors by name.
    """
    readers = {".safetensors": _read_safetensors, ".pth": _read_pickled_tensors, ".pt": _read_pickled_tensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BackboneError(f"{path} is no weights file by its name: expected {', '.join(readers)}")
    return _tensors_by_name(reader(path), path=path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, *_READ_ERRORS) as error:
        raise BackboneError(f"{path} is not a complete safetensors file: {_first_line(error)}") from error


def _read_pickled_tensors(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's guesses at odd files; ours is one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"{path} holds more than tensors, or is damaged; code in a weights file is never run. "
            "Save the state_dict alone, best as .safetensors"
        ) from error
    except _READ_ERRORS as error:
        raise BackboneError(f"{path} is not a complete PyTorch weights file: {_first_line(error)}") from error


def _tensors_by_name(loaded: Any, *, path: Path) -> dict[str, Tensor]:
    import torch

    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise BackboneError(f"{path} holds {type(loaded).__name__}, not tensors by name")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise BackboneError(
                f"{path} holds {type(value).__name__} under {key!r}, where a tensor was expected"
            )
    if all(key.startswith(_PARALLEL_PREFIX) for key in loaded):
        return {key.removeprefix(_PARALLEL_PREFIX): value for key, value in loaded.items()}
    return dict(loaded)


def fit_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], *, ignored: Sequence[str], path: Path
) -> None:
    """Copy `tensors` into a network without its classifier; every name and shape must agree.

    `ignored` holds the paths of submodules the network no longer has: the classifier, training-only branches.
    """
    dropped = tuple(f"{name}." for name in ignored)
    wanted = module.state_dict()
    given = {key: value for key, value in tensors.items() if not key.startswith(dropped)}
    missing = [key for key in wanted if key not in given and key.rpartition(".")[2] != STEP_COUNTER]
    unexpected = [key for key in given if key not in wanted]
    misshaped = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    problems = [
        f"{title} {_first_few(keys)}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if keys
    ]
    if problems:
        raise BackboneError(f"{path} does not fit this backbone: {'; '.join(problems)}")
    wanted.update(given)  # keeps the versions of modules that a state dict carries and MNASNet asks for
    module.load_state_dict(wanted)


def seeded(build: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """What `build` returns under a fixed seed; the caller's random numbers go on undisturbed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the accelerators.
        torch.default_generator.manual_seed(seed)
        return build()


def identify_file(module: nn.Module, path: Path, *, source: WeightsSource, label: str) -> WeightsIdentity:
    """The identity of weights that came from a file."""
    return WeightsIdentity(
        source=source,
        label=label,
        sha256=weights_digest(module),
        path=str(path),
        file_sha256=file_sha256(path),
    )


def identify_random(module: nn.Module, *, seed: int) -> WeightsIdentity:
    """The identity of weights drawn with `seed`."""
    return WeightsIdentity(source="random", label=f"seed {seed}", sha256=weights_digest(module))


def _first_few(names: Sequence[str], *, limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
