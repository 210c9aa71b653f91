"""Copies between slots and private buffers: at memory speed, with other threads running meanwhile.

Covers: one copy of one chunk, shared between the calling thread and one helper thread where that pays. Not here: which
bytes (`client.client`), populating mappings (`client.mappings`).

One thread doesn't use up a memory bus: two copy 8 MiB 1.5 times as fast, even on two busy cores. A large copy is cut in
two parts; the caller copies the first. Whoever claims the second part first copies it, so a helper that is late (it has
no core, or waits for the GIL) costs nothing::

    caller:  put(job) -- copy first part --+-- claim: mine?   yes: copy second part
    helper:              wake -- claim: mine? yes: copy second part -- done --> caller goes on

The claim is a lock that is taken once; `done` is a lock that the helper releases. Where no thread can be had the caller
copies alone, and tries again with the next large copy.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

SHARED_BYTES_MIN: Final = 2 << 20
"""Below this, waking the helper costs more than it copies."""

CALLER_SHARE: Final = 0.55
"""The helper starts later by the time that waking it takes."""

YIELDS: Final = 200
"""How often the caller yields its core before it sleeps until the helper is done: a wake-up costs more than that."""

Bytes = NDArray[np.uint8]


class _Part(NamedTuple):
    claim: threading.Lock
    done: threading.Lock
    destination: Bytes
    source: Bytes


class Copier:
    """Copies for one client. `copy` may be called by any thread; the helper thread starts with the first large copy."""

    def __init__(self) -> None:
        self._parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._helper: threading.Thread | None = None
        self._end = weakref.finalize(self, self._parts.put, None)
        self._free = threading.Lock()  # held by the caller whose copy the helper shares; others copy alone

    def copy(self, destination: memoryview, source: memoryview) -> None:
        """Copy `source` over `destination`: contiguous bytes of equal length."""
        if not len(source):
            return
        into, out_of = np.frombuffer(destination, np.uint8), np.frombuffer(source, np.uint8)
        if len(into) < SHARED_BYTES_MIN or not self._free.acquire(blocking=False):
            np.copyto(into, out_of)
            return
        try:
            self._copy_shared(into, out_of)
        finally:
            self._free.release()

    def close(self) -> None:
        """Let the helper end; later copies are made by their callers alone."""
        if self._free.acquire(blocking=False):
            # never given back
            self._end()

    def _copy_shared(self, into: Bytes, out_of: Bytes) -> None:
        if self._helper is None:
            helper = threading.Thread(target=_help, args=(self._parts,), name="cachesvc-copy", daemon=True)
            try:
                helper.start()
            except RuntimeError:
                # no thread can be had, or the interpreter is ending
                np.copyto(into, out_of)
                return
            self._helper = helper
        cut = int(len(into) * CALLER_SHARE) & ~4095
        part = _Part(threading.Lock(), threading.Lock(), into[cut:], out_of[cut:])
        part.done.acquire()
        self._parts.put(part)
        try:
            np.copyto(into[:cut], out_of[:cut])
        finally:
            # also when interrupted: the slot may be somebody else's as soon as this returns
            _finish(part)


def _finish(part: _Part) -> None:
    """Copy a part that nobody has claimed, else wait until it is copied."""
    if part.claim.acquire(blocking=False):
        np.copyto(part.destination, part.source)
        return
    for _ in range(YIELDS):
        if part.done.acquire(blocking=False):
            return
        time.sleep(0)
    part.done.acquire()


def _help(parts: queue.SimpleQueue[_Part | None]) -> None:
    """The helper thread. It holds no reference to its client, whose end ends it."""
    while (part := parts.get()) is not None:
        if part.claim.acquire(blocking=False):
            try:
                np.copyto(part.destination, part.source)
            finally:
                part.done.release()
        del part
