"""The demo's own daemon: started, killed, started again; nothing of it stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachesvc import Client
from cachesvc.demo import daemon as demo
from cachesvc.demo.daemon import Counters, Daemon
from cachesvc.errors import OperatorError

MIB = 1 << 20
CHUNK_BYTES = 64 << 10


def arenas() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("cachesvc-demo-")}


def test_counters_and_a_kill() -> None:
    before = arenas()
    with Daemon(64 * MIB) as daemon:
        with Client(str(daemon.socket), namespace="n", chunk_bytes=CHUNK_BYTES) as client:
            assert client.wait_ready(30)
            assert client.put(b"a", b"x" * 100)
            assert client.put(b"b", b"y" * 100)
            assert client.get_into(b"a", bytearray(CHUNK_BYTES))
            assert not client.get_into(b"c", bytearray(CHUNK_BYTES))
            seen = daemon.counters()
            assert (seen.chunks, seen.loads, seen.sharing, seen.namespaces, seen.restored) == (2, 1, 1, 1, 0)
            assert seen.why == "1 never_stored"
        daemon.kill()
        with pytest.raises(OperatorError, match="no daemon listens"):
            daemon.counters()
        daemon.start()
        again = daemon.counters()
        assert (again.chunks, again.restored, again.why) == (2, 2, "no misses")
        assert arenas() > before
    assert arenas() == before


def test_too_much_memory_is_one_line() -> None:
    before = arenas()
    with pytest.raises(OperatorError, match=r"(?s)didn't start: cachesvc: .*memory") as refused:
        Daemon(1 << 50)
    assert "\n" not in str(refused.value)
    assert arenas() == before


def test_no_tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TMPFS", tmp_path / "nothing")
    with pytest.raises(OperatorError, match="nothing: No such file"):
        Daemon(64 * MIB)


def test_a_daemon_that_was_killed_is_cleaned_up_after() -> None:
    before = arenas()
    with Daemon(64 * MIB) as daemon:
        daemon.kill()
    assert arenas() == before


def test_counters_without_clients() -> None:
    with Daemon(64 * MIB) as daemon:
        assert daemon.counters() == Counters(0, 0, 0, daemon.counters().misses, 0, 0, 0, 0)
