"""What is there before a run: whether it was done already, or is to go on, and whether it can be done at all.

The report of a run says what it was of and which model it left. Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.disk import open_regular, read_errors, write_atomically
from featcache.model import Model
from featcache.tuning.asked import Asked
from featcache.tuning.checkpoint import FORMAT, Checkpoint, require_same_run
from featcache.tuning.dataset import DataSet
from featcache.tuning.launched import launched_ranks
from featcache.tuning.result import FinetuneResult
from featcache.tuning.settings import Settings

if TYPE_CHECKING:
    from featcache.tuning.files import TuningFiles

_ABOUT = "run"  # the report's entry for what is looked at here


def sha256_of(path: Path) -> str:
    """64 hexadecimal digits. DiskError; FileNotFoundError and other kinds of file are OSError."""
    with open_regular(path) as file, read_errors(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_report(
    path: Path, report: Mapping[str, Any], *, key: Mapping[str, Any], output: Path | None
) -> None:
    """output: the model that the run left; None for a run that goes on."""
    about = {**key, "output": None if output is None else sha256_of(output)}
    write_atomically(path, (json.dumps({**report, _ABOUT: about}, indent=2) + "\n").encode())


def find_report(path: Path, *, key: Mapping[str, Any], output: Path | None) -> dict[str, Any] | None:
    """The report of a run of just this that left the model that is there now; None where there is none.

    output: None for a run that goes on.
    """
    try:
        with open_regular(path) as file:
            found: dict[str, Any] = json.loads(file.read())
        about = found.pop(_ABOUT)
        same = about == {**key, "output": None if output is None else sha256_of(output)}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return None
    return found if same else None


def look_first(
    asked: Asked, fitted: Model, data: DataSet, files: TuningFiles, *, restart: bool
) -> dict[str, Any]:
    """JSON-able: what decides the result ("key"), the report of a run that did just this, or None, and
    what the checkpoint is of ("checkpoint").

    HeadError: nothing can be learned. ModelError: a checkpoint of another run. DiskError, ModelError,
    HeadError: the output cannot be written. "replaced": what another run left where the model is to be.
    """
    files.require_writable(asked.model)
    data.require_rows(fitted, forget=asked.forget)
    model = sha256_of(asked.model)
    key = asked.key(model=model, images=data.digest())
    first = {"key": key, "report": None, "checkpoint": {}, "replaced": files.former()}
    if restart:
        return first
    report = find_report(files.report, key=key, output=files.output)
    if report is not None and FinetuneResult.can_read(report):
        return {**first, "report": report}
    recorded = Checkpoint.recorded_run(files.checkpoint)
    if recorded:
        now = begun_from(asked.settings_for(fitted), model=model, ranks=launched_ranks())
        require_same_run(files.checkpoint, recorded, now, names=now)
    # The model that is there may be the best so far of just this run.
    own = find_report(files.report, key=key, output=None) if recorded else None
    replaced = first["replaced"] if own is None else own.get("replaced")
    return {**first, "checkpoint": recorded, "replaced": replaced}


def begun_from(settings: Settings, *, model: str, ranks: int) -> dict[str, Any]:
    """What is known of a run before its images are. model: sha256 of the file."""
    return {**settings.to_json(), "checkpoint_format": FORMAT, "model": model, "ranks": ranks}
