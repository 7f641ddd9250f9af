"""Opening the structure of a store without believing it.

Every claim is checked against the file before a byte region is handed out. Does without libhdf5, which forged
files can crash.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from featcache.disk import NotARegularFile, open_regular, read_errors
from featcache.errors import DamagedStore, DiskError, FeatcacheError, NotAStore
from featcache.records import SPLITS
from featcache.spec import FeatureSpec, require_shallow
from featcache.store.hdf5 import SIGNATURE, Dataset, ForeignHDF5, Group, encode_datatype, read_root, text_size
from featcache.store.layout import (
    ENCODING_TYPE,
    ENCODING_VERSION,
    NO_LABEL,
    NO_SPLIT,
    RECORD_DTYPE,
    SOURCE_DTYPE,
    Region,
    RowTable,
    StoreLayout,
    compute_seal,
    feature_dtype,
)
from featcache.store.storage import MappedFile

# What reading damaged structure, and the JSON in it, raises.
_STRUCTURE_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError)
_LEAST_DATASET = 64  # bytes; the header of any is longer
_TEXT_ATTRIBUTES = (
    "encoding-type", "encoding-version", "uuid", "fingerprint", "spec", "provenance",
)  # fmt: skip


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
    if spec.views * len(spec.nodes) > len(buffer) // _LEAST_DATASET:
        raise ValueError(f"a file of {len(buffer):,} bytes has not {len(spec.nodes):,} nodes of every view")
    regions = _Regions(root, path, len(buffer))
    labels = regions.take("labels", np.dtype("<i8"))
    n = labels.shape[0]
    block_rows = _read_block_rows(root)
    features = {
        name: regions.take(f"features/{name}", feature_dtype(spec), (n, width))
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
