"""The daemon is killed and comes back: what it finds again, what it keeps for whom, and for how long."""

from __future__ import annotations

from collections import Counter

import pytest

from cachesvc.core import events as ev
from cachesvc.types import AllocateState, KeyState
from tests.sim.disk import FREE, SEALED, WRITING, Table
from tests.sim.engine import Engine, OpenTicket
from tests.sim.network import Delays
from tests.sim.world import Place, World

NEW, RETRY = AllocateState.NEW, AllocateState.RETRY
RAM = KeyState.RAM
GRACE_S = 5.0
QUARANTINE_S = 60.0
LONG_S = 10_000.0
PLACE = Place(extent_cells=8, extents_max=4, quarantine_s=QUARANTINE_S, grace_s=GRACE_S)


def keys(name: str, count: int) -> list[bytes]:
    return [f"{name}/{at}".encode() for at in range(count)]


def world_of(place: Place = PLACE) -> World:
    world = World(place)
    world.start()
    return world


def states_of(world: World, engine: Engine, some: list[bytes]) -> bytes:
    states: bytes = world.do(engine.lookup(0, some), engine.scheduler)
    return states


def words(world: World) -> Counter[int]:
    return Counter(state for table in world.disk.extents.values() for state in table.states)


def restart(world: World, engine: Engine | None = None) -> None:
    """Kill the daemon; it is back, and so is the engine."""
    world.daemon.crash()
    world.kernel.run(world.kernel.now + 10.0, until=world.daemon.up)
    if engine is not None:
        world.kernel.run(world.kernel.now + 2.0, until=engine.scheduler.connected)
        assert engine.scheduler.connected()


# --- what was sealed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_every_sealed_chunk_is_found_again(eviction: str) -> None:
    world = world_of(Place(extent_cells=8, extents_max=4, eviction=eviction))
    engine = world.engine("engine")
    world.store_all(engine, keys("some", 32))
    for _ in range(3):
        restart(world, engine)
        assert states_of(world, engine, keys("some", 32)) == bytes([RAM]) * 32
        assert world.do(engine.load(0, keys("some", 32)), engine.scheduler) == 32
        world.after(2 * GRACE_S)
        assert states_of(world, engine, keys("some", 32)) == bytes([RAM]) * 32


def test_a_kill_at_every_step_of_a_store() -> None:
    """Between any two stores into a table, between tables and reply: each chunk is whole or a miss, and none is lost
    that was sealed before."""
    outcomes = set()
    for step in range(1, 40):
        world = world_of(Place(extent_cells=4, extents_max=2, quarantine_s=QUARANTINE_S, grace_s=GRACE_S))
        engine = world.engine("engine")
        world.store_all(engine, keys("before", 6))
        world.daemon.fuse = step
        world.begin(engine.store(0, keys("some", 4), 1), engine.scheduler)
        world.after(GRACE_S / 2)
        restart(world, engine)
        world.after(1.0)
        assert states_of(world, engine, keys("before", 2))[:1] != b"", "somebody answers"
        run = world.do(engine.load(0, keys("some", 4)), engine.scheduler)
        outcomes.add(run)
        world.after(QUARANTINE_S + 1.0)
        world.check_idle(f"killed at step {step}")
    assert {0, 4} <= outcomes


def test_a_chunk_sealed_the_moment_its_namespace_was_opened_is_found_again() -> None:
    world = world_of()
    world.engine("first", label="known")
    late = world.engine("late", label="unknown")
    world.store_all(late, keys("late", 2))
    restart(world, late)
    assert states_of(world, late, keys("late", 2)) == bytes([RAM]) * 2


# --- open tickets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_open_tickets_that_are_named_are_owned_again(workers: int) -> None:
    world = world_of()
    engine = world.engine("engine", workers=workers)
    world.store_all(engine, keys("before", 2))
    ticket = world.do(engine.allocate(0, keys("some", 4)), engine.scheduler)
    filled = world.begin(engine.fill(ticket), engine.scheduler)
    world.after(0.005)
    restart(world, engine)
    world.after(QUARANTINE_S + 5.0)
    assert words(world)[WRITING] == 4, "time doesn't free what was named"
    assert filled.done
    assert filled.value
    assert world.do(engine.seal(ticket), engine.scheduler)
    assert world.do(engine.load(0, keys("some", 4)), engine.scheduler) == 4


def test_open_tickets_that_nobody_names_are_freed_by_time_and_not_before() -> None:
    world = world_of()
    engine = world.engine("engine")
    assert isinstance(world.do(engine.allocate(0, keys("some", 4)), engine.scheduler), OpenTicket)
    world.daemon.crash()
    engine.scheduler.die()
    world.kernel.run(world.kernel.now + 10.0, until=world.daemon.up)
    started = world.kernel.now
    world.kernel.run(started + QUARANTINE_S - 0.5, until=lambda: False)
    assert words(world)[WRITING] == 4
    world.after(QUARANTINE_S + 0.5 - (world.kernel.now - started))
    assert words(world)[WRITING] == 0


def test_a_wedged_worker_keeps_its_ticket_through_restart_and_death_of_its_scheduler() -> None:
    """The scheduler names the ticket to the new daemon and dies; the worker, who may write on, isn't back yet."""
    world = world_of(Place(extent_cells=8, quarantine_s=QUARANTINE_S, grace_s=GRACE_S, delays=Delays(usual_s_max=0.01)))
    engine = world.engine("engine", workers=1)
    ticket = world.do(engine.allocate(0, keys("some", 4)), engine.scheduler)
    world.begin(engine.fill(ticket), engine.scheduler)
    world.kernel.run(world.kernel.now + 1.0, until=lambda: bool(engine.workers[0].copying))
    engine.workers[0].stall(QUARANTINE_S / 2)
    restart(world, engine)
    engine.scheduler.die()
    world.after(GRACE_S + 5.0)
    assert words(world)[WRITING] == 4
    world.after(QUARANTINE_S)
    assert words(world)[WRITING] == 4, "it lives, and may have been handed the job just now"
    engine.workers[0].die()
    world.after(1.0)
    assert words(world)[WRITING] == 0


# --- leases -----------------------------------------------------------------------------------------------------------


def hold(world: World, engine: Engine, some: list[bytes]) -> OpenTicket:
    ticket = world.do(engine.lease(0, some), engine.scheduler)
    assert isinstance(ticket, OpenTicket)
    return ticket


def test_a_lease_that_is_named_in_the_grace_time_is_kept() -> None:
    world = world_of()
    engine, other = world.engine("engine"), world.engine("other")
    world.store_all(engine, keys("some", 8))
    ticket = hold(world, engine, keys("some", 8))
    restart(world, engine)
    world.after(GRACE_S)
    for n in range(20):
        world.after(0.5)
        world.do(other.store(0, keys(f"other-{n}", 4)), other.scheduler)
    assert world.do(engine.read(ticket), engine.scheduler), "everything else was evicted, and this wasn't"
    engine.release(ticket)


def test_a_lease_that_is_not_named_in_time_is_lost_and_its_reader_notices() -> None:
    world = world_of(Place(extent_cells=8, extents_max=1, quarantine_s=QUARANTINE_S, grace_s=GRACE_S))
    other = world.engine("other")
    engine = world.engine("engine")
    world.store_all(engine, keys("some", 4))
    ticket = hold(world, engine, keys("some", 4))
    engine.scheduler.stall(LONG_S)
    restart(world, other)
    world.after(GRACE_S)
    for n in range(20):
        world.after(0.5)
        world.do(other.store(0, keys(f"other-{n}", 4)), other.scheduler)
    assert world.oracle.counts["leases lost"]
    engine.scheduler.stalled_until = world.kernel.now
    assert not world.do(engine.read(ticket), engine.scheduler), "the generation tells"


def test_nothing_is_evicted_or_reused_in_the_grace_time() -> None:
    world = world_of()
    engine = world.engine("engine")
    world.store_all(engine, keys("some", 32))
    restart(world, engine)
    started = world.kernel.now
    assert words(world) == {SEALED: 32}
    while world.kernel.now < started + GRACE_S - 1.0:
        assert world.do(engine.store(0, keys("more", 2)), engine.scheduler) == bytes([RETRY]) * 2
        assert words(world) == {SEALED: 32}
        world.after(0.5)
    world.after(2.0)
    assert world.do(engine.store(0, keys("more", 2)), engine.scheduler) == bytes([NEW]) * 2
    assert world.oracle.counts["evictions"] == 2


def test_what_a_reader_lost_rests_a_second_before_it_is_handed_out() -> None:
    """An engine without pidfds is cut off and stalls in the middle of a read: time ends its lease."""
    world = world_of(Place(extent_cells=8, extents_max=1, quarantine_s=QUARANTINE_S, grace_s=GRACE_S))
    engine, other = world.engine("engine", pidfd=False), world.engine("other")
    world.store_all(engine, keys("some", 4))
    ticket = hold(world, engine, keys("some", 4))
    lost = set(zip(ticket.slots.extents, ticket.slots.slots, strict=True))
    assert engine.scheduler.link is not None
    engine.scheduler.stall(LONG_S)
    engine.scheduler.link.cut()
    world.after(QUARANTINE_S + 1.0)
    raised: dict[tuple[int, int], float] = {}
    given: dict[tuple[int, int], float] = {}
    watch(world, raised, given)
    for n in range(40):
        world.after(0.2)
        world.do(other.store(0, keys(f"other-{n}", 4)), other.scheduler)
    assert lost <= raised.keys()
    assert lost <= given.keys()
    assert all(given[place] >= raised[place] + 1.0 for place in lost)
    engine.scheduler.stalled_until = world.kernel.now
    assert not world.do(engine.read(ticket), engine.scheduler)


def watch(world: World, raised: dict[tuple[int, int], float], given: dict[tuple[int, int], float]) -> None:
    """Note when each slot is first freed, and first handed out."""
    oracle = world.oracle
    freeing, writing = oracle.freeing, oracle.writing

    def see_freeing(table: Table, slot: int, generation: int) -> None:
        raised.setdefault((table.extent, slot), world.kernel.now)
        freeing(table, slot, generation)

    def see_writing(table: Table, slot: int, generation: int) -> None:
        if table.states[slot] != FREE:
            raised.setdefault((table.extent, slot), world.kernel.now)
        given.setdefault((table.extent, slot), world.kernel.now)
        writing(table, slot, generation)

    oracle.freeing, oracle.writing = see_freeing, see_writing  # type: ignore[method-assign]


# --- who comes back ---------------------------------------------------------------------------------------------------


def test_engines_come_back_by_themselves_and_go_on() -> None:
    world = world_of(Place(extent_cells=8, extents_max=4, delays=Delays(usual_s_max=0.002, notice_s_max=0.1)))
    engines = [world.engine(name, workers=workers) for name, workers in (("a", 0), ("b", 2))]
    for n in range(5):
        for engine in engines:
            world.store_all(engine, keys(f"{engine.name}-{n}", 2))
        world.daemon.crash()
        for engine in engines:
            assert states_now(world, engine) is None, "a dead daemon is a miss, not a wait"
        world.after(2.0)
    for engine in engines:
        for n in range(5):
            assert world.do(engine.load(0, keys(f"{engine.name}-{n}", 2)), engine.scheduler) == 2


def states_now(world: World, engine: Engine) -> bytes | None:
    before = world.kernel.now
    states: bytes | None = world.do(engine.lookup(0, keys("some", 1)), engine.scheduler)
    assert world.kernel.now - before <= engine.habits.deadline_s
    return states


def test_a_request_number_that_the_new_daemon_never_heard_of() -> None:
    world = world_of()
    engine = world.engine("engine")
    world.do(engine.store(0, keys("some", 2), 5), engine.scheduler)
    restart(world, engine)
    engine.scheduler.tell(lambda connection: ev.EndRequests(connection, (5, 6)))
    world.after(0.1)
    assert engine.scheduler.connected()
