"""Prompts and their prefixes: what can be read is a leading run; a prompt too long for the arena keeps what fits."""

from __future__ import annotations

import pytest

from cachesvc.core import events as ev
from cachesvc.types import AllocateState, KeyState
from tests.sim.engine import Engine
from tests.sim.world import Place, World

RAM = KeyState.RAM


def prompt(name: str, count: int) -> list[bytes]:
    return [f"{name}/{at}".encode() for at in range(count)]


def leading_run(states: bytes) -> int:
    return len(states) - len(states.lstrip(bytes([RAM])))


def store_in_steps(world: World, engine: Engine, keys: list[bytes], step: int, request: int) -> list[AllocateState]:
    """As a long prefill does it; what each key was told."""
    told: list[AllocateState] = []
    for at in range(0, len(keys), step):
        world.after(0.1)
        states = world.do(engine.store(0, keys[at : at + step], request), engine.scheduler)
        told += map(AllocateState, states)
    return told


@pytest.mark.parametrize("eviction", ["lru", "arc"])
@pytest.mark.parametrize("step", [1, 5, 64])
def test_a_prompt_twice_the_arena_leaves_an_unbroken_prefix_of_what_fits(eviction: str, step: int) -> None:
    world = World(Place(extent_cells=8, extents_max=4, eviction=eviction))
    world.start()
    engine = world.engine("engine")
    world.store_all(engine, prompt("before", 32))
    told = store_in_steps(world, engine, prompt("long", 64), step, request=2)
    assert told[:32] == [AllocateState.NEW] * 32
    assert min(told[32:]) >= AllocateState.RETRY
    assert set(store_in_steps(world, engine, prompt("long", 64)[32:], step, request=2)) == {AllocateState.NO_ROOM}
    states = world.do(engine.lookup(0, prompt("long", 64)), engine.scheduler)
    assert leading_run(states) == states.count(RAM) == 32
    assert world.do(engine.load(0, prompt("long", 64)), engine.scheduler) == 32


def test_a_prompt_that_grows_step_by_step_pushes_out_others_only() -> None:
    """Each step asks again for what is there, as an engine does that goes on with a conversation."""
    world = World(Place(extent_cells=8, extents_max=2))
    world.start()
    mine, other = world.engine("mine"), world.engine("other")
    store_in_steps(world, other, prompt("other", 12), 4, request=1)
    for length in range(2, 18, 2):
        world.do(mine.lookup(0, prompt("mine", length), length, touch=True), mine.scheduler)
        world.do(mine.store(0, prompt("mine", length), length), mine.scheduler)
        states = world.do(mine.lookup(0, prompt("mine", length)), mine.scheduler)
        assert leading_run(states) == min(length, 16)
        ended = (length,)
        mine.scheduler.tell(lambda connection, ended=ended: ev.EndRequests(connection, ended))  # type: ignore[misc]


def test_a_key_dropped_from_the_middle_ends_the_run_there() -> None:
    world = World(Place(extent_cells=4, extents_max=4))
    world.start()
    engine = world.engine("engine")
    keys = prompt("some", 12)
    store_in_steps(world, engine, keys, 2, request=1)
    assert world.do(engine.load(0, keys), engine.scheduler) == 12
    lying = {key: extent for (_, _, _, key), places in world.oracle.sealed.items() for extent, _ in places}
    world.daemon.damage(lying[keys[5]])
    states = world.do(engine.lookup(0, keys), engine.scheduler)
    gone = [at for at, state in enumerate(states) if state != RAM]
    assert gone
    assert 5 in gone
    assert len(gone) < 12
    assert all(states[at] == RAM for at in range(12) if lying[keys[at]] != lying[keys[5]]), "every key is probed"
    assert world.do(engine.load(0, keys), engine.scheduler) == gone[0], "a lease stops at the gap"
    ticket = world.do(engine.lease(0, keys, prefix=False), engine.scheduler)
    assert len(ticket.slots) == 12 - len(gone), "a sliding window reads over gaps"
    assert world.do(engine.read(ticket), engine.scheduler)
    engine.release(ticket)


def test_two_engines_share_a_prompt() -> None:
    world = World(Place())
    world.start()
    writer, reader = world.engine("writer", workers=2), world.engine("reader", workers=1)
    keys = prompt("shared", 4)
    ticket = world.do(writer.allocate(0, keys), writer.scheduler)
    assert world.do(reader.lookup(0, keys), reader.scheduler) == bytes([KeyState.PENDING]) * 4
    assert world.do(reader.store(0, keys), reader.scheduler) == bytes([AllocateState.BUSY]) * 4
    assert world.do(writer.fill(ticket), writer.scheduler)
    assert world.do(writer.seal(ticket), writer.scheduler)
    assert world.do(reader.load(0, keys), reader.scheduler) == 4
