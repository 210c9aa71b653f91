"""Who holds slots and doesn't let go: processes that are wedged but live, readers that lost their lease, an arena full
of leases.
"""

from __future__ import annotations

import signal

import pytest

from tests.support.clients import ClientProcess, Clients, names
from tests.support.daemon import Daemon, wait_for

pytestmark = pytest.mark.slow

SLOTS = 128
DEADLINE_MS = 60_000.0
"""So long that a call that waits for anything but an answer can't look as if it didn't."""
AT_ONCE_S = 6.0


def fill(daemon: Daemon, client: ClientProcess, prefix: str, request: int = 0) -> list[str]:
    """Store chunks until the class has all extents and every slot of it is sealed or held; the keys."""
    stored: list[str] = []

    def full() -> bool:
        new = names(prefix, range(len(stored), len(stored) + 8))
        stored.extend(client.do("write", keys=new, request=request))
        found = daemon.slab()
        return bool(found["slots"] == SLOTS and not found["free"])

    wait_for(full)
    return stored


def readable(client: ClientProcess, keys: list[str]) -> list[str]:
    states = client.do("states", keys=keys)
    return [key for key, state in zip(keys, states, strict=True) if state == "RAM"]


def wedge(daemon: Daemon, wedged: ClientProcess) -> tuple[list[str], list[str]]:
    """Let it take all leases and slots to write that it can get, and stop it; the keys that it reads and writes."""
    keys = readable(wedged, fill(daemon, wedged, "old"))
    leased = keys[: wedged.do("begin_read", name="r", keys=keys)]
    writing: list[str] = wedged.do("begin_write", name="w", keys=names("unfinished", range(SLOTS)))["new"]
    wedged.do("fill", name="w", part=0.5)
    wedged.stop()
    return leased, writing


def test_a_wedged_holder_never_lets_another_session_starve(daemon: Daemon, clients: Clients) -> None:
    daemon.settings |= {"quarantine_s": 0, "restart_grace_s": 0}
    daemon.start()
    wedged, other = clients.open_many(2, daemon.socket())
    leased, writing = wedge(daemon, wedged)
    assert leased
    assert writing
    fresh = names("fresh", range(20))
    for at in range(0, 20, 4):
        assert other.do("write", keys=fresh[at : at + 4], request=7) == fresh[at : at + 4]
    assert other.do("read", keys=fresh) == 20
    # and again, over and over: what the other session can have is enough to live
    for number in range(20):
        some = names(f"more-{number}", range(4))
        assert other.do("write", keys=some) == some
        assert other.do("read", keys=some) == 4
    # the holder goes on as if nothing had been
    wedged.go_on()
    assert wedged.do("check", name="r", keys=leased) == {"faults": [], "valid": True}
    wedged.do("fill", name="w")
    assert wedged.do("end_write", name="w")
    wedged.do("end_read", name="r")
    assert [other.do("get", key=key) for key in writing] == ["right"] * len(writing)


def test_a_holder_that_was_alone_gives_room_with_its_next_release(daemon: Daemon, clients: Clients) -> None:
    """Alone, a session may hold everything; from the moment another one is there it gets no more than half."""
    daemon.start()
    first = clients.open(daemon.socket())
    keys = readable(first, fill(daemon, first, "old"))
    assert first.do("begin_read", name="all", keys=keys) == len(keys) == SLOTS
    other = clients.open(daemon.socket())
    assert other.do("write", keys=["new"]) == []
    assert first.do("begin_read", name="more", keys=keys) == SLOTS  # nothing that it doesn't hold already
    first.do("end_read", name="all")
    first.do("end_read", name="more")
    assert first.do("begin_read", name="again", keys=keys) == SLOTS // 2
    some = names("new", range(8))
    assert other.do("write", keys=some) == some


def test_leases_of_the_dead_end(daemon: Daemon, clients: Clients) -> None:
    """A reader that held the whole arena is killed with -9: another session can have all of it at once."""
    daemon.start()
    reader = clients.open(daemon.socket())
    keys = readable(reader, fill(daemon, reader, "old"))
    assert reader.do("begin_read", name="r", keys=keys) == SLOTS
    other = clients.open(daemon.socket())
    assert other.do("write", keys=["new"]) == []
    reader.kill()
    wait_for(lambda: not daemon.slab()["leased"])
    new = names("new", range(SLOTS))
    assert other.do("write", keys=new) == new
    assert other.do("read", keys=new) == SLOTS


@pytest.mark.parametrize("whose", ["of the same session", "of another session"])
def test_an_arena_full_of_leased_slots_refuses_at_once(daemon: Daemon, clients: Clients, whose: str) -> None:
    daemon.start()
    reader = clients.open(daemon.socket(), deadline_ms=DEADLINE_MS)
    keys = readable(reader, fill(daemon, reader, "old"))
    assert reader.do("begin_read", name="r", keys=keys) == SLOTS
    writer = reader if whose == "of the same session" else clients.open(daemon.socket(), deadline_ms=DEADLINE_MS)
    before = writer.do("refusals")
    assert writer.do("put", key="new") is False
    assert writer.seconds < AT_ONCE_S
    assert writer.do("write", keys=names("new", range(50))) == []
    assert writer.seconds < AT_ONCE_S
    refused = {reason: count - before.get(reason, 0) for reason, count in writer.do("refusals").items()}
    assert {reason: count for reason, count in refused.items() if count} == {"NO_ROOM": 51}
    assert reader.do("check", name="r", keys=keys) == {"faults": [], "valid": True}
    reader.do("end_read", name="r")
    assert writer.do("put", key="new")


def test_a_reader_whose_slot_is_reused_under_it_notices(daemon: Daemon, clients: Clients) -> None:
    """The reader is stopped while the daemon restarts and its grace time ends: it loses its lease and can't know. The
    arena is overwritten, and the generations tell."""
    daemon.settings |= {"restart_grace_s": 0.2}
    daemon.start()
    reader = clients.open(daemon.socket())
    keys = names("k", range(16))
    for at in range(0, 16, 8):
        wait_for(lambda: reader.do("write", keys=keys[at : at + 8]) == keys[at : at + 8])  # noqa: B023 - called at once
    assert reader.do("begin_read", name="r", keys=keys) == 16
    assert reader.do("check", name="r", keys=keys) == {"faults": [], "valid": True}
    reader.stop()
    daemon.stop(signal.SIGKILL)
    daemon.start()
    other = clients.open(daemon.socket())
    wait_for(lambda: not daemon.status()["restart"]["grace"])
    stored = 0
    while other.do("lookup", keys=keys):
        stored += len(other.do("write", keys=names(f"new-{stored}", range(8))))
    # as another process sees it, before the reader can do or hear anything
    reader.send("check", name="r", keys=keys)
    reader.go_on()
    assert reader.answer()["valid"] is False
    # its next read is a miss, and once it is back it can go on
    reader.do("end_read", name="r")
    reader.do("until_up")
    assert reader.do("lookup", keys=keys) == 0
    # slots whose lease may have ended unseen rest for a moment: until then the answer is "later"
    wait_for(lambda: reader.do("write", keys=["next"]) == ["next"])


def test_a_writer_whose_slot_is_given_away_can_not_seal_it(daemon: Daemon, clients: Clients) -> None:
    """The same for a writer: nobody named its slots for so long that time freed them. What it writes is not sealed."""
    daemon.settings |= {"restart_grace_s": 0.2, "quarantine_s": 0.2}
    daemon.start()
    writer = clients.open(daemon.socket())
    keys = names("k", range(8))
    assert writer.do("begin_write", name="w", keys=keys)["new"] == keys
    writer.stop()
    daemon.stop(signal.SIGKILL)
    daemon.start()
    wait_for(lambda: daemon.status()["restart"]["orphans"] == 0)
    writer.go_on()
    writer.do("until_up")
    assert writer.do("end_write", name="w") is False
    assert writer.do("lookup", keys=keys) == 0
    assert daemon.slab()["writing"] == 0
