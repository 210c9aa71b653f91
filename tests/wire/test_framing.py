"""Frames and decoding: whole, byte at a time, with garbage; the only way out besides messages is ProtocolError."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.errors import ProtocolError
from cachesvc.types import KEY_BYTES_MAX, KEYS_PER_MESSAGE_MAX
from cachesvc.wire import framing as f
from cachesvc.wire import messages as m
from tests.support.wire_examples import EXAMPLES

DECODERS: list[Callable[[bytes], m.Message]] = [
    f.decode_control_request,
    f.decode_control_reply,
    f.decode_descriptor_request,
    f.decode_descriptor_reply,
]


def feed(reader: f.FrameReader, data: bytes, step: int) -> list[bytes]:
    """Receive `data` in pieces of at most `step` bytes; payloads are copied out as they come."""
    payloads: list[bytes] = []
    while data:
        space = reader.buffer()
        assert len(space) > 0
        n = min(step, len(space), len(data))
        space[:n] = data[:n]
        data = data[n:]
        payloads += [bytes(payload) for payload in reader.advance(n)]
    return payloads


def decoder_of(example: m.Message) -> Callable[[bytes], m.Message]:
    """The first decoder that knows the type of a message."""
    for decoder in DECODERS:
        try:
            if decoder(f.encode(example)[4:]) == example:
                return decoder
        except ProtocolError:
            continue
    raise AssertionError(f"nobody decodes {example}")


# --- preface --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [f.PREFACE_CONTROL, f.PREFACE_DESCRIPTORS])
def test_preface_comes_back(kind: bytes) -> None:
    assert f.check_preface(f.preface(kind)) == kind


@pytest.mark.parametrize(
    ("two", "reason"),
    [
        (b"", "2 bytes, not 0"),
        (b"C", "2 bytes, not 1"),
        (b"C\x01\x00", "2 bytes, not 3"),
        (b"X\x01", "C or F"),
        (b"GE", "C or F"),
        (b"C\x00", "wire version 0, this daemon speaks 1: upgrade the client"),
        (b"F\x03", "wire version 3, this daemon speaks 1: upgrade the daemon"),
    ],
)
def test_bad_prefaces_are_told_why(two: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        f.check_preface(two)


# --- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: type(e).__name__)
def test_every_message_comes_back(example: m.Message) -> None:
    assert decoder_of(example)(f.encode(example)[4:]) == example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: type(e).__name__)
def test_truncated_and_trailing_bytes_are_refused(example: m.Message) -> None:
    payload = f.encode(example)[4:]
    decoder = decoder_of(example)
    for broken in [payload[:cut] for cut in range(len(payload))] + [payload + b"\x00", payload + payload]:
        with pytest.raises(ProtocolError, match="can't be read"):
            decoder(broken)


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.__name__)
@given(data=st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda tail: b"\x96\x04" + tail)))
def test_garbage_gives_a_reason(decoder: Callable[[bytes], m.Message], data: bytes) -> None:
    try:
        decoder(data)
    except ProtocolError as error:
        assert str(error)


@given(st.integers(0, len(EXAMPLES) - 1), st.randoms(use_true_random=False))
def test_one_flipped_byte_gives_a_message_or_a_reason(which: int, dice: random.Random) -> None:
    payload = bytearray(f.encode(EXAMPLES[which])[4:])
    payload[dice.randrange(len(payload))] ^= dice.randrange(1, 256)
    for decoder in DECODERS:
        try:
            decoder(bytes(payload))
        except ProtocolError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\x93\x04\x90" + b"\x91" * 100_000, "nested too deep"),
        (b"\x93\x0b\x01\xa2\xff\xfe", "UTF-8"),
        (b"\x92\x04\xdd\xff\xff\xff\xff", "truncated"),
        (b"\xdd\xff\xff\xff\xff\x04", "truncated"),
        (b"\x92\x0a\xff", ">= 0"),
        (b"\x92\x7f\x01", "Invalid value 127"),
        (b"\x80", "array"),
    ],
    ids=["deep", "not utf-8", "huge list", "huge message", "negative", "unknown tag", "no array"],
)
def test_hostile_payloads(payload: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        f.decode_control_request(payload)


def test_a_reply_is_no_request() -> None:
    with pytest.raises(ProtocolError):
        f.decode_control_request(f.encode(m.Pong(1, 2))[4:])
    with pytest.raises(ProtocolError):
        f.decode_control_reply(f.encode(m.Ping(1))[4:])


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 7, 1000, 1 << 30])
def test_frames_come_back_however_they_are_cut(step: int) -> None:
    stream = b"".join(f.encode(example) for example in EXAMPLES)
    payloads = feed(f.FrameReader(), stream, step)
    assert payloads == [f.encode(example)[4:] for example in EXAMPLES]


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=12),
    st.integers(1, 400),
    st.binary(max_size=3),
)
def test_any_frames_in_a_small_reader(bodies: list[bytes], step: int, partial: bytes) -> None:
    reader = f.FrameReader(frame_bytes_max=300)
    stream = b"".join(struct.pack("<I", len(body)) + body for body in bodies)
    assert feed(reader, stream + partial, step) == bodies
    assert reader.pending == len(partial)


def test_the_largest_frame_passes_and_the_buffer_stays_bounded() -> None:
    body = bytes(range(256)) * (f.FRAME_BYTES_MAX // 256)
    stream = struct.pack("<I", len(body)) + body
    reader = f.FrameReader()
    assert feed(reader, b"\x01\x00\x00\x00a" + stream + stream, 100_000) == [b"a", body, body]
    assert len(reader.buffer()) <= f.FRAME_BYTES_MAX + 4


def test_a_length_alone_gets_no_memory() -> None:
    """A client that promises a frame and doesn't send it must not make us keep memory for it."""
    reader = f.FrameReader()
    at_first = reader.capacity
    assert feed(reader, struct.pack("<I", f.FRAME_BYTES_MAX) + bytes(at_first - 5), 1 << 20) == []
    assert reader.capacity == len(reader.buffer()) + reader.pending == at_first
    feed(reader, bytes(10), 1 << 20)
    assert reader.capacity == 2 * at_first


def test_a_buffer_that_grew_shrinks_when_it_is_empty() -> None:
    body = bytes(range(256)) * 2048
    stream = struct.pack("<I", len(body)) + body
    reader = f.FrameReader()
    at_first = reader.capacity
    assert feed(reader, stream + b"\x01", 1 << 20) == [body]
    grown = reader.capacity
    assert len(body) < grown <= f.FRAME_BYTES_MAX + 4
    reader.shrink()
    assert (reader.capacity, reader.pending) == (grown, 1), "a frame is partly here"
    last = reader.advance(_put(reader, b"\x00\x00\x00a"))
    reader.shrink()
    assert reader.capacity == at_first
    assert [bytes(payload) for payload in last] == [b"a"], "what was given out stays good"
    assert feed(reader, stream, 1000) == [body]


def _put(reader: f.FrameReader, data: bytes) -> int:
    reader.buffer()[: len(data)] = data
    return len(data)


@pytest.mark.parametrize("length", [0, f.FRAME_BYTES_MAX + 1, 2**32 - 1])
@pytest.mark.parametrize("step", [1, 1000])
def test_empty_and_oversized_frames_break_the_reader(length: int, step: int) -> None:
    reader = f.FrameReader()
    with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
        feed(reader, struct.pack("<I", length), step)
    with pytest.raises(ProtocolError, match=f"a frame of {length} bytes"):
        reader.advance(0)


@given(st.binary(max_size=400), st.integers(1, 50))
def test_random_bytes_give_payloads_or_a_reason(data: bytes, step: int) -> None:
    try:
        feed(f.FrameReader(), data, step)
    except ProtocolError as error:
        assert str(error)


def test_payloads_stay_until_the_next_buffer() -> None:
    reader = f.FrameReader()
    frames = f.encode(m.Ping(1)) + f.encode(m.Ping(2))
    reader.buffer()[: len(frames)] = frames
    first, second = reader.advance(len(frames))
    assert [f.decode_control_request(view) for view in (first, second)] == [m.Ping(1), m.Ping(2)]


def test_one_payload_after_the_other() -> None:
    reader = f.FrameReader()
    frames = f.encode(m.Ping(1)) + f.encode(m.Ping(2)) + b"\x01"
    reader.received(_put(reader, frames))
    assert [bytes(reader.next() or b"") for _ in range(3)] == [b"\x92\x0a\x01", b"\x92\x0a\x02", b""]
    assert reader.pending == 1


def test_limits_fit_each_other() -> None:
    """A full batch of the longest keys, and its answer with the largest numbers, fit one frame."""
    n, big = KEYS_PER_MESSAGE_MAX, 2**64 - 1
    keys = m.pack_keys(0, [b"k" * KEY_BYTES_MAX] * (n - 1) + [b"k" * (KEY_BYTES_MAX - 1)])
    slots = m.Slots([big] * n, [big] * n, [big] * n)
    f.encode(m.Lease(big, big, keys, big))
    f.encode(m.Leased(big, b"\x01" * n, slots, [big] * n, big))
    f.encode(m.Seal(big, big, [big] * n))


def test_a_message_too_large_for_a_frame_is_not_encoded() -> None:
    with pytest.raises(ProtocolError, match="split it"):
        f.encode(m.Report(1, bytes(f.FRAME_BYTES_MAX)))


def test_the_encoder_writes_what_msgpack_says() -> None:
    frame = f.encode(m.Ping(5))
    assert frame == b"\x03\x00\x00\x00" + msgspec.msgpack.encode([10, 5])
