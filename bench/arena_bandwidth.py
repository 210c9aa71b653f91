"""How near to memcpy are put and get from another process, and how near do Redis and LMCache come?

Ours: the client is this process, the daemon another one. put = `Client.put` of a new key, with an arena that is full,
populated and evicting; get = `Client.get_into` of a key in RAM into a private buffer, one key a call; read and write =
one `Client.read(keys)` or `Client.write(keys)` of at least 32 MiB in all, every view copied out of or into private
buffers.

memcpy, the limit: between private buffers (huge pages where the kernel has them, as numpy's arrays) that were all
written before, in two pools: a *near* one of 256 MiB, and a *far* one as large as our arena that is passed through from
end to end as the arena is. So both copies rotate through the same number of distinct buffers, and neither finds more of
them in a cache than the other. The near pool is the same memory for both.

Redis, the same way: SET of a new key and GET, over a unix socket, redis-py with hiredis, evicting at our arena's size;
GET makes a new bytes object, which is taken for the private buffer. LMCache: see `bench/lmcache_driver.py`; its memory
is twice our arena and it has a pause before each turn, as it drops what is stored faster than it evicts.

In every round each subject moves 256 MiB. After its turn, outside the clock, it's checked that what came is what went.
Beside memcpy and ours stands the CPU time of a GiB, of all threads of the client and the daemon together: a client may
share a large copy between two threads, so its ratio can be above 1, and this tells what that costs.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any, Final, Protocol

from bench.harness import (
    START_S_MAX,
    Daemon,
    Limit,
    Pairs,
    Report,
    Row,
    alternate,
    answer,
    arguments,
    key,
    sizes,
    wait_for,
)
from bench.peers import AbsentError, LmcacheClient, LmcacheServer, RedisServer, connect
from cachesvc import Client
from cachesvc.config import MIB, format_size, parse_size

QUESTION: Final = __doc__.splitlines()[0]
NEAR_BYTES: Final = 256 * MIB
CALL_BYTES: Final = 32 * MIB
"""Of one `read` or `write` of several keys."""
EXTENTS: Final = 8
FILLING: Final = 1 << 64
"""Number of the first chunk of those that only fill the arena."""
LMCACHE_EVICTION_S: Final = 1.2
"""Its eviction polls once a second; what is stored too fast before is acknowledged and dropped."""
GIB: Final = 1 << 30

LIMITS: Final = {
    ("get", 4 * MIB): 0.8,
    ("get", 8 * MIB): 0.9,
    ("get", 32 * MIB): 0.9,
    ("read", 4 * MIB): 0.9,
    ("put", 4 * MIB): 0.75,
    ("put", 8 * MIB): 0.85,
    ("put", 32 * MIB): 0.85,
}


class Pool:
    """Private buffers of one size, every page of them written, taken in turn."""

    def __init__(self, total_bytes: int, size: int) -> None:
        memory = mmap.mmap(-1, total_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(memory)
        for page in range(0, total_bytes, mmap.PAGESIZE):
            whole[page] = 1
        self.buffers = [whole[start : start + size] for start in range(0, total_bytes - size + 1, size)]
        self._next = 0

    def take(self) -> memoryview:
        buffer = self.buffers[self._next]
        self._next = (self._next + 1) % len(self.buffers)
        return buffer

    def stamp(self, numbers: Sequence[int]) -> None:
        """Make the buffers that come next tell for which chunk they are."""
        for ahead, number in enumerate(numbers):
            self.buffers[(self._next + ahead) % len(self.buffers)][:8] = number.to_bytes(8, "little")


def stamp_of(buffer: memoryview) -> int:
    return int.from_bytes(buffer[:8], "little")


class Subject(Protocol):
    """Something that moves chunks; a turn returns GiB/s."""

    name: str
    turns: dict[str, Callable[[], float]]
    """By what it does: put, get, write, read."""

    def fill(self) -> None:
        """Before the puts: make it evict."""

    def settle(self) -> None:
        """Between the puts and the gets."""

    def note(self, operation: str) -> str:
        """What else is to be said of an operation."""


class Work:
    """What all subjects of one chunk size share: sizes, and the near pool as source and as destination."""

    def __init__(self, size: int, near_bytes: int, far_bytes: int) -> None:
        self.size, self.far_bytes, self.near_bytes = size, far_bytes, near_bytes
        self.count = near_bytes // size
        """Chunks of one turn."""
        self.near = Pool(near_bytes, size)
        self.a_call = max(1, min(CALL_BYTES, near_bytes) // size)
        """Chunks of one `read` or `write`."""

    def rate(self, seconds: float, count: int | None = None) -> float:
        return (self.count if count is None else count) * self.size / GIB / seconds


class Meter:
    """Wall and CPU time of what is measured; `server_cpu` is the CPU time of the process at the other end, in s."""

    def __init__(self, server_cpu: Callable[[], float] = lambda: 0.0) -> None:
        self._server_cpu = server_cpu
        self.cpu: dict[str, list[float]] = {}
        """By operation, s of all threads of both processes for a GiB."""

    def rate(self, operation: str, work: Work, run: Callable[[], None]) -> float:
        """GiB/s of `run`, which moves one turn's chunks."""
        cpu, started = process_time() + self._server_cpu(), perf_counter()
        run()
        seconds = perf_counter() - started
        spent = process_time() + self._server_cpu() - cpu
        self.cpu.setdefault(operation, []).append(work.rate(spent) ** -1)
        return work.rate(seconds)

    def note(self, operation: str) -> str:
        return f"CPU {median(self.cpu[operation]):.3f} s/GiB"


class Memcpy:
    """The limit."""

    name = "memcpy"

    def __init__(self, work: Work) -> None:
        self._work = work
        self._far = Pool(work.far_bytes, work.size)
        self.meter = Meter()

    def put(self) -> float:
        return self.meter.rate("put", self._work, lambda: self._copy(self._work.near, self._far))

    def get(self) -> float:
        return self.meter.rate("get", self._work, lambda: self._copy(self._far, self._work.near))

    def _copy(self, source: Pool, destination: Pool) -> None:
        for _ in range(self._work.count):
            destination.take()[:] = source.take()


class Ours:
    """A client of our daemon. Every put has succeeded and every get brought the right chunk, else RuntimeError."""

    name = "cachesvc"

    def __init__(self, work: Work, daemon: Daemon) -> None:
        self._work = work
        self._client = Client(daemon.address, namespace=f"arena-bandwidth-{work.size}", chunk_bytes=work.size)
        self._next = 1
        self._resident: list[int] = []
        self.meter = Meter(daemon.cpu_seconds)
        self.turns = {"put": self.put, "get": self.get, "write": self.write, "read": self.read}

    def fill(self) -> None:
        """Puts are refused while extents are made; twice the arena, so that every slot was written."""
        for number in range(2 * self._work.far_bytes // self._work.size):
            wait_for("an extent", partial(self._client.put, key(FILLING + number), self._work.near.take()))
        if not self._client.wait_ready(START_S_MAX):
            raise RuntimeError("the arena wasn't mapped in time")
        self.put()

    def put(self) -> float:
        keys, put, take = self._new_keys(), self._client.put, self._work.near.take
        refused = 0

        def run() -> None:
            nonlocal refused
            for name in keys:
                refused += not put(name, take())

        rate = self.meter.rate("put", self._work, run)
        if refused:
            raise RuntimeError(f"{refused} of {len(keys)} puts were refused")
        return rate

    def write(self) -> float:
        keys, take, step = self._new_keys(), self._work.near.take, self._work.a_call

        def run() -> None:
            for at in range(0, len(keys), step):
                with self._client.write(keys[at : at + step]) as write:
                    for view in write.views.values():
                        view[:] = take()

        rate = self.meter.rate("write", self._work, run)
        if self._client.lookup(keys) < len(keys):
            raise RuntimeError("some chunks were refused")
        return rate

    def _new_keys(self) -> list[bytes]:
        """Of as many chunks as a turn has; the buffers that come next say which is which."""
        numbers = range(self._next, self._next + self._work.count)
        self._next += self._work.count
        self._resident += numbers
        self._work.near.stamp(numbers)
        return [key(number) for number in numbers]

    def settle(self) -> None:
        """Find out what is still there."""
        self._resident = [number for number in self._resident if self._client.lookup([key(number)])]
        if len(self._resident) < self._work.count:
            raise RuntimeError(f"only {len(self._resident)} chunks are there")

    def get(self) -> float:
        numbers, buffers = self._take()
        keys, get_into = [key(number) for number in numbers], self._client.get_into
        missed = 0

        def run() -> None:
            nonlocal missed
            for name, buffer in zip(keys, buffers, strict=True):
                missed += not get_into(name, buffer)

        rate = self.meter.rate("get", self._work, run)
        self._check(numbers, buffers, missed)
        return rate

    def read(self) -> float:
        numbers, buffers = self._take()
        keys, step = [key(number) for number in numbers], self._work.a_call
        missed = 0

        def run() -> None:
            nonlocal missed
            for at in range(0, len(keys), step):
                with self._client.read(keys[at : at + step]) as chunks:
                    for view, destination in zip(chunks.views, buffers[at : at + step], strict=False):
                        destination[:] = view
                    missed += not chunks.valid()

        rate = self.meter.rate("read", self._work, run)
        self._check(numbers, buffers, missed)
        return rate

    def _take(self) -> tuple[list[int], list[memoryview]]:
        """The chunks that weren't read for longest, and where to."""
        numbers = self._resident[: self._work.count]
        self._resident = self._resident[self._work.count :] + numbers
        buffers = [self._work.near.take() for _ in numbers]
        for buffer in buffers:
            buffer[:8] = bytes(8)
        return numbers, buffers

    def _check(self, numbers: Sequence[int], buffers: Sequence[memoryview], missed: int) -> None:
        came = [stamp_of(buffer) for buffer in buffers]
        wrong = sum(a != b for a, b in zip(came, numbers, strict=True))
        if missed or wrong:
            raise RuntimeError(f"{missed} calls missed, {wrong} of {len(numbers)} chunks didn't come")

    def note(self, operation: str) -> str:
        return self.meter.note(operation)

    def close(self) -> None:
        self._client.close()


class Redis:
    """A client of redis-server."""

    name = "redis"

    def __init__(self, work: Work, address: str) -> None:
        self._work = work
        self._client = connect(address)
        self._next = 1
        self._resident: list[int] = []
        self.turns: dict[str, Callable[[], float]] = {"put": self.put, "get": self.get}

    def fill(self) -> None:
        for _ in range(self._work.far_bytes // self._work.near_bytes + 1):
            self.put()

    def put(self) -> float:
        numbers = range(self._next, self._next + self._work.count)
        self._next += self._work.count
        keys = [key(number) for number in numbers]
        self._work.near.stamp(numbers)
        started = perf_counter()
        for name in keys:
            self._client.set(name, self._work.near.take())
        seconds = perf_counter() - started
        self._resident += numbers
        return self._work.rate(seconds)

    def settle(self) -> None:
        self._resident = [number for number in self._resident if self._client.exists(key(number))]

    def get(self) -> float:
        numbers = self._resident[: self._work.count]
        self._resident = self._resident[self._work.count :] + numbers
        keys = [key(number) for number in numbers]
        seconds = 0.0
        for number, name in zip(numbers, keys, strict=True):
            started = perf_counter()
            value = self._client.get(name)
            seconds += perf_counter() - started
            if stamp_of(memoryview(value)) != number:
                raise RuntimeError("Redis gave another chunk")
        return self._work.rate(seconds, len(numbers))

    def note(self, operation: str) -> str:  # noqa: ARG002
        return ""

    def close(self) -> None:
        self._client.close()


class Lmcache:
    """Two drivers in LMCache's environment: one chunk a call, and several."""

    name = "lmcache"

    def __init__(self, work: Work, server: LmcacheServer) -> None:
        self._work = work
        self._one = LmcacheClient(server, work.size, 1, work.near_bytes, 1)
        self._many = LmcacheClient(server, work.size, work.a_call, work.near_bytes, 10**6)
        self.lost = 0
        self.turns: dict[str, Callable[[], float]] = {
            "put": lambda: self._store(self._one, 1),
            "get": lambda: self._retrieve(self._one, 1),
            "write": lambda: self._store(self._many, work.a_call),
            "read": lambda: self._retrieve(self._many, work.a_call),
        }

    def fill(self) -> None:
        pass

    def settle(self) -> None:
        sleep(LMCACHE_EVICTION_S)

    def _store(self, client: LmcacheClient, chunks: int) -> float:
        sleep(LMCACHE_EVICTION_S)
        calls = self._work.count // chunks
        answer = client.ask("store", calls)
        self.lost += int(answer["lost"]) * chunks
        # what it has acknowledged and not kept cost no time, so it mustn't count either
        return self._work.rate(answer["seconds"], (calls - int(answer["lost"])) * chunks)

    def _retrieve(self, client: LmcacheClient, chunks: int) -> float:
        answer = client.ask("retrieve", self._work.count // chunks)
        return self._work.rate(answer["seconds"], int(answer["count"]) * chunks)

    def note(self, operation: str) -> str:
        return f"{self.lost} acknowledged but lost" if self.lost and operation in ("put", "write") else ""

    def close(self) -> None:
        self._one.close()
        self._many.close()


# --- one chunk size ---------------------------------------------------------------------------------------------------


def measure(size: int, options: argparse.Namespace, report: Report) -> None:
    """All subjects at one chunk size, into `report`."""
    work = Work(size, max(options.near, size), options.ram)
    memcpy = Memcpy(work)
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(options.ram, options.ram // EXTENTS))
        subjects: list[Any] = [stack.enter_context(closing(Ours(work, daemon)))]
        absent = {}
        for name, start in PEERS.items():
            if name in options.peers:
                try:
                    subjects.append(start(work, stack, report))
                except AbsentError as reason:
                    absent[name] = str(reason)
        for subject in subjects:
            subject.fill()
        stores = compare(options.pairs, memcpy.put, subjects, ("put", "write"))
        for subject in subjects:
            subject.settle()
        loads = compare(options.pairs, memcpy.get, subjects, ("get", "read"))
    report.rows += rows(work, stores | loads, memcpy, subjects, absent)


def start_redis(work: Work, stack: ExitStack, report: Report) -> Redis:
    server = stack.enter_context(closing(RedisServer(work.far_bytes)))
    report.settings["redis"] = server.version
    return stack.enter_context(closing(Redis(work, server.address)))


def start_lmcache(work: Work, stack: ExitStack, report: Report) -> Lmcache:
    server = stack.enter_context(closing(LmcacheServer(2 * work.far_bytes)))
    report.settings["lmcache"] = server.version
    return stack.enter_context(closing(Lmcache(work, server)))


PEERS: Final = {"redis": start_redis, "lmcache": start_lmcache}


def compare(
    rounds: int, base: Callable[[], float], subjects: Sequence[Subject], operations: Sequence[str]
) -> dict[tuple[str, str], Pairs]:
    """(operation, subject) -> what its turns gave, all in the same rounds."""
    turns = {f"{name} {subject.name}": subject.turns.get(name) for name in operations for subject in subjects}
    measured = alternate(rounds, base, {name: turn for name, turn in turns.items() if turn})
    return {(name.split()[0], name.split()[1]): pairs for name, pairs in measured.items()}


def rows(
    work: Work, measured: dict[tuple[str, str], Pairs], memcpy: Memcpy, subjects: list[Any], absent: dict[str, str]
) -> list[Row]:
    """The lines of one size: for each operation memcpy, then the subjects, then who is absent."""
    lines = []
    size = format_size(work.size)
    for operation, base in {"put": "put", "get": "get", "write": "put", "read": "get"}.items():
        case = f"{operation} {work.a_call} × {size}" if operation in ("write", "read") else f"{operation} {size}"
        floor = measured[operation, Ours.name].base
        lines.append(Row(case, memcpy.name, median(floor), "GiB/s", note=memcpy.meter.note(base)))
        for subject in subjects:
            if operation in subject.turns:
                pairs = measured[operation, subject.name]
                bound = LIMITS.get((operation, work.size)) if subject.name == Ours.name else None
                limit = Limit("ratio", at_least=bound) if bound else None
                note = subject.note(operation)
                lines.append(Row(case, subject.name, pairs.value, "GiB/s", pairs.ratio, "memcpy", limit, note))
        lines += [Row(case, name, None, "GiB/s", note=f"absent: {why}") for name, why in absent.items()]
    return lines


def run(options: argparse.Namespace) -> Report:
    settings = {"arena": format_size(options.ram), "turn": format_size(options.near), "pairs": options.pairs}
    report = Report("arena_bandwidth", QUESTION, settings)
    for size in options.sizes:
        measure(size, options, report)
    return report


def main() -> None:
    parser = arguments(QUESTION)
    parser.add_argument("--sizes", type=sizes, default=sizes("1MiB,4MiB,8MiB,32MiB"), help="chunk sizes")
    parser.add_argument("--ram", type=parse_size, default=GIB, help="our arena (default: 1GiB)")
    parser.add_argument("--near", type=parse_size, default=NEAR_BYTES, help="bytes of one turn (default: 256MiB)")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="default: all")
    answer(run, parser)


if __name__ == "__main__":
    main()
