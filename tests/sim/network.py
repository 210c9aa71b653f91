"""A fake network: control connections that deliver in order, late, or not at all; questions on descriptors connections.

Covers: delays, loss seen by one side before the other, what is in flight when a side goes away. Not here: what is said
(`tests.sim.engine`), who hears it (`tests.sim.daemon`).

Ways for a `Link` to end::

    close   the client closes it or dies: what it sent still arrives, then the daemon sees the end; replies are lost
    cut     everything in flight is lost both ways; each side notices some time later, the client maybe first
    crash   the daemon is killed: the same, and nobody is left to notice on its side

`Link.usable` is what a client finds when it looks at its socket at that moment; its `lost` comes later, like a
callback.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cachesvc.core import events as ev
from tests.sim.kernel import Future, Kernel

ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds. One message in `1 / slow_chance` takes up to `slow_s_max`, and those behind it wait."""

    usual_s_max: float = 0.0
    slow_s_max: float = 0.0
    slow_chance: float = 0.0
    notice_s_max: float = 0.0

    def draw(self, rng: random.Random) -> float:
        if rng.random() < self.slow_chance:
            return rng.uniform(0, self.slow_s_max)
        return rng.uniform(0, self.usual_s_max)


class Host(Protocol):
    """The daemon's end (`tests.sim.daemon.Daemon`)."""

    def up(self) -> bool: ...
    def hear(self, call: Callable[[], None]) -> None: ...
    def opened(self, link: Link) -> None: ...
    def arrived(self, link: Link, event: ev.Event) -> None: ...
    def ended(self, link: Link) -> None: ...


class Link:
    """One control connection, both ends of it."""

    def __init__(self, network: Network, number: int, tenant: str, deliver: Callable[[ev.Effect], None]) -> None:
        self.number = number
        self.tenant = tenant
        self.usable = True
        self.lost = Future()
        """Resolved when the client notices that it is gone."""
        self.token: Any = None
        """What the descriptors connection gave, named in the Hello."""
        self._network = network
        self._deliver = deliver
        self._severed = False
        self._told = False
        self._up_at = self._down_at = 0.0

    def send(self, event: ev.Event) -> None:
        """Client to daemon. Into the void if the link is gone."""
        if self.usable:
            self._up_at = self._network.later(self._up_at, lambda: self._arrive(lambda host: host.arrived(self, event)))

    def _arrive(self, call: Callable[[Host], None]) -> None:
        if not self._severed:
            self._network.host.hear(lambda: None if self._severed else call(self._network.host))

    def reply(self, effect: ev.Effect) -> None:
        """Daemon to client."""
        if not self._severed:
            self._down_at = self._network.later(self._down_at, lambda: self._deliver(effect) if self.usable else None)

    def close(self) -> None:
        """The client's end is closed."""
        if self.usable:
            self.usable = False
            self._up_at = self._network.later(self._up_at, lambda: self._arrive(self._end))
            self.lost.resolve()

    def cut(self) -> None:
        """The connection breaks."""
        if not self._severed:
            self.crash()
            self._network.notice(lambda: self._network.host.hear(lambda: self._end(self._network.host)))

    def crash(self) -> None:
        """The daemon's end is gone without a word."""
        self._severed = True
        self.usable = False
        self._network.notice(self.lost.resolve)

    def refuse(self) -> None:
        """The daemon closes it (after its last reply)."""
        self._severed = True
        self._up_at = self._network.later(self._up_at, lambda: self._end(self._network.host))

        def end() -> None:
            self.usable = False
            self._network.notice(self.lost.resolve)

        self._down_at = self._network.later(self._down_at, end)

    def _end(self, host: Host) -> None:
        self._severed = True
        if not self._told:
            self._told = True
            host.ended(self)


class Network:
    """Makes links and carries questions."""

    def __init__(self, kernel: Kernel, rng: random.Random, delays: Delays, host: Host) -> None:
        self.delays = delays
        self.host = host
        self._kernel = kernel
        self._rng = rng
        self._links = 0

    def connect(self, tenant: str, deliver: Callable[[ev.Effect], None]) -> Link | None:
        """A new link; None if nobody listens."""
        if not self.host.up():
            return None
        self._links += 1
        link = Link(self, self._links, tenant, deliver)
        self.host.opened(link)
        return link

    def ask(self, question: Callable[[], Any]) -> Future:
        """A question on a descriptors connection; None if the daemon isn't there (any more) to answer."""
        answer = Future()
        heard_it: list[bool] = []

        def arrive() -> None:
            if self.host.up():
                self.host.hear(heard)
            if not answer.done and not heard_it:
                # nobody is there, or it hangs: what a client waits for at most
                self._kernel.after(ANSWER_S if self.host.up() else 0.0, answer.resolve)

        def heard() -> None:
            heard_it.append(True)
            value = question()
            self._kernel.after(self.delays.draw(self._rng), lambda: answer.resolve(value))

        self._kernel.after(self.delays.draw(self._rng), arrive)
        return answer

    def later(self, not_before: float, call: Callable[[], None]) -> float:
        """Deliver after a delay, behind what was sent before; when."""
        when = max(not_before, self._kernel.now + self.delays.draw(self._rng))
        self._kernel.at(when, call)
        return when

    def notice(self, call: Callable[[], None]) -> None:
        self._kernel.after(self._rng.uniform(0, self.delays.notice_s_max), call)
