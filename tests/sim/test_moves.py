"""Two slot sizes in one small arena, leases always held: both get space, and extents don't go to and fro.

Chunks of 1 MiB and of 3 MiB in 64 MiB (four extents of 16 MiB), with even and skewed load, and with load that changes
sides. Every store and load is a real one, watched by the oracle; minutes pass on the fake clock only.
"""

from __future__ import annotations

import pytest

from tests.sim.engine import Engine, OpenTicket
from tests.sim.kernel import Task
from tests.sim.world import Place, World

MIB = 1 << 20
PLACE = Place(extent_cells=16, extents_max=4, cell_bytes=MIB)
LEASES = 3
"""Held at any moment by each engine, on what it stored last."""


def keys(engine: Engine, n: int) -> list[bytes]:
    return [f"{engine.name}/{n}".encode()]


def load(engine: Engine, every_s: float, seconds: float, first: int = 0) -> Task:
    """Store new chunks at an even pace; how many."""
    held: list[OpenTicket] = []
    count = int(seconds / every_s)
    for n in range(first, first + count):
        yield every_s
        yield engine.store(0, keys(engine, n))
        ticket = yield engine.lease(0, keys(engine, n))
        if isinstance(ticket, OpenTicket):
            held.append(ticket)
        if len(held) > LEASES:
            engine.release(held.pop(0))
    for ticket in held:
        engine.release(ticket)
    return count


def engines(eviction: str) -> tuple[World, Engine, Engine]:
    world = World(Place(extent_cells=16, extents_max=4, cell_bytes=MIB, eviction=eviction), check_every=20)
    world.start()
    return world, world.engine("small", (1,), label="small"), world.engine("large", (3,), label="large")


def extents(world: World) -> dict[int, int]:
    """Slot size in MiB -> extents that new chunks can go to."""
    found = {size // MIB: len(slab.used_extents()) for (_, size), slab in world.node.extents.slabs.items()}
    return dict(sorted(found.items()))


def moves(world: World) -> int:
    return world.oracle.counts["extents moved"] + world.oracle.counts["extents dropped"]


def run(world: World, small: Engine, large: Engine, small_s: float, large_s: float, seconds: float) -> list[int]:
    """Both under load; the fewest extents that each had after the first second."""
    start = int(world.kernel.now * 1000)
    ends = [
        world.begin(load(small, small_s, seconds, start), small.scheduler),
        world.begin(load(large, large_s, seconds, start), large.scheduler),
    ]
    least = [99, 99]
    world.after(1.0)
    for _ in range(int(seconds) * 2):
        world.after(0.5)
        least = [min(pair) for pair in zip(least, extents(world).values(), strict=True)]
    world.after(20.0)
    assert all(end.done for end in ends)
    return least


@pytest.mark.parametrize("eviction", ["lru", "arc"])
@pytest.mark.parametrize(("small_s", "large_s"), [(0.2, 0.2), (0.2, 0.6), (0.6, 0.2), (0.2, 2.0), (2.0, 0.2)])
def test_both_get_space_and_nothing_goes_to_and_fro(eviction: str, small_s: float, large_s: float) -> None:
    world, small, large = engines(eviction)
    assert min(run(world, small, large, small_s, large_s, 60.0)) >= 1
    settled, split = moves(world), extents(world)
    assert settled <= 4
    assert min(run(world, small, large, small_s, large_s, 120.0)) >= 1
    assert moves(world) - settled <= 2, f"it was settled at {split}"
    world.check_idle("after the load")


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_load_that_changes_sides_moves_what_it_must(eviction: str) -> None:
    world, small, large = engines(eviction)
    run(world, small, large, 0.2, 0.2, 30.0)
    for phase in range(6):
        before = moves(world)
        busy, idle = (0.1, 3.0) if phase % 2 else (3.0, 0.1)
        assert min(run(world, small, large, busy, idle, 40.0)) >= 1
        assert moves(world) - before <= 3, f"phase {phase}"


def test_a_size_that_comes_late_gets_an_extent_though_all_are_leased_in_turn() -> None:
    world, small, large = engines("arc")
    del large
    world.begin(load(small, 0.1, 60.0), small.scheduler)
    world.after(20.0)
    late = world.engine("late", (2,), label="late")
    world.after(2.0)
    assert extents(world)[2] >= 1
    world.store_all(late, [b"one", b"two"])
