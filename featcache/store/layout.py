"""The structure of a store: creating one complete, and opening one without believing it.

`create_store` lets libhdf5 lay the structure out in memory and writes it to the disk itself; nothing else in
featcache uses h5py. `read_layout` checks every claim the structure makes against the file, and hands out byte
regions.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from featcache.disk import (
    NotARegularFile,
    create_whole,
    disk_errors,
    open_regular,
    read_errors,
    sync_directory,
)
from featcache.errors import DamagedStore, DiskError, FeatcacheError, NotAStore, StoreError
from featcache.records import SPLITS, ImageRecord
from featcache.spec import FeatureSpec, require_shallow
from featcache.store.hdf5 import SIGNATURE, Dataset, ForeignHDF5, Group, encode_datatype, read_root, text_size
from featcache.store.storage import MappedFile, ReadsInto, SparseBytes

ENCODING_TYPE = "featcache-store"
ENCODING_VERSION = "1"
ALIGNMENT = 4096  # bytes; feature datasets begin on a page
NO_SPLIT = 255
NO_LABEL = -1
SEAL_DTYPE = np.dtype("S64")
_MAX_ATTRIBUTE = 64_000  # bytes; libhdf5 keeps larger ones in another form
_HASHED_AT_ONCE = 1 << 20  # bytes
# What reading damaged structure, and the JSON in it, raises.
_STRUCTURE_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError)

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
_TEXT_ATTRIBUTES = (
    "encoding-type", "encoding-version", "uuid", "fingerprint", "spec", "provenance",
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


def create_store(
    path: Path, *, spec: FeatureSpec, table: RowTable, provenance: Mapping[str, Any], block_rows: int
) -> None:
    """Write a complete store with every row pending, then give it the name `path` in one step.

    A kill at any moment leaves either no file at `path` or a whole one. Disk space for all rows is taken
    before any work is done. DiskError: no space, no permission, an I/O error.
    """
    structure = SparseBytes()
    _lay_out(structure, spec=spec, table=table, provenance=provenance, block_rows=block_rows)
    with disk_errors(path, doing="creating"):
        # A killed run may have freed the name `path` by a rename that is not on the disk yet. Where a file
        # system keeps no order, taking the name first would take it from the file that still has it there.
        sync_directory(path.parent)
        temporary = path.with_name(path.name + ".creating")
        create_whole(path, structure.size, structure.extents(), temporary=temporary)


def store_size(*, spec: FeatureSpec, table: RowTable, provenance: Mapping[str, Any], block_rows: int) -> int:
    """The bytes of the file that `create_store` would write."""
    structure = SparseBytes()
    _lay_out(structure, spec=spec, table=table, provenance=provenance, block_rows=block_rows)
    return structure.size


def _lay_out(
    target: SparseBytes,
    *,
    spec: FeatureSpec,
    table: RowTable,
    provenance: Mapping[str, Any],
    block_rows: int,
) -> None:
    """The bytes of an empty store, sealed: the datasets whose rows are still to come hold nothing yet."""
    import h5py  # here, since reading does without it

    n = len(table.ids)
    with h5py.File(
        target, "w", libver=("v110", "v110"), alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT
    ) as file:
        features = file.create_group("features")
        rows = [
            _allocate(features, name, (n, width), _feature_dtype(spec))
            for name, width in spec.datasets().items()
        ]
        rows += [
            _allocate(file, "row_status", (n,), np.dtype("u1")),
            _allocate(file, "sources", (n,), SOURCE_DTYPE),
            _allocate(file, "blocks", (-(-n // block_rows),), RECORD_DTYPE),
        ]
        for name, array in (("labels", table.labels.astype("<i8")), ("splits", table.splits)):
            file.create_dataset(name, data=array)
        for name, texts in (("ids", table.ids), ("classes", table.classes)):
            array = _fixed_text(texts)
            file.create_dataset(name, data=array.astype(h5py.string_dtype("utf-8", array.dtype.itemsize)))
        seal = _allocate(file, "seal", (1,), SEAL_DTYPE, kind=h5py.string_dtype("utf-8", 64))
        file.attrs["block-rows"] = np.int64(block_rows)
        attributes = {
            "encoding-type": ENCODING_TYPE,
            "encoding-version": ENCODING_VERSION,
            "uuid": uuid.uuid4().hex,
            "fingerprint": spec.fingerprint(),
            "spec": spec.to_json(),
            "provenance": json.dumps(provenance, sort_keys=True),
        }
        for name, text in attributes.items():
            data = np.bytes_(text.encode())
            if len(data) > _MAX_ATTRIBUTE:
                raise StoreError(
                    f"{name} of a store takes {len(data):,} bytes here, and at most {_MAX_ATTRIBUTE:,} can "
                    "be kept. Ask for fewer nodes."
                )
            file.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", len(data)))
    target.write_at(seal.offset, compute_seal(target, target.size, [*rows, seal]).encode())


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


def _feature_dtype(spec: FeatureSpec) -> np.dtype[Any]:
    return np.dtype(spec.store_dtype).newbyteorder("<")


def _allocate(
    group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, kind: Any = None
) -> Region:
    """A contiguous dataset whose place in the file is fixed now and whose bytes libhdf5 never writes.

    kind: the dtype as h5py wants it told, where that is another.
    """
    import h5py

    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    of_type = h5py.h5t.py_create(kind or dtype, logical=True)
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(group.id, name.encode(), of_type, space, creation)
    return Region(offset=dataset.get_offset() or 0, dtype=dtype, shape=shape)


def _fixed_text(texts: tuple[str, ...]) -> NDArray[np.bytes_]:
    return np.array([text.encode() for text in texts] or np.empty(0, "S1"), dtype=np.bytes_)


def read_layout(path: Path, *, salvage: bool = False) -> StoreLayout:
    """Open the structure of a store and check every claim it makes.

    salvage: a broken seal is no error, see `StoreLayout.sealed`.

    NotAStore: another kind of file, a newer version, or an HDF5 feature a store never has. DamagedStore: a
    store whose structure does not hold together.
    """
    file = _map_file(path)
    try:
        # What is mapped is what is read: a grown store may take the name meanwhile.
        with read_errors(path):
            return _check_structure(read_root(file, len(file)), path, file, salvage=salvage)
    except ForeignHDF5 as exc:
        file.release()
        raise NotAStore(
            f"{path} is an HDF5 file but not a feature store (it {exc}); "
            "a store is made by `featcache embed DATA -o STORE.h5`."
        ) from exc
    except _STRUCTURE_ERRORS as exc:
        file.release()
        raise DamagedStore(
            f"{path} is damaged: its structure cannot be read ({_first_line(exc)}). "
            "Restore it from a copy, or delete it and embed again."
        ) from exc
    except FeatcacheError:
        file.release()
        raise


def _map_file(path: Path) -> MappedFile:
    try:
        with read_errors(path), open_regular(path) as file:
            start = file.read(len(SIGNATURE) + 1)
            if start[len(SIGNATURE) :] == b"{":
                raise NotAStore(
                    f"{path} is a model, not a feature store; `featcache info {path}` says what it was "
                    "fitted on."
                )
            if start[: len(SIGNATURE)] != SIGNATURE:
                raise NotAStore(
                    f"{path} is not an HDF5 file; a store is made by `featcache embed DATA -o STORE.h5`."
                )
            return MappedFile.of(file.fileno())
    except NotARegularFile as exc:
        raise NotAStore(f"{path} is not a regular file; a store is one HDF5 file.") from exc
    except DiskError as exc:
        if isinstance(exc.__cause__, FileNotFoundError | NotADirectoryError):
            raise NotAStore(
                f"{path} cannot be opened: {exc.__cause__.strerror}. "
                "Make a store with `featcache embed DATA -o STORE.h5`."
            ) from exc
        raise


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:160]


def _check_structure(root: Group, path: Path, buffer: MappedFile, *, salvage: bool) -> StoreLayout:
    texts = _read_texts(root, path)
    spec = FeatureSpec.from_json(texts["spec"].decode())
    if spec.fingerprint().encode() != texts["fingerprint"]:
        raise DamagedStore(
            f"{path} is damaged: its spec does not match its fingerprint, so that nothing says what its "
            "features are. Restore it from a copy, or delete it and embed again."
        )
    regions = _Regions(root, path, len(buffer))
    labels = regions.take("labels", np.dtype("<i8"))
    n = labels.shape[0]
    block_rows = _read_block_rows(root)
    features = {
        name: regions.take(f"features/{name}", _feature_dtype(spec), (n, width))
        for name, width in spec.datasets().items()
    }
    row_status = regions.take("row_status", np.dtype("u1"), (n,))
    sources = regions.take("sources", SOURCE_DTYPE, (n,))
    blocks = regions.take("blocks", RECORD_DTYPE, (-(-n // block_rows),))
    splits = regions.take("splits", np.dtype("u1"), (n,))
    ids, classes = regions.take_text("ids", n), regions.take_text("classes", None)
    seal = regions.take_text("seal", 1)
    regions.refuse_overlap()

    sealed = compute_seal(buffer, len(buffer), [*features.values(), row_status, sources, blocks, seal])
    is_sealed = seal.read(buffer).tobytes() == sealed.encode()
    if not is_sealed and not salvage:
        raise DamagedStore(
            f"{path} is damaged: its ids, labels, classes or structure do not match the checksum they were "
            "sealed with, and nothing of it is served. Restore it from a copy, or make it anew with "
            f"`featcache embed DATA -o {path}`, which takes over the rows that are sound."
        )
    table = RowTable.unknown(n)
    if is_sealed:
        table = RowTable(
            ids=tuple(raw.decode() for raw in ids.read(buffer).tolist()),
            labels=labels.read(buffer).astype(np.int64),
            splits=splits.read(buffer),
            classes=tuple(raw.decode() for raw in classes.read(buffer).tolist()),
        )
        _require_sound(table, path)
    return StoreLayout(
        path=path,
        buffer=buffer,
        spec=spec,
        fingerprint=spec.fingerprint(),
        uuid=texts["uuid"].decode() if is_sealed else "",
        provenance=_read_provenance(texts["provenance"]) if is_sealed else {},
        block_rows=block_rows,
        table=table,
        features=features,
        row_status=row_status,
        sources=sources,
        blocks=blocks,
        sealed=is_sealed,
    )


def _read_provenance(text: bytes) -> Mapping[str, Any]:
    provenance = json.loads(text.decode())
    if not isinstance(provenance, dict):
        raise ValueError("provenance is a JSON object")
    require_shallow(provenance)
    return provenance


def _require_sound(table: RowTable, path: Path) -> None:
    labels, splits = table.labels, table.splits
    if (
        len(set(table.ids)) == len(table.ids)
        and bool(np.all((labels >= NO_LABEL) & (labels < len(table.classes))))
        and bool(np.all((splits < len(SPLITS)) | (splits == NO_SPLIT)))
    ):
        return
    raise DamagedStore(
        f"{path} is damaged: its ids are not unique, or its labels or splits name none there are. "
        "Delete it and embed again."
    )


def _read_texts(root: Group, path: Path) -> dict[str, bytes]:
    texts = {}
    for name in _TEXT_ATTRIBUTES:
        attribute = root.attributes.get(name)
        if attribute is None:
            raise NotAStore(
                f"{path} is an HDF5 file but not a feature store (no attribute {name!r}); "
                "a store is made by `featcache embed DATA -o STORE.h5`."
            )
        size = text_size(attribute.datatype)
        if size is None:
            raise NotAStore(f"{path}: attribute {name!r} is not fixed-length text, as a store's are.")
        if attribute.shape != () or len(attribute.value) != size:
            raise NotAStore(f"{path}: attribute {name!r} has a shape or size no store has.")
        text = texts[name] = attribute.value.rstrip(b"\0")
        if name == "encoding-type" and text != ENCODING_TYPE.encode():
            raise NotAStore(f"{path} holds {text.decode()!r}, not {ENCODING_TYPE!r}.")
        if name == "encoding-version" and text != ENCODING_VERSION.encode():
            raise NotAStore(
                f"{path} is written by format {text.decode()}; this featcache reads format "
                f"{ENCODING_VERSION}. Upgrade featcache."
            )
    return texts


def _read_block_rows(root: Group) -> int:
    attribute, dtype = root.attributes["block-rows"], np.dtype("<i8")
    if attribute.datatype != encode_datatype(dtype) or len(attribute.value) != dtype.itemsize:
        raise ValueError("block-rows is not one int64")
    block_rows = int(np.frombuffer(attribute.value, dtype)[0])
    if not 1 <= block_rows <= 1 << 20:
        raise ValueError(f"blocks of {block_rows} rows")
    return block_rows


class _Regions:
    """Takes datasets one by one and refuses whatever could lie about where their bytes are."""

    def __init__(self, root: Group, path: Path, file_bytes: int) -> None:
        self._root, self._path, self._file_bytes = root, path, file_bytes
        self._taken: list[tuple[int, int, str]] = []

    def take(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None) -> Region:
        dataset = self._dataset(name)
        if dataset.datatype != encode_datatype(dtype):
            self._refuse(name, f"is not of type {dtype}")
        return self._region(name, dataset, dtype, shape)

    def take_text(self, name: str, n: int | None) -> Region:
        dataset = self._dataset(name)
        size = text_size(dataset.datatype)
        if size is None:
            self._refuse(name, "is not fixed-length text")
        return self._region(name, dataset, np.dtype(f"S{size}"), None if n is None else (n,))

    def refuse_overlap(self) -> None:
        end, before = 0, ""
        for offset, stop, name in sorted(self._taken):
            if offset < end:
                self._refuse(name, f"overlaps {before}")
            end, before = stop, name

    def _dataset(self, name: str) -> Dataset:
        try:
            return self._root.dataset(name)
        except ForeignHDF5 as exc:
            self._refuse(name, str(exc))

    def _region(
        self, name: str, dataset: Dataset, dtype: np.dtype[Any], shape: tuple[int, ...] | None
    ) -> Region:
        have = dataset.shape
        expected_dimensions = 1 if shape is None else len(shape)
        if len(have) != expected_dimensions or (shape is not None and have != shape):
            self._refuse(name, f"has shape {have}, not {shape or '(n,)'}")
        region = Region(offset=dataset.offset, dtype=dtype, shape=have)
        nbytes = dtype.itemsize * math.prod(have)
        if nbytes == 0:
            return region
        if dataset.nbytes != nbytes or not 0 < region.offset <= self._file_bytes - nbytes:
            self._refuse(name, "does not lie within the file")
        self._taken.append((region.offset, region.offset + nbytes, name))
        return region

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise NotAStore(
            f"{self._path}: dataset /{name} {what}; a feature store is never written so. "
            "Restore it from a copy, or delete it and embed again."
        )
