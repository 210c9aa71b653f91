"""Many at once: processes, threads on one client, children of forks, namespaces of different chunk sizes. Every byte
that is read anywhere is checked.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.support.clients import ClientProcess, Clients, names
from tests.support.daemon import KIB, MIB, Daemon, wait_for

pytestmark = pytest.mark.slow

PROCESSES = 16
HANG_GUARD_S = 10.0
"""Ten times a client's deadline."""


def end(clients: list[ClientProcess]) -> list[dict[str, Any]]:
    """End their loads; nothing wrong was read and nobody waited too long."""
    for client in clients:
        client.send("end_load")
    figures: list[dict[str, Any]] = [client.answer() for client in clients]
    for each in figures:
        assert each["wrong"] == []
        assert each["longest_s"] < HANG_GUARD_S
    return figures


def test_16_processes(daemon: Daemon, clients: Clients) -> None:
    """They store ten times what the arena holds: chunks are evicted while others read them."""
    daemon.start()
    crowd = clients.open_many(PROCESSES, daemon.socket())
    prefixes = [f"p{number}" for number in range(PROCESSES)]
    for client, prefix in zip(crowd, prefixes, strict=True):
        client.do("begin_load", threads=1, prefix=prefix, others=prefixes)
    wait_for(lambda: daemon.evictions() > 10 * 128)
    figures = end(crowd)
    assert min(each["acked"] for each in figures) > 0
    assert sum(each["counts"]["hits"] for each in figures) > 100
    wait_for(lambda: not daemon.open_tickets())
    assert daemon.status()["daemon"]["problems"] == {}
    for client in crowd:
        client.kill()
    wait_for(lambda: daemon.tenant()["processes"] == 0)


def test_16_processes_store_the_same_keys(daemon: Daemon, clients: Clients) -> None:
    """Each key is written once, whoever comes first, and everybody reads that."""
    daemon.start()
    crowd = clients.open_many(PROCESSES, daemon.socket())
    keys = names("same", range(8))
    for _ in range(3):
        for number, client in enumerate(crowd):
            client.send("write", keys=keys, seed=number)
        given = [client.answer() for client in crowd]
        keys_given = [key for some in given for key in some]
        assert sorted(keys_given) == sorted(set(keys_given))
        assert all(client.do("read", keys=keys) == 8 for client in crowd)
        keys = names(f"same-{time.monotonic_ns()}", range(8))


def test_8_threads_on_one_client(daemon: Daemon, clients: Clients) -> None:
    daemon.start()
    client = clients.open(daemon.socket())
    client.do("begin_load", threads=8, prefix="t")
    wait_for(lambda: daemon.evictions() > 3 * 128)
    [figures] = end([client])
    assert figures["counts"]["hits"] > 100
    wait_for(lambda: not daemon.open_tickets())
    # numbers of calls and tickets, mappings and counters have stayed sound
    keys = names("after", range(8))
    assert client.do("write", keys=keys) == keys
    assert client.do("read", keys=keys) == 8
    assert client.do("status")["troubles"] == {}


def test_a_child_of_a_fork_harms_nobody(daemon: Daemon, clients: Clients) -> None:
    """In the child all is a miss and nothing is sent, also while the parent is busy; a client of its own works."""
    daemon.start()
    client = clients.open(daemon.socket())
    keys = names("k", range(8))
    assert client.do("write", keys=keys) == keys
    assert client.do("begin_read", name="r", keys=keys) == 8
    assert client.do("begin_write", name="w", keys=["open"])["new"] == ["open"]
    for number in range(6):
        if number == 2:
            client.do("begin_load", threads=4, prefix="busy", keys_max=4)
        seen = client.do("fork", keys=keys)
        assert seen == {"lookup": 0, "put": False, "get": None, "views": [[], 0], "own": [True, 1]}
        assert client.do("check", name="r", keys=keys) == {"faults": [], "valid": True}
    end([client])
    client.do("fill", name="w")
    assert client.do("end_write", name="w")
    client.do("end_read", name="r")
    assert client.do("read", keys=keys) == 8
    assert client.do("read", keys=["open"]) == 1
    wait_for(lambda: not daemon.open_tickets())
    assert daemon.status()["daemon"]["problems"] == {}


def test_two_namespaces_of_1_and_3_mib_both_get_space(daemon: Daemon, clients: Clients) -> None:
    """64 MiB, both store without end and always hold leases: extents move to where the pressure is, and stay there."""
    daemon.settings |= {"ram_bytes": "64MiB", "extent_bytes": "8MiB"}
    daemon.start()
    small = clients.open(daemon.socket(), namespace="small", chunk_bytes=MIB)
    large = clients.open(daemon.socket(), namespace="large", chunk_bytes=3 * MIB)
    both = [small, large]
    for client in both:
        client.do("begin_load", threads=2, prefix="x", hold=2)
    seen: list[tuple[int, int]] = []
    until = time.monotonic() + 12
    while time.monotonic() < until:
        time.sleep(0.25)
        classes = {c["slot_bytes"]: c["extents"] for c in daemon.tenant()["classes"]}
        seen.append((classes[MIB], classes[3 * MIB]))
        stored = [client.do("look_at_load")["acked"] for client in both]
    moves = daemon.status()["arena"]["moves"]
    assert min(min(pair) for pair in seen[4:]) >= 1, seen
    assert moves <= 16, (moves, seen)
    # both still get on
    for client, before in zip(both, stored, strict=True):
        wait_for(lambda: client.do("look_at_load")["acked"] > before + 10)  # noqa: B023 - called at once
    end(both)
    wait_for(lambda: not daemon.open_tickets())


def test_a_namespace_that_comes_later_gets_space(daemon: Daemon, clients: Clients) -> None:
    """The arena is full of another's chunks, leases held on some: a class without an extent gets one first."""
    daemon.settings |= {"ram_bytes": "4MiB", "extent_bytes": "1MiB"}
    daemon.start()
    first = clients.open(daemon.socket(), namespace="first")
    first.do("begin_load", threads=2, prefix="x", hold=4)
    wait_for(lambda: daemon.evictions() > 100)
    second = clients.open(daemon.socket(), namespace="second", chunk_bytes=200 * KIB)
    keys = names("y", range(3))
    wait_for(lambda: second.do("write", keys=keys) == keys or second.do("lookup", keys=keys) == 3)
    assert second.do("read", keys=keys) == 3
    end([first])
    assert daemon.status()["arena"]["moves"] <= 2
