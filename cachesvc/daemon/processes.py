"""Client processes: which descriptor stands for which process, the token that names it, and the news of its death.

Covers: checking a pidfd against the socket it came through, one number and one token for each living process, waiting
for its end on the loop. Not here: what a death frees (`core.node`), the messages (`daemon.descriptors`).

A process attaches as often as it likes (each client object has its own connection) and gets the same number and token
every time, so that the daemon holds one pidfd a process and not one a connection::

    Attach + pidfd ---> checked ---> known already?  yes: same token, the new pidfd is closed
                                                     no:  number and token drawn, pidfd watched by the loop
    pidfd readable ---> token forgotten, pidfd closed, ProcessDied(number)

Owned by the daemon's loop. Linux only. The kernel's help differs by version:

- 6.9: a pidfd has an inode of its own process (pidfs): identity is certain, across pid namespaces.
- 6.5: SO_PEERPIDFD exists, but pidfds share one inode: compared by the pid that /proc/self/fdinfo shows.
- older: compared with SO_PEERCRED. A pid of 0 there means another pid namespace: it can't be checked and is accepted.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cachesvc.errors import ProtocolError

PROCESSES_MAX: Final = 4096
"""Watched at once, one descriptor each."""

TOKEN_BYTES: Final = 16

_SO_PEERPIDFD: Final = 77
"""Not in Python's socket module; the same number on x86 and ARM."""


@dataclass(frozen=True, slots=True)
class _Watched:
    number: int
    token: bytes
    pidfd: int


class Processes:
    """Every client process that gave its pidfd and lives. `died(number)` is called once, on the loop, when it ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop, died: Callable[[int], None]) -> None:
        self._loop = loop
        self._died = died
        self._watched: dict[int, _Watched] = {}
        self._numbers: dict[bytes, int] = {}
        self._last = 0

    def attach(self, pidfd: int, peer: socket.socket) -> bytes:
        """Watch the process behind `pidfd`, which came through `peer`; its token. Takes `pidfd` over, also on failure.

        Raises ProtocolError if it isn't the sender's own pidfd, or if there are too many processes.
        """
        try:
            check_own_pidfd(pidfd, peer)
            known = self._find(pidfd)
            if known is None and len(self._watched) >= PROCESSES_MAX:
                raise ProtocolError(f"{PROCESSES_MAX} processes are attached already: close some clients first")
        except BaseException:
            os.close(pidfd)
            raise
        if known is not None:
            os.close(pidfd)
            return known.token
        self._last += 1
        watched = _Watched(self._last, secrets.token_bytes(TOKEN_BYTES), pidfd)
        self._watched[watched.number] = watched
        self._numbers[watched.token] = watched.number
        self._loop.add_reader(pidfd, self._ended, watched)
        return watched.token

    def number(self, token: bytes) -> int | None:
        """The process that a token names, None for the empty token (no pidfd). ProtocolError if nobody has it."""
        if not token:
            return None
        number = self._numbers.get(token)
        if number is None:
            raise ProtocolError("the token names no living process: attach again, the daemon may have restarted")
        return number

    def __len__(self) -> int:
        """Processes watched."""
        return len(self._watched)

    def close(self) -> None:
        """Stop watching; nobody is reported dead any more."""
        for watched in list(self._watched.values()):
            self._forget(watched)

    def _find(self, pidfd: int) -> _Watched | None:
        identity = _identity(pidfd)
        if identity is None:
            return None
        for watched in self._watched.values():
            # identities are read anew each time: a pid can be used again once its process was reaped
            if _identity(watched.pidfd) == identity:
                return watched
        return None

    def _ended(self, watched: _Watched) -> None:
        self._forget(watched)
        self._died(watched.number)

    def _forget(self, watched: _Watched) -> None:
        self._loop.remove_reader(watched.pidfd)
        del self._watched[watched.number]
        del self._numbers[watched.token]
        os.close(watched.pidfd)


def check_own_pidfd(pidfd: int, peer: socket.socket) -> None:
    """ProtocolError unless `pidfd` is a pidfd, and, where the kernel can tell, that of the process that connected."""
    if os.readlink(f"/proc/self/fd/{pidfd}") != "anon_inode:[pidfd]":
        raise ProtocolError("the descriptor sent with Attach is no pidfd")
    claimed = _identity(pidfd)
    expected = _peer_identity(peer, on_pidfs=claimed is not None and claimed[0] == "pidfs")
    if claimed is not None and expected is not None and claimed != expected:
        raise ProtocolError("the pidfd sent with Attach is not the sender's own")


def _identity(pidfd: int) -> tuple[str, int] | None:
    """What tells this process from every other living one; None if nothing does (old kernel, other pid namespace)."""
    stat = os.fstat(pidfd)
    if stat.st_dev != _anonymous_device():
        return "pidfs", stat.st_ino
    pid = _shown_pid(pidfd)
    return ("pid", pid) if pid > 0 else None


def _peer_identity(peer: socket.socket, *, on_pidfs: bool) -> tuple[str, int] | None:
    try:
        pidfd = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        # too old a kernel, or the peer has been reaped already
        if on_pidfs:
            return None
        pid, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return ("pid", pid) if pid > 0 else None
    try:
        return _identity(pidfd)
    finally:
        os.close(pidfd)


def _shown_pid(pidfd: int) -> int:
    """The pid in fdinfo: 0 = of another pid namespace, -1 = dead and reaped, 0 also where the line is missing."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return 0


@functools.cache
def _anonymous_device() -> int:
    """The device number of anonymous inodes, where pidfds lived before they got a filesystem of their own."""
    fd = os.eventfd(0)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)
