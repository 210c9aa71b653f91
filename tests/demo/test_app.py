"""The demo: each thing that must have happened in it, and what it says if it didn't; the whole of it with real engines.

Tests with `needs_vllm` need vLLM in this environment.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cachesvc.demo import app
from cachesvc.demo.app import Failure, Seen, Sizes, Story, check_equal, check_loaded, right, run
from cachesvc.demo.child import Answer
from cachesvc.demo.daemon import Counters
from cachesvc.demo.model import HYBRID, TINY, write_model
from cachesvc.errors import OperatorError
from tests.support.daemon import wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")

HANG_S = 300
"""A guard: it takes 20 s on a machine that does nothing else, and minutes on one that does much."""

COLD = Answer("r1", [1, 2, 3], "length", 4120, 4120, 0, 0, 3.0)
LOCAL = Answer("r2", [4, 5, 6], "length", 4120, 24, 4096, 0, 0.04, logprobs=[-1.0, -2.0, -3.0])
SHARED = replace(LOCAL, local_tokens=0, loaded_tokens=4096, ttft_s=0.05)
NOTHING = Seen(Counters(0, 0, 0, {"never_stored": 0}, 2, 1, 4, 0), 0)
LOADED = Seen(replace(NOTHING.daemon, chunks=32, loads=32, misses={"never_stored": 32, "evicted": 0}), 32)


def printed() -> Console:
    return Console(file=io.StringIO(), width=160)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- what must have happened ------------------------------------------------------------------------------------------


def test_a_shared_hit() -> None:
    check_loaded(SHARED, 4096, NOTHING, LOADED)
    check_equal("answers", SHARED, LOCAL, exactly=True)


def test_the_last_chunk_may_be_missing() -> None:
    check_loaded(replace(SHARED, loaded_tokens=3840), 4096, NOTHING, LOADED)
    with pytest.raises(Failure, match="vLLM counts 3839 as loaded"):
        check_loaded(replace(SHARED, loaded_tokens=3839), 4096, NOTHING, LOADED)


@pytest.mark.parametrize(
    ("answer", "after", "said"),
    [
        (replace(SHARED, loaded_tokens=0), LOADED, "vLLM counts 0 as loaded"),
        (replace(SHARED, loaded_tokens=-1), LOADED, "vLLM counts 0 as loaded"),
        (SHARED, replace(LOADED, daemon=NOTHING.daemon), "the daemon 0 chunks as leased"),
        (SHARED, replace(LOADED, copied=3), "the connector 3 as copied"),
        (replace(SHARED, loaded_tokens=0), LOADED, "the pool has 32 chunks, its misses are 32 never_stored"),
    ],
)
def test_no_shared_hit(answer: Answer, after: Seen, said: str) -> None:
    with pytest.raises(Failure, match=f"no shared hit: .*{said}"):
        check_loaded(answer, 4096, NOTHING, after)


def test_answers_that_differ() -> None:
    with pytest.raises(Failure, match=r"answers to Q differ: \[4, 5, 7\] and \[4, 5, 6\]"):
        check_equal("answers to Q", replace(SHARED, token_ids=[4, 5, 7]), LOCAL)
    other = replace(SHARED, logprobs=[-1.0, -2.0, -3.0000001])
    check_equal("answers to Q", other, LOCAL)
    with pytest.raises(Failure, match="answers to Q are the same words with other probabilities"):
        check_equal("answers to Q", other, LOCAL, exactly=True)


def test_requests_that_did_not_end_well() -> None:
    assert right([COLD, LOCAL]) == [COLD, LOCAL]
    with pytest.raises(Failure, match="ended with a refusal: ValueError: too long"):
        right([COLD, replace(LOCAL, finish_reason=None, error="ValueError: too long")])
    with pytest.raises(Failure, match="ended with abort"):
        right([replace(LOCAL, finish_reason="abort")])


# --- the stories, with engines that say what a test wants -------------------------------------------------------------


class Actors:
    """A stage whose answers are known beforehand."""

    def __init__(self, answers: list[Answer], seen: list[Seen]) -> None:
        self.one, self.two, self.tokens = "one", "two", 4096
        self._answers, self._seen = iter(answers), iter(seen)

    def ask(self, engine: str, question: int) -> Answer:
        return next(self._answers)

    def seen(self) -> Seen:
        return next(self._seen)


def told(answers: list[Answer], seen: list[Seen]) -> str:
    console = printed()
    stage: Any = Actors(answers, seen)
    try:
        console.print(app._shared(stage, Story(console)))
    except Failure as failure:
        console.print(str(failure))
    return text(console)


def test_the_table() -> None:
    said = told([COLD, LOCAL, SHARED, LOCAL], [NOTHING, LOADED])
    assert re.search(r"Engine 1 │ document \+ Q1 │ cold +│ +4120 │ +0 │ +0 │ +3\.00 s", said)
    assert re.search(r"Engine 2 │ document \+ Q2 │ shared hit +│ +24 │ +0 │ +4096 │ +50 ms", said)
    assert "The answers of both engines to Q2 are equal." in said
    assert "✓ Engine 2 reads 4096 tokens and question 2: 24 tokens computed, 4096 loaded from the pool" in said


def test_no_table_without_a_hit() -> None:
    said = told([COLD, LOCAL, COLD], [NOTHING, NOTHING])
    assert "no shared hit" in said
    assert "equal" not in said


def test_no_table_with_other_answers() -> None:
    said = told([COLD, LOCAL, replace(SHARED, token_ids=[7])], [NOTHING, LOADED])
    assert "the answers of engine 1 and engine 2 to question 2 differ" in said
    assert "equal" not in said


def test_a_step_that_fails_is_marked() -> None:
    console = printed()
    with pytest.raises(ZeroDivisionError), Story(console).step("dividing"):
        raise ZeroDivisionError
    assert text(console).startswith("✗ dividing (")


def test_what_came_out_is_no_markup() -> None:
    console = printed()
    with Story(console).step("naming") as done:
        done("a[b]c")
    assert text(console).startswith("✓ naming: a[b]c (")


# --- what it can't run with -------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("vllm") is not None, reason="there is vLLM")
def test_without_vllm() -> None:
    with pytest.raises(OperatorError, match="make demo"):
        run(None, 4096, False, printed())


def test_sizes(tmp_path: Path) -> None:
    sizes = Sizes.read(write_model(tmp_path, TINY))
    assert (sizes.vocab, sizes.context) == (TINY.vocab, 32768)
    assert sizes.kv_bytes_per_token == TINY.kv_elements_per_token * 4


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"num_attention_heads": "many"}'])
def test_no_model(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(OperatorError, match="name the directory of a causal language model"):
        Sizes.read(tmp_path)


def test_a_document_that_is_too_long(tmp_path: Path) -> None:
    with ExitStack() as stack, pytest.raises(OperatorError, match="reads 32768 tokens at most"):
        app.Stage(Story(printed()), stack, write_model(tmp_path, TINY), 32768)


def test_cleanup_in_another_thread() -> None:
    """Where no signal can be caught, it cleans up all the same."""
    cleaned: list[int] = []

    def work() -> None:
        with app._cleanup() as stack:
            stack.callback(cleaned.append, 1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert cleaned == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_clean_up_once(number: signal.Signals) -> None:
    cleaned: list[int] = []

    def clean() -> None:
        signal.raise_signal(number)  # again, while cleaning up
        cleaned.append(1)

    def interrupted() -> None:
        with app._cleanup() as stack:
            stack.callback(clean)
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        interrupted()
    assert left.value.code == 128 + number
    assert cleaned == [1]
    assert signal.getsignal(number) is before


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), TINY)


@pytest.fixture
def nothing_stays(tmp_path: Path) -> Iterator[Callable[[], set[int]]]:
    """No directory in /dev/shm and no process of a demo that was started with MARK in its environment."""

    def processes() -> set[int]:
        mark = f"MARK={tmp_path}".encode()
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    before = pools()
    yield processes
    wait_for(lambda: not processes())
    assert pools() <= before


def pools() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("cachesvc-demo-")}


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MARK": str(tmp_path), "COLUMNS": "160"}
    command = [sys.executable, "-m", "cachesvc", "demo", "--tokens", "2048", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(HANG_S + 20)
@pytest.mark.usefixtures("nothing_stays")
def test_two_engines_share(model: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "--model", str(model))
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, out + err
    assert re.search(r"Engine 2 │ document \+ Q2 │ shared hit +│ +24 │ +0 │ +2048 │", out), out
    assert "The answers of both engines to Q2 are equal." in out


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(HANG_S + 20)
@pytest.mark.usefixtures("nothing_stays")
def test_two_engines_share_several_groups(tmp_path: Path) -> None:
    process = start(tmp_path, "--model", str(write_model(tmp_path / "model", HYBRID)))
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, out + err


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(HANG_S + 20)
@pytest.mark.usefixtures("nothing_stays")
def test_the_daemon_is_killed(model: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "--model", str(model), "--kill")
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, out + err
    assert re.search(r"Engine 2 │ document \+ Q3 │ no daemon +│ +2072 │ +0 │ +0 │", out), out
    assert re.search(r"Engine 2 │ document \+ Q2 │ shared hit, daemon restarted +│ +24 │ +0 │ +2048 │", out), out
    assert re.search(r"Chunks in the pool: (\d+) before the kill, \1 after it", out), out


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(HANG_S + 20)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_stopped_in_the_middle(
    number: signal.Signals, model: Path, tmp_path: Path, nothing_stays: Callable[[], set[int]]
) -> None:
    process = start(tmp_path, "--model", str(model))
    wait_for(lambda: len(nothing_stays()) == 4)  # itself, a daemon, two engines
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + number, out + err


@needs_vllm
def test_a_directory_without_a_model(tmp_path: Path) -> None:
    process = start(tmp_path, "--model", str(tmp_path))
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
