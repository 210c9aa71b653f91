"""The public API: right bytes or a miss, ValueError for the caller's mistakes, nothing else, whatever happens."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cachesvc
from cachesvc.client import client as client_module
from cachesvc.client.client import Client
from cachesvc.client.copying import Copier
from cachesvc.client.grants import KeyRun
from cachesvc.types import NAMESPACE_CONNECTOR, NAMESPACE_USER, AllocateState, KeyState, Priority, user_namespace
from cachesvc.wire.messages import (
    Abort,
    Allocate,
    Allocated,
    EndRequests,
    Hello,
    Lease,
    Looked,
    Lookup,
    Ping,
    Refused,
    Release,
    Seal,
    Slots,
)
from tests.support.fake_daemon import FakeDaemon, wait_for

HANG_S = 30.0
CHUNK = 4000


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path, namespace="test", chunk_bytes=CHUNK, deadline_ms=HANG_S * 1000) as client:
        assert client.wait_ready(HANG_S)
        yield client


def asked(client: Client) -> None:
    """Everything that was told before has arrived."""
    client.lookup([b"another"])


# --- making and closing ---------------------------------------------------------------------------------------------


def test_it_is_the_package_s_client() -> None:
    assert cachesvc.Client is Client


def test_a_hello_says_who_we_are(daemon: FakeDaemon, client: Client) -> None:
    (hello,) = daemon.got(Hello)
    assert (hello.namespace, hello.label, hello.chunk_bytes) == (user_namespace("test"), "test", [CHUNK])
    assert len(hello.session) == 16


def test_user_namespaces_are_apart_from_connectors() -> None:
    assert len(user_namespace("a")) == 16
    assert user_namespace("a") != user_namespace("b")
    assert not NAMESPACE_USER.startswith(NAMESPACE_CONNECTOR)
    assert not NAMESPACE_CONNECTOR.startswith(NAMESPACE_USER)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_bytes": 0},
        {"chunk_bytes": -1},
        {"chunk_bytes": 1 << 32},
        {"deadline_ms": 0},
        {"deadline_ms": -1},
        {"session": b"short"},
        {"session": b"x" * 65},
        {"priority": 7},
        {"namespace": "\ud800"},
        {"address": ""},
        {"address": "a\0b"},
        {"address": Path("path")},
        {"chunk_bytes": 1.5},
        {"deadline_ms": "1"},
        {"deadline_ms": float("inf")},
        {"namespace": None},
    ],
)
def test_arguments_that_cannot_be(tmp_path: Path, options: dict[str, Any]) -> None:
    threads = threading.active_count()
    usual: dict[str, Any] = {"address": str(tmp_path / "absent"), "namespace": "n", "chunk_bytes": 1}
    with pytest.raises(ValueError, match=r"\w"):
        Client(**(usual | options))
    assert threading.active_count() == threads


def test_another_chunk_bytes_is_told_by_the_constructor(daemon: FakeDaemon) -> None:
    daemon.on[Hello] = lambda hello: Refused(hello.call, "namespace", "holds chunks of [1] bytes")
    with pytest.raises(ValueError, match=r"holds chunks of \[1\] bytes"):
        Client(daemon.path, namespace="test", chunk_bytes=CHUNK)


def test_another_chunk_bytes_that_is_known_later_is_a_miss_until_it_fits(daemon: FakeDaemon) -> None:
    """An operator starts the daemon with the wrong extent size: a running engine is told nothing but misses."""
    daemon.stop()
    with Client(daemon.path, namespace="test", chunk_bytes=CHUNK) as client:
        assert client.lookup([b"a"]) == 0
        daemon.on[Hello] = lambda hello: Refused(hello.call, "namespace", "holds chunks of [1] bytes")
        daemon.restart()
        wait_for(lambda: daemon.got(Hello))
        wait_for(lambda: "holds chunks" in str(client.status()["error"]))
        for use in USES:
            use(client)
        del daemon.on[Hello]
        wait_for(lambda: client.put(b"a", b"x"))
        assert client.lookup([b"a"]) == 1


USES: list[Callable[[Client], object]] = [
    lambda client: client.lookup([b"a"]),
    lambda client: client.states([b"a"]),
    lambda client: client.read([b"a"]),
    lambda client: client.write([b"a"]),
    lambda client: client.put(b"a", b"x"),
    lambda client: client.get_into(b"a", bytearray(10)),
    lambda client: client.wait_ready(0),
]


def test_use_after_close(daemon: FakeDaemon, client: Client) -> None:
    client.close()
    client.close()
    for use in USES:
        with pytest.raises(ValueError, match="closed"):
            use(client)
    assert client.status()["state"] == "closed"


def test_a_client_that_is_dropped_closes(daemon: FakeDaemon) -> None:
    threads = threading.active_count()
    client = Client(daemon.path, namespace="test", chunk_bytes=CHUNK)
    assert threading.active_count() == threads + 1
    del client
    gc.collect()
    wait_for(lambda: threading.active_count() == threads)


def test_closing_lets_open_writes_end(daemon: FakeDaemon, client: Client) -> None:
    with client.write([b"a"]) as write:
        client.close()
        write.views[b"a"][:1] = b"x"
    assert write.sealed
    assert b"a" in daemon.chunks


# --- asking ---------------------------------------------------------------------------------------------------------


def test_lookup_is_the_leading_run(daemon: FakeDaemon, client: Client) -> None:
    for key in (b"a", b"b", b"d"):
        daemon.store(key, b"1")
    assert client.lookup([b"a", b"b", b"c", b"d"]) == 2
    assert client.lookup([b"c", b"a"]) == 0
    assert client.lookup([]) == 0
    assert client.lookup(iter([b"a"])) == 1
    assert client.states([b"a", b"c"]) == [KeyState.RAM, KeyState.NEVER_STORED]


def test_only_what_is_in_ram_can_be_read(daemon: FakeDaemon, client: Client) -> None:
    daemon.on[Lookup] = lambda x: Looked(x.call, bytes([KeyState.RAM, KeyState.PENDING, KeyState.LOWER]), 1)
    assert client.lookup([b"a", b"b", b"c"]) == 1


def test_misses_are_counted_by_reason(client: Client) -> None:
    client.lookup([b"a", b"b"])
    client.get_into(b"a", bytearray(1))
    with client.read([b"a", b"b"]):
        pass
    assert client.misses[KeyState.NEVER_STORED] == 5
    assert sum(client.misses.values()) == 5
    assert client.status()["misses"] == {state.name.lower(): count for state, count in client.misses.items()}


BAD_KEYS: list[Any] = [[b""], [b"x" * 65], [b"a", b""], ["text"], [b"a", "text"], [1], "text", b"bytes", [None], 1]


@pytest.mark.parametrize("keys", BAD_KEYS)
def test_keys_that_cannot_be(client: Client, keys: Any) -> None:
    for use in (client.lookup, client.states, client.read, client.write):
        with pytest.raises(ValueError, match="key"):
            use(keys)


@pytest.mark.parametrize("key", [b"", b"x" * 65, "text", 1, None, [b"a"]])
def test_a_key_that_cannot_be(daemon: FakeDaemon, client: Client, key: Any) -> None:
    with pytest.raises(ValueError, match="key"):
        client.put(key, b"x")
    with pytest.raises(ValueError, match="key"):
        client.get_into(key, bytearray(1))
    assert daemon.got(Allocate) + daemon.got(Lease) == []


@pytest.mark.parametrize("request_", [-1, 1 << 64, "1", None, 1.5])
def test_a_request_that_cannot_be(client: Client, request_: Any) -> None:
    for use in (client.read, client.write):
        with pytest.raises(ValueError, match="request"):
            use([b"a"], request=request_)


# --- put and get ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3999, CHUNK])
def test_what_was_put_comes_back(client: Client, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    assert client.put(b"k", data)
    buffer = bytearray(b"\xff" * CHUNK)
    assert client.get_into(b"k", buffer)
    assert buffer == data + b"\xff" * (CHUNK - size)
    with client.read([b"k"]) as read:
        assert bytes(read.views[0]) == data


def test_buffers_of_any_kind(client: Client) -> None:
    data = np.arange(100, dtype=np.uint32).reshape(10, 10)
    assert client.put(b"k", data)
    target = np.zeros((20, 5), np.uint32)
    assert client.get_into(b"k", target)
    assert (target.ravel() == data.ravel()).all()
    assert client.put(b"k2", memoryview(bytes(8)).cast("d"))


def test_put_of_a_known_key_is_true_and_changes_nothing(daemon: FakeDaemon, client: Client) -> None:
    daemon.store(b"k", b"old")
    assert client.put(b"k", b"new")
    buffer = bytearray(3)
    client.get_into(b"k", buffer)
    assert buffer == b"old"


@pytest.mark.parametrize("state", [AllocateState.BUSY, AllocateState.NO_ROOM])
def test_put_is_false_at_once_when_refused(daemon: FakeDaemon, client: Client, state: AllocateState) -> None:
    daemon.on[Allocate] = lambda x: Allocated(x.call, bytes([state]), Slots([], [], []), daemon.version)
    assert not client.put(b"k", b"x")
    assert len(daemon.got(Allocate)) == 1
    assert client.refusals[state] == 1


def test_put_is_offered_again_when_the_daemon_says_retry(daemon: FakeDaemon, client: Client) -> None:
    def later(allocate: Allocate) -> Any:
        if len(daemon.got(Allocate)) < 3:
            return Allocated(allocate.call, bytes([AllocateState.RETRY]), Slots([], [], []), daemon.version)
        return daemon.usual(allocate)

    daemon.on[Allocate] = later
    assert client.put(b"k", b"x")
    assert client.refusals[AllocateState.RETRY] == 2


def test_offering_again_ends(daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_S", 0.02)
    daemon.on[Allocate] = lambda x: Allocated(x.call, bytes([AllocateState.RETRY]), Slots([], [], []), daemon.version)
    assert not client.put(b"k", b"x")
    with client.write([b"k"]) as write:
        assert write.views == {}


@pytest.mark.parametrize("data", [b"x" * (CHUNK + 1), "text", None, np.zeros((4, 4))[:, ::2]])
def test_data_that_cannot_be_put(daemon: FakeDaemon, client: Client, data: Any) -> None:
    with pytest.raises(ValueError, match=r"buffer|bytes"):
        client.put(b"k", data)
    assert daemon.got(Allocate) == []


@pytest.mark.parametrize("buffer", [b"read-only", "text", None, np.zeros((4, 4))[:, ::2]])
def test_buffers_that_cannot_be_filled(client: Client, buffer: Any) -> None:
    with pytest.raises(ValueError, match="buffer"):
        client.get_into(b"k", buffer)


def test_a_buffer_that_is_too_small_is_left_alone(daemon: FakeDaemon, client: Client) -> None:
    daemon.store(b"k", b"12345")
    buffer = bytearray(4)
    with pytest.raises(ValueError, match="5 bytes, the buffer 4"):
        client.get_into(b"k", buffer)
    assert buffer == bytes(4)
    asked(client)
    assert len(daemon.got(Release)) == 1


def test_a_slot_reused_during_a_get_is_a_miss(
    daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.store(b"k", b"12345")
    real = Copier.copy

    def evicting(copier: Copier, destination: memoryview, source: memoryview) -> None:
        real(copier, destination, source)
        daemon.evict(b"k")

    monkeypatch.setattr(Copier, "copy", evicting)
    assert not client.get_into(b"k", bytearray(5))
    assert client.misses[KeyState.LOAD_FAILED] == 1


def test_an_interrupted_put_is_aborted(daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(copier: Copier, destination: memoryview, source: memoryview) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Copier, "copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.put(b"k", b"x")
    asked(client)
    assert len(daemon.got(Abort)) == 1
    assert daemon.got(Seal) == []


def test_get_is_one_call_and_one_message(daemon: FakeDaemon, client: Client) -> None:
    daemon.store(b"k", b"1")
    asked(client)
    before = len(daemon.received)
    client.get_into(b"k", bytearray(1))
    asked(client)
    assert [type(message) for message in daemon.received[before:] if not isinstance(message, Ping)] == [
        Lease,
        Release,
        Lookup,
    ]


# --- write ----------------------------------------------------------------------------------------------------------


def test_a_write_gives_views_of_what_is_new(daemon: FakeDaemon, client: Client) -> None:
    daemon.store(b"b", b"old")
    with client.write([b"a", b"b", b"c", b"a"], request=9) as write:
        assert list(write.views) == [b"a", b"c"]
        assert all(len(view) == CHUNK and not view.readonly for view in write.views.values())
        for key, view in write.views.items():
            view[:] = key * CHUNK
        assert client.lookup([b"a"]) == 0
    assert write.sealed
    assert daemon.got(Allocate)[0].request == 9
    with client.read([b"a", b"b", b"c"]) as read:
        assert [bytes(view) for view in read.views] == [b"a" * CHUNK, b"old", b"c" * CHUNK]


def test_an_exception_aborts_the_write_and_passes(daemon: FakeDaemon, client: Client) -> None:
    with pytest.raises(KeyError), client.write([b"a"]) as write:
        raise KeyError
    assert not write.sealed
    asked(client)
    assert len(daemon.got(Abort)) == 1
    assert b"a" not in daemon.chunks
    with pytest.raises(ValueError, match="released"):
        write.views[b"a"][0]


def test_a_write_of_nothing_new(daemon: FakeDaemon, client: Client) -> None:
    daemon.store(b"a", b"1")
    for keys in ([b"a"], []):
        with client.write(keys) as write:
            assert write.views == {}
        assert not write.sealed
    assert daemon.got(Seal) == []


def test_views_end_with_their_context(daemon: FakeDaemon, client: Client) -> None:
    with client.write([b"a"]) as write:
        view = write.views[b"a"]
    with client.read([b"a"]) as read:
        shown = read.views[0]
        assert shown.readonly
        with pytest.raises(TypeError):
            shown[0] = 1
    for ended in (view, shown, write.views[b"a"], read.views[0]):
        with pytest.raises(ValueError, match="released"):
            ended[0]
    for context in (write, read):
        with pytest.raises(ValueError, match="used before"):
            context.__enter__()
    with pytest.raises(ValueError, match="over"):
        read.valid()
    with pytest.raises(ValueError, match="begun"):
        client.read([b"a"]).valid()


def test_arrays_made_of_views_stay_mapped(daemon: FakeDaemon, client: Client) -> None:
    with client.write([b"a"]) as write:
        array = np.frombuffer(write.views[b"a"], np.uint8)
        array[:] = 7
    assert write.sealed
    with client.read([b"a"]) as read:
        shown = np.frombuffer(read.views[0], np.uint8)
        assert not shown.flags.writeable
    daemon.replace_extents()
    asked(client)
    wait_for(lambda: list(client._session.extents.mapped) == [2])
    assert (shown == 7).all()
    assert (array == 7).all()
    client.close()
    assert (shown == 7).all()


def test_priority_is_that_of_the_client(daemon: FakeDaemon) -> None:
    with Client(daemon.path, namespace="t", chunk_bytes=1, priority=Priority.BATCH) as client:
        client.put(b"a", b"1")
    assert daemon.got(Allocate)[0].priority is Priority.BATCH


# --- read -----------------------------------------------------------------------------------------------------------


def test_a_read_is_leased_until_its_end(daemon: FakeDaemon, client: Client) -> None:
    for key in (b"a", b"b", b"d"):
        daemon.store(key, key * 2)
    with client.read([b"a", b"b", b"c", b"d"], request=3) as read:
        assert [bytes(view) for view in read.views] == [b"aa", b"bb"]
        assert read.valid()
        asked(client)
        assert daemon.leases
        assert daemon.got(Lease)[0].request == 3
        assert daemon.got(Lease)[0].touch
    asked(client)
    assert daemon.leases == set()


def test_a_read_of_nothing(client: Client) -> None:
    for keys in ([b"a"], []):
        with client.read(keys) as read:
            assert read.views == ()
            assert read.valid()


def test_a_read_notices_a_reused_slot(daemon: FakeDaemon, client: Client) -> None:
    daemon.store(b"a", b"1")
    daemon.store(b"b", b"2")
    with client.read([b"a", b"b"]) as read:
        assert read.valid()
        daemon.evict(b"b")
        assert not read.valid()


# --- after close, other arenas, long prompts --------------------------------------------------------------------------


def test_what_was_made_before_closing_is_closed_too(daemon: FakeDaemon, client: Client) -> None:
    read, write = client.read([b"a"]), client.write([b"a"])
    client.close()
    for context in (read, write):
        with pytest.raises(ValueError, match="closed"):
            context.__enter__()


@pytest.mark.parametrize("timeout", ["x", None, float("nan"), 1e30])
def test_times_to_wait_that_cannot_be(client: Client, timeout: Any) -> None:
    with pytest.raises(ValueError, match="number of seconds"):
        client.wait_ready(timeout)


def test_slots_of_another_arena_are_not_looked_up_in_this_one(daemon: FakeDaemon, client: Client) -> None:
    """The daemon was started anew between the answer and the mapping: an extent of the same number is another's."""
    session, soon = client._session, time.monotonic() + HANG_S
    grant = session.allocate(KeyRun(0, [b"w"]), soon)
    grant.tickets[0].arena = b"x" * 16
    assert client_module._writable(session, grant, 1, soon) == []
    grant.lengths = [1]
    assert client_module._readable(session, grant, soon) == ([], [])
    grant = session.allocate(KeyRun(0, [b"v"]), soon)
    assert len(client_module._writable(session, grant, 1, soon)) == 1
    grant.tickets[0].lost = True
    assert client_module._writable(session, grant, 1, soon) == []
    session._writes.clear()


def test_a_prompt_of_several_messages_is_one_request(daemon: FakeDaemon, client: Client) -> None:
    """Else its tail pushes out its head: the daemon remembers nothing of request 0."""
    some = [b"%d" % n for n in range(5000)]
    with client.write(some):
        numbers = {allocate.request for allocate in daemon.got(Allocate)}
        assert len(numbers) == 1
        assert min(numbers) >= 1 << 63
        assert not daemon.got(EndRequests), "its seal goes by it, too"
    with client.read(some):
        pass
    leases = {lease.request for lease in daemon.got(Lease)}
    assert len(leases) == 1
    assert not leases & numbers
    asked(client)
    assert {number for end in daemon.got(EndRequests) for number in end.requests} == numbers | leases
    with client.write([b"x"]), client.write(some, request=5):
        pass
    assert {allocate.request for allocate in daemon.got(Allocate)} == numbers | {0, 5}
