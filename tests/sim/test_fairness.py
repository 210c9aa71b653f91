"""Nobody starves and nobody takes what isn't theirs: wedged holders, leases, priorities, tenants' shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cachesvc.core.quota import TenantQuota
from cachesvc.types import PAGE_BYTES, AllocateState, KeyState, Priority
from tests.sim.engine import Engine, OpenTicket
from tests.sim.world import Place, World

NEW, RETRY, NO_ROOM = AllocateState.NEW, AllocateState.RETRY, AllocateState.NO_ROOM
FOREVER_S = 1e9
CELLS = 8
EXTENT = CELLS * PAGE_BYTES


def keys(name: str, count: int, first: int = 0) -> list[bytes]:
    return [f"{name}/{at}".encode() for at in range(first, first + count)]


def store(world: World, engine: Engine, some: list[bytes], priority: Priority = Priority.INTERACTIVE) -> list[int]:
    return list(world.do(engine.store(0, some, 0, priority), engine.scheduler))


def resident(world: World, engine: Engine, some: list[bytes]) -> int:
    states: bytes = world.do(engine.lookup(0, some), engine.scheduler)
    return states.count(KeyState.RAM)


# --- wedged holders ---------------------------------------------------------------------------------------------------


def hold_leases(world: World, engine: Engine) -> None:
    world.store_all(engine, keys(engine.name, 32))
    assert isinstance(world.do(engine.lease(0, keys(engine.name, 32), prefix=False), engine.scheduler), OpenTicket)


def hold_writes(world: World, engine: Engine) -> None:
    assert isinstance(world.do(engine.allocate(0, keys("writes", 32)), engine.scheduler), OpenTicket)


def hold_both(world: World, engine: Engine) -> None:
    hold_leases(world, engine)
    hold_writes(world, engine)


@pytest.mark.parametrize("hold", [hold_leases, hold_writes, hold_both])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_wedged_holder_leaves_room_for_others(hold: Callable[[World, Engine], None], workers: int) -> None:
    world = World(Place(extent_cells=CELLS, extents_max=4))
    world.start()
    other, wedged = world.engine("other"), world.engine("wedged", workers=workers)
    hold(world, wedged)
    for process in wedged.processes:
        process.stall(FOREVER_S)
    for n in range(100):
        world.after(0.5)
        assert store(world, other, keys("other", 2, 2 * n)) == [NEW, NEW], f"after {n} stores"
        assert world.do(other.load(0, keys("other", 2, 2 * n)), other.scheduler) == 2
    assert resident(world, other, keys("other", 200)) >= 8, "a quarter of the arena at the least"
    for process in wedged.processes:
        process.die()
    world.after(5.0)
    world.store_all(other, keys("more", 32))
    assert resident(world, other, keys("more", 32)) == 32, "what the dead held is free again"


def test_a_wedged_holder_of_another_class_leaves_room_too() -> None:
    """Its leases lie in every extent; the other's class gets one as soon as any can be had, and keeps it."""
    world = World(Place(extent_cells=CELLS, extents_max=4))
    world.start()
    wedged = world.engine("wedged", (1,), label="small")
    world.engine("third", (1,), label="small")
    world.store_all(wedged, keys("wedged", 32))
    for n in range(0, 16, 2):
        world.do(wedged.lease(0, keys("wedged", 1, n), prefix=False), wedged.scheduler)
    wedged.scheduler.stall(FOREVER_S)
    other = world.engine("other", (2,), label="large")
    world.after(60.0)
    assert store(world, other, keys("other", 2)) == [NEW, NEW]
    assert resident(world, other, keys("other", 2)) == 2


def test_an_arena_full_of_leased_slots_refuses_at_once() -> None:
    world = World(Place(extent_cells=CELLS, extents_max=2))
    world.start()
    engine = world.engine("engine")
    world.store_all(engine, keys("some", 16))
    leased = world.do(engine.lease(0, keys("some", 16)), engine.scheduler)
    before = world.kernel.now
    assert store(world, engine, keys("more", 2)) == [NO_ROOM, NO_ROOM]
    assert world.kernel.now == before, "it doesn't wait"
    assert resident(world, engine, keys("some", 16)) == 16
    engine.release(leased)
    assert store(world, engine, keys("more", 2)) == [NEW, NEW]


# --- priorities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_batch_never_pushes_out_interactive(eviction: str) -> None:
    world = World(Place(extent_cells=CELLS, extents_max=2, eviction=eviction))
    world.start()
    engine, batch = world.engine("engine"), world.engine("batch")
    world.store_all(engine, keys("mine", 12))
    world.store_all(batch, keys("batch", 4), Priority.BATCH)
    for n in range(10):
        world.after(1.0)
        assert set(store(world, batch, keys("batch", 4, 4 * n), Priority.BATCH)) <= {NEW, AllocateState.PRESENT}
    assert resident(world, engine, keys("mine", 12)) == 12, "it turns over in its own four slots"
    world.store_all(engine, keys("mine", 4, 12))
    assert resident(world, engine, keys("mine", 16)) == 16
    assert set(store(world, batch, keys("late", 2), Priority.BATCH)) == {NO_ROOM}


# --- tenants ----------------------------------------------------------------------------------------------------------


def extents_of(world: World, tenant: str) -> int:
    return sum(table.tenant == tenant for table in world.disk.extents.values())


def fill(world: World, engine: Engine, rounds: int = 10, first: int = 0) -> int:
    """Store for a while; the most extents that its tenant had."""
    most = 0
    for n in range(first, first + rounds):
        world.after(0.25)
        store(world, engine, keys(engine.name, 8, 8 * n))
        most = max(most, extents_of(world, engine.tenant))
    return most


def test_a_tenant_never_has_more_than_its_most() -> None:
    tenants = TenantQuota("red", 0, 2 * EXTENT), TenantQuota("blue")
    world = World(Place(extent_cells=CELLS, extents_max=4, tenants=tenants))
    world.start()
    red = world.engine("red", tenant="red")
    assert fill(world, red) == 2
    blue = world.engine("blue", tenant="blue")
    assert fill(world, blue, 40) >= 2
    assert fill(world, red, 40, first=10) <= 2


def test_a_guaranteed_share_is_kept_free_for_its_tenant() -> None:
    tenants = TenantQuota("red"), TenantQuota("blue", 2 * EXTENT)
    world = World(Place(extent_cells=CELLS, extents_max=4, tenants=tenants))
    world.start()
    assert fill(world, world.engine("red", tenant="red")) == 2
    blue = world.engine("blue", tenant="blue")
    assert store(world, blue, keys("blue", 8)) == [NEW] * 8, "at once"
    assert fill(world, blue) >= 2


def crowded() -> tuple[World, Engine]:
    """Red has the whole arena; blue was promised half of it only after a restart with other settings."""
    world = World(Place(extent_cells=CELLS, extents_max=4, tenants=(TenantQuota("red"), TenantQuota("blue"))))
    world.start()
    red = world.engine("red", tenant="red")
    fill(world, red)
    assert extents_of(world, "red") == 4
    world.daemon.change(tenants=(TenantQuota("red"), TenantQuota("blue", 2 * EXTENT)))
    world.daemon.crash()
    world.after(10.0)
    assert red.scheduler.connected()
    fill(world, red, first=10)
    return world, red


def test_a_guaranteed_share_comes_back_from_who_has_it() -> None:
    world, red = crowded()
    blue = world.engine("blue", tenant="blue")
    for n in range(40):
        world.after(0.25)
        store(world, red, keys("red", 8, 8 * n))
        world.do(red.scheduler.refresh_extents(), red.scheduler)
        store(world, blue, keys("blue", 8, 8 * n))
    assert extents_of(world, "blue") == 2
    assert extents_of(world, "red") == 2
    dropped = world.oracle.counts["extents dropped"]
    fill(world, red, 40, first=100)
    fill(world, blue, 40, first=100)
    assert extents_of(world, "blue") >= 2
    assert world.oracle.counts["extents dropped"] <= dropped + 2, "no ping-pong"


def test_bytes_are_free_when_the_last_client_has_unmapped_or_died() -> None:
    world, red = crowded()
    hoarder = world.engine("hoarder", tenant="red")
    world.do(hoarder.scheduler.refresh_extents(), hoarder.scheduler)
    hoarder.scheduler.stall(FOREVER_S)
    blue = world.engine("blue", tenant="blue")
    for _ in range(40):
        world.after(0.25)
        world.do(red.scheduler.refresh_extents(), red.scheduler)
        store(world, blue, keys("blue", 8))
    assert world.oracle.counts["extents dropped"] >= 1
    assert extents_of(world, "blue") == 0, "the wedged process has them mapped still (the oracle counts them)"
    hoarder.scheduler.die()
    world.after(1.0)
    assert extents_of(world, "blue") >= 1
    world.after(5.0)
    assert set(store(world, blue, keys("blue", 8))) == {NEW}
