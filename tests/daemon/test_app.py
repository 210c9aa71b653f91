"""The whole daemon in a process of its own: starting, stopping, being killed, coming back, refusing to start."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachesvc.arena.host import HostArena
from cachesvc.arena.preflight import filesystem
from cachesvc.config import load
from cachesvc.daemon import app
from cachesvc.daemon.app import allow_descriptors, make_node
from cachesvc.types import AllocateState, KeyState
from cachesvc.wire.messages import Allocate, Allocated, Ask, Looked, Lookup, Report, Seal, Sealed, pack_keys
from tests.support.daemon import HANG_S, MIB, Daemon, Wire, connect, shared_directory, wait_for

KEYS = pack_keys(0, [b"a", b"b", b"c"])


@pytest.fixture
def arena() -> Iterator[Path]:
    with shared_directory() as path:
        yield path


@pytest.fixture
def daemon(tmp_path: Path, arena: Path) -> Iterator[Daemon]:
    """Not started yet."""
    daemon = Daemon(tmp_path, arena)
    try:
        yield daemon
    finally:
        daemon.close()


def status(daemon: Daemon) -> dict[str, Any]:
    with Wire(daemon.admin_socket) as wire:
        report = wire.call(Ask(1, "status"))
        assert isinstance(report, Report)
        body: dict[str, Any] = json.loads(report.body)
        return body


def store(wire: Wire) -> None:
    allocated = wire.call(Allocate(2, 1, KEYS))
    assert isinstance(allocated, Allocated)
    assert allocated.states == bytes([AllocateState.NEW] * 3)
    assert wire.call(Seal(3, 1, [1, 2, 3])) == Sealed(3, True)


def states(wire: Wire) -> list[KeyState]:
    looked = wire.call(Lookup(4, KEYS))
    assert isinstance(looked, Looked)
    return [KeyState(state) for state in looked.states]


# --- life -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_leaves_no_socket(daemon: Daemon, number: int) -> None:
    daemon.start()
    with Wire(daemon.socket()) as wire:
        wire.hello()
        assert daemon.stop(number) == 0
        assert wire.reply() is None
    assert not daemon.socket().exists()
    assert not daemon.admin_socket.exists()
    assert daemon.log.count(" ready: ") == 1
    assert daemon.log.splitlines()[-1].endswith(": stopped")
    assert "Traceback" not in daemon.log


def test_the_effective_config_is_printed_once(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.log.count("ram_bytes: 64MiB") == 1
    assert daemon.log.count("extent_bytes: 16MiB") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_every_sealed_chunk_comes_back(daemon: Daemon, number: int) -> None:
    daemon.start()
    with Wire(daemon.socket()) as wire:
        arena = wire.hello(label="kept").arena
        store(wire)
        unfinished = wire.call(Allocate(5, 2, pack_keys(0, [b"unfinished"])))
        assert isinstance(unfinished, Allocated)
        daemon.stop(number)
    daemon.start()
    with Wire(daemon.socket()) as wire:
        assert wire.hello().arena == arena
        assert states(wire) == [KeyState.RAM] * 3
        looked = wire.call(Lookup(6, pack_keys(0, [b"unfinished"])))
        assert isinstance(looked, Looked)
        assert looked.states == bytes([KeyState.NEVER_STORED])
    assert status(daemon)["restart"] == {"chunks_restored": 3, "orphans": 1, "grace": True}


def test_without_its_namespaces_it_starts_all_the_same(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with Wire(daemon.socket()) as wire:
        wire.hello()
        store(wire)
    daemon.stop()
    (tmp_path / "state" / "namespaces.json").write_text("{")
    daemon.start()
    assert "namespaces.json can't be read" in daemon.log
    with Wire(daemon.socket()) as wire:
        wire.hello()
        assert states(wire) == [KeyState.NAMESPACE_NEW] * 3
        store(wire)


def test_a_table_of_another_boot_is_a_cold_start(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with Wire(daemon.socket()) as wire:
        arena = wire.hello().arena
        store(wire)
    daemon.stop()
    identity = tmp_path / "state" / "arena.json"
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"boot": "00" * 16}))
    daemon.start()
    assert "cold start: " in daemon.log
    with Wire(daemon.socket()) as wire:
        assert wire.hello().arena != arena
        assert states(wire) == [KeyState.NAMESPACE_NEW] * 3


def test_a_stale_socket_and_a_killed_daemons_arena(daemon: Daemon) -> None:
    daemon.start()
    daemon.stop(signal.SIGKILL)
    assert stat.S_ISSOCK(daemon.socket().stat().st_mode)
    with pytest.raises(ConnectionRefusedError):
        connect(daemon.socket())
    daemon.start()
    connect(daemon.socket()).close()


def test_two_tenants_have_a_socket_each(tmp_path: Path, arena: Path) -> None:
    tenants = [{"name": "one"}, {"name": "two", "group": os.getgid(), "min_bytes": "16MiB"}]
    with Daemon(tmp_path, arena, tenants=tenants) as daemon, Wire(daemon.socket("one")) as one:
        one.hello()
        store(one)
        with Wire(daemon.socket("two")) as two:
            two.hello()
            assert states(two) == [KeyState.NAMESPACE_NEW] * 3
        assert states(one) == [KeyState.RAM] * 3


def test_socket_flag(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start("--socket", str(tmp_path / "elsewhere.sock"))
    connect(tmp_path / "elsewhere.sock").close()
    assert not daemon.socket().exists()


# --- HTTP is not needed ---------------------------------------------------------------------------------------------


def test_a_taken_port_does_not_stop_the_data_path(tmp_path: Path, arena: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Daemon(tmp_path, arena, http={"address": address}) as daemon:
            wait_for(lambda: f"no HTTP on {address}: Address already in use" in daemon.log)
            with Wire(daemon.socket()) as wire:
                wire.hello()
            assert daemon.stop() == 0


def test_an_admin_that_fails_does_not_stop_the_data_path(caplog: pytest.LogCaptureFixture) -> None:
    def admin(*_: object) -> None:
        raise ImportError("no module named fastapi")

    http = load(None, {"run_dir": "/x", "root": "/y"}).http
    with app.admin_thread(admin, None, http):  # type: ignore[arg-type]
        pass
    assert "HTTP has ended" in caplog.text


# --- what can't be started ------------------------------------------------------------------------------------------


def refused(daemon: Daemon) -> str:
    """The one line that a start ends with."""
    assert daemon.launch().wait(HANG_S) == 2
    lines = [line for line in daemon.log.splitlines() if line.startswith("cachesvc: ")]
    assert lines == daemon.log.splitlines()[-1:]
    return lines[0]


def test_a_second_daemon_on_the_same_state_dir(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    (tmp_path / "second").mkdir()
    second = Daemon(tmp_path / "second", tmp_path / "second" / "arena", state_dir=daemon.settings["state_dir"])
    assert "is in use by another cachesvc daemon" in refused(second)
    with Wire(daemon.socket()) as wire:
        wire.hello()


def test_another_daemon_on_the_socket(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with shared_directory() as arena:
        (tmp_path / "second").mkdir()
        second = Daemon(tmp_path / "second", arena, run_dir=daemon.settings["run_dir"])
        assert f"another daemon listens on {daemon.socket()}" in refused(second)
    with Wire(daemon.socket()) as wire:
        wire.hello()


def test_an_arena_that_others_may_write(daemon: Daemon, arena: Path) -> None:
    arena.chmod(0o777)
    assert "is open to other users" in refused(daemon)


def test_an_arena_on_a_disk(daemon: Daemon, tmp_path: Path) -> None:
    if filesystem(tmp_path) in (None, "tmpfs"):
        pytest.skip("temporary files lie in memory here")
    daemon.settings["arena_dir"] = str(tmp_path / "arena")
    line = refused(daemon)
    assert f"arena_dir {tmp_path / 'arena'} lies on {filesystem(tmp_path)}, not in memory" in line


def test_shares_that_do_not_fit_the_extents_that_are_there(daemon: Daemon) -> None:
    daemon.settings |= {"ram_bytes": "256MiB", "extent_bytes": "64MiB"}
    daemon.start()
    daemon.stop()
    del daemon.settings["extent_bytes"]
    daemon.settings["tenants"] = [{"name": name, "min_bytes": "80MiB"} for name in "abc"]
    assert "the arena was made with extents of 64MiB" in refused(daemon)
    daemon.settings["extent_bytes"] = "16MiB"
    daemon.start()


def test_namespaces_that_no_daemon_writes(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    daemon.stop()
    record = {"tenant": "default", "namespace": "00" * 16, "label": "x", "components": {}, "chunk_bytes": [0]}
    (tmp_path / "state" / "namespaces.json").write_text(json.dumps({"format": 1, "namespaces": [record]}))
    daemon.start()
    assert "namespaces.json can't be read: " in daemon.log
    assert "its chunks are dropped" in daemon.log


def test_a_run_dir_that_is_a_file(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert "can't listen on" in refused(daemon)


def test_more_memory_than_there_is(daemon: Daemon) -> None:
    daemon.settings["ram_bytes"] = "1024TiB"
    daemon.settings["extent_bytes"] = "1GiB"
    line = refused(daemon)
    assert "doesn't fit" in line
    assert "set ram_bytes to " in line


def test_an_unknown_key(daemon: Daemon) -> None:
    daemon.settings["ram_byts"] = "1GiB"
    line = refused(daemon)
    assert "'ram_byts'" in line
    assert "ram_bytes" in line


# --- parts ----------------------------------------------------------------------------------------------------------


def test_the_core_gets_the_settings_of_the_config(tmp_path: Path, arena: Path) -> None:
    flags = {"run_dir": str(tmp_path), "root": str(tmp_path), "ram_bytes": "40MiB", "extent_bytes": "16MiB"}
    config = load(None, flags)
    host = HostArena(arena, tmp_path / "state", config.ram_bytes, config.extent_bytes)
    try:
        settings = make_node(config, host).settings
    finally:
        host.close()
    assert (settings.extent_bytes, settings.extents_max) == (16 * MIB, 2)
    assert [tenant.name for tenant in settings.tenants] == ["default"]
    assert (settings.eviction, settings.quarantine_s, settings.restart_grace_s) == ("arc", 600, 5)


@pytest.mark.parametrize(
    ("limits", "extents", "set_to", "warned"),
    [
        ((1024, 1 << 20), 100, 1024 + 4096 + 200 + 256, False),
        ((1024, 2048), 100, 2048, True),
        ((1 << 19, 1 << 20), 100, None, False),
        ((1024, resource.RLIM_INFINITY), 0, 1024 + 4096 + 256, False),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 0, None, False),
    ],
)
def test_the_limit_on_open_files_is_raised_as_far_as_needed(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limits: tuple[int, int],
    extents: int,
    set_to: int | None,
    warned: bool,
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: raised.append(both))
    allow_descriptors(extents)
    assert raised == ([] if set_to is None else [(set_to, limits[1])])
    assert bool(caplog.records) == warned


def test_nothing_heavy_is_imported_before_the_sockets_are_open() -> None:
    code = "import sys; import cachesvc.cli, cachesvc.daemon.app; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"fastapi", "uvicorn", "starlette", "pydantic", "prometheus_client", "rich"}
    assert heavy & set(run.stdout.split()) == set()
