"""What a request may load, step by step, against a session that says what a test wants. Transfers: another file."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.kv_offload.base import Locality, Medium, ReqContext, ScheduleEndContext, TierFilter, TierMatcher

from cachesvc.client.channel import State
from cachesvc.connector.metrics import HITS, MISSES
from cachesvc.connector.requests import CLAIM_S, Stage
from cachesvc.types import KeyState
from tests.support.kv import chain
from tests.support.managers import KEYS, STEP, Bench

# --- peek, then claim -----------------------------------------------------------------------------------------------


def test_a_peek_takes_no_lease_and_the_claim_is_one_call() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = bench.arrive("r", KEYS)
    assert bench.session.peeks == [(1, True)]
    assert bench.session.leases == set()
    assert bench.hits(context, KEYS) == [False] * 4
    assert bench.ready("r")
    assert len(bench.session.leases) == 1
    assert bench.hits(context, KEYS) == [True] * 4
    assert bench.counted(HITS) == {"": 4}


def test_not_ready_until_the_answer_is_there() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    bench.session.prompt = False
    context = bench.arrive("r", KEYS)
    assert not bench.ready("r")
    assert not bench.ready("r")
    assert len(bench.session.peeks) == 1
    bench.session.answer()
    assert bench.ready("r")
    assert bench.hits(context, KEYS) == [True] * 4


def test_only_the_leading_run_is_leased() -> None:
    bench = Bench()
    bench.session.put([*KEYS[:2], KEYS[3]])
    context = bench.claimed("r", KEYS)
    assert bench.hits(context, KEYS) == [True, True, False, False]
    assert bench.counted(HITS) == {"": 2}


def test_misses_are_counted_by_reason() -> None:
    bench = Bench()
    bench.session.put(KEYS[:1])
    bench.session.put(KEYS[1:2], KeyState.EVICTED)
    bench.claimed("r", KEYS)
    assert bench.counted(MISSES) == {"evicted": 1, "never_stored": 2}


def test_what_vllm_has_itself_is_neither_leased_nor_counted() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = bench.claimed("r", KEYS, computed=32)
    assert bench.hits(context, KEYS) == [False, False, True, True]
    assert bench.counted(HITS) == {"": 2}
    everything = bench.claimed("s", KEYS, computed=64)
    assert bench.hits(everything, KEYS) == [False] * 4
    assert bench.stats() is None


def test_blocks_that_vllm_has_lost_meanwhile_are_claimed_too() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = bench.claimed("r", KEYS, computed=32)
    first = set(bench.session.leases)
    assert not bench.ready("r", 16), "it asks again"
    assert bench.ready("r", 16)
    assert bench.hits(context, KEYS) == [False, True, True, True]
    assert bench.session.leases.isdisjoint(first)
    assert bench.ready("r", 48)
    assert bench.hits(context, KEYS) == [False, True, True, True]


def test_short_hits_are_not_loaded() -> None:
    bench = Bench(minimum=33)
    bench.session.put(KEYS)
    assert bench.hits(bench.claimed("long", KEYS), KEYS) == [True] * 4
    bench.stats()
    assert bench.hits(bench.claimed("short", KEYS, computed=32), KEYS) == [False] * 4
    assert bench.counted(MISSES) == {"filtered": 1}
    assert len(bench.session.leases) == 1


def test_one_question_at_a_time_and_who_is_asked_for_comes_first() -> None:
    bench = Bench()
    bench.session.prompt = False
    for name in "abcd":
        bench.arrive(name, KEYS)
    assert [request for request, _ in bench.session.peeks] == [1]
    assert not bench.ready("c")
    assert [request for request, _ in bench.session.peeks] == [1]
    bench.session.answer()
    assert not bench.ready("c")
    assert [request for request, _ in bench.session.peeks] == [1, 3]
    bench.session.answer()
    bench.manager.on_schedule_end(STEP)
    assert [request for request, _ in bench.session.peeks] == [1, 3, 2]
    bench.session.answer()
    assert bench.ready("c")
    assert bench.ready("a")
    assert bench.ready("b")


def test_a_request_is_touched_once() -> None:
    bench = Bench()
    bench.claimed("r", KEYS)
    bench.manager.requests.scheduled("r", loads=False)
    assert not bench.ready("r")
    assert bench.ready("r")
    assert bench.session.peeks == [(1, True), (1, False)]


def test_an_old_answer_is_asked_for_again() -> None:
    bench = Bench()
    context = bench.arrive("r", KEYS)
    bench.manager.on_schedule_end(STEP)
    bench.session.put(KEYS)
    bench.clock.now += 0.2
    assert not bench.ready("r")
    assert bench.ready("r")
    assert len(bench.session.peeks) == 2
    assert bench.hits(context, KEYS) == [True] * 4


def test_a_question_that_could_not_be_asked_is_asked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.session.put(KEYS)
    really = bench.session.peek
    monkeypatch.setattr(bench.session, "peek", lambda *_, **__: None)
    bench.arrive("r", KEYS)
    assert not bench.ready("r")
    monkeypatch.setattr(bench.session, "peek", really)
    assert not bench.ready("r")
    assert bench.ready("r")
    assert bench.session.peeks == [(1, True)]


def test_an_adapter_is_in_the_keys() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    bench.session.there[0, b"a" * 16 + KEYS[0][:-4]] = KeyState.RAM
    assert bench.hits(bench.claimed("base", KEYS), KEYS) == [True] * 4
    context = bench.arrive("lora", KEYS, adapter=lambda: b"a" * 16)
    while not bench.ready("lora"):
        pass
    assert bench.hits(context, KEYS) == [True, False, False, False]
    output = bench.manager.prepare_store(KEYS[:2], context)
    assert output.keys_to_store == KEYS[1:2]
    bench.manager.settle({output.store_spec.number: (1, 0)})
    assert bench.session.sealed == [b"a" * 16 + KEYS[1][:-4]]


def test_an_adapter_that_is_overwritten_while_its_request_runs_stores_nothing() -> None:
    bench = Bench()
    digest: bytes | None = b"a" * 16
    context = bench.arrive("lora", KEYS, adapter=lambda: digest)
    assert bench.manager.prepare_store(KEYS[:1], context).keys_to_store == KEYS[:1]
    for digest in (b"b" * 16, None):  # noqa: B007 - read by the request
        assert bench.manager.prepare_store(KEYS[1:], context).keys_to_store == []


def test_an_adapter_that_nobody_knows_is_not_cached() -> None:
    bench = Bench()
    bench.session.put(KEYS)

    def unreadable() -> bytes | None:
        raise OSError(5, "x")

    for adapter in (lambda: None), unreadable:
        context = bench.arrive("lora", KEYS, adapter=adapter)
        assert bench.ready("lora")
        assert bench.hits(context, KEYS) == [False] * 4
        assert bench.manager.prepare_store(KEYS, context).keys_to_store == []


def test_an_idle_engine_waits_a_moment_for_the_answer() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    bench.session.prompt = False
    bench.arrive("r", KEYS)
    bench.manager.requests.idle = True
    heard: list[float] = []

    def listen() -> None:
        bench.clock.now += 0.0001
        heard.append(bench.clock.now)
        if len(heard) == 3:
            bench.session.answer()

    bench.session.channel.listen = listen  # type: ignore[method-assign]
    assert bench.ready("r")
    bench.arrive("s", KEYS)
    heard += [0.0] * 3
    began = bench.clock.now
    assert not bench.ready("s"), "but not for long"
    assert bench.clock.now < began + 0.002
    assert not bench.ready("s")
    assert len(heard) < 20, "and not again in the next step"


def test_a_request_that_did_not_arrive_has_nothing() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = ReqContext("unknown adapter")
    bench.manager.on_new_request(context)
    assert bench.manager.requests.ready("unknown adapter", lambda: [KEYS], 0)
    assert bench.hits(context, KEYS) == [False] * 4
    assert bench.manager.prepare_store(KEYS, context).keys_to_store == []
    assert bench.manager.prepare_load(KEYS, context).lost
    bench.manager.on_request_finished(context)
    assert bench.session.peeks == []


@pytest.mark.parametrize(
    ("params", "loads"),
    [
        ({"kv_transfer_params": {"max_load_tokens": 31}}, False),
        ({"kv_transfer_params": {"max_load_tokens": 32}}, True),
        ({"kv_transfer_params": {"max_load_tokens": True}}, True),
        ({"kv_transfer_params": {"max_load_tokens": "0"}}, True),
        ({"kv_transfer_params": {}}, True),
        ({"load_tier_filter": TierFilter((TierMatcher(Medium.STORAGE, None),))}, False),
        ({"load_tier_filter": TierFilter((TierMatcher(None, Locality.LOCAL),))}, True),
        ({"load_tier_filter": TierFilter(())}, False),
    ],
)
def test_users_may_opt_out_of_loading(params: dict[str, Any], loads: bool) -> None:
    bench = Bench(minimum=32)
    bench.session.put(KEYS)
    context = bench.arrive("r", KEYS, **params)
    while not bench.ready("r"):
        pass
    assert bench.hits(context, KEYS) == [loads] * 4
    assert len(bench.session.peeks) == loads
    assert bench.manager.prepare_store(chain("own", 1), context).keys_to_store == chain("own", 1)


# --- leases end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["scheduled", "preempted", "stepped", "finished", "reset", "shutdown", "paused"])
def test_leases_are_released_when_nothing_is_loaded(end: str) -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = bench.claimed("r", KEYS)
    assert not bench.clean()
    match end:
        case "scheduled":
            bench.manager.requests.scheduled("r", loads=False)
        case "preempted":
            bench.manager.requests.preempted(["r", "nobody"])
        case "stepped":
            bench.manager.on_schedule_end(ScheduleEndContext((), ["r"]))
        case "finished":
            bench.manager.on_request_finished(context)
            bench.manager.on_request_finished(context)
        case "reset":
            bench.manager.reset_cache()
        case "shutdown":
            bench.manager.shutdown()
            assert bench.membership.closed
        case "paused":
            bench.manager.requests._paused_until = bench.clock.now + 1
            assert bench.ready("r")
    assert bench.clean()
    assert bench.hits(context, KEYS) == [False] * 4


def test_the_daemon_hears_which_requests_ended() -> None:
    bench = Bench()
    peeked = bench.claimed("peeked", KEYS)
    stored = bench.arrive("stored", kv_transfer_params={"max_load_tokens": -1})
    bench.store("stored", KEYS)
    silent = bench.arrive("silent", kv_transfer_params={"max_load_tokens": -1})
    for context in (peeked, stored, silent):
        bench.manager.on_request_finished(context)
    assert bench.session.ended == [1, 2]


def test_a_request_that_ends_while_it_is_asked_for_frees_the_line() -> None:
    bench = Bench()
    bench.session.prompt = False
    first, _ = bench.arrive("a", KEYS), bench.arrive("b", KEYS)
    bench.manager.on_request_finished(first)
    bench.manager.on_schedule_end(STEP)
    assert [request for request, _ in bench.session.peeks] == [1, 2]
    bench.session.answer()
    assert bench.ready("b")


def test_a_request_that_ends_in_the_queue_is_not_asked_for() -> None:
    bench = Bench()
    bench.session.prompt = False
    bench.arrive("a", KEYS)
    second = bench.arrive("b", KEYS)
    bench.manager.on_request_finished(second)
    bench.session.answer()
    bench.manager.on_schedule_end(STEP)
    assert [request for request, _ in bench.session.peeks] == [1]


def test_a_preempted_request_finds_its_chunks_again() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    bench.claimed("r", KEYS)
    bench.manager.requests.scheduled("r", loads=False)
    bench.manager.requests.preempted(["r"])
    assert not bench.ready("r")
    assert bench.ready("r")
    assert bench.hits(ReqContext("r"), KEYS) == [True] * 4


# --- chunks that are being written ----------------------------------------------------------------------------------


def test_a_chunk_that_is_being_written_is_waited_for() -> None:
    bench = Bench()
    bench.session.put(KEYS[:2])
    bench.session.put(KEYS[2:], KeyState.PENDING)
    context = bench.arrive("r", KEYS)
    for _ in range(50):
        assert not bench.ready("r")
        bench.clock.now += 0.01
    assert 10 < len(bench.session.peeks) <= 50
    assert bench.clean(), "waiting pins nothing"
    bench.session.put(KEYS)
    while not bench.ready("r"):
        bench.clock.now += 0.01
    assert bench.hits(context, KEYS) == [True] * 4
    assert bench.counted(HITS) == {"": 4}


def test_waiting_for_a_writer_asks_not_more_often_than_every_few_ms() -> None:
    bench = Bench()
    bench.session.put(KEYS, KeyState.PENDING)
    bench.arrive("r", KEYS)
    for _ in range(20):
        assert not bench.ready("r")
    assert len(bench.session.peeks) == 1


@pytest.mark.parametrize("step", [0.001, 0.05, 0.7, 3.0])
def test_a_writer_that_takes_too_long_is_not_waited_for(step: float) -> None:
    """What there is is loaded; the daemon has answered everything, so it has missed nothing."""
    bench = Bench()
    bench.session.put(KEYS[:2])
    bench.session.put(KEYS[2:], KeyState.PENDING)
    context = bench.arrive("r", KEYS)
    began = bench.clock.now
    while not bench.ready("r"):
        bench.clock.now += step
        assert bench.clock.now < began + 2 + 4 * step + 0.1
    assert bench.clock.now >= began + 2
    assert bench.session.channel.misses == 0
    assert bench.hits(context, KEYS) == [True, True, False, False]
    stats = bench.stats()
    assert stats is not None
    assert stats.data["data"][HITS] == {(): 2}
    assert stats.data["data"][MISSES] == {("pending_timeout",): 2}


def test_a_writer_that_gave_up_is_not_waited_for() -> None:
    bench = Bench()
    bench.session.put(KEYS, KeyState.PENDING)
    bench.arrive("r", KEYS)
    assert not bench.ready("r")
    bench.session.put(KEYS, KeyState.NEVER_STORED)
    bench.clock.now += 0.01
    assert not bench.ready("r")
    assert bench.ready("r")


def test_a_writer_behind_the_gap_is_not_waited_for() -> None:
    bench = Bench()
    bench.session.put(KEYS[:1])
    bench.session.put(KEYS[2:], KeyState.PENDING)
    bench.arrive("r", KEYS)
    assert bench.ready("r")


# --- the daemon is away ---------------------------------------------------------------------------------------------


def test_a_daemon_that_does_not_answer_costs_one_deadline() -> None:
    bench = Bench(deadline=0.5)
    bench.session.prompt = False
    bench.arrive("r", KEYS)
    assert not bench.ready("r")
    bench.clock.now += 0.4
    assert not bench.ready("r")
    assert bench.session.channel.misses == 0
    bench.clock.now += 0.2
    assert bench.ready("r")
    assert bench.session.channel.misses == 1
    assert bench.counted(MISSES) == {"deadline": 4}
    bench.arrive("s", KEYS)
    assert bench.ready("s"), "it is known to be down"
    assert bench.counted(MISSES) == {"daemon_down": 4}
    bench.session.channel.state = State.UP
    bench.session.prompt = True
    bench.arrive("t", KEYS)
    assert bench.ready("t")


def test_a_slow_step_of_the_engine_is_not_the_daemons() -> None:
    """Asked only after the step: a deadline has passed since, the daemon has hardly heard the question."""
    bench = Bench(deadline=0.5)
    bench.session.put(KEYS)
    bench.session.prompt = False
    bench.arrive("a", KEYS)
    context = bench.arrive("b", KEYS)
    assert not bench.ready("b")
    bench.clock.now += 3
    bench.session.answer()
    assert not bench.ready("b")
    assert bench.session.channel.misses == 0
    bench.clock.now += 3
    bench.session.answer()
    assert bench.ready("b")
    assert bench.hits(context, KEYS) == [True] * 4


def test_but_it_does_not_wait_forever_either() -> None:
    bench = Bench(deadline=0.5)
    bench.session.prompt = False
    bench.arrive("a", KEYS)
    bench.arrive("b", KEYS)
    assert not bench.ready("b")
    bench.clock.now += 3
    bench.session.answer()
    assert not bench.ready("b")
    bench.clock.now += CLAIM_S * 2
    assert bench.ready("b")
    assert bench.session.channel.misses == 1


def test_down_in_the_middle_of_waiting() -> None:
    bench = Bench()
    bench.session.prompt = False
    context = bench.arrive("r", KEYS)
    assert not bench.ready("r")
    bench.session.channel.state = State.DOWN
    assert bench.ready("r")
    assert bench.hits(context, KEYS) == [False] * 4
    assert bench.counted(MISSES) == {"daemon_down": 4}
    bench.manager.requests.scheduled("r", loads=False)
    bench.session.channel.state = State.UP
    bench.session.put(KEYS)
    bench.session.prompt = True
    assert not bench.ready("r")
    assert bench.ready("r")
    assert bench.hits(context, KEYS) == [True] * 4


def test_a_lease_that_gets_no_answer_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.session.put(KEYS)
    context = bench.arrive("r", KEYS)
    bench.manager.on_schedule_end(STEP)
    lease = bench.session.lease

    def falls(*arguments: Any, **more: Any) -> Any:
        bench.session.channel.state = State.DOWN
        return lease(*arguments, **more)

    monkeypatch.setattr(bench.session, "lease", falls)
    assert bench.ready("r")
    assert bench.hits(context, KEYS) == [False] * 4


def test_no_session_yet_and_none_any_more() -> None:
    bench = Bench()
    bench.session.put(KEYS)
    bench.membership._sessions = [None, bench.session]
    context = bench.arrive("early", KEYS)
    assert bench.ready("early")
    assert bench.hits(context, KEYS) == [False] * 4
    assert bench.manager.prepare_store(KEYS, context).keys_to_store == []
    bench.membership.renew()
    assert bench.ready("early"), "it is final until the request is scheduled"
    bench.manager.requests.scheduled("early", loads=False)
    assert not bench.ready("early")
    assert bench.ready("early")
    assert bench.hits(context, KEYS) == [True] * 4
    bench.membership._sessions = [None]
    assert bench.ready("early")
    assert bench.hits(context, KEYS) == [False] * 4
    assert bench.clean()


def test_stages_are_those_of_the_drawing() -> None:
    bench = Bench()
    bench.session.prompt = False

    def stage() -> Stage:
        return bench.manager.requests._requests["r"].stage

    bench.manager.requests.arrive("r", None)
    assert stage() is Stage.IDLE
    bench.arrive("other", KEYS)
    bench.arrive("r", KEYS)
    assert stage() is Stage.QUEUED
    bench.session.answer()
    bench.manager.on_schedule_end(STEP)
    assert stage() is Stage.ASKED
    bench.session.answer()
    bench.manager.on_schedule_end(STEP)
    assert stage() is Stage.KNOWN
    assert bench.ready("r")
    assert stage() is Stage.READY
    bench.manager.requests.scheduled("r", loads=False)
    assert stage() is Stage.IDLE
