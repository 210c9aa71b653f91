"""Who a slot belongs to when connections break and session ids are used twice: never to two that may write it.

The oracle watches every store. Each test pins a story that gave wrong bytes. Not here: a scheduler and a worker that
share a process, which this world has no word for (`tests.core.test_sessions`, `tests.e2e.test_sessions`).
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.disk import WRITING
from tests.sim.engine import Engine, Habits, OpenTicket
from tests.sim.network import Delays
from tests.sim.world import Place, World

QUARANTINE_S = 60.0
PLACE = Place(extent_cells=8, extents_max=4, quarantine_s=QUARANTINE_S, delays=Delays(usual_s_max=0.002))
SLOW = Habits(fail_chance=0.0, slow_chance=0.0, done_chance=0.0, short_chance=0.0, step_s_max=2.0)


def keys(name: str, count: int) -> list[bytes]:
    return [f"{name}/{at}".encode() for at in range(count)]


def writing(world: World) -> int:
    return Counter(state for table in world.disk.extents.values() for state in table.states)[WRITING]


def tickets(world: World, engine: Engine, count: int) -> list[OpenTicket]:
    """That many, of two slots each."""
    some = [world.do(engine.allocate(0, keys(f"{engine.name}-{n}", 2)), engine.scheduler) for n in range(count)]
    assert all(isinstance(ticket, OpenTicket) for ticket in some)
    return some


def displaced(world: World, first: Engine) -> Engine:
    """Another engine has its session; the first one's connection, dead for the daemon already, breaks."""
    second = world.engine("second", session="first")
    assert first.scheduler.link is not None
    first.scheduler.link.cut()
    return second


def fill_all(world: World, engine: Engine, rounds: int = 30) -> None:
    """Another engine stores far more than there is room for."""
    for n in range(rounds):
        world.after(0.2)
        world.do(engine.store(0, keys(f"{engine.name}-{n}", 4)), engine.scheduler)
    assert world.oracle.counts["evictions"]


@pytest.mark.parametrize("crash", [False, True], ids=["cut", "crash"])
def test_tickets_that_a_hello_cannot_describe_stay_whose_they_are(crash: bool) -> None:
    """An engine writes more slots than fit into its Hello, and its connection is replaced: what the Hello only named
    was given to others, while the engine still wrote there."""
    world = World(PLACE)
    world.start()
    engine, other = world.engine("engine", habits=SLOW), world.engine("other")
    engine.described_max = 1
    mine = tickets(world, engine, 4)
    fills = [world.begin(engine.fill(ticket), engine.scheduler) for ticket in mine]
    world.after(0.05)
    if crash:
        world.daemon.crash()
    else:
        assert engine.scheduler.link is not None
        engine.scheduler.link.cut()
    world.after(1.0)
    world.kernel.run(
        world.kernel.now + 10.0, until=lambda: engine.scheduler.connected() and other.scheduler.connected()
    )
    world.after(6.0)  # the grace time after a restart
    fill_all(world, other)
    assert writing(world) == 8
    world.kernel.run(world.kernel.now + 60.0, until=lambda: all(fill.done for fill in fills))
    assert all(fill.value for fill in fills)
    for ticket in mine:
        assert world.do(engine.seal(ticket), engine.scheduler)
    for n in range(4):
        assert world.do(engine.load(0, keys(f"engine-{n}", 2)), engine.scheduler) == 2


def test_an_engine_that_restarts_under_its_id_frees_nothing_of_the_one_before() -> None:
    """The first isn't dead yet and writes on; the second one's Hello, which names nothing, made its slots free."""
    world = World(PLACE)
    world.start()
    first = world.engine("first", habits=SLOW)
    mine = tickets(world, first, 2)
    fills = [world.begin(first.fill(ticket), first.scheduler) for ticket in mine]
    second = displaced(world, first)
    fill_all(world, second)
    assert writing(world) == 4
    world.kernel.run(world.kernel.now + 60.0, until=lambda: all(fill.done for fill in fills))
    assert second.scheduler.connected(), "and the first doesn't take the session back"
    assert first.scheduler.over
    assert not first.scheduler.connected()
    assert writing(world) == 4
    first.scheduler.die()
    world.after(1.0)
    assert writing(world) == 0
    world.check_idle("the first is dead")


def test_who_lost_its_session_gives_back_what_it_has_finished() -> None:
    world = World(PLACE)
    world.start()
    first = world.engine("first")
    one, two = tickets(world, first, 2)
    displaced(world, first)
    world.after(5.0)
    assert first.scheduler.over
    first.abort(one)
    world.after(5.0)
    assert writing(world) == 2
    first.abort(two)
    world.after(5.0)
    assert writing(world) == 0


def test_who_lost_its_session_does_not_take_it_from_a_new_daemon() -> None:
    world = World(PLACE)
    world.start()
    first = world.engine("first", habits=SLOW)
    (ticket,) = tickets(world, first, 1)
    second = displaced(world, first)
    world.after(5.0)
    assert first.scheduler.over
    world.daemon.crash()
    world.kernel.run(world.kernel.now + 10.0, until=lambda: world.daemon.up() and second.scheduler.connected())
    world.after(5.0)
    assert second.scheduler.connected()
    assert not first.scheduler.connected()
    first.abort(ticket)
    world.after(QUARANTINE_S + 5.0)
    assert writing(world) == 0
    world.check_idle("the first has finished")
