"""Creating a store complete, every row pending, under its name in one step.

libhdf5 lays the structure out in memory, and what is to be written is written here; nothing else in featcache
uses h5py.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.disk import create_whole, disk_errors, sync_directory
from featcache.errors import StoreError
from featcache.spec import FeatureSpec
from featcache.store.layout import (
    ENCODING_TYPE,
    ENCODING_VERSION,
    RECORD_DTYPE,
    SEAL_DTYPE,
    SOURCE_DTYPE,
    Region,
    RowTable,
    compute_seal,
    feature_dtype,
)
from featcache.store.storage import SparseBytes

ALIGNMENT = 4096  # bytes; feature datasets begin on a page
_MAX_ATTRIBUTE = 64_000  # bytes; libhdf5 keeps larger ones in another form


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
            _allocate(features, name, (n, width), feature_dtype(spec))
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
