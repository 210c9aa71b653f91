"""How much private memory does the daemon need for a chunk that it knows, ghosts included?

RssAnon of the daemon with an arena full of chunks of 4 KiB, after twice as many were written (so that the eviction
policy remembers as many ghosts as it ever does), minus RssAnon of the same daemon before the first chunk, divided by
the chunks that are there. The arena itself is shared memory and not in it. 100k and 500k chunks; a fresh daemon for
each measurement, and the median of them.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Final

from bench.harness import Daemon, Limit, Report, Row, answer, arguments, key, numbers, store
from cachesvc import Client
from cachesvc.config import MIB
from cachesvc.types import KeyState

QUESTION: Final = __doc__.splitlines()[0]
CHUNK_BYTES: Final = 4096
EXTENT_BYTES: Final = 16 * MIB
LIMIT_BYTES: Final = 400


def bytes_a_chunk(chunks: int) -> tuple[float, int, int]:
    """Bytes a chunk, chunks that are there, bytes of the daemon while it has none."""
    extents = max(2, -(-chunks * CHUNK_BYTES // EXTENT_BYTES))
    room = extents * EXTENT_BYTES // CHUNK_BYTES
    with (
        Daemon(extents * EXTENT_BYTES, EXTENT_BYTES) as daemon,
        Client(daemon.address, namespace="memory", chunk_bytes=CHUNK_BYTES) as client,
    ):
        empty = daemon.anonymous_bytes()
        written = range(2 * room)
        store(client, written)
        there = client.states([key(number) for number in written]).count(KeyState.RAM)
        return (daemon.anonymous_bytes() - empty) / there, there, empty


def run(options: argparse.Namespace) -> Report:
    report = Report("memory_per_chunk", QUESTION, {"chunk_bytes": CHUNK_BYTES, "runs": options.pairs})
    for chunks in options.chunks:
        runs = [bytes_a_chunk(chunks) for _ in range(options.pairs)]
        value = median(each for each, _, _ in runs)
        there, empty = runs[-1][1:]
        note = f"{there} chunks there, {empty / MIB:.0f} MiB without any"
        limit = Limit("value", at_most=LIMIT_BYTES)
        report.rows.append(Row(f"{chunks} chunks", "cachesvc", value, "bytes", limit=limit, note=note))
    return report


def main() -> None:
    parser = arguments(QUESTION)
    parser.set_defaults(pairs=5)
    parser.add_argument("--chunks", type=numbers, default=[100_000, 500_000], help="default: 100000,500000")
    answer(run, parser)


if __name__ == "__main__":
    main()
