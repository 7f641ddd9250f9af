"""The HDF5 reader: it finds what libhdf5 finds, refuses other forms in words, and ends on any bytes."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import make_toy_store, toy_spec
from gaussians import PROVENANCE

from featcache.errors import NotAStore, StoreError
from featcache.records import NO_FILE, ImageRecord
from featcache.spec import FeatureNode
from featcache.store.creating import create_store
from featcache.store.hdf5 import (
    SIGNATURE,
    ForeignHDF5,
    Group,
    MalformedHDF5,
    encode_datatype,
    read_root,
    text_size,
)
from featcache.store.layout import RECORD_DTYPE, SOURCE_DTYPE, RowTable
from featcache.store.opening import read_layout
from featcache.store.storage import SparseBytes

COLUMNS = ("labels", "splits", "ids", "classes", "row_status", "sources", "blocks", "seal")
SECONDS = 5  # of the processor; refusing the worst file takes some tenths of one


def many_nodes(n: int) -> tuple[FeatureNode, ...]:
    return tuple(FeatureNode(name=f"layér{i}", pooling="avg", num_features=i + 1) for i in range(n))


def root_of(data: bytes) -> Group:
    source = SparseBytes()
    source.write_at(0, data)
    return read_root(source, len(data))


def assert_as_h5py_reads_it(path: Path) -> None:
    root = root_of(path.read_bytes())
    with h5py.File(path) as file:
        names = [*(f"features/{key}" for key in file["features"]), *COLUMNS]
        for name in names:
            ours, theirs = root.dataset(name), file[name]
            assert (ours.offset, ours.shape) == (theirs.id.get_offset() or 0, theirs.shape), name
            assert ours.nbytes == theirs.id.get_storage_size()
            assert b"\x03\x00" + ours.datatype == theirs.id.get_type().encode()
        for name, value in file.attrs.items():
            as_bytes = value if isinstance(value, bytes) else value.tobytes()
            assert (root.attributes[name].shape, root.attributes[name].value) == ((), as_bytes)
        assert set(root.attributes) == set(file.attrs)


@pytest.mark.parametrize("n_nodes", [1, 2, 8, 9, 20, 60, 400])
@pytest.mark.parametrize("n_rows", [0, 1, 700])
def test_places_shapes_and_attributes_are_those_libhdf5_reads(
    tmp_path: Path, n_nodes: int, n_rows: int
) -> None:
    """Links lie in the header of a group, beyond eight in a heap, beyond some 45 in a deeper tree."""
    dtype = "float16" if n_nodes % 2 else "float32"
    spec = toy_spec(nodes=many_nodes(n_nodes), store_dtype=dtype)
    path = make_toy_store(tmp_path / "s.h5", n=n_rows, spec=spec, fill=False)
    assert_as_h5py_reads_it(path)
    layout = read_layout(path)
    assert (layout.spec, layout.n_rows, len(layout.features)) == (spec, n_rows, n_nodes)


def test_a_store_without_labels_or_classes_is_read_as_libhdf5_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    table = RowTable.from_records((ImageRecord(path="a.png", stat=NO_FILE),), ())
    create_store(path, spec=toy_spec(), table=table, provenance=PROVENANCE, block_rows=4)
    assert_as_h5py_reads_it(path)
    assert read_layout(path).table.classes == ()


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", "<i8", "u1", "<u4", "S7", SOURCE_DTYPE, RECORD_DTYPE])
def test_datatypes_are_encoded_as_libhdf5_encodes_them(tmp_path: Path, dtype: object) -> None:
    wanted = np.dtype(dtype)  # type: ignore[call-overload]
    with h5py.File(tmp_path / "t.h5", "w", libver=("v110", "v110")) as file:
        theirs = file.create_dataset("x", (1,), wanted).id.get_type().encode()
    assert theirs == b"\x03\x00" + encode_datatype(wanted)


def test_only_fixed_text_in_utf8_padded_with_zeros_is_text() -> None:
    def encoded(kind: np.dtype) -> bytes:
        return h5py.h5t.py_create(kind, logical=True).encode()[2:]

    assert text_size(encoded(h5py.string_dtype("utf-8", 300))) == 300
    assert text_size(encoded(h5py.string_dtype("ascii", 3))) is None
    assert text_size(encoded(h5py.string_dtype())) is None
    assert text_size(encode_datatype(np.dtype("<i8"))) is None
    assert text_size(bytes.fromhex("1311000000000000")) is None


@pytest.mark.parametrize("version", ["earliest", "v108"])
def test_other_bounds_of_the_format_are_refused_in_words(toy_store: Path, version: str) -> None:
    other = toy_store.with_name("other.h5")
    with h5py.File(toy_store) as file, h5py.File(other, "w", libver=(version, "latest")) as copy:
        for name in file:
            file.copy(name, copy)
        for name, value in file.attrs.items():
            copy.attrs[name] = value
    with pytest.raises(
        NotAStore, match="not a feature store.*superblock version [02], not 3.*featcache embed"
    ):
        read_layout(other)


def test_attributes_that_a_header_does_not_hold_are_refused_in_words(toy_store: Path) -> None:
    with h5py.File(toy_store, "r+") as file:
        file.attrs.update({f"note {i}": i for i in range(5)})
    with pytest.raises(NotAStore, match="more attributes, or larger ones, than a header holds"):
        read_layout(toy_store)


def test_a_store_cut_at_any_length_is_refused(toy_store: Path) -> None:
    began = time.process_time()
    for length in reversed(range(toy_store.stat().st_size)):
        os.truncate(toy_store, length)
        with pytest.raises(StoreError):
            read_layout(toy_store)
    assert time.process_time() - began < 30


def read_everything(data: bytes, names: tuple[str, ...]) -> bool:
    """Whether a sound root was found; a dataset is found, or refused as one that is no store's."""
    try:
        root = root_of(data)
        for name in names:
            root.dataset(name)
        assert root.attributes
    except (MalformedHDF5, ForeignHDF5, UnicodeDecodeError):
        return False
    return True


@pytest.mark.parametrize("n_nodes", [2, 60])
def test_changed_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path, n_nodes: int) -> None:
    """Beneath the seal, so that the reader itself is met. Half the changes hit fields that lead elsewhere."""
    path = make_toy_store(tmp_path / "s.h5", n=1, spec=toy_spec(nodes=many_nodes(n_nodes)), fill=False)
    whole = path.read_bytes()
    names = (*(f"features/{node.key}" for node in many_nodes(n_nodes)[:8]), *COLUMNS)
    signatures = (b"OHDR", b"OCHK", b"BTHD", b"BTLF", b"BTIN", b"FRHP", b"FHDB", b"FHIB")
    starts = [at for at in range(len(whole)) if whole[at : at + 4] in signatures]
    rng, refused, slowest = random.Random(3), 0, 0.0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(
                (rng.randrange(len(data)), min(rng.choice(starts) + rng.randrange(160), len(data) - 1))
            )
            value = rng.choice((rng.randrange(256), data[at] ^ 1 << rng.randrange(8), 0, 255))
            data[at] = value
            if rng.random() < 0.2:
                data[at : at + 8] = struct.pack("<Q", rng.choice((*starts, 0, len(data), (1 << 64) - 1)))
        began = time.process_time()
        refused += not read_everything(bytes(data), names)
        slowest = max(slowest, time.process_time() - began)
    assert refused > 300
    assert slowest < SECONDS


def test_changed_bytes_of_a_store_are_always_refused(toy_store: Path) -> None:
    whole, rng = toy_store.read_bytes(), random.Random(4)
    layout = read_layout(toy_store)
    rows = {
        at
        for region in (*layout.features.values(), layout.row_status, layout.sources, layout.blocks)
        for at in range(region.offset, region.offset + region.nbytes)
    }
    for at in rng.sample([at for at in range(len(whole)) if at not in rows], 800):
        data = bytearray(whole)
        data[at] ^= rng.randint(1, 255)
        toy_store.write_bytes(data)
        with pytest.raises(StoreError):
            read_layout(toy_store)


# Files whose parts lead to themselves, or to far too much.


def superblock(size: int, *, root: int = 48) -> bytes:
    return SIGNATURE + b"\x03\x08\x08\x00" + struct.pack("<QQQQ", 0, (1 << 64) - 1, size, root) + bytes(4)


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("<BHB", kind, len(body), flags) + body


def header(*messages: bytes) -> bytes:
    body = b"".join(messages)
    return b"OHDR\x02\x02" + struct.pack("<I", len(body)) + body + bytes(4)


def link(name: str, address: int, kind: bytes = b"") -> bytes:
    flags = 0x08 if kind else 0
    return message(
        6, bytes([1, flags]) + kind + bytes([len(name)]) + name.encode() + struct.pack("<Q", address)
    )


def file_of(*parts: bytes) -> bytes:
    data = b"".join(parts)
    return superblock(48 + len(data)) + data


def continuations_in_a_circle() -> bytes:
    at = 48 + len(header(message(0x10, bytes(16))))
    again = message(0x10, struct.pack("<QQ", at, 28))
    return file_of(header(again), b"OCHK" + again + bytes(4))


def groups_that_hold_each_other() -> bytes:
    return file_of(header(link("features", 48), link("labels", 48)))


def a_header_of_empty_messages() -> bytes:
    return file_of(header(bytes(1_000_000)))


def a_header_larger_than_the_file() -> bytes:
    return file_of(b"OHDR\x02\x03" + struct.pack("<Q", 1 << 60) + bytes(64))


def more_structure_than_is_read() -> bytes:
    return file_of(header(bytes(3 << 20)))


def a_tree_whose_nodes_are_its_root() -> bytes:
    heap_at = 48 + len(header(message(2, bytes(18))))
    tree_at, node_at = heap_at + 146, heap_at + 146 + 38
    info = message(2, b"\0\0" + struct.pack("<QQ", heap_at, tree_at))
    heap = b"FRHP\x00\x07\x00\x00\x00\x02" + bytes(100)
    heap += struct.pack("<HQQHHQHI", 4, 512, 1 << 16, 32, 1, 48, 0, 0)
    tree = b"BTHD\x00\x05" + struct.pack("<IHHBBQHQI", 512, 11, 2, 100, 40, node_at, 20, 1 << 40, 0)
    node = b"BTIN\x00\x05" + bytes(20 * 11) + struct.pack("<QBH", node_at, 20, 0) * 21
    return file_of(header(info), heap, tree, node.ljust(512, b"\0"))


LEADING_NOWHERE: dict[str, Callable[[], bytes]] = {
    make.__name__: make
    for make in (
        continuations_in_a_circle,
        groups_that_hold_each_other,
        a_header_of_empty_messages,
        a_header_larger_than_the_file,
        more_structure_than_is_read,
        a_tree_whose_nodes_are_its_root,
    )
}


@pytest.mark.parametrize("trick", LEADING_NOWHERE)
def test_structure_that_leads_nowhere_is_refused_soon(tmp_path: Path, trick: str) -> None:
    data = LEADING_NOWHERE[trick]()
    path = tmp_path / "s.h5"
    path.write_bytes(data)
    began = time.process_time()
    for name in ("labels", "features/penultimate", "features/features/features/labels"):
        with pytest.raises((MalformedHDF5, ForeignHDF5)):
            root_of(data).dataset(name)
    with pytest.raises(StoreError, match="not a feature store|structure cannot be read"):
        read_layout(path)
    assert time.process_time() - began < SECONDS


def test_a_circle_of_continuations_ends_by_what_may_be_read() -> None:
    with pytest.raises(MalformedHDF5, match="more than 1,048,576 bytes of structure"):
        root_of(continuations_in_a_circle())


@pytest.mark.parametrize("root", [47, 49, 1 << 40, (1 << 64) - 1])
def test_an_address_out_of_the_file_is_refused_before_anything_is_read_there(root: int) -> None:
    data = superblock(52, root=root) + bytes(4)
    with pytest.raises(MalformedHDF5, match=f"bytes {root:,} to .* of a file of 52"):
        root_of(data)


def test_shared_messages_doubled_names_and_soft_links_are_refused() -> None:
    with pytest.raises(ForeignHDF5, match="shares its type"):
        root_of(file_of(header(message(3, bytes(8), flags=2))))
    with pytest.raises(MalformedHDF5, match="two of the name 'labels'"):
        root_of(file_of(header(link("labels", 48), link("labels", 48)))).dataset("labels")
    with pytest.raises(ForeignHDF5, match="is a link that may lead elsewhere"):
        root_of(file_of(header(link("labels", 48, kind=b"\x01")))).dataset("labels")
    with pytest.raises(ForeignHDF5, match="is not a group"):
        root_of(file_of(header(message(0x11, bytes(16)))))


@pytest.mark.parametrize("n_nodes", [2, 60])
def test_reading_a_store_does_without_libhdf5(tmp_path: Path, n_nodes: int) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=5, spec=toy_spec(nodes=many_nodes(n_nodes)))
    code = (
        "import sys; from featcache.store.reader import FeatureStore\n"
        "FeatureStore.open(sys.argv[1]).features()\n"
        "sys.exit('h5py' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
