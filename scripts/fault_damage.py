"""Damage a store at rest in every part and by every kind of mishap; each must be found, with the right rows.

    python scripts/fault_damage.py --rounds 10000 --seed 0

Prints tried/detected for every part and kind, and exits 1 if any damage went unnoticed, was reported in other
rows than it is in, or was served. `--only SEED` repeats one round.
"""

from __future__ import annotations

import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import h5py
import numpy as np
from faults.damage import KINDS, Damaged, Truth, choose_change, find_fault, make_versions, parts_of
from faults.seeds import each_seed, parser_of_seeds, seeds_of


def main() -> int:
    seeds = seeds_of(parser_of_seeds(__doc__ or "").parse_args())
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder) / "store.h5", seeds)


def run(path: Path, seeds: Sequence[int]) -> int:
    versions = make_versions(path)
    truth, parts = Truth.of(path, versions), parts_of(path, versions.now)
    tried: Counter[tuple[str, str]] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    unchanged, faults = 0, []
    began = time.monotonic()
    say = partial(print, flush=True)
    for seed in each_seed(seeds, so_far=lambda: f"{tried.total():,} rounds, {len(faults)} faults", say=say):
        rng = random.Random(seed)
        part, kind = rng.choice(list(parts)), rng.choice(list(KINDS))
        change = choose_change(rng, parts[part], kind, versions)
        if change is None:
            unchanged += 1
            continue
        with Damaged(path, change, versions.now):
            fault = find_fault(path, truth, change)
        tried[part, kind] += 1
        found[part, kind] += fault is None
        if fault is not None:
            faults.append(seed)
            print(f"seed {seed}: {kind} in {part} at {change.offset}: {fault}", flush=True)
    print_table(parts, tried, found)
    if path.read_bytes() != versions.now:
        raise RuntimeError("the store was not put back as it was")
    print(
        f"{tried.total():,} changes, {found.total():,} detected rightly, {len(faults)} faults; "
        f"{unchanged:,} rounds had nothing to change; {time.monotonic() - began:.0f} s"
    )
    print(
        f"store of {len(versions.now):,} bytes; Python {platform.python_version()}, h5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}, numpy {np.__version__}, {platform.machine()}"
    )
    return 1 if faults else 0


def print_table(
    parts: dict[str, list[range]], tried: Counter[tuple[str, str]], found: Counter[tuple[str, str]]
) -> None:
    width = max(map(len, parts))
    print(" " * width, *(f"{kind:>15}" for kind in KINDS))
    for part in parts:
        cells = (f"{found[part, kind]}/{tried[part, kind]}" for kind in KINDS)
        print(f"{part:{width}}", *(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
