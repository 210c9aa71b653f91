"""Too little room: in the arena for a prompt and for many requests at once, in the engine for what it has begun."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cachesvc.demo.engine import EngineProcess
from tests.engines.harness import (
    BLOCK,
    CHUNK,
    PATIENCE_S,
    Engines,
    Right,
    answer,
    assert_alike,
    counting,
    faults_of,
    nothing_held,
    refused,
    wait_long,
    words,
)
from tests.support.daemon import Daemon, shared_directory

SMALL_CHUNKS = 16
SMALL = {"ram_bytes": "8MiB", "extent_bytes": "1MiB"}
"""16 chunks of the tiny model."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with shared_directory() as arena, Daemon(tmp_path_factory.mktemp("daemon"), arena, **SMALL) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def crowded(engines: Engines, daemon: Daemon) -> EngineProcess:
    """One with a KV cache of 40 blocks."""
    return engines.begin(daemon.socket(), kv_cache_memory_bytes=40 * 256 << 10, max_model_len=2048)


@pytest.fixture(autouse=True)
def no_faults(one: EngineProcess, two: EngineProcess) -> Iterator[None]:
    yield
    assert not faults_of(one) | faults_of(two)


def test_a_prompt_larger_than_the_arena(daemon: Daemon, one: EngineProcess, two: EngineProcess, right: Right) -> None:
    """Its beginning stays, as much as fits: no chunk of a request makes room for another one of it."""
    prompt = words("large", 24 * CHUNK + 30)
    with counting(daemon, one) as seen:
        assert_alike(answer(one, prompt), right(prompt))
    kept = seen.sealed
    assert SMALL_CHUNKS // 2 <= kept <= SMALL_CHUNKS
    assert refused(one)
    for engine in (two, one):
        assert engine.reset_prefix_cache()
        with counting(daemon, engine) as seen:
            assert_alike(answer(engine, prompt), right(prompt))
        # while another engine is there, nobody leases more than half of it
        assert SMALL_CHUNKS // 2 - 1 <= seen.loaded <= kept
        assert seen.failed_loads == 0
    wait_long(lambda: nothing_held(daemon))


@pytest.mark.parametrize("rounds", [2])
def test_many_requests_at_once(
    daemon: Daemon, one: EngineProcess, two: EngineProcess, right: Right, rounds: int
) -> None:
    """32 through an arena that holds a tenth of them, twice, on both engines at the same time."""
    families = [words(f"family {n}", 2 * CHUNK) for n in range(8)]
    asked = [families[n % 8] + words(f"many {n}", CHUNK + 10 * n) for n in range(32)]
    expected = [right(prompt) for prompt in asked]
    for _ in range(rounds):
        for engine in (one, two):
            assert engine.reset_prefix_cache()
        names = [[engine.submit(prompt, 8, logprobs=True) for prompt in asked] for engine in (one, two)]
        for engine, mine in zip((one, two), names, strict=True):
            for said, wanted in zip(engine.wait(mine), expected, strict=True):
                assert_alike(said, wanted)
        one.settle()
        two.settle()
        wait_long(lambda: nothing_held(daemon))
    assert daemon.evictions() > 0


def test_preemption(
    daemon: Daemon, one: EngineProcess, two: EngineProcess, crowded: EngineProcess, right: Right
) -> None:
    """More requests than blocks: vLLM throws some out in the middle, also while they store."""
    crowded.wait_ready()
    crowded.apply("tests.engines.faults:be_patient", seconds=PATIENCE_S)
    asked = [words(f"preempted {n}", 5 * BLOCK + 100) for n in range(8)]
    said_before = preemptions(crowded)
    for _ in range(2):
        names = [crowded.submit(prompt, 120, logprobs=True) for prompt in asked]
        for prompt, said in zip(asked, crowded.wait(names), strict=True):
            assert_alike(said, right(prompt, max_tokens=120))
        crowded.settle()
        wait_long(lambda: nothing_held(daemon))
    assert preemptions(crowded) > said_before
    assert not faults_of(crowded)


def preemptions(engine: EngineProcess) -> float:
    return engine.metrics().get("vllm:num_preemptions", 0)
