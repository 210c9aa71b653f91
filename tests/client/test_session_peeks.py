"""Asking without waiting: whatever becomes of the daemon, the answer comes, or the question couldn't be asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachesvc.client.channel import State
from cachesvc.client.grants import KeyRun, Peek
from cachesvc.types import KeyState
from cachesvc.wire.messages import Hello, Looked, Lookup, Refused, Sealed
from tests.support.fake_daemon import HANG_S, FakeDaemon, wait_for
from tests.support.joined import Joined, many, run, soon

RAM, NEVER, NO_ROOM = bytes([KeyState.RAM]), bytes([KeyState.NEVER_STORED]), bytes([KeyState.NO_ROOM])


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Joined]:
    with FakeDaemon(tmp_path) as daemon:
        joined = Joined(daemon)
        yield joined
        joined.keeper.stop(HANG_S)


def peek_at(joined: Joined, *runs: KeyRun, **options: Any) -> Peek:
    """The background thread may hold the channel at this moment: then it can't be asked."""
    peek = wait_for(lambda: joined.session.peek(runs, **options))
    assert isinstance(peek, Peek)
    return peek


def states_of(joined: Joined, peek: Peek) -> bytes:
    def heard() -> bytes | None:
        joined.session.channel.listen()
        return peek.states

    wait_for(lambda: heard() is not None)
    assert peek.states is not None
    return peek.states


def test_a_peek_is_answered_later(joined: Joined) -> None:
    joined.daemon.store(b"a", b"1")
    joined.daemon.stall()
    try:
        peek = peek_at(joined, run(b"a", b"b"), request=7, touch=True)
        joined.session.channel.listen()
        assert peek.states is None
    finally:
        joined.daemon.resume()
    assert states_of(joined, peek) == RAM + NEVER
    (lookup,) = joined.daemon.got(Lookup)
    assert (lookup.request, lookup.touch) == (7, True)
    assert joined.session._peeking == {}
    assert joined.session.idle(), "it takes no lease"


def test_a_peek_of_several_groups_and_many_keys_keeps_their_order(joined: Joined) -> None:
    joined.daemon.store(b"4999", b"1")
    joined.daemon.store(b"x", b"1")
    peek = peek_at(joined, many(5000), run(group=1), run(b"y", b"x", group=1))
    assert states_of(joined, peek) == NEVER * 4999 + RAM + NEVER + RAM
    assert [lookup.keys.group for lookup in joined.daemon.got(Lookup)] == [0, 0, 1]


def test_a_peek_of_nothing_is_answered_at_once(joined: Joined) -> None:
    for runs in [], [run()], [run(), run(group=1)]:
        peek = joined.session.peek(runs)
        assert peek is not None
        assert peek.states == b""
    assert joined.daemon.got(Lookup) == []


def test_a_call_hears_the_answer_to_a_peek(joined: Joined) -> None:
    peek = peek_at(joined, run(b"a"))
    assert joined.session.lookup(run(b"b", b"c"), soon()) == NEVER * 2
    assert peek.states == NEVER


def test_a_peek_without_a_daemon_cannot_be_asked(joined: Joined) -> None:
    joined.daemon.stop()
    wait_for(lambda: joined.session.channel.state is State.DOWN)
    assert joined.session.peek([run(b"a")]) is None
    assert joined.session._peeking == {}


def test_a_peek_that_waits_for_the_channel_cannot_be_asked(joined: Joined) -> None:
    with joined.session.channel._lock:
        assert joined.session.peek([run(b"a")]) is None
    assert joined.session._peeking == {}


def test_what_a_peek_asked_of_a_daemon_that_died_is_a_miss(joined: Joined) -> None:
    joined.daemon.store(b"a", b"1")
    joined.daemon.on[Lookup] = lambda _: None
    peeks = [peek_at(joined, run(b"a", b"b"), run(b"c", group=1)) for _ in range(3)]
    wait_for(lambda: len(joined.daemon.got(Lookup)) == 6)
    joined.daemon.stop()
    del joined.daemon.on[Lookup]
    joined.daemon.restart()
    wait_for(lambda: len(joined.daemon.got(Hello)) == 2)
    joined.up()
    assert [peek.states for peek in peeks] == [bytes([KeyState.DAEMON_DOWN]) * 3] * 3
    assert joined.session._peeking == {}
    assert states_of(joined, peek_at(joined, run(b"a"))) == RAM


@pytest.mark.parametrize(
    "reply",
    [lambda x: Looked(x.call, b"", 1), lambda x: Looked(x.call, b"\xff", 1), lambda x: Sealed(x.call, True)],
)
def test_a_peek_answered_by_nonsense_ends_the_connection_and_is_a_miss(joined: Joined, reply: Any) -> None:
    joined.daemon.on[Lookup] = reply
    peek = peek_at(joined, run(b"a"))
    assert states_of(joined, peek) == bytes([KeyState.DAEMON_DOWN])
    assert len(joined.daemon.got(Hello)) == 2
    assert joined.session._peeking == {}


def test_a_peek_that_is_refused_says_no_room(joined: Joined) -> None:
    joined.daemon.on[Lookup] = lambda x: Refused(x.call, "limit", "too many")
    assert states_of(joined, peek_at(joined, run(b"a", b"b"))) == NO_ROOM * 2
    assert joined.session.channel.state is State.UP


def test_a_late_answer_to_a_peek_is_heard_after_a_missed_deadline(joined: Joined) -> None:
    joined.daemon.store(b"a", b"1")
    joined.daemon.stall()
    peek = peek_at(joined, run(b"a"))

    def fallen() -> bool:
        joined.session.channel.missed()
        return joined.session.channel.state is State.DOWN

    wait_for(fallen)
    joined.daemon.resume()
    joined.up()
    assert states_of(joined, peek) == RAM
    assert len(joined.daemon.got(Hello)) == 1
