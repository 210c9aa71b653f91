"""Slots of clients that live, through reconnects and session ids used twice: wrong bytes were read after each of these.

Real processes; the simulated twins are in `tests.sim.test_sessions`.
"""

from __future__ import annotations

import socket
import threading
import time

import pytest

from cachesvc import Client
from cachesvc.client.grants import Identity
from cachesvc.client.keeper import Keeper
from cachesvc.client.session import Session
from cachesvc.types import Role, user_namespace
from tests.support.clients import CHUNK_BYTES, Clients, names
from tests.support.contents import content, fault
from tests.support.daemon import MIB, Daemon, wait_for

pytestmark = pytest.mark.slow

SMALL_CHUNK = 4096
MANY = 12_000
"""Slots of one write: a Hello has room for 9,300 of them."""


def keys(prefix: str, count: int) -> list[bytes]:
    return [f"{prefix}-{n:08d}".encode().ljust(32, b".") for n in range(count)]


def cut(client: Client) -> None:
    """Its control connection breaks, the daemon lives."""
    connection = client._session.channel._connection
    assert connection is not None
    connection._socket.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: client._session.channel._connection not in (connection, None))
    wait_for(lambda: client.status()["state"] == "up")


@pytest.mark.parametrize("how", ["cut", "restart"])
def test_a_write_that_a_hello_cannot_describe(daemon: Daemon, how: str) -> None:
    """A client has a write open over more slots than its Hello can describe and is connected anew. The slots that it
    had left out were given to another client's chunks, and got its bytes."""
    daemon.settings |= {"ram_bytes": "128MiB", "extent_bytes": "16MiB", "restart_grace_s": 0.1, "quarantine_s": 1}
    daemon.start()
    path = str(daemon.socket())
    with (
        Client(path, namespace="a", chunk_bytes=SMALL_CHUNK, deadline_ms=30_000) as writer,
        Client(path, namespace="b", chunk_bytes=SMALL_CHUNK, deadline_ms=30_000) as other,
    ):
        for n in range(200):
            with writer.write(keys(f"grow-{n}", 1000)):
                pass
            if daemon.slab()["slots"] == 128 * MIB // SMALL_CHUNK:
                break
        with writer.write(keys("a", MANY)) as write:
            assert len(write.views) == MANY
            if how == "cut":
                cut(writer)
            else:
                daemon.stop()
                daemon.start()
                wait_for(lambda: writer.status()["state"] == other.status()["state"] == "up")
                time.sleep(2.5)  # what nobody has claimed is free now
            stored: list[bytes] = []
            for n in range(24):
                some = keys(f"b-{n}", 1000)
                with other.write(some) as others:
                    for key, view in others.views.items():
                        view[:] = content(key, 1, SMALL_CHUNK)
                stored += others.views
            for key, view in write.views.items():
                view[:] = content(key, 2, SMALL_CHUNK)
            stored, buffer = stored[::8], bytearray(SMALL_CHUNK)
            found = [key for key in stored if other.get_into(key, buffer) and fault(key, buffer) is None]
            missing = [key for key in stored if not other.lookup([key])]
            assert len(found) + len(missing) == len(stored), "every chunk that is read is right"
            assert found
        assert write.sealed, "all of it is still its own"
        assert writer.get_into(keys("a", MANY)[-1], buffer)
        assert fault(keys("a", MANY)[-1], buffer) is None
    wait_for(lambda: not daemon.open_tickets())


def test_two_processes_with_one_session_id(daemon: Daemon, clients: Clients) -> None:
    """An engine restarts under its id while the old one isn't dead yet and writes on: the new one's Hello gave the
    slots to its own chunks."""
    daemon.start()
    session = b"engine-0-of-node".hex()
    old = clients.open(daemon.socket(), session=session)
    unfinished = old.do("begin_write", name="w", keys=names("old", range(12)))["new"]
    new = clients.open(daemon.socket(), session=session)
    stored: list[str] = []
    for n in range(40):
        stored += new.do("write", keys=names(f"new-{n}", range(8)))
    assert daemon.evictions()
    old.do("fill", name="w")
    held = daemon.slab()
    assert held["writing"] + held["quarantined"] == len(unfinished) == 12
    found = [key for key in stored if new.do("get", key=key) is not None]
    assert found
    assert {new.do("get", key=key) for key in found} <= {"right", None}
    assert old.do("lookup", keys=found[:1]) == 0, "of two only the last that came is served"
    old.do("until_up", up=False)
    time.sleep(1.0)
    assert "came later" in old.do("status")["error"]
    assert new.do("status")["state"] == "up", "and the old one doesn't take it back"
    assert old.do("end_write", name="w") is False
    wait_for(lambda: not daemon.open_tickets())
    unfinished = new.do("begin_write", name="w", keys=names("more", range(4)))["new"]
    assert len(unfinished) == 4
    old.kill()
    wait_for(lambda: daemon.tenant()["processes"] == 1)
    new.do("fill", name="w")
    assert new.do("end_write", name="w")
    assert new.do("read", keys=unfinished) == 4


def test_scheduler_and_worker_in_one_process(daemon: Daemon) -> None:
    """As in vLLM. The worker's connection comes back first and names nothing, for its job is still queued: the
    slots were free before the scheduler could name them."""
    daemon.start()
    path, session = str(daemon.socket()), b"one-process-only"
    identity = Identity(session, Role.WORKER, user_namespace("n"), "n", {"user": "n"}, (CHUNK_BYTES,))
    wake = threading.Event()
    with Client(path, namespace="n", chunk_bytes=CHUNK_BYTES, session=session) as scheduler:
        worker = Session(identity, wake.set)
        keeper = Keeper(worker, lambda: path, wake)
        assert keeper.settled.wait(30.0)
        with scheduler.write([b"a", b"b"]) as write:
            assert len(write.views) == 2
            hello = scheduler._session.hello
            free_to_go = threading.Event()

            def late(token: bytes) -> object:
                free_to_go.wait(30.0)
                return hello(token)

            scheduler._session.hello = late  # type: ignore[method-assign,assignment]
            for channel in (worker.channel, scheduler._session.channel):
                assert channel._connection is not None
                channel._connection._socket.shutdown(socket.SHUT_RDWR)
            wait_for(lambda: daemon.slab()["quarantined"] == 2 and worker.channel.state.value == "up")
            time.sleep(0.5)
            assert daemon.slab()["quarantined"] == 2
            free_to_go.set()
            wait_for(lambda: daemon.slab()["writing"] == 2 and not daemon.slab()["quarantined"])
            for key, view in write.views.items():
                view[:] = content(key, 1, CHUNK_BYTES)
            wait_for(lambda: scheduler.status()["state"] == "up")
        assert write.sealed
        keeper.stop(30.0)


def test_a_daemon_with_the_wrong_extents_is_only_misses(daemon: Daemon) -> None:
    """An operator starts it with extents too small for an engine that runs, sees it, and puts it right."""
    daemon.settings |= {"extent_bytes": "1MiB", "restart_grace_s": 0}
    daemon.start()
    with Client(str(daemon.socket()), namespace="n", chunk_bytes=MIB // 2) as client:
        assert client.put(b"k", b"v")
        for extent_bytes, right in (("256KiB", False), ("1MiB", True)):
            daemon.stop()
            daemon.settings["extent_bytes"] = extent_bytes
            daemon.start()
            if right:
                wait_for(lambda: client.put(b"k", b"v"))
            else:
                wait_for(lambda: "larger than half an extent" in str(client.status()["error"]))
                assert client.put(b"k", b"v") is False
                assert client.get_into(b"k", bytearray(MIB)) is False
