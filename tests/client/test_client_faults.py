"""The public API against a daemon that is dead, slow or mad: a miss, and right again when it is."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachesvc.client.client import Client
from cachesvc.types import KeyState
from cachesvc.wire.framing import encode
from cachesvc.wire.messages import (
    Allocate,
    Allocated,
    ExtentInfo,
    ExtentsHeld,
    ExtentsWanted,
    Lease,
    Leased,
    Looked,
    Lookup,
    Pong,
    Refused,
    Seal,
    Sealed,
    Slots,
    Welcome,
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


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_a_read_survives_a_restart_if_the_daemon_kept_it(daemon: FakeDaemon, client: Client) -> None:
    daemon.store(b"a", b"1")
    for kept in (True, False):
        with client.read([b"a"]) as read:
            daemon.stop()
            assert client.lookup([b"a"]) == 0
            assert read.valid()
            if not kept:
                daemon.leases.clear()
            daemon.restart()
            wait_for(lambda: client.lookup([b"a"]) == 1)
            assert read.valid() == kept
            assert bytes(read.views[0]) == b"1"


def test_a_write_over_a_restart_is_sealed_if_the_daemon_kept_it(daemon: FakeDaemon, client: Client) -> None:
    for key, kept in ((b"a", True), (b"b", False)):
        with client.write([key]) as write:
            daemon.stop()
            client.lookup([key])
            if not kept:
                daemon.writes.clear()
            daemon.restart()
            wait_for(lambda: client.status()["state"] == "up")
        assert write.sealed == kept
        assert client.lookup([key]) == kept
    assert client.status()["unsealed"] == 1


# --- extents that can't be had --------------------------------------------------------------------------------------


def test_an_extent_is_fetched_when_a_reply_names_it(daemon: FakeDaemon) -> None:
    """Only then: a stalled background thread must not make a call fail."""
    asked_for = threading.Event()

    def only_inline(wanted: ExtentsWanted) -> Any:
        if not asked_for.is_set():
            return ExtentsHeld(wanted.call, daemon.version, [], False)
        return daemon.usual(wanted)

    daemon.on[ExtentsWanted] = only_inline
    with Client(daemon.path, namespace="t", chunk_bytes=10) as client:
        wait_for(lambda: daemon.got(ExtentsWanted))
        asked_for.set()
        assert client.put(b"a", b"1")
        buffer = bytearray(1)
        assert client.get_into(b"a", buffer)
        assert buffer == b"1"


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: ExtentsHeld(x.call, 1, [], False),
        lambda x: Refused(0, "protocol", "no"),
        lambda x: encode(ExtentsHeld(x.call, 1, [ExtentInfo(1, 4096, 64, True)], False)),
    ],
)
def test_without_mappings_everything_is_a_miss(daemon: FakeDaemon, answer: Any) -> None:
    daemon.on[ExtentsWanted] = answer
    daemon.store(b"r", b"1")
    with Client(daemon.path, namespace="t", chunk_bytes=10) as client:
        assert not client.put(b"a", b"1")
        assert not client.get_into(b"r", bytearray(10))
        with client.read([b"r"]) as read:
            assert read.views == ()
        with client.write([b"a"]) as write:
            assert write.views == {}
        assert client.misses[KeyState.LOAD_FAILED] == 2
        client.lookup([b"another"])  # everything that was told before has arrived
    assert daemon.writes == {}
    assert daemon.leases == set()


def test_slots_that_do_not_exist_are_misses(daemon: FakeDaemon, client: Client) -> None:
    slots = Slots([], [], [])
    daemon.on[Lease] = lambda x: Leased(x.call, b"\x01", slots, [1], daemon.version)
    daemon.on[Allocate] = lambda x: Allocated(x.call, b"\x01", slots, daemon.version)
    for place in ((1, 64), (1, 2**64 - 1), (2**64 - 1, 0)):
        slots = Slots([place[0]], [place[1]], [1])
        assert not client.get_into(b"r", bytearray(10))
        with client.read([b"r"]) as read:
            assert read.views == ()
        assert not client.put(b"r", b"1")
        with client.write([b"r"]) as write:
            assert write.views == {}
    daemon.on[Lease] = lambda x: Leased(x.call, b"\x01", Slots([1], [0], [1]), [2**64 - 1], daemon.version)
    assert not client.get_into(b"r", bytearray(10))


# --- whatever the daemon does ---------------------------------------------------------------------------------------


def everything(client: Client) -> None:
    """Every method once; each answer must be one that the API allows."""
    keys = [b"a", b"b", b"c"]
    assert 0 <= client.lookup(keys) <= 3
    assert len(client.states(keys)) == 3
    assert client.put(b"a", b"123") in (True, False)
    assert client.get_into(b"a", bytearray(5000)) in (True, False)
    with client.write(keys) as write:
        assert set(write.views) <= set(keys)
        for view in write.views.values():
            view[:1] = b"x"
    with client.read(keys) as read:
        assert len(read.views) <= 3
        assert read.valid() in (True, False)
    assert client.status()


@pytest.mark.parametrize("what", ["absent", "stopped", "stalled"])
def test_without_a_daemon_everything_is_a_miss(daemon: FakeDaemon, what: str) -> None:
    if what == "absent":
        daemon.stop()
    with Client(daemon.path, namespace="t", chunk_bytes=CHUNK, deadline_ms=20) as client:
        if what == "stopped":
            daemon.stop()
        elif what == "stalled":
            daemon.stall()
        for _ in range(3):
            everything(client)
        assert client.lookup([b"a"]) == 0
        reason = KeyState.DAEMON_DOWN
        assert client.states([b"a"]) == [reason]
        assert client.misses[reason] > 0
        assert client.misses[KeyState.DEADLINE] == (3 if what == "stalled" else 0)
        if what == "stalled":
            daemon.resume()
        else:
            daemon.start()


def slots_strategy() -> st.SearchStrategy[Slots]:
    numbers = st.sampled_from([0, 1, 2, 3, 63, 64, 2**32, 2**64 - 1])
    return st.lists(st.tuples(numbers, numbers, numbers), max_size=4).map(
        lambda places: Slots([p[0] for p in places], [p[1] for p in places], [p[2] for p in places])
    )


STATES = st.binary(max_size=4) | st.lists(st.sampled_from([1, 2, 16, 17, 3, 4, 5]), min_size=1, max_size=3).map(bytes)
LENGTHS = st.lists(st.sampled_from([0, 1, CHUNK, 4096, 4097, 2**64 - 1]), max_size=4)
REPLIES: st.SearchStrategy[Callable[[Any], Any]] = st.one_of(
    st.builds(lambda s: lambda x: Looked(x.call, s, 1), STATES),
    st.builds(lambda s, p, n: lambda x: Leased(x.call, s, p, n, 1), STATES, slots_strategy(), LENGTHS),
    st.builds(lambda s, p: lambda x: Allocated(x.call, s, p, 1), STATES, slots_strategy()),
    st.builds(lambda ok: lambda x: Sealed(x.call, ok), st.booleans()),
    st.builds(lambda kind: lambda x: Refused(x.call, kind, "why"), st.sampled_from(["limit", "protocol", "other"])),
    st.builds(lambda n: lambda x: Pong(x.call + n, 5), st.integers(-1, 1).map(abs)),
    st.builds(lambda a: lambda x: Welcome(x.call, a, [1], [2], 9), st.binary(max_size=20)),
    st.builds(lambda raw: lambda x: raw, st.binary(min_size=1, max_size=60)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_daemon_answers_nothing_is_raised(data: st.DataObject, hostile: FakeDaemon) -> None:
    """Any reply to any call, right after an honest handshake: no exception, and honest again it works again."""
    hostile.on.clear()
    with Client(hostile.path, namespace="t", chunk_bytes=CHUNK, deadline_ms=50) as client:
        for kind in (Lookup, Lease, Allocate, Seal):
            if data.draw(st.booleans()):
                hostile.on[kind] = data.draw(REPLIES)
        everything(client)
        hostile.on.clear()
        wait_for(lambda: client.put(b"honest", b"1"))
        buffer = bytearray(1)
        assert wait_for(lambda: client.get_into(b"honest", buffer))
        assert buffer == b"1"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setattr("cachesvc.client.channel.REVIVE_S", 0.2)
    with FakeDaemon(tmp_path, slot_count=10_000) as daemon:
        yield daemon


def test_threads_share_a_client_while_the_daemon_comes_and_goes(daemon: FakeDaemon) -> None:
    """Right bytes or a miss, from many threads, over restarts; at the end nothing is open."""
    stop = time.monotonic() + 1.0
    wrong: list[object] = []

    def work(client: Client, seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < stop:
            key = b"%d" % dice.randrange(30)
            data = key * 500
            buffer = bytearray(CHUNK)
            client.put(key, data)
            if client.get_into(key, buffer) and buffer[: len(data)] != data:
                wrong.append(key)
            with client.read([key, b"%d" % dice.randrange(30)]) as read:
                shown = [bytes(view) for view in read.views]
                if read.valid() and shown and shown[0] != data:
                    wrong.append((key, shown))

    with Client(daemon.path, namespace="t", chunk_bytes=CHUNK) as client:
        threads = [threading.Thread(target=work, args=(client, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        while time.monotonic() < stop:
            time.sleep(0.3)
            daemon.stop()
            daemon.restart()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert client._session.idle()
        keys = [b"%d" % i for i in range(30)]
        wait_for(lambda: [client.put(key, key * 500) for key in keys] == [True] * 30)
        assert client.lookup(keys) == 30
        wait_for(lambda: not daemon.leases and not daemon.writes)
