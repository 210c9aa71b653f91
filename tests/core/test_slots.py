"""Slots of one class: every arrow of their life, free lists, limbo, extents that come and go, wrong arrows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cachesvc.core.slots import DEPTH_STEP_S, REUSE_DELAY_S, Extent, SlabClass, SlotState
from cachesvc.types import Priority

PER = 4


def slab(extents: int = 1) -> SlabClass:
    """A class with extents 101, 102 ..."""
    made = SlabClass("t", 4096, PER, "lru")
    for number in range(extents):
        made.add_extent(101 + number)
    return made


def sealed(s: SlabClass, count: int, now: float = 1.0) -> list[int]:
    """That many slots sealed and tracked."""
    numbers = []
    for _ in range(count):
        n = s.take_free(now)
        assert n is not None
        s.seal(n, 7, b"key%d" % n, 10)
        s.eviction.insert(n, n + 1, Priority.INTERACTIVE)
        s.used([n], now)
        numbers.append(n)
    s.check_invariants()
    return numbers


def test_the_states_of_a_table_word() -> None:
    assert [state.value for state in SlotState] == [0, 1, 2, 3]


def test_the_lowest_free_slot_goes_first_extent_by_extent() -> None:
    s = slab(2)
    assert [s.take_free(0.0) for _ in range(2 * PER + 1)] == [*range(2 * PER), None]
    assert [s.place(n) for n in (0, PER - 1, PER)] == [(101, 0), (101, PER - 1), (102, 0)]
    s.check_invariants()


def test_numbers_and_places() -> None:
    s = slab(2)
    second = s.extent_of(PER)
    assert isinstance(second, Extent)
    assert [s.number(second, slot) for slot in (-1, 0, PER - 1, PER)] == [None, PER, 2 * PER - 1, None]


def test_a_slot_from_free_to_free() -> None:
    s = slab()
    (n,) = sealed(s, 1)
    assert (s.states[n], s.generations[n], s.sealed_slots, s.free_slots) == (SlotState.SEALED, 0, 1, PER - 1)
    s.eviction.remove(n)
    s.unseal(n, 1.0)
    assert (s.states[n], s.generations[n], s.sealed_slots, s.free_slots) == (SlotState.FREE, 1, 0, PER)
    assert s.keys[n] is None
    s.check_invariants()
    assert s.take_free(1.0) == n


def test_an_evicted_slot_is_written_at_once_at_a_new_generation() -> None:
    s = slab()
    (n,) = sealed(s, 1)
    s.eviction.remove(n)
    s.reuse(n)
    assert (s.states[n], s.generations[n], s.sealed_slots, s.extent_of(n).busy) == (SlotState.WRITING, 1, 0, 1)
    assert s.keys[n] is None, "what had the old chunk must not take the new one for it"
    s.seal(n, 8, b"other", 5)
    assert (s.keys[n], s.lengths[n], s.spaces[n], s.extent_of(n).busy) == (b"other", 5, 8, 0)


def test_quarantine_and_back() -> None:
    s = slab()
    n = s.take_free(0.0)
    assert n is not None
    s.quarantine(n)
    assert (s.states[n], s.extent_of(n).quarantined, s.extent_of(n).busy) == (SlotState.QUARANTINED, 1, 1)
    s.check_invariants()
    s.own_again(n)
    assert (s.states[n], s.extent_of(n).quarantined) == (SlotState.WRITING, 0)
    s.quarantine(n)
    s.abort(n)
    assert (s.states[n], s.generations[n], s.extent_of(n).busy, s.free_slots) == (SlotState.FREE, 1, 0, PER)
    s.check_invariants()


def test_leases_count() -> None:
    s = slab()
    n, m = sealed(s, 2)
    s.lease([n, m, n])
    assert (list(s.leases)[:2], s.extent_of(n).busy) == ([2, 1], 2)
    assert s.leased(n)
    assert not s.unlease(n, released=True)
    assert s.unlease(n, released=True)
    assert not s.leased(n)
    assert s.extent_of(n).busy == 1
    s.check_invariants()


def test_a_tainted_slot_waits_in_limbo() -> None:
    s = slab()
    (n,) = sealed(s, 1)
    s.lease([n, n])
    assert not s.unlease(n, released=False)
    assert s.unlease(n, released=True)
    assert s.tainted == {n}, "one reader was lost, whoever came after"
    s.eviction.remove(n)
    s.unseal(n, 5.0)
    assert (s.generations[n], s.free_slots, s.tainted) == (1, PER - 1, set())
    s.check_invariants()
    for _ in range(PER - 1):
        assert s.take_free(5.0) is not None
    assert s.take_free(5.0 + REUSE_DELAY_S - 0.01) is None
    assert s.take_free(5.0 + REUSE_DELAY_S) == n


def test_extents_come_with_generations() -> None:
    s = SlabClass("t", 4096, PER, "lru")
    s.add_extent(5, np.array([9, 8, 7, 1 << 50], np.uint64))
    assert list(s.generations) == [9, 8, 7, 1 << 50]
    s.check_invariants()


def test_an_extent_drains_and_its_place_is_used_again() -> None:
    s = slab(2)
    numbers = sealed(s, PER + 1)
    first = s.extent_of(0)
    s.lease([numbers[0]])
    s.start_draining(first)
    assert (s.slot_count, s.free_slots, [e.number for e in s.used_extents()]) == (PER, PER - 1, [102])
    for n in numbers[:PER]:
        s.eviction.remove(n)
        if not s.leases[n]:
            s.unseal(n, 2.0)
    s.check_invariants()
    assert s.take_free(2.0) == PER + 1, "none of a draining extent"
    with pytest.raises(AssertionError, match="leaves its class with 1 busy slots"):
        s.remove_extent(first)
    s.unlease(numbers[0], released=True)
    s.unseal(numbers[0], 2.0)
    s.remove_extent(first)
    with pytest.raises(AssertionError, match="lies in no extent"):
        s.place(0)
    again = s.add_extent(103)
    assert (again.ordinal, s.place(0), list(s.generations[:PER]), len(s.states)) == (0, (103, 0), [0] * PER, 2 * PER)
    s.check_invariants()


def test_what_rests_makes_its_extent_rest() -> None:
    s = slab(2)
    n, m = sealed(s, 2)
    for slot, now in ((n, 5.0), (m, 6.0)):
        s.lease([slot])
        s.unlease(slot, released=False)
        s.eviction.remove(slot)
        if slot == n:
            s.unseal(n, now)
    extent = s.extent_of(n)
    s.start_draining(extent)
    assert (extent.rests_until, len(s.limbo)) == (5.0 + REUSE_DELAY_S, 0)
    s.unseal(m, 6.0)
    assert (extent.rests_until, len(s.limbo)) == (6.0 + REUSE_DELAY_S, 0)
    s.check_invariants()


def test_recency() -> None:
    s = slab()
    assert s.oldest_use() is None
    n, m = sealed(s, 2, now=3.0)
    assert s.used([m, n], 4.0) == pytest.approx(4.0 - 2 * DEPTH_STEP_S)
    assert list(s.last_use)[:2] == [4.0 - DEPTH_STEP_S, 4.0], "the deeper, the older"
    s.used([m], 3.5)
    assert (s.last_use[m], s.extent_of(n).hottest, s.extent_of(n).dirty) == (3.5, 4.0, True)
    assert s.oldest_use() == 4.0 - DEPTH_STEP_S
    assert s.used([], 9.0) == 9.0


def wrong_arrows() -> list[tuple[str, Callable[[SlabClass, int], object]]]:
    return [
        ("freed in state 1", lambda s, n: s.reuse(n)),
        ("freed in state 1", lambda s, n: s.unseal(n, 0.0)),
        ("owned again in state 1", lambda s, n: s.own_again(n)),
        ("sealed in state 3", lambda s, n: [s.quarantine(n), s.seal(n, 1, b"", 1)]),
        ("quarantined in state 3", lambda s, n: [s.quarantine(n), s.quarantine(n)]),
        ("aborted in state 0", lambda s, n: [s.abort(n), s.abort(n)]),
        ("with 1 leases", lambda s, n: [s.seal(n, 1, b"", 1), s.lease([n]), s.reuse(n)]),
    ]


@pytest.mark.parametrize(("story", "arrow"), wrong_arrows())
def test_a_wrong_arrow_is_a_bug(story: str, arrow: Callable[[SlabClass, int], object]) -> None:
    s = slab()
    n = s.take_free(0.0)
    assert n is not None
    with pytest.raises(AssertionError, match=story):
        arrow(s, n)


def test_a_count_of_free_slots_that_lies() -> None:
    s = slab()
    s.free_slots += 1
    with pytest.raises(AssertionError, match="counted 5"):
        s.check_invariants()
    for _ in range(PER):
        s.take_free(0.0)
    with pytest.raises(AssertionError, match="counts 1 free slots and has none"):
        s.take_free(0.0)


@pytest.mark.parametrize(
    ("break_it", "story"),
    [
        (lambda s: setattr(s.extents[0], "busy", 1), "0 busy slots, counted 1"),
        (lambda s: setattr(s.extents[0], "quarantined", 1), "quarantined"),
        (lambda s: s.extents[0].free.append(3), "free twice"),
        (lambda s: s.extents[0].free.pop(), "a free slot is lost"),
        (lambda s: s.limbo.extend([(1.0, 3), (1.0, 3)]), "rests twice"),
        (lambda s: s.limbo.append((1.0, 0)), "isn't free"),
        (lambda s: setattr(s, "sealed_slots", 3), "1 slots sealed, counted 3"),
        (lambda s: s.eviction.remove(0), "policy tracks 0"),
    ],
)
def test_what_the_invariants_see(break_it: Callable[[SlabClass], None], story: str) -> None:
    s = slab()
    sealed(s, 1)
    break_it(s)
    with pytest.raises(AssertionError, match=story):
        s.check_invariants()
