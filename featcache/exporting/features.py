"""The features of a store for other tools: NumPy's .npz, or Parquet, whichever the ending says.

Every vector is a column `X:NODE`, those of augmented views are `X:NODE@1` and so on; with them go `y` (an
index into the classes, -1 where there is no label), ids, splits and sha256. Rows without features are left
out. Both are read back and compared with the store; Parquet is written and compared in blocks of rows.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featcache.disk import open_regular
from featcache.errors import ExportError
from featcache.images.paths import show_path
from featcache.records import RowStatus
from featcache.spec import FeatureSpec
from featcache.store.reader import FeatureStore

_BLOCK_VALUES = 8_000_000  # of a group of rows: 32 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The usable rows of a store, whose vectors are fetched when they are written.

    index: the rows of the store. names: {column: dataset}.
    """

    store: FeatureStore
    index: NDArray[np.int64]
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    splits: NDArray[np.str_]
    sha256: NDArray[np.uint8]
    spec: FeatureSpec

    @classmethod
    def of_store(cls, store: FeatureStore) -> Table:
        """IncompleteStore when rows are still pending."""
        features = store.features()
        return cls(
            store=store,
            index=np.flatnonzero(store.row_status == RowStatus.OK),
            **{name: getattr(features, name) for name in ("y", "classes", "ids", "splits", "sha256", "spec")},
        )

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def widths(self) -> dict[str, int]:
        """{column: num_features}."""
        return {f"{_VECTORS}{dataset}": width for dataset, width in self.spec.datasets().items()}

    def vectors(self, column: str, rows: slice = slice(None)) -> NDArray[Any]:
        """(n_rows, num_features) of some of the usable rows, without a copy where all rows are usable."""
        whole = self.store.dataset(column.removeprefix(_VECTORS))
        taken: NDArray[Any] = whole[rows] if len(self) == len(whole) else whole[self.index[rows]]
        return taken

    def blocks(self) -> Iterator[slice]:
        """All rows, so many at a time as are held in memory."""
        step = max(_BLOCK_VALUES // sum(self.widths.values()), 1)
        return (slice(start, min(start + step, len(self))) for start in range(0, len(self), step))


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """How a table becomes a file; `differing` reads it and names the columns that are not the table's.

    is_ours: whether an open file is one that `write` made, by the names in it.
    """

    write: Callable[[Table, Path], None]
    differing: Callable[[Table, Path], list[str]]
    is_ours: Callable[[BinaryIO], bool]


_VECTORS = "X:"  # what the columns of vectors begin with
_NPZ_COLUMNS = {"y", "classes", "ids", "splits", "sha256", "spec"}
_PARQUET_COLUMNS = {"id", "y", "label", "split", "sha256"}
# What zipfile and pyarrow raise on bytes of others depends on where reading stumbles.
_READ_ERRORS = (zipfile.BadZipFile, OSError, ValueError, LookupError, TypeError, NotImplementedError)


def is_export(path: Path) -> bool:
    """Whether a file is there that `export_table` made: one of the user's own is worth keeping."""
    try:
        with open_regular(path) as file:
            return _KINDS[path.suffix].is_ours(file)
    except _READ_ERRORS:
        return False


def export_table(table: Table, path: Path, *, temporary: Path) -> None:
    """Write the file that will be called `path` at `temporary` and read it back. ExportError: it differs."""
    kind = _KINDS[path.suffix]
    kind.write(table, temporary)
    if differing := kind.differing(table, temporary):
        raise ExportError(
            f"{show_path(path)} was written, but {', '.join(differing)} read from it are not the store's. "
            "Nothing was kept; choose another --output."
        )


def _small_columns(table: Table) -> dict[str, NDArray[Any]]:
    """What a .npz holds beside the vectors."""
    return {
        "y": table.y,
        "classes": np.array(table.classes, dtype=np.str_),
        "ids": np.array(table.ids, dtype=np.str_),
        "splits": table.splits,
        "sha256": table.sha256,
        "spec": np.array(table.spec.to_json()),
    }


def _write_npz(table: Table, path: Path) -> None:
    """What numpy.savez writes, one array at a time."""
    columns = _small_columns(table)
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name in (*table.widths, *columns):
            array = columns[name] if name in columns else table.vectors(name)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _differing_npz(table: Table, path: Path) -> list[str]:
    columns = _small_columns(table)
    with np.load(path, allow_pickle=False) as found:
        return [
            name
            for name in (*table.widths, *columns)
            if not _same(found[name], columns[name] if name in columns else table.vectors(name))
        ]


def _is_npz_of_ours(file: BinaryIO) -> bool:
    with zipfile.ZipFile(file) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    return _are_columns(names, _NPZ_COLUMNS)


def _are_columns(names: Collection[str], small: Collection[str]) -> bool:
    """Whether these are vectors and just these small columns."""
    others = {name for name in names if not name.startswith(_VECTORS)}
    return others == set(small) and len(others) < len(names)


def _same(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def _write_parquet(table: Table, path: Path) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(path, _schema(table)) as writer:
        for rows in table.blocks():
            writer.write_batch(_batch(table, rows))


def _differing_parquet(table: Table, path: Path) -> list[str]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    differing: dict[str, None] = {}
    for group, rows in enumerate(table.blocks()):
        found, expected = file.read_row_group(group), _batch(table, rows)
        for name in expected.schema.names:
            if not found.column(name).combine_chunks().equals(expected.column(name)):
                differing[name] = None
    return list(differing)


def _is_parquet_of_ours(file: BinaryIO) -> bool:
    from pyarrow import parquet

    schema = parquet.read_schema(file)
    about = {b"classes", b"spec"}
    return about <= set(schema.metadata or ()) and _are_columns(schema.names, _PARQUET_COLUMNS)


def _schema(table: Table) -> Any:
    import pyarrow as pa

    about = {"classes": json.dumps(table.classes), "spec": table.spec.to_json()}
    # float16 is new in Parquet, and few read it: vectors are float32 there.
    vectors = {name: pa.list_(pa.float32(), width) for name, width in table.widths.items()}
    return pa.schema(
        {
            "id": pa.string(),
            "y": pa.int64(),
            "label": pa.string(),
            "split": pa.string(),
            "sha256": pa.binary(32),
            **vectors,
        },
        metadata=about,
    )


def _batch(table: Table, rows: slice) -> Any:
    """The rows as pyarrow has them; a label or split that there is not is null."""
    import pyarrow as pa

    y = table.y[rows].tolist()
    columns: Mapping[str, Any] = {
        "id": list(table.ids[rows]),
        "y": y,
        "label": [table.classes[code] if code >= 0 else None for code in y],
        "split": [split or None for split in table.splits[rows].tolist()],
        "sha256": [digest.tobytes() for digest in table.sha256[rows]],
    }
    schema = _schema(table)
    arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
    for name, width in table.widths.items():
        flat = np.ascontiguousarray(table.vectors(name, rows), dtype=np.float32).reshape(-1)
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), width))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


_KINDS: Mapping[str, FileKind] = {
    ".npz": FileKind(write=_write_npz, differing=_differing_npz, is_ours=_is_npz_of_ours),
    ".parquet": FileKind(write=_write_parquet, differing=_differing_parquet, is_ours=_is_parquet_of_ours),
}
