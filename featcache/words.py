"""Words for people: counts, and text of others on one line."""

from __future__ import annotations

from collections.abc import Sequence


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2,000 rows`; `many` where it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def show_text(text: str) -> str:
    """Text from a file on one line, with nothing in it that a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_some(names: Sequence[str], *, limit: int = 5) -> str:
    """`a, b, c, d, e and 12 more`: the first few names, each by `show_text`."""
    said = ", ".join(show_text(name) for name in names[:limit])
    return said if len(names) <= limit else f"{said} and {len(names) - limit:,} more"
