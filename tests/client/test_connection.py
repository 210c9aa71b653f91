"""One connection against a scripted peer: order, deadlines, stale replies, garbage, a peer that doesn't read."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachesvc.client.connection import Connection, connect
from cachesvc.errors import ProtocolError
from cachesvc.wire.framing import FrameReader, decode_control_request, encode
from cachesvc.wire.messages import ControlReply, Looked, Lookup, Ping, Pong, Refused, pack_keys

HANG_S = 30.0


class Line:
    """A connection, and the other end of its socket."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.settimeout(HANG_S)
        self.heard: list[ControlReply] = []
        self.connection = Connection(ours, self.heard.append)

    def read(self, n: int) -> bytes:
        got = b""
        while len(got) < n:
            more = self.peer.recv(n - len(got))
            assert more
            got += more
        return got

    def post(self, *numbers: int) -> None:
        self.connection.post(b"".join(encode(Ping(number)) for number in numbers), numbers)

    def reply(self, *numbers: int) -> None:
        self.peer.sendall(b"".join(encode(Pong(number, 1)) for number in numbers))

    def collect(self, count: int, seconds: float = HANG_S, *, spin: bool = False) -> list[int]:
        return [reply.call for reply in self.connection.collect(count, time.monotonic() + seconds, spin=spin)]


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.connection.close()
    line.peer.close()


def test_it_begins_with_the_preface(line: Line) -> None:
    line.post(1)
    assert line.read(2) == b"C\x01"
    reader = FrameReader()
    n = line.peer.recv_into(reader.buffer())
    assert [decode_control_request(payload) for payload in reader.advance(n)] == [Ping(1)]


@pytest.mark.parametrize("spin", [False, True])
def test_replies_come_in_the_order_of_the_requests(line: Line, spin: bool) -> None:
    line.post(1, 2, 3)
    line.reply(1, 2, 3)
    assert line.collect(3, spin=spin) == [1, 2, 3]
    assert [reply.call for reply in line.heard] == [1, 2, 3]


def test_replies_may_come_one_byte_at_a_time(line: Line) -> None:
    line.post(1, 2)
    stream = encode(Pong(1, 1)) + encode(Pong(2, 1))

    def drip() -> None:
        for byte in stream:
            line.peer.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    assert line.collect(2) == [1, 2]
    thread.join()


def test_a_missed_deadline_leaves_stale_replies_that_are_dropped(line: Line) -> None:
    line.post(1, 2)
    line.reply(1)
    with pytest.raises(TimeoutError):
        line.collect(2, 0.01)
    line.post(3)
    line.reply(2, 3)
    assert line.collect(1) == [3]
    assert [reply.call for reply in line.heard] == [1, 2, 3]


def test_a_reply_that_is_there_counts_even_if_the_deadline_has_passed(line: Line) -> None:
    line.post(1)
    line.reply(1)
    assert line.collect(1, -1.0) == [1]


def test_waiting_for_one_reply_in_slices(line: Line) -> None:
    line.post(1, 2)
    assert line.connection.awaits(2, 0.0)
    line.reply(1)
    assert line.connection.awaits(2, 0.01)
    line.reply(2)
    assert not line.connection.awaits(2, HANG_S)
    assert not line.connection.awaits(2, HANG_S)


def test_draining_reads_what_is_there_and_notices_the_end(line: Line) -> None:
    line.connection.drain()
    line.post(1)
    line.reply(1)
    line.connection.drain()
    assert not line.connection.pending
    line.peer.close()
    with pytest.raises(ConnectionResetError):
        line.connection.drain()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (encode(Pong(9, 1)), "call 9"),
        (encode(Ping(1)), "can't be read"),
        (b"\x00\x00\x00\x00", "a frame of 0 bytes"),
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (b"\x01\x00\x00\x00\xc1", "can't be read"),
        (encode(Refused(0, "protocol", "wire version 1, this daemon speaks 2")), "this daemon speaks 2"),
        (encode(Pong(1, 1)) + encode(Pong(1, 1)), "call 1"),
    ],
    ids=["unknown call", "a request", "empty frame", "oversized frame", "garbage", "refused", "twice"],
)
def test_what_no_daemon_says_is_a_protocol_error(line: Line, raw: bytes, reason: str) -> None:
    line.post(1)
    line.peer.sendall(raw)
    with pytest.raises(ProtocolError, match=reason):
        line.collect(1)


def test_the_end_of_the_connection_is_an_error(line: Line) -> None:
    line.post(1)
    line.read(2)
    line.peer.close()
    with pytest.raises(ConnectionResetError):
        line.collect(1)


def test_a_reason_that_was_left_is_read_although_sending_fails(line: Line) -> None:
    line.peer.sendall(encode(Refused(0, "protocol", "too many connections")))
    line.peer.close()
    line.post(1)
    with pytest.raises(ProtocolError, match="too many connections"):
        line.collect(1)


def test_a_peer_that_does_not_read_clogs_and_unclogs(line: Line) -> None:
    frame = encode(Lookup(1, pack_keys(0, [bytes(64)] * 4096)))
    count = 0
    while not line.connection.clogged:
        count += 1
        line.connection.post(frame, [count])
    with pytest.raises(TimeoutError):
        line.collect(1, 0.01)
    done = threading.Event()

    def read_then_reply() -> None:
        line.read(2 + count * len(frame))
        line.peer.sendall(b"".join(encode(Looked(number, b"", 1)) for number in range(1, count + 1)))
        done.set()

    thread = threading.Thread(target=read_then_reply)
    thread.start()
    assert line.collect(1) == [count]
    thread.join()
    assert done.is_set()
    assert not line.connection.clogged


def test_both_directions_full_at_once_is_no_deadlock(line: Line) -> None:
    """A peer that answers before it reads on, while we have more to send than the sockets hold."""
    keys = pack_keys(0, [bytes(64)] * 4096)
    frames = [encode(Lookup(number, keys)) for number in range(20)]
    answer = bytes(4096) * 64

    def answer_each() -> None:
        line.read(2)
        for number, frame in enumerate(frames):
            line.read(len(frame))
            line.peer.sendall(encode(Looked(number, answer, 1)))

    thread = threading.Thread(target=answer_each)
    thread.start()
    line.connection.post(b"".join(frames), range(20))
    assert line.collect(20) == list(range(20))
    thread.join()


def test_connecting_to_nobody_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(str(tmp_path / "absent"), 1.0)
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(tmp_path / "stale"))
    with bound, pytest.raises(ConnectionRefusedError):
        connect(str(tmp_path / "stale"), 1.0)


def test_connecting_gives_a_socket_that_never_blocks(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with connect(str(tmp_path / "s"), 1.0) as sock:
            assert not sock.getblocking()
            with pytest.raises(BlockingIOError):
                sock.recv(1)
