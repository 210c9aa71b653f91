"""Does an operation cost the same with a hundred times the chunks, and with sixteen times the clients?

Chunks of 4 KiB in an arena that is full and evicting: 10k, 100k, 1M of them; 1, 4 and 16 client processes. Operations:
lookup of 256 keys that were stored one after the other, as a prompt's (one message); `get_into` of one chunk; `put` of
one new chunk.

Two costs, the second judged: *latency*, p50 of a call, and *daemon CPU*, what the daemon's threads were on a CPU for
(the kernel's nanoseconds) divided by the calls of all clients. Latency of many clients says how many cores there are,
CPU doesn't. The ratio is to the fewest chunks with one client. Flat = at most 1.5 times that; anything like O(n) would
show as 100 times. A lookup may grow by as much more as 256 lookups in a bare dict of that many keys, measured in the
same run: a table that doesn't fit the CPU's caches any more costs that. What the daemon does by itself, without any
call, is measured at the end.

Sizes can't alternate in one arena, so each has a daemon of its own, all of them running and full at the same time, and
in each round every size has its turn right after one of the smallest.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from time import perf_counter, sleep
from typing import Any, Final

from bench.harness import (
    START_S_MAX,
    Daemon,
    Limit,
    Pairs,
    Report,
    Row,
    Workers,
    alternate,
    answer,
    arguments,
    key,
    numbers,
    percentile,
    store,
)
from cachesvc import Client

QUESTION: Final = __doc__.splitlines()[0]
CHUNK_BYTES: Final = 4096
NAMESPACE: Final = "scaling"
LOOKUP_KEYS: Final = 256
FLAT: Final = 1.5
OPERATIONS: Final = ("lookup", "get", "put")
CALLS: Final = 1000
"""Of one turn, shared among the clients."""
IDLE_S: Final = 1.0


def fill(daemon: Daemon, chunks: int) -> range:
    """Write twice as many chunks as there is room for; some of the last that are there."""
    last = 2 * chunks
    there = range(last - chunks // 2, last)
    with Client(daemon.address, namespace=NAMESPACE, chunk_bytes=CHUNK_BYTES) as client:
        store(client, range(last))
        found = client.lookup([key(number) for number in there])
        if found != len(there):
            raise RuntimeError(f"{found} of the last {len(there)} chunks are there")
    return there


class ClientProcess:
    """One client: its turn is its share of the calls of one operation, each timed, in ms."""

    def __init__(self, number: int, address: str, calls: int, there: range) -> None:
        self._client = Client(address, namespace=NAMESPACE, chunk_bytes=CHUNK_BYTES)
        self._client.wait_ready(START_S_MAX)
        self._calls, self._there = calls, there
        self._draw = random.Random(number)
        # of no other client, and of no client before
        self._new = random.SystemRandom().getrandbits(128) << 64
        self._buffer = bytearray(CHUNK_BYTES)

    def turn(self, operation: str) -> list[float]:
        prepare = {"lookup": self._lookup, "get": self._get, "put": self._put}[operation]
        spent, failed = [], 0
        for _ in range(self._calls):
            call = prepare()
            started = perf_counter()
            done = call()
            spent.append((perf_counter() - started) * 1000)
            failed += not done
        if failed:
            raise RuntimeError(f"{failed} of {self._calls} {operation} calls failed")
        return spent

    def _lookup(self) -> Callable[[], bool]:
        first = self._draw.choice(self._there[:-LOOKUP_KEYS])
        some = [key(number) for number in range(first, first + LOOKUP_KEYS)]
        return lambda: self._client.lookup(some) == len(some)

    def _get(self) -> Callable[[], bool]:
        name = key(self._draw.choice(self._there))
        return lambda: self._client.get_into(name, self._buffer)

    def _put(self) -> Callable[[], bool]:
        self._new += 1
        name = key(self._new)
        return lambda: self._client.put(name, self._buffer)


def client_process(number: int, address: str, calls: int, there: range) -> Callable[[str], list[float]]:
    return ClientProcess(number, address, calls, there).turn


class Place:
    """One daemon, full, and its client processes of the moment."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.daemon = Daemon(arena_bytes(chunks))
        try:
            self.daemon.start()
            self.daemon.wait_ready()
            self.there = fill(self.daemon, chunks)
        except BaseException:
            self.daemon.close()
            raise

    def turn(self, workers: Workers, operation: str) -> tuple[float, float]:
        """p50 of a call (ms), and the daemon's CPU time for one (µs)."""
        before = self.daemon.cpu_seconds()
        spent: list[float] = list(chain.from_iterable(workers.turn(operation)))
        return percentile(spent, 50), (self.daemon.cpu_seconds() - before) / len(spent) * 1e6

    def idle(self) -> float:
        """CPU time of the daemon (ms) in a second in which nobody asks it anything."""
        before = self.daemon.cpu_seconds()
        sleep(IDLE_S)
        return (self.daemon.cpu_seconds() - before) / IDLE_S * 1000

    def close(self) -> None:
        self.daemon.close()


def arena_bytes(chunks: int) -> int:
    """Whole extents of 16 MiB, two at least."""
    extent = 16 << 20
    return max(2, -(-chunks * CHUNK_BYTES // extent)) * extent


@dataclass(slots=True)
class Costs:
    """What rounds gave for one operation in one place with one number of clients, and in the base's turn before."""

    ms: list[float] = field(default_factory=list)
    us: list[float] = field(default_factory=list)
    base_us: list[float] = field(default_factory=list)


class BareDict:
    """What no index of Python objects is faster than: as many lookups in a dict of as many keys."""

    def __init__(self, chunks: int, calls: int) -> None:
        self._chunks, self._calls = chunks, calls
        self._table = {key(number): number for number in range(chunks)}

    def turn(self) -> float:
        """µs of `LOOKUP_KEYS` lookups, p50 of many."""
        spent = []
        for _ in range(self._calls):
            first = random.randrange(self._chunks - LOOKUP_KEYS)
            some = [key(number) for number in range(first, first + LOOKUP_KEYS)]
            started = perf_counter()
            found = list(map(self._table.get, some))
            spent.append((perf_counter() - started) * 1e6)
            if found[-1] != first + LOOKUP_KEYS - 1:
                raise RuntimeError("a dict has another value than was put into it")
        return percentile(spent, 50)


def bare_dicts(chunks: Sequence[int], options: argparse.Namespace) -> dict[int, Pairs]:
    """By chunks: a dict of that many keys beside one of the fewest."""
    first = BareDict(chunks[0], options.calls)
    return {
        count: alternate(options.pairs, first.turn, {"dict": BareDict(count, options.calls).turn})["dict"]
        for count in chunks
    }


def measure(
    operations: Sequence[str], places: list[Place], clients: int, options: argparse.Namespace
) -> dict[tuple[str, int], Costs]:
    """(operation, chunks) -> costs with that many clients; the base is the first place with one client."""
    costs = {(operation, place.chunks): Costs() for operation in operations for place in places}
    with ExitStack() as stack:

        def start(place: Place, count: int) -> Workers:
            workers = Workers(count, client_process, place.daemon.address, max(1, options.calls // count), place.there)
            return stack.enter_context(closing(workers))

        base = start(places[0], 1)
        others = [(place, start(place, clients)) for place in places]
        for number in range(options.pairs + 1):
            for operation in operations:
                for place, workers in others:
                    _, base_us = places[0].turn(base, operation)
                    ms, us = place.turn(workers, operation)
                    if number:
                        cost = costs[operation, place.chunks]
                        cost.ms.append(ms)
                        cost.us.append(us)
                        cost.base_us.append(base_us)
    return costs


def run(options: argparse.Namespace) -> Report:
    chunks, clients = sorted(options.chunks), sorted(options.clients)
    settings: dict[str, Any] = {"chunk_bytes": CHUNK_BYTES, "lookup_keys": LOOKUP_KEYS, "pairs": options.pairs}
    report = Report("scaling", QUESTION, settings | {"smallest": f"{chunks[0]} chunks, 1 client"})
    dicts = bare_dicts(chunks, options)
    for count, pairs in dicts.items():
        report.rows.append(Row(f"lookup, {count} keys", "bare dict", pairs.value, "µs", pairs.ratio, "smallest"))
    growth = {count: pairs.ratio.median - 1 for count, pairs in dicts.items()}
    with ExitStack() as stack:
        places = [stack.enter_context(closing(Place(count))) for count in chunks]
        # puts last: they push out what the others ask for
        for operations in (OPERATIONS[:-1], OPERATIONS[-1:]):
            costs = {count: measure(operations, places, count, options) for count in clients}
            report.rows += [
                row(operation, count, some, costs[some][operation, count], growth)
                for operation in operations
                for some in clients
                for count in chunks
            ]
        for place in places:
            idle = median(place.idle() for _ in range(options.pairs))
            report.rows.append(Row(f"idle, {place.chunks} chunks", "cachesvc", idle, "ms CPU / s"))
    return report


def row(operation: str, chunks: int, clients: int, cost: Costs, growth: dict[int, float]) -> Row:
    """`growth` is that of a bare dict, by chunks."""
    pairs = Pairs(cost.us, cost.base_us)
    case = f"{operation}, {chunks} chunks, {clients} client{'s' if clients > 1 else ''}"
    limit = Limit("ratio", at_most=FLAT + max(0, growth[chunks]) if operation == "lookup" else FLAT)
    note = f"p50 {median(cost.ms) * 1000:.0f} µs a call"
    return Row(case, "cachesvc", pairs.value, "µs CPU", pairs.ratio, "smallest", limit, note)


def main() -> None:
    parser = arguments(QUESTION)
    parser.add_argument(
        "--chunks", type=numbers, default=[10_000, 100_000, 1_000_000], help="default: 10000,100000,1000000"
    )
    parser.add_argument("--clients", type=numbers, default=[1, 4, 16], help="client processes (default: 1,4,16)")
    parser.add_argument(
        "--calls", type=int, default=CALLS, help="of a turn, all clients together (default: %(default)s)"
    )
    answer(run, parser)


if __name__ == "__main__":
    main()
