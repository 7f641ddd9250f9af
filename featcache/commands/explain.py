"""`featcache explain`: why features are, or are not, the ones asked for, and images reused or embedded.

Fields are compared as `embed` compares them, and rows by the very plan that `embed` carries out.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbones import prove_weights
from featcache.backbones.weights import RANDOM
from featcache.errors import DataError
from featcache.images import scan_images
from featcache.images.identity import ImageFailure, hash_image
from featcache.images.paths import show_path
from featcache.origin import find_origin, image_file
from featcache.pipeline import default_workers
from featcache.progress import Progress, SilentProgress
from featcache.records import SPLITS, FileStat, RowStatus
from featcache.request import Embedder, EmbedRequest, RecordedBackbone, absolute_weights
from featcache.reuse import CachedRows, Reason, ReusePlan, plan_reuse
from featcache.spec import FeatureSpec, Precision, StoreDtype, show_value, spec_differences
from featcache.store.files import StoreFiles
from featcache.store.layout import NO_SPLIT
from featcache.store.reader import FeatureStore

SHOWN = 3  # ids named a reason; --json has all

# {field: (what it is, what follows from a difference)}
FIELDS = {
    "backbone": ("the network", "another network, so every feature differs"),
    "weights_sha256": ("its weights, by their bytes", "other weights, so every feature differs"),
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
    "compute_dtype": (
        "precision of the forward pass",
        "the network computes in another precision, so every feature differs a little",
    ),
    "store_dtype": ("precision of the stored features", "the features are rounded differently"),
    "views": ("views of each image", "another number of vectors an image"),
}
_RECORDED = ("engine", "device", "batch_size", "versions", "data", "created", "command")


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
    for a row whose image is no longer in the data.
    """

    path: str
    reason: str
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


def explain(
    store: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    row: str | None = None,
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    backbone: str | None = None,
    weights: str | None = None,
    seed: int | None = None,
    nodes: Sequence[str] = (),
    precision: Precision | None = None,
    store_dtype: StoreDtype | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Say what determines the features of `store`, and how that differs from something else.

    other: another store. backbone, weights, seed, nodes, precision, store_dtype: as for `embed`; those left
        out are as the store was made, and the backbone is loaded where the weights cannot be proven else.
    data, root, follow_links: as for `embed`; why each image would be reused or embedded.
    row: the id of one row; without `data`, the images are looked for where they were embedded from.

    Raises NotAStore, DamagedStore, DataError, BackboneError, StoreError (the store's own backbone code is
    needed and `backbone` does not name it). Writes nothing.
    """
    files = StoreFiles.at(store)
    opened = FeatureStore.open(files.output, check=False)
    explanation = Explanation(
        store=str(opened.path),
        fingerprint=opened.fingerprint,
        spec=opened.spec.flat(),
        recorded=_recorded_facts(opened),
    )
    asked = _asked(backbone, weights, seed, nodes, precision, store_dtype)
    if other is not None:
        if asked or data is not None or row is not None:
            raise ValueError("another store excludes data, row and the options of embed")
        return _against_store(explanation, opened, FeatureStore.open(other, check=False))
    spec = opened.spec
    if asked:
        spec, how = _asked_spec(opened, asked)
        explanation = replace(
            explanation,
            against="what is asked for",
            differences=_differences(opened.spec, spec),
            notes=(how,) if how else (),
        )
    if explanation.differences and (data is not None or row is not None):
        refused = f"`embed` refuses another spec for {opened.path}: this is what it does for another --output"
        explanation = replace(explanation, notes=(*explanation.notes, refused))
    if data is None and row is None:
        return explanation
    origin = find_origin(opened, data=data, root=root)
    links = follow_links or (data is None and origin["follow_links"])
    listing = scan_images(
        Path(origin["path"]),
        root=None if origin["root"] is None else Path(origin["root"]),
        follow_links=links,
    )
    progress = progress or SilentProgress()
    stores = [found for found in files.open_all() if found.fingerprint == spec.fingerprint()]
    plan = plan_reuse(
        listing,
        stores,
        workers=workers or default_workers(),
        on_read=_reading(progress, len(listing.records)),
    )
    progress.finish()
    if row is not None:
        return replace(explanation, row=_story(plan, opened, row, follow_links=links))
    return replace(explanation, images=_image_reasons(plan, origin["path"]))


def _reading(progress: Progress, total: int) -> Any:
    progress.start("reading images that may have changed", total=total, unit="images")
    return progress.advance


def _asked(
    backbone: str | None,
    weights: str | None,
    seed: int | None,
    nodes: Sequence[str],
    precision: Precision | None,
    store_dtype: StoreDtype | None,
) -> dict[str, Any]:
    """The options that were given, by their field of `EmbedRequest`."""
    options = {
        "backbone": backbone,
        "weights": absolute_weights(weights),
        "seed": seed,
        "nodes": tuple(nodes) or None,
        "precision": precision,
        "store_dtype": store_dtype,
    }
    return {name: value for name, value in options.items() if value is not None}


def _asked_spec(store: FeatureStore, asked: dict[str, Any]) -> tuple[FeatureSpec, str]:
    """The spec of the store's own request with the options given in their place, and how it is known."""
    recorded = EmbedRequest.of_store(store)
    if asked.get("backbone", recorded.backbone) != recorded.backbone and recorded.weights != RANDOM:
        recorded = replace(recorded, weights=None)  # a file of weights fits one backbone only
    request = replace(recorded, **asked)
    proof = prove_weights(store.provenance, request.as_json())
    if proof:
        return store.spec, proof
    if "backbone" not in asked:
        RecordedBackbone.of_store(store).require_permission(None)
    # The spec is the same on every device, and this one is always there.
    return Embedder(request, device="cpu").load(batch_size=1).spec, ""


def _recorded_facts(store: FeatureStore) -> dict[str, Any]:
    return {name: store.provenance[name] for name in _RECORDED if name in store.provenance}


def _differences(have: FeatureSpec, want: FeatureSpec) -> tuple[Difference, ...]:
    return tuple(
        Difference(field=field, have=a, want=b, words=FIELDS[field][1])
        for field, (a, b) in spec_differences(have, want).items()
    )


def _against_store(explanation: Explanation, store: FeatureStore, other: FeatureStore) -> Explanation:
    here, there = CachedRows(store), CachedRows(other)
    return replace(
        explanation,
        against=str(other.path),
        differences=_differences(store.spec, other.spec),
        rows=_compare_rows(here, there),
    )


def _compare_rows(here: CachedRows, there: CachedRows) -> RowComparison:
    def names(cache: CachedRows) -> list[tuple[str | None, int]]:
        return list(zip(cache.store.table.label_names(), cache.store.table.splits.tolist(), strict=True))

    here_names, there_names = names(here), names(there)
    counts: Counter[str] = Counter()
    matched: set[int] = set()  # rows of the other store
    moved: list[bytes] = []
    for path, row in here.by_path.items():
        twin, digest = there.by_path.get(path), here.sources["sha256"][row].tobytes()
        if twin is None:
            moved.append(digest)
            continue
        matched.add(twin)
        same = digest == there.sources["sha256"][twin].tobytes()
        counts["same" if same else "other_bytes"] += 1
        counts["relabelled"] += same and here_names[row] != there_names[twin]
    left = Counter(
        there.sources["sha256"][row].tobytes() for row in there.by_path.values() if row not in matched
    )
    renamed = (Counter(moved) & left).total()
    return RowComparison(
        same=counts["same"],
        same_bytes=renamed,
        other_bytes=counts["other_bytes"],
        only_here=len(moved) - renamed,
        only_there=left.total() - renamed,
        relabelled=counts["relabelled"],
        not_sound_here=int((~here.done).sum()),
        not_sound_there=int((~there.done).sum()),
    )


def _image_reasons(plan: ReusePlan, data: str) -> ImageReasons:
    reasons: dict[str, list[str]] = {}
    for i, path in enumerate(plan.table.ids):
        reasons.setdefault(plan.reason(i).name, []).append(path)
    return ImageReasons(
        data=data,
        images=len(plan.table.ids),
        reasons={reason.name: tuple(reasons[reason.name]) for reason in Reason if reason.name in reasons},
        relabelled=tuple(plan.table.ids[i] for i in np.flatnonzero(plan.relabelled_rows).tolist()),
        removed=plan.removed_ids,
    )


def _story(plan: ReusePlan, store: FeatureStore, path: str, *, follow_links: bool) -> RowStory:
    here = next((i for i, known in enumerate(plan.table.ids) if known == path), None)
    row = next((i for i, known in enumerate(store.table.ids) if known == path), None)
    if here is None and row is None:
        near = difflib.get_close_matches(path, [*store.table.ids, *plan.table.ids], n=1)
        meant = f"; did you mean {show_path(near[0])}?" if near else ""
        raise DataError(f"neither {store.path} nor its images have {show_path(path)}{meant}")
    reason, words, known_as = "REMOVED", "the image is no longer in the data: its row is removed", None
    if here is not None:
        why = plan.reason(here)
        reason, words = why.name, f"{_action(why)}: {why.value}"
        index, origin = int(plan.origin_store[here]), int(plan.origin_row[here])
        known_as = None if index < 0 else plan.caches[index].store.table.ids[origin]
        words += "; relabelled" if plan.relabelled_rows[here] else ""
    return RowStory(
        path=path,
        reason=reason,
        words=words,
        known_as=known_as,
        recorded=None if row is None else _recorded_row(store, row),
        now=_file_now(image_file(plan.root, path, follow_links=follow_links)),
    )


def _recorded_row(store: FeatureStore, row: int) -> dict[str, Any]:
    cache, table = CachedRows(store), store.table
    facts: dict[str, Any] = {
        "row": row,
        "status": RowStatus(int(cache.status[row])).words,
        "label": table.label_names()[row],
        "split": None if table.splits[row] == NO_SPLIT else SPLITS[table.splits[row]],
    }
    if not cache.done[row]:
        return {**facts, "status": "in a damaged block" if cache.is_damaged(row) else "not embedded yet"}
    source = cache.sources[row]
    stat = FileStat(
        size=int(source["size"]), mtime_ns=int(source["mtime_ns"]), ctime_ns=int(source["ctime_ns"])
    )
    return {**facts, "sha256": source["sha256"].tobytes().hex(), **_stat_facts(stat)}


def _file_now(file: Path) -> dict[str, Any] | None:
    found = hash_image(file)
    if isinstance(found, ImageFailure):
        return None if found.status == RowStatus.MISSING else {"status": found.reason}
    return {"sha256": found.sha256.hex(), **_stat_facts(found.stat)}


def _stat_facts(stat: FileStat) -> dict[str, Any]:
    return {"size": stat.size, "mtime": _moment(stat.mtime_ns), "ctime": _moment(stat.ctime_ns)}


def _moment(ns: int) -> str:
    """To the nanosecond: two files that differ in nothing else differ there."""
    seconds, rest = divmod(ns, 1_000_000_000)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"
    except (OverflowError, OSError, ValueError):
        return f"{ns} ns"


def _action(reason: Reason) -> str:
    if reason is Reason.SAME_FAILURE:
        return "not tried again"
    return "reused" if reason.is_reuse else "to embed"


def _spec_lines(explanation: Explanation) -> list[str]:
    width = max(map(len, explanation.spec))
    lines = [f"{explanation.store}: fingerprint {explanation.fingerprint}, which is the sha256 of"]
    for field, value in explanation.spec.items():
        lines.append(f"  {field:{width}}  {_shown(value)}  ({FIELDS[field][0]})")
    lines.append("recorded beside it, and not part of it:")
    for name, value in explanation.recorded.items():
        lines.append(f"  {name:{width}}  {_shown(value)}")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else show_value(value)


def _difference_lines(explanation: Explanation) -> list[str]:
    if not explanation.differences:
        return [f"{explanation.store} and {explanation.against}: the same features"]
    return [
        f"{explanation.store} does not hold the features of {explanation.against}:",
        *(f"  {d.field}: {_shown(d.have)} -> {_shown(d.want)}: {d.words}" for d in explanation.differences),
    ]


def _comparison_lines(rows: RowComparison) -> list[str]:
    named = (
        (rows.same, "rows of the same path and bytes"),
        (rows.same_bytes, "of the same bytes under another path"),
        (rows.other_bytes, "of the same path and other bytes"),
        (rows.only_here, "only in the first"),
        (rows.only_there, "only in the second"),
        (rows.relabelled, "of the same under another label or split"),
        (rows.not_sound_here, "of the first pending or damaged, and not compared"),
        (rows.not_sound_there, "of the second pending or damaged, and not compared"),
    )
    return [f"  {count:,} {words}" for count, words in named if count]


def _image_lines(images: ImageReasons) -> list[str]:
    lines = [f"{images.images:,} images in {images.data}:"]
    for reason in Reason:
        ids = images.reasons.get(reason.name, ())
        if ids:
            lines.append(f"  {len(ids):,} {_action(reason)}: {reason.value} ({_first(ids)})")
    if images.relabelled:
        lines.append(
            f"  {len(images.relabelled):,} of the reused have another label or split "
            f"({_first(images.relabelled)})"
        )
    if images.removed:
        lines.append(f"  {len(images.removed):,} rows removed: no longer there ({_first(images.removed)})")
    return lines


def _first(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", …" if len(ids) > SHOWN else "")


def _story_lines(story: RowStory) -> list[str]:
    lines = [f"{story.path}: {story.words}"]
    if story.known_as not in (None, story.path):
        lines.append(f"  known as {story.known_as}")
    recorded, now = story.recorded or {}, story.now or {}
    for name in dict.fromkeys([*recorded, *now]):
        if name not in now or name not in recorded:
            lines.append(f"  {name}: {(recorded | now)[name]}{'' if name in recorded else ' now'}")
        elif recorded[name] == now[name]:
            lines.append(f"  {name}: {recorded[name]}, then and now")
        else:
            lines.append(f"  {name}: {recorded[name]} recorded, {now[name]} now")
    if story.now is None:
        lines.append("  the file is not there")
    return lines
