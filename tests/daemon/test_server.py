"""Sockets of a real daemon: garbage, silence, limits, and that nobody else notices."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesvc.daemon import server, shares
from cachesvc.daemon.runner import Connection
from cachesvc.daemon.server import open_door
from cachesvc.errors import OperatorError
from cachesvc.types import AllocateState, KeyState
from cachesvc.wire.framing import FRAME_BYTES_MAX, LENGTH, PREFACE_CONTROL, encode, preface
from cachesvc.wire.messages import (
    WIRE_VERSION,
    Abort,
    Allocate,
    Allocated,
    Ask,
    Looked,
    Lookup,
    Ping,
    Pong,
    Refused,
    Report,
    Seal,
    Sealed,
    pack_keys,
)
from tests.support.daemon import Daemon, Wire, connect, hello, shared_directory, wait_for
from tests.support.served import served, until


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with shared_directory() as arena, Daemon(tmp_path_factory.mktemp("daemon"), arena) as running:
        yield running


@pytest.fixture(scope="module")
def bystander(daemon: Daemon) -> Iterator[Wire]:
    """Somebody else, connected all the time."""
    with Wire(daemon.socket()) as wire:
        wire.hello()
        yield wire


def assert_goes_on(bystander: Wire) -> None:
    assert isinstance(bystander.call(Ping(7)), Pong)
    assert isinstance(bystander.call(Lookup(8, pack_keys(0, [b"k"]))), Looked)


def refusal(wire: Wire) -> str:
    """Why the daemon closed this connection."""
    reply = wire.reply()
    assert isinstance(reply, Refused), reply
    assert (reply.call, reply.kind) == (0, "protocol")
    assert wire.reply() is None
    return reply.detail


# --- the way in -----------------------------------------------------------------------------------------------------


def test_a_chunk_is_stored_and_found(daemon: Daemon) -> None:
    with Wire(daemon.socket()) as wire:
        wire.hello(namespace=b"n" * 16)
        keys = pack_keys(0, [b"a", b"b"])
        allocated = wire.call(Allocate(2, 1, keys))
        assert isinstance(allocated, Allocated)
        assert allocated.states == bytes([AllocateState.NEW] * 2)
        assert wire.call(Seal(3, 1, [5, 6])) == Sealed(3, True)
        looked = wire.call(Lookup(4, pack_keys(0, [b"a", b"b", b"c"])))
        assert isinstance(looked, Looked)
        assert looked.states == bytes([KeyState.RAM, KeyState.RAM, KeyState.NEVER_STORED])


def test_requests_in_one_piece_are_answered_in_order(daemon: Daemon) -> None:
    with Wire(daemon.socket(), first=b"") as wire:
        wire.raw(preface(PREFACE_CONTROL) + encode(hello()) + b"".join(encode(Ping(n)) for n in range(100)))
        calls = sorted(reply.call for _ in range(101) if (reply := wire.reply()) and hasattr(reply, "call"))
        assert calls == sorted([1, *range(100)])


def test_one_byte_at_a_time(daemon: Daemon) -> None:
    with Wire(daemon.socket(), first=b"") as wire:
        for byte in preface(PREFACE_CONTROL) + encode(Ask(3, "status")):
            wire.raw(bytes([byte]))
        assert isinstance(wire.reply(), Report)


def test_the_sockets_modes(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.socket().stat().st_mode) == 0o660
    assert stat.S_IMODE(daemon.admin_socket.stat().st_mode) == 0o600


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a connection starts with C or F"),
        (b"C" + bytes([WIRE_VERSION + 1]), f"wire version {WIRE_VERSION + 1}, this daemon speaks {WIRE_VERSION}"),
        (b"C\x00", "wire version 0"),
        (b"F" + bytes([WIRE_VERSION + 1]), f"wire version {WIRE_VERSION + 1}"),
        (preface(PREFACE_CONTROL) + LENGTH.pack(0), "a frame of 0 bytes"),
        (preface(PREFACE_CONTROL) + LENGTH.pack(FRAME_BYTES_MAX + 1), f"a frame of {FRAME_BYTES_MAX + 1} bytes"),
        (preface(PREFACE_CONTROL) + LENGTH.pack(3) + b"\xc1\xc1\xc1", "a message that can't be read"),
        (preface(PREFACE_CONTROL) + encode(Sealed(1, True)), "a message that can't be read"),
        (preface(PREFACE_CONTROL) + encode(Ask(1, "the weather")), "nothing is known of 'the weather'"),
        (preface(PREFACE_CONTROL) + encode(hello(token=b"x" * 16)), "the token names no living process"),
    ],
)
def test_what_breaks_the_rules_is_told_why_and_closed(
    daemon: Daemon, bystander: Wire, sent: bytes, reason: str
) -> None:
    with Wire(daemon.socket(), first=b"") as wire:
        wire.raw(sent)
        assert reason in refusal(wire)
    assert_goes_on(bystander)


def test_hello_comes_first(daemon: Daemon) -> None:
    with Wire(daemon.socket()) as wire:
        reply = wire.call(Lookup(5, pack_keys(0, [b"k"])))
        assert reply == Refused(5, "protocol", "say hello first")
        assert wire.reply() is None


def test_a_namespace_of_another_chunk_size_is_refused_but_not_closed(daemon: Daemon) -> None:
    with Wire(daemon.socket()) as one, Wire(daemon.socket()) as other:
        one.hello(namespace=b"s" * 16)
        refused = other.call(hello(namespace=b"s" * 16, chunk_bytes=[8192]))
        assert isinstance(refused, Refused)
        assert refused.kind == "namespace"
        assert isinstance(other.call(Ping(2)), Pong)


def test_the_admin_socket_answers_questions_only(daemon: Daemon) -> None:
    with Wire(daemon.admin_socket) as wire:
        report = wire.call(Ask(1, "status"))
        assert isinstance(report, Report)
        assert b'"arena"' in report.body
        wire.send(hello())
        assert "the admin socket answers questions only" in refusal(wire)
    with Wire(daemon.admin_socket, first=b"F" + bytes([WIRE_VERSION])) as wire:
        assert "the admin socket gives no extents" in refusal(wire)


garbage = st.binary(min_size=1, max_size=4096)
messages = st.sampled_from([encode(Ping(1)), encode(Ask(2, "status")), encode(hello()), encode(Abort([1, 2]))])


@settings(max_examples=150)
@given(
    first=st.sampled_from([b"", b"C", b"F", preface(b"C"), preface(b"C"), preface(b"F")]),
    before=st.lists(messages, max_size=3),
    rest=garbage,
    cut=st.integers(0, 5000),
)
def test_garbage_harms_nobody_else(
    daemon: Daemon, bystander: Wire, first: bytes, before: list[bytes], rest: bytes, cut: int
) -> None:
    sent = (first + b"".join(before) + rest)[:cut]
    with connect(daemon.socket()) as sock:
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert_goes_on(bystander)


@settings(max_examples=30)
@given(garbage)
def test_garbage_after_a_request_byte_by_byte(daemon: Daemon, bystander: Wire, rest: bytes) -> None:
    with connect(daemon.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        try:
            for byte in preface(PREFACE_CONTROL) + encode(Ask(1, "namespaces")) + rest[:200]:
                sock.sendall(bytes([byte]))
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert_goes_on(bystander)


def test_no_connection_is_left_after_all_that(daemon: Daemon, bystander: Wire) -> None:
    def connections() -> int:
        with Wire(daemon.admin_socket) as wire:
            report = wire.call(Ask(1, "status"))
            assert isinstance(report, Report)
            return int(json.loads(report.body)["daemon"]["connections"])

    wait_for(lambda: connections() == 2)
    assert_goes_on(bystander)
    assert "this is a bug" not in daemon.log


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_cut(daemon: Daemon, bystander: Wire) -> None:
    with Wire(daemon.socket()) as wire:
        wire.hello()
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        keys = pack_keys(0, [n.to_bytes(4, "little") for n in range(4096)])
        flood = encode(Lookup(1, keys)) * 5_000
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            wire.raw(flood)
    assert_goes_on(bystander)
    assert "it doesn't read its replies" in daemon.log


def test_silent_connections_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with a shorter limit."""
    monkeypatch.setattr(server, "GREETING_S", 0.05)
    monkeypatch.setattr(server, "SWEEP_S", 0.01)

    async def scenario() -> None:
        async with served() as (serving, path):
            silent = [await asyncio.to_thread(connect, path) for _ in range(3)]
            silent[1].send(b"C")
            silent[2].send(preface(PREFACE_CONTROL) + b"\x10\x00")
            for sock in silent:
                assert await asyncio.to_thread(sock.recv, 1) == b""
                sock.close()
            assert serving.runner.counts["silent"] == 3
            assert not serving.members

    asyncio.run(scenario())


def test_half_a_message_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time begins anew with each message, and isn't given to those who said Hello either."""
    monkeypatch.setattr(server, "FRAME_S", 0.3)
    monkeypatch.setattr(server, "SWEEP_S", 0.01)

    async def scenario() -> None:
        async with served() as (serving, path):
            with await asyncio.to_thread(Wire, path) as wire:
                await asyncio.to_thread(wire.hello)
                ping = encode(Ping(1))
                for _ in range(8):
                    wire.raw(ping[:3])
                    await asyncio.sleep(0.05)
                    wire.raw(ping[3:])
                    assert isinstance(await asyncio.to_thread(wire.reply), Pong)
                assert serving.runner.counts["silent"] == 0
                wire.raw(ping[:3])
                assert await asyncio.to_thread(wire.reply) is None
                assert serving.runner.counts["silent"] == 1

    asyncio.run(scenario())


def test_only_who_joins_a_session_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are answered without Hello, but they keep no place; the admin socket is for questions."""
    monkeypatch.setattr(server, "GREETING_S", 0.3)
    monkeypatch.setattr(server, "SWEEP_S", 0.01)

    async def scenario(tenant: str | None) -> None:
        async with served(tenant) as (serving, path):
            asking, refused, joined = [await asyncio.to_thread(Wire, path) for _ in range(3)]
            assert isinstance(await asyncio.to_thread(asking.call, Ping(1)), Pong)
            assert isinstance(await asyncio.to_thread(asking.call, Ask(1, "status")), Report)
            if tenant is not None:
                await asyncio.to_thread(joined.hello)
                no = await asyncio.to_thread(refused.call, hello(namespace=b"x" * 16, chunk_bytes=[1 << 30]))
                assert isinstance(no, Refused)
                assert await asyncio.to_thread(asking.reply) is None
                assert await asyncio.to_thread(refused.reply) is None
                assert isinstance(await asyncio.to_thread(joined.call, Ping(2)), Pong)
                assert serving.runner.counts["silent"] == 2
            else:
                assert await asyncio.to_thread(joined.reply) is None
                assert isinstance(await asyncio.to_thread(asking.call, Ping(2)), Pong)
            for wire in (asking, refused, joined):
                wire.close()

    asyncio.run(scenario("one"))
    asyncio.run(scenario(None))


def test_too_many_connections_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that takes all it can leaves room for the others and for the operator."""
    monkeypatch.setattr(server, "CONNECTIONS_MAX", server.ADMIN_CONNECTIONS_MAX + 4)

    async def scenario(home: Path) -> None:
        async with served("one") as (serving, path):
            doors = [open_door(home / name, 0o600, None, tenant) for name, tenant in (("two", "two"), ("admin", None))]
            for door in doors:
                serving.open(door)
            wires = [await asyncio.to_thread(Wire, path) for _ in range(2)]
            assert isinstance(await asyncio.to_thread(wires[0].call, Ping(1)), Pong)
            with await asyncio.to_thread(connect, path) as third:
                assert b"2 connections are open" in await asyncio.to_thread(third.recv, 1000)
            assert serving.runner.counts["too_many_connections"] == 1
            for door in doors:
                wires.append(await asyncio.to_thread(Wire, door.path))
                assert isinstance(await asyncio.to_thread(wires[-1].call, Ping(1)), Pong)
            wires[0].close()
            await until(lambda: serving.share("one").connections == 1)
            wires.append(await asyncio.to_thread(Wire, path))
            assert isinstance(await asyncio.to_thread(wires[-1].call, Ping(1)), Pong)
            for wire in wires:
                wire.close()
            await until(lambda: not serving.members)
            assert [serving.share(name).connections for name in ("one", "two", None)] == [0, 0, 0]
        for door in doors:
            door.close()

    with shared_directory() as home:
        asyncio.run(scenario(home))


def test_the_last_descriptors_are_not_for_tenants() -> None:
    async def scenario(tenant: str | None) -> None:
        async with served(tenant) as (serving, path):
            serving._files_max = 3
            with await asyncio.to_thread(connect, path) as sock:
                if tenant is None:
                    sock.sendall(preface(PREFACE_CONTROL) + encode(Ping(1)))
                answer = await asyncio.to_thread(sock.recv, 1000)
                assert (b"no file descriptors left" in answer) == (tenant is not None)

    asyncio.run(scenario("one"))
    asyncio.run(scenario(None))


def test_replies_that_nobody_reads_are_counted_over_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that reads least is cut, not the one that comes last."""
    monkeypatch.setattr(server, "UNREAD_OF_TENANT_BYTES_MAX", 200_000)
    monkeypatch.setattr(server, "SOCKET_BUFFER_BYTES", 4096)
    keys = pack_keys(0, [n.to_bytes(4, "little") for n in range(4096)])

    async def scenario() -> None:
        async with served() as (serving, path):
            slow, slower = [await asyncio.to_thread(Wire, path) for _ in range(2)]
            for wire, replies in ((slower, 40), (slow, 20)):
                await asyncio.to_thread(wire.hello)
                for n in range(replies):
                    await asyncio.to_thread(wire.send, Lookup(n, keys))
            await until(lambda: serving.runner.counts["slow"] == 1)
            share = serving.share("one")
            await until(lambda: share.connections == 1)
            for _ in range(20):
                assert isinstance(await asyncio.to_thread(slow.reply), Looked)
            assert isinstance(await asyncio.to_thread(slow.call, Ping(9)), Pong)
            assert share.unread_bytes == 0
            while await asyncio.to_thread(slower.reply) is not None:
                pass
            slow.close()
            slower.close()

    asyncio.run(scenario())


def test_buffers_of_half_messages_are_counted_over_all_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GROWN_OF_TENANT_BYTES_MAX", 200_000)

    async def scenario() -> None:
        async with served() as (serving, path):
            share = serving.share("one")
            wires = [await asyncio.to_thread(Wire, path) for _ in range(4)]
            for wire in wires:
                await asyncio.to_thread(wire.hello)
            whole = LENGTH.pack(100_000) + bytes(100_000)
            await asyncio.to_thread(wires[0].raw, whole[:-1])
            await until(lambda: share.grown_bytes == 65536)
            await asyncio.to_thread(
                wires[1].raw, encode(Lookup(2, pack_keys(0, [b"k" * 30 + b"%d" % n for n in range(2048, 4096)])))
            )
            assert isinstance(await asyncio.to_thread(wires[1].reply), Looked)
            await asyncio.to_thread(wires[2].raw, whole[:-1])
            await until(lambda: share.grown_bytes == 3 * 65536)
            await asyncio.to_thread(wires[3].raw, whole[:-1])
            # what is grown but empty is taken back first, and then it fits
            await until(lambda: share.grown_bytes == 3 * 65536 and not serving.runner.counts["protocol"])
            await asyncio.to_thread(wires[1].raw, whole[:-1])
            assert "half here" in await asyncio.to_thread(refusal, wires[1])
            await asyncio.to_thread(wires[0].raw, whole[-1:])
            assert "can't be read" in await asyncio.to_thread(refusal, wires[0])
            for wire in wires:
                wire.close()
            await until(lambda: not serving.members)
            assert share.grown_bytes == 0

    asyncio.run(scenario())


def test_a_buffer_that_grew_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_S", 0.01)

    async def scenario() -> None:
        async with served() as (serving, path):
            with await asyncio.to_thread(Wire, path) as wire:
                await asyncio.to_thread(wire.hello)
                large = Lookup(2, pack_keys(0, [b"%064d" % n for n in range(4096)]))
                assert isinstance(await asyncio.to_thread(wire.call, large), Looked)
                await until(lambda: serving.share("one").grown_bytes == 0)
                assert isinstance(await asyncio.to_thread(wire.call, large), Looked)

    asyncio.run(scenario())


# --- turns ----------------------------------------------------------------------------------------------------------


def test_what_one_connection_sends_in_one_piece_is_not_served_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is answered, in order; others, of this tenant and of another one, are answered in between."""
    monkeypatch.setattr(shares, "TURN_S", 1e-9)

    async def scenario(home: Path) -> None:
        async with served() as (serving, path):
            door = open_door(home / "two", 0o600, None, "two")
            serving.open(door)
            greedy, same, other = [await asyncio.to_thread(Wire, place) for place in (path, path, door.path)]
            for wire in (greedy, same, other):
                await asyncio.to_thread(wire.hello)
            served_calls: list[tuple[str | None, int]] = []
            request = serving.runner.request

            def noting(connection: Connection, payload: memoryview, *, again: bool = False) -> bool:
                served_calls.append((connection.tenant, connection.number))
                return request(connection, payload, again=again)

            monkeypatch.setattr(serving.runner, "request", noting)
            # nobody lets the loop run in between: all of it is there in one turn
            greedy.raw(b"".join(encode(Ping(n)) for n in range(5000)))
            same.raw(encode(Ping(1)) * 2)
            other.raw(encode(Ping(1)) * 2)
            calls = [(await asyncio.to_thread(greedy.reply)) for _ in range(5000)]
            assert [call.call for call in calls if isinstance(call, Pong)] == list(range(5000))
            order = [name for name in served_calls if name != served_calls[0]]
            assert len(order) == 4
            last = [n for n, name in enumerate(served_calls) if name != served_calls[0]][-1]
            assert last < 50, f"the others waited for {last} messages of the greedy one"
            for wire in (greedy, same, other):
                wire.close()
        door.close()

    with shared_directory() as home:
        asyncio.run(scenario(home))


def test_a_lookup_waits_for_a_seal_that_is_on_its_way_and_what_comes_after_it_waits_too() -> None:
    async def scenario() -> None:
        async with served() as (_, path):
            writer, reader = [await asyncio.to_thread(Wire, path) for _ in range(2)]
            for wire in (writer, reader):
                await asyncio.to_thread(wire.hello)
            for n in range(1, 30):
                keys = pack_keys(0, [b"%d" % n])
                assert isinstance(await asyncio.to_thread(writer.call, Allocate(1, n, keys)), Allocated)
                # the reader's message is read first: its socket was written to first
                reader.send(Lookup(2, keys), Ping(3), Lookup(4, keys))
                writer.send(Seal(2, n, [4]))
                replies = [await asyncio.to_thread(reader.reply) for _ in range(3)]
                assert [type(reply) for reply in replies] == [Looked, Pong, Looked]
                assert [r.states for r in replies if isinstance(r, Looked)] == [bytes([KeyState.RAM])] * 2
                assert await asyncio.to_thread(writer.reply) == Sealed(2, True)
            for wire in (writer, reader):
                wire.close()

    asyncio.run(scenario())


def test_a_bug_ends_one_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with served() as (serving, path):
            victim, other = await asyncio.to_thread(Wire, path), await asyncio.to_thread(Wire, path)
            await asyncio.to_thread(other.hello)
            await asyncio.to_thread(victim.hello)
            with monkeypatch.context() as patch:
                patch.setattr(serving.runner.node, "handle", lambda event, now: 1 / 0)
                await asyncio.to_thread(victim.send, Lookup(9, pack_keys(0, [b"k"])))
                assert "the daemon failed on this message" in await asyncio.to_thread(refusal, victim)
            assert serving.runner.counts["crashed"] == 1
            assert isinstance(await asyncio.to_thread(other.call, Lookup(9, pack_keys(0, [b"k"]))), Looked)
            victim.close()
            other.close()

    asyncio.run(scenario())


# --- doors ----------------------------------------------------------------------------------------------------------


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "x.sock"
    door = open_door(path, 0o660, None, "t")
    door.listener.close()
    again = open_door(path, 0o660, None, "t")
    connect(path).close()
    again.close()
    assert not path.exists()


def test_a_socket_that_another_daemon_made_is_not_removed(tmp_path: Path) -> None:
    """It came after somebody had removed ours."""
    path = tmp_path / "x.sock"
    door = open_door(path, 0o600, None, None)
    path.unlink()
    other = open_door(path, 0o600, None, None)
    door.close()
    connect(path).close()
    other.close()
    assert not path.exists()


def test_a_living_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    door = open_door(path, 0o600, None, None)
    with pytest.raises(OperatorError, match="another daemon listens on"):
        open_door(path, 0o600, None, None)
    connect(path).close()
    door.close()


def test_something_else_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    path.write_text("precious")
    with pytest.raises(OperatorError, match="is no socket"):
        open_door(path, 0o600, None, None)
    assert path.read_text() == "precious"


def test_the_group_owns_the_socket_and_its_directory(tmp_path: Path) -> None:
    group = grp.getgrgid(os.getgid())
    for name in (group.gr_name, str(group.gr_gid)):
        path = tmp_path / f"by-{name}" / "x.sock"
        door = open_door(path, 0o660, name, "t")
        assert path.stat().st_gid == path.parent.stat().st_gid == group.gr_gid
        door.close()
    with pytest.raises(OperatorError, match="there is no group 'no-such-group'"):
        open_door(tmp_path / "y.sock", 0o660, "no-such-group", "t")


def test_an_umask_locks_nobody_out(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        door = open_door(tmp_path / "run" / "t" / "x.sock", 0o660, None, "t")
    finally:
        os.umask(before)
    assert stat.S_IMODE(door.path.stat().st_mode) == 0o660
    assert [stat.S_IMODE(place.stat().st_mode) for place in (tmp_path / "run", tmp_path / "run" / "t")] == [0o755] * 2
    door.close()


def test_a_directory_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatorError, match="can't listen on"):
        open_door(tmp_path / "file" / "x.sock", 0o660, None, "t")
