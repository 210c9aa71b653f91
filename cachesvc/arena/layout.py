"""The table of an extent, byte by byte: what the daemon writes, clients check generations in, and a restart reads.

Covers: header, entries, the order of stores that makes a kill at any instant harmless, decoding a whole table. Pure:
all of it works on buffers that somebody else owns. Not here: files, mappings and descriptors (`arena.host`), what the
states mean and who moves a slot (`core.slots`).

A table is a header and one entry a slot; everything is little-endian::

    header, 4096 bytes                                   entry, 128 bytes
    offset  size                                         offset  size
         0     8  magic b"CSVTABLE"                           0     8  word: generation << 8 | state
         8     4  layout version                              8    16  namespace digest
        12     4  slots                                      24    64  key, padded with zeros
        16     8  extent number                              88     8  payload checksum, 0 unless known
        24     8  inode of the data file                     96     4  bytes stored
        32     8  bytes of the extent                       100     2  KV group
        40     8  bytes of a slot                           102     1  bytes of the key, 1-64
        48    16  arena uuid                                103     1  flags; bit 0: payload checksum known
        64    16  boot id                                   104     4  crc32 of the bytes 1-103
        80     1  bytes of the tenant, 1-63                 108     4  zero
        81    63  tenant, utf-8, padded with zeros          112     8  last use, float64 seconds, monotonic clock
       144  3948  zero                                      120     8  zero
      4092     4  crc32 of the bytes 0-4091

The crc of an entry begins behind the state byte: it covers the generation (the other seven bytes of the word) and
every field, so the fields of an earlier life of a slot never pass under a later generation. Last use is a hint and lies
behind the crc. Seal: fields, crc, then the word. Reuse: first the word, to free with the generation raised; fields only
at the next seal. The word is one aligned 8-byte store. A state other than these three reads as writing.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from cachesvc.core.events import TableColumns
from cachesvc.errors import FormatError
from cachesvc.types import GROUPS_MAX, KEY_BYTES_MAX, NAMESPACE_BYTES

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

LAYOUT_VERSION: Final = 1
TABLE_HEADER_BYTES: Final = 4096
ENTRY_BYTES: Final = 128
TENANT_BYTES_MAX: Final = 63
GENERATION_MAX: Final = 2**56 - 1

STATE_FREE: Final = 0
STATE_WRITING: Final = 1
STATE_SEALED: Final = 2
"""The same numbers as `core.slots.SlotState`, which has one more that no table knows."""

_MAGIC: Final = b"CSVTABLE"
_HEADER: Final = struct.Struct("<8sIIQQQQ16s16sB63s")
_VERSION: Final = struct.Struct("<8sI")
_CRC: Final = struct.Struct("<I")
_CRC_OFFSET_HEADER: Final = TABLE_HEADER_BYTES - _CRC.size

_ENTRY: Final = struct.Struct("<Q16s64sQIHBB")
_CRC_FIRST: Final = 1
_CRC_OFFSET: Final = _ENTRY.size
_LAST_USE_OFFSET: Final = 112
_FIELDS: Final = slice(8, _CRC_OFFSET + _CRC.size)

ENTRY: Final = np.dtype(
    {
        "names": ["word", "namespace", "key", "checksum", "length", "group", "key_length", "flags", "crc", "last_use"],
        "formats": ["<u8", "V16", "V64", "<u8", "<u4", "<u2", "u1", "u1", "<u4", "<f8"],
        "offsets": [0, 8, 24, 88, 96, 100, 102, 103, _CRC_OFFSET, _LAST_USE_OFFSET],
        "itemsize": ENTRY_BYTES,
    }
)


# --- header ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """What a table says of its extent; `arena` and `boot` are 16 bytes, sizes are in bytes."""

    arena: bytes
    boot: bytes
    extent: int
    inode: int
    tenant: str
    extent_bytes: int
    slot_bytes: int
    slot_count: int


def encode_header(header: Header) -> bytes:
    """The first `TABLE_HEADER_BYTES` of a table; ValueError if a field can't be written as it is."""
    tenant = header.tenant.encode()
    if not 0 < len(tenant) <= TENANT_BYTES_MAX:
        raise ValueError(f"tenant {header.tenant!r} must have 1 to {TENANT_BYTES_MAX} bytes in utf-8")
    if len(header.arena) != 16 or len(header.boot) != 16:
        raise ValueError("arena uuid and boot id must have 16 bytes each")
    if not 0 < header.slot_bytes * header.slot_count <= header.extent_bytes:
        raise ValueError(f"{header.slot_count} slots of {header.slot_bytes} don't fit {header.extent_bytes} bytes")
    fields = _HEADER.pack(
        _MAGIC,
        LAYOUT_VERSION,
        header.slot_count,
        header.extent,
        header.inode,
        header.extent_bytes,
        header.slot_bytes,
        header.arena,
        header.boot,
        len(tenant),
        tenant,
    )
    body = fields.ljust(_CRC_OFFSET_HEADER, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def decode_header(buffer: ReadableBuffer) -> Header:
    """Read the header at the start of a table; FormatError says what is wrong with it."""
    view = memoryview(buffer)[:TABLE_HEADER_BYTES]
    if len(view) < TABLE_HEADER_BYTES:
        raise FormatError(f"the table has only {len(view)} bytes")
    magic, version = _VERSION.unpack_from(view)
    if magic != _MAGIC:
        raise FormatError("it is no table (magic)")
    if version != LAYOUT_VERSION:
        raise FormatError(f"its layout version is {version}, this daemon reads {LAYOUT_VERSION}")
    if zlib.crc32(view[:_CRC_OFFSET_HEADER]) != _CRC.unpack_from(view, _CRC_OFFSET_HEADER)[0]:
        raise FormatError("its header is damaged (crc)")
    _, _, slot_count, extent, inode, extent_bytes, slot_bytes, arena, boot, tenant_length, tenant = _HEADER.unpack_from(
        view
    )
    if not 0 < tenant_length <= TENANT_BYTES_MAX or not 0 < slot_bytes * slot_count <= extent_bytes:
        raise FormatError("its header has a right crc and impossible sizes: another program wrote it")
    try:
        name = tenant[:tenant_length].decode()
    except UnicodeDecodeError:
        raise FormatError("its tenant is no utf-8: another program wrote it") from None
    return Header(arena, boot, extent, inode, name, extent_bytes, slot_bytes, slot_count)


# --- entries --------------------------------------------------------------------------------------------------------


def table_bytes(slot_count: int) -> int:
    """Size of the table file of an extent with that many slots."""
    return TABLE_HEADER_BYTES + ENTRY_BYTES * slot_count


def word(generation: int, state: int) -> int:
    """The state word of a slot; what a client expects to find there while its lease or ticket is good."""
    return generation << 8 | state


def words_view(table: ReadableBuffer, slot_count: int) -> NDArray[np.uint64]:
    """The words of a table as a strided column over the caller's buffer: read-only if the buffer is.

    The column keeps the buffer exported: a mapping can be closed only after every view on it is gone.
    """
    return np.ndarray(
        (slot_count,), np.uint64, buffer=memoryview(table), offset=TABLE_HEADER_BYTES, strides=(ENTRY_BYTES,)
    )


class TableWriter:
    """The one writer of a table. Owned by the daemon loop; the caller keeps the buffer mapped as long as this lives.

    Slot numbers are trusted to be below `slot_count` (IndexError otherwise, nothing written for that slot).
    """

    def __init__(self, table: WriteableBuffer, slot_count: int) -> None:
        self._bytes = memoryview(table).cast("B")
        self._words = words_view(table, slot_count)
        self._last_use: NDArray[np.float64] = np.ndarray(
            (slot_count,),
            np.float64,
            buffer=self._bytes,
            offset=TABLE_HEADER_BYTES + _LAST_USE_OFFSET,
            strides=(ENTRY_BYTES,),
        )
        self._scratch = bytearray(ENTRY_BYTES)

    def mark(self, slots: Sequence[int], generations: Sequence[int], state: int) -> None:
        """Set the words of `slots` (distinct) to `state` at `generations`; fields stay as they are."""
        words = self._words
        for slot, generation in zip(slots, generations, strict=True):
            words[slot] = generation << 8 | state

    def seal(
        self,
        slots: Sequence[int],
        generations: Sequence[int],
        namespace: bytes,
        group: int,
        keys: Sequence[bytes],
        lengths: Sequence[int],
    ) -> None:
        """Write fields and crc of each slot, then its word as sealed. `lengths` are the bytes stored in each.

        ValueError for a namespace or key that an entry can't hold: slots before it are sealed then.
        """
        if len(namespace) != NAMESPACE_BYTES:
            raise ValueError(f"a namespace digest has {NAMESPACE_BYTES} bytes, not {len(namespace)}")
        words, table, scratch = self._words, self._bytes, self._scratch
        view = memoryview(scratch)
        covered, fields = view[_CRC_FIRST:_CRC_OFFSET], view[_FIELDS]
        for slot, generation, key, length in zip(slots, generations, keys, lengths, strict=True):
            if not 0 < len(key) <= KEY_BYTES_MAX:
                raise ValueError(f"a key has 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
            sealed = generation << 8 | STATE_SEALED
            _ENTRY.pack_into(scratch, 0, sealed, namespace, key, 0, length, group, len(key), 0)
            _CRC.pack_into(scratch, _CRC_OFFSET, zlib.crc32(covered))
            start = TABLE_HEADER_BYTES + slot * ENTRY_BYTES
            table[start + _FIELDS.start : start + _FIELDS.stop] = fields
            words[slot] = sealed

    def save_last_use(self, last_use: NDArray[np.float64]) -> None:
        """Write the last use of every slot, in seconds."""
        self._last_use[:] = last_use

    def release(self) -> None:
        """Let go of the buffer, so that a mapping can be closed. The writer is unusable afterwards."""
        self._bytes.release()
        del self._words, self._last_use


def decode_table(table: ReadableBuffer, header: Header) -> TableColumns:
    """Every entry of a table, checked, copied out of the buffer.

    A sealed entry that fails its crc, or says what no daemon writes, comes out as writing. Keys and namespaces are b"",
    groups 0 where not sealed. FormatError if the buffer is too short for the header's slots.
    """
    view = memoryview(table).cast("B")
    if len(view) < table_bytes(header.slot_count):
        raise FormatError(f"the table has {len(view)} bytes, {header.slot_count} slots need more")
    entries = np.frombuffer(view, ENTRY, header.slot_count, TABLE_HEADER_BYTES)
    words = entries["word"].copy()
    states = (words & 0xFF).astype(np.uint8)
    states[states > STATE_SEALED] = STATE_WRITING

    sealed = np.flatnonzero(states == STATE_SEALED)
    picked = entries[sealed]
    good = _crcs(view, sealed) == picked["crc"]
    good &= (picked["key_length"] - np.uint8(1) < KEY_BYTES_MAX) & (picked["group"] < GROUPS_MAX)
    good &= picked["length"] <= header.slot_bytes
    states[sealed[~good]] = STATE_WRITING
    sealed, picked = sealed[good], picked[good]

    last_use = entries["last_use"].copy()
    last_use[~np.isfinite(last_use)] = 0.0
    groups = np.zeros(header.slot_count, np.uint16)
    groups[sealed] = picked["group"]
    interned: dict[bytes, bytes] = {}
    namespaces = [interned.setdefault(digest, digest) for digest in picked["namespace"].tolist()]
    keys = [key[:length] for key, length in zip(picked["key"].tolist(), picked["key_length"].tolist(), strict=True)]
    return TableColumns(
        generations=words >> np.uint64(8),
        states=states,
        namespaces=_spread(namespaces, sealed, header.slot_count),
        groups=groups.tolist(),
        keys=_spread(keys, sealed, header.slot_count),
        lengths=entries["length"].copy(),
        last_use=last_use,
    )


def _crcs(view: memoryview, slots: NDArray[np.intp]) -> NDArray[np.uint32]:
    """The crc that each of these entries ought to have."""
    crc32, covered = zlib.crc32, _CRC_OFFSET - _CRC_FIRST
    starts = (slots * ENTRY_BYTES + (TABLE_HEADER_BYTES + _CRC_FIRST)).tolist()
    return np.array([crc32(view[start : start + covered]) for start in starts], np.uint32)


def _spread(values: list[bytes], slots: NDArray[np.intp], slot_count: int) -> list[bytes]:
    """A column of `slot_count` with `values` at `slots` and b"" elsewhere."""
    if len(values) == slot_count:
        return values
    column = [b""] * slot_count
    for slot, value in zip(slots.tolist(), values, strict=True):
        column[slot] = value
    return column
