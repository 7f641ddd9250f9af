"""The bytes of a store: creating one complete, and opening one without believing it.

`create_store` is the only place where libhdf5 writes. `read_layout` lets libhdf5 read the structure, checks
every claim it makes against the file, and hands out byte regions; nothing else in featcache uses h5py.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache.disk import disk_errors, sync_directory
from featcache.errors import DamagedStore, NotAStore
from featcache.records import SPLITS, ImageRecord
from featcache.spec import FeatureSpec

ENCODING_TYPE = "featcache-store"
ENCODING_VERSION = "1"
ALIGNMENT = 4096  # bytes; feature datasets begin on a page
NO_SPLIT = 255
NO_LABEL = -1
_MAX_ATTRIBUTE = 1 << 20  # bytes; a larger attribute is not one of ours

SOURCE_DTYPE = np.dtype([("sha256", "u1", (32,)), ("size", "<i8"), ("mtime_ns", "<i8"), ("ctime_ns", "<i8")])
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
_TEXT_ATTRIBUTES = (
    "encoding-type", "encoding-version", "uuid", "fingerprint", "spec", "provenance", "static-digest",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where a dataset's bytes lie in the file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape[1:], dtype=np.int64))

    def map(self, buffer: mmap.mmap) -> NDArray[Any]:
        """The dataset as a read-only array over the mapped file."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(buffer, self.dtype, count, self.offset).reshape(self.shape)


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
        index = {name: i for i, name in enumerate(classes)}
        return cls(
            ids=tuple(record.path for record in records),
            labels=np.array(
                [NO_LABEL if r.label is None else index[r.label] for r in records], dtype=np.int64
            ),
            splits=np.array(
                [NO_SPLIT if r.split is None else SPLITS.index(r.split) for r in records], dtype=np.uint8
            ),
            classes=classes,
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
    """The checked structure of a store, and its bytes as they were found: the map outlives a rename."""

    path: Path
    buffer: mmap.mmap
    spec: FeatureSpec
    fingerprint: str
    uuid: str
    provenance: Mapping[str, Any]
    block_rows: int
    table: RowTable
    features: Mapping[str, Region]  # node key -> region, in the order of spec.nodes
    row_status: Region
    sources: Region
    blocks: Region

    @property
    def n_rows(self) -> int:
        return len(self.table.ids)

    @property
    def n_blocks(self) -> int:
        return self.blocks.shape[0]

    def map(self, region: Region) -> NDArray[Any]:
        return region.map(self.buffer)

    def rows_of(self, block: int) -> slice:
        first = block * self.block_rows
        return slice(first, min(first + self.block_rows, self.n_rows))


def create_store(
    path: Path, *, spec: FeatureSpec, table: RowTable, provenance: Mapping[str, Any], block_rows: int
) -> None:
    """Write a complete store with every row pending, then give it the name `path` in one step.

    A kill at any moment leaves either no file at `path` or a whole one. Disk space for all rows is taken
    before any work is done. DiskError: no space, no permission, an I/O error.
    """
    temporary = path.with_name(path.name + ".creating")
    with disk_errors(path, doing="creating"):
        temporary.unlink(missing_ok=True)
        try:
            _write_structure(temporary, spec=spec, table=table, provenance=provenance, block_rows=block_rows)
            with open(temporary, "r+b") as file:
                _take_space(file.fileno())
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def _write_structure(
    path: Path, *, spec: FeatureSpec, table: RowTable, provenance: Mapping[str, Any], block_rows: int
) -> None:
    n = len(table.ids)
    n_blocks = -(-n // block_rows)
    ids, classes = _fixed_text(table.ids), _fixed_text(table.classes)
    provenance_json = json.dumps(provenance, sort_keys=True)
    identity = uuid.uuid4().hex
    with h5py.File(
        path, "x", libver=("v110", "v110"), alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT
    ) as file:
        features = file.create_group("features")
        for node in spec.nodes:
            _allocate(features, node.key, (n, node.num_features), _feature_dtype(spec))
        _allocate(file, "row_status", (n,), np.dtype("u1"))
        _allocate(file, "sources", (n,), SOURCE_DTYPE)
        _allocate(file, "blocks", (n_blocks,), RECORD_DTYPE)
        for name, array in (("labels", table.labels.astype("<i8")), ("splits", table.splits)):
            file.create_dataset(name, data=array)
        for name, array in (("ids", ids), ("classes", classes)):
            file.create_dataset(name, data=array.astype(h5py.string_dtype("utf-8", array.dtype.itemsize)))
        file.attrs["block-rows"] = np.int64(block_rows)
        texts = {
            "encoding-type": ENCODING_TYPE,
            "encoding-version": ENCODING_VERSION,
            "uuid": identity,
            "fingerprint": spec.fingerprint(),
            "spec": spec.to_json(),
            "provenance": provenance_json,
            "static-digest": _static_digest(
                table.labels, table.splits, ids, classes, texts=(identity, spec.to_json(), provenance_json)
            ),
        }
        for name, text in texts.items():
            data = np.bytes_(text.encode())
            file.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", len(data)))


def _feature_dtype(spec: FeatureSpec) -> np.dtype[Any]:
    return np.dtype(spec.store_dtype).newbyteorder("<")


def _allocate(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """A contiguous dataset whose place in the file is fixed now and whose bytes libhdf5 never writes."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(dtype, logical=True)
    h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(shape), creation)


def _fixed_text(texts: tuple[str, ...]) -> NDArray[np.bytes_]:
    return np.array([text.encode() for text in texts] or np.empty(0, "S1"), dtype=np.bytes_)


def _static_digest(
    labels: NDArray[Any],
    splits: NDArray[Any],
    ids: NDArray[np.bytes_],
    classes: NDArray[np.bytes_],
    *,
    texts: tuple[str, ...],
) -> str:
    digest = hashlib.sha256()
    for array in (labels.astype("<i8"), splits, ids, classes):
        digest.update(f"{array.dtype.itemsize}x{array.shape[0]};".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    for text in texts:
        digest.update(f"{len(text.encode())};".encode() + text.encode())
    return digest.hexdigest()


def _take_space(fd: int) -> None:
    """Reserve every block of the file, so that a full disk is met here and not in the middle of the run."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)


def read_layout(path: Path) -> StoreLayout:
    """Open the structure of a store and check every claim it makes.

    NotAStore: another kind of file, a newer version, or an HDF5 feature a store never has. DamagedStore: a
    store whose structure does not hold together.
    """
    try:
        status = os.stat(path)
    except OSError as exc:
        raise NotAStore(
            f"{path} cannot be opened: {os.strerror(exc.errno or 0)}. "
            "Make a store with `featcache embed DATA -o STORE.h5`."
        ) from exc
    if not stat.S_ISREG(status.st_mode):
        raise NotAStore(f"{path} is not a regular file; a store is one HDF5 file.")
    try:
        with open(path, "rb") as raw:
            if raw.read(8) != b"\x89HDF\r\n\x1a\n":
                raise NotAStore(
                    f"{path} is not an HDF5 file; a store is made by `featcache embed DATA -o STORE.h5`."
                )
            opened = os.fstat(raw.fileno())
            buffer = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as exc:
        raise NotAStore(f"{path} cannot be read: {os.strerror(exc.errno or 0)}.") from exc
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not os.path.samestat(opened, os.stat(path)):
                return read_layout(path)  # a grown store took the name in between
            return _check_structure(file, path, buffer)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError) as exc:
        raise DamagedStore(
            f"{path} is damaged: its structure cannot be read ({_first_line(exc)}). "
            "Restore it from a copy, or delete it and embed again."
        ) from exc


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:160]


def _check_structure(file: Any, path: Path, buffer: mmap.mmap) -> StoreLayout:
    texts = _read_texts(file, path)
    spec = FeatureSpec.from_json(texts["spec"])
    regions = _Regions(file, path, len(buffer))
    labels = regions.take("labels", np.dtype("<i8"))
    n = labels.shape[0]
    block_rows = _read_block_rows(file)
    features = {
        node.key: regions.take(f"features/{node.key}", _feature_dtype(spec), (n, node.num_features))
        for node in spec.nodes
    }
    row_status = regions.take("row_status", np.dtype("u1"), (n,))
    sources = regions.take("sources", SOURCE_DTYPE, (n,))
    blocks = regions.take("blocks", RECORD_DTYPE, (-(-n // block_rows),))
    splits = regions.take("splits", np.dtype("u1"), (n,))
    ids, classes = regions.take_text("ids", n), regions.take_text("classes", None)
    regions.refuse_overlap()

    arrays = {
        name: np.array(region.map(buffer))
        for name, region in (("labels", labels), ("splits", splits), ("ids", ids), ("classes", classes))
    }
    digest = _static_digest(
        arrays["labels"],
        arrays["splits"],
        arrays["ids"],
        arrays["classes"],
        texts=(texts["uuid"], texts["spec"], texts["provenance"]),
    )
    if digest != texts["static-digest"] or spec.fingerprint() != texts["fingerprint"]:
        raise DamagedStore(
            f"{path} is damaged: its ids, labels, classes or spec do not match their checksum. "
            "Restore it from a copy, or delete it and embed again."
        )
    table = RowTable(
        ids=tuple(raw.decode() for raw in arrays["ids"].tolist()),
        labels=arrays["labels"].astype(np.int64),
        splits=arrays["splits"],
        classes=tuple(raw.decode() for raw in arrays["classes"].tolist()),
    )
    if not _is_sound(table):
        raise DamagedStore(
            f"{path} is damaged: its ids are not unique, or its labels or splits name none there are. "
            "Delete it and embed again."
        )
    return StoreLayout(
        path=path,
        buffer=buffer,
        spec=spec,
        fingerprint=texts["fingerprint"],
        uuid=texts["uuid"],
        provenance=json.loads(texts["provenance"]),
        block_rows=block_rows,
        table=table,
        features=features,
        row_status=row_status,
        sources=sources,
        blocks=blocks,
    )


def _is_sound(table: RowTable) -> bool:
    labels, splits = table.labels, table.splits
    return (
        len(set(table.ids)) == len(table.ids)
        and bool(np.all((labels >= NO_LABEL) & (labels < len(table.classes))))
        and bool(np.all((splits < len(SPLITS)) | (splits == NO_SPLIT)))
    )


def _read_texts(file: Any, path: Path) -> dict[str, str]:
    texts = {}
    for name in _TEXT_ATTRIBUTES:
        if name not in file.attrs:
            raise NotAStore(
                f"{path} is an HDF5 file but not a feature store (no attribute {name!r}); "
                "a store is made by `featcache embed DATA -o STORE.h5`."
            )
        attribute = h5py.h5a.open(file.id, name.encode())
        kind = attribute.get_type()
        if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str():
            raise NotAStore(f"{path}: attribute {name!r} is not fixed-length text, as a store's are.")
        if attribute.shape != () or attribute.get_storage_size() > _MAX_ATTRIBUTE:
            raise NotAStore(f"{path}: attribute {name!r} has a shape or size no store has.")
        value = file.attrs[name]
        texts[name] = value.decode() if isinstance(value, bytes) else str(value)
        if name == "encoding-type" and texts[name] != ENCODING_TYPE:
            raise NotAStore(f"{path} holds {texts[name]!r}, not {ENCODING_TYPE!r}.")
        if name == "encoding-version" and texts[name] != ENCODING_VERSION:
            raise NotAStore(
                f"{path} is written by format {texts[name]}; this featcache reads format {ENCODING_VERSION}. "
                "Upgrade featcache."
            )
    return texts


def _read_block_rows(file: Any) -> int:
    block_rows = int(file.attrs["block-rows"])
    if not 1 <= block_rows <= 1 << 20:
        raise ValueError(f"blocks of {block_rows} rows")
    return block_rows


class _Regions:
    """Takes datasets one by one and refuses whatever could lie about where their bytes are."""

    def __init__(self, file: Any, path: Path, file_bytes: int) -> None:
        self._file, self._path, self._file_bytes = file, path, file_bytes
        self._taken: list[tuple[int, int, str]] = []

    def take(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> Region:
        dataset = self._dataset(name)
        have = dataset.get_type().dtype
        if have != dtype:
            self._refuse(name, f"is of type {have}, not {dtype}")
        return self._region(name, dataset, dtype, shape)

    def take_text(self, name: str, n: int | None) -> Region:
        dataset = self._dataset(name)
        kind = dataset.get_type()
        if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str():
            self._refuse(name, "is not fixed-length text")
        return self._region(name, dataset, np.dtype(f"S{kind.get_size()}"), None if n is None else (n,))

    def refuse_overlap(self) -> None:
        end, before = 0, ""
        for offset, stop, name in sorted(self._taken):
            if offset < end:
                self._refuse(name, f"overlaps {before}")
            end, before = stop, name

    def _dataset(self, name: str) -> Any:
        parent: Any = self._file.id
        *groups, leaf = name.split("/", 1)
        for part in groups:
            self._require_hard_link(parent, part, name)
            parent = h5py.h5o.open(parent, part.encode())
        self._require_hard_link(parent, leaf, name)
        dataset = h5py.h5o.open(parent, leaf.encode())
        if not isinstance(dataset, h5py.h5d.DatasetID):
            self._refuse(name, "is not a dataset")
        creation = dataset.get_create_plist()
        if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_external_count():
            self._refuse(name, "is chunked, virtual or stored outside the file")
        if creation.get_nfilters():
            self._refuse(name, "is filtered")
        return dataset

    def _require_hard_link(self, parent: Any, leaf: str, name: str) -> None:
        if leaf.encode() not in parent:
            self._refuse(name, "is missing")
        if parent.links.get_info(leaf.encode()).type != h5py.h5l.TYPE_HARD:
            self._refuse(name, "is a link that may lead elsewhere")

    def _region(self, name: str, dataset: Any, dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> Region:
        have = dataset.shape
        expected_dimensions = 1 if shape is None else len(shape)
        if len(have) != expected_dimensions or (shape is not None and have != shape):
            self._refuse(name, f"has shape {have}, not {shape or '(n,)'}")
        region = Region(offset=dataset.get_offset() or 0, dtype=dtype, shape=have)
        nbytes = dtype.itemsize * int(np.prod([int(length) for length in have], dtype=object))
        if nbytes == 0:
            return region
        if dataset.get_storage_size() != nbytes or not 0 < region.offset <= self._file_bytes - nbytes:
            self._refuse(name, "does not lie within the file")
        self._taken.append((region.offset, region.offset + nbytes, name))
        return region

    def _refuse(self, name: str, what: str) -> None:
        raise NotAStore(
            f"{self._path}: dataset /{name} {what}; a feature store is never written so. "
            "Restore it from a copy, or delete it and embed again."
        )
