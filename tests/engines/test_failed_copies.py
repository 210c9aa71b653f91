"""One rank fails to copy, or reaches no daemon while the scheduler does: nothing is sealed, a failed load is computed.

With one and several KV groups, as vLLM is told of a failed load in two ways, and with one rank and two, of which one
does its part. In each case a load fails at most once for a request, and is not tried again and again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cachesvc.demo.child import Answer
from cachesvc.demo.engine import EngineProcess
from cachesvc.demo.model import HYBRID, TINY, Shape
from tests.engines.faults import Switches
from tests.engines.harness import (
    CHUNK,
    VERY_PATIENT_S,
    Engines,
    answer,
    assert_alike,
    counting,
    faults_of,
    misses,
    nothing_held,
    ready,
    wait_long,
    words,
)
from tests.support.daemon import Daemon

DOUBT_S = 1.1
"""After a failed load its chunks are nobody's hit for a little less."""


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    ranks: int

    def words(self, seed: str, count: int) -> list[int]:
        """A prompt of this case only: cases with one group share a namespace, however many ranks they have."""
        return words(f"{self.name} {seed}", count)

    @property
    def settings(self) -> dict[str, Any]:
        return {"tensor_parallel_size": self.ranks} if self.ranks > 1 else {}

    @property
    def bad(self) -> int:
        """The rank that has the fault: the last one."""
        return self.ranks - 1


CASES = (
    Case("one group", TINY, 1),
    Case("several groups", HYBRID, 1),
    Case("one group, two ranks", TINY, 2),
    Case("several groups, two ranks", HYBRID, 2),
)


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def own(models: Path, case: Case) -> Iterator[Engines]:
    """Engines of one case; those of the case before are gone."""
    with Engines(models) as engines:
        yield engines


@pytest.fixture(scope="module")
def started(daemon: Daemon, own: Engines, case: Case) -> tuple[EngineProcess, EngineProcess]:
    """A healthy one, and one of which a rank reaches no daemon."""
    settings = {"extra": {"load_deadline_ms": 1000 * VERY_PATIENT_S}, **case.settings}
    healthy, lonely = (own.begin(daemon.socket(), own.model(case.shape), **settings) for _ in range(2))
    lonely.wait_ready()
    lonely.apply("tests.engines.faults:be_patient", seconds=VERY_PATIENT_S)
    lonely.apply("tests.engines.faults:refuse_rank", rank=case.bad, address="/nonexistent/socket")
    return ready(healthy, VERY_PATIENT_S), lonely


@pytest.fixture(autouse=True)
def two_ranks_are_slow(request: pytest.FixtureRequest, case: Case) -> None:
    """An open fault: two engines of two ranks each on two cores, and now and then one call to the daemon has no answer
    for as long as its deadline lasts (20 s here). The answers are right, but what was to be stored or loaded isn't."""
    if case.ranks > 1:
        reason = "open: with four ranks on two cores a call to the daemon was seen to have no answer for 20 s"
        request.node.add_marker(pytest.mark.xfail(reason=reason, strict=False))


@pytest.fixture
def engine(started: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return started[0]


@pytest.fixture
def lonely(started: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return started[1]


@pytest.fixture(scope="module")
def switches(started: tuple[EngineProcess, EngineProcess], tmp_path_factory: pytest.TempPathFactory) -> Switches:
    return Switches(started[0], tmp_path_factory.mktemp("switches"))


def local_hit(engine: EngineProcess, prompt: list[int], question: list[int]) -> Answer:
    """What it says when all but the question is in its own cache, computed by itself."""
    salted = {"cache_salt": "alone", "kv_transfer_params": {"max_load_tokens": 0, "max_offload_tokens": 0}}
    answer(engine, prompt, **salted)
    return answer(engine, prompt + question, **salted)


def test_a_rank_fails_to_store(daemon: Daemon, engine: EngineProcess, switches: Switches, case: Case) -> None:
    document, question = case.words("unstored", 4 * CHUNK), case.words("q", 30)
    right = local_hit(engine, document, question)
    with switches.failing("store", case.bad), counting(daemon, engine) as seen:
        assert_alike(answer(engine, document + question), right)
    assert (seen.sealed, seen.stored) == (0, 0)
    assert seen.failed_stores >= 1
    wait_long(lambda: nothing_held(daemon))
    # a second engine would find nothing, as this one does
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, document + question), right)
    assert seen.leased == 0
    assert seen.sealed == seen.stored > 0
    # and now it's there
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, document + question), right)
    assert 0 < seen.loaded <= seen.leased


def test_a_rank_fails_to_load(daemon: Daemon, engine: EngineProcess, switches: Switches, case: Case) -> None:
    """Every load of it would fail: the request ends after one, and the next request isn't hurt."""
    document, question = case.words("unloaded", 4 * CHUNK), case.words("q", 30)
    right = local_hit(engine, document, question)
    answer(engine, document)
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen, switches.failing("load", case.bad):
        assert_alike(answer(engine, document + question), right)
    assert (seen.failed_loads, seen.loaded) == (1, 0)
    assert seen.leased > 0
    wait_long(lambda: nothing_held(daemon))
    # what it has now was computed
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, document + question), right)
    assert seen.leased == 0
    time.sleep(DOUBT_S)
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, document + question), right)
    assert seen.failed_loads == 0
    assert 0 < seen.loaded <= seen.leased


def test_requests_whose_loads_fail_together(
    daemon: Daemon, engine: EngineProcess, switches: Switches, case: Case
) -> None:
    """One load each at most, also where they share what can't be loaded; others go on."""
    documents = [case.words(f"together {n}", 4 * CHUNK) for n in range(2)]
    asked = [documents[n % 2] + case.words(f"q {n}", 20) for n in range(5)] + [case.words("other", 300)]
    right = [
        local_hit(engine, prompt[: 4 * CHUNK], prompt[4 * CHUNK :]) if len(prompt) > 300 else answer(engine, prompt)
        for prompt in asked
    ]
    for document in documents:
        answer(engine, document)
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen, switches.failing("load", case.bad):
        said = engine.generate(asked, max_tokens=8, logprobs=True)
    engine.settle()
    for mine, expected in zip(said, right, strict=True):
        assert_alike(mine, expected)
    assert 1 <= seen.failed_loads <= 5
    assert seen.loaded == 0
    wait_long(lambda: nothing_held(daemon))


def test_no_more_loads_after_three_failures(
    daemon: Daemon, engine: EngineProcess, switches: Switches, case: Case
) -> None:
    engine.apply("tests.engines.faults:unpause")
    documents = [case.words(f"no more {n}", 2 * CHUNK) for n in range(5)]
    right = [local_hit(engine, document, [7]) for document in documents]
    for document in documents:
        answer(engine, document)
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen, switches.failing("load", case.bad):
        for document, expected in zip(documents, right, strict=True):
            assert_alike(answer(engine, [*document, 7]), expected)
    assert seen.failed_loads == 3
    engine.apply("tests.engines.faults:unpause")
    time.sleep(DOUBT_S)
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, [*documents[0], 7]), right[0])
    assert seen.loaded > 0


def test_a_rank_reaches_no_daemon(daemon: Daemon, engine: EngineProcess, lonely: EngineProcess, case: Case) -> None:
    document, question = case.words("lonely", 4 * CHUNK), case.words("q", 30)
    right = local_hit(lonely, document, question)
    # its stores are never seen
    with counting(daemon, lonely) as seen:
        assert_alike(answer(lonely, document), answer(lonely, document))
    assert (seen.sealed, seen.stored, seen.loaded) == (0, 0, 0)
    wait_long(lambda: nothing_held(daemon))
    with counting(daemon, engine) as seen:
        answer(engine, document)
    assert seen.leased == 0
    assert seen.sealed > 0
    # and its loads fail once
    assert lonely.reset_prefix_cache()
    with counting(daemon, lonely) as seen:
        assert_alike(answer(lonely, document + question), right)
    assert (seen.failed_loads, seen.loaded) == (1, 0)
    wait_long(lambda: nothing_held(daemon))
    assert not faults_of(lonely)
    assert misses(lonely).get("load_failed", 0) > 0
