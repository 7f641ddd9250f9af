"""Write the golden files of this format version: a small store of each kind and a model of each kind of head.

    python scripts/make_golden.py tests/golden/format-1

`tests/test_golden.py` reads them from then on. The files of a released version are never written again; a
new format gets a folder of its own. What a store holds follows from `feature` and `golden_records`, which the
test writes down a second time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import toy_spec
from gaussians import PROVENANCE, gaussian_features, write_store

from featcache.commands.fit import fit
from featcache.model import Model
from featcache.records import NO_FILE, ImageRecord, RowStatus
from featcache.store.creating import create_store
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

HEADS: dict[str, dict[str, Any]] = {
    "logistic": {"C": 0.1},
    "ridge": {"alpha": 10.0},
    "knn": {"k": 5},
    "ncm": {},
    "linear": {"weight_decay": 1.0},
}
FAILED_ROW = 6
PENDING_BLOCK = 1


def feature(row: int, column: int) -> float:
    """Exact in float16."""
    return row + column / 8


def golden_records() -> tuple[ImageRecord, ...]:
    splits = ("train", "val", "test", None)
    return tuple(
        ImageRecord(
            path=f"c{row % 2}/é{row:02d}.png" if row else r"c0/\xff and \\.png",
            stat=NO_FILE,
            label=None if row == 9 else f"c{row % 2}",
            split=splits[row % 4],
        )
        for row in range(10)
    )


def write_golden_store(path: Path, *, store_dtype: str, complete: bool) -> None:
    create_store(
        path,
        spec=toy_spec(store_dtype=store_dtype),
        table=RowTable.from_records(golden_records(), ("c0", "c1")),
        provenance=PROVENANCE,
        block_rows=4,
    )
    store = FeatureStore.open(path)
    with StoreWriter(store.layout) as writer:
        for block in range(store.layout.n_blocks):
            if complete or block != PENDING_BLOCK:
                _write_block(store, writer, block)


def _write_block(store: FeatureStore, writer: StoreWriter, block: int) -> None:
    rows = range(*store.layout.rows_of(block).indices(len(store)))
    features = {
        key: np.array([[feature(r, c) for c in range(region.shape[1])] for r in rows], region.dtype)
        for key, region in store.layout.features.items()
    }
    status = np.full(len(rows), RowStatus.OK, dtype=np.uint8)
    if FAILED_ROW in rows:
        status[rows.index(FAILED_ROW)] = RowStatus.UNDECODABLE
        for array in features.values():
            array[rows.index(FAILED_ROW)] = np.nan
    sources = np.array([(np.full(32, row, np.uint8), 100 + row, row, row, row) for row in rows], SOURCE_DTYPE)
    writer.write_block(block, features=features, row_status=status, sources=sources)


def write_golden_models(folder: Path) -> None:
    """One model a head, and the probabilities it gave for three vectors when it was written."""
    features = gaussian_features(gap=2.0)
    store = write_store(folder / "clouds.h5", features)
    X = np.linspace(-2, 3, 15, dtype=np.float32).reshape(3, 5)
    expected: dict[str, Any] = {"X": X.tolist()}
    for head, params in HEADS.items():
        path = folder / f"{head}.model"
        fit(store, path, head=head, params=params)
        path.with_name(path.name + ".json").unlink()
        expected[head] = Model.load(path).predict_proba(X).tolist()
    store.unlink()
    (folder / "probabilities.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    write_golden_store(folder / "complete.h5", store_dtype="float32", complete=True)
    write_golden_store(folder / "in-progress.h5", store_dtype="float16", complete=False)
    write_golden_models(folder)
    print("\n".join(f"{path.stat().st_size:>7,} bytes  {path.name}" for path in sorted(folder.iterdir())))


if __name__ == "__main__":
    main()
