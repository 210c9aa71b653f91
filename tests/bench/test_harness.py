"""The numbers of a report are what they are called, and processes end with what started them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.harness import (
    GUARD,
    Daemon,
    Limit,
    Pairs,
    Ratio,
    Report,
    Row,
    Workers,
    alternate,
    key,
    numbers,
    percentile,
    sizes,
    store,
    wait_for,
)
from cachesvc import Client

MIB = 1 << 20

# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "percent", "value"),
    [
        ([5.0], 1, 5.0),
        ([5.0], 100, 5.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([4.0, 3.0, 2.0, 1.0], 50, 2.0),
        (list(map(float, range(1, 101))), 99, 99.0),
        (list(map(float, range(1, 101))), 100, 100.0),
        (list(map(float, range(1, 102))), 99, 100.0),
    ],
)
def test_percentile(values: list[float], percent: float, value: float) -> None:
    assert percentile(values, percent) == value


@given(st.lists(st.floats(0, 1e9), min_size=1), st.floats(0.001, 100))
def test_percentile_is_the_smallest_value_that_enough_values_do_not_exceed(values: list[float], percent: float) -> None:
    value = percentile(values, percent)
    needed = len(values) * percent / 100
    assert value in values
    assert sum(v <= value for v in values) >= needed * (1 - 1e-9)
    assert sum(v < value for v in values) < needed


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 100.1), ([1.0], -1)])
def test_percentile_of_nothing(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match=r"no values|percentile"):
        percentile(values, percent)


def test_ratio_is_that_of_pairs_not_of_medians() -> None:
    subject, base = [1.0, 10.0, 100.0], [2.0, 10.0, 400.0]
    assert Ratio.of(subject, base) == Ratio(0.5, 0.25, 1.0)
    assert Pairs(subject, base).ratio.median == 0.5
    assert Pairs(subject, base).value == 10.0


@given(st.lists(st.floats(0.1, 10), min_size=1), st.floats(0.1, 10))
def test_ratio_ignores_what_hits_both(base: list[float], times: float) -> None:
    ratio = Ratio.of([value * times for value in base], base)
    assert ratio.median == pytest.approx(times)
    assert ratio.low == pytest.approx(times)
    assert ratio.high == pytest.approx(times)


@pytest.mark.parametrize(("subject", "base"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_ratio_needs_pairs(subject: list[float], base: list[float]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        Ratio.of(subject, base)


def test_turns_alternate_and_the_first_round_does_not_count() -> None:
    told: list[str] = []
    clock = itertools.count()

    def turn(name: str) -> Callable[[], float]:
        def take() -> float:
            told.append(name)
            return float(next(clock))

        return take

    measured = alternate(2, turn("base"), {"a": turn("a"), "b": turn("b")})
    assert told == ["base", "a", "base", "b"] * 3
    assert measured == {"a": Pairs([5.0, 9.0], [4.0, 8.0]), "b": Pairs([7.0, 11.0], [6.0, 10.0])}


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "met", "text"),
    [
        (Limit("ratio", at_least=0.9), True, "≥ 0.9×"),
        (Limit("ratio", at_least=0.91), False, "≥ 0.91×"),
        (Limit("value", at_most=3.0), True, "≤ 3"),
        (Limit("value", at_most=2.9), False, "≤ 2.9"),
        (None, None, ""),
    ],
)
def test_limits(limit: Limit | None, met: bool | None, text: str) -> None:
    row = Row("get", "cachesvc", 3.0, "GiB/s", Ratio(0.9, 0.8, 1.0), "memcpy", limit)
    assert row.met is met
    report = Report("x", "why?", {}, [row])
    assert json.loads(report.to_json())["rows"][0]["limit"] == (text or None)
    assert report.lines()[1][5:7] == (text, {None: "", True: "yes", False: "NO"}[met])


@pytest.mark.parametrize("of", ["ratio", "value"])
def test_nothing_to_judge(of: str) -> None:
    row = Row("get", "redis", None, "GiB/s", limit=Limit(of, at_least=1.0), note="absent")
    assert row.met is None
    assert Report("x", "why?", {}, [row]).lines()[1][2] == "–"


def test_report_is_complete_json() -> None:
    report = Report("x", "why?", {"pairs": 7}, [Row("put", "memcpy", 1.5, "GiB/s")])
    told = json.loads(report.to_json())
    assert told["bench"] == "x"
    assert told["question"] == "why?"
    assert told["settings"] == {"pairs": 7}
    assert told["rows"][0]["value"] == 1.5
    assert {"cpu", "cores", "kernel", "python", "load_before"} <= told["machine"].keys()
    assert told["load_after"] >= 0


def test_lists_of_arguments() -> None:
    assert sizes("1MiB,4096") == [MIB, 4096]
    assert numbers("1,4,16") == [1, 4, 16]


# --- processes --------------------------------------------------------------------------------------------------------


def test_waiting_ends() -> None:
    answers = iter([False, False, True])
    wait_for("it", lambda: next(answers), every_s=0)
    with pytest.raises(RuntimeError, match="it wasn't ready in 0 s"):
        wait_for("it", lambda: False, 0, 0)


def adder(number: int, add: int) -> Callable[[int], int]:
    if add == 13:
        raise OverflowError("thirteen")

    def turn(more: int) -> int:
        if more == 13:
            raise KeyError("13")
        return 100 * number + add + more

    return turn


def test_workers_take_their_turns() -> None:
    workers = Workers(2, adder, 10)
    try:
        assert workers.turn(1) == [11, 111]
        workers.begin(2)
        assert workers.end() == [12, 112]
        with pytest.raises(KeyError):
            workers.turn(13)
    finally:
        workers.close()


def test_a_worker_that_cannot_start() -> None:
    with pytest.raises(OverflowError):
        Workers(1, adder, 13)


def test_daemon_starts_dies_and_comes_back() -> None:
    with Daemon(64 * MIB) as daemon:
        with Client(daemon.address, namespace="test-harness", chunk_bytes=4096) as client:
            store(client, range(5000), lambda number: number.to_bytes(4096, "big"))
            assert client.lookup([key(number) for number in range(5000)]) == 5000
        assert daemon.anonymous_bytes() > MIB
        assert daemon.cpu_seconds() > 0
        daemon.kill()
        daemon.start()
        daemon.wait_ready()
        with Client(daemon.address, namespace="test-harness", chunk_bytes=4096) as client:
            buffer = bytearray(4096)
            assert client.get_into(key(4999), buffer)
            assert int.from_bytes(buffer, "big") == 4999
        home, arena, pid = daemon.home, daemon.arena, daemon.pid
    assert not home.exists()
    assert not arena.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_a_daemon_that_cannot_start_says_why() -> None:
    daemon = Daemon(64 * MIB, no_such_setting=1)
    with pytest.raises(RuntimeError, match="no_such_setting"), daemon:
        pass
    assert not daemon.home.exists()


@pytest.mark.skipif(not GUARD, reason="needs setpriv of util-linux")
def test_a_killed_bench_leaves_no_daemon() -> None:
    code = (
        "import sys, time\n"
        "from bench.harness import Daemon\n"
        "daemon = Daemon(64 << 20).__enter__()\n"
        "print(daemon.pid, daemon.home, daemon.arena, flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        pid, *directories = bench.stdout.readline().split()
        bench.kill()
    wait_for("the daemon's end", lambda: not os.path.exists(f"/proc/{pid}"))
    for directory in directories:
        subprocess.run(["rm", "-r", directory], check=True)
