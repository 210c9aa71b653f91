"""The messages: golden bytes of each (a change of the wire shows up here first), and the packing of keys."""

from __future__ import annotations

import json
import typing
from array import array
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.errors import ProtocolError
from cachesvc.types import GROUPS_MAX, KEY_BYTES_MAX, KEYS_PER_MESSAGE_MAX
from cachesvc.wire import messages as m
from cachesvc.wire.framing import decode_control_request, encode
from tests.support.wire_examples import EXAMPLES

GOLDEN = Path(__file__).parent.parent / "golden" / "wire_v1.json"


def test_every_message_has_an_example() -> None:
    assert {type(example) for example in EXAMPLES} == set(typing.get_args(m.Message))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: type(e).__name__)
def test_golden_bytes(example: m.Message) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert msgspec.msgpack.encode(example).hex() == golden[type(example).__name__]


def test_columns_of_slots_have_one_length() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        m.Slots([1], [1, 2], [1])
    raw = msgspec.msgpack.encode([3, 4, 5])  # not even columns
    with pytest.raises(ProtocolError):
        decode_control_request(raw)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session", b"s" * 15),
        ("session", b"s" * 65),
        ("role", "king"),
        ("token", b"t" * 17),
        ("namespace", b"n" * 15),
        ("label", "l" * 257),
        ("components", {str(i): "" for i in range(65)}),
        ("chunk_bytes", []),
        ("chunk_bytes", [0]),
        ("chunk_bytes", [1] * 65),
        ("call", -1),
    ],
)
def test_a_hello_out_of_bounds_is_refused(field: str, value: object) -> None:
    hello = msgspec.structs.asdict(EXAMPLES[0])
    hello[field] = value
    with pytest.raises(ProtocolError, match="can't be read"):
        decode_control_request(msgspec.msgpack.encode([1, *hello.values()]))


# --- keys -----------------------------------------------------------------------------------------------------------

keys_strategy = st.one_of(
    st.lists(st.binary(min_size=1, max_size=KEY_BYTES_MAX), max_size=70),
    st.integers(1, KEY_BYTES_MAX).flatmap(lambda n: st.lists(st.binary(min_size=n, max_size=n), max_size=200)),
)


@given(keys_strategy, st.integers(0, GROUPS_MAX - 1))
def test_keys_come_back(keys: list[bytes], group: int) -> None:
    batch = m.pack_keys(group, keys)
    assert batch.group == group
    assert m.unpack_keys(batch) == keys
    sent = decode_control_request(encode(m.Lookup(1, batch))[4:])
    assert isinstance(sent, m.Lookup)
    assert m.unpack_keys(sent.keys) == keys


@pytest.mark.parametrize("count", [1, 63, 64, 65, KEYS_PER_MESSAGE_MAX])
@pytest.mark.parametrize("length", [1, 32, KEY_BYTES_MAX])
def test_full_batches_come_back(count: int, length: int) -> None:
    keys = [i.to_bytes(2, "little").ljust(length, b"\0")[:length] for i in range(count)]
    assert m.unpack_keys(m.pack_keys(0, keys)) == keys


@pytest.mark.parametrize(
    "keys",
    [[b""], [b"a", b""], [b"x" * 65], [b"a", b"x" * 65], [b"x"] * (KEYS_PER_MESSAGE_MAX + 1), ["text"], [b"a", 3]],
    ids=["empty", "one empty", "long", "one long", "many", "text", "number"],
)
def test_bad_keys_are_the_callers_fault(keys: list[bytes]) -> None:
    with pytest.raises(ValueError, match="key"):
        m.pack_keys(0, keys)


@pytest.mark.parametrize("group", [-1, GROUPS_MAX])
def test_a_group_that_cannot_be(group: int) -> None:
    with pytest.raises(ValueError, match="KV group"):
        m.pack_keys(group, [b"a"])


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (m.KeyBatch(GROUPS_MAX, 1, b"a"), "KV group"),
        (m.KeyBatch(0, 0, b"a"), "a key of 0 bytes"),
        (m.KeyBatch(0, 65, b"a" * 65), "a key of 65 bytes"),
        (m.KeyBatch(0, 2**64 - 1, b"a"), "a key of"),
        (m.KeyBatch(0, 2, b"abc"), "no multiple"),
        (m.KeyBatch(0, 1, b"a" * 4097), "4097 keys"),
        (m.KeyBatch(0, [1] * 4097, b"a" * 4097), "4097 keys"),
        (m.KeyBatch(0, [1, 1], b"a"), "add up"),
        (m.KeyBatch(0, [1], b"ab"), "add up"),
        (m.KeyBatch(0, [0, 1], b"a"), "keys of 0"),
        (m.KeyBatch(0, [65], b"a" * 65), "keys of 65"),
    ],
)
def test_bad_batches_are_the_peers_fault(batch: m.KeyBatch, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        m.unpack_keys(batch)


@given(
    st.builds(
        m.KeyBatch,
        st.integers(0, 2**64 - 1),
        st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 70), st.lists(st.integers(0, 70), max_size=20)),
        st.binary(max_size=200),
    )
)
def test_any_batch_gives_keys_or_a_reason(batch: m.KeyBatch) -> None:
    try:
        keys = m.unpack_keys(batch)
    except ProtocolError as error:
        assert str(error)
    else:
        assert b"".join(keys) == batch.blob
        assert all(1 <= len(key) <= KEY_BYTES_MAX for key in keys)


@pytest.mark.parametrize(
    "keys",
    [
        [memoryview(array("I", [1, 2, 3]))],
        [b"abc", memoryview(array("I", [1, 2, 3]))],
        [b"a", memoryview(array("I", [1, 2, 3]))],
        [bytearray(b"abc")],
        [None],
        ["abc"],
        [5],
    ],
)
def test_keys_are_bytes(keys: list[typing.Any]) -> None:
    """Other buffers would be joined, too, but cut elsewhere by the peer."""
    with pytest.raises(ValueError, match="keys are bytes"):
        m.pack_keys(0, keys)
