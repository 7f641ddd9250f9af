"""What `featcache embed` takes where there is nothing, or next to nothing, to do.

    python scripts/bench_unchanged.py [--files 60000] [--folders 10] [--rounds 5] [--where DIR] [--csv]

Makes a tree of small JPEGs and a store of it with random features, written by the store's own writer under
the spec and provenance that `featcache embed` gives a few of the files. Then whole processes take turns: the
bare interpreter; the limit, which is listing the tree and asking for each file's stat; `featcache embed` with
nothing changed, with one file touched, with one file edited. The table has the median of the wall seconds
over the rounds, their range, and the largest memory where it is more than this script's own.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.images import scan_images
from featcache.images.identity import ImageIdentity, hash_image
from featcache.images.paths import resolve
from featcache.records import RowStatus
from featcache.store.creating import create_store
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

BACKBONE = "efficientnet_lite0"
SAMPLE = 8  # files that are really embedded, for the spec and the provenance
WALK = """
import os, sys
folders = [sys.argv[1]]
while folders:
    with os.scandir(folders.pop()) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.path)
            else:
                entry.stat()
"""


@dataclass(frozen=True)
class Case:
    """A process to be timed, and what happens to the tree before it."""

    name: str
    command: Sequence[str]
    prepare: Callable[[int], None] = lambda _: None
    expected: str = ""  # in what it prints
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def run(self, number: int) -> None:
        self.prepare(number)
        begun = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - begun)
        self.megabytes.append(used.ru_maxrss / (1 << 10))
        if status or self.expected not in said:
            sys.exit(f"{self.name}: status {status}, expected {self.expected!r} in: {said}")


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def make_tree(root: Path, *, files: int, folders: int) -> None:
    """One picture under many names, told apart by a number after its end."""
    picture = jpeg_bytes()
    for folder in range(folders):
        (root / f"class{folder:04d}").mkdir(parents=True)
    for number in range(files):
        path = root / f"class{number % folders:04d}" / f"{number:06d}.jpg"
        path.write_bytes(picture + number.to_bytes(8, "little"))


def make_manifest(root: Path, path: Path) -> None:
    lines = [f"{file.relative_to(root)},{file.parent.name}" for file in sorted(root.rglob("*.jpg"))]
    path.write_text("\n".join(["path,label", *lines, ""]))


def make_store(data: Path, path: Path, *, root: Path | None, sample: FeatureStore) -> None:
    listing = scan_images(data, root=root)
    create_store(
        path,
        spec=sample.spec,
        table=RowTable.from_records(listing.records, listing.classes),
        provenance=sample.provenance,
        block_rows=sample.layout.block_rows,
    )
    layout = FeatureStore.open(path, check=False).layout
    rng = np.random.default_rng(0)
    with StoreWriter(layout) as writer:
        for block in range(layout.n_blocks):
            rows = layout.rows_of(block)
            n = rows.stop - rows.start
            sources = np.zeros(n, SOURCE_DTYPE)
            for i, record in enumerate(listing.records[rows]):
                found = hash_image(resolve(listing.root, record.path))
                assert isinstance(found, ImageIdentity)
                sources[i] = (np.frombuffer(found.sha256, np.uint8), *found.stat.as_tuple())
            writer.write_block(
                block,
                features={
                    name: rng.standard_normal((n, *region.shape[1:]), dtype=np.float32)
                    for name, region in layout.features.items()
                },
                row_status=np.full(n, RowStatus.OK, dtype=np.uint8),
                sources=sources,
            )


def embed_command(data: Path, store: Path) -> list[str]:
    said = ["embed", "-q", str(data), "-o", str(store), "--backbone", BACKBONE]
    return [sys.executable, "-m", "featcache", *said]


def make_cases(tree: Path, data: Path, store: Path, *, options: Sequence[str]) -> list[Case]:
    files = sorted(tree.rglob("*.jpg"))

    def edit(number: int) -> None:
        with files[number * 101 % len(files)].open("ab") as file:
            file.write(b"edited")

    n = len(files)
    nothing = f"{n:,} rows: 0 embedded, {n:,} reused"
    embed = [*embed_command(data, store), *options]
    return [
        Case("bare interpreter", [sys.executable, "-c", "pass"]),
        Case("limit: scandir and stat", [sys.executable, "-c", WALK, str(tree)]),
        Case("embed, nothing changed", embed, expected=nothing),
        Case("embed, one file touched", embed, lambda i: files[i * 103 % n].touch(), expected=nothing),
        Case("embed, one file edited", embed, edit, expected=f"{n:,} rows: 1 embedded, {n - 1:,} reused"),
    ]


def sample_store(folder: Path) -> FeatureStore:
    """A store of a few files as `featcache embed` makes it."""
    few, store = folder / "few", folder / "few.h5"
    make_tree(few, files=SAMPLE, folders=2)
    subprocess.run(embed_command(few, store), check=True, stdout=subprocess.DEVNULL)
    return FeatureStore.open(store)


def measure(folder: Path, *, files: int, folders: int, rounds: int, csv: bool) -> list[Case]:
    tree, store = folder / "photos", folder / "photos.h5"
    make_tree(tree, files=files, folders=folders)
    data = folder / "photos.csv" if csv else tree
    if csv:
        make_manifest(tree, data)
    make_store(data, store, root=tree if csv else None, sample=sample_store(folder))
    cases = make_cases(tree, data, store, options=["--root", str(tree)] if csv else [])
    for number in range(rounds + 1):  # the first one warms the page cache
        for case in cases:
            case.run(number)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=60_000)
    parser.add_argument("--folders", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--csv", action="store_true", help="list the files in a CSV")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.where) as folder:
        cases = measure(
            Path(folder), files=options.files, folders=options.folders, rounds=options.rounds, csv=options.csv
        )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    source = "a CSV of" if options.csv else "a tree of"
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, {source} "
        f"{options.files:,} files in {options.folders:,} folders, {options.rounds} rounds, load {load}"
    )
    # A child begins with the size of the process it was forked from.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 10)
    print(f"{'process':26} {'s':>7} {'min':>7} {'max':>7} {'MB':>7}")
    for case in cases:
        seconds, memory = case.seconds[1:], max(case.megabytes[1:])
        print(
            f"{case.name:26} {statistics.median(seconds):7.3f} {min(seconds):7.3f} {max(seconds):7.3f} "
            f"{f'{memory:.0f}' if memory > own else '-':>7}"
        )


if __name__ == "__main__":
    main()
