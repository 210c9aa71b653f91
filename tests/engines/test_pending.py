"""What one engine is writing at this moment, another one waits for: not prefilled twice, and not for ever.

Here too: the writer is killed in the middle (SIGKILL). Its chunks are never seen, and its slots come back.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cachesvc.demo.engine import EngineProcess
from tests.engines.faults import Switches
from tests.engines.harness import (
    CHUNK,
    Engines,
    Right,
    answer,
    answer_now,
    assert_alike,
    assert_same,
    counting,
    faults_of,
    nothing_held,
    ready,
    wait_long,
    words,
    writing,
)
from tests.support.daemon import Daemon

PATIENT = {"load_deadline_ms": 100_000}
"""Longer than any test: whoever waits so long has been forgotten."""
HASTY = {"load_deadline_ms": 200}


@pytest.fixture(scope="module")
def pair(daemon: Daemon, engines: Engines) -> tuple[EngineProcess, EngineProcess]:
    return engines.pair(daemon, extra=PATIENT)


@pytest.fixture(scope="module")
def others(daemon: Daemon, engines: Engines, pair: object) -> tuple[EngineProcess, EngineProcess]:
    """One that doesn't wait for long, and one that will be killed."""
    hasty, mortal = (engines.begin(daemon.socket(), extra=extra) for extra in (HASTY, PATIENT))
    return ready(hasty), ready(mortal)


@pytest.fixture
def hasty(others: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return others[0]


@pytest.fixture
def mortal(others: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return others[1]


@pytest.fixture
def writer(switches: list[Switches]) -> Switches:
    """Faults of `one`."""
    switches[0].forget()
    return switches[0]


def waits(engine: EngineProcess, name: str) -> bool:
    """Is this request asked for again and again, and never scheduled?"""
    looks = ((engine.state()["requests"][name]["status"], engine.poll()) for _ in range(50))
    return all(status == "WAITING" and not answers for status, answers in looks)


def begin_to_store(engine: EngineProcess, switches: Switches, prompt: list[int]) -> str:
    """Submit it; its copies stand in their middle when this returns."""
    name = engine.submit(prompt, 8, logprobs=True)
    wait_long(lambda: switches.held("store"))
    return name


def test_it_is_waited_for(
    daemon: Daemon, one: EngineProcess, two: EngineProcess, writer: Switches, right: Right
) -> None:
    document = words("waited for", 6 * CHUNK)
    with counting(daemon, two) as seen:
        with writer.holding("store"):
            written = begin_to_store(one, writer, document + words("q1", 30))
            assert writing(daemon) == 6
            name = two.submit(document + words("q2", 30), 8, logprobs=True)
            assert waits(two, name)
            # nobody else is held up by it
            assert_alike(answer_now(two, words("meanwhile", 200)), right(words("meanwhile", 200)))
        [shared] = two.wait([name])
        two.settle()
    [cold] = one.wait([written])
    one.settle()
    assert_alike(cold, right(document + words("q1", 30)))
    assert (shared.loaded_tokens, shared.computed_tokens) == (6 * CHUNK, 30)
    assert (seen.loaded, seen.leased, seen.sealed) == (6, 6, 6)
    assert_same(shared, answer(one, document + words("q2", 30)))
    assert not faults_of(one) | faults_of(two)


def test_not_for_ever(
    daemon: Daemon,
    one: EngineProcess,
    two: EngineProcess,
    hasty: EngineProcess,
    writer: Switches,
    right: Right,
) -> None:
    document = words("not for ever", 6 * CHUNK)
    with writer.holding("store"), counting(daemon, hasty) as seen:
        begin_to_store(one, writer, document)
        said = answer(hasty, document + words("q", 30))
    assert_alike(said, right(document + words("q", 30)))
    assert (seen.leased, seen.stored, seen.sealed) == (0, 0, 0)
    assert seen.missed == {"pending_timeout": 6}
    one.settle()
    with counting(daemon, two) as seen:
        answer(two, document)
    assert seen.loaded == 6
    assert not faults_of(hasty)


def test_a_request_that_waits_is_aborted(
    daemon: Daemon, one: EngineProcess, two: EngineProcess, writer: Switches, right: Right
) -> None:
    document = words("impatient", 4 * CHUNK)
    with writer.holding("store"):
        begin_to_store(one, writer, document)
        name = two.submit(document, 8)
        assert waits(two, name)
        two.abort(name)
        assert two.wait([name])[0].finish_reason == "abort"
        assert_alike(answer(two, words("after", 100)), right(words("after", 100)))


def test_its_writer_is_killed(
    daemon: Daemon, two: EngineProcess, hasty: EngineProcess, mortal: EngineProcess, tmp_path: Path, right: Right
) -> None:
    """The other one waits as long as the writer lives, and computes when it's dead."""
    switches = Switches(mortal, tmp_path)
    document = words("killed writer", 6 * CHUNK)
    question = document + words("q", 30)
    with switches.holding("store"), counting(daemon, two) as seen:
        begin_to_store(mortal, switches, document)
        name = two.submit(question, 8, logprobs=True)
        assert waits(two, name)
        mortal.kill()
        [said] = two.wait([name])
        two.settle()
    assert_alike(said, right(question))
    assert (seen.leased, seen.stored, seen.sealed) == (0, 6, 6)
    wait_long(lambda: nothing_held(daemon))
    # what the survivor has stored is right, and a third engine finds it
    with counting(daemon, hasty) as seen:
        assert_same(answer(hasty, question), right(question, again=True))
    assert seen.loaded == 6
    assert not faults_of(two) | faults_of(hasty)


def test_a_reader_is_killed(daemon: Daemon, two: EngineProcess, hasty: EngineProcess, tmp_path: Path) -> None:
    """Its leases come back. The last test of this file: one engine less."""
    document = words("killed reader", 6 * CHUNK)
    answer(two, document)
    switches = Switches(hasty, tmp_path)
    with switches.holding("load"):
        hasty.submit(document, 8)
        wait_long(lambda: switches.held("load"))
        assert not nothing_held(daemon)
        hasty.kill()
    wait_long(lambda: nothing_held(daemon))
