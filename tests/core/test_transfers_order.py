"""Recency: what a request touches, stores and keeps, and in which order chunks go for others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cachesvc.core import events as ev
from cachesvc.core.rings import FIRST, SlotRings, Trail
from cachesvc.types import KeyState, Priority, Role
from tests.support.nodes import NEW, NO_ROOM, PER, PRESENT, RETRY, Driven, keys, one_extent

EVICTED = KeyState.EVICTED

# --- recency ----------------------------------------------------------------------------------------------------------


def arrive(d: Driven, some: list[bytes], request: int, connection: int = 1) -> list[int]:
    return d.lookup(connection, some, request=request, touch=True)


def coldest_first(d: Driven) -> list[bytes]:
    """The order of eviction as the policy has it, ring by ring."""
    slab = d.slab()
    rings = slab.eviction._slots
    found = [slab.keys[node - FIRST] for ring in range(1, FIRST) for node in rings.members(ring)]
    return [key for key in found if key is not None]


def victims(d: Driven, count: int, connection: int = 1) -> list[bytes]:
    """What goes, in order, when strangers need room."""
    known = [key for space in d.node.index.spaces.values() for key in space.sealed]
    gone = []
    for i in range(count):
        before = d.resident(known, connection)
        assert d.store(connection, keys(1, 900_000 + i)) == [NEW]
        gone += [key for key in before if key not in d.resident(known, connection)]
    return gone


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_a_stored_prompt_goes_leaf_first(eviction: str) -> None:
    d = one_extent(eviction=eviction)
    d.store(1, keys(PER))
    assert victims(d, 3) == keys(PER)[:-4:-1]


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_a_prompt_stored_in_steps_goes_leaf_first(eviction: str) -> None:
    d = one_extent(eviction=eviction)
    for step in range(4):
        d.store(1, keys(2, 2 * step), request=5)
        assert coldest_first(d) == keys(2 * step + 2)[::-1]
    d.do(ev.EndRequests(1, (5,)))
    assert victims(d, 4) == keys(PER)[:-5:-1]


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_a_touched_prompt_goes_leaf_first_and_later(eviction: str) -> None:
    d = one_extent(eviction=eviction)
    d.store(1, keys(4))
    d.store(1, keys(4, 4))
    arrive(d, keys(4), 7)
    d.do(ev.EndRequests(1, (7,)))
    assert victims(d, 4) == keys(4, 4)[::-1]


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_a_touch_in_batches_is_one_touch_of_the_whole(eviction: str) -> None:
    d = one_extent(eviction=eviction)
    d.store(1, keys(PER))
    arrive(d, keys(PER), 6)  # all have been used twice
    for batch in range(4):
        arrive(d, keys(2, 2 * batch), 7)
    assert coldest_first(d) == keys(PER)[::-1]


def test_a_long_prompt_costs_no_more_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step moves its own chunks; all of them together only now and then."""
    moved = 0
    line_up = SlotRings.line_up

    def counted(self: SlotRings, nodes: list[int], rings: Sequence[int], trail: Trail) -> None:
        nonlocal moved
        moved += len(nodes)
        line_up(self, nodes, rings, trail)

    monkeypatch.setattr(SlotRings, "line_up", counted)
    d = Driven(16)
    d.hello(1)
    for step in range(60):
        d.now += 0.01
        assert d.store(1, keys(2, 2 * step), request=5) == [NEW] * 2
    assert moved == 120
    d.now += 1.1
    d.store(1, keys(2, 120), request=5)
    assert moved == 120 + 120 + 2
    d.lookup(1, keys(60), request=6, touch=True)
    d.lookup(1, keys(62, 60), request=6, touch=True)
    assert moved == 242 + 122
    assert coldest_first(d) == keys(122)[::-1]


def test_a_request_that_goes_on_is_hot_again() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(2), request=5)
    d.store(1, keys(4, 50))
    d.now += 1.1
    d.store(1, keys(1, 2), request=5)
    assert coldest_first(d) == [*keys(4, 50)[::-1], *keys(3)[::-1]]


def test_stale_slots_of_a_request_protect_nobody() -> None:
    """What it had was evicted for others: their chunks in the same slots aren't its own."""
    d = one_extent(eviction="lru")
    d.store(1, keys(PER), request=5)
    d.store(1, keys(PER, 50), request=6)
    d.do(ev.EndRequests(1, (6,)))
    assert d.store(1, keys(3, 100), request=5) == [NEW] * 3


def test_a_request_outlives_its_extent() -> None:
    """Generations of the next extent in its place begin anew: they say nothing."""
    d = one_extent()
    d.store(1, keys(PER), request=5)
    d.do(ev.ExtentDamaged(d.extents()[0].number, "truncated"))
    d.now += 10.0
    assert d.store(1, keys(PER, 50)) == [NEW] * PER
    assert d.store(1, keys(2, 100), request=5) == [NEW] * 2, "none of what is there is its own"
    d.auto = False
    d.do(ev.ExtentDamaged(d.extents()[0].number, "truncated"))
    d.now += 10.0
    assert d.store(1, keys(1, 200), request=5) == [RETRY]


def test_a_request_touches_once() -> None:
    """Else a request that is retried would look like many that want the same."""
    d = one_extent(eviction="arc")
    rings = d.slab().eviction._slots.counts
    d.store(1, keys(2), request=5)
    for _ in range(3):
        arrive(d, keys(2), 5)
    assert sum(rings[2::2]) == 0, "its own chunks, stored and looked at by one request: used once"
    for _ in range(3):
        arrive(d, keys(1), 6)
    assert sum(rings[2::2]) == 1, "another request: used again"


def test_storing_on_refreshes_without_a_second_use() -> None:
    d = one_extent(eviction="arc")
    rings = d.slab().eviction._slots.counts
    for step in range(4):
        d.store(1, keys(2, 2 * step), request=5)
    assert sum(rings[2::2]) == 0


def test_lookups_leases_and_retries_touch_nothing() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(PER))
    d.lookup(1, keys(1, PER - 1), request=3)
    d.lease(1, 1, keys(1, PER - 1), request=3)
    d.do(ev.Release(1, (1,)))
    assert victims(d, 1) == keys(1, PER - 1)


def test_a_lease_with_touch_is_an_arrival() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(PER))
    d.lease(1, 1, keys(1, PER - 1), request=3, touch=True)
    d.do(ev.Release(1, (1,)))
    d.do(ev.EndRequests(1, (3,)))
    assert victims(d, 1) == keys(1, PER - 2)


def test_a_worker_may_look_and_touch() -> None:
    d = one_extent(eviction="lru")
    d.hello(2, role=Role.WORKER)
    d.store(1, keys(PER))
    arrive(d, keys(1, PER - 1), 3, connection=2)
    assert victims(d, 1) == keys(1, PER - 2)


# --- own request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", ["lru", "arc"])
@pytest.mark.parametrize("step", [1, 3, PER])
def test_a_prompt_twice_the_arena_leaves_what_fits(eviction: str, step: int) -> None:
    d = Driven(2, eviction=eviction)
    d.hello(1)
    d.store(1, keys(2 * PER, 500))  # old chunks to push out
    prompt = keys(4 * PER)
    for first in range(0, len(prompt), step):
        d.store(1, prompt[first : first + step], request=5)
    assert d.resident(prompt) == prompt[: 2 * PER]


def test_what_another_request_touched_later_stays_its_own() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(4), request=5)
    d.store(1, keys(4, 50), request=6)
    arrive(d, keys(4), 6)
    assert d.store(1, keys(4, 4), request=5) == [NEW] * 4
    assert d.resident(keys(PER)) == keys(PER)
    assert d.store(1, keys(1, PER), request=5) == [NO_ROOM]


def test_a_request_keeps_what_it_only_read() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(PER))
    arrive(d, keys(4), 5)
    assert d.store(1, [*keys(4), *keys(5, 100)], request=5) == [PRESENT] * 4 + [NEW] * 4 + [NO_ROOM]
    assert d.resident(keys(4)) == keys(4)


@pytest.mark.parametrize("request_number", [0, 5])
def test_a_batch_does_not_evict_what_it_names(request_number: int) -> None:
    """Not before and not after the key that needs a slot, whether it was looked up before or not."""
    d = one_extent(eviction="lru")
    d.store(1, keys(PER))
    some = [*keys(1, 100), *keys(PER - 1, 1), *keys(1, 101)]
    assert d.store(1, some, request=request_number) == [NEW] + [PRESENT] * (PER - 1) + [NO_ROOM]
    assert d.lookup(1, keys(1)) == [EVICTED]


def test_an_ended_request_protects_nothing() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(PER), request=5)
    assert d.store(1, keys(1, 50), request=5) == [NO_ROOM]
    d.do(ev.EndRequests(1, (5, 6)))
    assert d.store(1, keys(1, 50), request=5) == [NEW]


def test_a_seal_after_the_end_of_its_request_begins_no_new_one() -> None:
    d = one_extent()
    d.allocate(1, 1, keys(2), request=5)
    d.do(ev.EndRequests(1, (5,)))
    d.seal(1, 1, 2)
    assert not d.node.sessions.by_connection[1].requests


def test_priorities() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(4), priority=Priority.BATCH)
    d.store(1, keys(4, 4), priority=Priority.INTERACTIVE)
    arrive(d, keys(4), 9)
    d.do(ev.EndRequests(1, (9,)))
    assert d.store(1, keys(1, 50)) == [NEW]
    assert d.resident(keys(PER)) == [*keys(3), *keys(4, 4)], "the lowest first, however hot"
    d.store(1, keys(3, 51))
    assert d.store(1, keys(1, 60), priority=Priority.BATCH) == [NO_ROOM]
    assert d.store(1, keys(1, 60)) == [NEW]
