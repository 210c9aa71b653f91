"""The daemon is killed, hangs or talks nonsense while an engine serves: every answer stays right, and hits come back.

One engine: what it loads after `reset_prefix_cache` is what it stored before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachesvc.demo.engine import EngineProcess
from cachesvc.wire import messages
from tests.engines.faults import Switches
from tests.engines.harness import (
    CHUNK,
    CHUNK_BYTES,
    Engines,
    Right,
    answer,
    assert_alike,
    connected,
    counting,
    faults_of,
    misses,
    nothing_held,
    ready,
    wait_long,
    words,
)
from tests.support.daemon import Daemon
from tests.support.fake_daemon import FakeDaemon


@pytest.fixture(scope="module")
def engine(daemon: Daemon, engines: Engines) -> EngineProcess:
    return engines.start(daemon)


@pytest.fixture(scope="module")
def switches(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Switches:
    return Switches(engine, tmp_path_factory.mktemp("switches"))


@pytest.fixture(autouse=True)
def no_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        assert not faults_of(request.getfixturevalue("engine"))


def prompts(name: str) -> list[list[int]]:
    """Three that continue one document, three that are new."""
    document = words(f"document of {name}", 6 * CHUNK)
    return [
        *(document + words(f"{name} {n}", 30) for n in range(3)),
        *(words(f"{name} new {n}", 3 * CHUNK) for n in range(3)),
    ]


def serve(engine: EngineProcess, right: Right, asked: list[list[int]], meanwhile: Callable[[], object]) -> None:
    """Answer all of these at once; `meanwhile` something happens."""
    names = [engine.submit(prompt, 8, logprobs=True) for prompt in asked]
    meanwhile()
    for prompt, said in zip(asked, engine.wait(names), strict=True):
        assert_alike(said, right(prompt))


def hits_again(daemon: Daemon, engine: EngineProcess, right: Right, prompt: list[int], chunks: int = 6) -> None:
    """What was stored before the fault is loaded after it."""
    wait_long(lambda: connected(engine))
    engine.settle()
    assert engine.reset_prefix_cache()
    with counting(daemon, engine) as seen:
        assert_alike(answer(engine, prompt), right(prompt))
    assert (seen.loaded, seen.leased) == (chunks, chunks)


def test_killed_while_it_serves(daemon: Daemon, engine: EngineProcess, right: Right) -> None:
    asked = prompts("killed")
    answer(engine, asked[0])
    engine.reset_prefix_cache()
    serve(engine, right, asked, lambda: daemon.stop(signal.SIGKILL))
    engine.reset_prefix_cache()
    # nobody is there
    before = misses(engine).get("daemon_down", 0)
    serve(engine, right, asked, lambda: None)
    assert misses(engine)["daemon_down"] > before
    daemon.start()
    assert daemon.status()["restart"]["chunks_restored"] >= 6
    hits_again(daemon, engine, right, asked[1])


def test_killed_again_and_again(daemon: Daemon, engine: EngineProcess, right: Right) -> None:
    asked = prompts("again")
    answer(engine, asked[0])
    for _ in range(4):
        engine.reset_prefix_cache()
        names = [engine.submit(prompt, 8, logprobs=True) for prompt in asked]
        daemon.stop(signal.SIGKILL)
        daemon.start()
        for prompt, said in zip(asked, engine.wait(names), strict=True):
            assert_alike(said, right(prompt))
    hits_again(daemon, engine, right, asked[1])


@pytest.mark.parametrize("kind", ["load", "store"])
def test_killed_in_the_middle_of_a_copy(
    daemon: Daemon, engine: EngineProcess, switches: Switches, right: Right, kind: str
) -> None:
    """The slots are still there: a load goes on, and a store isn't lost."""
    asked = prompts(f"middle of a {kind}")[0]
    if kind == "load":
        answer(engine, asked)
        engine.reset_prefix_cache()
    switches.forget()
    with switches.holding(kind):
        name = engine.submit(asked, 8, logprobs=True)
        wait_long(lambda: switches.held(kind))
        daemon.stop(signal.SIGKILL)
        daemon.start()
        wait_long(lambda: connected(engine))
    [said] = engine.wait([name])
    assert_alike(said, right(asked))
    engine.settle()
    wait_long(lambda: nothing_held(daemon))
    hits_again(daemon, engine, right, asked)


def test_stopped_and_continued(daemon: Daemon, engine: EngineProcess, right: Right) -> None:
    asked = prompts("stopped")
    answer(engine, asked[0])
    engine.reset_prefix_cache()
    serve(engine, right, asked, daemon.freeze)
    serve(engine, right, prompts("stopped still"), lambda: None)
    daemon.thaw()
    hits_again(daemon, engine, right, asked[1])


def test_stopped_for_a_moment(daemon: Daemon, engine: EngineProcess, right: Right) -> None:
    """Replies that come too late are undone."""
    asked = prompts("moment")
    answer(engine, asked[0])
    for pause_s in (0.005, 0.02, 0.08):
        engine.reset_prefix_cache()
        daemon.freeze()
        thaw = threading.Timer(pause_s, daemon.thaw)
        serve(engine, right, asked, thaw.start)
        thaw.join()
        wait_long(lambda: connected(engine))
    hits_again(daemon, engine, right, asked[1])


# --- somebody else at its address -------------------------------------------------------------------------------------


@contextmanager
def instead(path: Path, greet: Callable[[socket.socket], object]) -> Iterator[list[socket.socket]]:
    """Accept connections at the daemon's address; `greet` has each of them."""
    path.unlink(missing_ok=True)
    taken: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])
                    with contextlib.suppress(OSError):
                        greet(taken[-1])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield taken
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()
            path.unlink()


GREETINGS: dict[str, Callable[[socket.socket], object]] = {
    "never answers": lambda connection: None,
    "garbage": lambda connection: connection.sendall(os.urandom(4096)),
    "a frame of zeros": lambda connection: connection.sendall(b"\x10\0\0\0" + bytes(16)),
    "closes": lambda connection: connection.close(),
}


@pytest.mark.parametrize("greeting", GREETINGS)
def test_somebody_else_listens(daemon: Daemon, engine: EngineProcess, right: Right, greeting: str) -> None:
    asked = prompts(f"instead {greeting}")
    answer(engine, asked[0])
    engine.reset_prefix_cache()
    daemon.stop()
    with instead(daemon.socket(), GREETINGS[greeting]) as taken:
        serve(engine, right, asked, lambda: wait_long(lambda: len(taken) > 1))
        serve(engine, right, prompts(f"instead still {greeting}"), lambda: None)
    daemon.start()
    hits_again(daemon, engine, right, asked[1])


GARBAGE: dict[str, tuple[type, Any]] = {
    "bytes for a lookup": (messages.Lookup, b"\xff" * 64),
    "silence for a lookup": (messages.Lookup, None),
    "too few states for a lookup": (messages.Lookup, lambda m: messages.Looked(m.call, b"\x01", 1)),
    "states that nobody knows": (messages.Lookup, lambda m: messages.Looked(m.call, b"\x7f" * 6, 1)),
    "bytes for a lease": (messages.Lease, b"\xff" * 64),
    "silence for a lease": (messages.Lease, None),
    "slots that aren't": (
        messages.Lease,
        lambda m: messages.Leased(
            m.call, b"\x01" * 6, messages.Slots([99] * 6, [10**6] * 6, [1] * 6), [CHUNK_BYTES] * 6, 1
        ),
    ),
    "bytes for an allocation": (messages.Allocate, b"\xff" * 64),
    "silence for an allocation": (messages.Allocate, None),
    "silence for a seal": (messages.Seal, None),
    "bytes for a seal": (messages.Seal, b"\xff" * 64),
    "an error for everything": (messages.Lookup, lambda m: messages.Refused(m.call, "limit", "no")),
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path_factory.mktemp("fake"), slot_bytes=CHUNK_BYTES, slot_count=400) as fake:
        yield fake


@pytest.fixture(scope="module")
def fooled(fake: FakeDaemon, engines: Engines) -> EngineProcess:
    """An engine whose daemon can be told to talk nonsense."""
    return ready(engines.begin(fake.path))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_nonsense_after_a_good_start(fake: FakeDaemon, fooled: EngineProcess, right: Right, garbage: str) -> None:
    kind, said = GARBAGE[garbage]
    asked = prompts(f"nonsense {garbage}")
    answer(fooled, asked[0])
    fooled.reset_prefix_cache()
    fake.on[kind] = said if callable(said) else lambda _: said
    serve(fooled, right, asked, lambda: None)
    fooled.reset_prefix_cache()
    serve(fooled, right, prompts(f"nonsense still {garbage}"), lambda: None)
    fake.on.clear()
    fooled.reset_prefix_cache()
    wait_long(lambda: connected(fooled))
    before = fooled.metrics().get("vllm:cachesvc_loaded_chunks", 0)
    if kind in (messages.Lookup, messages.Lease):
        # three failures in a row, or a doubted chunk, aren't forgotten at once
        wait_long(lambda: _loads(fooled, right, asked[1]) > before)
    assert not faults_of(fooled)


def _loads(engine: EngineProcess, right: Right, prompt: list[int]) -> float:
    engine.settle()
    engine.reset_prefix_cache()
    assert_alike(answer(engine, prompt), right(prompt))
    return engine.metrics().get("vllm:cachesvc_loaded_chunks", 0)
