"""The checksummed pieces of an HDF5 file, found by their signatures, for those who forge them.

Knows the few kinds of metadata a store could hold, and Jenkins' lookup3, with which libhdf5 protects them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SIGNATURES = (b"OHDR", b"OCHK", b"BTHD", b"BTLF", b"BTIN", b"FRHP", b"FHIB", b"FSHD", b"FSSE")
_LONGEST = 4096  # bytes of one piece
_SUPERBLOCK = 44  # bytes before its checksum
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Checked:
    """Bytes start … stop - 1 with their checksum among them; it is computed with the checksum as zeros
    where it lies within, and over what comes before where it is at the end."""

    start: int
    stop: int
    checksum_at: int

    def repair(self, data: bytearray) -> None:
        """Make the checksum right for what the bytes are now."""
        at = self.checksum_at
        data[at : at + 4] = bytes(4)
        end = at if at + 4 == self.stop else self.stop
        data[at : at + 4] = lookup3(bytes(data[self.start : end])).to_bytes(4, "little")


def find_checked(data: bytes) -> list[Checked]:
    """Every checksummed piece of metadata, the superblock first; ValueError if that is not sound."""
    if lookup3(data[:_SUPERBLOCK]) != _word(data, _SUPERBLOCK):
        raise ValueError("the superblock's checksum is wrong")
    found = [Checked(0, _SUPERBLOCK + 4, _SUPERBLOCK)]
    for signature in _SIGNATURES:
        for start in _all(data, signature):
            found += _piece_at(data, start)
    for start in _all(data, b"FHDB"):
        found += _heap_block_at(data, start)
    return sorted(found, key=lambda piece: piece.start)


def _all(data: bytes, signature: bytes) -> list[int]:
    starts, at = [], data.find(signature)
    while at >= 0:
        starts.append(at)
        at = data.find(signature, at + 1)
    return starts


def _piece_at(data: bytes, start: int) -> list[Checked]:
    """A piece whose checksum is its last four bytes: the first end at which it is right."""
    if data[start : start + 4] == b"OHDR":
        at = _header_end(data, start)
        return [Checked(start, at + 4, at)] if lookup3(data[start:at]) == _word(data, at) else []
    for at in range(start + 8, min(start + _LONGEST, len(data) - 3)):
        if lookup3(data[start:at]) == _word(data, at):
            return [Checked(start, at + 4, at)]
    return []


def _header_end(data: bytes, start: int) -> int:
    flags = data[start + 5]
    at = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    return at + width + int.from_bytes(data[at : at + width], "little")


def _heap_block_at(data: bytes, start: int) -> list[Checked]:
    """A direct block of a fractal heap has its checksum after an offset of a width the heap decides."""
    for width in (2, 3, 4, 5, 8):
        for size in (512, 1024, 2048, 4096):
            at = start + 13 + width
            block = bytearray(data[start : start + size])
            block[at - start : at - start + 4] = bytes(4)
            if len(block) == size and lookup3(bytes(block)) == _word(data, at):
                return [Checked(start, start + size, at)]
    return []


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def lookup3(data: bytes) -> int:
    """Bob Jenkins' `hashlittle` with initial value 0, http://burtleburtle.net/bob/c/lookup3.c."""
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    if not data:
        return c
    last = (len(data) - 1) // 12 * 12
    for x, y, z in struct.iter_unpack("<III", data[:last]):
        a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
        a = ((a - c) & _WORD) ^ _turn(c, 4)
        c = (c + b) & _WORD
        b = ((b - a) & _WORD) ^ _turn(a, 6)
        a = (a + c) & _WORD
        c = ((c - b) & _WORD) ^ _turn(b, 8)
        b = (b + a) & _WORD
        a = ((a - c) & _WORD) ^ _turn(c, 16)
        c = (c + b) & _WORD
        b = ((b - a) & _WORD) ^ _turn(a, 19)
        a = (a + c) & _WORD
        c = ((c - b) & _WORD) ^ _turn(b, 4)
        b = (b + a) & _WORD
    x, y, z = struct.unpack("<III", data[last:].ljust(12, b"\0"))
    a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
    for first, count in (("c", 14), ("a", 11), ("b", 25), ("c", 16), ("a", 4), ("b", 14), ("c", 24)):
        if first == "c":
            c = ((c ^ b) - _turn(b, count)) & _WORD
        elif first == "a":
            a = ((a ^ c) - _turn(c, count)) & _WORD
        else:
            b = ((b ^ a) - _turn(a, count)) & _WORD
    return c


def _turn(value: int, count: int) -> int:
    return ((value << count) | (value >> (32 - count))) & _WORD
