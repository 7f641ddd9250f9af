"""Images per second of the forward pass on the CPU. Seeded random weights, pixels in memory.

    python scripts/bench_engine.py engines [--rounds 7] [--backbone resnet50] [--batch-size 8] [--threads 2]
    python scripts/bench_engine.py memory [--rounds 5] [--backbone efficientnet_lite0]

`engines`: every engine installed here at each of its batch sizes, called by as many threads at once as in a
run; they take turns in one process after a comparison with the eager one.
`memory`: the eager engine by batch size, with freed memory kept, or given back to the system as the C library
does by default; the two take turns in processes of their own, since the setting is a process's.

The tables have the median over the rounds, and the median and range of the ratio round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featcache.processors import usable_processors

if TYPE_CHECKING:
    from featcache.backbones import Backbone
    from featcache.engines import Engine
    from featcache.engines.choice import Candidate

BACKBONES = {
    "engines": ("efficientnet_lite0", "resnet18", "resnet50"),
    "memory": ("efficientnet_lite0", "resnet18"),
}
BATCH_SIZES = (4, 8, 16, 32)


@dataclass
class Made:
    """An engine, what it took to make it, and how far it is from the eager one."""

    engine: Engine
    seconds: float
    cosine: float
    speeds: list[float] = field(default_factory=list)


def make_all(backbone: Backbone, *, batch_size: int | None) -> dict[Candidate, Made]:
    """The eager engine first; one that cannot be had here is left out with a line."""
    from featcache.engines import DEFAULT_ENGINE, batch_sizes, make_engine, other_engines
    from featcache.engines.agreement import compare_engines, probe_pixels
    from featcache.engines.choice import Candidate
    from featcache.errors import DeviceError

    pixels = probe_pixels(backbone.preprocessing.crop_size, None)
    made: dict[Candidate, Made] = {}
    for name in (DEFAULT_ENGINE, *other_engines()):
        for size in [batch_size] if batch_size else batch_sizes(name, "cpu"):
            begun = time.perf_counter()
            try:
                engine = make_engine(backbone, device="cpu", batch_size=size, engine=name)
            except DeviceError as error:
                print(f"{name}: {error}")
                break
            seconds = time.perf_counter() - begun
            reference = next(iter(made.values())).engine if made else engine
            cosine = compare_engines(engine, reference, pixels).cosine
            made[Candidate(name, size)] = Made(engine, seconds, cosine)
    return made


def compare(name: str, *, rounds: int, batch_size: int | None, threads: int) -> None:
    from featcache.backbones import load_backbone
    from featcache.engines.choice import measure_speeds

    backbone = load_backbone(name, weights="random")
    all_made = make_all(backbone, batch_size=batch_size)
    engines = {candidate: made.engine for candidate, made in all_made.items()}
    for _ in range(rounds):
        speeds = measure_speeds(engines, size=backbone.preprocessing.crop_size, threads=threads)
        for candidate, speed in speeds.items():
            all_made[candidate].speeds.append(speed)
    eager = next(iter(all_made.values()))
    for candidate, made in all_made.items():
        print(
            f"{name:20} {candidate.name:14} {candidate.batch_size:>5} {made.seconds:>7.1f} "
            f"{made.cosine:>10.7f} {statistics.median(made.speeds):>9.1f} "
            f"({min(made.speeds):.0f}-{max(made.speeds):.0f}) {ratio(eager.speeds, made.speeds)}",
            flush=True,
        )


def ratio(base: Sequence[float], other: Sequence[float]) -> str:
    ratios = sorted(b / a for a, b in zip(base, other, strict=True))
    return f"{statistics.median(ratios):>6.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def measure_memory(backbone: str, *, keep: bool) -> dict[str, float]:
    """{batch size: images per second}, in this process."""
    from featcache.backbones import load_backbone
    from featcache.engines import make_engine, torch_eager
    from featcache.engines.agreement import noise

    if not keep:
        torch_eager.keep_freed_memory = lambda: None
    loaded = load_backbone(backbone, weights="random")
    speeds = {}
    for batch_size in BATCH_SIZES:
        engine = make_engine(loaded, device="cpu", batch_size=batch_size)
        pixels = noise(batch_size, loaded.preprocessing.crop_size)
        engine.embed(pixels)
        seconds = []
        for _ in range(max(3, 64 // batch_size)):
            begun = time.perf_counter()
            engine.embed(pixels)
            seconds.append(time.perf_counter() - begun)
        speeds[str(batch_size)] = batch_size / statistics.median(seconds)
    return speeds


def measure_apart(backbone: str, *, keep: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "memory", "--child", backbone, *(["--keep"] if keep else [])]
    speeds: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return speeds


def compare_memory(backbone: str, *, rounds: int) -> None:
    both = [(measure_apart(backbone, keep=False), measure_apart(backbone, keep=True)) for _ in range(rounds)]
    for batch in map(str, BATCH_SIZES):
        plain, kept = [a[batch] for a, _ in both], [b[batch] for _, b in both]
        medians = f"{statistics.median(plain):>9.1f} {statistics.median(kept):>9.1f}"
        print(f"{backbone:20} {batch:>5} {medians} {ratio(plain, kept)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=BACKBONES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", action="append")
    parser.add_argument("--batch-size", type=int, help="of engines; by default all that suit each")
    parser.add_argument(
        "--threads", type=int, default=usable_processors(), help="that call an engine at once"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_memory(options.child, keep=options.keep)))
        return
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} processors, {options.rounds} rounds, load {load}")
    if options.what == "engines":
        print(
            f"{'backbone':20} {'engine':14} {'batch':>5} {'made, s':>7} {'cosine':>10} {'images/s':>9} ratio"
        )
    else:
        print(f"{'backbone':20} {'batch':>5} {'default':>9} {'kept':>9} {'ratio':>18}")
    for backbone in options.backbone or BACKBONES[options.what]:
        if options.what == "engines":
            compare(
                backbone,
                rounds=options.rounds,
                batch_size=options.batch_size,
                threads=options.threads,
            )
        else:
            compare_memory(backbone, rounds=options.rounds)


if __name__ == "__main__":
    main()
