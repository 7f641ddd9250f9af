"""The structure of an HDF5 file, read without libhdf5: the few forms a store has; all else is refused.

libhdf5 can crash on a file made to harm it; here every offset and length is checked against the file, and
what is read in all is bounded. Knows nothing of stores. Section numbers are those of the HDF5 file format
specification, version 3.0. Its checksums are not compared: a store has one over all its structure.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from featcache.store.storage import ReadsInto

T = TypeVar("T")

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_METADATA = 1 << 20  # bytes read in all; a thousand datasets have half of it
_MAX_LENGTH = 1 << 56  # of a dimension, so that sizes stay far from the ends of int64
_UNDEFINED = (1 << 64) - 1

# Types of header messages, IV.A.2.
_NIL, _DATASPACE, _LINK_INFO, _DATATYPE, _FILL_VALUE = 0x00, 0x01, 0x02, 0x03, 0x05
_LINK, _EXTERNAL_FILES, _LAYOUT, _GROUP_INFO, _FILTERS = 0x06, 0x07, 0x08, 0x0A, 0x0B
_ATTRIBUTE, _CONTINUATION, _MODIFIED, _ATTRIBUTE_INFO, _REFERENCES = 0x0C, 0x10, 0x12, 0x15, 0x16
_OF_ANY = {_ATTRIBUTE, _ATTRIBUTE_INFO, _MODIFIED, _REFERENCES}
_OF_GROUPS = _OF_ANY | {_LINK_INFO, _LINK, _GROUP_INFO}
_OF_DATASETS = _OF_ANY | {_DATASPACE, _DATATYPE, _FILL_VALUE, _LAYOUT}
_SHARED = 0x02  # a flag of messages
_SCALAR, _SIMPLE = 0, 1  # kinds of dataspaces
_CONTIGUOUS = 1
_HARD = 0  # a type of links

# Dense links lie in a fractal heap, found by a B-tree; both as libhdf5 makes them for every group.
_BTREE_NODE = 512  # bytes
_BTREE_RECORD = 11  # bytes: a hash, then the id of an object in the heap
_MAX_BTREE_DEPTH = 2
_HEAP_BLOCK = 512  # bytes; the first two rows of blocks, doubled in each row from there
_HEAP_BLOCKS_PER_ROW = 4
_MAX_HEAP_BLOCK = 1 << 16  # bytes
_MAX_HEAP_ROWS = 9  # those of blocks up to that size


class MalformedHDF5(ValueError):
    """Bytes that are no HDF5 structure, or one that leads out of the file."""


class ForeignHDF5(Exception):
    """A form of HDF5 that is not read here. The message goes on from the object's name: "is filtered"."""


@dataclass(frozen=True)
class Dataset:
    """A dataset whose bytes lie in one piece; whether they lie within the file is not checked."""

    offset: int  # 0 where no bytes were allocated
    nbytes: int
    shape: tuple[int, ...]
    datatype: bytes  # its message, to compare with `encode_datatype`


@dataclass(frozen=True)
class Attribute:
    shape: tuple[int, ...] | None  # None: it holds nothing
    datatype: bytes
    value: bytes


class Group:
    """A group, of which each message was read once."""

    def __init__(self, file: _Metadata, address: int) -> None:
        self._file = file
        self._messages = _read_messages(file, address)
        _refuse_others(self._messages, _OF_GROUPS, "is not a group")
        self._groups: dict[str, Group] = {}

    @cached_property
    def attributes(self) -> Mapping[str, Attribute]:
        for message in self._messages[_ATTRIBUTE_INFO]:
            _require_no_dense_attributes(_Fields(message))
        return _by_name(_read_attribute(_Fields(message)) for message in self._messages[_ATTRIBUTE])

    def dataset(self, path: str) -> Dataset:
        """The dataset at `path`, in this group or in one of its groups."""
        group, slash, name = path.partition("/")
        if not slash:
            return _read_dataset(_read_messages(self._file, self._address_of(path)))
        if group not in self._groups:
            self._groups[group] = Group(self._file, self._address_of(group))
        return self._groups[group].dataset(name)

    def _address_of(self, name: str) -> int:
        if name not in self._links:
            raise ForeignHDF5("is missing")
        address = self._links[name]
        if address is None:
            raise ForeignHDF5("is a link that may lead elsewhere")
        return address

    @cached_property
    def _links(self) -> Mapping[str, int | None]:
        """Where each link leads; None where it is not a hard link."""
        links = [*self._messages[_LINK]]
        for message in self._messages[_LINK_INFO]:
            links += _read_dense_links(self._file, _Fields(message))
        return _by_name(_read_link(_Fields(message)) for message in links)


def read_root(source: ReadsInto, size: int) -> Group:
    """The root group of a file of `size` bytes; OSError where the disk fails. II.A, version 3."""
    file = _Metadata(source, size)
    fields = file.fields(0, 48)
    fields.expect(SIGNATURE)
    version = fields.uint(1)
    if version != 3:
        raise ForeignHDF5(f"has superblock version {version}, not 3")
    fields.expect(b"\x08\x08\x00")  # sizes of offsets and lengths, nobody writing
    base, extension, end, root = (fields.uint(8) for _ in range(4))
    if base != 0 or extension != _UNDEFINED:
        raise ForeignHDF5("has a user block or a superblock extension")
    if end != size:
        raise MalformedHDF5(f"{size:,} bytes of a file of {end:,}")
    return Group(file, root)


def encode_datatype(dtype: np.dtype[Any]) -> bytes:
    """The datatype message that libhdf5 writes for a little-endian dtype. IV.A.2.d."""
    size = dtype.itemsize
    if dtype.subdtype:
        base, shape = dtype.subdtype
        lengths = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
        return _datatype_head(3, 10, 0, size) + lengths + encode_datatype(base)
    if dtype.fields:
        width = (size.bit_length() + 7) // 8
        members = (
            name.encode() + b"\0" + offset.to_bytes(width, "little") + encode_datatype(member)
            for name, (member, offset, *_) in dtype.fields.items()
        )
        return _datatype_head(3, 6, len(dtype.fields), size) + b"".join(members)
    if dtype.kind in "iu":
        return _datatype_head(1, 0, 0x08 if dtype.kind == "i" else 0, size) + struct.pack("<HH", 0, 8 * size)
    if dtype.kind == "f":
        info = np.finfo(dtype)
        exponent, mantissa = int(info.nexp), int(info.nmant)
        bias = (1 << (exponent - 1)) - 1
        return _datatype_head(1, 1, (8 * size - 1) << 8 | 0x20, size) + struct.pack(
            "<HHBBBBI", 0, 8 * size, mantissa, exponent, 0, mantissa, bias
        )
    if dtype.kind == "S":
        return _datatype_head(1, 3, 0x01, size)
    raise ValueError(f"no store has a dataset of type {dtype}")


def text_size(datatype: bytes) -> int | None:
    """Bytes of a fixed-length UTF-8 text padded with zeros; None where the datatype is another."""
    size = int.from_bytes(datatype[4:8], "little")
    return size if size and datatype == _datatype_head(1, 3, 0x11, size) else None


def _datatype_head(version: int, kind: int, bits: int, size: int) -> bytes:
    return bytes([version << 4 | kind]) + bits.to_bytes(3, "little") + size.to_bytes(4, "little")


class _Metadata:
    """The bytes of a file, of which only so many are given."""

    def __init__(self, source: ReadsInto, size: int) -> None:
        self._source, self._size, self._left = source, size, _MAX_METADATA

    def read(self, offset: int, count: int) -> bytes:
        if offset + count > self._size:
            raise MalformedHDF5(f"bytes {offset:,} to {offset + count:,} of a file of {self._size:,}")
        self._left -= count
        if self._left < 0:
            raise MalformedHDF5(f"more than {_MAX_METADATA:,} bytes of structure")
        data = bytearray(count)
        self._source.read_into(memoryview(data), offset)
        return bytes(data)

    def fields(self, offset: int, count: int) -> _Fields:
        return _Fields(self.read(offset, count))


class _Fields:
    """Takes bytes one field after another and never more than there are."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise MalformedHDF5(f"{count:,} bytes where {self.left:,} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def uint(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def expect(self, value: bytes) -> None:
        have = self.take(len(value))
        if have != value:
            raise MalformedHDF5(f"{have!r} where {value!r} belongs")


def _read_messages(file: _Metadata, address: int) -> dict[int, list[bytes]]:
    """The messages of an object by their type. IV.A.1.b; IV.A.2.q."""
    prefix = file.fields(address, 6)
    prefix.expect(b"OHDR\x02")
    flags = prefix.uint(1)
    width = 1 << (flags & 0x03)
    first = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0) + width
    chunks = [file.read(first, file.fields(first - width, width).uint(width))]
    order_bytes = 2 if flags & 0x04 else 0
    messages = defaultdict(list)
    for chunk in chunks:  # grows by the continuations that are met; what may be read in all ends a loop
        fields = _Fields(chunk)
        while fields.left >= 4 + order_bytes:
            kind, size, message_flags = fields.uint(1), fields.uint(2), fields.uint(1)
            fields.take(order_bytes)
            body = fields.take(size)
            if message_flags & _SHARED:
                raise ForeignHDF5("shares its type or another part with other objects")
            if kind == _CONTINUATION:
                chunks.append(_read_continuation(file, _Fields(body)))
            elif kind != _NIL:
                messages[kind].append(body)
    return messages


def _read_continuation(file: _Metadata, fields: _Fields) -> bytes:
    chunk = file.fields(fields.uint(8), fields.uint(8))
    chunk.expect(b"OCHK")
    return chunk.take(chunk.left - 4) if chunk.left >= 4 else b""


def _refuse_others(messages: Mapping[int, list[bytes]], allowed: set[int], what: str) -> None:
    if messages.keys() - allowed:
        raise ForeignHDF5(what)


def _by_name(pairs: Iterator[tuple[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise MalformedHDF5(f"two of the name {name!r}")
        found[name] = value
    return found


def _only(messages: Mapping[int, list[bytes]], kind: int) -> bytes:
    if len(messages.get(kind, ())) != 1:
        raise MalformedHDF5(f"{len(messages.get(kind, ()))} messages of type {kind}, not 1")
    return messages[kind][0]


def _read_dataset(messages: Mapping[int, list[bytes]]) -> Dataset:
    """IV.A.2.i: version 4 is as 3 where the layout is contiguous."""
    if _LAYOUT not in messages:
        raise ForeignHDF5("is not a dataset")
    layout = _Fields(_only(messages, _LAYOUT))
    version, kind = layout.uint(1), layout.uint(1)
    if version not in (3, 4) or kind != _CONTIGUOUS or _EXTERNAL_FILES in messages:
        raise ForeignHDF5("is chunked, virtual or stored outside the file")
    if _FILTERS in messages:
        raise ForeignHDF5("is filtered")
    _refuse_others(messages, _OF_DATASETS, "has properties that are not read here")
    offset, nbytes = layout.uint(8), layout.uint(8)
    shape = _read_dataspace(_Fields(_only(messages, _DATASPACE)))
    if shape is None:
        raise ForeignHDF5("has no shape")
    return Dataset(
        offset=0 if offset == _UNDEFINED else offset,
        nbytes=nbytes,
        shape=shape,
        datatype=_only(messages, _DATATYPE),
    )


def _read_dataspace(fields: _Fields) -> tuple[int, ...] | None:
    """IV.A.2.b, version 2; None for the shape of nothing."""
    fields.expect(b"\x02")
    rank, _, kind = fields.uint(1), fields.uint(1), fields.uint(1)
    if kind != (_SIMPLE if rank else _SCALAR):
        return None
    shape = tuple(fields.uint(8) for _ in range(rank))
    if any(length >= _MAX_LENGTH for length in shape):
        raise ForeignHDF5(f"has shape {shape}")
    return shape


def _read_attribute(fields: _Fields) -> tuple[str, Attribute]:
    """IV.A.2.m, version 3."""
    fields.expect(b"\x03\x00")  # neither type nor shape lie elsewhere
    name_size, type_size, shape_size = fields.uint(2), fields.uint(2), fields.uint(2)
    fields.take(1)  # the name's character set
    name = fields.take(name_size).removesuffix(b"\0").decode()
    datatype = fields.take(type_size)
    shape = _read_dataspace(_Fields(fields.take(shape_size)))
    return name, Attribute(shape, datatype, fields.take(fields.left))


def _require_no_dense_attributes(fields: _Fields) -> None:
    """IV.A.2.v."""
    fields.expect(b"\x00")
    if fields.uint(1) & 0x01:
        fields.take(2)
    if fields.uint(8) != _UNDEFINED:
        raise ForeignHDF5("has more attributes, or larger ones, than a header holds")


def _read_link(fields: _Fields) -> tuple[str, int | None]:
    """IV.A.2.g."""
    fields.expect(b"\x01")
    flags = fields.uint(1)
    kind = fields.uint(1) if flags & 0x08 else _HARD
    fields.take((8 if flags & 0x04 else 0) + (1 if flags & 0x10 else 0))
    name = fields.take(fields.uint(1 << (flags & 0x03))).decode()
    return name, fields.uint(8) if kind == _HARD else None


def _read_dense_links(file: _Metadata, info: _Fields) -> list[bytes]:
    """The link messages that a group keeps outside its header. IV.A.2.c."""
    info.expect(b"\x00")
    if info.uint(1) & 0x01:
        info.take(8)
    heap_address, tree_address = info.uint(8), info.uint(8)
    if heap_address == _UNDEFINED:
        return []
    heap = _LinkHeap(file, heap_address)
    return [heap.read(record[4:]) for record in _read_tree(file, tree_address)]


def _read_tree(file: _Metadata, address: int) -> Iterator[bytes]:
    """The records of a version 2 B-tree of links by name. III.A.2."""
    header = file.fields(address, 38)
    header.expect(b"BTHD\x00\x05" + _BTREE_NODE.to_bytes(4, "little") + _BTREE_RECORD.to_bytes(2, "little"))
    depth = header.uint(2)
    header.take(2)  # when to split and to merge
    root, count = header.uint(8), header.uint(2)
    if depth > _MAX_BTREE_DEPTH:
        raise ForeignHDF5("is one of too many")
    return _read_node(file, root, count, depth) if count else iter(())


def _read_node(file: _Metadata, address: int, count: int, depth: int) -> Iterator[bytes]:
    fields = file.fields(address, _BTREE_NODE)
    fields.expect(b"BTIN\x00\x05" if depth else b"BTLF\x00\x05")
    yield from [fields.take(_BTREE_RECORD) for _ in range(count)]
    for _ in range(count + 1 if depth else 0):
        child, child_count = fields.uint(8), fields.uint(1)
        fields.take(2 if depth > 1 else 0)  # the number of records below the child
        yield from _read_node(file, child, child_count, depth - 1)


class _LinkHeap:
    """The fractal heap of a group's links: managed objects in direct blocks, at most one indirect. III.G."""

    def __init__(self, file: _Metadata, address: int) -> None:
        self._file = file
        self._owner = b"\x00" + address.to_bytes(8, "little")
        header = file.fields(address, 146)
        header.expect(b"FRHP\x00\x07\x00\x00\x00\x02")  # ids of 7 bytes, no filters, blocks with checksums
        header.take(4 + 12 * 8)  # sizes and counts, of huge and tiny objects as well: no link is one
        header.expect(
            _HEAP_BLOCKS_PER_ROW.to_bytes(2, "little")
            + _HEAP_BLOCK.to_bytes(8, "little")
            + _MAX_HEAP_BLOCK.to_bytes(8, "little")
            + b"\x20\x00"  # offsets have 32 bits
        )
        header.take(2)
        root, rows = header.uint(8), header.uint(2)
        self._blocks = [(0, _HEAP_BLOCK, root)] if rows == 0 else [*self._children(root, rows)]

    def _children(self, address: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the heap, bytes, address) of every direct block."""
        if rows > _MAX_HEAP_ROWS:
            raise ForeignHDF5("is one of too many")
        block = self._file.fields(address, 17 + rows * _HEAP_BLOCKS_PER_ROW * 8)
        block.expect(b"FHIB" + self._owner + bytes(4))
        offset = 0
        for row in range(rows):
            size = _HEAP_BLOCK << max(row - 1, 0)
            for _ in range(_HEAP_BLOCKS_PER_ROW):
                yield offset, size, block.uint(8)
                offset += size

    def read(self, heap_id: bytes) -> bytes:
        fields = _Fields(heap_id)
        fields.expect(b"\x00")  # a managed object
        start, length = fields.uint(4), fields.uint(2)
        for offset, size, address in self._blocks:
            if offset <= start < offset + size and start + length <= offset + size:
                self._file.fields(address, 17).expect(b"FHDB" + self._owner + offset.to_bytes(4, "little"))
                return self._file.read(address + start - offset, length)
        raise MalformedHDF5(f"bytes {start:,} to {start + length:,} of a heap that has no such block")
