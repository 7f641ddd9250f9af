"""What `verify` found in a store, its images and its network, and the words it is said in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from featcache.images.identity import ImageFailure
from featcache.images.paths import show_path
from featcache.records import RowStatus
from featcache.words import plural

_SHOWN = 10  # rows named in a list for a terminal; --json has all
_RATE_FROM = 50_000_000  # bytes; less is read too fast for its speed to mean anything


@dataclass(frozen=True, kw_only=True)
class DamagedRows:
    """One damaged block: rows first to last, by number and by id, and what is wrong with it."""

    first: int
    last: int
    first_id: str
    last_id: str
    why: str


@dataclass(kw_only=True)
class OtherImages:
    """The images that are not what was embedded, by id; of the unreadable ones with the reason."""

    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.missing) + len(self.changed) + len(self.unreadable)

    def add(self, path: str, found: ImageFailure | None, *, same_bytes: bool) -> None:
        """`found` is None for an image that was read, and then has other bytes."""
        if found is not None and found.status == RowStatus.MISSING:
            self.missing.append(path)
        elif found is None or (found.sha256 is not None and not same_bytes):
            self.changed.append(path)
        else:
            self.unreadable.append((path, found.reason))

    def describe(self) -> list[str]:
        return [
            *_named("missing", [(path, "") for path in self.missing]),
            *_named("changed", [(path, "") for path in self.changed]),
            *_named("unreadable", self.unreadable),
        ]


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """The images against the bytes that were embedded.

    not_compared: rows that are damaged or pending, or whose image could not be read when it was embedded.
    """

    same: int
    other: OtherImages
    not_compared: int


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Rows embedded again against the rows of the store, over all nodes.

    largest_difference, lowest_cosine: None where no row was compared. disagree: (id, largest |Δ|, cosine) of
    rows that are farther apart than two engines may be. other: the images that are not what was embedded.
    """

    rows: int
    largest_difference: float | None
    lowest_cosine: float | None
    disagree: tuple[tuple[str, float, float], ...]
    other: OtherImages


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was checked and what was found."""

    store: str
    rows: int
    blocks: int
    bytes: int
    seconds: float  # of comparing checksums
    damaged: tuple[DamagedRows, ...]
    pending: int  # rows
    failed: int  # rows that have no features, as was recorded
    sources: SourceCheck | None = None
    recomputed: Recomputed | None = None

    @property
    def sound(self) -> bool:
        """Whether all that was checked agrees; pending and failed rows are no disagreement."""
        return self.verdict in ("sound", "pending")

    @property
    def verdict(self) -> str:
        """`damaged`, `images differ`, `features differ`, `pending` or `sound`: the first that is the case."""
        if self.damaged:
            return "damaged"
        if self._images_differ:
            return "images differ"
        if self.recomputed and self.recomputed.disagree:
            return "features differ"
        return "pending" if self.pending else "sound"

    @property
    def _images_differ(self) -> bool:
        return any(check.other for check in (self.sources, self.recomputed) if check)

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = _finite({"sound": self.sound, "verdict": self.verdict, **asdict(self)})
        return said

    def describe(self) -> str:
        store = show_path(self.store)
        rate = self.bytes / 1e9 / max(self.seconds, 1e-9)
        speed = f" ({rate:.1f} GB/s)" if self.bytes >= _RATE_FROM else ""
        lines = [
            f"{store}: {plural(self.rows, 'row')} in {plural(self.blocks, 'block')}, "
            f"{self.bytes / 1e6:,.1f} MB checked in {self.seconds:.2f} s{speed}"
        ]
        lines += _named(
            "damaged",
            [
                (f"rows {d.first}-{d.last} ({show_path(d.first_id)} … {show_path(d.last_id)})", d.why)
                for d in self.damaged
            ],
        )
        if self.damaged:
            lines.append(f"  `featcache repair {store}` embeds just these rows again")
        if self.pending:
            lines.append(
                f"{plural(self.pending, 'row')} not embedded yet; unless a run is writing the store now, the "
                "same `featcache embed` goes on"
            )
        if self.failed:
            lines.append(
                f"{plural(self.failed, 'row')} without features, as recorded; `featcache info` names them"
            )
        if self.sources:
            lines += _source_lines(self.sources)
        if self.recomputed:
            lines += _recomputed_lines(self.recomputed)
        if self._images_differ:
            lines.append(
                f"  if the images have moved, pass --data DATA; else `featcache explain {store} --data DATA` "
                "says why, and `featcache embed` brings the store up to date"
            )
        return "\n".join([*lines, self._last_line()])

    def _last_line(self) -> str:
        if self.verdict == "pending":
            return f"sound so far, {plural(self.pending, 'row')} pending"
        return {
            "images differ": "sound, but not what the images are now",
            "features differ": "sound, but not what the network gives now",
        }.get(self.verdict, self.verdict)


def _finite(value: Any) -> Any:
    """Without the numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"  {title}: {show_path(name)}{why and ': '}{why}" for name, why in rows[:_SHOWN]]
    return lines + ([f"  … and {len(rows) - _SHOWN:,} more (--json lists all)"] if len(rows) > _SHOWN else [])


def _source_lines(found: SourceCheck) -> list[str]:
    lines = [f"{plural(found.same, 'image')} as embedded"]
    if found.not_compared:
        lines.append(
            f"{plural(found.not_compared, 'row')} not compared with the image: damaged, pending, or failed "
            "before the image was read"
        )
    if found.other:
        lines += [f"{plural(len(found.other), 'image')} not as embedded:", *found.other.describe()]
    return lines


def _recomputed_lines(found: Recomputed) -> list[str]:
    figures = ""
    if found.rows:
        figures = f": largest |Δ| {found.largest_difference:.2g}, lowest cosine {found.lowest_cosine:.7f}"
    lines = [f"{plural(found.rows, 'row')} embedded again and compared{figures}"]
    lines += _named(
        "disagrees",
        [(path, f"|Δ| {delta:.2g}, cosine {cosine:.5f}") for path, delta, cosine in found.disagree],
    )
    if found.other:
        lines.append(f"{plural(len(found.other), 'row')} not compared, the image not being as embedded:")
        lines += found.other.describe()
    return lines
