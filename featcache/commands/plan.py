"""`featcache plan`: what `embed` with the same options will take, from about two seconds of real work.

Does what `embed` does up to the first row written, then embeds some images in memory. Nothing is written.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from featcache.embedder import ReadyEngine
from featcache.embedding import Embedding, some_pictures
from featcache.engines import AUTO, device_kind, make_engine, other_engines
from featcache.engines.agreement import probe_pixels
from featcache.engines.lower_precision import LowerPrecision
from featcache.errors import DeviceError
from featcache.forecast import (
    Sample,
    Situation,
    advise,
    describe_stages,
    measure_store,
    peak_memory,
    take_sample,
)
from featcache.images import scan_images
from featcache.images.decode import Decoder
from featcache.images.paths import show_path
from featcache.options import EmbedOptions
from featcache.pipeline import decoding
from featcache.processors import usable_processors
from featcache.progress import Progress
from featcache.reuse import ReusePlan, plan_reuse
from featcache.spec import FeatureSpec, JpegScale, Precision, StoreDtype
from featcache.words import plural

_STEPS = {
    "listing": "listing the images",
    "comparing": "comparing them with the store",
    "loading": "loading the network",
    "choosing": "choosing the engine",
    "embedding": "embedding",
}


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What a run will take. rows = to_embed + known.

    seconds: by step; those before embedding are measured, and the run will take them again. stages: for each
    the share of the time that its threads were busy. Bytes of memory are the most at once, of the network
    those of its weights, which are among them.
    """

    rows: int
    to_embed: int
    known: int
    seconds: Mapping[str, float]
    disk_bytes: int
    fingerprint: str
    workers: int
    store: str | None = None
    disk_free_bytes: int | None = None
    memory_bytes: int | None = None
    network_bytes: int | None = None
    sample: Sample | None = None
    lower_precision: LowerPrecision | None = None  # None where nothing was tried
    engine: str | None = None
    decoder: Decoder | None = None
    device: str | None = None
    batch_size: int | None = None
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """The documented keys, in order."""
        sample = self.sample
        return {
            "rows": self.rows,
            "to_embed": self.to_embed,
            "known": self.known,
            "seconds": round(self.total_seconds, 3),
            "steps": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            "images_per_second": sample and round(sample.images_per_second, 2),
            "sample": sample
            and {
                "images": sample.images,
                "seconds": round(sample.seconds, 3),
                "failed": sample.failed,
            },
            "stages": {name: round(share, 4) for name, share in sample.stages.items()} if sample else {},
            "wall": sample and sample.wall,
            "advice": list(self.advice),
            "lower_precision": self.lower_precision and self.lower_precision.to_json(),
            **{
                name: getattr(self, name)
                for name in (
                    "disk_bytes", "disk_free_bytes", "memory_bytes", "network_bytes",
                    "engine", "decoder", "device", "batch_size", "workers", "fingerprint", "store",
                )
            },
        }  # fmt: skip

    def describe(self) -> str:
        """The forecast for a terminal."""
        where = f" in {show_path(self.store)}" if self.store else ""
        lines = [f"{self.rows:,} rows: {self.to_embed:,} to embed, {self.known:,} known{where}"]
        lines += [f"  {note}" for note in self.notes]
        if self.sample is None:
            return "\n".join([*lines, f"nothing to embed: about {self.total_seconds:.1f} s"])
        steps = ", ".join(f"{_STEPS[name]} {_duration(spent)}" for name, spent in self.seconds.items())
        lines += [
            f"about {_duration(self.total_seconds)}: {steps}",
            f"{self.sample.images_per_second:,.1f} images/s over {plural(self.sample.images, 'image')} in "
            f"{self.sample.seconds:.1f} s; {describe_stages(self.sample.stages)}",
            f"engine {self.engine} in batches of {self.batch_size} on {self.device}, decoder {self.decoder}, "
            f"{plural(self.workers, 'worker')}",
            f"disk {_size(self.disk_bytes)}{self._free()}; memory {_size(self.memory_bytes or 0)}, "
            f"of which the network {_size(self.network_bytes or 0)}",
        ]
        if self.sample.failed:
            lines.append(f"{plural(self.sample.failed, 'image')} of those seen cannot be used")
        lower = self.lower_precision
        if lower and not lower.agreement.passed:
            lines.append(
                f"{lower.precision} was tried: its features differ too much ({lower.agreement.describe()})"
            )
        if self.advice:
            lines += ["what would move it:", *(f"  {said}" for said in self.advice)]
        return "\n".join(lines)

    def _free(self) -> str:
        if self.disk_free_bytes is None:
            return ""
        only = "only " if self.disk_free_bytes < self.disk_bytes else ""
        return f", {only}{_size(self.disk_free_bytes)} free there"


def plan(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    backbone: str | None = None,
    weights: str | None = None,
    seed: int | None = None,
    nodes: tuple[str, ...] | None = None,
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    device: str = "auto",
    precision: Precision | None = None,
    store_dtype: StoreDtype | None = None,
    engine: str = AUTO,
    decoder: str = AUTO,
    views: int | None = None,
    jpeg: JpegScale | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Say what `embed` will take, by doing about two seconds of it. Writes nothing.

    output: a store, there or not; rows that it has are not embedded again. The other arguments and what is
    raised are those of `embed`.
    """
    options = EmbedOptions(
        weights=weights,
        seed=seed,
        nodes=nodes,
        views=views,
        precision=precision,
        store_dtype=store_dtype,
        jpeg=jpeg,
        root=root,
        follow_links=follow_links,
        device=device,
        engine=engine,
        decoder=decoder,
        batch_size=batch_size,
        workers=workers,
        max_failures=1.0,
        progress=progress,
    )
    data = Path(data)
    named = "STORE.h5" if output is None else output
    run = options.run(backbone, data=data, output=named, anew=output is None)
    watch = _Watch()
    listing = scan_images(data, root=options.root_path, follow_links=follow_links)
    watch.lap("listing")
    stores = [] if output is None else run.files.open_all()
    spec, proof = run.embedder.settle_spec(stores, output=run.files.output)
    watch.lap("loading")
    known = [store for store in stores if store.fingerprint == spec.fingerprint()]
    to_do = plan_reuse(listing, known, workers=run.workers)
    watch.lap("comparing")
    result = PlanResult(
        rows=len(to_do.table.ids),
        to_embed=len(to_do.pending),
        known=len(to_do.table.ids) - len(to_do.pending),
        seconds=watch.seconds,
        disk_bytes=measure_store(to_do.table, spec, provenance=_provenance(run, None)),
        fingerprint=spec.fingerprint(),
        workers=run.workers,
        store=None if output is None else str(run.files.output),
        disk_free_bytes=None if output is None else _free_bytes(run.files.output),
        notes=(*listing.notes, *to_do.notes()),
    )
    if not len(to_do.pending):
        return replace(result, notes=(*result.notes, proof))
    return _forecast(result, run, to_do, spec, watch, options=options)


def _forecast(
    result: PlanResult,
    run: Embedding,
    to_do: ReusePlan,
    spec: FeatureSpec,
    watch: _Watch,
    *,
    options: EmbedOptions,
) -> PlanResult:
    """With what a sample of the pending rows says."""
    watch.lap("comparing")
    ready = _settle_engine(run, to_do, spec)
    watch.lap("choosing")
    sample = take_sample(to_do, ready, workers=run.workers)
    seconds = {**watch.seconds, "embedding": sample.seconds_for(result.to_embed)}
    memory = peak_memory(result.to_embed)  # before what a run does not do
    lower = _try_lower_precision(run, to_do, ready, sample, batch_size=options.batch_size)
    asked_engine = None if options.engine == AUTO else options.engine
    situation = Situation(
        sample=sample,
        seconds=seconds["embedding"],
        device=device_kind(ready.engine.device),
        best_device=_best_device(),
        precision=spec.compute_dtype,
        lower=lower,
        asked_engine=asked_engine,
        other_engines=[name for name in other_engines(spec.compute_dtype) if name != asked_engine],
        lacks_onnx="onnx" not in other_engines("float32"),
        decoder_is_free=ready.decoder == "exact" and "decoder" not in ready.why,
        scaled=spec.preprocessing.jpeg == "scaled",
        workers=run.workers,
        processors=usable_processors(),
        goes_on=bool(to_do.caches),
    )
    return replace(
        result,
        seconds=seconds,
        disk_bytes=measure_store(to_do.table, spec, provenance=_provenance(run, ready)),
        memory_bytes=memory,
        network_bytes=ready.weights_bytes,
        sample=sample,
        lower_precision=lower,
        engine=ready.engine.name,
        decoder=ready.decoder,
        device=ready.engine.device,
        batch_size=ready.engine.batch_size,
        advice=tuple(advise(situation)),
    )


def _settle_engine(run: Embedding, to_do: ReusePlan, spec: FeatureSpec) -> ReadyEngine:
    """The engine that `run` would take for what is to do."""
    run.settle_engine(to_do, spec)
    ready = run.embedder.ready
    return ready if ready is not None else run.embedder.load()


def _try_lower_precision(
    run: Embedding, to_do: ReusePlan, ready: ReadyEngine, sample: Sample, *, batch_size: int | None
) -> LowerPrecision | None:
    """The network in bfloat16 on pictures of the run, where a run in float32 waits for the processors.

    batch_size: as asked for. That of a store that goes on is one for its own engine.
    """
    from featcache.engines.devices import has_bfloat16_instructions
    from featcache.engines.lower_precision import LOWER, try_lower_precision

    in_float32 = ready.spec.compute_dtype == "float32" and device_kind(ready.engine.device) == "cpu"
    if not in_float32 or sample.wall != "forward" or not has_bfloat16_instructions():
        return None
    with decoding(ready.decoder, isolate=False) as load:
        pictures = some_pictures(to_do, ready.spec, load)
    pixels = probe_pixels(ready.spec.preprocessing.crop_size, lambda: pictures)
    try:
        engine = make_engine(
            ready.backbone,
            nodes=run.embedder.request.nodes,
            device="cpu",
            precision=LOWER,
            batch_size=batch_size,
        )
        return try_lower_precision(engine, ready.engine, pixels, threads=run.workers)
    except (DeviceError, RuntimeError, TypeError):  # the network's own code may know float32 alone
        return None


def _provenance(run: Embedding, ready: ReadyEngine | None) -> Mapping[str, Any]:
    """About what a run records, for its length."""
    return {
        "request": run.embedder.request.as_json(),
        "data": dict(run.data),
        "weights": ready.weights if ready else {},
        "engine_choice": dict(ready.why) if ready else {},
    }


def _best_device() -> str:
    from featcache.engines.devices import find_device

    return find_device("auto").type


def _free_bytes(output: Path) -> int | None:
    """On the disk that the store is to be on; None where that is not there."""
    with suppress(OSError):
        return shutil.disk_usage(output.absolute().parent).free
    return None


class _Watch:
    """The seconds of each step so far."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._at
        self._at = now


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
