"""Writers that are killed: wherever it strikes, the chunk is a miss or whole, and the memory comes back.

10,000 rounds of an engine that comes, allocates, copies and is killed at a random moment, while another engine looks
on. The oracle watches every store: memory comes back when the last process that may write it is known to be dead, not
before.
"""

from __future__ import annotations

import random

from cachesvc.types import KeyState
from tests.sim.disk import WRITING
from tests.sim.engine import Engine, Habits
from tests.sim.network import Delays
from tests.sim.world import Place, World

ROUNDS = 10_000


def writing(world: World) -> int:
    """Slots whose word says *writing*."""
    return sum(table.states.count(WRITING) for table in world.disk.extents.values())


def kill_all(world: World, engine: Engine, rng: random.Random) -> None:
    """The processes of an engine die one after the other, the scheduler first or last."""
    order = list(engine.processes)
    rng.shuffle(order)
    for process in order:
        process.die()
        if rng.random() < 0.5:
            world.after(rng.uniform(0, 0.02))


def test_a_writer_killed_anywhere_between_allocate_and_seal() -> None:
    world = World(Place(extents_max=2, delays=Delays(usual_s_max=0.002)), check_every=100)
    world.daemon.deaths_s_max = 0.01
    world.start()
    rng = world.dice("kills")
    bystander = world.engine("bystander", (2,))
    habits = Habits(fail_chance=0.0, slow_chance=0.0, step_s_max=0.004)
    sealed = 0
    for n in range(ROUNDS):
        engine = world.engine(f"writer-{n}", (2,), workers=rng.choice((0, 1)), habits=habits)
        keys = [b"%d/0" % n, b"%d/1" % n]
        world.begin(engine.store(0, keys), engine.scheduler)
        world.after(rng.uniform(0, 0.03))
        kill_all(world, engine, rng)
        world.after(0.05)
        assert writing(world) == 0, f"round {n}: every process is known to be dead, and memory isn't back"
        states = world.do(bystander.lookup(0, keys), bystander.scheduler)
        assert KeyState.PENDING not in states, f"round {n}: nobody will seal it"
        if KeyState.RAM in states:
            sealed += 1
            assert world.do(bystander.load(0, keys), bystander.scheduler) == 2
    assert ROUNDS // 20 < sealed < ROUNDS - ROUNDS // 20, "kills strike before and after the seal"
    bystander.scheduler.die()
    world.after(1.0)
    world.check_gone()
