"""The daemon is killed with -9, or upgraded: misses within the deadline, clients come back by themselves, every chunk
whose store was acknowledged is read back right, open tickets named again are owned again.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import ClientProcess, Clients, names
from tests.support.daemon import MIB, Daemon, small_mount, wait_for

pytestmark = pytest.mark.slow

DEADLINE_MS = 500.0
HANG_GUARD_S = 10 * DEADLINE_MS / 1000


def stored_everywhere(clients: list[ClientProcess], keys: list[str]) -> None:
    """Every client reads every chunk, and every byte is right."""
    for client in clients:
        for at in range(0, len(keys), 16):
            some = keys[at : at + 16]
            assert client.do("read", keys=some) == len(some)


@pytest.fixture
def loaded(daemon: Daemon, clients: Clients) -> list[ClientProcess]:
    """Two clients with two threads each that put, write, get, read and look up; room for all that they store."""
    daemon.settings |= {"ram_bytes": "64MiB"}
    daemon.start()
    pair = clients.open_many(2, daemon.socket(), deadline_ms=DEADLINE_MS)
    for client, mine, other in zip(pair, "ab", "ba", strict=True):
        client.do("begin_load", threads=2, prefix=mine, others=[other], keys_max=150)
    return pair


def progress(clients: list[ClientProcess], figure: str, least: int) -> None:
    """Wait until each client has so many of it."""
    for client in clients:
        wait_for(lambda: client.do("look_at_load")["counts"].get(figure, 0) >= least)  # noqa: B023 - called at once


def ended(clients: list[ClientProcess]) -> list[str]:
    """End the load: nothing wrong was ever read and no call took long; the keys that were stored."""
    keys: list[str] = []
    for client in clients:
        figures = client.do("end_load")
        assert figures["wrong"] == []
        assert figures["longest_s"] < HANG_GUARD_S
        keys += figures["keys"]
    return keys


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "upgraded"])
def test_under_load_from_two_clients(daemon: Daemon, loaded: list[ClientProcess], number: int) -> None:
    """Three times in a row, down for a moment that the clients notice."""
    for restart in range(3):
        progress(loaded, "hits", least=100 * (restart + 1))
        before = [client.do("look_at_load")["acked"] for client in loaded]
        daemon.stop(number)
        for client in loaded:
            client.do("until_up", up=False)
        misses = [client.do("look_at_load")["counts"].get("misses", 0) for client in loaded]
        for client, missed in zip(loaded, misses, strict=True):
            progress([client], "misses", least=missed + 100)
        daemon.start()
        assert daemon.status()["restart"]["chunks_restored"] >= sum(before)
        for client in loaded:
            client.do("until_up")
    hits = max(client.do("look_at_load")["counts"]["hits"] for client in loaded)
    progress(loaded, "hits", least=hits + 100)
    keys = ended(loaded)
    assert len(keys) > 100
    stored_everywhere(loaded, keys)
    for client in loaded:
        assert client.do("misses").keys() & {"DAEMON_DOWN"}
    wait_for(lambda: not daemon.open_tickets())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "upgraded"])
def test_open_tickets_named_again_are_owned_again(daemon: Daemon, clients: Clients, number: int) -> None:
    """A write seals and a read stays valid across the restart, though another client fills the arena meanwhile."""
    daemon.settings |= {"restart_grace_s": 1, "quarantine_s": 1}
    daemon.start()
    engine, other = clients.open_many(2, daemon.socket())
    kept, fresh = names("kept", range(5)), names("fresh", range(5))
    assert engine.do("write", keys=kept) == kept
    assert engine.do("begin_read", name="r", keys=kept) == 5
    assert engine.do("begin_write", name="w", keys=fresh)["new"] == fresh
    engine.do("fill", name="w", part=0.5)
    daemon.stop(number)
    assert engine.do("check", name="r", keys=kept) == {"faults": [], "valid": True}
    daemon.start()
    for client in engine, other:
        client.do("until_up")
    assert other.do("states", keys=fresh) == ["PENDING"] * 5
    wait_for(lambda: not daemon.status()["restart"]["grace"])
    fill_twice_over(daemon, other)
    assert engine.do("check", name="r", keys=kept) == {"faults": [], "valid": True}
    engine.do("fill", name="w")
    assert engine.do("end_write", name="w")
    assert other.do("read", keys=fresh) == 5
    engine.do("end_read", name="r")
    wait_for(lambda: not daemon.open_tickets())
    assert daemon.status()["restart"]["orphans"] == 0


def fill_twice_over(daemon: Daemon, client: ClientProcess) -> None:
    """Store until as many more chunks were evicted as there are slots."""
    before, slots = daemon.evictions(), 128
    for number in range(100):
        client.do("write", keys=names(f"filler-{before}-{number}", range(8)))
        if daemon.evictions() >= before + slots:
            return
    pytest.fail(f"only {daemon.evictions() - before} evictions after 100 writes")


def test_a_lease_that_nobody_names_ends_with_the_grace_time(daemon: Daemon, clients: Clients) -> None:
    """The reader died with the daemon: what it held can be evicted again."""
    daemon.settings |= {"restart_grace_s": 0.5, "eviction": "lru"}
    daemon.start()
    reader, other = clients.open_many(2, daemon.socket())
    fill_twice_over(daemon, other)
    keys = names("k", range(60))
    assert reader.do("write", keys=keys) == keys
    assert reader.do("begin_read", name="r", keys=keys) == 60
    daemon.stop(signal.SIGKILL)
    reader.kill()
    daemon.start()
    other.do("until_up")
    assert other.do("read", keys=keys) == 60
    wait_for(lambda: not daemon.status()["restart"]["grace"])
    fill_twice_over(daemon, other)
    assert other.do("lookup", keys=keys) == 0


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "upgraded"])
def test_an_arena_of_60_percent_of_the_mount_restarts_full(tmp_path: Path, number: int) -> None:
    """What the extents hold already needs no room again, and every sealed chunk is back."""
    mount_bytes = 256 * MIB
    with small_mount(mount_bytes) as mount, Clients() as clients:
        settings: dict[str, Any] = {"ram_bytes": "152MiB", "extent_bytes": "8MiB"}
        with Daemon(tmp_path, mount / "arena", **settings) as daemon:
            client = clients.open(daemon.socket(), chunk_bytes=MIB)
            keys: list[str] = []
            while daemon.evictions() == 0:
                more = names("full", range(len(keys), len(keys) + 8))
                keys += client.do("write", keys=more)
            slab = daemon.slab()
            assert slab["sealed"] == slab["slots"] == 152
            gone = daemon.evictions()
            for _ in range(2):
                daemon.stop(number)
                daemon.start()
                assert daemon.status()["restart"]["chunks_restored"] == 152, daemon.log
                client.do("until_up")
                states = client.do("states", keys=keys)
                assert states.count("RAM") == 152 == len(keys) - gone
                for key, state in zip(keys, states, strict=True):
                    assert client.do("get", key=key) == ("right" if state == "RAM" else None)


def test_calls_while_the_daemon_is_down_are_answered_at_once(daemon: Daemon, clients: Clients) -> None:
    """Ten thousand of them, in less than a hang guard's time; and then it goes on by itself."""
    daemon.start()
    client = clients.open(daemon.socket(), deadline_ms=DEADLINE_MS)
    keys = names("k", range(3))
    assert client.do("write", keys=keys) == keys
    daemon.stop(signal.SIGKILL)
    before = time.monotonic()
    for _ in range(50):
        assert client.do("lookup", keys=keys * 200) == 0
        assert client.do("get", key=keys[0]) is None
        assert client.do("put", key="new") is False
        assert client.do("write", keys=["newer"]) == []
        assert client.do("read", keys=keys) == 0
    assert time.monotonic() - before < HANG_GUARD_S
    assert client.do("misses").keys() == {"DAEMON_DOWN"}
    daemon.start()
    client.do("until_up")
    assert client.do("read", keys=keys) == 3
    assert client.do("put", key="new")
