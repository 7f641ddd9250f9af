"""Words for people: counts, text of others on one line, and commands to paste."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAME_LENGTH = 300  # characters of a name among others


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2,000 rows`; `many` where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def show_text(text: str) -> str:
    """Text from a file on one line, with nothing in it that a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_some(names: Sequence[str], *, limit: int = 5) -> str:
    """`a, b, c, d, e and 12 more`: the first few names, each by `show_text`, as far as a line has room."""
    said = ", ".join(_beginning(show_text(name)) for name in names[:limit])
    return said if len(names) <= limit else f"{said} and {len(names) - limit:,} more"


def _beginning(text: str) -> str:
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 1]}…"


def spell_options(asked: Mapping[str, tuple[Any, Any]]) -> tuple[str, ...]:
    """The words of a command for options, as value and default, that differ from their default."""
    differ = ((option, value) for option, (value, default) in asked.items() if value != default)
    return tuple(word for option, value in differ for word in (option, str(value)))


def shell_command(words: Iterable[str | os.PathLike[str]]) -> str:
    """Words as a line that a shell takes apart into just these, whatever is in them; no path is an option."""
    return " ".join(_shell_word(word) for word in words)


def _shell_word(word: str | os.PathLike[str]) -> str:
    text = os.fspath(word)
    if not isinstance(word, str) and text.startswith("-"):
        text = os.path.join(".", text)
    if text.isprintable():
        return shlex.quote(text)
    plain = set(range(32, 127)) - set(b"'\\")
    return "$'" + "".join(chr(b) if b in plain else f"\\x{b:02x}" for b in os.fsencode(text)) + "'"
