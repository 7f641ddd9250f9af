"""The identity of an image: its path below the root, as text that every file system and HDF5 can hold.

Knows names, not files: nothing here opens or lists anything.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ESCAPE = re.compile(rb"\\(\\|x[0-9a-f]{2})?")


def escape_path(path: str) -> str:
    """The valid UTF-8 that stands for a path as Python's `os` gives it; `unescape_path` is the way back.

    A byte that is not UTF-8 becomes `\\xNN`, a real backslash becomes two; all else stays as it is.
    """
    if _is_plain(path):
        return path
    raw = os.fsencode(path).replace(b"\\", b"\\\\")
    return raw.decode("utf-8", errors="backslashreplace")


def unescape_path(text: str) -> str:
    """The path for which `escape_path` gave `text`; ValueError where it gives no such text."""
    if _is_plain(text):
        return text
    path = os.fsdecode(_ESCAPE.sub(_byte, text.encode("utf-8")))
    if escape_path(path) != text:
        raise ValueError(f"{show_path(text)!r} is not an escaped path")
    return path


def _is_plain(path: str) -> bool:
    """Whether nothing is to be escaped, as in nearly all names; encoding each takes longer than listing."""
    return path.isascii() and "\\" not in path


def _byte(match: re.Match[bytes]) -> bytes:
    code = match.group(1)
    if code is None:
        raise ValueError("a backslash that begins neither \\\\ nor \\xNN")
    return code if code == b"\\" else bytes([int(code[1:], 16)])


def resolve(root: Path, path: str) -> Path:
    """The file that a record's `path` means in a listing with this root."""
    return root / unescape_path(path)


def show_path(path: str | Path) -> str:
    """A path for a message: one line, whatever bytes are in the name."""
    text = os.fsencode(path).decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_inside(path: str, root: str) -> bool:
    """Whether `path` is `root` or below it, both free of links (`os.path.realpath`)."""
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
