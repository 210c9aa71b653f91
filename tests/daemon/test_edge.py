"""The guard of the client connection edge."""

from __future__ import annotations

import resource
import socket
import sys
from collections import Counter

import pytest

from cachesvc.daemon.edge import RESERVED_FILES, files_max, guard, last_words, refuse, tell
from cachesvc.errors import ProtocolError
from cachesvc.wire.framing import LENGTH, decode_control_reply
from cachesvc.wire.messages import Refused


def test_what_goes_well_is_nothing() -> None:
    counts: Counter[str] = Counter()
    assert guard(counts, "it", lambda: None) is None
    assert not counts


def test_a_broken_rule_is_told() -> None:
    def break_it() -> None:
        raise ProtocolError("too long")

    counts: Counter[str] = Counter()
    error = guard(counts, "it", break_it)
    assert str(error) == "too long"
    assert counts == {"protocol": 1}


def test_a_bug_is_logged_but_not_told(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise KeyError("secret")

    counts: Counter[str] = Counter()
    error = guard(counts, "it", fail)
    assert "secret" not in str(error)
    assert counts == {"crashed": 1}
    assert caplog.records[0].exc_info is not None


def test_refuse_says_why_and_closes() -> None:
    ours, theirs = socket.socketpair()
    refuse(ours, ProtocolError("no"))
    assert ours.fileno() < 0
    with theirs:
        frame = theirs.recv(1000)
        assert frame == last_words(ProtocolError("no"))
        assert decode_control_reply(frame[LENGTH.size :]) == Refused(0, "protocol", "no")
        assert theirs.recv(1) == b""


def test_refuse_does_not_mind_that_nobody_is_there() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    refuse(ours, ProtocolError("no"))
    assert ours.fileno() < 0


def test_tell_leaves_it_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        tell(ours, ProtocolError("no"))
        assert theirs.recv(1000) == last_words(ProtocolError("no"))
        assert ours.fileno() >= 0


def test_some_descriptors_are_for_the_daemon_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in [(20_000, 20_000 - RESERVED_FILES), (100, 50), (resource.RLIM_INFINITY, sys.maxsize)]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert files_max() == most
