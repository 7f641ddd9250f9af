"""What checking every block at opening costs, against reading the same bytes without a check.

    python scripts/bench_check.py [--megabytes 1024] [--rounds 7] [--folder DIR]

All ways take turns in one process on one warm store of 1,280 float32 features a row; the table has the median
over the rounds, the spread and the ratio to the limit, which is reading the file's bytes into a small buffer
and doing nothing with them. The hardware CRC libraries appear where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import toy_spec
from gaussians import PROVENANCE

from featcache.records import NO_FILE, ImageRecord, RowStatus
from featcache.spec import FeatureNode
from featcache.store import blocks
from featcache.store.creating import create_store
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

WIDTH = 1280
BLOCK_ROWS = 256


def write_store(path: Path, n_rows: int) -> None:
    records = tuple(
        ImageRecord(path=f"c{r % 10}/{r:08d}.jpg", stat=NO_FILE, label=f"c{r % 10}") for r in range(n_rows)
    )
    create_store(
        path,
        spec=toy_spec(nodes=(FeatureNode(name="penultimate", num_features=WIDTH),)),
        table=RowTable.from_records(records, tuple(f"c{i}" for i in range(10))),
        provenance=PROVENANCE,
        block_rows=BLOCK_ROWS,
    )
    store = FeatureStore.open(path)
    rng = np.random.default_rng(0)
    with StoreWriter(store.layout) as writer:
        for block in range(store.layout.n_blocks):
            rows = store.layout.rows_of(block)
            n = rows.stop - rows.start
            writer.write_block(
                block,
                features={"penultimate": rng.standard_normal((n, WIDTH), dtype=np.float32)},
                row_status=np.full(n, RowStatus.OK, dtype=np.uint8),
                sources=np.zeros(n, SOURCE_DTYPE),
            )


def read_only(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def checked_by(function: Callable[..., int]) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        blocks.crc32_function = lambda: function  # type: ignore[assignment]
        FeatureStore.open(path)

    return check


def ways() -> dict[str, Callable[[Path], object]]:
    found: dict[str, Callable[[Path], object]] = {
        "limit: bytes read, nothing done": read_only,
        "open, no check": lambda path: FeatureStore.open(path, check=False),
        "open, check by zlib": checked_by(zlib.crc32),
    }
    for module in ("isal.isal_zlib", "zlib_ng.zlib_ng"):
        try:
            found[f"open, check by {module.split('.')[0]}"] = checked_by(
                importlib.import_module(module).crc32
            )
        except ImportError:
            continue
    found["h5py reads the dataset"] = lambda path: h5py.File(path)["features/penultimate"][:]
    found["open, no check, then one X.sum()"] = lambda path: (
        FeatureStore.open(path, check=False).features().X.sum(dtype=np.float32)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "bench.h5")
        write_store(path, options.megabytes * 1_000_000 // (4 * WIDTH))
        size = os.path.getsize(path) / 1e9
        seconds: dict[str, list[float]] = {name: [] for name in ways()}
        for _ in range(options.rounds + 1):
            for name, way in ways().items():
                begun = time.perf_counter()
                way(path)
                seconds[name].append(time.perf_counter() - begun)
    limit = statistics.median(seconds["limit: bytes read, nothing done"][1:])
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, Python "
        f"{platform.python_version()}, a store of {size:.2f} GB, median of {options.rounds} rounds"
    )
    print(f"{'way':36} {'s':>7} {'min':>7} {'max':>7} {'GB/s':>7} {'limit ×':>8}")
    for name, values in seconds.items():
        kept = values[1:]  # the first warms the page cache
        middle = statistics.median(kept)
        print(
            f"{name:36} {middle:7.3f} {min(kept):7.3f} {max(kept):7.3f} {size / middle:7.1f} "
            f"{middle / limit:8.2f}"
        )


if __name__ == "__main__":
    main()
