"""Rings of slots and ghosts: links, parking, sparing, chains that find a ghost, growing and shrinking."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Container

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesvc.core.rings import CHAIN_MAX, FIRST, Columns, Ghosts, SlotRings, no_trail

ONCE, AGAIN = 1, 2


def free(_slot: int) -> bool:
    return False


class Asked(Container[int]):
    """A container that counts how often it was asked for each member."""

    def __init__(self, members: set[int]) -> None:
        self.members = members
        self.times: list[int] = []

    def __contains__(self, slot: object) -> bool:
        assert isinstance(slot, int)
        self.times.append(slot)
        return slot in self.members


def ring_of_slots(count: int) -> SlotRings:
    rings = SlotRings()
    rings.set_nodes(count)
    for slot in range(count):
        rings.insert(slot + FIRST, ONCE, slot)
    return rings


def order(rings: SlotRings, ring: int = ONCE) -> list[int]:
    """Slots of a ring, coldest first, after a check."""
    rings.check_invariants()
    return [node - FIRST for node in rings.members(ring)]


def test_a_ring_keeps_the_order_of_heat() -> None:
    rings = ring_of_slots(4)
    rings.refresh(1 + FIRST)
    assert order(rings) == [0, 2, 3, 1]
    rings.heat(2 + FIRST, AGAIN)
    assert (order(rings), order(rings, AGAIN), rings.counts[:3]) == ([0, 3, 1], [2], [0, 3, 1])
    rings.drop(3 + FIRST)
    assert order(rings) == [0, 1]


def test_a_parked_slot_is_counted_and_comes_back_cold() -> None:
    rings = ring_of_slots(3)
    rings.park(2 + FIRST)
    rings.park(1 + FIRST)
    assert (order(rings), rings.counts[ONCE]) == ([0], 3)
    rings.unpark(1 + FIRST)
    rings.unpark(2 + FIRST)
    rings.unpark(2 + FIRST)
    assert order(rings) == [2, 1, 0]


@pytest.mark.parametrize("leave", [SlotRings.drop, SlotRings.refresh], ids=["drop", "refresh"])
def test_a_parked_slot_leaves_or_heats_like_any_other(leave: Callable[[SlotRings, int], None]) -> None:
    rings = ring_of_slots(3)
    rings.park(FIRST)
    leave(rings, FIRST)
    assert order(rings) == ([1, 2] if leave is SlotRings.drop else [1, 2, 0])
    rings.unpark(FIRST)
    assert 0 not in order(rings)[:1]


def test_take_asks_once_for_each_slot_and_not_again_for_held_ones() -> None:
    rings = ring_of_slots(8)
    asked: list[int] = []

    def held(slot: int) -> bool:
        asked.append(slot)
        return slot < 5

    spared = Asked({5, 6, 7})
    assert rings.take(ONCE, held, spared) == 0
    assert (asked, spared.times) == ([0, 1, 2, 3, 4], list(range(8)))
    assert order(rings) == [5, 6, 7]
    assert rings.take(ONCE, held, Asked(set())) == 5 + FIRST
    assert asked[5:] == [5], "a parked slot was met again"


@pytest.mark.parametrize("comes", ["insert", "touch", "unpark", "refresh"])
def test_a_ring_with_spared_slots_only_is_not_walked_again_until_something_comes(comes: str) -> None:
    rings = ring_of_slots(6)
    if comes == "unpark":
        rings.park(5 + FIRST)
    elif comes == "touch":
        rings.heat(5 + FIRST, AGAIN)
    else:
        rings.drop(5 + FIRST)
    spared = Asked({0, 1, 2, 3, 4})
    assert rings.take(ONCE, free, spared) == rings.take(ONCE, free, spared) == 0
    assert spared.times == [0, 1, 2, 3, 4]
    if comes == "insert":
        rings.insert(5 + FIRST, ONCE, 5)
    elif comes == "touch":
        rings.heat(5 + FIRST, ONCE)
    elif comes == "unpark":
        rings.unpark(5 + FIRST)
    else:
        rings.refresh(4 + FIRST)
        spared.members.remove(4)
    assert rings.take(ONCE, free, spared) == (4 if comes == "refresh" else 5) + FIRST


def test_another_container_is_not_taken_for_the_one_that_spared_all() -> None:
    rings = ring_of_slots(3)
    assert rings.take(ONCE, free, {0, 1, 2}) == 0
    assert rings.take(ONCE, free, {0, 1}) == 2 + FIRST


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda rings: rings.insert(FIRST, ONCE, 0), id="insert twice"),
        pytest.param(lambda rings: rings.drop(1 + FIRST), id="drop nothing"),
        pytest.param(lambda rings: rings.refresh(1 + FIRST), id="refresh nothing"),
        pytest.param(lambda rings: rings.heat(1 + FIRST, ONCE), id="touch nothing"),
    ],
)
def test_a_callers_mistake_changes_nothing(mistake: Callable[[SlotRings], None]) -> None:
    rings = ring_of_slots(2)
    rings.drop(1 + FIRST)
    with pytest.raises(AssertionError):
        mistake(rings)
    assert order(rings) == [0]


@pytest.mark.parametrize("column", ["hotter", "colder", "where"])
def test_check_invariants_sees_one_wrong_number(column: str) -> None:
    rings = ring_of_slots(4)
    getattr(rings, column)[2 + FIRST] = AGAIN
    with pytest.raises(AssertionError):
        rings.check_invariants()


# --- ghosts ---------------------------------------------------------------------------------------------------------


def ghosts_for(capacity: int) -> Ghosts:
    ghosts = Ghosts()
    ghosts.resize(capacity)
    return ghosts


def remembered(ghosts: Ghosts, ring: int = ONCE) -> list[int]:
    """Digests of a ring, oldest first, after a check."""
    ghosts.check_invariants()
    return [ghosts.digests[node] for node in ghosts.members(ring)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("toggle"), st.sampled_from([ONCE, AGAIN]), st.integers(0, 30)),
            st.tuples(st.just("resize"), st.just(0), st.integers(0, 40)),
        ),
        max_size=120,
    )
)
def test_ghosts_are_two_queues_with_removal(steps: list[tuple[str, int, int]]) -> None:
    """Against plain lists; the digests collide in the low bits of a table of any size tried here."""
    ghosts, model, limit = ghosts_for(8), {ONCE: list[int](), AGAIN: list[int]()}, 10

    def cut_to(most: int) -> None:
        while len(model[ONCE]) + len(model[AGAIN]) > most:
            longest = ONCE if len(model[ONCE]) >= len(model[AGAIN]) else AGAIN
            del model[longest][0]

    for what, ring, number in steps:
        digest = (number << 60 | number % 3) & (1 << 64) - 1
        if what == "resize":
            limit = number + number // 8 + 1
            cut_to(limit)
            ghosts.resize(number)
        elif node := ghosts.find(digest):
            model[ghosts.where[node]].remove(digest)
            ghosts.forget(node)
        else:
            cut_to(limit - 1)
            model[ring].append(digest)
            ghosts.remember(ring, digest)
        assert {ring: remembered(ghosts, ring) for ring in model} == model
        assert all(ghosts.find(digest) for digests in model.values() for digest in digests)


@pytest.mark.parametrize("digest", [0, 1, (1 << 64) - 1])
def test_any_64_bits_are_a_digest(digest: int) -> None:
    ghosts = ghosts_for(4)
    assert not ghosts.find(digest)
    ghosts.remember(ONCE, digest)
    assert ghosts.find(digest)


def test_digests_made_to_collide_cost_ghosts_not_time() -> None:
    ghosts = ghosts_for(1000)
    for number in range(500):
        ghosts.remember(ONCE, number << 32)
    assert remembered(ghosts) == [number << 32 for number in range(500 - CHAIN_MAX, 500)]


def test_growing_and_shrinking_keep_the_latest_ghosts_in_order() -> None:
    ghosts = ghosts_for(100)
    digests = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(300)]
    for digest in digests[:100]:
        ghosts.remember(ONCE, digest)
    ghosts.resize(300)
    for digest in digests[100:]:
        ghosts.remember(ONCE, digest)
    assert remembered(ghosts) == digests
    small = sum(column.buffer_info()[1] for column in numbers(ghosts))
    for capacity in range(299, 15, -1):
        ghosts.resize(capacity)
        assert remembered(ghosts)[-capacity:] == digests[-capacity:]
    assert sum(column.buffer_info()[1] for column in numbers(ghosts)) < small // 4
    assert all(ghosts.find(digest) for digest in digests[-15:])


# --- what it costs --------------------------------------------------------------------------------------------------


def numbers(rings: SlotRings | Ghosts) -> list[array[int]]:
    return [column for column in vars(rings).values() if isinstance(column, array)]


def test_a_slot_costs_at_most_60_bytes_with_its_ghosts() -> None:
    """Grown by extents of 4096 slots, which is what makes arrays reserve more than they need."""
    for extents in (1, 3, 16, 17, 33):
        columns = Columns(0)
        for extent in range(extents):
            columns.resize(4096 * (extent + 1))
        size = sum(sys.getsizeof(column) for column in (*numbers(columns.slots), *numbers(columns.ghosts)))
        assert size / columns.capacity <= 60, f"{extents} extents"


def test_slots_beyond_the_capacity_are_forgotten() -> None:
    columns = Columns(4)
    for slot in range(4):
        columns.slots.insert(slot + FIRST, ONCE, slot)
    columns.slots.park(3 + FIRST)
    columns.resize(2)
    columns.check_invariants()
    assert order(columns.slots) == [0, 1]
    columns.resize(4)
    columns.slots.insert(3 + FIRST, ONCE, 3)
    assert order(columns.slots) == [0, 1, 3]


# --- lines ------------------------------------------------------------------------------------------------------------

SAME = range(FIRST)
TOUCHED = (0, AGAIN, AGAIN, 4, 4)


def nodes(*slots: int) -> list[int]:
    return [slot + FIRST for slot in slots]


def test_a_line_stands_one_behind_the_other_from_the_hot_end() -> None:
    rings = ring_of_slots(6)
    trail = no_trail()
    rings.line_up(nodes(4, 1, 3), SAME, trail)
    assert (order(rings), trail[ONCE]) == ([0, 2, 5, 3, 1, 4], 3 + FIRST)
    rings.refresh(0 + FIRST)
    rings.line_up(nodes(5, 2), SAME, trail)
    assert order(rings) == [2, 5, 3, 1, 4, 0], "what follows goes behind the trail, not to the hot end"
    rings.line_up(nodes(2, 2), SAME, trail)
    assert order(rings) == [2, 5, 3, 1, 4, 0]


def test_a_line_in_two_rings_has_two_ends() -> None:
    rings = ring_of_slots(6)
    trail = no_trail()
    rings.line_up(nodes(1, 2), TOUCHED, trail)
    assert (order(rings, ONCE), order(rings, AGAIN)) == ([0, 3, 4, 5], [2, 1])
    rings.line_up(nodes(4, 1, 3), SAME, trail)
    assert (order(rings, ONCE), order(rings, AGAIN)) == ([0, 5, 3, 4], [1, 2])
    assert (trail[ONCE], trail[AGAIN]) == (3 + FIRST, 1 + FIRST)


@pytest.mark.parametrize("gone", ["dropped", "parked", "in another ring"])
def test_a_line_whose_end_is_gone_goes_on_at_the_hot_end(gone: str) -> None:
    rings = ring_of_slots(5)
    trail = no_trail()
    rings.line_up(nodes(1, 0), SAME, trail)
    if gone == "dropped":
        rings.drop(0 + FIRST)
    elif gone == "parked":
        rings.park(0 + FIRST)
    else:
        rings.heat(0 + FIRST, AGAIN)
    rings.line_up(nodes(2, 3), SAME, trail)
    assert [slot for slot in order(rings) if slot] == [4, 1, 3, 2]


def test_a_line_takes_up_parked_slots_and_passes_over_what_is_not_tracked() -> None:
    rings = ring_of_slots(4)
    trail = no_trail()
    rings.line_up(nodes(3), SAME, trail)
    rings.park(3 + FIRST)
    rings.drop(1 + FIRST)
    rings.line_up(nodes(1, 3, 0), SAME, trail)
    assert (order(rings), rings.counts[ONCE]) == ([2, 0, 3], 3)


def test_a_line_ends_the_memory_of_a_ring_that_was_all_spared() -> None:
    rings = ring_of_slots(3)
    spared = {0, 1, 2}
    assert rings.take(ONCE, free, spared) == 0
    spared.remove(1)
    assert rings.take(ONCE, free, spared) == 0, "remembered"
    rings.line_up(nodes(2), SAME, no_trail())
    assert rings.take(ONCE, free, spared) == 1 + FIRST


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 11), max_size=6)), max_size=12))
def test_lines_never_break_a_ring(steps: list[tuple[bool, list[int]]]) -> None:
    rings = ring_of_slots(12)
    trails = [no_trail(), no_trail()]
    for turn, (touched, slots) in enumerate(steps):
        rings.line_up(nodes(*slots), TOUCHED if touched else SAME, trails[turn % 2])
        found = [*order(rings, ONCE), *order(rings, AGAIN)]
        assert sorted(found) == list(range(12))
        last = [slot for slot in slots if slots.count(slot) == 1]
        for ring in (ONCE, AGAIN):
            placed = [slot for slot in order(rings, ring)[::-1] if slot in last]
            assert placed == [slot for slot in last if slot in placed], "the first is the hottest"
