"""How long after kill -9 of a full daemon, and its start, does the first client have a hit again?

100k chunks of 4 KiB are stored and sealed, the daemon is killed and started again on the same directories. Two client
processes ask without a pause, both from before the kill on: one *running* (its connection broke, and it reconnects by
itself), one *fresh* (it makes a new `Client` each time until one gets a hit). The time is from just before the exec of
the new daemon to the first chunk that was copied out and has the right bytes. After it, every chunk must be found, and
a sample of them is read and compared.

All peers lose everything when they are killed (see `bench/README.md`), so none has a row.
"""

from __future__ import annotations

import argparse
import random
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from statistics import median
from typing import Final

from bench.harness import Daemon, Limit, Report, Row, Workers, answer, arguments, key, percentile, store, wait_for
from cachesvc import Client
from cachesvc.config import MIB

QUESTION: Final = __doc__.splitlines()[0]
NAMESPACE: Final = "restart"
CHUNK_BYTES: Final = 4096
LIMIT_S: Final = 1.0
SAMPLE: Final = 500


def content(number: int) -> bytes:
    """The bytes of a chunk: its number, all over."""
    return number.to_bytes(8, "big") * (CHUNK_BYTES // 8)


def connected(daemon: Daemon) -> Client:
    return Client(daemon.address, namespace=NAMESPACE, chunk_bytes=CHUNK_BYTES)


# --- client processes -------------------------------------------------------------------------------------------------


def running(_: int, address: str, chunks: int) -> Callable[[], float]:
    """Its turn: wait until the daemon is gone, then the time (monotonic, s) of the first hit."""
    client = Client(address, namespace=NAMESPACE, chunk_bytes=CHUNK_BYTES)

    def turn() -> float:
        wait_for("the kill", lambda: not hit(client, chunks), every_s=0)
        wait_for("a hit", lambda: hit(client, chunks), every_s=0.0005)
        return time.monotonic()

    return turn


def fresh(_: int, address: str, chunks: int) -> Callable[[], float]:
    """Its turn: a new client every time somebody listens, until one has a hit."""

    def hits() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(address):
                return False
        with Client(address, namespace=NAMESPACE, chunk_bytes=CHUNK_BYTES) as client:
            return hit(client, chunks)

    def turn() -> float:
        wait_for("the kill", lambda: not hits(), every_s=0)
        wait_for("a hit", hits, every_s=0.0005)
        return time.monotonic()

    return turn


def hit(client: Client, chunks: int) -> bool:
    """Copy some chunk out; RuntimeError if it has other bytes than were stored."""
    number = random.randrange(chunks)
    buffer = bytearray(CHUNK_BYTES)
    if not client.get_into(key(number), buffer):
        return False
    if buffer != content(number):
        raise RuntimeError(f"chunk {number} came with other bytes")
    return True


# --- rounds -----------------------------------------------------------------------------------------------------------


def restart(daemon: Daemon, workers: list[Workers]) -> list[float]:
    """Kill, start, and the seconds until each of `workers` has a hit."""
    for some in workers:
        some.begin()
    daemon.kill()
    # both have seen that it is gone, before there is a new one
    time.sleep(0.2)
    before = daemon.start()
    return [some.end()[0] - before for some in workers]


def check(daemon: Daemon, chunks: int) -> None:
    """Every chunk is there, and a sample has its bytes; RuntimeError otherwise."""
    with connected(daemon) as client:
        found = client.lookup([key(number) for number in range(chunks)])
        if found != chunks:
            raise RuntimeError(f"{found} of {chunks} chunks are there after the restart")
        for _ in range(SAMPLE):
            if not hit(client, chunks):
                raise RuntimeError("a chunk that is there can't be read")


def run(options: argparse.Namespace) -> Report:
    chunks = options.chunks
    report = Report("restart", QUESTION, {"chunks": chunks, "chunk_bytes": CHUNK_BYTES, "restarts": options.pairs})
    seconds: dict[str, list[float]] = {"running": [], "fresh": []}
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(arena_bytes(chunks)))
        client = connected(daemon)
        store(client, range(chunks), content)
        client.close()
        workers = [
            stack.enter_context(closing(Workers(1, prepare, daemon.address, chunks))) for prepare in (running, fresh)
        ]
        for _ in range(options.pairs):
            for name, one in zip(seconds, restart(daemon, workers), strict=True):
                seconds[name].append(one)
            check(daemon, chunks)
    for name, spent in seconds.items():
        note = f"slowest {percentile(spent, 100):.3g} s; every chunk found, {SAMPLE} read and compared, each time"
        limit = Limit("value", at_most=LIMIT_S)
        report.rows.append(Row(f"{name} client", "cachesvc", median(spent), "s", limit=limit, note=note))
    return report


def arena_bytes(chunks: int) -> int:
    """Room for the chunks, in whole extents of 16 MiB."""
    return max(2, -(-chunks * CHUNK_BYTES // (16 * MIB))) * 16 * MIB


def main() -> None:
    parser = arguments(QUESTION)
    parser.add_argument("--chunks", type=int, default=100_000, help="default: %(default)s")
    answer(run, parser)


if __name__ == "__main__":
    main()
