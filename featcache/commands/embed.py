"""`featcache embed`: a data set of images in, a feature store out, computing only what the cache lacks."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcache.disk import disk_errors
from featcache.embedding import Embedded, Embedding, earlier_engines, failure_lines
from featcache.engines import AUTO, MAX_BATCH_SIZE, require_engine
from featcache.errors import DataError
from featcache.images import scan_images
from featcache.images.paths import show_path
from featcache.origin import describe_origin
from featcache.pipeline import default_workers
from featcache.progress import Progress, SilentProgress
from featcache.records import Listing
from featcache.request import Embedder, EmbedRequest, absolute_weights
from featcache.reuse import ReusePlan, plan_reuse
from featcache.spec import PENULTIMATE, FeatureSpec, Precision, StoreDtype
from featcache.store.files import StoreFiles
from featcache.store.lock import write_lock


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What a run did. rows = embedded + reused + failed; relabelled rows are among the reused."""

    rows: int
    embedded: int
    reused: int
    relabelled: int
    failed: int
    removed: int
    seconds: float
    images_per_second: float  # of the images embedded by this run
    fingerprint: str
    store: str
    failures: tuple[tuple[str, str], ...] = ()  # (path, why)
    notes: tuple[str, ...] = ()
    store_bytes: int = 0
    slowest_stage: str = ""
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """The documented keys, in order."""
        return {
            name: getattr(self, name)
            for name in (
                "rows", "embedded", "reused", "relabelled", "failed", "removed",
                "seconds", "images_per_second", "fingerprint", "store", "dry_run",
            )
        }  # fmt: skip

    def describe(self) -> str:
        """The summary for a terminal."""
        counts = f"{self.embedded:,} embedded, {self.reused:,} reused, {self.failed:,} failed"
        if self.dry_run:
            counts = f"{self.embedded:,} to embed, {self.reused:,} to reuse, {self.failed:,} known to fail"
        if self.relabelled:
            counts += f"; {self.relabelled:,} of the reused relabelled"
        if self.removed:
            counts += f"; {self.removed:,} removed"
        lines = [f"{self.rows:,} rows: {counts}"]
        lines += failure_lines(self.failures, store=self.store)
        lines += [f"  {note}" for note in self.notes]
        if self.dry_run:
            lines.append("nothing was written (--dry-run)")
        else:
            speed = f", {self.images_per_second:,.1f} images/s, mostly {self.slowest_stage}"
            lines.append(
                f"{self.store}: {self.store_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"
                f"{speed if self.embedded else ''}; fingerprint {self.fingerprint[:12]}"
            )
        return "\n".join(lines)


def embed(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    backbone: str = "resnet18",
    weights: str | None = None,
    seed: int = 0,
    nodes: Sequence[str] = (PENULTIMATE,),
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    device: str = "auto",
    precision: Precision = "float32",
    store_dtype: StoreDtype = "float32",
    engine: str = AUTO,
    batch_size: int | None = None,
    workers: int | None = None,
    max_failures: float = 0.01,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> EmbedResult:
    """Embed the images of `data` with a frozen backbone into the feature store `output`.

    data: a folder of class folders, the same under train/ val/ test/, or a CSV `path,label[,split]` with
        paths relative to `root` (default: the CSV's folder).
    backbone, weights, seed: see `featcache.backbones.load_backbone`. nodes: see `make_extractor`.
    engine: the name of one in `featcache.engines.ENGINES`, or "auto": the one the store was begun with; for a
        new store the fastest that agrees with PyTorch's eager one, where looking for it pays.
    max_failures: the fraction of images that may fail before the run stops with TooManyFailures; one image
        may always fail.

    Images whose row is in the store already are not opened. Raises DataError, BackboneError, DeviceError,
    SpecMismatch (the store holds features of another spec), StoreLocked, DiskError; whatever is raised,
    every acknowledged block is kept and the same call goes on from there.
    """
    begun = time.perf_counter()
    workers = default_workers() if workers is None else workers
    if workers < 1 or not 1 <= (1 if batch_size is None else batch_size) <= MAX_BATCH_SIZE:
        raise ValueError(f"workers are at least 1, batch_size is 1 to {MAX_BATCH_SIZE:,}")
    if engine != AUTO:
        require_engine(engine)
    request = EmbedRequest(
        backbone=backbone,
        weights=absolute_weights(weights),
        seed=seed,
        nodes=tuple(nodes),
        precision=precision,
        store_dtype=store_dtype,
    )
    data, root = Path(data), None if root is None else Path(root)
    run = Embedding(
        files=StoreFiles.at(output),
        embedder=Embedder(request, device=device, batch_size=batch_size, engine=engine),
        data=describe_origin(data, root, follow_links=follow_links),
        workers=workers,
        max_failures=max_failures,
        progress=progress or SilentProgress(),
    )
    # Listed under the lock: what another run adds meanwhile must not look removed.
    with nullcontext() if dry_run else write_lock(run.files.output):
        listing = scan_images(data, root=root, follow_links=follow_links)
        result = _dry_run(run, listing) if dry_run else _run(run, listing)
    return replace(result, seconds=round(time.perf_counter() - begun, 3))


def _dry_run(run: Embedding, listing: Listing) -> EmbedResult:
    plan, spec, _ = _plan(run, listing)
    planned = Embedded(plan=plan, status=plan.reused_status)
    return replace(
        _result(run, planned, spec=spec, notes=[*listing.notes, *plan.notes()]),
        embedded=len(plan.pending),
        dry_run=True,
    )


def _run(run: Embedding, listing: Listing) -> EmbedResult:
    plan, spec, weights_proof = _plan(run, listing)
    embedded = run.carry_out(plan, spec)
    notes = [*listing.notes, *plan.notes(), *embedded.notes, *_engine_note(plan, run)]
    if not len(plan.pending):
        notes.append(_how(plan, weights_proof))
    return _result(run, embedded, spec=spec, notes=notes)


def _plan(run: Embedding, listing: Listing) -> tuple[ReusePlan, FeatureSpec, str]:
    """What to do, for which spec, and how that is known to be the one asked for."""
    stores = run.files.open_all()
    spec, weights_proof = run.embedder.settle_spec(stores, output=run.files.output)
    # A growth of another spec than the store's, left by whatever way, has nothing to offer.
    stores = [store for store in stores if store.fingerprint == spec.fingerprint()]
    plan = plan_reuse(listing, stores, workers=run.workers)
    _require_listed(listing, plan, run.files.output)
    return plan, spec, weights_proof


def _require_listed(listing: Listing, plan: ReusePlan, output: Path) -> None:
    """Refuse to remove rows because their folder cannot be listed: the images may well be there."""
    for folder in listing.unlisted:
        if not plan.knows_last:
            raise DataError(
                f"the folder {show_path(folder)} cannot be listed, and {output}, whose seal is broken, may "
                "have rows of images in it. Allow reading it, or remove it, then run the same command again."
            )
        lost = sum(path.startswith(folder) for path in plan.removed_ids)
        if lost:
            raise DataError(
                f"the folder {show_path(folder)} cannot be listed, and {lost:,} rows of {output} are of "
                "images in it. Allow reading it, or remove it, then run the same command again."
            )


def _engine_note(plan: ReusePlan, run: Embedding) -> list[str]:
    ready = run.embedder.ready
    if ready is None or not len(plan.pending):
        return []
    others = earlier_engines(plan, ready.engine.name)
    if not others:
        return []
    return [
        f"rows embedded before are by {' and '.join(others)}, those of now by {ready.engine.name}: "
        "the last digits of their features may differ"
    ]


def _how(plan: ReusePlan, weights_proof: str) -> str:
    by_stat = int((plan.origin_store >= 0).sum()) - plan.reread
    reread = f", {plan.reread:,} by the sha256 of their bytes" if plan.reread else ""
    return f"nothing to embed: {by_stat:,} files known by size, times and inode{reread}; {weights_proof}"


def _result(
    run: Embedding, embedded: Embedded, *, spec: FeatureSpec, notes: Sequence[str] = ()
) -> EmbedResult:
    plan, output = embedded.plan, run.files.output
    failures = embedded.failures()
    with disk_errors(output, doing="opening"):
        store_bytes = output.stat().st_size if output.exists() else 0
    return EmbedResult(
        rows=len(plan.table.ids),
        embedded=embedded.computed,
        reused=embedded.reused,
        relabelled=plan.relabelled,
        failed=len(failures),
        removed=plan.removed,
        seconds=0.0,
        images_per_second=embedded.images_per_second,
        fingerprint=spec.fingerprint(),
        store=str(output),
        failures=tuple(failures),
        notes=tuple(notes),
        store_bytes=store_bytes,
        slowest_stage=embedded.slowest_stage,
    )
