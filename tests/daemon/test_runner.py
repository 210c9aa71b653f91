"""The runner on a real core and arena: effects in order, time, damage, reports."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cachesvc.arena.host import HostArena
from cachesvc.core import events as ev
from cachesvc.core import index
from cachesvc.daemon import namespaces
from cachesvc.daemon import runner as module
from cachesvc.daemon.runner import Runner
from cachesvc.errors import ProtocolError
from cachesvc.types import AllocateState
from cachesvc.wire import messages as wire
from cachesvc.wire.framing import LENGTH, decode_control_reply, encode
from cachesvc.wire.messages import pack_keys
from tests.support.daemon import hello
from tests.support.served import EXTENT_BYTES, running, until


class Listener:
    """A control connection that keeps what it is sent."""

    def __init__(self, runner: Runner, tenant: str | None = "one", heard: list[str] | None = None) -> None:
        """`heard` gets the names of its replies."""
        self.heard = [] if heard is None else heard
        self.tenant = tenant
        self.number = runner.join(self)
        self.runner = runner
        self.replies: list[wire.ControlReply] = []
        self.finished = False

    def send(self, frame: bytes) -> None:
        self.replies.append(decode_control_reply(frame[LENGTH.size :]))
        self.heard.append(type(self.replies[-1]).__name__)

    def finish(self) -> None:
        self.finished = True

    def say(self, message: wire.ControlRequest) -> None:
        self.runner.request(self, memoryview(encode(message)[LENGTH.size :]))

    def call(self, message: wire.ControlRequest) -> Any:
        self.say(message)
        return self.replies.pop()

    async def welcome(self, **fields: Any) -> wire.Welcome:
        self.say(hello(**fields))
        await until(lambda: bool(self.replies))
        reply = self.replies.pop()
        assert isinstance(reply, wire.Welcome), reply
        return reply


def test_marks_are_in_the_table_before_the_reply_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noting(name: str, mark: Callable[..., None]) -> Callable[..., None]:
        def noted(*args: Any) -> None:
            order.append(name)
            mark(*args)

        return noted

    for name in ("mark_writing", "mark_sealed", "mark_free"):
        monkeypatch.setattr(HostArena, name, noting(name, getattr(HostArena, name)))

    async def scenario() -> None:
        async with running() as runner:
            client = Listener(runner, heard=order)
            welcome = await client.welcome()
            assert welcome.arena == runner.arena.uuid
            assert welcome.extents_version == 1
            client.say(wire.Allocate(2, 1, pack_keys(0, [b"a", b"b"])))
            client.say(wire.Seal(3, 1, [4, 4]))
            client.say(wire.Allocate(4, 2, pack_keys(0, [b"c"])))
            client.say(wire.Abort([2]))

    asyncio.run(scenario())
    stored = ["mark_writing", "Allocated", "mark_sealed", "Sealed"]
    assert order == ["Welcome", *stored, "mark_writing", "Allocated", "mark_free"]


def test_a_rule_broken_in_the_core_closes_after_the_reply() -> None:
    async def scenario() -> None:
        async with running() as runner:
            client = Listener(runner)
            assert client.call(wire.Lookup(1, pack_keys(0, [b"k"]))).kind == "protocol"
            assert client.finished
            assert runner.counts == {"protocol": 1}

    asyncio.run(scenario())


def test_replies_to_the_dead_are_dropped() -> None:
    async def scenario() -> None:
        async with running() as runner:
            client = Listener(runner)
            client.say(hello())
            runner.leave(client)
            await until(lambda: runner.node.extents_version("one") == 1)
            assert client.replies == []

    asyncio.run(scenario())


def test_ping_needs_no_hello_and_every_call_is_timed() -> None:
    async def scenario() -> None:
        async with running() as runner:
            client, admin = Listener(runner), Listener(runner, None)
            assert client.call(wire.Ping(5)) == wire.Pong(5, 0)
            assert admin.call(wire.Ping(6)) == wire.Pong(6, 0)
            calls = runner.figures()["calls"]
            assert calls.keys() == {"ping"}
            assert sum(calls["ping"]["counts"]) == 2

    asyncio.run(scenario())


def test_a_tenant_sees_itself_only() -> None:
    async def scenario() -> None:
        async with running() as runner:
            one, two, admin = Listener(runner), Listener(runner, "two"), Listener(runner, None)
            await one.welcome(label="secret")
            for what in ("status", "namespaces"):
                ours, theirs, all_of_it = (c.call(wire.Ask(1, what)).body for c in (one, two, admin))
                assert b"secret" in ours
                assert b"secret" not in theirs
                assert b'"one"' not in theirs
                assert b"secret" in all_of_it
            assert msgspec.json.decode(two.call(wire.Ask(1, "status")).body).keys() == {"tenants"}
            with pytest.raises(ProtocolError, match="nothing is known"):
                one.say(wire.Ask(1, "everything"))

    asyncio.run(scenario())


def test_an_answer_that_fits_no_frame_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_BYTES_MAX", 10)

    async def scenario() -> None:
        async with running() as runner:
            reply = Listener(runner).call(wire.Ask(1, "status"))
            assert isinstance(reply, wire.Refused)
            assert reply.kind == "limit"

    asyncio.run(scenario())


def test_an_answer_that_can_not_fit_is_not_even_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_BYTES_MAX", 5000)

    async def scenario() -> None:
        async with running() as runner:
            client = Listener(runner)
            await client.welcome(components={"c": "x" * 4000})
            assert isinstance(client.call(wire.Ask(1, "namespaces")), wire.Report)
            other = Listener(runner)
            await other.welcome(namespace=b"another-namespac", components={"c": "x" * 4000})
            monkeypatch.setattr(runner, "report", lambda *_: 1 / 0)
            reply = client.call(wire.Ask(2, "namespaces"))
            assert isinstance(reply, wire.Refused)
            assert (reply.kind, reply.call) == ("limit", 2)
            assert "over HTTP" in reply.detail

    asyncio.run(scenario())


def test_a_tenant_has_so_many_bytes_of_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "COMPONENT_BYTES_PER_TENANT_MAX", 1000)

    async def scenario() -> None:
        async with running() as runner:
            first = Listener(runner)
            await first.welcome(namespace=b"1" * 16, components={"c": "x" * 600})
            refused = Listener(runner).call(hello(namespace=b"2" * 16, components={"c": "x" * 600}))
            assert isinstance(refused, wire.Refused)
            assert refused.kind == "limit"
            assert "bytes of components" in refused.detail
            await Listener(runner).welcome(namespace=b"1" * 16, components={"c": "x" * 600})
            await Listener(runner, "two").welcome(namespace=b"2" * 16, components={"c": "x" * 600})

    asyncio.run(scenario())


def test_a_truncated_extent_is_dropped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.001)
    monkeypatch.setattr(module, "CHECK_S", 0.0)

    async def scenario() -> None:
        async with running() as runner:
            ticking = asyncio.create_task(runner.ticks())
            client = Listener(runner)
            await client.welcome()
            allocated = client.call(wire.Allocate(2, 1, pack_keys(0, [b"k"])))
            (extent,) = allocated.slots.extents
            assert client.call(wire.Seal(3, 1, [4])).ok
            leased = client.call(wire.Lease(4, 2, pack_keys(0, [b"k"])))
            assert len(leased.slots) == 1
            os.truncate(f"/proc/self/fd/{runner.arena.descriptors(extent).data}", 4096)
            await until(lambda: runner.counts["damaged"] == 1)
            assert client.call(wire.Lookup(5, pack_keys(0, [b"k"]))).states != b"\x01"
            await asyncio.sleep(0.01)
            assert runner.counts["damaged"] == 1
            client.say(wire.Release([2]))
            await until(lambda: runner.node.extents.find(extent) is None)
            # a new extent takes its place
            await until(lambda: bool(runner.node.extents_of("one", {4096})))
            again = client.call(wire.Allocate(6, 3, pack_keys(0, [b"k"])))
            assert again.states == bytes([AllocateState.NEW])
            ticking.cancel()

    asyncio.run(scenario())


def test_a_spare_that_can_not_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running(extents=2) as runner:
            runner.dispatch(ev.ExtentDamaged(99, "not ours"))

            def full(extent: int) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(runner.arena, "make_spare", full)
            for extent in list(runner.node.extents.spares):
                runner.node.extents.spares.remove(extent)
                await asyncio.to_thread(runner.arena.drop, extent)
            runner.dispatch(ev.Tick())
            await until(lambda: runner.counts["io_failed"] == 1)
            await until(lambda: runner.node.extents.making is None)

    asyncio.run(scenario())


def state_dir(runner: Runner) -> Path:
    return runner._register._state_dir


def test_a_namespace_is_kept_before_its_session_is_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk whose namespace nobody remembers would be lost by a restart."""

    async def scenario() -> None:
        async with running() as runner:
            listener = Listener(runner)
            listener.say(hello(label="new"))
            kept = namespaces.load(state_dir(runner))
            assert [record.label for record in kept] == ["new"]
            assert not listener.replies

            def full(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(namespaces.Register, "keep", full)
            await Listener(runner).welcome(session=b"another-session-", namespace=b"another-namespac")
            assert runner.counts["io_failed"] == 1, "the daemon goes on, and operators see it"

    asyncio.run(scenario())


def test_the_arena_is_of_the_size_it_should_be() -> None:
    async def scenario() -> None:
        async with running(extents=3) as runner:
            arena = runner.status(None)["arena"]
            assert arena["bytes"] == 3 * EXTENT_BYTES
            assert arena["extents"]["spare"] == 3

    asyncio.run(scenario())
