"""Peers that aren't there, where LMCache is looked for, and (where they are installed) that they answer."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from bench import peers


def test_where_lmcache_is() -> None:
    assert peers.lmcache_environment({"CACHESVC_BENCH_LMCACHE": "/a", "HOME": "/b"}) == Path("/a")
    assert peers.lmcache_environment({"XDG_CACHE_HOME": "/c", "HOME": "/b"}) == Path("/c/cachesvc/bench-lmcache")
    assert peers.lmcache_environment({"HOME": "/b"}) == Path("/b/.cache/cachesvc/bench-lmcache")


def test_absent_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CACHESVC_BENCH_LMCACHE", str(tmp_path))
    with pytest.raises(peers.AbsentError, match="make bench-env-lmcache"):
        peers.LmcacheServer(1 << 30)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(peers.AbsentError, match="apt-get install redis-server"):
        peers.RedisServer(1 << 30)


def test_a_server_that_ends_says_why() -> None:
    with closing(peers.Server(["sh", "-c", "echo broken >&2"])) as server:
        server.process.wait()
        with pytest.raises(RuntimeError, match="broken"):
            server.check()
    assert not server.home.exists()


@pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server")
def test_redis_answers() -> None:
    pytest.importorskip("hiredis")
    with closing(peers.RedisServer(64 << 20)) as server:
        client = peers.connect(server.address)
        value = bytes(range(256)) * 4096
        assert client.set(b"key", memoryview(value))
        assert client.get(b"key") == value
        assert client.exists(b"key", b"other") == 1
        client.close()


@pytest.mark.slow
@pytest.mark.skipif(not peers.lmcache_environment().joinpath("bin/python").exists(), reason="no LMCache environment")
def test_lmcache_stores_and_retrieves() -> None:
    with (
        closing(peers.LmcacheServer(1 << 30)) as server,
        closing(peers.LmcacheClient(server, 1 << 20, 4, 16 << 20, 1)) as client,
    ):
        stored = client.ask("store", 4)
        retrieved = client.ask("retrieve", 4)
    assert stored["lost"] == 0
    assert retrieved["count"] == 4
    assert stored["seconds"] > 0
    assert retrieved["seconds"] > 0
    assert not list(Path("/dev/shm").glob(f"*{server.shm_name}*"))


def test_lmcache_has_whole_layers_only() -> None:
    with pytest.raises(peers.AbsentError, match="whole layers"):
        peers.LmcacheClient.check_size(64 << 10)
    peers.LmcacheClient.check_size(2 << 20)
