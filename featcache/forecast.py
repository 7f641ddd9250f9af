"""What a run over a data set will take, from some seconds of it: time, disk, memory, and its wall.

The wall is the stage that the others wait for. Runs the pipeline itself over images from all over the data
set, in memory, and writes nothing. What is said of a run that was not measured is never a speed.
"""

from __future__ import annotations

import itertools
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featcache.disk import open_regular
from featcache.embedder import ReadyEngine
from featcache.embedding import BLOCK_ROWS
from featcache.engines.lower_precision import LowerPrecision
from featcache.images.decode import MAX_PIXELS, SCALED_KEEPS, LoadedPictures
from featcache.images.identity import ImageFailure
from featcache.images.opening import OpenImage, Refused
from featcache.images.paths import resolve
from featcache.lanes import Lane, Stages
from featcache.pipeline import Load, embed_lanes, loader
from featcache.reuse import ReusePlan
from featcache.spec import FeatureSpec, Picture, Precision
from featcache.store.creating import store_size
from featcache.store.layout import RowTable

SAMPLE_SECONDS = 2.0  # of steady work
MOST_SAMPLED = 1 << 16  # images; more than any machine decodes in that time
# Batches a thread: those before the first mark fill the pipeline and make what each thread needs; and so
# many must come after it that it matters little where the marks fall within one.
_WARMING, _COUNTED = 2, 3
_PROBED = 8  # one image of so many is read twice, to know what reading takes: of small ones it is no trifle
_HEADERS = 64  # images whose size is looked at, at most
# What a run keeps of a row besides its listing and plan, which are in memory already when it is forecast:
# paths, sources and what is expected, as measured over 60,000 rows.
_BYTES_A_ROW = 400

STAGE_WORDS = {
    "forward": "the network",
    "decoding": "decoding",
    "reading": "reading",
    "writing": "writing",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some seconds of a run.

    seconds, images, stages: of steady work; stages hold for each the share of the time its threads were busy.
    begun_seconds, begun_images: of the start before it, which a run has once.
    """

    images: int
    seconds: float
    stages: Mapping[str, float]
    begun_seconds: float = 0.0
    begun_images: int = 0
    failed: int = 0
    shrinkable: float = 0.0  # the share of images that are JPEGs large enough for their decoder to shrink

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def wall(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name], default="")

    def seconds_for(self, images: int) -> float:
        """What a run over so many images takes, from its first to its last."""
        return self.begun_seconds + max(0, images - self.begun_images) / max(self.images_per_second, 1e-9)


def take_sample(plan: ReusePlan, ready: ReadyEngine, *, workers: int) -> Sample:
    """Embed pending images as a run would, in memory, for SAMPLE_SECONDS once it is under way."""
    pending = plan.pending.tolist()
    rows = [pending[i] for i in spread(len(pending))[:MOST_SAMPLED]]
    files = [resolve(plan.root, plan.table.ids[row]) for row in rows]
    lane = Lane(engine=ready.engine, pictures=ready.spec.pictures(), rows=range(len(files)))
    probe = _Probe(loader(ready.decoder), least=SCALED_KEEPS * ready.spec.preprocessing.resize_size)
    stages, failed = Stages(), 0
    at_once = (ready.engine.callers or workers) * ready.engine.batch_size  # images in the forward pass

    marks = [_Mark.now(0, stages, probe)]
    first = marks[0]
    with closing(embed_lanes(files, [lane], load=probe, workers=workers, stages=stages)) as batches:
        for _, batch in batches:
            failed += sum(isinstance(outcome, ImageFailure) for outcome in batch.outcomes)
            marks.append(_Mark.now(marks[-1].images + len(batch.outcomes), stages, probe))
            first = next((mark for mark in marks if mark.images >= _WARMING * at_once), marks[-1])
            enough = marks[-1].images - first.images >= _COUNTED * at_once
            if enough and marks[-1].at - first.at >= SAMPLE_SECONDS:
                break
    if marks[-1].images == len(pending) or first is marks[-1]:
        first = marks[0]
    return _between(marks[0], first, marks[-1], failed=failed, shrinkable=probe.shrinkable)


def spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly."""
    step = next((s for s in range(round(count * 0.618), count) if math.gcd(s, count) == 1), 1)
    return [i * step % count for i in range(count)]


def _between(start: _Mark, first: _Mark, last: _Mark, *, failed: int, shrinkable: float) -> Sample:
    seconds = last.at - first.at
    return Sample(
        images=last.images - first.images,
        seconds=seconds,
        stages={
            name: min(1.0, max(0.0, busy - first.busy[name]) / max(seconds, 1e-9))
            for name, busy in last.busy.items()
        },
        begun_seconds=first.at - start.at,
        begun_images=first.images,
        failed=failed,
        shrinkable=shrinkable,
    )


@dataclass(frozen=True)
class _Mark:
    """A moment of a run: images done until then, and the seconds the threads of each stage were busy."""

    at: float
    images: int
    busy: Mapping[str, float]

    @classmethod
    def now(cls, images: int, stages: Stages, probe: _Probe) -> _Mark:
        busy = stages.as_dict()
        reading = min(probe.reading / stages.decoding_threads, busy["decoding"])
        return cls(
            time.perf_counter(),
            images,
            {"reading": reading, "decoding": busy["decoding"] - reading, "forward": busy["forward"]},
        )


@dataclass(eq=False)
class _Probe:
    """Loads images as a run does, reading some of them before: what that takes is waiting for the disk.

    reading: seconds of all threads, were each image read so. shrinks: whether its decoder could shrink it.
    """

    load: Load
    least: int
    reading: float = 0.0
    shrinks: list[bool] = field(default_factory=list)
    _loaded: Iterator[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, file: Path, pictures: Sequence[Picture]) -> LoadedPictures | ImageFailure:
        if next(self._loaded) % _PROBED == 0:
            self._look_at(file)
        return self.load(file, pictures)

    def _look_at(self, file: Path) -> None:
        begun = time.perf_counter()
        data = b""
        with suppress(OSError), open_regular(file) as opened:
            data = opened.read()
        seconds = time.perf_counter() - begun
        with self._lock:
            self.reading += _PROBED * seconds
        if data and len(self.shrinks) < _HEADERS:
            with suppress(Refused):
                self.shrinks.append(OpenImage(data, max_pixels=MAX_PIXELS).shrink_to(self.least) > 1)

    @property
    def shrinkable(self) -> float:
        return float(np.mean(self.shrinks)) if self.shrinks else 0.0


def measure_store(table: RowTable, spec: FeatureSpec, *, provenance: Mapping[str, object]) -> int:
    """The bytes of a store for these rows: what creating it would lay out."""
    return store_size(spec=spec, table=table, provenance=provenance, block_rows=BLOCK_ROWS)


def peak_memory(rows: int) -> int:
    """The bytes of memory a run over so many rows will have needed, where this process did all but that."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) + rows * _BYTES_A_ROW


def describe_stages(stages: Mapping[str, float]) -> str:
    """Which stage is the wall, in words, of the share of the time that the threads of each were busy."""
    first, *others = sorted(stages.items(), key=lambda stage: -stage[1])
    said = "; ".join(f"{STAGE_WORDS[name]} {share:.0%}" for name, share in others if share >= 0.005)
    wall = f"{STAGE_WORDS[first[0]]} is the wall: {first[1]:.0%} of its threads' time"
    return f"{wall}; {said}" if said else wall


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a sample showed and how it was made: what an advice depends on."""

    sample: Sample
    seconds: float  # of the run to come
    device: str  # its kind in torch's words
    best_device: str
    precision: Precision
    lower: LowerPrecision | None  # where it was tried
    asked_engine: str | None  # None where it was left to featcache
    other_engines: Sequence[str]
    lacks_onnx: bool
    decoder_is_free: bool  # the exact one decodes, and nothing is known against the fast one
    scaled: bool  # JPEGs are shrunk by their decoder already
    workers: int
    processors: int
    goes_on: bool  # in a store that is there, which holds features of one spec

    def waits_for(self, *stages: str) -> bool:
        return self.sample.wall in stages

    @property
    def workers_are_short(self) -> bool:
        """Whether the stage that is the wall is done by the workers, and there are more processors."""
        by_workers = self.device == "cpu" or not self.waits_for("forward")
        return by_workers and self.workers < self.processors


@dataclass(frozen=True)
class Advice:
    """What would move the wall.

    says: with {situation} and {sample} to be filled in. other_features: than those that a store has.
    """

    applies: Callable[[Situation], bool]
    says: str
    other_features: bool = False

    def spell(self, situation: Situation) -> str:
        said = self.says.format(situation=situation, sample=situation.sample)
        anew = self.other_features and situation.goes_on
        return said + ("; not in this store: name a new -o, all images are embedded anew" if anew else "")


ADVICE = (
    Advice(
        lambda s: s.device == "cpu" and s.best_device != "cpu" and s.waits_for("forward"),
        "--device {situation.best_device}: there is one here",
    ),
    Advice(
        lambda s: s.waits_for("forward") and s.device == "cpu" and s.precision == "float32" and s.lacks_onnx,
        "pip install 'featcache[onnx]': ONNX Runtime runs most networks faster on a CPU",
    ),
    Advice(
        lambda s: s.waits_for("forward") and s.asked_engine is not None and bool(s.other_engines),
        "--engine auto: it takes the fastest, and besides {situation.asked_engine} there are others here",
    ),
    Advice(
        lambda s: s.waits_for("forward") and s.device == "cuda" and s.precision == "float32",
        "--precision bfloat16: faster arithmetic, other features, another fingerprint",
        other_features=True,
    ),
    Advice(
        lambda s: s.lower is not None and s.lower.pays,
        "--precision {situation.lower.precision}: the network {situation.lower.times_as_fast:.1f} times as "
        "fast on this processor; other features (lowest cosine {situation.lower.agreement.cosine:.6f} over "
        "{situation.lower.agreement.images} images), another fingerprint",
        other_features=True,
    ),
    Advice(
        lambda s: s.waits_for("decoding") and s.decoder_is_free,
        "--decoder fast: resizes with torch, for the same features within its bound",
    ),
    Advice(
        lambda s: s.waits_for("decoding") and not s.scaled and s.sample.shrinkable >= 0.5,
        "--jpeg-scaled: {sample.shrinkable:.0%} of the images seen are JPEGs large enough to be shrunk while "
        "they are decoded; other pixels, another fingerprint",
        other_features=True,
    ),
    Advice(
        lambda s: s.workers_are_short,
        "--workers {situation.processors}: there are so many processors",
    ),
    Advice(
        lambda s: s.waits_for("reading"),
        "images on a disk of this machine, or more --workers: {sample.stages[reading]:.0%} of their time the "
        "threads that decode wait for files",
    ),
    Advice(
        lambda s: s.seconds >= 600,
        "--shard: several machines embed a part each",
    ),
)


def advise(situation: Situation) -> list[str]:
    """What would move the wall, as far as it applies."""
    return [advice.spell(situation) for advice in ADVICE if advice.applies(situation)]
