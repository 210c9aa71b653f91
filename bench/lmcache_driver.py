"""A client of LMCache's server, run in LMCache's environment by `bench.peers.LmcacheClient`; imports nothing of ours.

Asked on standard input, one JSON line `["store", count]` or `["retrieve", count]` at a time; answers on standard output
with the seconds that `count` requests took, one after the other, and what became of them. It drives
LMCache's own bench client (`lmcache bench server`), which takes the path of an engine on a machine without GPU: paged
KV tensors, PREPARE -> copy into or out of the server's shared memory -> COMMIT.

What is *not* counted, in LMCache's favour: hashing of tokens and LOOKUP, which each retrieve needs before it. A store
that LMCache acknowledges without keeping the chunk (it does when writes outrun its eviction) is found by a LOOKUP after
the turn and counted as lost.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

HEADS, HEAD_SIZE, BLOCK_TOKENS, CHUNK_TOKENS = 8, 128, 16, 256
MADV_POPULATE_WRITE = 23
BLOCK_BYTES = 2 * BLOCK_TOKENS * HEADS * HEAD_SIZE * 2
"""Of one layer."""


class Driver:
    """One registered worker with paged KV tensors of `buffer_bytes` in all, and the sequences it has stored; every
    request is a new sequence of `chunks` chunks."""

    def __init__(
        self, port: int, shm_name: str, layers: int, chunks: int, buffer_bytes: int, first_sequence: int
    ) -> None:
        from lmcache.cli.commands.bench.server_bench.client import ServerBenchClient
        from lmcache.cli.commands.bench.server_bench.config import BenchConfig

        self._tokens = chunks * CHUNK_TOKENS
        request_bytes = layers * BLOCK_BYTES * self._tokens // BLOCK_TOKENS
        # room for one request more than asked for: the client of LMCache never uses the last
        blocks = (buffer_bytes // request_bytes + 1) * self._tokens // BLOCK_TOKENS
        config = BenchConfig(
            rpc_url=f"tcp://127.0.0.1:{port}",
            http_url="",
            mode="cpu",
            transfer_mode="engine_driven",
            tp_size=1,
            use_mla=False,
            num_tokens=self._tokens,
            kvcache_shape_spec=f"(2,{blocks},{BLOCK_TOKENS},{HEADS},{HEAD_SIZE}):float16:{layers}",
            num_blocks=blocks,
            block_size=BLOCK_TOKENS,
        )
        self._client = ServerBenchClient(config, lambda _: None)
        self._client.start()
        populate(shm_name)
        self._next = first_sequence
        self._stored: list[int] = []

    def store(self, count: int) -> dict[str, float]:
        """New sequences."""
        sequences = range(self._next, self._next + count)
        self._next += count
        requests = [self._client.create_request(s, f"store-{s}", "store") for s in sequences]
        started = time.perf_counter()
        results = [self._client.store(request, 0, self._tokens) for request in requests]
        seconds = time.perf_counter() - started
        check(results)
        lost = count - sum(self._present(sequence) for sequence in sequences)
        self._stored = [*self._stored, *sequences]
        return {"seconds": seconds, "lost": lost}

    def retrieve(self, count: int) -> dict[str, float]:
        """The sequences stored longest ago that are still there, then those stored after them, and so on."""
        requests: list[Any] = []
        while self._stored and len(requests) < count:
            sequence = self._stored.pop(0)
            request = self._client.create_request(sequence, f"retrieve-{sequence}-{time.monotonic_ns()}", "retrieve")
            if self._client.lookup(request).is_full_hit:
                requests.append(request)
        self._stored += [request.sequence_id for request in requests]
        started = time.perf_counter()
        results = [self._client.retrieve(request, 0, self._tokens) for request in requests]
        seconds = time.perf_counter() - started
        check(results)
        for request in requests:
            self._client.end_session(request)
        return {"seconds": seconds, "count": len(requests)}

    def _present(self, sequence: int) -> bool:
        """Is it there? It's retrieved, too: a lookup alone keeps the chunks from being evicted for minutes."""
        request = self._client.create_request(sequence, f"check-{sequence}", "check")
        hit = bool(self._client.lookup(request).is_full_hit)
        if hit:
            check([self._client.retrieve(request, 0, self._tokens)])
        self._client.end_session(request)
        return hit

    def close(self) -> None:
        self._client.close()


def check(results: list[Any]) -> None:
    """RuntimeError if LMCache itself says that something failed."""
    failed = sum(not result.succeeded for result in results)
    if failed:
        raise RuntimeError(f"{failed} of {len(results)} transfers failed")


def populate(shm_name: str) -> None:
    """Touch every page of the server's memory that is mapped here: its first stores would pay for page faults only."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/maps") as maps:
        mappings = [line.split()[0] for line in maps if shm_name in line]
    if not mappings:
        raise RuntimeError(f"{shm_name} isn't mapped: the server doesn't run in shared-memory mode")
    for mapping in mappings:
        first, end = (int(address, 16) for address in mapping.split("-"))
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_POPULATE_WRITE):
            raise OSError(ctypes.get_errno(), "madvise")


def main() -> None:
    """Serve standard input until it ends."""
    # whatever libraries print must not get between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    port, shm_name, layers, chunks, buffer_bytes, first_sequence = sys.argv[1:]
    driver = Driver(int(port), shm_name, int(layers), int(chunks), int(buffer_bytes), int(first_sequence))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        what, count = json.loads(line)
        turn = {"store": driver.store, "retrieve": driver.retrieve}[what]
        print(json.dumps(turn(count)), file=answers, flush=True)
    driver.close()


if __name__ == "__main__":
    main()
