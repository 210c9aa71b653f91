"""A daemon that hangs (SIGSTOP): every call answers within its deadline, one missed deadline makes the next ones local,
and all is well again after SIGCONT by itself. Replies that came too late are undone.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.support.clients import ClientProcess, Clients, names
from tests.support.daemon import Daemon, wait_for

pytestmark = pytest.mark.slow

DEADLINE_MS = 300.0
HANG_GUARD_S = 10 * DEADLINE_MS / 1000

KEYS = names("k", range(4))

CALLS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "lookup": ("lookup", {"keys": KEYS}, 0),
    "get": ("get", {"key": KEYS[0]}, None),
    "put": ("put", {"key": "new"}, False),
    "read": ("begin_read", {"name": "late read", "keys": KEYS}, 0),
    "write": ("begin_write", {"name": "late write", "keys": ["new"]}, {"new": [], "tickets": []}),
    "lookup of many": ("lookup", {"keys": names("many", range(10_000))}, 0),
    "write of many": ("begin_write", {"name": "w", "keys": names("many", range(10_000))}, {"new": [], "tickets": []}),
}
"""What is called, with what, and what it answers without a daemon."""


def call(client: ClientProcess, name: str) -> None:
    verb, arguments, answer = CALLS[name]
    assert client.do(verb, **arguments) == answer
    assert client.seconds < HANG_GUARD_S


@pytest.mark.parametrize("first", CALLS)
def test_a_call_answers_within_its_deadline_then_locally(daemon: Daemon, clients: Clients, first: str) -> None:
    daemon.start()
    client, other = clients.open_many(2, daemon.socket(), deadline_ms=DEADLINE_MS)
    assert client.do("write", keys=KEYS) == KEYS
    daemon.freeze()
    call(client, first)
    assert client.do("status")["state"] == "down"
    missed = client.do("misses").get("DEADLINE", 0)
    for name in CALLS:
        call(client, name)
    # one deadline was missed, in the first call; all others asked nobody
    assert client.do("misses").get("DEADLINE", 0) == missed
    daemon.thaw()
    client.do("until_up")
    assert client.do("read", keys=KEYS) == 4
    # late replies gave this client slots and leases that it can't know of
    wait_for(lambda: not daemon.open_tickets())
    assert other.do("read", keys=KEYS) == 4
    assert other.do("write", keys=["new"]) == ["new"]


def test_nothing_is_sealed_that_was_not_acknowledged(daemon: Daemon, clients: Clients) -> None:
    """A seal whose deadline was missed: False to its writer; for everybody else the right bytes or a miss."""
    daemon.start()
    writer, reader = clients.open_many(2, daemon.socket(), deadline_ms=DEADLINE_MS)
    assert writer.do("begin_write", name="w", keys=KEYS)["new"] == KEYS
    writer.do("fill", name="w")
    daemon.freeze()
    assert writer.do("end_write", name="w") is False
    assert writer.seconds < HANG_GUARD_S
    daemon.thaw()
    writer.do("until_up")
    wait_for(lambda: not daemon.open_tickets())
    assert reader.do("read", keys=KEYS) in (0, 4)
    writer.do("write", keys=KEYS)
    assert reader.do("read", keys=KEYS) == 4


def test_contexts_stay_open_over_a_hang(daemon: Daemon, clients: Clients) -> None:
    daemon.settings |= {"quarantine_s": 0, "restart_grace_s": 0}
    daemon.start()
    client = clients.open(daemon.socket(), deadline_ms=DEADLINE_MS)
    fresh = names("fresh", range(3))
    assert client.do("write", keys=KEYS) == KEYS
    assert client.do("begin_read", name="r", keys=KEYS) == 4
    client.do("begin_write", name="w", keys=fresh)
    daemon.freeze()
    call(client, "lookup")
    assert client.do("check", name="r", keys=KEYS) == {"faults": [], "valid": True}
    client.do("fill", name="w")
    daemon.thaw()
    client.do("until_up")
    assert client.do("end_write", name="w") is True
    assert client.do("check", name="r", keys=KEYS) == {"faults": [], "valid": True}
    client.do("end_read", name="r")
    assert client.do("read", keys=fresh) == 3
    wait_for(lambda: not daemon.open_tickets())


def test_a_client_that_starts_while_it_hangs(daemon: Daemon, clients: Clients) -> None:
    """Misses until the daemon goes on, and then it is connected by itself."""
    daemon.start()
    first = clients.open(daemon.socket())
    assert first.do("write", keys=KEYS) == KEYS
    daemon.freeze()
    late = clients.open(daemon.socket(), deadline_ms=DEADLINE_MS, ready_s=0)
    call(late, "lookup")
    daemon.thaw()
    late.do("until_up")
    assert late.do("read", keys=KEYS) == 4


def test_hanging_again_and_again_under_load(daemon: Daemon, clients: Clients) -> None:
    daemon.settings |= {"ram_bytes": "64MiB"}
    daemon.start()
    pair = clients.open_many(2, daemon.socket(), deadline_ms=DEADLINE_MS)
    for client, mine, other in zip(pair, "ab", "ba", strict=True):
        client.do("begin_load", threads=2, prefix=mine, others=[other], keys_max=100)
    for _ in range(5):
        time.sleep(0.3)
        daemon.freeze()
        for client in pair:
            client.do("until_up", up=False)
        daemon.thaw()
        for client in pair:
            client.do("until_up")
    keys: list[str] = []
    for client in pair:
        figures = client.do("end_load")
        assert figures["wrong"] == []
        assert figures["longest_s"] < HANG_GUARD_S
        keys += figures["keys"]
    for client in pair:
        assert client.do("states", keys=keys) == ["RAM"] * len(keys)
        assert [client.do("get", key=key) for key in keys] == ["right"] * len(keys)
    wait_for(lambda: not daemon.open_tickets())
