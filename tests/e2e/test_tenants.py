"""Clients that mean harm: what one may write is its own tenant's data, and nothing else changes for anybody."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachesvc.types import KeyState, slot_bytes_for, user_namespace
from cachesvc.wire.messages import (
    Abort,
    Ask,
    OpenLease,
    OpenWrite,
    Refused,
    Release,
    Report,
    Slots,
    Unmapped,
    pack_keys,
)
from tests.support.clients import CHUNK_BYTES, ROOT, ClientProcess, Clients, names
from tests.support.daemon import Daemon, DescriptorsWire, Wire, wait_for
from tests.support.evil import Stolen, evil, states, steal, store

pytestmark = pytest.mark.slow

KEYS = names("secret", range(8))
OTHER_UID = 54321


@pytest.fixture
def daemon(daemon: Daemon) -> Daemon:
    """Of two tenants; the sockets of `evil` are open to a group."""
    daemon.settings["tenants"] = [
        {"name": "good", "min_bytes": "2MiB", "max_bytes": "4MiB"},
        {"name": "evil", "min_bytes": "2MiB", "max_bytes": "4MiB", "group": OTHER_UID},
    ]
    daemon.settings |= {"restart_grace_s": 0.2, "quarantine_s": 1}
    daemon.start()
    return daemon


@pytest.fixture
def good(daemon: Daemon, clients: Clients) -> ClientProcess:
    """A client of the other tenant, with chunks to lose."""
    client = clients.open(daemon.socket("good"))
    assert client.do("write", keys=KEYS) == KEYS
    return client


def unharmed(daemon: Daemon, good: ClientProcess) -> None:
    """The daemon lives, the other tenant has its bytes and can go on."""
    assert daemon.process is not None
    assert daemon.process.poll() is None
    assert good.do("read", keys=KEYS) == len(KEYS)
    more = names(f"more-{time.monotonic_ns()}", range(4))
    assert good.do("write", keys=more) == more
    assert good.do("read", keys=more) == 4
    assert "Traceback" not in daemon.log


# --- two tenants ------------------------------------------------------------------------------------------------------


def test_two_tenants_see_nothing_of_each_other(daemon: Daemon, good: ClientProcess, clients: Clients) -> None:
    """The same namespace, the same keys: other chunks."""
    other = clients.open(daemon.socket("evil"))
    assert other.do("lookup", keys=KEYS) == 0
    assert other.do("states", keys=KEYS) == ["NAMESPACE_NEW"] * 8
    assert other.do("get", key=KEYS[0]) is None
    assert other.do("write", keys=KEYS, seed=666) == KEYS
    assert other.do("read", keys=KEYS) == 8
    unharmed(daemon, good)
    status = daemon.status("evil")
    assert status["tenants"].keys() == {"evil"}
    assert "arena" not in status
    assert "daemon" not in status


def test_extents_of_another_tenant_are_never_offered(daemon: Daemon, good: ClientProcess) -> None:
    """By any slot size, by any number, whatever is said to be held or given up."""
    with DescriptorsWire(daemon.socket("good")) as descriptors:
        descriptors.attach()
        theirs = steal(descriptors, [slot_bytes_for(CHUNK_BYTES)])
        theirs.close()
    assert theirs.extents
    with evil(daemon.socket("evil")) as (control, descriptors):
        assert store(control, [b"own"], 1)
        for sizes in ([CHUNK_BYTES], list(range(4096, 1 << 20, 4096)), []):
            for held in ([], theirs.extents, list(range(1, 200))):
                stolen = steal(descriptors, sizes, held)
                stolen.close()
                assert len(stolen.extents) == (1 if sizes else 0)
                assert not set(stolen.extents) & set(theirs.extents)
        descriptors.send(Unmapped(theirs.extents))
        steal(descriptors, [CHUNK_BYTES]).close()
        report = control.call(Ask(5, "namespaces"))
        assert isinstance(report, Report)
        # our own declaration, not that of the other tenant, whose client says more of itself
        assert [record["label"] for record in json.loads(report.body)["namespaces"]] == ["test"]
    unharmed(daemon, good)


def test_tickets_of_another_tenant_can_not_be_claimed(daemon: Daemon, good: ClientProcess) -> None:
    """Not while they are open, and not when a restarted daemon waits for somebody to name them."""
    fresh = names("fresh", range(4))
    assert good.do("begin_read", name="r", keys=KEYS) == 8
    assert good.do("begin_write", name="w", keys=fresh)["new"] == fresh
    with DescriptorsWire(daemon.socket("good")) as descriptors:
        descriptors.attach()
        theirs = steal(descriptors, [CHUNK_BYTES])
        theirs.close()
    places = [(extent, slot, generation) for extent in theirs.extents for slot in range(16) for generation in range(3)]
    slots = Slots(*map(list, zip(*places, strict=True)))
    one_by_one = [Slots([extent], [slot], [generation]) for extent, slot, generation in places]
    claims = [OpenWrite(1000 + n, pack_keys(0, [b"x"]), place) for n, place in enumerate(one_by_one)]
    leases = [OpenLease(5000 + n, place) for n, place in enumerate([*one_by_one, slots])]
    for restart in (False, True):
        if restart:
            daemon.stop(signal.SIGKILL)
            daemon.settings |= {"restart_grace_s": 30, "quarantine_s": 30}
            daemon.start()
        with Wire(daemon.socket("evil")) as control:
            welcome = control.hello(
                namespace=user_namespace("e2e"), chunk_bytes=[CHUNK_BYTES], writes=claims, leases=leases
            )
            assert (welcome.writes_kept, welcome.leases_kept) == ([], [])
            control.send(Abort(list(range(1, 100))), Release(list(range(1, 100))))
            assert states(control, KEYS) == [KeyState.NAMESPACE_NEW] * 8
        good.do("until_up")
        assert good.do("check", name="r", keys=KEYS) == {"faults": [], "valid": True}
    good.do("fill", name="w")
    assert good.do("end_write", name="w")
    assert good.do("read", keys=fresh) == 4


def test_one_tenant_can_not_push_out_another(daemon: Daemon, good: ClientProcess, clients: Clients) -> None:
    """Extents are shared out by tenant: filling one's own share over and over evicts nothing of the other's."""
    other = clients.open(daemon.socket("evil"))
    for number in range(100):
        other.do("write", keys=names(f"flood-{number}", range(8)))
    assert daemon.evictions("evil") > 100
    assert daemon.evictions("good") == 0
    unharmed(daemon, good)


def contents(stolen: Stolen) -> bytes:
    """Everything that lies in the data that a client has descriptors of."""
    return b"".join(os.pread(descriptor, os.fstat(descriptor).st_size, 0) for descriptor in stolen.data)


def test_bytes_never_move_to_another_tenant(tmp_path: Path, arena: Path, clients: Clients) -> None:
    """One tenant had the whole arena; then the other gets its share. The first lies about having unmapped it, and keeps
    the descriptors: neither ever sees a byte of the other."""
    home = tmp_path / "own"
    home.mkdir()
    tenants = [{"name": "good"}, {"name": "evil"}]
    daemon = Daemon(home, arena / "own", ram_bytes="8MiB", extent_bytes="1MiB", tenants=tenants)
    with daemon, evil(daemon.socket("evil")) as (control, descriptors):
        for number in range(1, 100):
            wait_for(lambda: store(control, [b"own-%d" % number], number))  # noqa: B023 - called at once
        stolen = steal(descriptors, [CHUNK_BYTES])
        assert len(stolen.data) > 6
        for descriptor in stolen.data:
            os.pwrite(descriptor, b"EVIL" * (stolen.extent_bytes // 4), 0)
        client = clients.open(daemon.socket("good"), ready_s=0)

        def has_most_of_it() -> bool:
            client.do("write", keys=names(f"secret-{time.monotonic_ns()}", range(4)))
            descriptors.send(Unmapped(stolen.extents))
            [slab] = daemon.tenant("good")["classes"]
            return bool(slab["extents"] > 3)

        wait_for(has_most_of_it)
        more = steal(descriptors, [CHUNK_BYTES])
        with DescriptorsWire(daemon.socket("good")) as others:
            others.attach()
            theirs = steal(others, [CHUNK_BYTES])
        assert b"EVIL" not in contents(theirs)
        secret = os.pread(theirs.data[0], 4096, 0)
        assert secret.strip(b"\0")
        assert secret not in contents(stolen) + contents(more)
        for each in stolen, more, theirs:
            each.close()


# --- memory that goes from one tenant to another ----------------------------------------------------------------------


@pytest.fixture
def shared(daemon: Daemon) -> Daemon:
    """Of two tenants to whom nothing is guaranteed."""
    daemon.stop()
    daemon.settings["tenants"] = [{"name": "first"}, {"name": "second"}]
    daemon.start()
    return daemon


def slots(daemon: Daemon, tenant: str) -> int:
    return sum(slab["slots"] for slab in daemon.tenant(tenant)["classes"])


def fill(client: ClientProcess, daemon: Daemon, tenant: str, at_least: int) -> None:
    """Store until the tenant has so many slots."""

    def enough() -> bool:
        client.do("write", keys=names(f"fill-{time.monotonic_ns()}", range(8)))
        return slots(daemon, tenant) >= at_least

    wait_for(enough)


def going(daemon: Daemon) -> int:
    """Extents that were taken from a tenant whose clients map them still."""
    return int(daemon.status()["arena"]["extents"]["retiring"])


def test_a_client_that_closed_gives_back_what_it_mapped(shared: Daemon, clients: Clients) -> None:
    """Its process lives on; the arena isn't lost to both tenants."""
    first = clients.open(shared.socket("first"))
    fill(first, shared, "first", 128)
    first.do("close")
    second = clients.open(shared.socket("second"), ready_s=0)
    fill(second, shared, "second", 128)
    assert going(shared) == 0
    assert first.process.poll() is None


def test_a_stopped_process_costs_one_extent(shared: Daemon, clients: Clients) -> None:
    """It can't say that it has unmapped what was taken: no more is taken of what it maps. It dies, and all goes on."""
    first = clients.open(shared.socket("first"))
    fill(first, shared, "first", 128)
    wait_for(lambda: first.do("status")["extents_mapped"] == 8)
    first.stop()
    with Wire(shared.socket("second")) as second:
        second.hello(chunk_bytes=[CHUNK_BYTES])
        wait_for(lambda: going(shared) == 1)
        for number in range(1, 60):
            store(second, [b"own-%d" % number], number)
            time.sleep(0.2)
            assert going(shared) + slots(shared, "first") // 16 >= 8
        first.kill()
        wait_for(lambda: store(second, [b"now"], time.monotonic_ns()))
    other = clients.open(shared.socket("second"))
    fill(other, shared, "second", 112)


def test_memory_does_not_go_to_and_fro_between_tenants(shared: Daemon, clients: Clients) -> None:
    """One has filled the arena and is idle, the other stores: it gets extent by extent, each moves once."""
    first = clients.open(shared.socket("first"))
    fill(first, shared, "first", 128)
    made = json.loads((shared.home / "state" / "arena.json").read_text())["next_extent"]
    second = clients.open(shared.socket("second"), ready_s=0)
    fill(second, shared, "second", 64)
    for _ in range(100):
        second.do("write", keys=names(f"on-{time.monotonic_ns()}", range(8)))
    moved = slots(shared, "second") // 16
    assert 4 <= moved <= 7
    # each is made and then formatted, both under numbers of their own; one may be on its way
    assert json.loads((shared.home / "state" / "arena.json").read_text())["next_extent"] - made <= 2 * moved + 2


def test_a_tenant_that_truncates_all_it_gets_takes_no_more(shared: Daemon, clients: Clients) -> None:
    first = clients.open(shared.socket("first"))
    fill(first, shared, "first", 128)
    with evil(shared.socket("second")) as (control, descriptors):
        held: list[int] = []
        stolen: list[Stolen] = []
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            store(control, [b"%d" % time.monotonic_ns()], time.monotonic_ns())
            stolen.append(steal(descriptors, [CHUNK_BYTES], held))
            held += stolen[-1].extents
            for descriptor in stolen[-1].data:
                os.ftruncate(descriptor, 0)
            time.sleep(0.1)
        assert len(set(held)) == 1
        assert slots(shared, "first") >= 7 * 16
        for each in stolen:
            each.close()
    assert first.do("write", keys=KEYS) == KEYS


# --- scribbling -------------------------------------------------------------------------------------------------------


def test_scribbling_over_everything_that_it_may_write(daemon: Daemon, good: ClientProcess, clients: Clients) -> None:
    """Own bytes change; the daemon doesn't notice, nor does the other tenant, nor does a restart."""
    with evil(daemon.socket("evil")) as (control, descriptors):
        assert store(control, [b"own"], 1)
        stolen = steal(descriptors, [CHUNK_BYTES])
        for descriptor in stolen.data:
            with mmap.mmap(descriptor, stolen.extent_bytes) as memory:
                memory[:] = b"\xff" * len(memory)
            os.pwrite(descriptor, os.urandom(4096), 12345)
        unharmed(daemon, good)
        assert states(control, ["own"]) == [KeyState.RAM]
        stolen.close()
    daemon.stop(signal.SIGKILL)
    daemon.start()
    good.do("until_up")
    unharmed(daemon, good)
    assert daemon.status()["daemon"]["problems"] == {}


HARM: dict[str, Callable[[int], list[int]]] = {
    "truncated to nothing": lambda size: [0],
    "one byte short": lambda size: [size - 1],
    "grown": lambda size: [size + 1],
    "cut and grown again": lambda size: [0, size],
}
"""The sizes that the data file is given, one after another."""


@pytest.mark.parametrize("harm", HARM)
def test_a_client_truncates_its_data(daemon: Daemon, good: ClientProcess, harm: str) -> None:
    """The extent is dropped, its memory comes back, and the tenant itself can go on as well."""
    with evil(daemon.socket("evil")) as (control, descriptors):
        assert store(control, [b"own"], 1)
        stolen = steal(descriptors, [CHUNK_BYTES])
        for descriptor in stolen.data:
            for size in HARM[harm](stolen.extent_bytes):
                os.ftruncate(descriptor, size)
        unharmed(daemon, good)
        wait_for(lambda: daemon.status()["daemon"]["problems"].get("damaged") == len(stolen.data))
        wait_for(lambda: states(control, ["own"]) != [KeyState.RAM])
        unharmed(daemon, good)
        stolen.close()
        descriptors.send(Unmapped(stolen.extents))
        wait_for(lambda: daemon.status()["arena"]["extents"]["retiring"] == 0)
        wait_for(lambda: daemon.tenant("evil")["classes"][0]["free"])
        fresh = steal(descriptors, [CHUNK_BYTES])
        assert not set(fresh.extents) & set(stolen.extents)
        fresh.close()
        assert store(control, [b"again"], 2)
    assert f"extent {stolen.extents[0]} was damaged by a client and is dropped" in daemon.log
    daemon.stop(signal.SIGKILL)
    daemon.start()
    good.do("until_up")
    unharmed(daemon, good)


def test_data_truncated_while_the_daemon_is_down(daemon: Daemon, good: ClientProcess) -> None:
    with evil(daemon.socket("evil")) as (control, descriptors):
        assert store(control, [b"own"], 1)
        stolen = steal(descriptors, [CHUNK_BYTES])
        daemon.stop(signal.SIGKILL)
        for descriptor in stolen.data:
            os.ftruncate(descriptor, 4096)
        stolen.close()
    daemon.start()
    assert daemon.log.count(" dropped: the data file has 4096 bytes") == len(stolen.extents)
    good.do("until_up")
    unharmed(daemon, good)


# --- forging ----------------------------------------------------------------------------------------------------------

DENIED = "Permission denied"
NOT_OWNER = "Operation not permitted"


def test_no_table_can_be_written_through_its_descriptor(daemon: Daemon, good: ClientProcess) -> None:
    """Whoever it is: the descriptor itself doesn't allow it."""
    with evil(daemon.socket("evil")) as (control, descriptors):
        assert store(control, [b"own"], 1)
        stolen = steal(descriptors, [CHUNK_BYTES])
        assert stolen.tables
        for table in stolen.tables:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(table, b"x", 4096)
            with pytest.raises(OSError, match="Invalid argument"):
                os.ftruncate(table, 0)
            with pytest.raises(PermissionError):
                mmap.mmap(table, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        stolen.close()
    unharmed(daemon, good)


@pytest.mark.root
def test_no_table_can_be_forged_by_another_uid(daemon: Daemon, good: ClientProcess, tmp_path: Path) -> None:
    """A client that is neither root nor the daemon's uid, and is let in by the group of its tenant's socket only."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(path.stat().st_mode | 0o111)
    arguments = [str(daemon.socket("evil")), str(OTHER_UID), str(daemon.socket("good")), str(daemon.admin_socket)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.evil", *arguments], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    tried = json.loads(run.stdout)
    assert tried == {
        "write": "Bad file descriptor",
        "pwrite": "Bad file descriptor",
        "truncate": "Invalid argument",
        "map for writing": DENIED,
        "map for reading": "done",
        "open again": DENIED,
        "open data again": DENIED,
        "chmod": NOT_OWNER,
        "chown": NOT_OWNER,
        "open by name": DENIED,
        "list the arena": DENIED,
        "unlink": DENIED,
        "connect to cachesvc.sock": DENIED,
        "connect to admin.sock": DENIED,
    }
    unharmed(daemon, good)


def test_refusals_say_nothing_of_others(daemon: Daemon, good: ClientProcess) -> None:
    """Another chunk_bytes for the namespace that the other tenant uses: it is new here, not known."""
    with Wire(daemon.socket("evil")) as control:
        control.hello(namespace=user_namespace("e2e"), chunk_bytes=[2 * CHUNK_BYTES])
        answer = control.call(Ask(2, "everything"))
        assert isinstance(answer, Refused)
        assert "good" not in answer.detail
    unharmed(daemon, good)
