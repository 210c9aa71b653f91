"""Reconnecting and upkeep in the background, against a daemon that comes and goes."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachesvc.client.channel import State
from cachesvc.client.grants import KeyRun
from cachesvc.client.keeper import Keeper
from cachesvc.client.session import Session
from cachesvc.types import AllocateState, KeyState
from cachesvc.wire.messages import (
    Abort,
    Attach,
    ExtentsWanted,
    Hello,
    Lookup,
    Ping,
    Pong,
    Refused,
    Release,
    Unmapped,
)
from tests.support.fake_daemon import TOKEN, Close, FakeDaemon, wait_for
from tests.support.joined import identity, run, soon

HANG_S = 30.0
RAM = bytes([KeyState.RAM])


class Kept:
    """A session with its background thread."""

    def __init__(self, path: str) -> None:
        wake = threading.Event()
        self.session = Session(identity(chunk_bytes=(4096,)), wake.set, first_ticket=1)
        self.keeper = Keeper(self.session, lambda: path, wake)

    @property
    def state(self) -> State:
        return self.session.channel.state

    def up(self) -> Kept:
        wait_for(lambda: self.state is State.UP)
        return self

    def settled(self) -> Kept:
        assert self.keeper.settled.wait(HANG_S)
        return self

    def lookup(self, *keys: bytes, seconds: float = HANG_S) -> bytes:
        return self.session.lookup(run(*keys), time.monotonic() + seconds)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def keep() -> Iterator[Callable[[str], Kept]]:
    """Makes sessions, and closes them whatever is open."""
    all_kept: list[Kept] = []

    def make(path: str) -> Kept:
        all_kept.append(Kept(path))
        return all_kept[-1]

    yield make
    for kept in all_kept:
        kept.session._leases.clear()
        kept.session._writes.clear()
        kept.keeper.stop(HANG_S)
        assert not kept.keeper._thread.is_alive()


# --- joining --------------------------------------------------------------------------------------------------------


def test_it_attaches_then_says_hello_then_maps(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    assert [type(message) for message in daemon.received[:3]] == [Attach, Hello, ExtentsWanted]
    assert daemon.got(Hello)[0].token == TOKEN
    assert kept.session.arena == daemon.arena
    assert list(kept.session.extents.mapped) == [1]
    assert kept.keeper.tried.is_set()


def test_no_daemon_is_no_error_and_one_that_comes_is_found(tmp_path: Path, keep: Callable[[str], Kept]) -> None:
    daemon = FakeDaemon(tmp_path)
    kept = keep(daemon.path)
    assert kept.keeper.tried.wait(HANG_S)
    assert kept.state is State.DOWN
    assert kept.lookup(b"a") == bytes([KeyState.DAEMON_DOWN])
    assert daemon.path in kept.session.channel.error
    with daemon:
        kept.up()
        assert kept.lookup(b"a") == bytes([KeyState.NEVER_STORED])
        kept.keeper.stop(HANG_S)


@pytest.mark.parametrize("make", ["directory", "stale", "file", "long"])
def test_what_is_no_daemon_is_no_error(tmp_path: Path, keep: Callable[[str], Kept], make: str) -> None:
    path = tmp_path / "s"
    if make == "directory":
        path.mkdir()
    elif make == "stale":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif make == "file":
        path.write_text("")
    else:
        path = tmp_path / ("x" * 200)
    kept = keep(str(path))
    assert kept.keeper.tried.wait(HANG_S)
    assert kept.lookup(b"a") == bytes([KeyState.DAEMON_DOWN])


def test_a_refused_namespace_is_asked_for_again(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    daemon.on[Hello] = lambda hello: Refused(hello.call, "namespace", "holds chunks of 1 bytes")
    kept = keep(daemon.path)
    assert kept.keeper.tried.wait(HANG_S)
    assert kept.session.refusal == "holds chunks of 1 bytes"
    del daemon.on[Hello]
    wait_for(lambda: kept.session.channel.state is State.UP)
    assert kept.session.refusal == ""
    daemon.on[Hello] = lambda hello: Refused(hello.call, "namespace", "an extent is too small for it")
    daemon.stop()
    daemon.restart()
    wait_for(lambda: "too small" in kept.session.channel.error)
    assert kept.session.refusal == "", "the daemon had it: it may take it again"


def test_nothing_that_goes_wrong_ends_the_thread(daemon: FakeDaemon) -> None:
    kept = Kept("/\ud800")
    try:
        assert kept.keeper.tried.wait(HANG_S)
        assert "UnicodeEncodeError" in kept.session.channel.error
        kept.keeper._address = lambda: daemon.path
        wait_for(lambda: kept.session.channel.state is State.UP)
    finally:
        kept.keeper.stop(HANG_S)


def test_without_a_thread_everything_is_a_miss(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        kept = Kept(daemon.path)
    assert kept.keeper.tried.is_set()
    assert kept.lookup(b"a") == bytes([KeyState.DAEMON_DOWN])
    assert kept.session.channel.error == "can't start new thread"
    kept.keeper.stop(HANG_S)


def test_who_is_superseded_only_tells_what_it_still_holds(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path)
    wait_for(lambda: kept.session.channel.state is State.UP)
    grants = [kept.session.allocate(KeyRun(0, [key]), soon()) for key in (b"a", b"b")]
    daemon.on[Hello] = lambda hello: Refused(hello.call, "session", "another came later")
    daemon.stop()
    daemon.restart()
    wait_for(lambda: kept.session.superseded)
    assert kept.session.superseded == "another came later"
    assert kept.session.refusal == ""
    assert [grant.lost for grant in grants] == [True, True], "nothing of it will be sealed"
    told = daemon.got(Hello)[-1]
    assert [write.ticket for write in told.writes] == [1, 2]
    time.sleep(0.1)
    assert daemon.got(Hello)[-1] is told, "nothing has changed"
    kept.session.abort(grants[0])
    wait_for(lambda: daemon.got(Hello)[-1] is not told)
    told = daemon.got(Hello)[-1]
    assert ([write.ticket for write in told.writes], told.over) == ([2], True)
    kept.session.abort(grants[1])
    kept.keeper.stop(HANG_S)
    assert daemon.got(Hello)[-1].writes == [], "the last word"
    assert not kept.keeper._thread.is_alive()


def closing(_: object) -> None:
    raise Close


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (Hello, lambda x: Refused(x.call, "limit", "too many sessions")),
        (Hello, lambda x: Refused(0, "protocol", "wire version 1, this daemon speaks 2: upgrade the client")),
        (Hello, lambda x: Pong(x.call, 1)),
        (Hello, lambda x: b"\x05\x00\x00\x00abcde"),
        (Hello, lambda x: b"\xff" * 100),
        (Hello, closing),
        (Attach, closing),
        (Attach, lambda x: Refused(0, "protocol", "no")),
        (Attach, lambda x: b"\xff" * 100),
    ],
)
def test_a_daemon_that_will_not_have_us_is_asked_again(
    daemon: FakeDaemon, keep: Callable[[str], Kept], kind: type, answer: Any
) -> None:
    daemon.on[kind] = answer
    kept = keep(daemon.path)
    wait_for(lambda: len(daemon.got(kind)) >= 2)
    assert kept.state is State.DOWN
    assert kept.lookup(b"a") == bytes([KeyState.DAEMON_DOWN])
    del daemon.on[kind]
    kept.up()


# --- losing and finding the daemon again ----------------------------------------------------------------------------


def test_a_restart_is_survived_with_open_tickets(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    daemon.store(b"r", b"1")
    lease = kept.session.lease(run(b"r"), soon())
    write = kept.session.allocate(run(b"w"), soon())
    mapping = kept.session.extents.mapped[1]
    daemon.stop()
    assert kept.lookup(b"r") == bytes([KeyState.DAEMON_DOWN])
    daemon.restart()
    kept.up().settled()
    hello = daemon.got(Hello)[1]
    assert [claim.ticket for claim in hello.leases] == [lease.tickets[0].number]
    assert [claim.ticket for claim in hello.writes] == [write.tickets[0].number]
    assert daemon.got(ExtentsWanted)[-1].held == [1]
    assert kept.session.extents.mapped[1] is mapping
    assert not lease.lost
    assert kept.session.seal(write, [5], soon())
    assert kept.lookup(b"r", b"w") == RAM * 2
    kept.session.release(lease)


def test_tickets_that_a_restarted_daemon_does_not_keep_are_lost(
    daemon: FakeDaemon, keep: Callable[[str], Kept]
) -> None:
    kept = keep(daemon.path).up()
    daemon.store(b"r", b"1")
    lease = kept.session.lease(run(b"r"), soon())
    write = kept.session.allocate(run(b"w"), soon())
    daemon.stop()
    daemon.writes.clear()
    daemon.leases.clear()
    daemon.restart()
    wait_for(lambda: lease.lost and write.lost)
    kept.up()
    assert not kept.session.seal(write, [5], soon())
    kept.session.release(lease)
    assert kept.session.idle()


def test_another_arena_ends_everything_that_was(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    daemon.store(b"r", b"1")
    lease = kept.session.lease(run(b"r"), soon())
    daemon.stop()
    daemon.restart(cold=True)
    wait_for(lambda: lease.lost)
    kept.up().settled()
    assert kept.session.arena == daemon.arena
    assert list(kept.session.extents.mapped) == [2]
    assert daemon.got(Unmapped) == []
    kept.session.release(lease)


def test_a_hanging_daemon_is_pinged_on_the_same_connection(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    daemon.stall()
    assert kept.lookup(b"a", seconds=0.01) == bytes([KeyState.DEADLINE])
    before = time.monotonic()
    for _ in range(1000):
        assert kept.lookup(b"a") == bytes([KeyState.DAEMON_DOWN])
    assert time.monotonic() - before < HANG_S, "a thousand deadlines would be more"
    daemon.resume()
    kept.up()
    assert kept.lookup(b"a") == bytes([KeyState.NEVER_STORED])
    assert len(daemon.got(Hello)) == 1
    assert daemon.got(Ping)


def test_late_outcomes_are_undone(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    daemon.store(b"r", b"1")
    daemon.stall()
    assert kept.session.allocate(run(b"w"), time.monotonic() + 0.01).states == bytes([AllocateState.RETRY])
    daemon.resume()
    kept.up()
    daemon.stall()
    assert kept.session.lease(run(b"r"), time.monotonic() + 0.01).states == bytes([KeyState.DEADLINE])
    daemon.resume()
    kept.up()
    wait_for(lambda: daemon.got(Abort) == [Abort([1])] and daemon.got(Release) == [Release([2])])
    assert daemon.writes == {}
    assert daemon.leases == set()
    assert kept.session.idle()


def test_a_daemon_that_dies_while_idle_is_noticed_without_a_call(
    daemon: FakeDaemon, keep: Callable[[str], Kept]
) -> None:
    kept = keep(daemon.path).up()
    daemon.stop()
    wait_for(lambda: kept.state is State.DOWN)
    daemon.restart()
    kept.up()


# --- upkeep ---------------------------------------------------------------------------------------------------------


def test_new_extents_are_mapped_and_old_ones_given_up(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    daemon.add_extent()
    kept.lookup(b"a")
    wait_for(lambda: sorted(kept.session.extents.mapped) == [1, 2])
    daemon.drop_extent(1)
    kept.lookup(b"a")
    wait_for(lambda: gc.collect() is not None and daemon.got(Unmapped) == [Unmapped([1])])
    assert list(kept.session.extents.mapped) == [2]


def test_a_lost_descriptors_connection_is_made_again(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    daemon.on[ExtentsWanted] = lambda wanted: b"\xff" * 8
    daemon.add_extent()
    kept.lookup(b"a")
    wait_for(lambda: len(daemon.got(Attach)) >= 2)
    assert kept.state is State.UP
    del daemon.on[ExtentsWanted]
    wait_for(lambda: sorted(kept.session.extents.mapped) == [1, 2])
    assert len(daemon.got(Hello)) == 1


def test_a_daemon_that_refuses_to_attach_again_leaves_us_up(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    daemon.on[ExtentsWanted] = lambda wanted: b"\xff" * 8
    daemon.on[Attach] = lambda attach: Refused(0, "protocol", "no more processes")
    daemon.add_extent()
    kept.lookup(b"a")
    wait_for(
        lambda: (
            kept.session.channel.error == "the daemon answered Refused(call=0, kind='protocol', "
            "detail='no more processes')"
        )
    )
    assert kept.lookup(b"a") == bytes([KeyState.NEVER_STORED])


# --- stopping -------------------------------------------------------------------------------------------------------


def test_stopping_ends_the_thread_and_both_connections(daemon: FakeDaemon) -> None:
    kept = Kept(daemon.path).up().settled()
    kept.keeper.stop(HANG_S)
    assert not kept.keeper._thread.is_alive()
    assert kept.state is State.CLOSED
    assert not kept.session.extents.attached()
    assert kept.lookup(b"a") == bytes([KeyState.DAEMON_DOWN])
    kept.keeper.stop(HANG_S)


def test_stopping_waits_for_open_tickets_in_the_background(daemon: FakeDaemon) -> None:
    kept = Kept(daemon.path).up().settled()
    write = kept.session.allocate(run(b"w"), soon())
    kept.keeper.stop(HANG_S)
    assert kept.keeper._thread.is_alive()
    assert kept.session.seal(write, [7], soon())
    kept.keeper._thread.join(HANG_S)
    assert not kept.keeper._thread.is_alive()
    assert daemon.chunks[b"w"][3] == 7


@pytest.mark.parametrize("kind", [Attach, Hello])
def test_stopping_while_a_daemon_hangs_is_heard(daemon: FakeDaemon, kind: type) -> None:
    daemon.on[kind] = lambda _: None
    kept = Kept(daemon.path)
    wait_for(lambda: daemon.got(kind))
    kept.keeper.stop(HANG_S)
    assert not kept.keeper._thread.is_alive()


def test_stopping_without_a_daemon(tmp_path: Path) -> None:
    kept = Kept(str(tmp_path / "absent"))
    kept.keeper.stop(HANG_S)
    assert not kept.keeper._thread.is_alive()


# --- forks ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_child_of_a_fork_is_dead_to_the_daemon(daemon: FakeDaemon, keep: Callable[[str], Kept]) -> None:
    kept = keep(daemon.path).up().settled()
    write = kept.session.allocate(run(b"w"), soon())
    before = len(daemon.received)
    with kept.session.channel._lock, kept.session.extents._lock, kept.session._counting:
        pid = os.fork()
        if not pid:
            os._exit(_as_child(kept))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [type(message) for message in daemon.received[before:] if not isinstance(message, Ping)] == []
    assert kept.session.seal(write, [3], soon())
    assert kept.lookup(b"w") == RAM
    assert daemon.got(Lookup)


def _as_child(kept: Kept) -> int:
    """Everything answers locally, and nothing hangs although the parent's threads held every lock."""
    grants = list(kept.session._writes.values())
    if not all(ticket.lost for ticket in grants) or kept.state is not State.CLOSED:
        return 1
    if kept.lookup(b"w") != bytes([KeyState.DAEMON_DOWN]):
        return 2
    if kept.session.lease(KeyRun(0, [b"w"]), soon()).states != bytes([KeyState.DAEMON_DOWN]):
        return 3
    if kept.session.extents.refresh(soon()):
        return 4
    kept.session.end_requests([1])
    kept.session._writes.clear()
    kept.keeper.stop(HANG_S)
    return 0
