"""Bytes of a connection <-> messages: the preface, frames, and decoding with a reason for every refusal.

Pure: bytes in, messages out; who owns the socket is not known here. One `FrameReader` belongs to one connection.

    connection = preface frame*
    preface    = kind (b"C" control, b"F" descriptors)   version (1 byte, WIRE_VERSION)
    frame      = payload length (4 bytes, little-endian, 1 ... FRAME_BYTES_MAX)   payload (one msgpack message)

The only exception that bytes from a peer can cause is `ProtocolError`; its text is one line that says what was wrong.
Not here: the messages themselves and the packing of keys (`wire.messages`).
"""

from __future__ import annotations

import struct
from typing import Final, TypeVar

import msgspec

from cachesvc.errors import ProtocolError
from cachesvc.wire.messages import (
    WIRE_VERSION,
    ControlReply,
    ControlRequest,
    DescriptorReply,
    DescriptorRequest,
    Message,
)

PREFACE_CONTROL: Final = b"C"
PREFACE_DESCRIPTORS: Final = b"F"
PREFACE_BYTES: Final = 2

FRAME_BYTES_MAX: Final = 1 << 20
"""Payload of one frame. A batch of the longest keys with all its slots is a third of it (a test says so)."""

LENGTH: Final = struct.Struct("<I")
BUFFER_BYTES_MIN: Final = 64 * 1024
"""What a reader starts with; it grows with the bytes that came, to at most one frame and its length."""

_encoder: Final = msgspec.msgpack.Encoder()
_control_request: Final[msgspec.msgpack.Decoder[ControlRequest]] = msgspec.msgpack.Decoder(ControlRequest)
_control_reply: Final[msgspec.msgpack.Decoder[ControlReply]] = msgspec.msgpack.Decoder(ControlReply)
_descriptor_request: Final[msgspec.msgpack.Decoder[DescriptorRequest]] = msgspec.msgpack.Decoder(DescriptorRequest)
_descriptor_reply: Final[msgspec.msgpack.Decoder[DescriptorReply]] = msgspec.msgpack.Decoder(DescriptorReply)

M = TypeVar("M")


# --- preface --------------------------------------------------------------------------------------------------------


def preface(kind: bytes) -> bytes:
    """The two bytes that a client sends first; `kind` is one of the PREFACE_ constants."""
    return kind + bytes((WIRE_VERSION,))


def check_preface(two: bytes) -> bytes:
    """The kind that a preface asks for; ProtocolError if it is none, or of a version that isn't spoken here."""
    if len(two) != PREFACE_BYTES:
        raise ProtocolError(f"the preface has {PREFACE_BYTES} bytes, not {len(two)}")
    kind = bytes(two[:1])
    if kind not in (PREFACE_CONTROL, PREFACE_DESCRIPTORS):
        raise ProtocolError(f"a connection starts with C or F, not with {kind!r}: is this a cachesvc client?")
    version = two[1]
    if version != WIRE_VERSION:
        older = "client" if version < WIRE_VERSION else "daemon"
        raise ProtocolError(f"wire version {version}, this daemon speaks {WIRE_VERSION}: upgrade the {older}")
    return kind


# --- messages -------------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """One whole frame; ProtocolError if the message is larger than a frame may be (nothing was sent then)."""
    payload = _encoder.encode(message)
    if len(payload) > FRAME_BYTES_MAX:
        raise ProtocolError(f"a message of {len(payload)} bytes, a frame holds {FRAME_BYTES_MAX}: split it")
    return LENGTH.pack(len(payload)) + payload


def decode_control_request(payload: bytes | memoryview) -> ControlRequest:
    """What a client says on its control connection; ProtocolError with the reason."""
    return _decode(_control_request, payload)


def decode_control_reply(payload: bytes | memoryview) -> ControlReply:
    """What the daemon says on a control connection; ProtocolError with the reason."""
    return _decode(_control_reply, payload)


def decode_descriptor_request(payload: bytes | memoryview) -> DescriptorRequest:
    """What a client says on its descriptors connection; ProtocolError with the reason."""
    return _decode(_descriptor_request, payload)


def decode_descriptor_reply(payload: bytes | memoryview) -> DescriptorReply:
    """What the daemon says on a descriptors connection; ProtocolError with the reason."""
    return _decode(_descriptor_reply, payload)


def _decode(decoder: msgspec.msgpack.Decoder[M], payload: bytes | memoryview) -> M:
    try:
        return decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"a message that can't be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ProtocolError(f"a message that can't be read: text that is not UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise ProtocolError("a message that can't be read: nested too deep") from error


# --- frames ---------------------------------------------------------------------------------------------------------


class FrameReader:
    """Cuts received bytes into payloads without copying them.

    Turns of `buffer()` (where to receive into) and `advance(n)` (n bytes came), or `received(n)` and then `next()`
    until it has no more. Complete payloads are views into the buffer: good until the next `buffer()`. After a
    ProtocolError the reader stays broken and raises it again.

    A length alone gets no memory: the buffer doubles when it is full of bytes that really came, and stays grown until
    `shrink()`, because who sends long frames sends more of them.

        0 ........ start ............... end ........ len(view)
         consumed        a partial frame      free
    """

    __slots__ = ("_broken", "_end", "_frame_bytes_max", "_start", "_view")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._view = memoryview(bytearray(min(BUFFER_BYTES_MIN, frame_bytes_max + LENGTH.size)))
        self._start = 0
        self._end = 0
        self._broken: ProtocolError | None = None

    @property
    def pending(self) -> int:
        """Bytes that were not given out yet: once there is no next payload, of a frame that isn't complete."""
        return self._end - self._start

    @property
    def capacity(self) -> int:
        """Bytes of memory that the buffer takes."""
        return len(self._view)

    def shrink(self) -> None:
        """Back to the size at the start, if no frame is partly here; payloads given out before stay good."""
        if self._start == self._end and len(self._view) > BUFFER_BYTES_MIN:
            self._view = memoryview(bytearray(BUFFER_BYTES_MIN))
            self._start = self._end = 0

    def buffer(self) -> memoryview:
        """Free space, never empty; payloads given out before are overwritten from now on."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._view) or (self._start and self._start + self._wanted() > len(self._view)):
            self._make_room()
        return self._view[self._end :]

    def advance(self, n: int) -> list[memoryview]:
        """`n` bytes were put at the start of `buffer()`; the payloads they complete, perhaps none.

        ProtocolError for a frame longer than `frame_bytes_max` or empty; the payloads before it are lost, like the
        connection.
        """
        self.received(n)
        payloads = []
        while (payload := self.next()) is not None:
            payloads.append(payload)
        return payloads

    def received(self, n: int) -> None:
        """`n` bytes were put at the start of `buffer()`; for whoever takes one payload after the other by `next()`."""
        self._end += n

    def next(self) -> memoryview | None:
        """The next payload that is here whole, None if none is. ProtocolError as in `advance`."""
        if self._broken is not None:
            raise self._broken
        if self._end - self._start < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._view, self._start)
        if not 0 < length <= self._frame_bytes_max:
            self._broken = ProtocolError(f"a frame of {length} bytes, allowed are 1 to {self._frame_bytes_max}")
            raise self._broken
        start = self._start + LENGTH.size
        if start + length > self._end:
            return None
        self._start = start + length
        return self._view[start : self._start]

    def _wanted(self) -> int:
        """Bytes of the frame at `start` as far as is known, its length included."""
        if self._end - self._start < LENGTH.size:
            return LENGTH.size
        length: int = LENGTH.unpack_from(self._view, self._start)[0]
        return LENGTH.size + length

    def _make_room(self) -> None:
        """Move the partial frame to the front, of a larger buffer if it fills this one."""
        partial = self._view[self._start : self._end]
        if len(partial) == len(self._view):
            larger = min(2 * len(self._view), self._frame_bytes_max + LENGTH.size)
            self._view = memoryview(bytearray(larger))
        self._view[: len(partial)] = partial
        self._end -= self._start
        self._start = 0
