"""The descriptors connection against a real server: who may have which extent, and who is thought to have it."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import resource
from itertools import count

import pytest

from cachesvc.core import events as ev
from cachesvc.daemon import descriptors as module
from cachesvc.daemon import server as server_module
from cachesvc.daemon import shares
from cachesvc.daemon.server import Server
from cachesvc.wire.framing import PREFACE_DESCRIPTORS, encode, preface
from cachesvc.wire.messages import (
    Allocate,
    Allocated,
    Attach,
    ExtentsHeld,
    ExtentsWanted,
    Refused,
    Unmapped,
    pack_keys,
)
from tests.support.daemon import DescriptorsWire, Wire
from tests.support.served import EXTENT_BYTES, served, until


def close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def wanted(
    wire: DescriptorsWire, held: list[int] | None = None, slot_bytes: int = 4096
) -> tuple[ExtentsHeld, list[int]]:
    wire.send(ExtentsWanted(2, [slot_bytes], held or []))
    reply, passed = wire.reply()
    assert isinstance(reply, ExtentsHeld), reply
    return reply, passed


def seen_by(server: Server) -> list[ev.Event]:
    """Events about mappings, from now on."""
    seen: list[ev.Event] = []
    handle = server.runner.node.handle

    def recording(event: ev.Event, now: float) -> list[ev.Effect]:
        if isinstance(event, ev.ExtentsMapped | ev.ExtentsUnmapped):
            seen.append(event)
        return handle(event, now)

    server.runner.node.handle = recording  # type: ignore[method-assign]
    return seen


def test_bytes_written_here_are_read_there() -> None:
    async def scenario() -> None:
        async with served() as (_, path):
            await asyncio.to_thread(client, str(path))

    def client(path: str) -> None:
        with DescriptorsWire(path) as files, Wire(path) as wire:
            welcome = wire.hello(token=files.attach())
            assert welcome.extents_version > 0
            allocated = wire.call(Allocate(2, 1, pack_keys(0, [b"k"])))
            assert isinstance(allocated, Allocated)
            (extent,), (slot,) = allocated.slots.extents, allocated.slots.slots
            reply, passed = wanted(files)
            assert [(e.extent, e.slot_bytes, e.slot_count, e.attached) for e in reply.extents] == [
                (extent, 4096, EXTENT_BYTES // 4096, True)
            ]
            assert reply.extents_version == allocated.extents_version
            assert not reply.more
            data, table = passed
            with mmap.mmap(data, EXTENT_BYTES) as view:
                view[slot * 4096 : slot * 4096 + 5] = b"hello"
            assert os.pread(data, 5, slot * 4096) == b"hello"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(table, b"forged", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(table, 4096)
            close(passed)
            again, passed = wanted(files, [extent])
            assert [e.attached for e in again.extents] == [False]
            assert passed == []
            nothing, _ = wanted(files, slot_bytes=8192)
            assert nothing.extents == []

    asyncio.run(scenario())


def test_many_extents_come_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXTENTS_PER_MESSAGE_MAX", 1)

    async def scenario() -> None:
        async with served() as (server, path):
            with await asyncio.to_thread(Wire, path) as wire:
                await asyncio.to_thread(wire.hello)
                keys = pack_keys(0, [bytes([n]) for n in range(EXTENT_BYTES // 4096 + 1)])
                tickets = count(1)
                while len(server.runner.node.extents_of("one", {4096})) < 2:
                    await asyncio.to_thread(wire.call, Allocate(2, next(tickets), keys))
                await asyncio.to_thread(client, str(path))

    def client(path: str) -> None:
        with DescriptorsWire(path) as files:
            files.attach()
            held: list[int] = []
            for _ in range(2):
                reply, passed = wanted(files, held)
                assert reply.more == (len(held) + 1 < len(reply.extents))
                held += [e.extent for e in reply.extents if e.attached]
                close(passed)
            assert len(held) == 2

    asyncio.run(scenario())


def test_an_extent_is_mapped_until_the_last_client_of_the_process_gives_it_up() -> None:
    async def scenario() -> None:
        async with served() as (server, path):
            with await asyncio.to_thread(Wire, path) as wire:
                await asyncio.to_thread(wire.hello)
                seen = seen_by(server)
                await asyncio.to_thread(clients, str(path), seen)

    def clients(path: str, seen: list[ev.Event]) -> None:
        with DescriptorsWire(path) as one, DescriptorsWire(path) as two:
            assert one.attach() == two.attach()
            reply, passed = wanted(one)
            close(passed)
            extent = reply.extents[0].extent
            close(wanted(two)[1])
            wanted(two, [extent])
            assert [type(event) for event in seen] == [ev.ExtentsMapped, ev.ExtentsMapped]
            one.send(Unmapped([extent]))
            wanted(one, [], 8192)
            assert seen[2:] == [ev.ExtentsUnmapped(1, ())]
            two.send(Unmapped([extent, 12345]))
            wanted(two, [], 8192)
            (last,) = seen[3:]
            assert isinstance(last, ev.ExtentsUnmapped)
            assert set(last.extents) == {extent, 12345}
        with DescriptorsWire(path) as back:
            back.attach()
            wanted(back, [extent, 99999])
            assert seen[4:] == [ev.ExtentsMapped(1, (extent,))]

    asyncio.run(scenario())


def test_without_a_pidfd_there_is_no_process() -> None:
    async def scenario() -> None:
        async with served() as (server, path):
            seen = seen_by(server)
            await asyncio.to_thread(client, str(path))
            assert seen == []

    def client(path: str) -> None:
        with DescriptorsWire(path, descriptors=[]) as files, Wire(path) as wire:
            assert files.attach() == b""
            wire.hello()
            reply, passed = wanted(files)
            assert len(passed) == 2 * len(reply.extents) == 2
            close(passed)
            files.send(Unmapped([reply.extents[0].extent]))
            wanted(files)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("first", "descriptors", "reason"),
    [
        (encode(ExtentsWanted(1, [], [])), 0, "starts with Attach"),
        (encode(Attach(1)), 2, "Attach carries one descriptor"),
        (encode(Attach(1)), 5, "more than 4 descriptors"),
        (encode(Attach(1)) + encode(Attach(2)), 0, "attached already"),
        (encode(Attach(1)) + encode(ExtentsWanted(1, [-1], [])), 0, "can't be read"),
        (b"\xff\xff\xff\xff", 0, "a frame of 4294967295 bytes"),
    ],
)
def test_what_breaks_the_rules_is_told_why(first: bytes, descriptors: int, reason: str) -> None:
    async def scenario() -> None:
        async with served() as (server, path):
            before = len(os.listdir("/proc/self/fd"))
            await asyncio.to_thread(client, str(path))
            await until(lambda: not server.members)
            assert len(os.listdir("/proc/self/fd")) == before

    def client(path: str) -> None:
        with DescriptorsWire.bare(path) as files:
            pipe = os.pipe()
            files.raw(preface(PREFACE_DESCRIPTORS) + first, [pipe[0]] * descriptors)
            close(list(pipe))
            replies = []
            while (reply := files.reply()[0]) is not None:
                replies.append(reply)
            last = replies[-1]
            assert isinstance(last, Refused)
            assert reason in last.detail

    asyncio.run(scenario())


def test_a_descriptor_with_another_message_is_refused_and_closed() -> None:
    async def scenario() -> None:
        async with served() as (server, path):
            await asyncio.to_thread(client, str(path))
            await until(lambda: not server.members)

    def client(path: str) -> None:
        with DescriptorsWire(path) as files:
            files.attach()
            pipe = os.pipe()
            files.send(ExtentsWanted(1, [], []), [pipe[1]])
            os.close(pipe[1])
            reply, _ = files.reply()
            assert isinstance(reply, Refused)
            assert "a descriptor came with a message that has none" in reply.detail
            assert os.read(pipe[0], 1) == b""  # nobody holds the other end any more
            os.close(pipe[0])

    asyncio.run(scenario())


@pytest.mark.parametrize("attached", [False, True])
def test_descriptors_with_parts_of_a_message_are_not_collected(attached: bool) -> None:
    """A message that never ends must not take one descriptor after the other from us."""

    async def scenario() -> None:
        async with served() as (server, path):
            await asyncio.to_thread(client, str(path))
            await until(lambda: not server.members)

    def client(path: str) -> None:
        with DescriptorsWire(path) if attached else DescriptorsWire.bare(path) as files:
            if attached:
                files.attach()
            pipe = os.pipe()
            files.raw((b"" if attached else preface(PREFACE_DESCRIPTORS)) + b"\x00")
            with contextlib.suppress(BrokenPipeError):
                for _ in range(10):
                    files.raw(b"\x01", [pipe[1]])
            os.close(pipe[1])
            reply, _ = files.reply()
            assert isinstance(reply, Refused)
            assert ("has none" if attached else "Attach carries one descriptor") in reply.detail
            assert os.read(pipe[0], 1) == b""  # nobody holds the other end any more
            os.close(pipe[0])

    asyncio.run(scenario())


def test_the_last_descriptors_are_not_for_clients() -> None:
    async def scenario() -> None:
        async with served() as (server, path):
            server._descriptors.files_max = 3
            await asyncio.to_thread(client, str(path))
            await until(lambda: not server.members)

    def client(path: str) -> None:
        with DescriptorsWire(path) as files:
            reply, _ = files.reply()
            assert isinstance(reply, Refused)
            assert "raise its limit (nofile)" in reply.detail

    asyncio.run(scenario())


def test_a_refusal_needs_no_descriptor() -> None:
    """Where there is none left, the connection is told and closed all the same."""

    async def scenario() -> None:
        async with served() as (server, path):
            with await asyncio.to_thread(DescriptorsWire, str(path)) as files:
                await asyncio.to_thread(files.attach)
                limits = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
                try:
                    files.raw(b"\xff" * 4)
                    await until(lambda: not server.members)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                reply, _ = await asyncio.to_thread(files.reply)
                assert isinstance(reply, Refused)

    asyncio.run(scenario())


def test_half_a_message_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRAME_S", 0.05)
    monkeypatch.setattr(server_module, "SWEEP_S", 0.01)

    async def scenario() -> None:
        async with served() as (server, path):
            with await asyncio.to_thread(DescriptorsWire, str(path)) as files:
                await asyncio.to_thread(files.attach)
                files.raw(b"\x09\x00")
                assert await asyncio.to_thread(files.reply) == (None, [])
            assert server.runner.counts["silent"] == 1

    asyncio.run(scenario())


def test_many_messages_in_one_piece_are_all_answered_but_not_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "TURN_S", 1e-9)

    async def scenario() -> None:
        async with served() as (_, path):
            await asyncio.to_thread(client, str(path))

    def client(path: str) -> None:
        with DescriptorsWire(path) as files:
            files.attach()
            files.raw(b"".join(encode(ExtentsWanted(n, [8192], [])) for n in range(50)) + encode(Unmapped([1]))[:3])
            replies = [files.reply()[0] for _ in range(50)]
            assert [reply.call for reply in replies if isinstance(reply, ExtentsHeld)] == list(range(50))
            files.raw(encode(Unmapped([1]))[3:] + encode(ExtentsWanted(50, [8192], [])))
            assert isinstance(files.reply()[0], ExtentsHeld)

    asyncio.run(scenario())


def test_one_byte_at_a_time() -> None:
    async def scenario() -> None:
        async with served() as (_, path):
            await asyncio.to_thread(client, str(path))

    def client(path: str) -> None:
        with DescriptorsWire.bare(path) as files:
            for byte in preface(PREFACE_DESCRIPTORS) + encode(Attach(5)):
                files.raw(bytes([byte]))
            assert files.attach() == b""

    asyncio.run(scenario())


def test_a_client_that_does_not_read_is_cut() -> None:
    async def scenario() -> None:
        async with served() as (server, path):
            await asyncio.to_thread(client, str(path))
            await until(lambda: not server.members)
            assert server.runner.counts["slow"] == 1

    def client(path: str) -> None:
        with DescriptorsWire(path) as files:
            files.attach()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                files.raw(encode(ExtentsWanted(1, [4096], [])) * 500_000)

    asyncio.run(scenario())
