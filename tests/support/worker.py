"""A client process that does what it is told, a step at a time: `python -m tests.support.worker`.

Covers: one `cachesvc.Client` driven over pipes, a JSON object a line in each direction, so that a test can kill or stop
the process between any two steps; load from several threads. Not here: starting and killing it
(`tests.support.clients`).

In: {"do": name of a method of Worker, its arguments}. Keys are text on the pipe and bytes (latin-1) here. Out: {"ok":
what it returned} or {"raised": "ValueError: ..."}, with {"seconds": how long it took}. The end of the input ends the
process, and so does the end of its parent. Contents are those of `tests.support.contents`.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cachesvc import Client
from cachesvc.client.client import Read, Write
from cachesvc.client.grants import Identity
from cachesvc.client.keeper import Keeper
from cachesvc.client.session import Session
from cachesvc.types import Role, user_namespace
from tests.support.contents import LENGTH_MIN, content, fault

PR_SET_PDEATHSIG = 1


def bytes_of(keys: list[str]) -> list[bytes]:
    return [key.encode("latin-1") for key in keys]


class Worker:
    """One client, its open contexts by name, and a load."""

    def __init__(self) -> None:
        self._client: Client | None = None
        self._chunk_bytes = 0
        self._address = ""
        self._contexts: dict[str, Read | Write] = {}
        self._load: Load | None = None
        self._rank: Session | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None, "open comes first"
        return self._client

    def open(
        self,
        address: str,
        namespace: str,
        chunk_bytes: int,
        session: str | None = None,
        ready_s: float = 10.0,
        **options: Any,
    ) -> dict[str, object]:
        self._address, self._chunk_bytes = address, chunk_bytes
        name = None if session is None else bytes.fromhex(session)
        self._client = Client(address, namespace=namespace, chunk_bytes=chunk_bytes, session=name, **options)
        self._client.wait_ready(ready_s)
        return self._client.status()

    def close(self) -> None:
        self.client.close()

    # --- single calls -----------------------------------------------------------------------------------------------

    def lookup(self, keys: list[str]) -> int:
        return self.client.lookup(bytes_of(keys))

    def states(self, keys: list[str]) -> list[str]:
        return [state.name for state in self.client.states(bytes_of(keys))]

    def put(self, key: str, seed: int = 0, length: int | None = None) -> bool:
        name = key.encode("latin-1")
        return self.client.put(name, content(name, seed, length or self._chunk_bytes))

    def get(self, key: str) -> str | None:
        """None for a miss, "right", or what is wrong."""
        buffer = bytearray(self._chunk_bytes)
        name = key.encode("latin-1")
        if not self.client.get_into(name, buffer):
            return None
        length = int.from_bytes(buffer[16:24], "little")
        return fault(name, memoryview(buffer)[: min(length, len(buffer))]) or "right"

    def status(self) -> dict[str, object]:
        return self.client.status()

    def misses(self) -> dict[str, int]:
        return {state.name: count for state, count in self.client.misses.items() if count}

    def refusals(self) -> dict[str, int]:
        return {state.name: count for state, count in self.client.refusals.items() if count}

    def until_up(self, up: bool = True, seconds: float = 30.0) -> None:
        """Wait until the client thinks that of the daemon, by itself."""
        until = time.monotonic() + seconds
        while (self.client.status()["state"] == "up") != up:
            assert time.monotonic() < until, f"waited {seconds} s in vain: {self.client.status()}"
            time.sleep(0.005)

    # --- contexts, a step at a time ---------------------------------------------------------------------------------

    def begin_write(self, name: str, keys: list[str], request: int = 0) -> dict[str, Any]:
        """The keys that are new, and the numbers of the tickets that they are written under."""
        write = self._contexts[name] = self.client.write(bytes_of(keys), request=request)
        assert isinstance(write, Write)
        write.__enter__()
        tickets = [ticket.number for ticket in write._grant.tickets] if write._grant else []
        return {"new": [key.decode("latin-1") for key in write.views], "tickets": tickets}

    def fill(self, name: str, part: float = 1.0, seed: int = 0) -> None:
        """Write the first part of every view."""
        for key, view in self._contexts[name].views.items():  # type: ignore[union-attr]
            upto = int(len(view) * part)
            view[:upto] = content(key, seed, len(view))[:upto]

    def fill_forever(self, name: str) -> None:
        """Copy until killed."""
        say({"ok": "filling"})
        while True:
            self.fill(name)

    def end_write(self, name: str, abort: bool = False) -> bool:
        write = self._contexts.pop(name)
        assert isinstance(write, Write)
        error = RuntimeError("abort") if abort else None
        write.__exit__(type(error) if error else None, error, None)
        return write.sealed

    def write(self, keys: list[str], request: int = 0, seed: int = 0) -> list[str]:
        """All of it; the keys that were sealed."""
        new: list[str] = self.begin_write("", keys, request)["new"]
        self.fill("", seed=seed)
        return new if self.end_write("") else []

    def begin_read(self, name: str, keys: list[str], request: int = 0) -> int:
        read = self._contexts[name] = self.client.read(bytes_of(keys), request=request)
        read.__enter__()
        return len(read.views)

    def check(self, name: str, keys: list[str]) -> dict[str, Any]:
        """What is wrong with the views, and whether the reader would know."""
        read = self._contexts[name]
        assert isinstance(read, Read)
        faults = [fault(key, view) for key, view in zip(bytes_of(keys), read.views, strict=False)]
        return {"faults": [text for text in faults if text], "valid": read.valid()}

    def end_read(self, name: str) -> None:
        self._contexts.pop(name).__exit__(None, None, None)

    def read(self, keys: list[str], request: int = 0) -> int:
        """All of it, which must be right; the length of the run."""
        length = self.begin_read("", keys, request)
        seen = self.check("", keys)
        assert seen == {"faults": [], "valid": True}, seen
        self.end_read("")
        return length

    # --- a rank of the same engine ----------------------------------------------------------------------------------

    def join(self, address: str, namespace: str, chunk_bytes: int, session: str, tickets: list[int]) -> None:
        """Be a worker of this session that writes under these tickets of its scheduler."""
        identity = Identity(
            bytes.fromhex(session), Role.WORKER, user_namespace(namespace), namespace, {}, (chunk_bytes,)
        )
        wake = threading.Event()
        self._rank = Session(identity, wake.set)
        for ticket in tickets:
            self._rank.writes_elsewhere(ticket)
        Keeper(self._rank, lambda: address, wake).settled.wait(10.0)

    def done(self, tickets: list[int]) -> None:
        assert self._rank is not None
        self._rank.done(tickets)

    # --- forks ------------------------------------------------------------------------------------------------------

    def fork(self, keys: list[str]) -> dict[str, Any]:
        """What a child of a fork sees, and that it harms nobody: every call, then the end without any cleaning up."""
        come, go = os.pipe()
        if not os.fork():
            seen: dict[str, Any] = {"lookup": self.lookup(keys), "put": self.put("child"), "get": self.get(keys[0])}
            seen["views"] = self.begin_write("child", ["child"])["new"], self.begin_read("child's", keys)
            self.close()
            own = Client(self._address, namespace="forked", chunk_bytes=self._chunk_bytes)
            seen["own"] = own.put(b"own", content(b"own", 1, 100)), own.lookup([b"own"])
            own.close()
            os.write(go, json.dumps(seen).encode())
            os._exit(0)
        os.close(go)
        with os.fdopen(come, "rb") as pipe:
            told: dict[str, Any] = json.loads(pipe.read())
        os.wait()
        return told

    # --- load -------------------------------------------------------------------------------------------------------

    def begin_load(self, threads: int, **options: Any) -> None:
        self._load = Load(self.client, self._chunk_bytes, threads, **options)

    def look_at_load(self) -> dict[str, Any]:
        assert self._load is not None
        return self._load.figures()

    def end_load(self) -> dict[str, Any]:
        """Figures, and the keys whose store was acknowledged."""
        assert self._load is not None
        return self._load.end()


class Load:
    """Threads that store chunks of their own and read anybody's, as fast as they can, until told to end.

    Keys are `<prefix>-<thread>-<number>`; `others` are prefixes of other processes whose chunks are read too. A thread
    stores at most `keys_max`. With `hold` it keeps so many reads open, the last ones.
    """

    def __init__(
        self,
        client: Client,
        chunk_bytes: int,
        threads: int,
        prefix: str,
        keys_max: int = 1 << 30,
        others: list[str] | None = None,
        hold: int = 0,
        seed: int = 0,
    ) -> None:
        self._client, self._chunk_bytes = client, chunk_bytes
        self._prefix, self._keys_max, self._hold = prefix, keys_max, hold
        self._prefixes = [prefix, *(others or [])]
        self._threads = threads
        self._ending = threading.Event()
        self._acked: list[list[bytes]] = [[] for _ in range(threads)]
        self._counts: list[Counter[str]] = [Counter() for _ in range(threads)]
        self._longest = [0.0] * threads
        self._wrong: list[str] = []
        self._seed = seed
        self._pool = ThreadPoolExecutor(threads)
        self._parts: list[Future[None]] = [self._pool.submit(self._run, t) for t in range(threads)]

    def figures(self) -> dict[str, Any]:
        """`acked` chunks were stored, `longest_s` is the longest call, `wrong` what should never have been read."""
        for part in self._parts:
            if part.done():
                part.result()
        counts = dict(sum(self._counts, Counter()))
        acked = sum(map(len, self._acked))
        return {"counts": counts, "acked": acked, "longest_s": max(self._longest), "wrong": self._wrong[:10]}

    def end(self) -> dict[str, Any]:
        self._ending.set()
        for part in self._parts:
            part.result()
        self._pool.shutdown()
        return self.figures() | {"keys": [key.decode("latin-1") for keys in self._acked for key in keys]}

    def _run(self, thread: int) -> None:
        draw = random.Random(f"{self._prefix}/{thread}/{self._seed}")
        held: list[Read] = []
        acts: list[Callable[[int, random.Random], None]] = [self._put, self._write, self._get, self._read, self._look]
        while not self._ending.is_set():
            self._timed(thread, lambda: draw.choice(acts)(thread, draw))
            if self._hold:
                self._timed(thread, lambda: self._keep(thread, held))
        for read in held:
            read.__exit__(None, None, None)

    def _timed(self, thread: int, call: Callable[[], None]) -> None:
        before = time.monotonic()
        call()
        self._longest[thread] = max(self._longest[thread], time.monotonic() - before)
        self._counts[thread]["calls"] += 1

    def _key(self, prefix: str, thread: int, number: int) -> bytes:
        return f"{prefix}-{thread}-{number}".encode()

    def _any_keys(self, thread: int, draw: random.Random, count: int) -> list[bytes]:
        """Some keys in a row of anybody, about as many as this thread has stored itself."""
        first = draw.randrange(len(self._acked[thread]) + 4)
        prefix, whose = draw.choice(self._prefixes), draw.randrange(self._threads)
        return [self._key(prefix, whose, first + n) for n in range(count)]

    def _put(self, thread: int, draw: random.Random) -> None:
        mine = self._acked[thread]
        if len(mine) >= self._keys_max:
            return
        key = self._key(self._prefix, thread, len(mine))
        if self._client.put(key, content(key, self._seed + thread, draw.randrange(LENGTH_MIN, self._chunk_bytes + 1))):
            mine.append(key)
        else:
            self._counts[thread]["not stored"] += 1

    def _write(self, thread: int, draw: random.Random) -> None:
        mine = self._acked[thread]
        some = range(len(mine), min(len(mine) + draw.randrange(1, 5), self._keys_max))
        keys = [self._key(self._prefix, thread, number) for number in some]
        with self._client.write(keys) as write:
            for key, view in write.views.items():
                view[:] = content(key, self._seed + thread, len(view))
            given = list(write.views)
        # what isn't given may be there already, from a store of ours whose acknowledgement was lost
        if write.sealed and given == keys:
            mine += keys
        else:
            self._counts[thread]["not stored"] += len(keys)

    def _get(self, thread: int, draw: random.Random) -> None:
        [key] = self._any_keys(thread, draw, 1)
        buffer = bytearray(self._chunk_bytes)
        if not self._client.get_into(key, buffer):
            self._counts[thread]["misses"] += 1
            return
        length = int.from_bytes(buffer[16:24], "little")
        self._note(thread, fault(key, memoryview(buffer)[: min(length, len(buffer))]))

    def _read(self, thread: int, draw: random.Random) -> None:
        keys = self._any_keys(thread, draw, 4)
        with self._client.read(keys) as read:
            faults = [fault(key, view) for key, view in zip(keys, read.views, strict=False)]
            if not read.valid():
                self._counts[thread]["invalid"] += 1
                return
        self._counts[thread]["misses"] += len(keys) - len(faults)
        for found in faults:
            self._note(thread, found)

    def _look(self, thread: int, draw: random.Random) -> None:
        self._client.lookup(self._any_keys(thread, draw, 64))

    def _keep(self, thread: int, held: list[Read]) -> None:
        """Hold the last chunks that were stored."""
        read = self._client.read(self._acked[thread][-1:])
        read.__enter__()
        held.append(read)
        if len(held) > self._hold:
            held.pop(0).__exit__(None, None, None)

    def _note(self, thread: int, found: str | None) -> None:
        self._counts[thread]["hits"] += 1
        if found:
            self._wrong.append(found)


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    worker = Worker()
    for line in sys.stdin:
        order = json.loads(line)
        before = time.monotonic()
        try:
            answer = {"ok": getattr(worker, order.pop("do"))(**order)}
        except (AssertionError, OSError, ValueError) as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        say(answer | {"seconds": time.monotonic() - before})
    # without closing anything: the test has seen what it wanted to
    os._exit(0)


if __name__ == "__main__":
    main()
