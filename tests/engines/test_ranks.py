"""Engines with one rank and with two share chunks, in both directions: vLLM certifies the canonical layout."""

from __future__ import annotations

import pytest

from cachesvc.demo.engine import EngineProcess
from tests.engines.harness import (
    CHUNK,
    VERY_PATIENT_S,
    Engines,
    Right,
    answer,
    assert_alike,
    assert_same,
    counting,
    faults_of,
    namespaces,
    ready,
    words,
)
from tests.support.daemon import Daemon


@pytest.fixture(scope="module")
def pair(daemon: Daemon, engines: Engines) -> tuple[EngineProcess, EngineProcess]:
    """One rank; two ranks."""
    one, two = engines.begin(daemon.socket()), engines.begin(daemon.socket(), tensor_parallel_size=2)
    return ready(one, VERY_PATIENT_S), ready(two, VERY_PATIENT_S)


def test_they_have_one_namespace(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    answer(one, words("namespace", CHUNK))
    answer(two, words("namespace", CHUNK))
    assert len(namespaces(daemon)) == 1


def test_from_one_rank_to_two(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    """Compared with a hit of its own cache: two ranks add up in another order than one."""
    document, question = words("one to two", 6 * CHUNK), words("q", 30)
    answer(two, document, cache_salt="alone", kv_transfer_params={"max_offload_tokens": 0})
    local = answer(two, document + question, cache_salt="alone")
    assert (local.local_tokens, local.loaded_tokens) == (6 * CHUNK, 0)
    answer(one, document)
    with counting(daemon, two) as seen:
        shared = answer(two, document + question)
    assert (seen.loaded, seen.leased, seen.failed_loads) == (6, 6, 0)
    assert (shared.loaded_tokens, shared.computed_tokens) == (6 * CHUNK, 30)
    assert_alike(shared, local)
    assert not faults_of(one) | faults_of(two)


def test_from_two_ranks_to_one(daemon: Daemon, one: EngineProcess, two: EngineProcess, right: Right) -> None:
    document, question = words("two to one", 6 * CHUNK), words("q", 30)
    with counting(daemon, two) as seen:
        answer(two, document)
    assert (seen.stored, seen.sealed) == (6, 6)
    with counting(daemon, one) as seen:
        assert_alike(answer(one, document + question), right(document + question))
    assert (seen.loaded, seen.leased) == (6, 6)
    # two ranks wrote it, and two read it, to the last bit
    local = answer(two, document + question)
    assert two.reset_prefix_cache()
    with counting(daemon, two) as seen:
        assert_same(answer(two, document + question), local)
    assert seen.loaded == 6
