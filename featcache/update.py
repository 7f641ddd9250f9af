"""A store brought up to date with its images: all of it, or one of the shards that make it up.

Each way is driven by `featcache.together`, which fills what is yielded. Knows neither how images are listed
nor what was asked for in which words.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featcache.disk import disk_errors
from featcache.embedding import Embedded, Embedding, OpenedStore, earlier, failure_lines
from featcache.forecast import describe_stages
from featcache.images.paths import show_path
from featcache.keeping import require_kept, require_listed
from featcache.records import Listing
from featcache.reuse import ReusePlan, holds_just, plan_reuse
from featcache.sharding import (
    OWN_PATIENCE,
    Shard,
    plan_part,
    remove_shards,
    turn_to_join,
    wait_for_lock,
)
from featcache.spec import FeatureSpec, require_same_spec
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore
from featcache.words import plural

ListImages = Callable[[], Listing]


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
    stages: Mapping[str, float] = field(default_factory=dict)  # the share of time that each was busy
    dry_run: bool = False
    ways: Mapping[str, Any] = field(
        default_factory=dict
    )  # engine, device, batch size and decoder of this run

    def to_json(self) -> dict[str, Any]:
        """The documented keys, in order."""
        return {
            name: getattr(self, name)
            for name in (
                "rows", "embedded", "reused", "relabelled", "failed", "removed",
                "seconds", "images_per_second", "fingerprint", "store", "dry_run",
            )
        } | {name: self.ways.get(name) for name in ("engine", "device", "batch_size", "decoder")}  # fmt: skip

    def describe(self, *, with_stages: bool = True) -> str:
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
            if self.embedded and self.ways:
                lines.append(
                    "  engine {engine} on {device} in batches of {batch_size}, decoder {decoder}".format(
                        **self.ways
                    )
                )
            speed = f", embedding at {self.images_per_second:,.1f} images/s"
            lines.append(
                f"{self.store}: {self.store_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s in all"
                f"{speed if self.embedded else ''}; fingerprint {self.fingerprint[:12]}"
            )
            if with_stages and self.embedded and self.stages:
                lines.append(describe_stages(self.stages))
        return "\n".join(lines)


@dataclass(frozen=True)
class EmbedResults:
    """What a run over several stores did."""

    of_stores: tuple[EmbedResult, ...]

    def to_json(self) -> dict[str, Any]:
        return {"stores": [result.to_json() for result in self.of_stores]}

    def describe(self) -> str:
        lines = [result.describe(with_stages=False) for result in self.of_stores]
        stages = next((result.stages for result in self.of_stores if result.embedded and result.stages), None)
        return "\n".join([*lines, *([describe_stages(stages)] if stages else [])])


# Yields as `Embedding.carry_out` does, and returns what was done.
Update = Generator[OpenedStore | None, None, EmbedResult]


def update_store(run: Embedding, scan: ListImages) -> Update:
    """Bring the store up to date with all images that `scan` lists."""
    return _update_store(run, scan, lock=write_lock)


def preview_update(run: Embedding, scan: ListImages) -> EmbedResult:
    """What `update_store` would do."""
    listing = scan()
    plan, spec, _ = _plan(run, listing, run.files.open_all())
    planned = Embedded(plan=plan, status=plan.reused_status)
    notes = [*listing.notes, *plan.notes(), *_moved_weights(run, plan)]
    return replace(
        _result(run, planned, spec=spec, notes=notes),
        embedded=len(plan.pending),
        dry_run=True,
    )


def _update_store(
    run: Embedding, scan: ListImages, *, lock: Callable[[Path], AbstractContextManager[None]]
) -> Update:
    # Listed under the lock: what another run adds meanwhile must not look removed.
    with lock(run.files.output):
        return (yield from _run(run, scan()))


def update_shard(run: Embedding, shard: Shard, scan: ListImages, *, dry_run: bool = False) -> Update:
    """The rows of one shard in a store beside the output; then the output, if all shards are complete."""
    part = replace(run, files=run.files.shard(shard.index, shard.count))
    if shard.taken_from:
        run.progress.note(
            f"shard {shard} of the images, as {shard.taken_from} say; --shard 0/1 embeds all of them"
        )
    with nullcontext() if dry_run else wait_for_lock(part.files.output, seconds=OWN_PATIENCE):
        listing = scan()
        stores = [*part.files.open_all(), *run.files.open_all(without_shards_of=shard.count)]
        stores, spec, _ = _settle_spec(run, stores)
        nothing_to_do = any(store.path == run.files.output and holds_just(store, listing) for store in stores)
        if not nothing_to_do:
            result = yield from _run_part(part, shard, listing, stores, spec, dry_run=dry_run)
    if nothing_to_do:
        if dry_run:
            return preview_update(run, scan)
        return (yield from _update_store(run, scan, lock=wait_for_lock))
    return result if dry_run else (yield from _join(run, shard, listing, scan, result))


def _run_part(
    part: Embedding,
    shard: Shard,
    listing: Listing,
    stores: Sequence[FeatureStore],
    spec: FeatureSpec,
    *,
    dry_run: bool,
) -> Update:
    plan, elsewhere = plan_part(listing, stores, shard=shard, part=part.files, workers=part.workers)
    require_listed(listing, plan, part.files)
    if not part.prune:
        # What files beside the shard's own lose is known when the shards are joined. Here it is known only of
        # a data set that has nothing to do with them, and hours before.
        unrelated = not elsewhere and not (plan.origin_store >= 0).any() and len(plan.pending)
        caches = [cache for cache in plan.caches if unrelated or part.files.has(cache.store.path)]
        require_kept(listing, plan, caches, data=part.data["path"])
    if dry_run:
        planned = Embedded(plan=plan, status=plan.reused_status)
        result = _result(part, planned, spec=spec, notes=listing.notes)
        return replace(result, embedded=len(plan.pending), dry_run=True)
    part = replace(part, also_recorded=shard.record(elsewhere=elsewhere))
    embedded = yield from part.carry_out(plan, spec)
    notes = [*listing.notes, *embedded.notes, *_other_ways(plan, part)]
    if elsewhere:
        notes.append(f"{plural(elsewhere, 'image')} of the shard known in other files beside it")
    return _result(part, embedded, spec=spec, notes=notes)


def _join(run: Embedding, shard: Shard, listing: Listing, scan: ListImages, result: EmbedResult) -> Update:
    """What the rank did as part of the whole, where it is its turn to join the shards."""
    with turn_to_join(run.files, shard, listing, fingerprint=result.fingerprint) as turn:
        why_not = turn.why_not
        if not why_not:
            listing = scan()
            why_not = turn.unlisted(listing)
        if why_not:
            store = str(run.files.output) if turn.joined else result.store
            notes = (*result.notes, f"shard {shard} is complete; {why_not}")
            return replace(result, store=store, notes=notes)
        whole = yield from _run(run, listing)
    # That nothing was to embed is true of the join, and not what the rank did.
    notes = whole.notes if whole.embedded else result.notes
    embedded = min(result.embedded + whole.embedded, whole.rows - whole.failed)
    return replace(
        whole,
        embedded=embedded,
        reused=whole.rows - whole.failed - embedded,
        images_per_second=result.images_per_second or whole.images_per_second,
        stages=result.stages or whole.stages,
        ways=result.ways or whole.ways,
        notes=(*notes, f"{plural(shard.count, 'shard')} joined into {show_path(whole.store)}"),
    )


def _run(run: Embedding, listing: Listing) -> Update:
    stores = run.files.open_all()
    plan, spec, weights_proof = _plan(run, listing, stores)
    moved = _moved_weights(run, plan)
    embedded = yield from run.carry_out(plan, spec)
    remove_shards(run.files, stores)
    notes = [*listing.notes, *plan.notes(), *embedded.notes, *_other_ways(plan, run), *moved]
    if not len(plan.pending):
        notes.append(_how(plan, weights_proof))
    return _result(run, embedded, spec=spec, notes=notes)


def _plan(
    run: Embedding, listing: Listing, stores: Sequence[FeatureStore]
) -> tuple[ReusePlan, FeatureSpec, str]:
    """What to do, for which spec, and how that is known to be the one asked for."""
    stores, spec, weights_proof = _settle_spec(run, stores)
    own = [store for store in stores if run.files.has(store.path)]
    if len(own) < len(stores) and own and holds_just(own[-1], listing):
        stores = own  # shards that were joined, and not removed since that run was killed
    plan = plan_reuse(listing, stores, workers=run.workers)
    require_listed(listing, plan, run.files)
    if not run.prune:
        require_kept(listing, plan, plan.caches, data=run.data["path"])
    return plan, spec, weights_proof


def _settle_spec(
    run: Embedding, stores: Sequence[FeatureStore]
) -> tuple[list[FeatureStore], FeatureSpec, str]:
    """The stores that have something to offer, the spec asked for, and how it is known."""
    spec, proof = run.embedder.settle_spec(stores, output=run.files.output)
    with disk_errors(run.files.output, doing="opening"):
        shards = {files.output for files in run.files.shards.values()}
    for store in stores:
        if store.path in shards:
            require_same_spec(store.spec, spec, where=show_path(store.path))
    # A growth of another spec than the store's, left by whatever way, has nothing to offer.
    return [store for store in stores if store.fingerprint == spec.fingerprint()], spec, proof


def _other_ways(plan: ReusePlan, run: Embedding) -> list[str]:
    ready = run.embedder.ready
    if ready is None or not len(plan.pending):
        return []
    notes = []
    if engines := earlier(plan, "engine", ready.engine.name):
        notes.append(
            f"rows embedded before are by {' and '.join(engines)}, those of now by {ready.engine.name}: "
            "the last digits of their features may differ"
        )
    if decoders := earlier(plan, "decoder", ready.decoder):
        notes.append(
            f"rows embedded before are by the decoder {' and '.join(decoders)}, those of now by "
            f"{ready.decoder}: their features differ a little"
        )
    return notes


def _moved_weights(run: Embedding, plan: ReusePlan) -> list[str]:
    """What is said where the store is to record another place of its weights file."""
    stores = [cache.store for cache in plan.caches if cache.store.path == run.files.output]
    weights = run.embedder.weights or {}
    return [
        f"the weights file is {show_path(weights['path'])}; {show_path(place)}, where it was, has it no more"
        for store in stores
        if (place := run.embedder.left_place(store))
    ]


def _ways(run: Embedding) -> dict[str, Any]:
    ready = run.embedder.ready
    if ready is None:
        return {}
    engine = ready.engine
    return {
        "engine": engine.name,
        "device": engine.device,
        "batch_size": engine.batch_size,
        "decoder": ready.decoder,
    }


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
        stages=embedded.stages,
        ways=_ways(run) if embedded.computed else {},
    )
