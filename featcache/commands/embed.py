"""`featcache embed`: a data set of images in, a feature store out, computing only what the cache lacks."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import versions
from featcache.backbones import load_backbone, prove_weights
from featcache.backbones.weights import RANDOM
from featcache.disk import disk_errors, sync_directory
from featcache.engines import Engine, make_engine
from featcache.errors import SpecMismatch, StoreError, TooManyFailures
from featcache.filling import StoreFilling
from featcache.images import scan_images
from featcache.images.paths import resolve
from featcache.pipeline import EmbeddedBatch, StageSeconds, default_workers, embed_files
from featcache.progress import Progress, SilentProgress
from featcache.records import Listing, RowStatus
from featcache.reuse import ReusePlan, plan_reuse
from featcache.spec import PENULTIMATE, FeatureSpec, Precision, StoreDtype, require_same_spec
from featcache.store.layout import create_store
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

BLOCK_ROWS = 256  # about; a multiple of the batch size, so that a resumed run forms the same batches


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """What the user asked for, as far as it determines the features. Recorded in the store's provenance."""

    backbone: str
    weights: str | None
    seed: int
    nodes: tuple[str, ...]
    precision: Precision
    store_dtype: StoreDtype

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "nodes": list(self.nodes)}


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
                "seconds", "images_per_second", "fingerprint", "store",
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
        lines += [f"  failed: {path}: {why}" for path, why in self.failures[:10]]
        if len(self.failures) > 10:
            lines.append(
                f"  … and {len(self.failures) - 10:,} more; `featcache info {self.store}` lists them"
            )
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
    max_failures: the fraction of images that may fail before the run stops with TooManyFailures; one image
        may always fail.

    Images whose row is in the store already are not opened. Raises DataError, BackboneError, DeviceError,
    SpecMismatch (the store holds features of another spec), StoreLocked, DiskError; whatever is raised,
    every acknowledged block is kept and the same call goes on from there.
    """
    begun = time.perf_counter()
    run = _Run(
        output=Path(os.path.realpath(output)) if os.path.islink(output) else Path(output),
        request=EmbedRequest(
            backbone=backbone,
            weights=_absolute(weights),
            seed=seed,
            nodes=tuple(nodes),
            precision=precision,
            store_dtype=store_dtype,
        ),
        device=device,
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
        max_failures=max_failures,
        progress=progress or SilentProgress(),
    )
    if run.workers < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError("workers and batch_size are at least 1")
    listing = scan_images(Path(data), root=None if root is None else Path(root), follow_links=follow_links)
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(write_lock(run.output))
        result = run.dry(listing) if dry_run else run.embed(listing)
    return replace(result, seconds=round(time.perf_counter() - begun, 3))


def _absolute(weights: str | None) -> str | None:
    """A weights file by its absolute path, so that the request means the same from every directory."""
    return str(Path(weights).absolute()) if weights and weights != RANDOM else weights


@dataclass(kw_only=True)
class _Run:
    """One call of `embed`: what it was asked, and the engine once it is needed."""

    output: Path
    request: EmbedRequest
    device: str
    batch_size: int | None
    workers: int
    max_failures: float
    progress: Progress
    spec: FeatureSpec | None = None
    engine: Engine | None = None
    weights: Mapping[str, Any] | None = None

    @property
    def growths(self) -> list[Path]:
        """The unfinished growths there are, oldest first: `STORE.growing`, `STORE.growing.1`, …

        A growth that no longer fits is not replaced but joined by a further one, since its rows may be in
        no other file.
        """
        found: list[Path] = []
        while self._growth(len(found)).exists():
            found.append(self._growth(len(found)))
        return found

    def _growth(self, number: int) -> Path:
        return self.output.with_name(self.output.name + ".growing" + (f".{number}" if number else ""))

    def dry(self, listing: Listing) -> EmbedResult:
        stores = self._open_stores()
        spec, _ = self._settle_spec(stores)
        stores = [store for store in stores if store.fingerprint == spec.fingerprint()]
        plan = self._plan(listing, stores)
        status = plan.reused_status
        return self._result(plan, spec=spec, status=status, embedded=len(plan.pending), dry_run=True)

    def embed(self, listing: Listing) -> EmbedResult:
        stores = self._open_stores()
        spec, how = self._settle_spec(stores)
        # A growth of another spec than the store's, left by whatever way, has nothing to offer.
        stores = [store for store in stores if store.fingerprint == spec.fingerprint()]
        plan = self._plan(listing, stores)
        index = next((i for i in range(len(stores)) if plan.can_continue(i)), None)
        if index is not None and not len(plan.pending):
            self._take_name(stores[index].path)
            status = plan.reused_status
            self._stop_if_too_many(status, plan, {})
            return self._result(plan, spec=spec, status=status, notes=(*listing.notes, self._how(plan, how)))

        target = stores[index] if index is not None else self._create(plan, spec)
        filling = StoreFilling(plan, target)
        stages = StageSeconds()
        begun = time.perf_counter()
        if len(plan.pending):
            # Read before the engine is made: a resumed run uses the batch size the store began with.
            self._make_engine(target)
        self._fill(filling, stages)
        seconds = time.perf_counter() - begun
        self._take_name(target.path)
        done = int((filling.status[plan.pending] == RowStatus.OK).sum())
        slowest = max(stages.as_dict(), key=lambda name: stages.as_dict()[name])
        result = self._result(
            plan,
            spec=spec,
            status=filling.status,
            embedded=done,
            reasons=filling.reasons,
            notes=(*listing.notes, *filling.notes(), *([] if len(plan.pending) else [self._how(plan, how)])),
        )
        return replace(
            result,
            images_per_second=round(len(plan.pending) / seconds, 2) if done else 0.0,
            slowest_stage=slowest,
        )

    def _open_stores(self) -> list[FeatureStore]:
        """Unfinished growths first, so that its newer rows are found first; then the store itself."""
        stores = []
        with disk_errors(self.output, doing="opening"):
            for path in reversed(self.growths):
                with suppress(StoreError):  # what a damaged growth held is computed again
                    stores.append(FeatureStore.open(path, check=False))
            if self.output.exists():
                stores.append(FeatureStore.open(self.output, check=False))
        return stores

    def _settle_spec(self, stores: Sequence[FeatureStore]) -> tuple[FeatureSpec, str]:
        """The spec asked for and how it is known; SpecMismatch when a store holds another."""
        for store in reversed(stores):
            proof = prove_weights(store.provenance, self.request.as_json())
            if proof:
                self._require_same(stores, store.spec)
                self.spec = store.spec
                return store.spec, proof
        for store in stores:
            self._require_same_backbone(store)
        spec = self._load_engine(batch_size=self._recorded_batch_size(stores))
        self._require_same(stores, spec)
        return spec, f"weights {spec.weights_sha256[:12]} loaded and compared"

    def _require_same(self, stores: Sequence[FeatureStore], spec: FeatureSpec) -> None:
        for store in stores:
            if store.path == self.output:
                require_same_spec(store.spec, spec, where=str(self.output))

    def _require_same_backbone(self, store: FeatureStore) -> None:
        """Refuse another backbone by its name alone, before its weights are looked for."""
        have, want = store.spec.backbone, self.request.backbone.partition("@")[0]
        if have != want:
            raise SpecMismatch(
                f"{self.output} holds {have} features: backbone is {have}, not {want}. "
                f"Choose another --output, or pass --backbone {have}."
            )

    def _recorded_batch_size(self, stores: Sequence[FeatureStore]) -> int | None:
        return self.batch_size or (stores[0].provenance.get("batch_size") if stores else None)

    def _load_engine(self, *, batch_size: int | None) -> FeatureSpec:
        request = self.request
        backbone = load_backbone(request.backbone, weights=request.weights, seed=request.seed)
        self.engine = make_engine(
            backbone,
            nodes=request.nodes,
            device=self.device,
            precision=request.precision,
            batch_size=batch_size,
        )
        self.weights = asdict(backbone.weights)
        self.spec = FeatureSpec(
            backbone=backbone.name,
            weights_sha256=backbone.weights.sha256,
            nodes=self.engine.nodes,
            preprocessing=backbone.preprocessing,
            compute_dtype=request.precision,
            store_dtype=request.store_dtype,
        )
        return self.spec

    def _make_engine(self, target: FeatureStore) -> None:
        if self.engine is None:
            spec = self._load_engine(batch_size=self._recorded_batch_size([target]))
            require_same_spec(target.spec, spec, where=str(self.output))

    def _plan(self, listing: Listing, stores: Sequence[FeatureStore]) -> ReusePlan:
        return plan_reuse(listing, stores, workers=self.workers)

    def _create(self, plan: ReusePlan, spec: FeatureSpec) -> FeatureStore:
        """A new store for the plan's rows: under the output's name if that is free, beside it otherwise."""
        path = self._growth(len(self.growths)) if self.output.exists() else self.output
        if self.engine is None and len(plan.pending):
            self._make_engine(plan.caches[-1].store)
        old = plan.caches[-1].store.provenance if plan.caches else {}
        batch_size = self.engine.batch_size if self.engine else old["batch_size"]
        provenance = {
            "request": self.request.as_json(),
            "weights": self.weights or old["weights"],
            "versions": versions.installed(),
            "engine": self.engine.name if self.engine else old["engine"],
            "device": self.engine.device if self.engine else old["device"],
            "batch_size": batch_size,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        create_store(
            path,
            spec=spec,
            table=plan.table,
            provenance=provenance,
            block_rows=batch_size * max(1, BLOCK_ROWS // batch_size),
        )
        return FeatureStore.open(path, check=False)

    def _take_name(self, path: Path) -> None:
        """A finished growth takes the store's name; readers of the old file keep it."""
        with disk_errors(self.output, doing="renaming"):
            growths = self.growths
            if path != self.output:
                os.replace(path, self.output)
                sync_directory(self.output.parent)
            for growth in reversed(growths):
                growth.unlink(missing_ok=True)

    def _fill(self, filling: StoreFilling, stages: StageSeconds) -> None:
        plan = filling.plan
        with StoreWriter(filling.target.layout) as writer:
            try:
                if len(plan.pending):
                    self.progress.start("embedding", total=len(plan.pending), unit="images")
                for batch in self._batches(plan, stages):
                    filling.add(batch)
                    begun = time.perf_counter()
                    self._write_ready(filling, writer)
                    stages.writing += time.perf_counter() - begun
                    self.progress.advance(len(batch.outcomes), stages=stages.as_dict())
                self._write_ready(filling, writer)
            except KeyboardInterrupt as exc:
                writer.commit()
                exc.add_note(
                    f"{filling.written_rows:,} of {len(plan.table.ids):,} rows are kept; "
                    "run the same command again to go on"
                )
                raise
            finally:
                self.progress.finish()

    def _batches(self, plan: ReusePlan, stages: StageSeconds) -> Iterator[EmbeddedBatch]:
        if self.engine is None or self.spec is None:
            return iter(())
        root, records = plan.listing.root, plan.listing.records
        files = [resolve(root, records[row].path) for row in plan.pending]
        return embed_files(
            files,
            engine=self.engine,
            preprocessing=self.spec.preprocessing,
            workers=self.workers,
            stages=stages,
        )

    def _write_ready(self, filling: StoreFilling, writer: StoreWriter) -> None:
        if filling.write_ready(writer):
            self._stop_if_too_many(filling.status, filling.plan, filling.reasons)

    def _stop_if_too_many(
        self, status: NDArray[np.uint8], plan: ReusePlan, reasons: Mapping[int, str]
    ) -> None:
        failures = _failures(plan, status, reasons)
        if len(failures) <= max(1, self.max_failures * len(status)):
            return
        shown = "; ".join(f"{path}: {why}" for path, why in failures[:5])
        raise TooManyFailures(
            f"{len(failures):,} of {len(status):,} images failed, "
            f"more than the {self.max_failures:.1%} allowed: {shown}{'; …' if len(failures) > 5 else ''}. "
            "Mend or remove them, or allow more with --max-failures, then run the same command again: "
            "what was embedded is kept."
        )

    def _how(self, plan: ReusePlan, weights_proof: str) -> str:
        by_stat = int((plan.origin_store >= 0).sum()) - plan.reread
        reread = f", {plan.reread:,} by the sha256 of their bytes" if plan.reread else ""
        return f"nothing to embed: {by_stat:,} files known by size, mtime and ctime{reread}; {weights_proof}"

    def _result(
        self,
        plan: ReusePlan,
        *,
        spec: FeatureSpec,
        status: NDArray[np.uint8],
        embedded: int = 0,
        reasons: Mapping[int, str] | None = None,
        notes: Sequence[str] = (),
        dry_run: bool = False,
    ) -> EmbedResult:
        failures = _failures(plan, status, reasons or {})
        reused = int(((plan.origin_store >= 0) & (status == RowStatus.OK)).sum())
        return EmbedResult(
            rows=len(plan.table.ids),
            embedded=embedded,
            reused=reused,
            relabelled=plan.relabelled,
            failed=len(failures),
            removed=plan.removed,
            seconds=0.0,
            images_per_second=0.0,
            fingerprint=spec.fingerprint(),
            store=str(self.output),
            failures=tuple(failures),
            notes=tuple(notes) if not dry_run else plan.listing.notes,
            store_bytes=self.output.stat().st_size if self.output.exists() else 0,
            dry_run=dry_run,
        )


def _failures(
    plan: ReusePlan, status: NDArray[np.uint8], reasons: Mapping[int, str]
) -> list[tuple[str, str]]:
    rows = np.flatnonzero((status != RowStatus.OK) & (status != RowStatus.PENDING))
    return [(plan.table.ids[row], reasons.get(int(row), RowStatus(int(status[row])).words)) for row in rows]
