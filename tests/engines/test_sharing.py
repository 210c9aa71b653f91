"""Two engines share one prefix: what one has computed the other one loads, and says the same to the last bit.

Also here: what a request's user may forbid, salts, and what vLLM's metrics show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cachesvc.demo.engine import EngineProcess
from tests.engines.harness import (
    BLOCK,
    CHUNK,
    Engines,
    Right,
    answer,
    assert_alike,
    assert_same,
    counting,
    faults_of,
    words,
)
from tests.support.daemon import Daemon


@pytest.fixture(autouse=True)
def no_faults(one: EngineProcess, two: EngineProcess) -> Iterator[None]:
    """No exception of ours had to be kept from vLLM."""
    yield
    assert not faults_of(one) | faults_of(two)


def test_a_prefix_is_shared(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    document, first, second = words("document", 8 * CHUNK), words("q1", 40), words("q2", 40)
    with counting(daemon, one) as seen:
        cold, local = answer(one, document + first), answer(one, document + second)
    assert (cold.local_tokens, cold.loaded_tokens) == (0, 0)
    assert (local.local_tokens, local.loaded_tokens) == (8 * CHUNK, 0)
    assert (seen.stored, seen.sealed, seen.leased) == (8, 8, 0)
    with counting(daemon, two) as seen:
        shared = answer(two, document + second)
    assert (shared.local_tokens, shared.loaded_tokens, shared.computed_tokens) == (0, 8 * CHUNK, 40)
    assert (seen.leased, seen.loaded, seen.hits, seen.stored) == (8, 8, 8, 0)
    assert_same(local, shared)
    assert len(set(shared.token_ids)) > 4, "a model that always says the same proves nothing"
    # the blocks that were loaded are as good as computed ones, for vLLM too
    with counting(daemon, two) as seen:
        assert_same(local, answer(two, document + second))
    assert seen.leased == 0


def test_sharing_goes_both_ways_and_grows(daemon: Daemon, one: EngineProcess, two: EngineProcess, right: Right) -> None:
    talk = words("talk", 3 * CHUNK)
    for turn, loaded in enumerate((0, 4, 1, 1)):
        speaker = one if turn % 2 else two
        talk = talk + words(f"turn {turn}", CHUNK)
        with counting(daemon, speaker) as seen:
            assert_alike(answer(speaker, [*talk, 7]), right([*talk, 7]))
        assert (seen.loaded, seen.leased, seen.stored) == (loaded, loaded, 4 if turn == 0 else 1)


@pytest.mark.parametrize("local_blocks", [1, 2, 3])
def test_a_hit_that_begins_within_a_chunk(
    daemon: Daemon, one: EngineProcess, two: EngineProcess, right: Right, local_blocks: int
) -> None:
    """The engine has the first block of a chunk itself: only the rest of it is loaded, and into the right place."""
    prompt = words(f"within {local_blocks}", 4 * CHUNK + 20)
    answer(one, prompt)
    start = prompt[: local_blocks * BLOCK]
    answer(two, start + words("else", 30), kv_transfer_params={"max_load_tokens": 0})
    with counting(daemon, two) as seen:
        shared = answer(two, prompt)
    assert shared.local_tokens == local_blocks * BLOCK
    assert shared.loaded_tokens == 4 * CHUNK - local_blocks * BLOCK
    assert seen.loaded == 4 - local_blocks // 2
    right(prompt)
    assert_same(shared, right(prompt, again=True))


def test_a_prompt_of_whole_chunks(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    """All of it is stored, and vLLM must have a token to compute."""
    prompt = words("whole", 4 * CHUNK)
    answer(one, prompt)
    with counting(daemon, two) as seen:
        shared = answer(two, prompt)
    assert seen.loaded == seen.leased == 4
    assert shared.token_ids == answer(one, prompt).token_ids


def test_salt(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    prompt = words("salt", 4 * CHUNK + 9)
    answer(one, prompt, cache_salt="a")
    for salt, hits in ((None, 0), ("b", 0), ("a", 4)):
        with counting(daemon, two) as seen:
            answer(two, prompt, cache_salt=salt)
        assert (seen.leased, seen.loaded) == (hits, hits)


@pytest.mark.parametrize(
    ("forbids", "loads"), [({"max_load_tokens": 0}, 0), ({"kv_load_tiers": []}, 0), ({"max_load_tokens": 600}, 2)]
)
def test_a_user_forbids_loading(
    daemon: Daemon, one: EngineProcess, two: EngineProcess, right: Right, forbids: dict[str, Any], loads: int
) -> None:
    prompt = words(f"unloaded {forbids}", 4 * CHUNK + 9)
    answer(one, prompt)
    with counting(daemon, two) as seen:
        said = answer(two, prompt, kv_transfer_params=forbids)
    assert (said.loaded_tokens, seen.loaded) == (loads * CHUNK, loads)
    assert seen.leased == 0 or loads
    assert seen.stored == 0
    assert_alike(said, right(prompt))
    # of the others nobody minds
    assert two.reset_prefix_cache()
    with counting(daemon, two) as seen:
        assert_alike(answer(two, prompt), right(prompt))
    assert seen.loaded == 4


def test_a_user_forbids_storing(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    prompt = words("unstored", 4 * CHUNK + 9)
    with counting(daemon, one) as seen:
        answer(one, prompt, kv_transfer_params={"max_offload_tokens": 0})
    assert (seen.stored, seen.sealed) == (0, 0)
    with counting(daemon, two) as seen:
        answer(two, prompt)
    assert (seen.leased, seen.stored) == (0, 4)


def test_metrics_say_why(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    prompt = words("why", 4 * CHUNK + 9)
    with counting(daemon, one) as seen:
        answer(one, prompt)
    assert seen.missed == {"never_stored": 4}
    assert (seen.hits, seen.stored) == (0, 4)
    longer = prompt[: 4 * CHUNK] + words("more", 2 * CHUNK)
    with counting(daemon, two) as seen:
        answer(two, longer)
    assert seen.missed == {"never_stored": 2}
    assert (seen.hits, seen.loaded, seen.stored) == (4, 4, 2)
    shown = two.metrics()
    source = "vllm:prompt_tokens_cached_by_source{source=host}"
    assert shown[source] >= 4 * CHUNK
    assert shown["vllm:kv_offload_load_bytes"] >= 4 * 512 * 1024


def test_other_settings(daemon: Daemon, engines: Engines, one: EngineProcess) -> None:
    """`min_load_tokens`: a shorter hit is computed. `offload_prompt_only` is vLLM's own, and passes."""
    other = engines.start(daemon, extra={"min_load_tokens": 4 * CHUNK, "offload_prompt_only": False})
    prompt = words("short", 3 * CHUNK)
    answer(one, prompt)
    with counting(daemon, other) as seen:
        answer(other, prompt)
    assert (seen.leased, seen.loaded) == (0, 0)
    assert seen.missed["filtered"] >= 1
    prompt = words("talkative", CHUNK - 10)
    with counting(daemon, other) as seen:
        said = answer(other, prompt, max_tokens=CHUNK + 30)
    assert seen.stored == 2
    with counting(daemon, one) as seen:
        answer(one, prompt + said.token_ids)
    assert seen.loaded == 2
    assert not faults_of(other)
