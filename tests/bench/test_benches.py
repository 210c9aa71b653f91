"""Each bench, with sizes that say nothing, comes to its end and prints JSON whose rows have numbers and ratios."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "arena_bandwidth": ["--sizes", "64KiB", "--ram", "32MiB", "--near", "2MiB", "--peers", "none"],
    "lookup_latency": ["--keys", "5000", "--clients", "2", "--no-peers"],
    "scaling": ["--chunks", "8192,9000", "--clients", "1,2", "--calls", "20"],
    "memory_per_chunk": ["--chunks", "8192"],
    "restart": ["--chunks", "5000"],
}


def run(bench: str, *flags: str, program: list[str] | None = None) -> dict[str, Any]:
    command = [*(program or [sys.executable, "-m", f"bench.{bench}"]), "--json", "--pairs", "1", *flags]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("bench", TINY)
def test_bench(bench: str) -> None:
    before = set(Path("/dev/shm").glob("cachesvc-bench-*"))
    report = run(bench, *TINY[bench])
    assert report["bench"] == bench
    assert report["question"].endswith("?")
    assert report["rows"]
    assert report["machine"]["cores_used_by_others"] >= 0
    for row in report["rows"]:
        assert row["value"] > 0
        assert math.isfinite(row["value"])
        if row["ratio"] is not None:
            assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] < math.inf
            assert row["ratio_to"]
    assert any(row["subject"] == "cachesvc" for row in report["rows"])
    assert set(Path("/dev/shm").glob("cachesvc-bench-*")) <= before


def cases(report: dict[str, Any], subject: str) -> set[str]:
    return {row["case"] for row in report["rows"] if row["subject"] == subject}


def test_bandwidth_has_a_ratio_to_memcpy_for_each_operation() -> None:
    report = run("arena_bandwidth", *TINY["arena_bandwidth"])
    ours = [row for row in report["rows"] if row["subject"] == "cachesvc"]
    assert {row["case"].split()[0] for row in ours} == {"put", "get", "write", "read"}
    assert all(row["ratio"] and row["ratio_to"] == "memcpy" for row in ours)
    assert cases(report, "memcpy") == cases(report, "cachesvc")


def test_lookup_is_beside_a_round_trip_and_has_its_limit() -> None:
    report = run("lookup_latency", "--keys", "6250", "--clients", "1", "--no-peers")
    ours = [row for row in report["rows"] if row["subject"] == "cachesvc"]
    assert cases(report, "round trip") == cases(report, "cachesvc") == {row["case"] for row in ours}
    assert [row["limit"] for row in ours if "hit" in row["case"]] == ["≤ 1"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server")
def test_redis_takes_part() -> None:
    pytest.importorskip("hiredis")
    bandwidth = run("arena_bandwidth", *TINY["arena_bandwidth"][:-1], "redis")
    assert {case.split()[0] for case in cases(bandwidth, "redis")} == {"put", "get"}
    lookups = run("lookup_latency", "--keys", "100", "--clients", "1")
    assert cases(lookups, "redis EXISTS, pipelined") == cases(lookups, "cachesvc")


def test_an_absent_peer_says_how_to_get_it(tmp_path: Path) -> None:
    flags = [*TINY["arena_bandwidth"][:-1], "lmcache"]
    program = ["env", f"CACHESVC_BENCH_LMCACHE={tmp_path}", sys.executable, "-m", "bench.arena_bandwidth"]
    report = run("arena_bandwidth", *flags, program=program)
    absent = [row for row in report["rows"] if row["subject"] == "lmcache"]
    assert len(absent) == 4
    assert all(row["value"] is None and "make bench-env-lmcache" in row["note"] for row in absent)


def test_it_prints_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "bench.memory_per_chunk", "--chunks", "8192", "--pairs", "1"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=110)
    table = capfd.readouterr().out
    assert re.search(r"limits met: [01] of 1\n", table)  # a daemon of 8192 chunks is mostly interpreter
    assert "8192 chunks" in table
