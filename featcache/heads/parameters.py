"""Parameters of heads as text: what a value means, which names exist."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from featcache.errors import HeadError

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
    """`parse_value` of every parameter."""
    return {name: parse_value(value) for name, value in (params or {}).items()}


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`."""
    folded = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.0)
    return folded[found[0]] if found else ""


def require_known(given: Iterable[str], known: Iterable[str], *, what: str) -> None:
    """HeadError naming the nearest parameter unless every name in `given` is known."""
    known = sorted(known)
    for name in given:
        if name not in known:
            hint = f"Did you mean {nearest(name, known)}?" if known else "It has none."
            raise HeadError(f"{what} has no parameter {name!r}. {hint}")
