"""The state of a run on disk, so that a run that was killed goes on to the same weights.

One safetensors file, replaced in one step: the tensors, and as JSON in its header what the run is of and how
far it came. No state of a generator is kept: every draw follows from the seed, the epoch and the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from featcache.disk import disk_errors, open_regular, write_atomically
from featcache.errors import ModelError
from featcache.images.paths import show_path
from featcache.model import content_digest
from featcache.spec import show_value

if TYPE_CHECKING:
    from featcache.tuning.settings import Settings

KIND = "featcache-checkpoint"
FORMAT = 1  # of what `Trainer` keeps in it; another is the checkpoint of another run
_BEGIN = "Begin again with --restart."


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """arrays: by name. progress: how far the run is, JSON-able."""

    arrays: Mapping[str, NDArray[Any]]
    progress: Mapping[str, Any]

    def save(self, path: Path, *, run: Mapping[str, Any]) -> None:
        """run: what the run is of; one of another cannot go on from here. DiskError."""
        text = json.dumps({"run": dict(run), "progress": dict(self.progress)}, sort_keys=True)
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        metadata = {"encoding-type": KIND, "about": text, "digest": content_digest(text, arrays)}
        write_atomically(path, save(arrays, metadata))

    @classmethod
    def load(cls, path: Path, *, run: Mapping[str, Any]) -> Checkpoint | None:
        """None where there is none. ModelError: damaged, or of a run that differs from `run`."""
        try:
            with open_regular(path) as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ModelError(f"{show_path(path)} cannot be read: {error.strerror}. {_BEGIN}") from error
        try:
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            about, arrays = json.loads(metadata["about"]), load(data)
            sound = metadata["digest"] == content_digest(metadata["about"], arrays)
            recorded, progress = dict(about["run"]), dict(about["progress"])
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ModelError(f"{show_path(path)} is no checkpoint, or damaged. {_BEGIN}") from error
        if not sound:
            raise ModelError(f"{show_path(path)} is damaged. {_BEGIN}")
        require_same_run(path, recorded, run, names={*recorded, *run})
        return cls(arrays=arrays, progress=progress)

    @staticmethod
    def recorded_run(path: Path) -> Mapping[str, Any]:
        """What the run of the checkpoint at `path` is of; empty where that cannot be told."""
        try:
            with open_regular(path) as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
            found = json.loads(json.loads(header)["__metadata__"]["about"])["run"]
        except (OSError, KeyError, TypeError, ValueError, RecursionError, OverflowError, MemoryError):
            return {}
        return found if isinstance(found, Mapping) else {}

    @staticmethod
    def remove(path: Path) -> None:
        with disk_errors(path, doing="removing"):
            path.unlink(missing_ok=True)


def require_same_run(
    path: Path, recorded: Mapping[str, Any], run: Mapping[str, Any], *, names: Iterable[str]
) -> None:
    """ModelError where the run that the checkpoint at `path` records is another in one of `names`."""
    if differing := sorted(name for name in names if recorded.get(name) != run.get(name)):
        said = "; ".join(
            f"{name} was {show_value(recorded.get(name))}, not {show_value(run.get(name))}"
            for name in differing[:3]
        )
        raise ModelError(
            f"{show_path(path)} is of another run: {said}. Ask for what it was, or {_BEGIN.lower()}"
        )


def begun_from(settings: Settings, *, model: str, ranks: int) -> dict[str, Any]:
    """What is known of a run before its images are. model: sha256 of the file."""
    return {**settings.to_json(), "checkpoint_format": FORMAT, "model": model, "ranks": ranks}
