"""Images per second of the torch engine on the CPU, by batch size and with freed memory kept or not.

    python scripts/bench_engine.py [--rounds 5] [--backbone efficientnet_lite0 --backbone resnet18]

The baseline is the same engine with the allocator's default behaviour (the C library gives freed activations
back to the system). The two take turns in processes of their own, since the setting is a process's; the table
has the median over the rounds and the ratio round by round. Seeded random weights, pixels in memory.
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

BATCH_SIZES = (4, 8, 16, 32)


def measure(backbone: str, *, keep: bool) -> dict[str, float]:
    """{batch size: images per second}, in this process."""
    import numpy as np

    from featcache.backbones import load_backbone
    from featcache.engines import make_engine, torch_eager

    if not keep:
        torch_eager.keep_freed_memory = lambda: None
    loaded = load_backbone(backbone, weights="random")
    size = loaded.preprocessing.crop_size
    speeds = {}
    for batch_size in BATCH_SIZES:
        engine = make_engine(loaded, device="cpu", batch_size=batch_size)
        pixels = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)
        engine.embed(pixels)
        seconds = []
        for _ in range(max(3, 64 // batch_size)):
            begun = time.perf_counter()
            engine.embed(pixels)
            seconds.append(time.perf_counter() - begun)
        speeds[str(batch_size)] = batch_size / statistics.median(seconds)
    return speeds


def measure_apart(backbone: str, *, keep: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", backbone, *(["--keep"] if keep else [])]
    speeds: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", action="append")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, keep=options.keep)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} processors, {options.rounds} rounds")
    print(f"{'backbone':20} {'batch':>5} {'default':>9} {'kept':>9} {'ratio':>18}")
    for backbone in options.backbone or ["efficientnet_lite0", "resnet18"]:
        rounds = [
            (measure_apart(backbone, keep=False), measure_apart(backbone, keep=True))
            for _ in range(options.rounds)
        ]
        for batch in map(str, BATCH_SIZES):
            plain, kept = [a[batch] for a, _ in rounds], [b[batch] for _, b in rounds]
            ratios = sorted(b / a for a, b in zip(plain, kept, strict=True))
            print(
                f"{backbone:20} {batch:>5} {statistics.median(plain):>9.1f} {statistics.median(kept):>9.1f} "
                f"{statistics.median(ratios):>6.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
