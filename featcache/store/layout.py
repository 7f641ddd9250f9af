"""What a store consists of: its columns, where their bytes lie in the file, and the seal over the rest.

Knows neither how the structure is written nor how it is read; `creating` and `opening` do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.disk import read_errors
from featcache.records import SPLITS, ImageRecord
from featcache.spec import FeatureSpec
from featcache.store.storage import MappedFile, ReadsInto

ENCODING_TYPE = "featcache-store"
ENCODING_VERSION = "1"
NO_SPLIT = 255
NO_LABEL = -1
SEAL_DTYPE = np.dtype("S64")
_HASHED_AT_ONCE = 1 << 20  # bytes

STAT_COLUMNS = ("size", "mtime_ns", "ctime_ns", "inode")
SOURCE_DTYPE = np.dtype([("sha256", "u1", (32,)), *((name, "<i8") for name in STAT_COLUMNS)])
RECORD_DTYPE = np.dtype(
    {
        "names": [
            "magic", "state", "first_row", "rows", "features_crc", "columns_crc", "sequence", "record_crc",
        ],
        "formats": ["S4", "<u4", "<u8", "<u4", "<u4", "<u4", "<u8", "<u4"],
        "offsets": [0, 4, 8, 16, 20, 24, 32, 60],
        "itemsize": 64,
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where a dataset's bytes lie in the file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.shape[0]

    def map(self, buffer: Any) -> NDArray[Any]:
        """The dataset as a read-only array over the mapped file."""
        return np.frombuffer(buffer, self.dtype, math.prod(self.shape), self.offset).reshape(self.shape)

    def read(self, buffer: Any, rows: slice = slice(None)) -> NDArray[Any]:
        """Some rows as an array of their own. OSError where the disk does not give them."""
        if not isinstance(buffer, MappedFile):
            return self.map(buffer)[rows]  # a copy would not copy the padding of records
        first, stop, _ = rows.indices(self.shape[0])
        array = np.empty((stop - first, *self.shape[1:]), self.dtype)
        if array.size:
            view = array.reshape(-1).view(np.uint8).data
            buffer.read_into(view, self.offset + first * self.row_bytes)
        return array


@dataclass(frozen=True, kw_only=True, eq=False)
class RowTable:
    """The columns that are known before an image is opened; they never change within a file.

    labels: int64 ndarray (n_rows,), indices into `classes`, -1 = none. splits: uint8 ndarray (n_rows,),
    indices into SPLITS, 255 = none.
    """

    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: NDArray[np.uint8]
    classes: tuple[str, ...]

    @classmethod
    def from_records(cls, records: tuple[ImageRecord, ...], classes: tuple[str, ...]) -> RowTable:
        label_codes: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
        split_codes: dict[str | None, int] = {name: i for i, name in enumerate(SPLITS)}
        label_codes[None], split_codes[None] = NO_LABEL, NO_SPLIT
        return cls(
            ids=tuple(record.path for record in records),
            labels=np.array([label_codes[record.label] for record in records], dtype=np.int64),
            splits=np.array([split_codes[record.split] for record in records], dtype=np.uint8),
            classes=classes,
        )

    @classmethod
    def unknown(cls, n_rows: int) -> RowTable:
        """The table of rows of which nothing is known but how many there are."""
        return cls(
            ids=("",) * n_rows,
            labels=np.full(n_rows, NO_LABEL, dtype=np.int64),
            splits=np.full(n_rows, NO_SPLIT, dtype=np.uint8),
            classes=(),
        )

    def equals(self, other: RowTable) -> bool:
        return (
            self.ids == other.ids
            and self.classes == other.classes
            and np.array_equal(self.labels, other.labels)
            and np.array_equal(self.splits, other.splits)
        )

    def label_names(self) -> list[str | None]:
        return [None if label < 0 else self.classes[label] for label in self.labels.tolist()]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreLayout:
    """The checked structure of a store, and its bytes as they were found: the map outlives a rename.

    sealed: whether the seal matches. Where it does not, nothing can be believed but the spec, which matches
    its fingerprint, and the rows of blocks that match their checksums: the table is unknown, the provenance
    empty.
    """

    path: Path
    buffer: Any  # a MappedFile; in memory, any buffer
    spec: FeatureSpec
    fingerprint: str
    uuid: str
    provenance: Mapping[str, Any]
    block_rows: int
    table: RowTable
    features: Mapping[str, Region]  # by name, in the order of spec.datasets()
    row_status: Region
    sources: Region
    blocks: Region
    sealed: bool = True

    @property
    def n_rows(self) -> int:
        return len(self.table.ids)

    @property
    def n_blocks(self) -> int:
        return self.blocks.shape[0]

    def map(self, region: Region) -> NDArray[Any]:
        return region.map(self.buffer)

    def read(self, region: Region, rows: slice = slice(None)) -> NDArray[Any]:
        """Some rows as an array of their own. DiskError where the disk does not give them."""
        with read_errors(self.path):
            return region.read(self.buffer, rows)

    def rows_of(self, block: int) -> slice:
        first = block * self.block_rows
        return slice(first, min(first + self.block_rows, self.n_rows))


def feature_dtype(spec: FeatureSpec) -> np.dtype[Any]:
    """Of the feature datasets, as they lie in the file."""
    return np.dtype(spec.store_dtype).newbyteorder("<")


def compute_seal(source: ReadsInto, size: int, left_out: Iterable[Region]) -> str:
    """sha256 of the `size` bytes of a store but for those of some datasets, 64 hexadecimal digits."""
    digest, at = hashlib.sha256(), 0
    for region in sorted(left_out, key=lambda region: region.offset):
        if region.nbytes:
            _hash_range(digest, source, at, region.offset)
            at = region.offset + region.nbytes
    _hash_range(digest, source, at, size)
    return digest.hexdigest()


def _hash_range(digest: Any, source: ReadsInto, start: int, stop: int) -> None:
    buffer = memoryview(bytearray(min(stop - start, _HASHED_AT_ONCE)))
    while start < stop:
        part = buffer[: stop - start]
        source.read_into(part, start)
        digest.update(part)
        start += len(part)
