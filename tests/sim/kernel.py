"""The clock of a simulation: what happens when, in one fixed order, and tasks written as generators.

Covers: a heap of calls by (time, order of asking), futures, tasks that sleep and wait. Not here: who the tasks belong
to (`tests.sim.process`). Nothing here reads a real clock, a hash or an address: the same calls give the same run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

START_S = 1000.0
"""The clock of a machine that has been up for a while."""


class Future:
    """A value that comes once; later ones are ignored."""

    __slots__ = ("_waiters", "done", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self._waiters: list[Callable[[Any], None]] = []

    def resolve(self, value: Any = None) -> None:
        if self.done:
            return
        self.done, self.value = True, value
        for waiter in self._waiters:
            waiter(value)

    def then(self, waiter: Callable[[Any], None]) -> None:
        if self.done:
            waiter(self.value)
        else:
            self._waiters.append(waiter)


Task: TypeAlias = Generator[Any, Any, Any]
"""Yields seconds to sleep, a future to wait for, or another task to run to its end; is sent what came of it. (Not
`yield from`: of tasks that never end the garbage collector must be able to take each by itself.)"""


class Kernel:
    """Time, and everything that is still to happen."""

    def __init__(self) -> None:
        self.now = START_S
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call at `when` (seconds), after everything that was asked for the same moment before."""
        self._asked += 1
        heapq.heappush(self._heap, (max(when, self.now), self._asked, call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        self.at(self.now + delay_s, call)

    def run(self, end: float, until: Callable[[], bool] | None = None) -> None:
        """Let everything happen that is due by `end`, or only as much of it as makes `until()` true."""
        heap = self._heap
        while heap and heap[0][0] <= end:
            if until is not None and until():
                return
            self.now, _, call = heapq.heappop(heap)
            call()
        if until is None:
            self.now = end
