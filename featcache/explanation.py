"""What `explain` has to say of a store, its fields and its rows, and the words it is said in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from featcache.images.paths import show_path
from featcache.reuse import Reason
from featcache.spec import show_value
from featcache.words import plural, show_text

SHOWN = 3  # ids named a reason; --json has all

# {field: (what it is, what follows from a difference)}
FIELDS = {
    "backbone": ("the network", "another network, so every feature differs"),
    "weights_sha256": (
        "its weights, by their bytes; with a backbone of your own, also the file of its code",
        "other weights, or other code of a backbone of your own, so every feature differs",
    ),
    "nodes": (
        "the outputs of the network that are kept, and how they are pooled",
        "other outputs of the network, so other features",
    ),
    "num_features": ("values in a feature vector", "feature vectors of another length"),
    "preprocessing.resize_size": (
        "pixels of the shorter side after resizing",
        "the images are resized differently, so every feature differs",
    ),
    "preprocessing.crop_size": (
        "pixels of the square cut out of the centre",
        "another part of each image is seen, so every feature differs",
    ),
    "preprocessing.interpolation": (
        "how pixels are resampled",
        "the images are resampled differently, so nearly every feature differs",
    ),
    "preprocessing.antialias": (
        "whether images are smoothed when they shrink",
        "shrunk images have other pixels, so their features differ",
    ),
    "preprocessing.mean": (
        "subtracted from red, green, blue",
        "the pixels are normalised differently, so every feature differs",
    ),
    "preprocessing.std": (
        "what red, green, blue are divided by",
        "the pixels are normalised differently, so every feature differs",
    ),
    "preprocessing.color": (
        "what becomes of grey, transparent and CMYK pictures",
        "pictures that are not plain RGB are seen differently",
    ),
    "preprocessing.exif": (
        "what becomes of the camera's orientation",
        "pictures with an orientation are seen turned",
    ),
    "preprocessing.jpeg": (
        "whether the decoder of JPEGs shrinks large ones on the way",
        "large JPEGs have other pixels, so their features differ",
    ),
    "preprocessing.transform": (
        "the function of your own that resizes and crops instead, and its file's sha256",
        "pictures are made by other code, so every feature may differ",
    ),
    "compute_dtype": (
        "precision of the forward pass",
        "the network computes in another precision, so every feature differs a little",
    ),
    "store_dtype": ("precision of the stored features", "the features are rounded differently"),
    "views": ("views of each image", "another number of vectors an image"),
    "views_seed": ("what the views after the first are drawn by", "the views show other parts of the images"),
    "augmentation": ("how they are drawn", "the views are drawn by another rule"),
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field of the spec in which two sets of features differ."""

    field: str
    have: object
    want: object
    words: str


@dataclass(frozen=True, kw_only=True)
class RowComparison:
    """The rows of two stores by path and bytes, those in sound blocks only; the rest is `not_sound`."""

    same: int  # path and bytes
    same_bytes: int  # under another path
    other_bytes: int  # under the same path
    only_here: int
    only_there: int
    relabelled: int  # among the same
    not_sound_here: int
    not_sound_there: int


@dataclass(frozen=True, kw_only=True)
class ImageReasons:
    """What `embed` would do with each image of a data set, and why."""

    data: str
    images: int
    reasons: dict[str, tuple[str, ...]]  # Reason name -> ids
    relabelled: tuple[str, ...]
    removed: tuple[str, ...]

    def count(self, reason: Reason) -> int:
        return len(self.reasons.get(reason.name, ()))


@dataclass(frozen=True, kw_only=True)
class RowStory:
    """One row: what is recorded of it, what its file is now, and what follows.

    recorded, now: facts by name; None where there is no such row or file. reason: a Reason's name, "REMOVED"
    for a row whose image is no longer in the data, None where the data is not there to be looked at.
    """

    path: str
    reason: str | None
    words: str
    known_as: str | None  # the row whose features it gets
    recorded: dict[str, Any] | None
    now: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What there is to say of a store, alone or against something."""

    store: str
    fingerprint: str
    spec: dict[str, Any]
    recorded: dict[str, Any]
    against: str | None = None
    differences: tuple[Difference, ...] | None = None
    rows: RowComparison | None = None
    images: ImageReasons | None = None
    row: RowStory | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same": None if self.differences is None else not self.differences}

    def describe(self) -> str:
        lines: list[str] = []
        if self.differences is not None:
            lines += _difference_lines(self)
        if self.rows is not None:
            lines += _comparison_lines(self.rows)
        if self.images is not None:
            lines += _image_lines(self.images)
        if self.row is not None:
            lines += _story_lines(self.row)
        return "\n".join([*(lines or _spec_lines(self)), *self.notes])


def action_of(reason: Reason) -> str:
    if reason is Reason.SAME_FAILURE:
        return "not tried again"
    return "reused" if reason.is_reuse else "to embed"


def _spec_lines(explanation: Explanation) -> list[str]:
    width = max(map(len, explanation.spec))
    lines = [f"{show_path(explanation.store)}: fingerprint {explanation.fingerprint}, which is the sha256 of"]
    for field, value in explanation.spec.items():
        lines.append(f"  {field:{width}}  {_shown(value)}  ({FIELDS[field][0]})")
    lines.append("recorded beside it, and not part of it:")
    for name, value in explanation.recorded.items():
        lines.append(f"  {name:{width}}  {_shown(value)}")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return show_text(show_value(value))


def _difference_lines(explanation: Explanation) -> list[str]:
    store, against = show_path(explanation.store), show_path(explanation.against or "")
    if not explanation.differences:
        return [f"{store} and {against}: the same spec"]
    return [
        f"{store} does not hold the features of {against}:",
        *(f"  {d.field}: {_shown(d.have)} -> {_shown(d.want)}: {d.words}" for d in explanation.differences),
    ]


def _comparison_lines(rows: RowComparison) -> list[str]:
    named = (
        (rows.same, "of the same path and bytes"),
        (rows.same_bytes, "of the same bytes under another path"),
        (rows.other_bytes, "of the same path and other bytes"),
        (rows.only_here, "only in the first"),
        (rows.only_there, "only in the second"),
        (rows.relabelled, "of the same under another label or split"),
        (rows.not_sound_here, "of the first pending or damaged, and not compared"),
        (rows.not_sound_there, "of the second pending or damaged, and not compared"),
    )
    return ["rows:", *(f"  {count:,} {words}" for count, words in named if count)]


def _image_lines(images: ImageReasons) -> list[str]:
    lines = [f"{plural(images.images, 'image')} in {show_path(images.data)}:"]
    for reason in Reason:
        ids = images.reasons.get(reason.name, ())
        if ids:
            lines.append(f"  {len(ids):,} {action_of(reason)} ({reason.value}): {_first(ids)}")
    if images.relabelled:
        lines.append(
            f"  {len(images.relabelled):,} of the reused under another label or split: "
            f"{_first(images.relabelled)}"
        )
    if images.removed:
        lines.append(
            f"  {plural(len(images.removed), 'row')} removed (no longer there): {_first(images.removed)}"
        )
    return lines


def _first(ids: Sequence[str]) -> str:
    return ", ".join(map(show_path, ids[:SHOWN])) + (", …" if len(ids) > SHOWN else "")


def _story_lines(story: RowStory) -> list[str]:
    lines = [f"{show_path(story.path)}: {story.words}"]
    if story.known_as is not None and story.known_as != story.path:
        lines.append(f"  known as {show_path(story.known_as)}")
    recorded, now = story.recorded or {}, story.now or {}
    for name in dict.fromkeys([*recorded, *now]):
        if name not in now or name not in recorded:
            lines.append(f"  {name}: {_fact((recorded | now)[name])}{'' if name in recorded else ' now'}")
        elif recorded[name] == now[name]:
            lines.append(f"  {name}: {_fact(recorded[name])}, then and now")
        else:
            lines.append(f"  {name}: {_fact(recorded[name])} recorded, {_fact(now[name])} now")
    if story.now is None and story.reason is not None:
        lines.append("  the file is not there")
    return lines


def _fact(value: object) -> str:
    return "none" if value is None else show_text(str(value))
