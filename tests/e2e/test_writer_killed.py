"""A writer is killed with -9 at any point between allocate and seal: the chunk is a miss, the slot returns after every
process of the session is known dead, nothing leaks.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.support.clients import CHUNK_BYTES, ClientProcess, Clients, names
from tests.support.daemon import Daemon, wait_for

pytestmark = pytest.mark.slow

ROUNDS = 50
POINTS = ("allocated", "in the middle of a copy", "copying", "copied", "sealing")


def write_and_die(writer: ClientProcess, point: str, keys: list[str], draw: random.Random) -> None:
    """Kill the writer when it has come to this point."""
    assert writer.do("begin_write", name="w", keys=keys)["new"] == keys
    if point == "in the middle of a copy":
        writer.do("fill", name="w", part=0.3)
    elif point == "copying":
        writer.do("fill_forever", name="w")
        time.sleep(draw.random() * 0.003)
    elif point in ("copied", "sealing"):
        writer.do("fill", name="w")
        if point == "sealing":
            writer.send("end_write", name="w")
            time.sleep(draw.random() * 0.0005)
    writer.kill()


@pytest.mark.parametrize("point", POINTS)
def test_kill_9_of_a_writer(daemon: Daemon, clients: Clients, point: str) -> None:
    """Rounds at this point; the next writer starts while this one dies."""
    daemon.start()
    reader = clients.open(daemon.socket())
    draw = random.Random(point)
    coming = clients.start()
    stored = 0
    for number in range(ROUNDS // len(POINTS)):
        writer, coming = coming, clients.start()
        keys = names(f"round-{number}", range(draw.randrange(1, 9)))
        writer.open(daemon.socket())
        write_and_die(writer, point, keys, draw)
        wait_for(lambda: daemon.nothing_leaks(processes=1))
        run = reader.do("lookup", keys=keys)
        assert run in ((0, len(keys)) if point == "sealing" else (0,))
        assert reader.do("read", keys=keys) == run
        stored += run
    slab = daemon.slab()
    assert slab["sealed"] == stored
    # and the slots can be had again, all of them
    assert len(reader.do("write", keys=names("all", range(slab["slots"])))) > 0


def two_processes(daemon: Daemon, clients: Clients, keys: list[str]) -> tuple[ClientProcess, ClientProcess, list[int]]:
    """A scheduler that writes, a worker of the same session, and the tickets of the writes."""
    session = bytes(range(16)).hex()
    scheduler = clients.open(daemon.socket(), session=session)
    tickets = scheduler.do("begin_write", name="w", keys=keys)["tickets"]
    worker = clients.start()
    worker.do(
        "join",
        address=str(daemon.socket()),
        namespace="e2e",
        chunk_bytes=CHUNK_BYTES,
        session=session,
        tickets=tickets,
    )
    return scheduler, worker, tickets


@pytest.mark.parametrize("end", ["dies", "is done"])
def test_the_slot_returns_after_every_process_is_dead_or_done(daemon: Daemon, clients: Clients, end: str) -> None:
    daemon.settings |= {"quarantine_s": 0, "restart_grace_s": 0}  # time must not free what has a pidfd
    daemon.start()
    reader = clients.open(daemon.socket())
    keys = names("k", range(5))
    scheduler, worker, tickets = two_processes(daemon, clients, keys)
    scheduler.kill()
    wait_for(lambda: daemon.slab()["quarantined"] == 5)
    assert daemon.open_tickets() == len(tickets) == 1
    assert reader.do("states", keys=keys) == ["NAMESPACE_NEW"] * 5
    time.sleep(1.0)  # several ticks, to see that nothing happens
    assert daemon.slab()["quarantined"] == 5
    # another writer may have the keys: in other slots
    assert reader.do("write", keys=keys) == keys
    assert daemon.slab()["quarantined"] == 5
    if end == "dies":
        worker.kill()
    else:
        worker.do("done", tickets=tickets)
    wait_for(lambda: daemon.slab()["quarantined"] == daemon.open_tickets() == 0)
    assert reader.do("read", keys=keys) == 5
    worker.kill()
    wait_for(lambda: daemon.nothing_leaks(processes=1))


@pytest.mark.root
def test_kill_9_in_another_pid_namespace(daemon: Daemon, clients: Clients) -> None:
    """As in a container: the daemon can't see the writer's pid, its pidfd tells all the same."""
    daemon.settings |= {"quarantine_s": 600}
    daemon.start()
    reader = clients.open(daemon.socket())
    writer = clients.start(within=["unshare", "--pid", "--fork", "--kill-child"]).open(daemon.socket())
    keys = names("k", range(5))
    assert writer.do("begin_write", name="w", keys=keys)["new"] == keys
    writer.do("fill", name="w", part=0.5)
    assert daemon.tenant()["processes"] == 2
    writer.kill()
    wait_for(lambda: daemon.nothing_leaks(processes=1))
    assert reader.do("write", keys=keys) == keys
    assert reader.do("read", keys=keys) == 5


def test_a_scheduler_outlives_its_worker(daemon: Daemon, clients: Clients) -> None:
    daemon.start()
    keys = names("k", range(5))
    scheduler, worker, _ = two_processes(daemon, clients, keys)
    worker.kill()
    scheduler.do("fill", name="w")
    assert scheduler.do("end_write", name="w")
    assert scheduler.do("read", keys=keys) == 5
    wait_for(lambda: daemon.nothing_leaks(processes=1))


def test_a_stopped_writer_keeps_its_slots(daemon: Daemon, clients: Clients) -> None:
    """It lives, so it may go on writing any moment: nobody else gets the slots, and it seals when it goes on."""
    daemon.settings |= {"quarantine_s": 0, "restart_grace_s": 0}
    daemon.start()
    writer, other = clients.open_many(2, daemon.socket())
    keys = names("k", range(5))
    writer.do("begin_write", name="w", keys=keys)
    writer.do("fill", name="w", part=0.5)
    writer.stop()
    assert other.do("states", keys=keys) == ["PENDING"] * 5
    assert other.do("write", keys=keys) == []
    assert other.do("refusals") == {"BUSY": 5}
    # everything else can be had, twice over
    for number in range(40):
        other.do("write", keys=names(f"more-{number}", range(8)))
    assert daemon.evictions() > 100
    assert daemon.slab()["writing"] == 5
    writer.go_on()
    writer.do("fill", name="w")
    assert writer.do("end_write", name="w")
    assert other.do("read", keys=keys) == 5


def test_writer_and_daemon_are_killed_together(daemon: Daemon, clients: Clients) -> None:
    """Nobody is left to say whose the slots were: the one case where time frees them."""
    daemon.settings |= {"quarantine_s": 2, "restart_grace_s": 0}
    daemon.start()
    writer, reader = clients.open_many(2, daemon.socket())
    keys = names("k", range(5))
    writer.do("begin_write", name="w", keys=keys)
    writer.do("fill", name="w", part=0.5)
    assert daemon.process is not None
    daemon.process.kill()
    writer.kill()
    daemon.process.wait()
    daemon.start()
    status = daemon.status()
    assert status["restart"]["orphans"] == daemon.slab()["quarantined"] == 5
    reader.do("until_up")
    assert reader.do("lookup", keys=keys) == 0
    wait_for(lambda: daemon.status()["restart"]["orphans"] == 0)
    wait_for(lambda: daemon.nothing_leaks(processes=1))
    assert reader.do("write", keys=keys) == keys
