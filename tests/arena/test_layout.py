from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachesvc.arena.layout import (
    ENTRY,
    ENTRY_BYTES,
    GENERATION_MAX,
    LAYOUT_VERSION,
    STATE_FREE,
    STATE_SEALED,
    STATE_WRITING,
    TABLE_HEADER_BYTES,
    TENANT_BYTES_MAX,
    Header,
    TableWriter,
    decode_header,
    decode_table,
    encode_header,
    table_bytes,
    word,
    words_view,
)
from cachesvc.core.slots import SlotState
from cachesvc.errors import FormatError
from cachesvc.types import GROUPS_MAX, KEY_BYTES_MAX, NAMESPACE_BYTES, PAGE_BYTES

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "table_v1.json").read_text())
NAMESPACE = bytes(range(16))
HEADER = Header(
    arena=bytes(range(16)),
    boot=bytes(range(16, 32)),
    extent=7,
    inode=2**40 + 1,
    tenant="défault",
    extent_bytes=1 << 24,
    slot_bytes=PAGE_BYTES,
    slot_count=3,
)

CRC_OFFSET = 104


def table_of(header: Header = HEADER) -> bytearray:
    return bytearray(encode_header(header) + bytes(ENTRY_BYTES * header.slot_count))


def entry_of(table: bytearray, slot: int) -> memoryview:
    start = TABLE_HEADER_BYTES + slot * ENTRY_BYTES
    return memoryview(table)[start : start + ENTRY_BYTES]


def write_golden(table: bytearray) -> None:
    writer = TableWriter(table, 3)
    writer.mark((0, 1, 2), (0, 5, GENERATION_MAX), STATE_WRITING)
    writer.seal((1, 2), (5, GENERATION_MAX), NAMESPACE, 3, (b"key\0", bytes(range(64))), (4096, 17))
    writer.save_last_use(np.array([0.0, 1.5, 1e9]))


def recrc(entry: memoryview) -> None:
    struct.pack_into("<I", entry, CRC_OFFSET, zlib.crc32(entry[1:CRC_OFFSET]))


# --- the format -----------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    table = table_of()
    write_golden(table)
    assert table[:144].hex() == GOLDEN["header"]
    assert table[144:4092] == bytes(3948)
    assert table[4092:4096].hex() == GOLDEN["header_crc"]
    assert [entry_of(table, slot).hex() for slot in range(3)] == GOLDEN["entries"]


def test_golden_table_is_read() -> None:
    table = bytes.fromhex(GOLDEN["header"]) + bytes(3948) + bytes.fromhex(GOLDEN["header_crc"])
    table += b"".join(map(bytes.fromhex, GOLDEN["entries"]))
    header = decode_header(table)
    assert header == HEADER
    columns = decode_table(table, header)
    assert columns.generations.tolist() == [0, 5, GENERATION_MAX]
    assert columns.states.tolist() == [STATE_WRITING, STATE_SEALED, STATE_SEALED]
    assert columns.namespaces == [b"", NAMESPACE, NAMESPACE]
    assert columns.keys == [b"", b"key\0", bytes(range(64))]
    assert columns.groups == [0, 3, 3]
    assert columns.lengths.tolist()[1:] == [4096, 17]
    assert columns.last_use.tolist() == [0.0, 1.5, 1e9]


def test_constants_agree() -> None:
    fields: Any = ENTRY.fields
    assert ENTRY.itemsize == ENTRY_BYTES
    assert TABLE_HEADER_BYTES % 8 == ENTRY_BYTES % 8 == 0, "words must be aligned in a mapping"
    assert fields["word"][1] == 0
    assert fields["key"][0].itemsize == KEY_BYTES_MAX
    assert fields["namespace"][0].itemsize == NAMESPACE_BYTES
    assert fields["crc"][1] == CRC_OFFSET
    assert GROUPS_MAX <= 2**16
    assert (STATE_FREE, STATE_WRITING, STATE_SEALED) == (SlotState.FREE, SlotState.WRITING, SlotState.SEALED)
    assert word(5, STATE_SEALED) == 0x502
    assert word(GENERATION_MAX, STATE_SEALED) < 2**64


# --- header ---------------------------------------------------------------------------------------------------------


@given(
    st.builds(
        Header,
        arena=st.binary(min_size=16, max_size=16),
        boot=st.binary(min_size=16, max_size=16),
        extent=st.integers(0, 2**64 - 1),
        inode=st.integers(0, 2**64 - 1),
        tenant=st.text(min_size=1, max_size=15),
        extent_bytes=st.just(1 << 30),
        slot_bytes=st.integers(1, 1 << 20),
        slot_count=st.integers(1, 1 << 10),
    )
)
def test_header_comes_back(header: Header) -> None:
    encoded = encode_header(header)
    assert len(encoded) == TABLE_HEADER_BYTES
    assert decode_header(encoded + b"entries") == header


def test_any_flipped_bit_of_the_header_is_seen() -> None:
    encoded = bytearray(encode_header(HEADER))
    for offset in range(TABLE_HEADER_BYTES):
        encoded[offset] ^= 1 << offset % 8
        with pytest.raises(FormatError):
            decode_header(encoded)
        encoded[offset] ^= 1 << offset % 8
    assert decode_header(encoded) == HEADER


def test_header_of_another_version_says_so() -> None:
    encoded = bytearray(encode_header(HEADER))
    struct.pack_into("<I", encoded, 8, LAYOUT_VERSION + 1)
    with pytest.raises(FormatError, match=f"version is {LAYOUT_VERSION + 1}, this daemon reads {LAYOUT_VERSION}"):
        decode_header(encoded)


@pytest.mark.parametrize("length", [0, 1, 12, 144, TABLE_HEADER_BYTES - 1])
def test_short_header(length: int) -> None:
    with pytest.raises(FormatError, match=f"only {length} bytes"):
        decode_header(encode_header(HEADER)[:length])


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (80, b"\0"),  # a tenant without bytes
        (80, b"\x40"),  # or with more than there are
        (81, b"\xff"),  # or no utf-8
        (40, bytes(8)),  # no slot size
        (12, bytes(4)),  # no slots
        (32, b"\1" + bytes(7)),  # more slots than bytes
    ],
)
def test_impossible_header_with_a_right_crc(offset: int, value: bytes) -> None:
    encoded = bytearray(encode_header(HEADER))
    encoded[offset : offset + len(value)] = value
    struct.pack_into("<I", encoded, 4092, zlib.crc32(encoded[:4092]))
    with pytest.raises(FormatError, match="another program"):
        decode_header(encoded)


@pytest.mark.parametrize(
    "header",
    [
        replace(HEADER, tenant=""),
        replace(HEADER, tenant="x" * (TENANT_BYTES_MAX + 1)),
        replace(HEADER, arena=b"short"),
        replace(HEADER, boot=b""),
        replace(HEADER, slot_count=0),
        replace(HEADER, slot_count=(1 << 12) + 1),
    ],
)
def test_header_that_can_not_be_written(header: Header) -> None:
    with pytest.raises(ValueError, match=r"must have|don't fit"):
        encode_header(header)


# --- entries --------------------------------------------------------------------------------------------------------

ENTRIES = st.lists(
    st.tuples(
        st.integers(0, GENERATION_MAX),
        st.binary(min_size=1, max_size=KEY_BYTES_MAX),
        st.integers(0, PAGE_BYTES),
        st.sampled_from([STATE_FREE, STATE_WRITING, STATE_SEALED]),
    ),
    min_size=1,
    max_size=20,
)


@given(ENTRIES, st.binary(min_size=16, max_size=16), st.integers(0, GROUPS_MAX - 1))
@example([(1, b"k\0\0", 0, STATE_SEALED)], bytes(16), 0)
def test_entries_come_back(entries: list[tuple[int, bytes, int, int]], namespace: bytes, group: int) -> None:
    header = replace(HEADER, slot_count=len(entries))
    table = table_of(header)
    writer = TableWriter(table, len(entries))
    for slot, (generation, key, length, state) in enumerate(entries):
        if state == STATE_SEALED:
            writer.seal((slot,), (generation,), namespace, group, (key,), (length,))
        else:
            writer.mark((slot,), (generation,), state)
    columns = decode_table(table, header)
    assert columns.generations.tolist() == [generation for generation, _, _, _ in entries]
    assert columns.states.tolist() == [state for *_, state in entries]
    for slot, (_, key, length, state) in enumerate(entries):
        sealed = state == STATE_SEALED
        assert columns.keys[slot] == (key if sealed else b"")
        assert columns.namespaces[slot] == (namespace if sealed else b"")
        assert columns.groups[slot] == (group if sealed else 0)
        if sealed:
            assert columns.lengths[slot] == length


def sealed_table(key: bytes = b"the key") -> bytearray:
    table = table_of()
    TableWriter(table, 3).seal((1,), (9,), NAMESPACE, 2, (key,), (4000,))
    return table


def decoded(table: bytearray) -> tuple[Any, ...]:
    """Slot 1 as far as a reader believes it: state, and all that matters if it is sealed."""
    columns = decode_table(table, HEADER)
    if columns.states[1] != STATE_SEALED:
        return (int(columns.states[1]),)
    return (
        STATE_SEALED,
        int(columns.generations[1]),
        columns.namespaces[1],
        columns.groups[1],
        columns.keys[1],
        int(columns.lengths[1]),
    )


def test_any_flipped_bit_of_a_sealed_entry_is_seen() -> None:
    table = sealed_table()
    whole = decoded(table)
    assert whole == (STATE_SEALED, 9, NAMESPACE, 2, b"the key", 4000)
    entry = entry_of(table, 1)
    for offset in range(CRC_OFFSET + 4):
        for bit in range(8):
            entry[offset] ^= 1 << bit
            assert decoded(table)[0] != STATE_SEALED, f"bit {bit} of byte {offset}"
            entry[offset] ^= 1 << bit
    assert decoded(table) == whole


@given(st.integers(0, ENTRY_BYTES - 1), st.integers(0, 255), st.binary(min_size=1, max_size=KEY_BYTES_MAX))
def test_any_changed_byte_gives_not_sealed_or_the_same(offset: int, value: int, key: bytes) -> None:
    table = sealed_table(key)
    whole = decoded(table)
    entry_of(table, 1)[offset] = value
    assert decoded(table)[0] != STATE_SEALED or decoded(table) == whole


@given(st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES))
def test_garbage_is_no_sealed_entry(garbage: bytes) -> None:
    table = table_of()
    entry_of(table, 1)[:] = garbage
    assert decoded(table)[0] != STATE_SEALED
    assert np.isfinite(decode_table(table, HEADER).last_use).all()


def test_fields_of_an_earlier_life_never_pass_again() -> None:
    table = sealed_table()
    writer = TableWriter(table, 3)
    writer.mark((1,), (10,), STATE_FREE)
    assert decoded(table) == (STATE_FREE,)
    writer.mark((1,), (10,), STATE_SEALED)  # what no daemon does: sealed before the fields are there
    assert decoded(table) == (STATE_WRITING,)


def test_reuse_changes_the_word_alone() -> None:
    table = sealed_table()
    fields = bytes(entry_of(table, 1)[8:])
    TableWriter(table, 3).mark((1,), (10,), STATE_FREE)
    assert entry_of(table, 1)[8:] == fields
    assert words_view(table, 3)[1] == word(10, STATE_FREE)


def test_seal_stores_the_word_last() -> None:
    table = table_of()
    writer = TableWriter(table, 3)
    writer.mark((0, 1), (4, 4), STATE_WRITING)
    stored = []

    class Watched:
        """Looks at the entry at the moment in which its word is stored."""

        def __setitem__(self, slot: int, value: int) -> None:
            entry = entry_of(table, slot)
            assert entry[:8] == struct.pack("<Q", word(4, STATE_WRITING)), "half-written fields under a final word"
            final = struct.pack("<Q", value) + entry[8:]
            assert zlib.crc32(final[1:CRC_OFFSET]) == struct.unpack_from("<I", entry, CRC_OFFSET)[0]
            stored.append(slot)

    writer._words = Watched()  # type: ignore[assignment]
    writer.seal((0, 1), (4, 4), NAMESPACE, 0, (b"a", b"b"), (1, 2))
    assert stored == [0, 1]


def test_a_kill_within_the_fields_leaves_writing() -> None:
    before, after = table_of(), sealed_table()
    TableWriter(before, 3).mark((1,), (9,), STATE_WRITING)
    for written in range(8, ENTRY_BYTES):
        torn = bytearray(before)
        entry_of(torn, 1)[8:written] = entry_of(after, 1)[8:written]
        assert decoded(torn) == (STATE_WRITING,)


@pytest.mark.parametrize("state", [3, 4, 127, 255])
def test_unknown_states_are_writing(state: int) -> None:
    table = sealed_table()
    entry_of(table, 1)[0] = state
    assert decoded(table) == (STATE_WRITING,)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (102, b"\0"),  # no key
        (102, b"\x41"),  # a longer key than there is room for
        (96, struct.pack("<I", PAGE_BYTES + 1)),  # more bytes than a slot has
        (100, struct.pack("<H", GROUPS_MAX)),  # no such group
    ],
)
def test_impossible_entry_with_a_right_crc(offset: int, value: bytes) -> None:
    table = sealed_table()
    entry = entry_of(table, 1)
    entry[offset : offset + len(value)] = value
    recrc(entry)
    assert decoded(table) == (STATE_WRITING,)


def test_last_use_that_is_no_time_is_zero() -> None:
    table = table_of()
    TableWriter(table, 3).save_last_use(np.array([math.nan, math.inf, 3.0]))
    assert decode_table(table, HEADER).last_use.tolist() == [0.0, 0.0, 3.0]


def test_short_table() -> None:
    with pytest.raises(FormatError, match="3 slots need more"):
        decode_table(table_of()[:-1], HEADER)


@pytest.mark.parametrize("key", [b"", b"x" * (KEY_BYTES_MAX + 1)])
def test_key_that_does_not_fit(key: bytes) -> None:
    table = table_of()
    writer = TableWriter(table, 3)
    with pytest.raises(ValueError, match=f"not {len(key)}"):
        writer.seal((0, 1), (1, 1), NAMESPACE, 0, (b"good", key), (1, 1))
    assert decode_table(table, HEADER).states.tolist() == [STATE_SEALED, STATE_FREE, STATE_FREE]


def test_writer_refuses_what_is_no_batch() -> None:
    table = table_of()
    writer = TableWriter(table, 3)
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        writer.seal((0,), (1,), b"abc", 0, (b"k",), (1,))
    with pytest.raises(ValueError, match="zip"):
        writer.mark((0, 1), (1,), STATE_FREE)
    with pytest.raises(IndexError):
        writer.mark((3,), (1,), STATE_FREE)
    with pytest.raises((IndexError, ValueError)):
        writer.seal((3,), (1,), NAMESPACE, 0, (b"k",), (1,))
    assert len(table) == table_bytes(3)


# --- views ----------------------------------------------------------------------------------------------------------


def test_words_view_shows_what_is_written() -> None:
    with mmap.mmap(-1, table_bytes(3)) as mapping:
        words = words_view(mapping, 3)
        assert words.ctypes.data % 8 == 0
        assert words.flags.aligned
        writer = TableWriter(mapping, 3)
        writer.mark((2, 0), (8, 9), STATE_WRITING)
        assert words.tolist() == [word(9, STATE_WRITING), 0, word(8, STATE_WRITING)]
        with pytest.raises(BufferError):
            mapping.close()
        writer.release()
        del words


def test_words_view_of_a_read_only_buffer_is_read_only() -> None:
    words = words_view(bytes(table_of()), 3)
    assert words.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        words[0] = 1
