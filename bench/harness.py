"""What every bench shares: our daemon as a process of its own, turns taken alternately, medians, tables and JSON.

Covers: statistics, reports, command lines, starting and stopping daemons and client processes, filling an arena. Not
here: what other systems need to run (`bench.peers`), what is measured (one question a file).

How a comparison is made: a *round* is one *turn* of each subject, and right before each subject's turn one of what it
is compared with, so that whatever else the machine does hits both. The ratio of a comparison is the median over the
rounds of the ratio within the round, never a ratio of two bests.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Final, Self

from cachesvc import Client
from cachesvc.config import format_size, parse_size
from cachesvc.types import KEYS_PER_MESSAGE_MAX

START_S_MAX: Final = 60.0
"""A guard against hanging, no limit of ours."""
STOP_S_MAX: Final = 10.0
PAIRS: Final = 7

# --- statistics -------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `percent` % of `values` don't exceed."""
    if not values:
        raise ValueError("no values")
    if not 0 < percent <= 100:
        raise ValueError(f"percentile {percent}, there are those above 0 up to 100")
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the base a subject is: the median over pairs, and the middle half of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, subject: Sequence[float], base: Sequence[float]) -> Ratio:
        """`subject[i]` and `base[i]` were measured one right after the other."""
        if len(subject) != len(base) or not subject:
            raise ValueError(f"{len(subject)} values of the subject, {len(base)} of its base: these are no pairs")
        ratios = [s / b for s, b in zip(subject, base, strict=True)]
        return cls(median(ratios), percentile(ratios, 25), percentile(ratios, 75))


@dataclass(frozen=True, slots=True)
class Pairs:
    """What alternating turns gave: `values[i]` of the subject came right after `base[i]`."""

    values: list[float]
    base: list[float]

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def ratio(self) -> Ratio:
        return Ratio.of(self.values, self.base)


def alternate(rounds: int, base: Callable[[], float], turns: Mapping[str, Callable[[], float]]) -> dict[str, Pairs]:
    """Base, first subject, base, second subject, ...: one such round to warm up, then `rounds` that count."""
    measured = {name: Pairs([], []) for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            before, value = base(), turn()
            if number:
                measured[name].base.append(before)
                measured[name].values.append(value)
    return measured


# --- reports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limit:
    """What a row must reach; `of` names what is judged: "ratio" or "value"."""

    of: str
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        unit = "×" if self.of == "ratio" else ""
        return f"≥ {self.at_least:.3g}{unit}" if self.at_least is not None else f"≤ {self.at_most:.3g}{unit}"

    def met(self, number: float) -> bool:
        above = self.at_least is None or number >= self.at_least
        return above and (self.at_most is None or number <= self.at_most)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: `subject` doing `case`, how much, how many times its base, and whether that will do."""

    case: str
    subject: str
    value: float | None
    unit: str
    ratio: Ratio | None = None
    ratio_to: str = ""
    limit: Limit | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None = nothing is demanded, or there is nothing to judge."""
        if self.limit is None:
            return None
        ratio = None if self.ratio is None else self.ratio.median
        number = self.value if self.limit.of == "value" else ratio
        return None if number is None else self.limit.met(number)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"limit": self.limit and str(self.limit), "met": self.met}


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[0]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "huge_pages_shmem": " ".join(_lines("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "load_before": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


@dataclass(slots=True)
class Report:
    """The answer of one bench. `settings` is whatever a reader needs to take the numbers again."""

    bench: str
    question: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine_facts)

    def to_json(self) -> str:
        whole = asdict(self) | {"rows": [row.to_json() for row in self.rows], "load_after": os.getloadavg()[0]}
        return json.dumps(whole, indent=1, ensure_ascii=False)

    def lines(self) -> list[tuple[str, ...]]:
        """The cells of the table, heading first."""
        heading = ("case", "subject", "median", "ratio (middle half)", "to", "limit", "met", "note")
        return [heading, *(self._line(row) for row in self.rows)]

    @staticmethod
    def _line(row: Row) -> tuple[str, ...]:
        value = "–" if row.value is None else f"{row.value:.4g} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio.median:.3g} ({row.ratio.low:.3g}–{row.ratio.high:.3g})"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        return (row.case, row.subject, value, ratio, row.ratio_to, str(row.limit or ""), met, row.note)


def show(report: Report) -> None:
    """The table on standard output, the machine and settings above it."""
    from rich.console import Console
    from rich.table import Table

    # no terminal, no width: a log must not fold the table into columns of three letters
    console = Console(width=None if sys.stdout.isatty() else 160)
    facts = " · ".join(f"{key} {value}" for key, value in (report.machine | report.settings).items())
    console.print(f"{report.bench}: {report.question}\n{facts}", highlight=False, markup=False)
    table = Table(*report.lines()[0])
    for line in report.lines()[1:]:
        table.add_row(*line)
    console.print(table)
    judged = [row.met for row in report.rows if row.met is not None]
    console.print(f"limits met: {sum(judged)} of {len(judged)}\n", highlight=False)


# --- command lines ----------------------------------------------------------------------------------------------------


def arguments(question: str) -> argparse.ArgumentParser:
    """The flags that every bench has."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="rounds that count (default: %(default)s)")
    return parser


def sizes(text: str) -> list[int]:
    """`1MiB,4MiB` in bytes."""
    return [parse_size(size) for size in text.split(",")]


def numbers(text: str) -> list[int]:
    """`1,4,16`."""
    return [int(number) for number in text.split(",")]


def answer(measure: Callable[[argparse.Namespace], Report], parser: argparse.ArgumentParser) -> None:
    """The whole of a bench's `main`: measure as the command line says, then print."""
    options = parser.parse_args()
    # servers and shared memory are given back on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    busy, own, started = cpu_seconds_of_machine(), cpu_seconds_of_ours(), time.monotonic()
    report = measure(options)
    others = cpu_seconds_of_machine() - busy - (cpu_seconds_of_ours() - own)
    report.machine["cores_used_by_others"] = round(max(0.0, others) / (time.monotonic() - started), 2)
    if options.json:
        print(report.to_json())
    else:
        show(report)


def cpu_seconds_of_machine() -> float:
    """What all cores were busy with so far."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _lines("/proc/stat")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_seconds_of_ours() -> float:
    """What this process and those of its children that have ended were busy with."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- processes --------------------------------------------------------------------------------------------------------


GUARD: Final = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
"""Before the command of a server: a bench that is killed leaves none behind."""


def one_thread_each(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for every process of a bench: numerical libraries spin on contended cores otherwise."""
    return {**environment, "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, politely first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def wait_for(what: str, ready: Callable[[], bool], seconds_max: float = START_S_MAX, every_s: float = 0.01) -> None:
    """Ask until `ready`; RuntimeError after `seconds_max`."""
    deadline = time.monotonic() + seconds_max
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} wasn't ready in {seconds_max:g} s")
        time.sleep(every_s)


class Daemon:
    """`python -m cachesvc serve` with directories of its own; all of it is gone after `close`.

    It can be killed and started again on the same directories.
    """

    def __init__(self, ram_bytes: int, extent_bytes: int | None = None, **settings: object) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="cachesvc-bench-"))
        self.arena = Path(tempfile.mkdtemp(prefix="cachesvc-bench-", dir="/dev/shm"))
        self.address = str(self.home / "run" / "default" / "cachesvc.sock")
        self.ram_bytes = ram_bytes
        config = {
            "run_dir": str(self.home / "run"),
            "root": str(self.home / "root"),
            "arena_dir": str(self.arena),
            "ram_bytes": format_size(ram_bytes),
            "http": {"address": "off"},
        }
        if extent_bytes is not None:
            config["extent_bytes"] = format_size(extent_bytes)
        # JSON is YAML
        (self.home / "config.yaml").write_text(json.dumps(config | settings), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> float:
        """Start the process; returns the time (monotonic, s) just before exec. Doesn't wait until it answers."""
        command = [*GUARD, sys.executable, "-m", "cachesvc", "serve", "--config", str(self.home / "config.yaml")]
        with (self.home / "log").open("ab") as log:
            before = time.monotonic()
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=one_thread_each())
        return before

    def wait_ready(self) -> None:
        """Until it accepts connections; RuntimeError with what it printed if it ends instead."""
        import socket

        def answers() -> bool:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"the daemon ended: {self.log()}")
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(self.address) == 0

        wait_for("the daemon", answers)

    def log(self) -> str:
        """What it printed, the last lines."""
        return (self.home / "log").read_text(encoding="utf-8", errors="replace")[-4000:]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self._process is not None, "not started"
        self._process.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far, from the scheduler's own nanoseconds."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def anonymous_bytes(self) -> int:
        """Private memory (RssAnon): the arena, which is shared, isn't in it."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def close(self) -> None:
        if self._process is not None:
            stop(self._process)
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.rmtree(self.arena, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Workers:
    """Some processes that each do what a function returns for them, at the same moment and as often as asked.

    `prepare(number, *arguments)` runs in the worker and returns the turn, which must return something picklable.
    """

    def __init__(self, count: int, prepare: Callable[..., Callable[..., Any]], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, number, prepare, arguments), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.end()

    def turn(self, *arguments: object) -> list[Any]:
        """One turn of all workers at once; what each returned. An exception in one is raised here."""
        self.begin(*arguments)
        return self.end()

    def begin(self, *arguments: object) -> None:
        """Start a turn and don't wait for it."""
        for pipe in self._pipes:
            pipe.send(arguments)

    def end(self) -> list[Any]:
        """Wait for the turn that was begun."""
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(STOP_S_MAX)
            if process.is_alive():
                process.kill()
                process.join()


def _work(
    pipe: Connection, number: int, prepare: Callable[..., Callable[..., Any]], arguments: Sequence[object]
) -> None:
    try:
        turn = prepare(number, *arguments)
        pipe.send(None)
        while True:
            pipe.send(turn(*pipe.recv()))
    except EOFError:
        pass  # the bench has closed its end: done
    except Exception as error:  # noqa: BLE001 - it is raised in the bench
        pipe.send(error)


# --- chunks -----------------------------------------------------------------------------------------------------------


def key(number: int) -> bytes:
    """32 bytes, as an engine's hashes have."""
    return number.to_bytes(32, "big")


def store(client: Client, numbers: range, content: Callable[[int], bytes] | None = None) -> None:
    """Have chunks stored, in batches; again and again while the daemon still makes extents. None = whatever bytes."""
    for start in range(numbers.start, numbers.stop, KEYS_PER_MESSAGE_MAX):
        some = range(start, min(start + KEYS_PER_MESSAGE_MAX, numbers.stop))
        wait_for("room in the arena", partial(_stored, client, some, content))


def _stored(client: Client, numbers: range, content: Callable[[int], bytes] | None) -> bool:
    keys = [key(number) for number in numbers]
    with client.write(keys) as write:
        if content is not None:
            for number, name in zip(numbers, keys, strict=True):
                if name in write.views:
                    write.views[name][:] = content(number)
    return client.lookup(keys) == len(keys)
