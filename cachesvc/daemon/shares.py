"""What the connections of one tenant may take of the daemon, all together: its time and its memory.

Covers: turns of the loop, and the counts that limits are checked against. Not here: the limits on single connections
and what happens to who breaks one (`daemon.server`), what a tenant may have of the arena (`core.quota`).

One loop serves everybody, so a turn of it must stay short however much one client sends. Every message is served by
some *work*; a tenant's works run at once as long as they have taken less than `TURN_S` in this turn, and after that
stand in line for the next ones::

    turn 1   a1 a1 a1 a1 |          b1            a's share is used up: a1 isn't done, a2 comes after it
    turn 2   a1 a1 | a2 a2 |        b1            the line goes round
    turn 3   a1 | a2 |              b1 b2

Owned by the daemon's loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Final, TypeAlias

TURN_S: Final = 0.002
"""Of one turn of the loop, for one tenant. The longest message is served whole: it may take more."""

Work: TypeAlias = Callable[[float], bool]
"""Serves messages of one connection until `perf_counter()` says so much, at least one. True: the rest comes later."""


class Share:
    """One tenant's, or the admin socket's. The counts are kept by `daemon.server` and `daemon.descriptors`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.connections = 0
        self.grown_bytes = 0
        """What buffers of received bytes have grown by."""
        self.unread_bytes = 0
        """Replies that clients haven't read; more than there is, until it is counted again."""
        self._loop = loop
        self._line: deque[Work] = deque()
        self._taken_s = 0.0
        self._armed = False

    def serve(self, work: Work) -> bool:
        """Do it now, as far as this turn allows, and the rest when it is its turn; False: all of it later."""
        now = not self._line and self._taken_s < TURN_S
        if now:
            self._run(work)
        else:
            self._line.append(work)
        if not self._armed:
            self._arm()
        return now

    def _arm(self) -> None:
        """Have a next turn if somebody stands in line, or much time has to be forgotten: not once a message."""
        self._armed = bool(self._line) or self._taken_s >= TURN_S / 2
        if self._armed:
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._taken_s = 0.0
        while self._line and self._taken_s < TURN_S:
            self._run(self._line.popleft())
        self._arm()

    def _run(self, work: Work) -> None:
        started = perf_counter()
        more = work(started + TURN_S - self._taken_s)
        self._taken_s += perf_counter() - started
        if more:
            self._line.append(work)
