"""LRU, ARC and priorities: one contract for both, an independent model step by step, the paper's ARC on whole traces.

Not here: links and chains (`test_rings`), hit rates on recorded traces (they aren't part of the project).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Container, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachesvc.core.eviction import Arc, Eviction, EvictionPolicy, Lru, make_eviction
from cachesvc.core.rings import Columns
from cachesvc.types import Priority
from tests.support.eviction_oracles import Model, PaperArc, PlainLru

KINDS = ["lru", "arc"]
BATCH, INTERACTIVE = Priority.BATCH, Priority.INTERACTIVE


def free(_slot: int) -> bool:
    return False


def digest_of(key: int) -> int:
    """64 spread bits for a small number."""
    return (key + 1) * 0x9E3779B97F4A7C15 % 2**64


@pytest.fixture(params=[Lru, Arc])
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    """A policy of capacity 8 that tracks slots 0 to 4 with their digests, inserted in this order."""
    made: EvictionPolicy = request.param(Columns(8), INTERACTIVE)
    for slot in range(5):
        made.insert(slot, digest_of(slot))
    return made


def drain(policy: EvictionPolicy, held: Callable[[int], bool] = free, spared: Container[int] = ()) -> list[int]:
    """Victims until there is none, oldest first."""
    victims = []
    while (slot := policy.evict(held, spared)) is not None:
        policy.check_invariants()
        victims.append(slot)
    return victims


# --- the contract, for each policy ----------------------------------------------------------------------------------


def test_what_came_first_goes_first(policy: EvictionPolicy) -> None:
    assert (len(policy), policy.coldest()) == (5, 0)
    assert drain(policy) == [0, 1, 2, 3, 4]
    assert (len(policy), policy.coldest(), policy.evict(free, ())) == (0, None, None)


@pytest.mark.parametrize("use", ["touch", "refresh"])
def test_what_was_used_goes_later(policy: EvictionPolicy, use: str) -> None:
    for slot in (0, 3):
        getattr(policy, use)(slot)
    victims = drain(policy)
    assert [slot for slot in victims if slot not in (0, 3)] == [1, 2, 4]
    assert victims.index(0) < victims.index(3)
    assert use == "touch" or victims == [1, 2, 4, 0, 3]


def test_an_evicted_slot_takes_another_key(policy: EvictionPolicy) -> None:
    assert policy.evict(free, ()) == 0
    policy.insert(0, digest_of(9))
    assert drain(policy) == [1, 2, 3, 4, 0]


def test_evicted_keys_are_ghosts_until_stored_again(policy: EvictionPolicy) -> None:
    assert policy.evict(free, ()) == 0
    assert [policy.is_ghost(digest_of(key)) for key in (0, 1, 9)] == [True, False, False]
    policy.insert(6, digest_of(0))
    assert not policy.is_ghost(digest_of(0))


def test_a_removed_key_is_no_ghost(policy: EvictionPolicy) -> None:
    policy.remove(2)
    assert not policy.is_ghost(digest_of(2))
    assert drain(policy) == [0, 1, 3, 4]


def test_ghosts_reach_back_about_as_far_as_the_class_is_large(policy: EvictionPolicy) -> None:
    for key in range(5, 100):
        slot = policy.evict(free, ()) if len(policy) == 8 else key
        assert slot is not None
        policy.insert(slot, digest_of(key))
        policy.check_invariants()
        if key == 90:
            policy.touch(slot)
    ghosts = [key for key in range(100) if policy.is_ghost(digest_of(key))]
    assert 0 < len(ghosts) <= 8
    assert min(ghosts) >= 80


def test_held_slots_are_parked_and_asked_about_once(policy: EvictionPolicy) -> None:
    asked: list[int] = []

    def held(slot: int) -> bool:
        asked.append(slot)
        return True

    assert [policy.evict(held, ()) for _ in range(50)] == [None] * 50
    assert sorted(asked) == [0, 1, 2, 3, 4]
    assert (len(policy), policy.coldest()) == (5, None)


def test_a_prefix_released_head_first_goes_deepest_first(policy: EvictionPolicy) -> None:
    """Slots 0, 1, 2 are a leased prefix, 0 its head; the newest chunks outlive it."""
    assert policy.evict(lambda slot: slot < 3, ()) == 3
    for slot in (0, 1, 2):
        policy.unpark(slot)
    assert policy.coldest() == 2
    assert drain(policy) == [2, 1, 0, 4]


def test_unpark_of_anything_else_does_nothing(policy: EvictionPolicy) -> None:
    policy.unpark(3)
    policy.unpark(7)
    policy.check_invariants()
    assert drain(policy) == [0, 1, 2, 3, 4]
    policy.unpark(3)
    assert len(policy) == 0


def test_a_parked_slot_can_be_removed_and_inserted_again(policy: EvictionPolicy) -> None:
    assert policy.evict(lambda slot: slot == 0, ()) == 1
    policy.remove(0)
    policy.unpark(0)
    policy.check_invariants()
    policy.insert(0, digest_of(7))
    assert drain(policy) == [2, 3, 4, 0]


@pytest.mark.parametrize("use", ["touch", "refresh"])
def test_using_a_parked_slot_makes_it_the_most_recent(policy: EvictionPolicy, use: str) -> None:
    assert policy.evict(lambda slot: slot == 0, ()) == 1
    getattr(policy, use)(0)
    policy.unpark(0)
    assert drain(policy) == [2, 3, 4, 0]


def test_a_slot_still_held_is_parked_again_after_a_touch(policy: EvictionPolicy) -> None:
    assert policy.evict(lambda slot: slot == 0, ()) == 1
    policy.touch(0)
    assert drain(policy, held=lambda slot: slot == 0) == [2, 3, 4]
    assert len(policy) == 1


def test_spared_slots_stay_and_keep_their_order(policy: EvictionPolicy) -> None:
    spared = {0, 1, 3}
    assert drain(policy, spared=spared) == [2, 4]
    assert drain(policy) == [0, 1, 3]


def test_a_spared_and_held_slot_is_refreshed_not_parked(policy: EvictionPolicy) -> None:
    assert policy.evict(lambda slot: slot == 0, {0}) == 1
    assert drain(policy) == [2, 3, 4, 0]


def test_nothing_is_found_among_held_and_spared(policy: EvictionPolicy) -> None:
    assert policy.evict(lambda slot: slot < 2, {2, 3, 4}) is None
    assert len(policy) == 5


def test_evictions_of_one_allocation_do_not_walk_its_own_request_again() -> None:
    """ARC wants a slot of *once*, which has the request's own only: each of 100 evictions must not go round there."""
    policy = Arc(Columns(200), BATCH)
    for slot in range(200):
        policy.insert(slot, digest_of(slot))
    for slot in range(100):
        policy.touch(slot)
    asked = 0

    class Own(Container[int]):
        def __contains__(self, slot: object) -> bool:
            nonlocal asked
            asked += 1
            return isinstance(slot, int) and slot >= 100

    spared = Own()
    assert [policy.evict(free, spared) for _ in range(101)] == [*range(100), None]
    assert asked == 200


def test_resize_keeps_the_order_and_forgets_what_lies_beyond(policy: EvictionPolicy) -> None:
    assert policy.evict(lambda slot: slot == 4, {0, 1, 2, 3}) is None
    policy.resize(1000)
    policy.insert(999, digest_of(999))
    policy.resize(3)
    policy.check_invariants()
    assert len(policy) == 3
    policy.resize(5)
    policy.insert(4, digest_of(4))
    assert drain(policy) == [0, 1, 2, 4]


def test_a_class_without_slots_has_no_victim(policy: EvictionPolicy) -> None:
    policy.resize(0)
    policy.check_invariants()
    assert (len(policy), policy.coldest(), policy.evict(free, ())) == (0, None, None)
    assert not any(policy.is_ghost(digest_of(key)) for key in range(10))


@pytest.mark.parametrize(
    "mistake", [lambda p: p.insert(4, 0), lambda p: p.touch(7), lambda p: p.refresh(7), lambda p: p.remove(7)]
)
def test_a_callers_mistake_is_told(policy: EvictionPolicy, mistake: Callable[[EvictionPolicy], None]) -> None:
    with pytest.raises(AssertionError):
        mistake(policy)


def test_inserting_in_order_of_last_use_restores_the_order(policy: EvictionPolicy) -> None:
    for slot in (1, 4, 0):
        policy.refresh(slot)
    restored = type(policy)(Columns(8), INTERACTIVE)  # type: ignore[call-arg]
    for slot in (2, 3, 1, 4, 0):
        restored.insert(slot, digest_of(slot))
    assert drain(restored) == drain(policy)


def test_arcs_target_is_no_more_than_it_has_slots() -> None:
    """It learns that two slots of *once* are right; when one slot is left, a ghost of *again* makes that none."""
    policy = Arc(Columns(8), BATCH)
    for slot in range(8):
        policy.insert(slot, digest_of(slot))
    for slot in range(4, 8):
        policy.touch(slot)
    for slot in range(2):
        assert policy.evict(free, ()) == slot
        policy.insert(slot, digest_of(slot))
    assert policy.evict(free, ()) == 4, "two slots of once should be left alone"
    for slot in (0, 1, 2, 3, 5, 6, 7):
        policy.remove(slot)
    policy.insert(4, digest_of(4))
    policy.insert(0, digest_of(9))
    assert policy.evict(free, ()) == 0


# --- priorities -----------------------------------------------------------------------------------------------------


def mixed(kind: str) -> Eviction:
    """Slots 0-2 stored by batch, 3-5 by interactive requests, one after the other."""
    eviction = make_eviction(kind, 6)
    for slot in range(6):
        eviction.insert(slot, digest_of(slot), BATCH if slot < 3 else INTERACTIVE)
    return eviction


@pytest.mark.parametrize("kind", KINDS)
def test_the_lowest_priority_goes_first_however_hot(kind: str) -> None:
    eviction = mixed(kind)
    for slot in (2, 1, 0):
        eviction.touch(slot)
    assert eviction.coldest() == 2
    assert [eviction.evict(INTERACTIVE, free, ()) for _ in range(7)] == [2, 1, 0, 3, 4, 5, None]
    assert eviction.coldest() is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_allocation_never_evicts_above_its_own_priority(kind: str) -> None:
    eviction = mixed(kind)
    assert [eviction.evict(BATCH, free, {1}) for _ in range(3)] == [0, 2, None]
    assert eviction.evict(BATCH, lambda slot: slot == 1, ()) is None
    eviction.check_invariants()
    assert (len(eviction), eviction.coldest()) == (4, 3)
    eviction.unpark(1)
    assert (len(eviction), eviction.coldest()) == (4, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ghost_of_another_priority_ends_with_the_next_store(kind: str) -> None:
    eviction = mixed(kind)
    assert eviction.evict(BATCH, free, ()) == 0
    assert eviction.is_ghost(digest_of(0))
    eviction.insert(0, digest_of(0), INTERACTIVE)
    eviction.check_invariants()
    assert not eviction.is_ghost(digest_of(0))
    assert [eviction.evict(INTERACTIVE, free, ()) for _ in range(2)] == [1, 2]


def test_settings_name_the_policy() -> None:
    with pytest.raises(ValueError, match="'fifo'; it can be arc or lru"):
        make_eviction("fifo", 1)


# --- step by step against a model -----------------------------------------------------------------------------------


class Steps(RuleBasedStateMachine):
    """What the node may do, in any order; after each step both answer every question alike."""

    kind = "lru"

    @initialize(capacity=st.integers(0, 12), seed=st.integers(0, 2**16), warm=st.sampled_from([0, 40, 200]))
    def start(self, capacity: int, seed: int, warm: int) -> None:
        """`warm` requests first, so that there are ghosts and ARC has learnt something."""
        self.real = make_eviction(self.kind, capacity)
        self.model = Model(self.kind, capacity)
        self.held: set[int] = set()
        self.spared: set[int] = set()
        rng = random.Random(seed)
        for _ in range(warm if capacity else 0):
            key = min(rng.randrange(41), rng.randrange(41))
            slots = {self.model.digests[slot]: slot for slot in self.model.tracked()}
            slot = slots.get(digest_of(key))
            if slot is not None:
                self.real.touch(slot)
                self.model.touch(slot)
                continue
            slot = len(slots) if len(slots) < capacity else self.model.evict(INTERACTIVE, set(), set())
            assert slot is not None
            assert len(slots) < capacity or self.real.evict(INTERACTIVE, free, ()) == slot
            self.real.insert(slot, digest_of(key), Priority(key % 5 > 0))
            self.model.insert(slot, digest_of(key), Priority(key % 5 > 0))

    def some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.model.tracked()))

    def tracks_some(self) -> bool:
        return bool(self.model.tracked())

    @rule(data=st.data(), key=st.integers(0, 40), priority=st.sampled_from(Priority))
    def insert(self, data: st.DataObject, key: int, priority: Priority) -> None:
        """A slot is sealed; keys are few, so that ghosts come back."""
        tracked = self.model.tracked()
        empty = [slot for slot in range(self.model.capacity) if slot not in tracked]
        if empty and digest_of(key) not in [self.model.digests[slot] for slot in tracked]:
            slot = data.draw(st.sampled_from(empty))
            self.real.insert(slot, digest_of(key), priority)
            self.model.insert(slot, digest_of(key), priority)

    @precondition(tracks_some)
    @rule(data=st.data(), what=st.sampled_from(["touch", "refresh", "unpark"]))
    def use(self, data: st.DataObject, what: str) -> None:
        slot = self.some(data)
        getattr(self.real, what)(slot)
        getattr(self.model, what)(slot)

    @precondition(tracks_some)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        slot = self.some(data)
        self.real.remove(slot)
        self.model.take(slot)
        self.held.discard(slot)

    @precondition(tracks_some)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        self.held.add(self.some(data))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        self.held.remove(slot)
        self.real.unpark(slot)
        self.model.unpark(slot)

    @rule(spared=st.sets(st.integers(0, 12)))
    def begin_allocation(self, spared: set[int]) -> None:
        self.spared = spared

    @rule(priority=st.sampled_from(Priority), times=st.integers(1, 6))
    def evict(self, priority: Priority, times: int) -> None:
        """Several victims; the container of what is spared stays the same until the next allocation."""
        for _ in range(times):
            slot = self.real.evict(priority, self.held.__contains__, self.spared)
            assert slot == self.model.evict(priority, self.held, self.spared)
            self.alike()

    @rule(capacity=st.integers(0, 24))
    def resize(self, capacity: int) -> None:
        self.real.resize(capacity)
        self.model.resize(capacity)
        self.held &= set(range(capacity))

    @invariant()
    def alike(self) -> None:
        self.real.check_invariants()
        assert len(self.real) == len(self.model.tracked())
        assert self.real.coldest() == self.model.coldest()
        ghosts = {digest for known in self.model.ghosts.values() for digest in known}
        assert {digest_of(key) for key in range(41) if self.real.is_ghost(digest_of(key))} == ghosts


class ArcSteps(Steps):
    kind = "arc"


Steps.TestCase.settings = ArcSteps.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestLruStepByStep = Steps.TestCase
TestArcStepByStep = ArcSteps.TestCase


# --- whole traces ---------------------------------------------------------------------------------------------------


class Cache:
    """A cache of keys on top of Eviction: evict when full, then insert, as the node does."""

    def __init__(self, kind: str, capacity: int) -> None:
        self.eviction = make_eviction(kind, capacity)
        self.empty = list(range(capacity))
        self.slots: dict[int, int] = {}
        self.keys: dict[int, int] = {}

    def request(self, key: int) -> bool:
        if key in self.slots:
            self.eviction.touch(self.slots[key])
            return True
        slot = self.empty.pop() if self.empty else self.eviction.evict(INTERACTIVE, free, ())
        assert slot is not None
        self.slots.pop(self.keys.get(slot, -1), None)
        self.slots[key], self.keys[slot] = slot, key
        self.eviction.insert(slot, digest_of(key), INTERACTIVE)
        return False


def trace(seed: int, length: int, keys: int) -> list[int]:
    """Scans among draws with a long tail, whose favourites change half way: what moves ARC's target both ways."""
    rng = random.Random(seed)
    found: list[int] = []
    while len(found) < length:
        if rng.random() < 0.03:
            start = rng.randrange(keys)
            found.extend(key % keys for key in range(start, start + keys // 4))
        favourite = int(keys * rng.random() ** 4)
        found.append((favourite + (keys // 2 if len(found) > length // 2 else 0)) % keys)
    return found[:length]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 2, 7, 50, 200])
def test_lru_hits_exactly_what_an_ordered_dict_hits(seed: int, capacity: int) -> None:
    requests = trace(seed, 5000, 400)
    cache, plain = Cache("lru", capacity), PlainLru(capacity)
    assert [cache.request(key) for key in requests] == [plain.request(key) for key in requests]
    cache.eviction.check_invariants()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 2, 7, 50, 200])
def test_arc_hits_exactly_what_the_papers_hits(seed: int, capacity: int) -> None:
    """Adapting after the eviction, as we must, but nothing else changed: same hits, ghosts and target."""
    requests = trace(seed, 5000, 400)
    cache, paper = Cache("arc", capacity), PaperArc(capacity, late=True)
    assert [cache.request(key) for key in requests] == [paper.request(key) for key in requests]
    cache.eviction.check_invariants()
    ghosts = {key for key in range(400) if cache.eviction.is_ghost(digest_of(key))}
    assert ghosts == {*paper.b1, *paper.b2}
    assert set(cache.slots) == {*paper.t1, *paper.t2}


@pytest.mark.parametrize("capacity", [7, 50, 200])
def test_adapting_after_the_eviction_costs_next_to_nothing(capacity: int) -> None:
    """Hit rates within half a point of the paper's own order, over all seeds."""
    ours = papers = length = 0
    for seed in range(5):
        requests = trace(seed, 5000, 400)
        cache, paper = Cache("arc", capacity), PaperArc(capacity, late=False)
        ours += sum(map(cache.request, requests))
        papers += sum(map(paper.request, requests))
        length += len(requests)
    assert abs(ours - papers) <= 0.005 * length


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=30), st.integers(1, 12))
def test_lru_fed_tail_first_gives_up_leaves_first(paths: list[list[int]], capacity: int) -> None:
    """Requests are paths in a tree; no chunk is ever evicted while one behind it is resident."""
    eviction = make_eviction("lru", capacity)
    resident: dict[tuple[int, ...], int] = {}

    def evict(priority: Priority, spared: Container[int]) -> int | None:
        slot = eviction.evict(priority, free, spared)
        victim = next((path for path, place in resident.items() if place == slot), None)
        if victim is not None:
            del resident[victim]
            deeper = [path for path in resident if path[: len(victim)] == victim]
            assert not deeper, f"{victim} went before {deeper}"
        return slot

    for steps in paths:
        path = [tuple(steps[: depth + 1]) for depth in range(len(steps))]
        own = {resident[node] for node in path if node in resident}
        for node in reversed(path):
            if node in resident:
                eviction.touch(resident[node])
        stored: list[tuple[tuple[int, ...], int]] = []
        for node in path:
            if node not in resident:
                taken = {*resident.values(), *(slot for _node, slot in stored)}
                empty = [slot for slot in range(capacity) if slot not in taken]
                slot = empty[0] if empty else evict(INTERACTIVE, own)
                if slot is None:
                    break
                stored.append((node, slot))
        for node, slot in reversed(stored):
            resident[node] = slot
            eviction.insert(slot, digest_of(int("1" + "".join(map(str, node)))), INTERACTIVE)
        for node in reversed(path):
            if node in resident:
                eviction.refresh(resident[node])
    while evict(INTERACTIVE, ()) is not None:
        pass


VICTIMS = """
import random
from cachesvc.core.eviction import make_eviction
from cachesvc.types import Priority
rng, eviction, victims = random.Random(3), make_eviction("arc", 50), []
for slot in range(50):
    eviction.insert(slot, rng.getrandbits(6) << 58, Priority(slot % 2))
for _ in range(500):
    eviction.touch(rng.randrange(50))
    victims.append(eviction.evict(Priority.INTERACTIVE, lambda slot: slot == 7, set(range(10))))
    eviction.insert(victims[-1], rng.getrandbits(6) << 58, Priority(rng.randrange(2)))
print(victims)
"""


def test_the_seed_of_hashes_changes_no_victim() -> None:
    outputs: Sequence[bytes] = [
        subprocess.run(
            [sys.executable, "-c", VICTIMS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].split(b","))) > 10
