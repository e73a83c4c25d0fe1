"""The table that says which slot of a tier holds which page, readable without its writer.

One record of `RECORD_BYTES` per slot, behind a header that names what the pages were computed with.
The same layout serves memory and files::

    0      header: magic, version, slots, binding, data offset, data bytes, crc32
    4096   records, one per slot, `RECORD_BYTES` each
    ...    data, from the next multiple of 4096 on

A record::

    0   crc32 of what follows, with the state COMMITTED      u32
    4   state: FREE 0, WRITING 1, COMMITTED 2                u8, three bytes of zeros
    8   generation: grows with each record of the tier       u64
    16  slot                                                 u32
    20  tokens in the page                                   u32
    24  position of the page's first token                   u32
    28  positions in the byte string                         u32
    32  offset of the byte string in the data                u64
    40  bytes of it                                          u64
    48  crc32 of it; 0 in memory                             u32, four bytes of zeros
    56  page's name                                          32 bytes
    88  name of the page in front of it; zeros for none      32 bytes
    120 whose page it is (`kvpager.types.Admit.owner`)           u64

Order is what makes it safe to read after its writer was killed at any byte: the state becomes
WRITING before a byte of record or data changes, and COMMITTED, a single byte, after all of them
have. The checksum finds what order cannot rule out in a file: records torn or flipped.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kvpager.types import PageName

RECORD_BYTES = 128
TABLE_OFFSET = 4096
LAYOUT_VERSION = 2

FREE, WRITING, COMMITTED = 0, 1, 2

_MAGIC = b"pageddKV"
_HEADER = struct.Struct("<8sIIQ32sQQ")
_RECORD = struct.Struct("<B3xQIIIIQQI4x32s32sQ")
_CRC = struct.Struct("<I")
_STATE_AT = 4
_NONE = bytes(32)


class TierFormatError(Exception):
    """A tier does not have room for what was to be kept in it."""


class Slices(Protocol):
    """Bytes that can be read and written in slices with both ends."""

    def __getitem__(self, where: slice, /) -> bytes: ...
    def __setitem__(self, where: slice, data: bytes, /) -> None: ...


Buffer: TypeAlias = "mmap.mmap | bytearray | Slices"


@dataclass(frozen=True, slots=True)
class Record:
    """A page in a slot."""

    slot: int
    name: PageName
    tokens: int
    offset: int
    """Of the byte string that holds the page, in the tier's data. Several pages may share one."""
    length: int
    start: int = 0
    """Position of the page's first token, where the byte string tells positions apart."""
    whole: int = 0
    """Positions in the byte string."""
    crc: int = 0
    """crc32 of the byte string; 0 in memory, which does not flip bits by being killed."""
    generation: int = 0
    """Given by the table."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a tier is made for. Two tiers with the same shape can read each other's pages."""

    binding: bytes
    """32 bytes over all that the bytes of a page depend on: `bind`."""
    slots: int
    total_bytes: int
    """Of the whole file or memory."""

    @property
    def data_offset(self) -> int:
        """Where the data begins."""
        end = TABLE_OFFSET + self.slots * RECORD_BYTES
        return -(-end // 4096) * 4096

    @property
    def data_bytes(self) -> int:
        """Bytes of data there is room for."""
        return self.total_bytes - self.data_offset

    def header(self) -> bytes:
        """How the file or memory begins."""
        fields = _HEADER.pack(
            _MAGIC,
            LAYOUT_VERSION,
            RECORD_BYTES,
            self.slots,
            self.binding,
            self.data_offset,
            self.data_bytes,
        )
        return fields + _CRC.pack(zlib.crc32(fields))


HEADER_BYTES = _HEADER.size + _CRC.size


def read_header(raw: bytes, total_bytes: int) -> Shape | None:
    """What a file of ``total_bytes`` beginning with ``raw`` is made for; None if it is no tier."""
    if len(raw) < HEADER_BYTES or not raw.startswith(_MAGIC):
        return None
    slots, binding = _HEADER.unpack_from(raw)[3:5]
    if TABLE_OFFSET + slots * RECORD_BYTES > total_bytes:
        return None
    shape = Shape(binding, slots, total_bytes)
    return shape if raw[:HEADER_BYTES] == shape.header() else None


def bind(*parts: bytes | str | int) -> bytes:
    """A digest of what the bytes of a page depend on: model, KV type, layout, library version."""
    digest = hashlib.sha256(b"pagedd tier %d" % LAYOUT_VERSION)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(b"%d:" % len(data) + data)
    return digest.digest()


class RecordTable:
    """The records of one tier. Not thread-safe."""

    def __init__(self, buffer: Buffer, shape: Shape) -> None:
        """The table in ``buffer``, made anew unless it has this very shape.

        Raises:
            TierFormatError: There is no room for so many records.
        """
        if shape.data_bytes < 0:
            raise TierFormatError(
                f"{shape.total_bytes} bytes have no room for {shape.slots} records"
            )
        self._buffer = buffer
        self._shape = shape
        self._generation = 0
        header = shape.header()
        self.found = buffer[0 : len(header)] == header
        """Whether there may be pages from before."""
        if not self.found:
            self._format(header)

    def _format(self, header: bytes) -> None:
        # Until the header stands, nobody takes the records for records.
        self._buffer[0 : len(header)] = bytes(len(header))
        size, step = self._shape.slots * RECORD_BYTES, 1 << 20
        for at in range(TABLE_OFFSET, TABLE_OFFSET + size, step):
            end = min(at + step, TABLE_OFFSET + size)
            self._buffer[at:end] = bytes(end - at)
        self._buffer[0 : len(header)] = header

    def clear(self, slots: Iterable[int]) -> None:
        """What these slots hold is about to change, or is not to be trusted."""
        for slot in slots:
            at = self._at(slot) + _STATE_AT
            self._buffer[at : at + 1] = b"\x01"

    def commit(self, record: Record) -> None:
        """The bytes of a page are where ``record`` says, all of them."""
        self._generation += 1
        body = self._pack(record, self._generation)
        at = self._at(record.slot)
        self.clear((record.slot,))
        self._buffer[at + _STATE_AT + 1 : at + RECORD_BYTES] = body[1:]
        self._buffer[at : at + _STATE_AT] = _CRC.pack(zlib.crc32(body))
        self._buffer[at + _STATE_AT : at + _STATE_AT + 1] = body[:1]

    def committed(self) -> list[Record]:
        """Every record that is whole and within bounds, oldest first.

        Called before the first `commit`, so that what comes later gets higher generations.
        """
        found: list[Record] = []
        step = 4096
        for first in range(0, self._shape.slots, step):
            count = min(step, self._shape.slots - first)
            at = self._at(first)
            part = bytes(self._buffer[at : at + count * RECORD_BYTES])
            for i in range(count):
                raw = part[i * RECORD_BYTES : (i + 1) * RECORD_BYTES]
                record = read_record(self._shape, first + i, raw)
                if record is not None:
                    found.append(record)
        found.sort(key=lambda record: record.generation)
        self._generation = max([self._generation, *(r.generation for r in found[-1:])])
        return found

    def _at(self, slot: int) -> int:
        assert 0 <= slot < self._shape.slots
        return TABLE_OFFSET + slot * RECORD_BYTES

    @staticmethod
    def _pack(record: Record, generation: int) -> bytes:
        return _RECORD.pack(
            COMMITTED,
            generation,
            record.slot,
            record.tokens,
            record.start,
            record.whole,
            record.offset,
            record.length,
            record.crc,
            record.name.digest,
            record.name.before or _NONE,
            record.name.owner,
        )


def read_record(shape: Shape, slot: int, raw: bytes) -> Record | None:
    """The record in the `RECORD_BYTES` of a slot; None where it is not whole, or out of bounds."""
    if raw[_STATE_AT] != COMMITTED:
        return None
    if _CRC.unpack_from(raw)[0] != zlib.crc32(raw[_STATE_AT:]):
        return None
    fields = _RECORD.unpack_from(raw, _STATE_AT)
    _, generation, own, tokens, start, whole, offset, length, crc, digest, before, owner = fields
    if own != slot or not length or not tokens or offset + length > shape.data_bytes:
        return None
    if owner >> 63:
        return None
    name = PageName(digest, None if before == _NONE else before, owner)
    return Record(slot, name, tokens, offset, length, start, whole, crc, generation)
