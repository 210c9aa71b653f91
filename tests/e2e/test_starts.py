"""What stops a start, and what a start throws away: one line that says what to do, exit code 2 where it can't go on.

More of it, without clients, in `tests/daemon/test_app.py`.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachesvc.arena.layout import LAYOUT_VERSION, TABLE_HEADER_BYTES
from tests.support.clients import Clients, names
from tests.support.daemon import HANG_S, MIB, Daemon, small_mount, wait_for

pytestmark = pytest.mark.slow


def one_line(process: subprocess.Popen[bytes], daemon: Daemon) -> str:
    """The line that a refused start ends with."""
    assert process.wait(HANG_S) == 2, daemon.log
    lines = [line for line in daemon.log.splitlines() if line.startswith("cachesvc: ")]
    assert lines == daemon.log.splitlines()[-1:]
    return lines[0]


@pytest.mark.root
def test_not_enough_tmpfs(tmp_path: Path) -> None:
    """Refused, and started with what the line says."""
    with small_mount(8 * MIB) as mount:
        settings = {"ram_bytes": "64MiB", "extent_bytes": "1MiB"}
        with pytest.raises(AssertionError), Daemon(tmp_path, mount / "arena", **settings):
            pass
        daemon = Daemon(tmp_path, mount / "arena", **settings)
        line = one_line(daemon.launch(), daemon)
        assert f"free in the mount of {mount / 'arena'}" in line
        assert "remount it with a larger size=" in line
        said = line.partition("set ram_bytes to ")[2].partition(" or less")[0]
        with Daemon(tmp_path, mount / "arena", **(settings | {"ram_bytes": said})) as daemon, Clients() as clients:
            client = clients.open(daemon.socket())
            for number in range(50):
                client.do("write", keys=names(f"k-{number}", range(4)))
            assert daemon.evictions() > 0
            assert daemon.status()["daemon"]["problems"] == {}


@pytest.mark.root
def test_not_enough_memory_in_the_cgroup(daemon: Daemon, tmp_path: Path) -> None:
    """A limit below arena + 1 GiB, shown to the daemon by files mounted over the kernel's."""
    shown = tmp_path / "cgroup"
    (shown / "memory").mkdir(parents=True)
    (shown / "memory" / "memory.limit_in_bytes").write_text(f"{1 << 30}\n")
    (shown / "memory.max").write_text(f"{1 << 30}\n")
    config = tmp_path / "config.yaml"
    process = daemon.launch("--ram", "1TiB")  # writes the config; refused for another reason
    process.wait(HANG_S)
    serve = f"exec {sys.executable} -m cachesvc serve --config {config}"
    with daemon.log_path.open("wb") as log:
        command = ["unshare", "--mount", "sh", "-c", f"mount --bind {shown} /sys/fs/cgroup && {serve}"]
        daemon.process = subprocess.Popen(command, stdout=log, stderr=log)
    line = one_line(daemon.process, daemon)
    assert "memory limit of the cgroup 1.00 GiB" in line
    assert "raise the cgroup's limit to 1.01 GiB" in line


@pytest.mark.root
def test_directories_of_somebody_else(daemon: Daemon, arena: Path) -> None:
    os.chown(arena, 54321, 54321)
    line = one_line(daemon.launch(), daemon)
    assert f"arena_dir {arena} belongs to uid 54321" in line
    assert "give it a directory of its own" in line


def test_a_table_of_another_version(daemon: Daemon, clients: Clients, arena: Path) -> None:
    """Its extent is dropped, with one line that says why; the rest comes back, and clients go on."""
    daemon.start()
    client = clients.open(daemon.socket())
    keys = names("k", range(60))
    for at in range(0, 60, 4):
        wait_for(lambda: client.do("write", keys=keys[at : at + 4]))  # noqa: B023 - called at once
    daemon.stop()
    tables = sorted(arena.glob("extent-*.table"))
    assert len(tables) > 1
    with tables[0].open("r+b") as table:
        assert len(table.read(TABLE_HEADER_BYTES)) == TABLE_HEADER_BYTES
        table.seek(8)
        table.write(struct.pack("<I", LAYOUT_VERSION + 1))
    daemon.start()
    dropped = [line for line in daemon.log.splitlines() if " dropped: " in line]
    assert len(dropped) == 1
    assert f"version is {LAYOUT_VERSION + 1}, this daemon reads {LAYOUT_VERSION}" in dropped[0]
    client.do("until_up")
    states = client.do("states", keys=keys)
    assert 0 < states.count("RAM") < 60
    assert [client.do("get", key=key) == "right" for key in keys] == [state == "RAM" for state in states]


def test_an_arena_of_another_boot_under_clients(daemon: Daemon, clients: Clients, tmp_path: Path) -> None:
    """Another arena: what clients have open is lost, and they know; then they go on."""
    daemon.start()
    client = clients.open(daemon.socket())
    keys = names("k", range(4))
    assert client.do("write", keys=keys) == keys
    assert client.do("begin_read", name="r", keys=keys) == 4
    assert client.do("begin_write", name="w", keys=["open"])["new"] == ["open"]
    daemon.stop()
    (tmp_path / "state" / "arena.json").unlink()
    daemon.start()
    assert daemon.log.count("cold start: there is no ") == 1
    client.do("until_up")
    assert client.do("check", name="r", keys=keys)["valid"] is False
    client.do("fill", name="w")
    assert client.do("end_write", name="w") is False
    client.do("end_read", name="r")
    assert client.do("states", keys=keys) == ["NAMESPACE_NEW"] * 4
    assert client.do("write", keys=keys) == keys
    assert client.do("read", keys=keys) == 4
    wait_for(lambda: client.do("status")["extents_mapped"] == 1)


@pytest.mark.root
@pytest.mark.parametrize("lost", ["extent_bytes", "state"])
def test_a_cold_start_under_clients_that_map_most_of_the_mount(tmp_path: Path, lost: str) -> None:
    """What they map comes back when they hear from the new daemon, so it must start; it grows as they let go."""
    with small_mount(20 * MIB) as mount, Clients() as clients:
        daemon = Daemon(tmp_path, mount / "arena", ram_bytes="12MiB", extent_bytes="1MiB")
        with daemon:
            client = clients.open(daemon.socket())

            def full() -> bool:
                client.do("write", keys=names(f"k-{time.monotonic_ns()}", range(8)))
                return bool(daemon.slab()["slots"] == 192)

            wait_for(full)
            wait_for(lambda: client.do("status")["extents_mapped"] == 12)
            daemon.stop()
            if lost == "state":
                (tmp_path / "state" / "arena.json").unlink()
            else:
                daemon.settings["extent_bytes"] = "512KiB"
            daemon.start()
            assert daemon.log.count("cold start: ") == 1
            client.do("until_up")
            wait_for(full)
            assert client.do("write", keys=names("new", range(8))) == names("new", range(8))


def test_a_smaller_arena_after_a_restart(daemon: Daemon, clients: Clients) -> None:
    """The coldest extents go once the grace time is over; what stays is right, and clients go on."""
    daemon.settings |= {"restart_grace_s": 0.5}
    daemon.start()
    client = clients.open(daemon.socket())
    keys = names("k", range(120))
    for at in range(0, 120, 4):
        client.do("write", keys=keys[at : at + 4])
    assert client.do("lookup", keys=keys) == 120
    daemon.stop()
    daemon.settings["ram_bytes"] = "4MiB"
    daemon.start()
    client.do("until_up")
    assert client.do("read", keys=keys) == 120
    wait_for(lambda: daemon.slab()["slots"] == 64)
    wait_for(lambda: daemon.status()["arena"]["extents"]["retiring"] == 0)
    states = client.do("states", keys=keys)
    assert 48 <= states.count("RAM") <= 64
    assert [client.do("get", key=key) == "right" for key in keys] == [state == "RAM" for state in states]
    assert client.do("write", keys=names("new", range(8))) == names("new", range(8))


def test_a_tenant_that_is_not_configured_any_more(daemon: Daemon, clients: Clients) -> None:
    """Its memory goes to the others; its clients find no socket, and that is a miss."""
    daemon.settings["tenants"] = [{"name": "stays"}, {"name": "goes"}]
    daemon.start()
    stays, goes = clients.open(daemon.socket("stays")), clients.open(daemon.socket("goes"))
    keys = names("k", range(4))
    for client in stays, goes:
        assert client.do("write", keys=keys) == keys
    daemon.stop()
    daemon.settings["tenants"] = [{"name": "stays"}]
    daemon.start()
    stays.do("until_up")
    assert stays.do("read", keys=keys) == 4
    assert goes.do("lookup", keys=keys) == 0
    assert goes.do("misses") == {"DAEMON_DOWN": 4}
    wait_for(lambda: daemon.status()["arena"]["extents"]["retiring"] == 0)


def test_a_second_daemon_harms_nothing(daemon: Daemon, clients: Clients, tmp_path: Path) -> None:
    """On the same directories, while the first one serves."""
    daemon.start()
    client = clients.open(daemon.socket())
    client.do("begin_load", threads=2, prefix="x")
    (tmp_path / "second").mkdir()
    second = Daemon(tmp_path / "second", Path(daemon.settings["arena_dir"]))
    second.settings = {**daemon.settings, "run_dir": str(tmp_path / "second" / "run")}
    for what in "state_dir", "arena_dir":
        line = one_line(second.launch(), second)
        assert f"{what} {daemon.settings[what]} is in use by another cachesvc daemon: stop that one" in line
        second.settings["state_dir"] = str(tmp_path / "second" / "state")
    figures = client.do("end_load")
    assert figures["wrong"] == []
    assert figures["acked"] > 0
    assert daemon.status()["daemon"]["problems"] == {}
