"""Open and use stores and models forged by one who knows the formats; none may crash, hang or deceive.

    python scripts/fault_mutants.py --rounds 10000 --seed 0

Prints a table of kind of mutation and outcome, and the seed of every violation; exits 1 if there is one.
`--only SEED`, with the same `--kinds`, repeats one round and keeps its file with `--keep FILE`.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads does not survive a fork
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import h5py
import safetensors
import sklearn
import skops
from faults.mutants import KINDS, Originals, Outcome, try_mutant
from faults.seeds import each_seed, parser_of_seeds, seeds_of


def main() -> int:
    parser = parser_of_seeds(__doc__ or "")
    parser.add_argument("--kinds", default="", help="only the kinds whose name contains this text")
    parser.add_argument("--keep", type=Path, help="where to leave the last mutant")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant"
        code = run(path, seeds_of(asked), [kind for kind in KINDS if asked.kinds in kind])
        if asked.keep is not None:
            shutil.copy(path, asked.keep)
    return code


def run(path: Path, seeds: Sequence[int], kinds: list[str]) -> int:
    originals = Originals.make(path.parent)
    gc.freeze()  # the children need not copy what they only look through
    outcomes: Counter[tuple[str, str]] = Counter()
    violations: dict[str, list[int]] = {}
    began = time.monotonic()
    say = partial(print, flush=True)
    for seed in each_seed(seeds, so_far=lambda: f"{outcomes.total():,} mutants", say=say):
        outcome = try_mutant(seed, originals, path, kinds=kinds)
        outcomes[outcome.kind, outcome.result] += 1
        if outcome.violation is not None:
            note_violation(violations, seed, outcome)
    print_table(outcomes)
    for what, at in violations.items():
        print(f"VIOLATION {len(at)}×, seeds {', '.join(map(str, at[:6]))}: {what}")
    n = sum(map(len, violations.values()))
    print(f"{outcomes.total():,} mutants, {n} violations of {len(violations)} kinds", end="; ")
    print(f"{time.monotonic() - began:.0f} s")
    print(
        f"Python {platform.python_version()}, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}, "
        f"safetensors {safetensors.__version__}, scikit-learn {sklearn.__version__}, "
        f"skops {skops.__version__}, {platform.machine()}"
    )
    return 1 if violations else 0


def note_violation(violations: dict[str, list[int]], seed: int, outcome: Outcome) -> None:
    what = f"{outcome.kind}: {outcome.violation}"
    if what not in violations:
        print(f"seed {seed}: {what}", flush=True)
    violations.setdefault(what, []).append(seed)


def print_table(outcomes: Counter[tuple[str, str]]) -> None:
    results = sorted({result for _, result in outcomes})
    width = max(map(len, results), default=0)
    print(" " * width, *(f"{kind:>22}" for kind in KINDS))
    for result in results:
        print(f"{result:{width}}", *(f"{outcomes[kind, result]:>22,}" for kind in KINDS))


if __name__ == "__main__":
    sys.exit(main())
