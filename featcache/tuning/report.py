"""The report of a run as a file: what it came to, what it was of, which model it left. Knows no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.disk import open_regular, read_errors, write_atomically

_ABOUT = "run"  # the entry for what the run was of


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
