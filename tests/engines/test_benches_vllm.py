"""The benches with real vLLM engines, with sizes that say nothing, come to their ends and print what they should."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.decode_interference import rows_of as interference_rows
from bench.peers import AbsentError
from bench.ttft_vllm import Taken, rows_of
from bench.vllm_engines import NONE, OURS, Asked, Prompts, both_python, chunk_tokens, vllm_python
from cachesvc.demo.model import MID, TINY

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 280

SMALL = {
    "ttft_vllm": ["--model", "tiny", "--tokens", "512", "--no-peers"],
    "decode_interference": ["--model", "tiny", "--tokens", "512", "--waiting", "4", "--answered", "2", "--steps", "20"],
    "serve_vllm": ["--model", "tiny", "--prefixes", "2", "--repeats", "3", "--prefix-tokens", "512", "--no-peers"],
}


def run(bench: str, *flags: str) -> dict[str, Any]:
    environment = {**os.environ, "CACHESVC_VLLM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"bench.{bench}", "--json", "--pairs", "1", *flags]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, env=environment
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("bench", SMALL)
def test_bench(bench: str) -> None:
    before = set(Path("/dev/shm").glob("cachesvc-bench-*"))
    report = run(bench, *SMALL[bench])
    assert report["bench"] == bench
    assert report["question"].endswith("?")
    assert {row["subject"] for row in report["rows"]} == {NONE, OURS}
    for row in report["rows"]:
        assert math.isfinite(row["value"])
        if row["ratio"] is not None:
            assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] < math.inf
            assert row["ratio_to"]
    assert set(Path("/dev/shm").glob("cachesvc-bench-*")) <= before


# --- what they make of what they measured ----------------------------------------------------------------------------


def asked(ttft_ms: float, cpu_ms: float) -> Asked:
    return Asked(ttft_ms, cpu_ms, (1,), 0, 0)


def taken(ours: tuple[float, float], base: tuple[float, float], floor: float = 0.0) -> Taken:
    return Taken([asked(*ours)] * 3, [asked(*base)] * 3, [floor] * 3)


def test_a_hit_is_judged_by_the_local_hit_and_a_prompt_by_its_cpu_without_memcpy() -> None:
    base = (100.0, 90.0)
    kinds = {
        "cold": taken((1000, 1030), (1000, 1000), 20),
        "local": taken((100, 93), base),
        "shared": taken((109, 99), base),
    }
    rows = rows_of(8192, {(kind, OURS): one for kind, one in kinds.items()}, {OURS: 16})
    judged = {row.case: row for row in rows if row.limit}
    assert [(row.value, row.met) for row in judged.values()] == [(109, True), (3, False), (1010, True)]
    assert "16 of 16 tokens" in judged["shared hit of 8192"].note


def test_short_prompts_are_only_judged_by_what_a_local_hit_costs() -> None:
    kinds = {kind: taken((100, 91), (100, 90)) for kind in ("cold", "local", "shared")}
    rows = rows_of(2048, {(kind, OURS): one for kind, one in kinds.items()}, {OURS: 16})
    assert [row.case for row in rows if row.limit] == ["local hit of 2048: CPU more than without connector"]


def test_steps_are_judged_as_a_whole() -> None:
    from argparse import Namespace

    from bench.decode_interference import Taken as Steps

    steps = Steps([[(0.1, 10.0)] * 5], [[(0.2, 10.5)] * 5])
    rows = interference_rows(OURS, steps, Namespace(waiting=32))
    assert [(row.case, row.met) for row in rows if row.limit] == [("whole step, 32 wait", False)]
    assert rows[1].ratio is not None
    assert rows[1].ratio.median == pytest.approx(2)


def test_prompts_are_new_each_time_and_the_same_in_each_run() -> None:
    one, other = Prompts(3), Prompts(3)
    first, second = one.tokens(100), one.tokens(100)
    assert first == other.tokens(100) != second
    assert min(first + second) >= 3


def test_chunks_are_as_the_connector_makes_them() -> None:
    assert (chunk_tokens(MID), chunk_tokens(TINY)) == (128, 256)


def test_who_is_absent_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(AbsentError, match="make vllm-env"):
        vllm_python({})
    assert vllm_python({"CACHESVC_VLLM_PYTHON": "/there"}) == Path("/there")
    with pytest.raises(AbsentError, match="make bench-env-vllm-lmcache"):
        both_python({"XDG_CACHE_HOME": str(tmp_path)})
