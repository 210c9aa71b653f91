"""The daemon of a simulation: the real `core.Node`, carried by a fake runner that can be killed between any two steps.

Covers: what `daemon.runner`, `daemon.processes`, `daemon.descriptors` and `daemon.app` do around the core, on fake
files and connections; kills, restarts, hangs. Not here: anything that the core decides.

`fuse` counts steps down to the next kill: a step is an event that is taken, an effect that is begun, a store into a
table. So a kill can come before an event is handled, between two marks of one effect, between marks and reply.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from cachesvc.core import events as ev
from cachesvc.core.node import Node, NodeSettings
from tests.sim.disk import Disk, Table
from tests.sim.kernel import Kernel
from tests.sim.network import Link

if TYPE_CHECKING:
    from tests.sim.process import Process

TICK_S = 0.25

REPLIES = ev.Welcome | ev.Claimed | ev.Looked | ev.Leased | ev.Allocated | ev.Sealed | ev.Refused


class Killed(Exception):  # noqa: N818 - an end, not an error
    """The fuse burnt down: the daemon is gone in the middle of what it did."""


class Witness(Protocol):
    """Sees what the daemon takes and answers (`tests.sim.oracle.Oracle`)."""

    def started(self, incarnation: int, settings: NodeSettings) -> None: ...
    def handling(self, event: ev.Event) -> None: ...
    def replying(self, event: ev.Event, effect: ev.Effect) -> None: ...
    def making(self) -> None: ...
    def handled(self, event: ev.Event, node: Node) -> None: ...


class Daemon:
    """Kill it with `crash` or `fuse`; it starts again by itself after `restart_s()` seconds."""

    def __init__(
        self,
        kernel: Kernel,
        disk: Disk,
        settings: NodeSettings,
        witness: Witness,
        log: Callable[[str], None],
        rng: random.Random,
    ) -> None:
        self.settings = settings
        self.incarnation = 0
        self.fuse: int | None = None
        self.deaths_s_max = 0.0
        self.restart_s_max = 0.0
        self.resize = 0.0
        """The chance that a restart comes with another size of the arena."""
        self.node: Node | None = None
        self._kernel = kernel
        self._disk = disk
        self._witness = witness
        self._log = log
        self._rng = rng
        self._links: dict[int, Link] = {}
        self._processes: dict[int, int] = {}
        self._last_process = 0
        self._inbox: list[Callable[[], None]] = []
        self._hangs_until = float("-inf")

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """As `daemon.app` does it."""
        self.incarnation += 1
        life = self.incarnation
        settings = self.settings
        if life > 1 and self._rng.random() < self.resize:
            settings = dataclasses.replace(settings, extents_max=self._rng.randint(1, settings.extents_max + 1))
        self.node = Node(settings, self._disk.next_extent)
        self._witness.started(life, settings)
        self._log(f"daemon {life} starts")
        self.dispatch(ev.NamespacesRestored(self._disk.namespaces))
        for extent in sorted(self._disk.spares):
            self.dispatch(ev.SpareRestored(extent))
        for extent, table in sorted(self._disk.extents.items()):
            self.dispatch(ev.ExtentRestored(extent, table.tenant, table.slot_bytes, table.columns()))
        self.dispatch(ev.Started())
        self._kernel.after(TICK_S, lambda: self._tick(life))

    def _tick(self, life: int) -> None:
        if self.node is not None and life == self.incarnation:
            self.hear(lambda: self.dispatch(ev.Tick()))
            self._kernel.after(TICK_S, lambda: self._tick(life))

    def change(self, **settings: Any) -> None:
        """The next start has other settings."""
        self.settings = dataclasses.replace(self.settings, **settings)

    def crash(self) -> None:
        """Kill -9."""
        if self.node is None:
            return
        self._log(f"daemon {self.incarnation} is killed")
        self.node = None
        self.fuse = None
        self._inbox.clear()
        self._hangs_until = float("-inf")
        self._processes.clear()
        self._disk.crash()
        for link in list(self._links.values()):
            link.crash()
        self._links.clear()
        self._kernel.after(self._rng.uniform(0.01, 0.01 + self.restart_s_max), self.start)

    def hang(self, seconds: float) -> None:
        """Everything waits for a while, then happens in the order in which it came."""
        self._hangs_until = self._kernel.now + seconds
        self._kernel.at(self._hangs_until, self._wake)

    def _wake(self) -> None:
        while self._inbox and self._kernel.now >= self._hangs_until:
            self._inbox.pop(0)()

    def damage(self, extent: int) -> None:
        """Somebody truncated a data file, and we noticed."""
        self.hear(lambda: self.dispatch(ev.ExtentDamaged(extent, "truncated")))

    # --- Host (tests.sim.network) -----------------------------------------------------------------------------------

    def up(self) -> bool:
        return self.node is not None

    def hear(self, call: Callable[[], None]) -> None:
        """Something came in: now, or when we hang no more; never if we are killed before."""
        if self.node is None:
            return
        if self._kernel.now < self._hangs_until:
            self._inbox.append(call)
        else:
            call()

    def opened(self, link: Link) -> None:
        self._links[link.number] = link

    def arrived(self, link: Link, event: ev.Event) -> None:
        if isinstance(event, ev.Hello):
            number = self._number(link.token)
            if link.token is None or (number is None and link.token[1] is not None):
                link.reply(ev.Refused(link.number, event.call, "protocol", "the token names no living process"))
                self._finish(link)
                return
            event = dataclasses.replace(event, process=number, tenant=link.tenant)
        self.dispatch(event)

    def ended(self, link: Link) -> None:
        if self._links.pop(link.number, None) is not None:
            self.dispatch(ev.ConnectionLost(link.number))

    def _finish(self, link: Link) -> None:
        link.refuse()

    # --- processes and descriptors ----------------------------------------------------------------------------------

    def attach(self, process: Process) -> tuple[int, int | None]:
        """The token of a process: (incarnation, number); None = it gave no pidfd."""
        if not process.pidfd:
            return self.incarnation, None
        if process.pid not in self._processes:
            self._last_process += 1
            self._processes[process.pid] = self._last_process
            if not process.alive:
                self.ended_process(process.pid)
        return self.incarnation, self._processes[process.pid]

    def ended_process(self, pid: int) -> None:
        """A pidfd becomes readable; we see it some time later."""
        life = self.incarnation

        def seen() -> None:
            number = self._processes.pop(pid, None) if life == self.incarnation else None
            if number is not None:
                self.dispatch(ev.ProcessDied(number))

        self._kernel.after(self._rng.uniform(0, self.deaths_s_max), lambda: self.hear(seen))

    def knows(self, pid: int) -> bool:
        """Is the process watched by this incarnation?"""
        return pid in self._processes

    def _number(self, token: tuple[int, int | None] | None) -> int | None:
        if token is None or token[0] != self.incarnation:
            return None
        return token[1] if token[1] in self._processes.values() else None

    def extents_wanted(self, process: Process, slot_bytes: set[int], token: tuple[int, int | None]) -> Any:
        """Every extent of these classes of the process's tenant; None if it has to attach anew."""
        if self.node is None or token[0] != self.incarnation:
            return None
        number = self._number(token)
        if number is None and token[1] is not None:
            return None
        tables: list[Table] = []
        for extent, size, count in self.node.extents_of(process.engine.tenant, slot_bytes):
            table = self._disk.extents[extent]
            assert table.tenant == process.engine.tenant, "another tenant's extent is handed out"
            assert (table.slot_bytes, len(table.states)) == (size, count), f"extent {extent} is not what it says"
            tables.append(table)
        if number is not None and tables:
            for table in tables if process.alive else ():
                table.memory.mapped[process.pid, table.extent] = self.incarnation
            self.dispatch(ev.ExtentsMapped(number, tuple(table.extent for table in tables)))
        return tables

    def unmapped(self, extents: tuple[int, ...], token: tuple[int, int | None]) -> None:
        number = self._number(token)
        if number is not None:
            self.dispatch(ev.ExtentsUnmapped(number, extents))

    # --- the runner -------------------------------------------------------------------------------------------------

    def dispatch(self, event: ev.Event) -> None:
        """Let an event happen and carry out what follows, up to the end or the next kill."""
        if self.node is None:
            return
        node = self.node
        try:
            self._step()
            self._log(f"<- {_shown(event)}")
            self._witness.handling(event)
            for effect in node.handle(event, self._kernel.now):
                self._step()
                self._log(f"   -> {_shown(effect)}")
                self._carry_out(event, effect)
        except Killed:
            self.crash()
            return
        self._witness.handled(event, node)

    def _carry_out(self, event: ev.Event, effect: ev.Effect) -> None:
        if isinstance(effect, ev.MarkFree | ev.MarkWriting | ev.MarkSealed | ev.SaveLastUse | ev.SaveNamespaces):
            self._disk.mark(effect, self._step)
        elif isinstance(effect, REPLIES):
            self._witness.replying(event, effect)
            link = self._links.get(effect.connection)
            if link is not None:
                link.reply(effect)
                if isinstance(effect, ev.Refused) and effect.kind == "protocol":
                    self._finish(link)
        else:
            if isinstance(effect, ev.MakeSpare):
                self._witness.making()
            self._disk.start(effect, lambda done: self.hear(lambda: self.dispatch(done)))

    def _step(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse <= 0:
                raise Killed


def _shown(thing: ev.Event | ev.Effect) -> str:
    """Like repr, but whole and short where columns of numbers come."""
    if isinstance(thing, ev.SaveLastUse):
        return f"SaveLastUse({thing.extent}, {thing.last_use.tolist()})"
    if isinstance(thing, ev.ExtentRestored):
        return f"ExtentRestored({thing.extent}, {thing.tenant}, {thing.slot_bytes})"
    return repr(thing)
