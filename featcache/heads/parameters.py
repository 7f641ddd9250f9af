"""Parameters of heads as text: what a value means, which names exist."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from featcache.errors import HeadError

LIKE = 0.5  # of 1, as difflib has it: words that are less alike are no guess
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_value(text: Any) -> Any:
    """The value a text stands for: True, False and None in any case, JSON literals, else the text itself.

    Values that are not text come back unchanged. "False" is False and never a true string.
    """
    if not isinstance(text, str):
        return text
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_params(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """`parse_value` of every parameter; HeadError for a tuple as Python has it, which would stay a text."""
    for name, value in (params or {}).items():
        text = value.strip() if isinstance(value, str) else ""
        if text.startswith("(") and text.endswith(")"):
            inner = text[1:-1].strip().removesuffix(",")
            raise HeadError(f"{name}={text} is a text and no list. Write {name}=[{inner}].")
    return {name: parse_value(value) for name, value in (params or {}).items()}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean …?` of the known word most like `word`; "" where none is like it."""
    folded = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=LIKE)
    return f"Did you mean {folded[found[0]]}?" if found else ""


def require_known(given: Iterable[str], known: Iterable[str], *, what: str) -> None:
    """HeadError naming the nearest parameter, or all, unless every name in `given` is known."""
    known = sorted(known)
    for name in given:
        if name not in known:
            there = f"It has {', '.join(known)}." if known else "It has none."
            hint = did_you_mean(name, known) or there
            raise HeadError(f"{what} has no parameter {name!r}. {hint}")
