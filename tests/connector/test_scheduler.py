"""Loads and stores of one KV group and of several, and what becomes of them; the session says what a test wants."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.kv_offload.base import ReqContext, make_offload_key

from cachesvc.client.channel import State
from cachesvc.connector.metrics import FAILED, LOADS, MISSES, REFUSED, STORES
from cachesvc.connector.requests import FAILURES_MAX, PAUSE_S, Group
from cachesvc.types import AllocateState, KeyState
from tests.support.kv import block_hash, chain
from tests.support.managers import KEYS, STEP, Bench

# --- several groups -------------------------------------------------------------------------------------------------

FULL, WINDOW = Group(0, 16, True), Group(1, 16, False)


def test_a_window_may_have_holes() -> None:
    bench = Bench(FULL, WINDOW)
    window = chain("p", 4, group=1)
    bench.session.put([*KEYS, window[1], window[3]])
    context = bench.claimed("r", KEYS, window)
    assert bench.hits(context, KEYS) == [True] * 4
    assert bench.hits(context, window) == [False, True, False, True]
    spec = bench.manager.prepare_load([*KEYS, window[3]], context)
    assert [len(group.slots) for group in spec.groups] == [4, 1]
    assert spec.groups[1].extents == [1]
    assert spec.tickets == []
    assert not spec.lost
    bench.manager.settle({spec.number: (1, 0)})
    assert bench.clean()


def test_windows_are_leased_up_to_the_run_only() -> None:
    bench = Bench(FULL, WINDOW)
    window = chain("p", 4, group=1)
    bench.session.put([*KEYS[:2], *window])
    context = bench.claimed("r", KEYS, window)
    assert bench.hits(context, window) == [True, True, False, False]


def test_the_shortest_run_of_all_full_groups_counts() -> None:
    bench = Bench(FULL, Group(3, 32, True))
    coarse = chain("p", 2, group=3)
    bench.session.put(KEYS)
    bench.session.there[1, coarse[0][:-4]] = KeyState.RAM
    context = bench.claimed("r", KEYS, coarse)
    assert bench.hits(context, KEYS) == [True, True, False, False]
    assert bench.hits(context, coarse) == [True, False]
    spec = bench.manager.prepare_load([*KEYS[:2], coarse[0]], context)
    assert [len(group.slots) for group in spec.groups] == [2, 1], "vLLM's group 3 is our second"


def test_coarser_chunks_are_leased_where_the_run_ends_in_them() -> None:
    bench = Bench(Group(0, 48, True), FULL)
    coarse, fine = chain("c", 2), chain("f", 6, group=1)
    bench = Bench(Group(0, 48, True), Group(1, 16, True))
    bench.session.put([*coarse, *fine[:4]])
    context = bench.claimed("r", coarse, fine)
    assert bench.hits(context, coarse) == [True, True], "the run of 64 tokens ends in the second"
    assert bench.hits(context, fine) == [True] * 4 + [False] * 2


def test_windows_alone() -> None:
    bench = Bench(Group(0, 16, False))
    bench.session.put([KEYS[1], KEYS[3]])
    context = bench.claimed("r", KEYS)
    assert bench.hits(context, KEYS) == [False, True, False, True]


def test_a_pending_chunk_of_a_window_is_not_waited_for() -> None:
    bench = Bench(FULL, WINDOW)
    window = chain("p", 4, group=1)
    bench.session.put(KEYS)
    bench.session.put(window, KeyState.PENDING)
    bench.arrive("r", KEYS, window)
    assert bench.ready("r")


# --- loads ----------------------------------------------------------------------------------------------------------


def test_a_load_holds_its_leases_until_all_ranks_have_told() -> None:
    bench = Bench(ranks=3)
    bench.session.put(KEYS)
    number = bench.load("r", KEYS)
    assert bench.manager.has_pending_work()
    bench.manager.settle({number: (1, 0)})
    bench.manager.settle({number: (1, 0), 777: (1, 1)})
    assert not bench.clean()
    assert bench.manager.has_pending_work()
    bench.manager.settle({number: (1, 0)})
    assert bench.clean()
    assert not bench.manager.has_pending_work()
    assert bench.counted(LOADS) == {"": 4}
    bench.manager.settle({number: (1, 0)})
    assert bench.stats() is None


def test_a_load_outlives_its_request_and_a_reset() -> None:
    bench = Bench(sessions=2)
    bench.session.put(KEYS)
    number = bench.load("r", KEYS)
    bench.manager.on_request_finished(ReqContext("r"))
    bench.manager.reset_cache()
    assert not bench.clean()
    bench.manager.settle({number: (1, 0)})
    assert bench.clean()


def test_a_lease_that_was_lost_fails_from_the_beginning() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    bench.session.lost_next = True
    context = bench.claimed("r", KEYS)
    spec = bench.manager.prepare_load(KEYS, context)
    assert spec.lost
    bench.manager.settle({spec.number: (0, 1)})
    assert bench.clean()


def test_a_load_of_what_was_not_leased_fails_from_the_beginning() -> None:
    bench = Bench()
    bench.session.put(KEYS[:2])
    context = bench.claimed("r", KEYS)
    spec = bench.manager.prepare_load(KEYS, context)
    assert spec.lost
    bench.manager.settle({spec.number: (0, 1)})
    assert bench.clean()
    assert bench.manager.prepare_load(KEYS, context).lost, "and a second time"


def test_a_load_says_where_it_is() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = bench.claimed("r", KEYS)
    # the engine's daemon changes before the load is prepared: the places are of the arena in which they were leased
    bench.session.arena = b"b" * 16
    spec = bench.manager.prepare_load(KEYS, context)
    assert (spec.session, spec.arena) == (b"s" * 16, b"a" * 16)
    assert spec.groups[0].slots == [0, 1, 2, 3]


# --- failed loads ---------------------------------------------------------------------------------------------------


def test_a_failed_load_is_not_tried_again_by_its_request() -> None:
    bench = Bench(ranks=2)
    bench.session.put(KEYS)
    number = bench.load("r", KEYS)
    bench.manager.settle({number: (1, 1)})
    assert bench.clean()
    assert bench.counted(FAILED) == {"load": 1}
    for _ in range(3):
        bench.clock.now += 60
        assert not bench.ready("r")
        assert bench.ready("r")
        assert bench.hits(ReqContext("r"), KEYS) == [False] * 4
        assert bench.counted(MISSES) == {"load_failed": 4}
        bench.manager.requests.scheduled("r", loads=False)
    assert bench.clean()


def test_others_do_without_for_a_second() -> None:
    bench = Bench()
    bench.session.put(KEYS + chain("q", 1))
    bench.manager.settle({bench.load("r", KEYS): (0, 1)})
    assert bench.hits(bench.claimed("s", KEYS), KEYS) == [False] * 4
    other = bench.claimed("o", chain("q", 1))
    assert bench.hits(other, chain("q", 1)) == [True]
    bench.clock.now += 1.1
    assert bench.hits(bench.claimed("t", KEYS), KEYS) == [True] * 4


def test_what_failed_behind_a_good_run_leaves_the_run() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = bench.claimed("r", KEYS)
    spec = bench.manager.prepare_load(KEYS[2:], context)
    bench.manager.settle({spec.number: (0, 1)})
    assert bench.hits(bench.claimed("s", KEYS), KEYS) == [True, True, False, False]


def test_doubted_chunks_of_a_window_are_holes() -> None:
    bench = Bench(FULL, WINDOW)
    window = chain("p", 4, group=1)
    bench.session.put(KEYS + window)
    context = bench.claimed("r", KEYS, window)
    spec = bench.manager.prepare_load(window[3:], context)
    bench.manager.settle({spec.number: (0, 1)})
    assert bench.hits(bench.claimed("s", KEYS, window), window) == [True, True, True, False]


def test_three_in_a_row_stop_all_loads_for_a_while() -> None:
    bench = Bench()
    chains = [chain(name, 1) for name in "abcdefgh"]
    for keys in chains:
        bench.session.put(keys)
    for i in range(FAILURES_MAX):
        bench.manager.settle({bench.load(f"r{i}", chains[i]): (0, 1)})
    context = bench.arrive("s", chains[3])
    assert bench.ready("s")
    assert bench.hits(context, chains[3]) == [False]
    bench.manager.requests.scheduled("s", loads=False)
    bench.clock.now += PAUSE_S - 0.5
    assert bench.ready("s")
    assert bench.hits(context, chains[3]) == [False]
    bench.manager.requests.scheduled("s", loads=False)
    bench.clock.now += 1
    assert not bench.ready("s")
    assert bench.ready("s")
    assert bench.hits(context, chains[3]) == [True]


def test_a_success_between_failures_starts_the_count_again() -> None:
    bench = Bench()
    chains = [chain(f"c{i}", 1) for i in range(9)]
    for keys in chains:
        bench.session.put(keys)
    for i in range(8):
        good = i % FAILURES_MAX == FAILURES_MAX - 1
        bench.manager.settle({bench.load(f"r{i}", chains[i]): (1, 0) if good else (0, 1)})
    assert bench.hits(bench.claimed("s", chains[8]), chains[8]) == [True]


# --- stores ---------------------------------------------------------------------------------------------------------


def test_a_store_is_sealed_when_all_ranks_have_told() -> None:
    bench = Bench(ranks=2)
    output = bench.store("w", KEYS)
    assert output.keys_to_store == KEYS
    spec = output.store_spec
    assert (spec.session, spec.arena, spec.lost) == (b"s" * 16, b"a" * 16, False)
    assert spec.groups[0].slots == [0, 1, 2, 3]
    assert len(spec.tickets) == 1
    bench.manager.settle({spec.number: (1, 0)})
    assert bench.session.sealed == []
    assert bench.manager.has_pending_work()
    bench.manager.settle({spec.number: (1, 0)})
    assert bench.session.sealed == [key[:-4] for key in KEYS]
    assert not bench.manager.has_pending_work()
    assert bench.counted(STORES) == {"": 4}


@pytest.mark.parametrize("told", [[(1, 0), (0, 1)], [(0, 1), (1, 0)], [(0, 2)], [(1, 1)]])
def test_one_failed_rank_aborts_but_only_when_all_have_told(told: list[tuple[int, int]]) -> None:
    bench = Bench(ranks=2)
    number = bench.store("w", KEYS).store_spec.number
    for i, outcome in enumerate(told, 1):
        bench.manager.settle({number: outcome})
        assert bool(bench.session.aborted) == (i == len(told)), "the other may still be writing"
    assert bench.session.aborted == [key[:-4] for key in KEYS]
    assert bench.session.sealed == []
    assert bench.clean()
    assert bench.counted(FAILED) == {"store": 1}


def test_new_chunks_only_in_prefix_order() -> None:
    bench = Bench()
    states = [AllocateState.NEW, AllocateState.PRESENT, AllocateState.BUSY, AllocateState.NEW]
    bench.session.writable = {key[:-4]: state for key, state in zip(KEYS, states, strict=True)}
    output = bench.store("w", KEYS)
    assert output.keys_to_store == [KEYS[0], KEYS[3]]
    assert bench.store("w", chain("more", 1)).keys_to_store == chain("more", 1), "nothing was refused"


def test_what_its_own_question_found_is_not_offered_to_the_daemon() -> None:
    """The blocks of a local hit are offered again; a question was asked when the request came."""
    bench = Bench()
    bench.session.put(KEYS[:3])
    bench.claimed("w", KEYS, computed=48)
    bench.session.writable = {key[:-4]: AllocateState.NEW for key in KEYS}
    assert bench.store("w", KEYS).keys_to_store == KEYS[3:], "the fake would give slots for all of them"
    bench.manager.reset_cache()
    assert bench.store("w", KEYS).keys_to_store == KEYS, "another namespace"


@pytest.mark.parametrize("refusal", [AllocateState.NO_ROOM, AllocateState.RETRY])
def test_nothing_is_stored_behind_a_refused_chunk(refusal: AllocateState) -> None:
    bench = Bench(FULL, WINDOW)
    bench.session.writable = dict.fromkeys([key[:-4] for key in KEYS[2:]], refusal)
    # the fake's clock stands still, so that its patience would never end
    bench.clock.now = float("inf")
    window = chain("p", 4, group=1)
    bench.session.writable |= {window[1][:-4]: AllocateState.NEW}
    output = bench.store("w", KEYS)
    assert output.keys_to_store == KEYS[:2]
    assert bench.counted(REFUSED) == {refusal.name.lower(): 2}
    bench.session.writable = {}
    assert bench.store("w", KEYS[2:]).keys_to_store == []
    assert bench.store("w", window).keys_to_store == window, "other groups go on"
    assert bench.store("other", chain("q", 1)).keys_to_store == chain("q", 1), "and other requests"
    bench.manager.reset_cache()
    assert bench.store("w", KEYS[2:]).keys_to_store == KEYS[2:]


def test_a_refused_window_closes_nothing() -> None:
    bench = Bench(FULL, WINDOW)
    window = chain("p", 2, group=1)
    bench.session.writable = {window[0][:-4]: AllocateState.NO_ROOM, window[1][:-4]: AllocateState.NO_ROOM}
    assert bench.store("w", window).keys_to_store == []
    bench.session.writable = {}
    assert bench.store("w", window).keys_to_store == window


def test_an_extent_that_is_being_made_is_asked_for_again() -> None:
    bench = Bench()
    asked: list[int] = []
    allocate = bench.session.allocate

    def later(run: Any, deadline: float, *, request: int = 0) -> Any:
        asked.append(len(run))
        bench.session.writable = {} if len(asked) > 2 else dict.fromkeys(run.keys[-2:], AllocateState.RETRY)
        bench.clock.now += 0.001
        return allocate(run, deadline, request=request)

    bench.session.allocate = later  # type: ignore[method-assign]
    output = bench.store("w", KEYS)
    assert output.keys_to_store == KEYS
    assert asked == [4, 2, 2]
    assert len(output.store_spec.tickets) == 2
    assert output.store_spec.groups[0].generations == [1, 1, 2, 2]
    bench.manager.settle({output.store_spec.number: (1, 0)})
    assert bench.session.sealed == [key[:-4] for key in KEYS]


def test_patience_with_an_extent_that_is_being_made_ends() -> None:
    bench = Bench()
    allocate = bench.session.allocate

    def never(run: Any, deadline: float, *, request: int = 0) -> Any:
        bench.session.writable = dict.fromkeys(run.keys, AllocateState.RETRY)
        bench.clock.now += 0.001
        return allocate(run, deadline, request=request)

    bench.session.allocate = never  # type: ignore[method-assign]
    began = bench.clock.now
    assert bench.store("w", KEYS).keys_to_store == []
    assert bench.clock.now - began < 0.02


def test_groups_of_one_store() -> None:
    bench = Bench(FULL, Group(5, 16, False))
    window = chain("p", 2, group=5)
    output = bench.store("w", [window[0], *KEYS[:2], window[1]])
    assert output.keys_to_store == [*KEYS[:2], *window]
    assert [len(group.slots) for group in output.store_spec.groups] == [2, 2]
    assert output.store_spec.groups[1].extents == [1, 1]
    assert len(output.store_spec.tickets) == 2


def test_a_store_without_a_daemon() -> None:
    bench = Bench()
    context = bench.arrive("w", [])
    bench.session.channel.state = State.DOWN
    assert bench.store("w", KEYS).keys_to_store == []
    assert bench.counted(REFUSED) == {"retry": 4}
    assert not bench.manager.has_pending_work()
    bench.session.channel.state = State.UP
    assert bench.manager.prepare_store(KEYS, context).keys_to_store == KEYS


def test_a_fault_while_allocating_gives_everything_back() -> None:
    bench = Bench(FULL, WINDOW)
    allocate = bench.session.allocate

    def breaks(run: Any, deadline: float, *, request: int = 0) -> Any:
        if run.group == 1:
            raise ZeroDivisionError
        return allocate(run, deadline, request=request)

    bench.session.allocate = breaks  # type: ignore[method-assign]
    assert bench.store("w", [*KEYS, *chain("p", 1, group=1)]).keys_to_store == []
    assert bench.session.aborted == [key[:-4] for key in KEYS]
    assert not bench.manager.has_pending_work()


def test_a_store_outlives_its_request_and_a_reset() -> None:
    bench = Bench(sessions=2)
    number = bench.store("w", KEYS).store_spec.number
    bench.manager.on_request_finished(ReqContext("w"))
    bench.manager.reset_cache()
    assert bench.membership.renewed == 1
    bench.manager.settle({number: (1, 0)})
    assert bench.sessions[0].sealed == [key[:-4] for key in KEYS], "in the session that wrote it"
    assert bench.sessions[1].sealed == []


def test_a_reset_may_keep_what_there_is() -> None:
    bench = Bench(renew_on_reset=False)
    bench.session.put(KEYS)
    bench.manager.reset_cache()
    assert bench.membership.renewed == 0
    assert bench.hits(bench.claimed("r", KEYS), KEYS) == [True] * 4


def test_after_a_reset_everything_is_asked_in_the_new_session() -> None:
    bench = Bench(sessions=2)
    bench.session.put(KEYS)
    bench.session.prompt = False
    asked = bench.arrive("asked", KEYS)
    bench.arrive("queued", KEYS)
    bench.manager.reset_cache()
    bench.session.answer()
    for name in ("asked", "queued"):
        while not bench.ready(name):
            pass
    assert bench.hits(asked, KEYS) == [False] * 4
    assert [request for request, _ in bench.sessions[1].peeks] == [1, 2]


def test_seals_wait_for_a_daemon_that_is_away() -> None:
    bench = Bench()
    first, second = bench.store("w", KEYS[:2]).store_spec, bench.store("w", KEYS[2:]).store_spec
    bench.session.channel.state = State.DOWN
    bench.manager.settle({first.number: (1, 0)})
    bench.manager.settle({second.number: (1, 0)})
    bench.manager.on_schedule_end(STEP)
    assert bench.manager.has_pending_work()
    assert len(bench.session.writes) == 2
    bench.session.channel.state = State.UP
    bench.manager.on_schedule_end(STEP)
    assert bench.session.sealed == [key[:-4] for key in KEYS]
    assert not bench.manager.has_pending_work()


def test_but_not_forever() -> None:
    bench = Bench()
    number = bench.store("w", KEYS).store_spec.number
    bench.session.channel.state = State.DOWN
    bench.manager.settle({number: (1, 0)})
    bench.clock.now += 29
    bench.manager.on_schedule_end(STEP)
    assert bench.manager.has_pending_work()
    bench.clock.now += 2
    bench.manager.on_schedule_end(STEP)
    assert not bench.manager.has_pending_work()
    assert bench.clean()
    assert bench.counted(FAILED) == {"store": 1}


def test_a_session_that_was_refused_seals_nothing() -> None:
    bench = Bench()
    number = bench.store("w", KEYS).store_spec.number
    bench.session.channel.state = State.DOWN
    bench.session.refusal = "another chunk_bytes"
    bench.manager.settle({number: (1, 0)})
    assert not bench.manager.has_pending_work()


def test_keys_that_no_daemon_takes_harm_nobody_else() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    bad = [make_offload_key(block_hash("x") * 3, 0)]
    context = bench.arrive("bad", bad)
    good = bench.claimed("good", KEYS)
    assert bench.hits(good, KEYS) == [True] * 4
    assert bench.ready("bad")
    assert bench.hits(context, bad) == [False]
    assert bench.store("bad", bad).keys_to_store == []
    unknown = [make_offload_key(block_hash("x"), 9)]
    assert bench.store("good", unknown).keys_to_store == []
    assert bench.manager.prepare_load(unknown, good).lost
