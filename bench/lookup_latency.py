"""How long does it take to ask for a whole prompt's chunks, and how much of that is the socket?

Ours: `Client.lookup(keys)` of 32-byte keys in RAM, every one probed, p50 and p99 in ms; all hits and all misses (keys
never stored, so every one is probed, too); 1 client, and 4 client processes at once. 6,250 keys are 100k tokens in
chunks of 16, two messages.

The floor: one round trip of as many bytes each way as our request and our answer have, to an echo server that does
nothing else, over a unix socket with the same buffers, as many clients at once. Redis, for comparison: an EXISTS a key
in one pipeline (which alone tells where the first gap is), and one EXISTS with all keys (which only counts). Mooncake
Store isn't installed here; elsewhere it took 1.4 to 2.2 ms for 6,250 keys.

In each round every client does as many calls as fit in a third of a second, at least 3, at most 100. The value is the
median over the rounds of the round's p50; p99 is that of all calls together. The ratio is that of the p50s in a round.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import chain
from time import perf_counter
from typing import Any, Final

from bench.harness import (
    Daemon,
    Limit,
    Pairs,
    Report,
    Row,
    Workers,
    alternate,
    answer,
    arguments,
    numbers,
    percentile,
    wait_for,
)
from bench.peers import AbsentError, RedisServer, connect
from cachesvc import Client
from cachesvc.config import MIB
from cachesvc.types import KEYS_PER_MESSAGE_MAX, KeyState
from cachesvc.wire.framing import encode
from cachesvc.wire.messages import Looked, Lookup, pack_keys

QUESTION: Final = __doc__.splitlines()[0]
KEY_BYTES: Final = 32
CHUNK_BYTES: Final = 4096
TURN_S: Final = 0.33
CALLS_MIN: Final = 3
CALLS_MAX: Final = 100
SOCKET_BUFFER_BYTES: Final = 1 << 20
LIMIT_MS: Final = {(6250, "hit", 1): 1.0}


def keys_of(seed: int, count: int) -> list[bytes]:
    """The same keys in every process."""
    draw = random.Random(seed)
    return [draw.randbytes(KEY_BYTES) for _ in range(count)]


PRESENT: Final = 1
ABSENT: Final = 2
"""Seeds of keys that are stored, and of those that aren't."""


def timed(call: Callable[[], Any], expected: Any) -> Callable[[], list[float]]:
    """A turn of `call`: the milliseconds of each; RuntimeError if an answer isn't `expected`."""

    def turn() -> list[float]:
        spent: list[float] = []
        until = perf_counter() + TURN_S
        while len(spent) < CALLS_MIN or (perf_counter() < until and len(spent) < CALLS_MAX):
            started = perf_counter()
            answer = call()
            spent.append((perf_counter() - started) * 1000)
            if answer != expected:
                raise RuntimeError(f"the answer is {answer!r}, not {expected!r}")
        return spent

    return turn


# --- client processes: each of these runs in one ----------------------------------------------------------------------


def ours(_: int, address: str, count: int, hit: bool) -> Callable[[], list[float]]:
    client = Client(address, namespace="lookup-latency", chunk_bytes=CHUNK_BYTES)
    keys = keys_of(PRESENT if hit else ABSENT, count)
    return timed(lambda: client.lookup(keys), count if hit else 0)


def floor(_: int, address: str, count: int, __: bool) -> Callable[[], list[float]]:
    request_bytes, reply_bytes = message_bytes(count)
    client = socket.socket(socket.AF_UNIX)
    set_buffers(client)
    client.connect(address)
    client.sendall(request_bytes.to_bytes(8, "big") + reply_bytes.to_bytes(8, "big"))
    request, reply = bytes(request_bytes), bytearray(reply_bytes)

    def call() -> bool:
        client.sendall(request)
        return receive(client, reply)

    return timed(call, True)


def redis_pipeline(_: int, address: str, count: int, hit: bool) -> Callable[[], list[float]]:
    client = connect(address)
    keys = keys_of(PRESENT if hit else ABSENT, count)

    def call() -> int:
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.exists(key)
        return sum(pipeline.execute())

    return timed(call, count if hit else 0)


def redis_count(_: int, address: str, count: int, hit: bool) -> Callable[[], list[float]]:
    client = connect(address)
    keys = keys_of(PRESENT if hit else ABSENT, count)
    return timed(lambda: client.exists(*keys), count if hit else 0)


# --- the floor's server -----------------------------------------------------------------------------------------------


def message_bytes(count: int) -> tuple[int, int]:
    """Bytes of our request and of our answer for `count` keys."""
    keys = keys_of(PRESENT, count)
    batches = [keys[start : start + KEYS_PER_MESSAGE_MAX] for start in range(0, count, KEYS_PER_MESSAGE_MAX)]
    request = sum(len(encode(Lookup(call, pack_keys(0, batch)))) for call, batch in enumerate(batches, 1000))
    states = [bytes([KeyState.RAM]) * len(batch) for batch in batches]
    return request, sum(len(encode(Looked(call, some, 1))) for call, some in enumerate(states, 1000))


def set_buffers(connection: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def receive(connection: socket.socket, into: bytearray) -> bool:
    """Fill `into`; False at the end of the stream."""
    view, got = memoryview(into), 0
    while got < len(into):
        n = connection.recv_into(view[got:])
        if not n:
            return False
        got += n
    return True


class Echo:
    """A process that answers so many bytes with so many, as its client says first; a process a client."""

    def __init__(self, clients: int) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="cachesvc-bench-")
        self.address = os.path.join(self._home.name, "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(clients)
            self._pids = [self._serve(listener) for _ in range(clients)]

    @staticmethod
    def _serve(listener: socket.socket) -> int:
        """One process; its end of the fork never returns."""
        pid = os.fork()
        if pid:
            return pid
        try:
            connection, _ = listener.accept()
            set_buffers(connection)
            sizes = bytearray(16)
            receive(connection, sizes)
            request = bytearray(int.from_bytes(sizes[:8], "big"))
            reply = bytes(int.from_bytes(sizes[8:], "big"))
            while receive(connection, request):
                connection.sendall(reply)
        finally:
            os._exit(0)

    def close(self) -> None:
        """Its clients are gone already, so each process has come to its end."""
        for pid in self._pids:
            os.waitpid(pid, 0)
        self._home.cleanup()


# --- rounds -----------------------------------------------------------------------------------------------------------


def store(daemon: Daemon, count: int) -> None:
    """All present keys, in our daemon."""
    keys = keys_of(PRESENT, count)
    with Client(daemon.address, namespace="lookup-latency", chunk_bytes=CHUNK_BYTES) as client:

        def there() -> bool:
            with client.write(keys):
                pass
            return client.lookup(keys) == count

        wait_for("every chunk", there)


def store_redis(server: RedisServer, count: int) -> None:
    client = connect(server.address)
    pipeline = client.pipeline(transaction=False)
    for key in keys_of(PRESENT, count):
        pipeline.set(key, b"x")
    pipeline.execute()


def measure(count: int, clients: int, hit: bool, rounds: int, daemon: Daemon, redis: RedisServer | None) -> list[Row]:
    """All subjects for one number of keys and clients."""
    case = f"{count} keys, all {'hit' if hit else 'miss'}, {clients} client{'s' if clients > 1 else ''}"
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        echo = stack.enter_context(closing(Echo(clients)))

        def start(prepare: Callable[..., Callable[[], list[float]]], name: str, address: str) -> Callable[[], float]:
            workers = stack.enter_context(closing(Workers(clients, prepare, address, count, hit)))

            def turn() -> float:
                spent = list(chain.from_iterable(workers.turn()))
                samples.setdefault(name, []).extend(spent)
                return percentile(spent, 50)

            return turn

        base = start(floor, "round trip", echo.address)
        turns = {"cachesvc": start(ours, "cachesvc", daemon.address)}
        if redis is not None:
            turns["redis EXISTS, pipelined"] = start(redis_pipeline, "redis EXISTS, pipelined", redis.address)
            turns["redis EXISTS, count only"] = start(redis_count, "redis EXISTS, count only", redis.address)
        measured = alternate(rounds, base, turns)
    trips = Pairs(list(chain.from_iterable(pairs.base for pairs in measured.values())), [])
    rows = [Row(case, "round trip", trips.value, "ms", note=tail(samples["round trip"]))]
    for name, pairs in measured.items():
        bound = LIMIT_MS.get((count, "hit" if hit else "miss", clients)) if name == "cachesvc" else None
        limit = Limit("value", at_most=bound) if bound else None
        rows.append(Row(case, name, pairs.value, "ms", pairs.ratio, "round trip", limit, tail(samples[name])))
    return rows


def tail(samples: list[float]) -> str:
    return f"p99 {percentile(samples, 99):.3g} ms of {len(samples)}"


def run(options: argparse.Namespace) -> Report:
    report = Report("lookup_latency", QUESTION, {"key_bytes": KEY_BYTES, "pairs": options.pairs})
    most = max(options.keys)
    # twice the room, so that no key is ever evicted
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(max(64 * MIB, 2 * most * CHUNK_BYTES)))
        store(daemon, most)
        redis = None
        try:
            if options.peers:
                redis = stack.enter_context(closing(RedisServer(1 << 30)))
                report.settings["redis"] = redis.version
                store_redis(redis, most)
        except AbsentError as reason:
            report.rows.append(Row("all", "redis EXISTS", None, "ms", note=f"absent: {reason}"))
        for count in options.keys:
            for hit in (True, False):
                for clients in options.clients:
                    report.rows += measure(count, clients, hit, options.pairs, daemon, redis)
    return report


def main() -> None:
    parser = arguments(QUESTION)
    parser.add_argument("--keys", type=numbers, default=[1000, 6250, 50000], help="default: 1000,6250,50000")
    parser.add_argument("--clients", type=numbers, default=[1, 4], help="client processes at once (default: 1,4)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave Redis out")
    answer(run, parser)


if __name__ == "__main__":
    main()
