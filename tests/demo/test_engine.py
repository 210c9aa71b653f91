"""The parent's side: what it says when an engine can't start, hangs or dies, and that nothing of an engine stays.

What a living engine answers is in `test_child`. Tests with `vllm_engine` need vLLM in this environment.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from cachesvc.demo.engine import EngineDiedError, EngineHangsError, EngineProcess
from cachesvc.demo.model import TINY, write_model
from tests.support.daemon import wait_for

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
PROMPT = [3 + 7 * n % 2000 for n in range(300)]


def gone(pid: int) -> bool:
    """Is there no such process any more, or is it dead and not reaped?"""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def in_shm(pid: int) -> set[Path]:
    """What the process has mapped there."""
    return {Path(name) for name in re.findall(r"/dev/shm/\S+", Path("/proc", str(pid), "maps").read_text())}


@pytest.fixture
def instead(tmp_path: Path) -> Callable[[str], Path]:
    """A program to run in place of Python."""

    def make(script: str) -> Path:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


# --- without vLLM -----------------------------------------------------------------------------------------------------


def test_it_dies_at_once(instead: Callable[[str], Path]) -> None:
    with (
        pytest.raises(EngineDiedError, match=r"(?s)has ended with code 3.*sorry"),
        EngineProcess("model", python=instead("echo sorry >&2; exit 3")) as engine,
    ):
        engine.wait_ready()


def test_it_never_answers(instead: Callable[[str], Path]) -> None:
    with (
        EngineProcess("model", python=instead("exec sleep 1000"), hang_s=0.2) as engine,
        pytest.raises(EngineHangsError, match="hasn't answered"),
    ):
        engine.wait_ready()
    assert gone(engine.pid)


def test_it_takes_no_line(instead: Callable[[str], Path]) -> None:
    with (
        EngineProcess("model", python=instead("exec sleep 1000"), hang_s=0.2) as engine,
        pytest.raises(EngineHangsError, match="hasn't taken"),
    ):
        engine.call("submit", request="x" * (1 << 20))


def test_its_children_are_killed_too(instead: Callable[[str], Path]) -> None:
    with EngineProcess("model", python=instead("sleep 1000 & sleep 1000 & wait")) as engine:
        wait_for(lambda: len(engine.processes()) == 3)
        members = list(engine.processes())
    assert all(gone(pid) for pid in members)
    engine.kill()  # again is harmless


def test_start_leaves_nothing_when_it_fails(instead: Callable[[str], Path], tmp_path: Path) -> None:
    program = instead(f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    with pytest.raises(EngineHangsError):
        EngineProcess.start("model", python=program, hang_s=0.5)
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_it_prints_goes_to_the_log(instead: Callable[[str], Path], tmp_path: Path) -> None:
    with EngineProcess("model", python=instead("echo hello >&2; exec sleep 1000"), log=tmp_path / "log") as engine:
        wait_for(lambda: "hello" in engine.log_tail())
    assert engine.log_tail() == ""
    assert (tmp_path / "log").read_text() == "hello\n"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="there is vLLM")
def test_without_vllm_it_says_so() -> None:
    with pytest.raises(EngineDiedError, match="No module named 'vllm'"):
        EngineProcess.start("model")


def test_environment(instead: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    program = instead(
        "echo $OURS $HF_HUB_OFFLINE $OMP_NUM_THREADS $MORE $VLLM_CPU_OMP_THREADS_BIND >&2; exec sleep 1000"
    )
    settings = {"tensor_parallel_size": 2}
    cpus = sorted(os.sched_getaffinity(0))
    binding = f"{cpus[0]}|{cpus[1 % len(cpus)]}"
    with EngineProcess("model", settings, python=program, env={"OMP_NUM_THREADS": "2", "MORE": "x"}) as engine:
        wait_for(lambda: engine.log_tail() == f"1 1 2 x {binding}\n")


# --- with it ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), TINY)


@needs_vllm
def test_stop_and_what_an_engine_says_of_itself(model: Path) -> None:
    with EngineProcess.start(model) as engine:
        assert engine.info["groups"] == 1
        assert engine.info["block_size"] * engine.info["blocks"] * TINY.kv_elements_per_token * 4 == 256 << 20
        engine.stop()
        assert not engine.processes()
        for call in (engine.poll, engine.state):
            with pytest.raises(EngineDiedError, match="was stopped"):
                call()


@needs_vllm
def test_killed_from_outside(model: Path) -> None:
    with EngineProcess.start(model) as engine:
        name = engine.submit(PROMPT, max_tokens=5000)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError, match="code -9"):
            engine.wait([name])


@needs_vllm
def test_two_ranks(model: Path) -> None:
    """Ranks are processes; killing an engine leaves nothing of them, in /dev/shm neither."""
    with EngineProcess.start(model, {"tensor_parallel_size": 2}) as engine:
        cold, hit = engine.generate([PROMPT])[0], engine.generate([PROMPT])[0]
        members = engine.processes()
        mapped = {path for pid in members for path in in_shm(pid)}
    assert (cold.computed_tokens, hit.local_tokens) == (300, 256)
    assert cold.token_ids == hit.token_ids
    assert sum("Worker_TP" in command for command in members.values()) == 2
    assert all(gone(pid) for pid in members)
    assert any("vllm_dist" in path.name for path in mapped)
    assert not [path for path in mapped if path.exists()]


@needs_vllm
def test_an_engine_ends_with_its_parent(model: Path) -> None:
    code = (
        "import os, sys; from cachesvc.demo.engine import EngineProcess; e = EngineProcess.start(sys.argv[1]); "
        "e.submit([5] * 300, max_tokens=15000); print(e.pid, flush=True); os._exit(0)"
    )
    root = Path(__file__).resolve().parent.parent.parent
    parent = subprocess.run([sys.executable, "-c", code, model], cwd=root, stdout=subprocess.PIPE, check=True)
    pid = int(parent.stdout)
    started = time.monotonic()
    wait_for(lambda: gone(pid))
    assert time.monotonic() - started < 60, "a guard, not a limit"
