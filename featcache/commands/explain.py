"""`featcache explain`: why features are, or are not, the ones asked for, and images reused or embedded.

Fields are compared as `embed` compares them, and rows by the very plan that `embed` carries out.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbones import prove_weights
from featcache.backbones.weights import RANDOM
from featcache.embedder import Embedder
from featcache.errors import DataError
from featcache.explanation import (
    FIELDS,
    Difference,
    Explanation,
    ImageReasons,
    RowComparison,
    RowStory,
    action_of,
)
from featcache.images import scan_images
from featcache.images.identity import ImageFailure, hash_image
from featcache.images.paths import show_path
from featcache.origin import find_origin, follows_links, image_file
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.records import SPLITS, FileStat, Listing, RowStatus
from featcache.request import EmbedRequest, RecordedBackbone, absolute_weights
from featcache.reuse import CachedRows, Reason, ReusePlan, plan_reuse
from featcache.spec import FeatureSpec, Precision, StoreDtype, spec_differences
from featcache.store.files import StoreFiles
from featcache.store.layout import NO_SPLIT, STAT_COLUMNS
from featcache.store.reader import FeatureStore

_RECORDED = ("engine", "decoder", "device", "batch_size", "versions", "data", "created", "command")


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
        where = show_path(opened.path)
        refused = f"`embed` refuses another spec for {where}: this is what it does for another --output"
        explanation = replace(explanation, notes=(*explanation.notes, refused))
    if data is None and row is None:
        return explanation
    links = follow_links or (data is None and follows_links(opened))
    try:
        origin = find_origin(opened, data=data, root=root)
        listing = scan_images(
            Path(origin["path"]),
            root=None if origin["root"] is None else Path(origin["root"]),
            follow_links=links,
        )
    except DataError as exc:
        if data is not None or root is not None or row not in opened.table.ids:
            raise
        return replace(explanation, row=_story_without_images(opened, str(row), exc))
    wanted = listing
    if row is not None:
        wanted = replace(listing, records=tuple(found for found in listing.records if found.path == row))
    stores = [found for found in files.open_all() if found.fingerprint == spec.fingerprint()]
    plan = _plan(wanted, stores, workers=workers, progress=progress or SilentProgress())
    if row is not None:
        return replace(explanation, row=_story(plan, listing, opened, row, follow_links=links))
    return replace(explanation, images=_image_reasons(plan, origin["path"]))


def _plan(
    listing: Listing, stores: Sequence[FeatureStore], *, workers: int | None, progress: Progress
) -> ReusePlan:
    """What `embed` would do; the progress begins with the first image that has to be read."""
    reading = False

    def on_read(count: int) -> None:
        nonlocal reading
        if not reading:
            reading = True
            progress.start(
                "reading images that may have changed", total=len(listing.records), unit="images at most"
            )
        progress.advance(count)

    plan = plan_reuse(listing, stores, workers=workers or usable_processors(), on_read=on_read)
    progress.finish()
    return plan


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


def _story(
    plan: ReusePlan, listing: Listing, store: FeatureStore, path: str, *, follow_links: bool
) -> RowStory:
    here = next((i for i, known in enumerate(plan.table.ids) if known == path), None)
    row = next((i for i, known in enumerate(store.table.ids) if known == path), None)
    if here is None and row is None:
        near = _nearest(path, [*store.table.ids, *(record.path for record in listing.records)])
        meant = f"; did you mean {show_path(near)}?" if near else ""
        raise DataError(f"neither {show_path(store.path)} nor its images have {show_path(path)}{meant}")
    reason: str | None
    reason, words, known_as = "REMOVED", "the image is no longer in the data: its row is removed", None
    if here is not None:
        why = plan.reason(here)
        reason, words = why.name, f"{action_of(why)} ({why.value})"
        index, origin = int(plan.origin_store[here]), int(plan.origin_row[here])
        known_as = None if index < 0 else plan.caches[index].store.table.ids[origin] or None
        words += "; relabelled" if plan.relabelled_rows[here] else ""
    return RowStory(
        path=path,
        reason=reason,
        words=words,
        known_as=known_as,
        recorded=None if row is None else _recorded_row(store, row),
        now=_file_now(image_file(plan.root, path, follow_links=follow_links)),
    )


def _story_without_images(store: FeatureStore, path: str, why: DataError) -> RowStory:
    return RowStory(
        path=path,
        reason=None,
        words=f"what becomes of it is not known: {why}",
        known_as=None,
        recorded=_recorded_row(store, store.table.ids.index(path)),
        now=None,
    )


def _nearest(path: str, ids: Sequence[str]) -> str | None:
    """The id that was perhaps meant, also by the name of its file alone or by a path above the root."""
    name = path.rpartition("/")[2]
    by_name: dict[str, list[str]] = {}
    for known in ids:
        by_name.setdefault(known.rpartition("/")[2], []).append(known)
    if name in by_name:
        return difflib.get_close_matches(path, by_name[name], n=1, cutoff=0.0)[0]
    close = difflib.get_close_matches(path, ids, n=1)
    return (
        close[0]
        if close
        else next((by_name[found][0] for found in difflib.get_close_matches(name, by_name, n=1)), None)
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
    stat = FileStat(**{name: int(source[name]) for name in STAT_COLUMNS})
    return {**facts, "sha256": source["sha256"].tobytes().hex(), **_stat_facts(stat)}


def _file_now(file: Path) -> dict[str, Any] | None:
    found = hash_image(file)
    if isinstance(found, ImageFailure):
        return None if found.status == RowStatus.MISSING else {"status": found.reason}
    return {"sha256": found.sha256.hex(), **_stat_facts(found.stat)}


def _stat_facts(stat: FileStat) -> dict[str, Any]:
    return {
        "size": stat.size,
        "mtime": _moment(stat.mtime_ns),
        "ctime": _moment(stat.ctime_ns),
        "inode": stat.inode,
    }


def _moment(ns: int) -> str:
    """To the nanosecond: two files that differ in nothing else differ there."""
    seconds, rest = divmod(ns, 1_000_000_000)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"
    except (OverflowError, OSError, ValueError):
        return f"{ns} ns"
