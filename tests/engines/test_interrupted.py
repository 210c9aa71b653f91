"""Aborts, resets and sleep while copies are under way: the engine still answers, and nothing stays held afterwards.

A copy that "is under way" stands in its middle until it is let go. What vLLM 0.32 does when a load is under way is
written down where it is tested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cachesvc.demo.engine import EngineProcess, EngineRaisedError
from tests.engines.faults import Switches
from tests.engines.harness import (
    CHUNK,
    Engines,
    Right,
    answer,
    answer_now,
    assert_alike,
    counting,
    faults_of,
    namespaces,
    nothing_held,
    ready,
    wait_long,
    words,
)
from tests.support.daemon import Daemon

LET_GO_S = 0.5
"""Calls that wait for copies would wait for ever: these are let go after so long."""


@pytest.fixture(scope="module")
def engine(daemon: Daemon, engines: Engines) -> EngineProcess:
    return engines.start(daemon)


@pytest.fixture(scope="module")
def switches(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Switches:
    return Switches(engine, tmp_path_factory.mktemp("switches"))


@contextmanager
def let_go_later(switches: Switches, kind: str) -> Iterator[None]:
    """Copies of this kind stand until the block ends, or `LET_GO_S` after it has begun."""
    timer = threading.Timer(LET_GO_S, switches.let_go, (kind,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def storing(engine: EngineProcess, switches: Switches, prompt: list[int], max_tokens: int) -> Iterator[str]:
    """A request whose stores stand in their middle."""
    switches.forget()
    with switches.holding("store"):
        name = engine.submit(prompt, max_tokens)
        wait_long(lambda: switches.held("store"))
        yield name


@contextmanager
def loading(engine: EngineProcess, switches: Switches, prompt: list[int]) -> Iterator[str]:
    """A request whose load stands in its middle."""
    answer(engine, prompt)
    assert engine.reset_prefix_cache()
    switches.forget()
    with switches.holding("load"):
        name = engine.submit(prompt, 8)
        wait_long(lambda: switches.held("load"))
        assert engine.state()["requests"][name]["status"] == "WAITING_FOR_REMOTE_KVS"
        yield name


def still_well(daemon: Daemon, engine: EngineProcess, right: Right, name: str) -> None:
    """It answers what is right, stores and loads, and nothing is held."""
    ready(engine)
    engine.settle()
    wait_long(lambda: nothing_held(daemon))
    prompt = words(f"well after {name}", 4 * CHUNK + 20)
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, prompt), right(prompt))
        assert engine.reset_prefix_cache()
        assert_alike(answer(engine, prompt), right(prompt))
    assert (seen.stored, seen.sealed, seen.loaded, seen.leased) == (4, 4, 4, 4)
    assert not faults_of(engine)
    wait_long(lambda: nothing_held(daemon))


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 4000], ids=["finished", "running"])
def test_abort_while_storing(
    daemon: Daemon, engine: EngineProcess, switches: Switches, right: Right, max_tokens: int
) -> None:
    """The store goes on: what was computed is worth it."""
    prompt = words(f"abort store {max_tokens}", 4 * CHUNK)
    with counting(daemon, engine) as seen:
        with storing(engine, switches, prompt, max_tokens) as name:
            engine.abort(name)
        engine.wait([name])
        engine.settle()
    assert seen.stored == seen.sealed == 4
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, [*prompt, 5]), right([*prompt, 5]))
    assert seen.loaded == 4
    still_well(daemon, engine, right, f"abort store {max_tokens}")


def reset(engine: EngineProcess) -> object:
    return engine.reset_prefix_cache(reset_connector=True)


def reset_with_running(engine: EngineProcess) -> object:
    return engine.reset_prefix_cache(reset_connector=True, reset_running_requests=True)


def sleep(engine: EngineProcess) -> None:
    try:
        engine.sleep(1)
    finally:
        engine.wake_up()


@pytest.mark.parametrize("interrupt", [reset, reset_with_running, sleep])
@pytest.mark.parametrize("max_tokens", [1, 300], ids=["finished", "running"])
def test_reset_while_storing(
    daemon: Daemon,
    engine: EngineProcess,
    switches: Switches,
    right: Right,
    interrupt: Callable[[EngineProcess], object],
    max_tokens: int,
) -> None:
    """What was stored before is never found again: the weights may be others."""
    name_of_it = f"{interrupt.__name__} store {max_tokens}"
    prompt, earlier = words(name_of_it, 4 * CHUNK), words(f"earlier {name_of_it}", 4 * CHUNK)
    answer(engine, earlier)
    known = namespaces(daemon)
    with storing(engine, switches, prompt, max_tokens) as name, let_go_later(switches, "store"):
        interrupt(engine)
    engine.wait([name])
    still_well(daemon, engine, right, name_of_it)
    assert len(namespaces(daemon)) > len(known)
    for old in (earlier, prompt):
        with counting(daemon, engine) as seen:
            assert_alike(answer(engine, old), right(old))
        assert seen.leased == 0


# --- loads ------------------------------------------------------------------------------------------------------------


def test_abort_while_loading(daemon: Daemon, engine: EngineProcess, switches: Switches, right: Right) -> None:
    prompt = words("abort load", 4 * CHUNK)
    with counting(daemon, engine) as seen, loading(engine, switches, prompt) as name:
        engine.abort(name)
        assert engine.wait([name])[0].finish_reason == "abort"
        # the blocks aren't given to others while they are written
        assert_alike(answer_now(engine, words("while it loads", 300)), right(words("while it loads", 300)))
        assert not nothing_held(daemon)
    engine.settle()
    wait_long(lambda: nothing_held(daemon))
    assert seen.leased == 4
    still_well(daemon, engine, right, "abort load")


VLLM_RAISES = "RuntimeError: Failed to reset KV cache even when all the running requests are preempted"


@pytest.mark.parametrize(
    ("interrupt", "raises"),
    [(reset, ""), (reset_with_running, VLLM_RAISES), (sleep, VLLM_RAISES)],
    ids=["reset", "reset_with_running", "sleep"],
)
def test_reset_while_loading(
    daemon: Daemon,
    engine: EngineProcess,
    switches: Switches,
    right: Right,
    interrupt: Callable[[EngineProcess], object],
    raises: str,
) -> None:
    """A request that is being loaded can't be preempted: where vLLM 0.32 has to, it raises, and goes on with the load;
    a plain reset answers False."""
    prompt = words(f"{interrupt.__name__} load", 4 * CHUNK)
    raised = ""
    with loading(engine, switches, prompt) as name, let_go_later(switches, "load"):
        try:
            assert not interrupt(engine)
        except EngineRaisedError as error:
            raised = str(error)
    assert raised.startswith(raises)
    assert bool(raised) == bool(raises)
    [said] = engine.wait([name])
    if interrupt is sleep:
        assert said.finish_reason == "abort"
    else:
        assert said.token_ids == right(prompt).token_ids
    still_well(daemon, engine, right, f"{interrupt.__name__} load")
