"""A client process: alive or dead, running or stalled, with what it has mapped and its one control connection.

Covers: tasks that end with the process, calls with deadlines, staying connected as `client.keeper` and `client.channel`
do, mapping extents. Not here: what an engine does with it (`tests.sim.engine`).

What a client owes the daemon, kept here and in `tests.sim.engine`:

- a Hello names every ticket that the process may still write or read under; a ticket whose reply never came is undone
  (`later`) as soon as the daemon can be told
- a worker begins a copy only on a usable connection that was welcomed before the ticket was asked for: then the daemon
  knew of the process when it gave the slots, and waits for its death (an engine can tell by numbering its workers'
  welcomes and sending the last number that the scheduler heard with each job)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

from cachesvc.core import events as ev
from cachesvc.types import Role
from tests.sim.disk import Table
from tests.sim.kernel import Future, Kernel, Task
from tests.sim.network import Link, Network

if TYPE_CHECKING:
    from tests.sim.daemon import Daemon
    from tests.sim.engine import Engine

HELLO_S = 5.0
BACKOFF_S = 0.2


class Process:
    """One process of an engine."""

    def __init__(self, engine: Engine, pid: int, role: Role, *, pidfd: bool) -> None:
        self.engine = engine
        self.pid = pid
        self.role = role
        self.pidfd = pidfd
        self.alive = True
        self.stalled_until = float("-inf")
        self.welcomed = False
        self.over = False
        """It was told that another scheduler has its session."""
        self._welcomed_at = float("-inf")
        self.mapped: dict[int, Table] = {}
        self.copying: dict[int, None] = {}
        """Write tickets that this process may still write (of a worker: it names them in its Hello)."""
        self.kernel: Kernel = engine.city.kernel
        self.network: Network = engine.city.network
        self.daemon: Daemon = engine.city.daemon
        self.rng: random.Random = engine.rng
        self.link: Link | None = None
        self._token: tuple[int, int | None] | None = None
        self._calls = 0
        self._pending: dict[int, tuple[Future, Callable[[Any], Any]]] = {}
        self._later: list[tuple[type[ev.Abort] | type[ev.Release], int]] = []

    # --- living -----------------------------------------------------------------------------------------------------

    def run(self, task: Task) -> None:
        """Run a task until it ends or the process does."""
        self._resume([task], None)

    def _resume(self, tasks: list[Task], value: Any) -> None:
        """Go on with the last of `tasks`; each of the others waits for the next one."""
        if not self.alive:
            return
        if self.kernel.now < self.stalled_until:
            self.kernel.at(self.stalled_until, lambda: self._resume(tasks, value))
            return
        while tasks:
            try:
                step = tasks[-1].send(value)
            except StopIteration as end:
                tasks.pop()
                value = end.value
                continue
            value = None
            if isinstance(step, Generator):
                tasks.append(step)
                continue
            if isinstance(step, Future):
                step.then(lambda answer: self._resume(tasks, answer))
            else:
                self.kernel.after(step, lambda: self._resume(tasks, None))
            return

    def stall(self, seconds: float) -> None:
        """Wedged: it lives, and does nothing for a while."""
        self.stalled_until = max(self.stalled_until, self.kernel.now + seconds)

    def die(self) -> None:
        """Kill -9, or the end of a process that had nothing more to do."""
        if not self.alive:
            return
        self.alive = False
        if self.link is not None:
            self.link.close()
        self.daemon.ended_process(self.pid)
        self.engine.lost(self)

    # --- calls ------------------------------------------------------------------------------------------------------

    def connected(self) -> bool:
        """What a look at the socket says now."""
        return self.welcomed and self.link is not None and self.link.usable

    def welcomed_since(self, when: float) -> bool:
        """Connected, and without a break since `when`?"""
        return self.connected() and self._welcomed_at < when

    def tell(self, make: Callable[[int], ev.Event]) -> None:
        """Send a one-way message, into the void if there is no connection. `make(connection)`."""
        if self.connected() and self.link is not None:
            self.link.send(make(self.link.number))

    def undo(self, kind: type[ev.Abort] | type[ev.Release], ticket: int) -> None:
        """End a ticket now or when the daemon can be told."""
        self._later.append((kind, ticket))
        self._flush_later()

    def _flush_later(self) -> None:
        if self.connected() and self.link is not None:
            for kind, ticket in self._later:
                self.link.send(kind(self.link.number, (ticket,)))
            self._later.clear()

    def call(
        self,
        make: Callable[[int, int], ev.Event],
        deadline_s: float,
        accept: Callable[[Any], Any] = lambda reply: reply,
    ) -> Task:
        """The reply, None if there is none in time. `make(connection, call)`; `accept` makes the answer of the reply
        the moment it is in the socket: a stalled process reads it there when it wakes, before anything else."""
        if not self.connected() or self.link is None:
            return None
        return (yield self._call_on(self.link, make, deadline_s, accept))

    def _call_on(
        self,
        link: Link,
        make: Callable[[int, int], ev.Event],
        deadline_s: float,
        accept: Callable[[Any], Any] = lambda reply: reply,
    ) -> Task:
        self._calls += 1
        number = self._calls
        answer = Future()
        self._pending[number] = answer, accept
        link.send(make(link.number, number))
        link.lost.then(lambda _: answer.resolve())
        self.kernel.after(deadline_s, answer.resolve)
        reply = yield answer
        self._pending.pop(number, None)
        return reply

    def _reply(self, effect: ev.Effect) -> None:
        answer, accept = self._pending.get(getattr(effect, "call", 0), (None, None))
        if answer is not None and accept is not None and not answer.done and self.alive:
            answer.resolve(accept(effect))

    # --- staying connected ------------------------------------------------------------------------------------------

    def stay_connected(self) -> Task:
        """The background thread."""
        while True:
            if (yield self._connect()):
                assert self.link is not None
                self._flush_later()
                yield self.link.lost
                self.welcomed = False
            else:
                yield self.rng.uniform(0, BACKOFF_S)

    def _connect(self) -> Task:
        self.welcomed = False
        self._token = yield self.network.ask(lambda: self.daemon.attach(self))
        if self._token is None:
            return False
        link = self.network.connect(self.engine.tenant, self._reply)
        if link is None:
            return False
        link.token = self._token
        self.link = link
        self.engine.city.oracle.connecting(link.number, self)
        writes, leases = self.engine.claims(self)
        engine, role = self.engine, self.role
        told = [*writes, *leases][: engine.described_max]
        welcome = yield self._call_on(
            link,
            lambda connection, call: ev.Hello(
                connection=connection,
                tenant=engine.tenant,
                process=None,
                call=call,
                session=engine.session,
                role=role,
                namespace=engine.namespace,
                label=engine.label,
                components={"model": engine.label},
                chunk_bytes=engine.chunk_bytes,
                writes=tuple(c for c in writes if c in told),
                leases=tuple(c for c in leases if c in told),
                open_writes=tuple(c.ticket for c in writes if c not in told),
                open_leases=tuple(c.ticket for c in leases if c not in told),
                over=self.over,
            ),
            HELLO_S,
        )
        if isinstance(welcome, ev.Refused) and welcome.kind == "session":
            self.over = True
        if not isinstance(welcome, ev.Welcome) or not link.usable:
            link.close()
            return False
        kept = {*welcome.writes_kept, *welcome.leases_kept}
        claims: list[ev.WriteClaim | ev.LeaseClaim] = [*writes, *leases]
        for claim in [c for c in claims if c not in told and c.ticket not in kept]:
            welcome = yield self._claim(link, welcome, claim)
            if welcome is None or not link.usable:
                link.close()
                return False
        self.welcomed = True
        self._welcomed_at = self.kernel.now
        self.engine.welcomed(self, welcome)
        return True

    def _claim(self, link: Link, welcome: ev.Welcome, claim: ev.WriteClaim | ev.LeaseClaim) -> Task:
        """What the Hello had no room for, to a daemon that doesn't know its number; the welcome, with what it keeps."""
        writes = (claim,) if isinstance(claim, ev.WriteClaim) else ()
        leases = (claim,) if isinstance(claim, ev.LeaseClaim) else ()
        reply = yield self._call_on(link, lambda connection, call: ev.Claim(connection, call, writes, leases), HELLO_S)
        if not isinstance(reply, ev.Claimed):
            return None
        writes_kept, leases_kept = welcome.writes_kept + reply.writes_kept, welcome.leases_kept + reply.leases_kept
        return ev.Welcome(welcome.connection, welcome.call, writes_kept, leases_kept)

    # --- extents ----------------------------------------------------------------------------------------------------

    def map(self, extents: Iterable[int]) -> Task:
        """Are these extents mapped, now or after asking?"""
        wanted = set(extents)
        if not wanted <= self.mapped.keys():
            yield self.refresh_extents()
        return wanted <= self.mapped.keys()

    def refresh_extents(self) -> Task:
        """Map what the daemon lists, unmap the rest."""
        token = self._token
        if token is None:
            return
        tables = yield self.network.ask(lambda: self.daemon.extents_wanted(self, self.engine.slot_sizes, token))
        if tables is None:
            return
        for table in tables:
            self.mapped[table.extent] = table
        listed = {table.extent for table in tables}
        gone = tuple(extent for extent in self.mapped if extent not in listed and not self.engine.uses(extent))
        for extent in gone:
            self.mapped[extent].memory.mapped.pop((self.pid, extent), None)
            del self.mapped[extent]
        if gone:
            self.network.ask(lambda: self.daemon.unmapped(gone, token))
