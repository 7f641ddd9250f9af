"""Formats: a fitted model, or the features of a store, in a file that others read without featcache.

This module is the registry and imports no torch. A format of models is one module with the functions of
`ModelFormat` and a row here; that of stores is `featcache.exporting.features`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from featcache.errors import ExportError
from featcache.images.paths import show_path

if TYPE_CHECKING:
    from featcache.exporting.subject import Subject

EXTRA = "featcache[export]"

Answers = Callable[[NDArray[np.uint8]], NDArray[Any]]  # of pixels (B, S, S, 3)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An exported file, opened by the tools of those who will read it.

    answers: its probabilities (B, K). vectors: the features (B, D) in it, where its head is one that makes
    a step of a rounding error.
    """

    answers: Answers
    vectors: Answers | None = None


class ModelFormat(Protocol):
    """What a module of this folder offers to be a format of models."""

    def encode(self, subject: Subject) -> bytes:
        """The file. ExportError: the format cannot hold this model."""

    def load(self, path: Path, subject: Subject) -> Opened:
        """The file at `path`."""

    def recipe(self, subject: Subject, name: str) -> str:
        """Python that reads the file of that name and sets `label` and `probability` for image.jpg."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the registry: how the files end, the first ending being the default, and what they need.

    chooses_input: the file begins with pixels, and `--input` says which. rounds: it keeps the rounding of a
    float16 store. needs: libraries beyond featcache's own, by ending where they are for one ending alone.
    """

    name: str
    summary: str
    suffixes: tuple[str, ...]
    holds: Literal["model", "features"] = "model"
    chooses_input: bool = False
    rounds: bool = False
    needs: Mapping[str, tuple[str, ...]] | None = None

    def load(self) -> ModelFormat:
        """Its module, imported now."""
        return cast(ModelFormat, importlib.import_module(f"featcache.exporting.{self.name}"))


FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format(
            name="torchvision",
            summary="a state dict for the network of torchvision or timm with a new last layer",
            suffixes=(".safetensors",),
        ),
        Format(
            name="onnx",
            summary="one graph from pixels to probabilities",
            suffixes=(".onnx",),
            chooses_input=True,
            rounds=True,
            needs={".onnx": ("onnx", "onnxruntime")},
        ),
        Format(
            name="torch",
            summary="a torch.export program from pixels to probabilities",
            suffixes=(".pt2",),
            chooses_input=True,
            rounds=True,
        ),
        Format(
            name="safetensors",
            summary="the weights of backbone and head with a description in JSON",
            suffixes=(".safetensors",),
        ),
        Format(
            name="features",
            summary="the vectors, labels and ids of a store",
            suffixes=(".npz", ".parquet"),
            holds="features",
            needs={".parquet": ("pyarrow",)},
        ),
    )
}


def find_format(name: str) -> Format:
    """The row of that name; ExportError naming the nearest for an unknown one."""
    if name in FORMATS:
        return FORMATS[name]
    nearest = difflib.get_close_matches(name, FORMATS, n=1)
    meant = f" Did you mean {nearest[0]}?" if nearest else ""
    raise ExportError(f"there is no format {name!r}.{meant} Formats: {', '.join(FORMATS)}.")


def choose_output(row: Format, source: Path, output: Path | None) -> Path:
    """Where the file goes, by default the name of `source` with the ending of the format.

    ExportError: another ending than the format has, or the file that is exported.
    """
    if not source.name:
        raise ExportError(f"{show_path(source)} is no file: name a model, or a store.")
    path = output or source.with_suffix(row.suffixes[0])
    if path.suffix not in row.suffixes:
        raise ExportError(
            f"{show_path(path)} does not end as {row.name} files do: "
            f"choose an --output that ends with {' or '.join(row.suffixes)}."
        )
    if path.exists() and source.exists() and path.samefile(source):
        raise ExportError(f"{show_path(path)} is what is to be exported: choose another --output.")
    return path


def require_libraries(row: Format, suffix: str) -> None:
    """ExportError when a library that files of this ending need is not here."""
    missing = [name for name in (row.needs or {}).get(suffix, ()) if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{suffix} files need {' and '.join(missing)}, not installed here: pip install '{EXTRA}'"
        )
