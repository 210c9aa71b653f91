"""An engine of a simulation: a session of one or several processes that stores and loads chunks of prompts.

Covers: requests in several steps, copies in steps during which a process can die or stall, late seals, reconnecting
with claims. Not here: processes and calls (`tests.sim.process`), what is right (`tests.sim.oracle`).

The scheduler allocates, leases, seals and releases. Every *copier* (the workers, or the scheduler if there are none)
writes or reads its share of each chunk's cells and reports; the scheduler seals when all have reported, and aborts only
then: an abort says that nobody writes any more. Messages inside an engine take a moment and are lost with the process
they go to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cachesvc.core import events as ev
from cachesvc.types import AllocateState, KeyState, Priority, Role, slot_bytes_for
from tests.sim.kernel import Future, Kernel, Task
from tests.sim.network import Network
from tests.sim.oracle import Copy, Name, Oracle, Write
from tests.sim.process import Process

if TYPE_CHECKING:
    from tests.sim.daemon import Daemon

SEAL_TRIES = 6


class City(Protocol):
    """What an engine lives in (`tests.sim.world.World`)."""

    kernel: Kernel
    network: Network
    daemon: Daemon
    oracle: Oracle

    def next_pid(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Habits:
    """How an engine works; times in seconds, chances between 0 and 1."""

    think_s_max: float = 1.0
    deadline_s: float = 1.0
    step_s_max: float = 0.01
    inside_s_max: float = 0.005
    keys_max: int = 4
    batches_max: int = 3
    prompts: int = 6
    depth_max: int = 10
    batch_chance: float = 0.2
    """Of a request being batch, not interactive."""
    fail_chance: float = 0.03
    """Of a copy that gives up."""
    short_chance: float = 0.3
    """Of a chunk that isn't full."""
    slow_chance: float = 0.02
    slow_s_max: float = 2.0
    """A copy that takes a rest, a seal that comes late, a lease held for long."""
    done_chance: float = 0.5
    """Of a worker saying Done when its part of a write is over."""
    reread_chance: float = 0.3
    """Of a request that only looks."""
    forget_chance: float = 0.1
    """Of a request that is never ended."""


@dataclass(slots=True, eq=False)
class OpenTicket:
    """A ticket as its scheduler knows it, from the reply until it is settled."""

    number: int
    group: int
    keys: tuple[bytes, ...]
    slots: ev.SlotRun
    copy: Copy
    states: bytes
    """The reply's answer for each key that was asked for."""


@dataclass(slots=True, eq=False)
class Report:
    """Counts the copiers that have still to say how it went."""

    missing: int
    ok: bool = True
    settled: Future = field(default_factory=Future)

    def say(self, ok: bool) -> None:
        self.ok = self.ok and ok
        self.missing -= 1
        if not self.missing:
            self.settled.resolve()


class Engine:
    """One session. `city` is the world it lives in, `rng` its own dice."""

    def __init__(
        self,
        city: City,
        name: str,
        tenant: str,
        label: str,
        chunk_bytes: tuple[int, ...],
        habits: Habits,
        rng: random.Random,
        workers: int = 0,
        *,
        pidfd: bool = True,
        session: str | None = None,
    ) -> None:
        """`session`: the id of a session that another engine has had (its own)."""
        self.city = city
        self.name = name
        self.session = (session or name).encode().ljust(16, b".")
        self.described_max = 1 << 30
        """Tickets that a Hello or a Claim describes; the others are named by number, and claimed after it."""
        self.tenant = tenant
        self.label = label
        self.namespace = label.encode().ljust(16, b"-")
        self.chunk_bytes = chunk_bytes
        self.slot_sizes = {slot_bytes_for(size) for size in chunk_bytes}
        self.habits = habits
        self.rng = rng
        self.stopping = False
        self.busy = 0
        """Tasks of requests that run."""
        self.writes: dict[int, OpenTicket] = {}
        self.leases: dict[int, OpenTicket] = {}
        self.scheduler = Process(self, city.next_pid(), Role.SCHEDULER, pidfd=pidfd)
        self.workers = [Process(self, city.next_pid(), Role.WORKER, pidfd=pidfd) for _ in range(workers)]
        self.processes = [self.scheduler, *self.workers]
        self.copiers = self.workers or [self.scheduler]
        self._tickets = city.next_pid() << 32  # no two of a session have a ticket of the same number
        self._requests = 0
        self._reports: dict[Process, list[Report]] = {process: [] for process in self.processes}

    def start(self, tasks: int) -> None:
        for process in self.processes:
            process.run(process.stay_connected())
        for _ in range(tasks):
            self.scheduler.run(self._work())

    @property
    def alive(self) -> bool:
        return any(process.alive for process in self.processes)

    def lost(self, process: Process) -> None:
        """One of ours died: its part of every copy is over, and the others hear of it."""
        self.city.oracle.died(process)
        for report in self._reports[process]:
            self._inside(self.scheduler, lambda report=report: report.say(ok=False))  # type: ignore[misc]
        self._reports[process].clear()

    def uses(self, extent: int) -> bool:
        """May a copy of ours run on this extent?"""
        open_tickets = (*self.writes.values(), *self.leases.values())
        return any(extent in ticket.slots.extents for ticket in open_tickets)

    # --- reconnecting -----------------------------------------------------------------------------------------------

    def claims(self, process: Process) -> tuple[tuple[ev.WriteClaim, ...], tuple[ev.LeaseClaim, ...]]:
        """What a process names in its Hello."""
        if process.role is Role.WORKER:
            nothing = ev.SlotRun((), (), ())
            return tuple(ev.WriteClaim(ticket, 0, (), nothing) for ticket in process.copying), ()
        writes = tuple(
            ev.WriteClaim(ticket.number, ticket.group, ticket.keys, ticket.slots)
            for ticket in self.writes.values()
            if not ticket.copy.lost
        )
        leases = tuple(ev.LeaseClaim(t.number, t.slots) for t in self.leases.values() if not t.copy.lost)
        return writes, leases

    def welcomed(self, process: Process, welcome: ev.Welcome) -> None:
        """What wasn't kept is lost."""
        if process.role is Role.WORKER:
            return
        for tickets, kept in (self.writes, welcome.writes_kept), (self.leases, welcome.leases_kept):
            for ticket in tickets.values():
                ticket.copy.lost = ticket.copy.lost or ticket.number not in kept

    # --- requests ---------------------------------------------------------------------------------------------------

    def _work(self) -> Task:
        while not self.stopping:
            yield self.rng.uniform(0, self.habits.think_s_max)
            if not self.scheduler.connected() or self.stopping:
                continue
            self.busy += 1
            yield self._request()
            self.busy -= 1

    def _request(self) -> Task:
        rng, habits = self.rng, self.habits
        self._requests += 1
        request = self._requests if rng.random() < 0.9 else 0
        group = rng.randrange(len(self.chunk_bytes))
        keys = self._prompt()
        priority = Priority.BATCH if rng.random() < habits.batch_chance else Priority.INTERACTIVE
        if rng.random() < 0.7:
            yield self.lookup(group, keys, request, touch=True)
        run = yield self.load(group, keys, request, touch=rng.random() < 0.3, prefix=rng.random() < 0.8)
        if rng.random() >= habits.reread_chance:
            for _ in range(rng.randint(1, habits.batches_max)):
                batch = keys[run : run + rng.randint(1, habits.keys_max)]
                if not batch or self.stopping:
                    break
                yield self.store(group, batch, request, priority)
                run += len(batch)
                yield rng.uniform(0, habits.step_s_max)
        if request and rng.random() >= habits.forget_chance:
            self.scheduler.tell(lambda connection: ev.EndRequests(connection, (request,)))

    def _prompt(self) -> list[bytes]:
        """Prompts share heads: prompt p forks off prompt p // 2 somewhere."""
        prompt = self.rng.randrange(self.habits.prompts)
        depth = self.rng.randint(1, self.habits.depth_max)
        return [f"{prompt if at >= 3 else prompt // 2}/{at}".encode() for at in range(depth)]

    def lookup(self, group: int, keys: Sequence[bytes], request: int = 0, *, touch: bool = False) -> Task:
        """States of keys, None if nobody answered."""
        reply = yield self.scheduler.call(
            lambda connection, call: ev.Lookup(connection, call, group, list(keys), request, touch),
            self.habits.deadline_s,
        )
        return reply.states if isinstance(reply, ev.Looked) else None

    # --- loading ----------------------------------------------------------------------------------------------------

    def load(
        self, group: int, keys: Sequence[bytes], request: int = 0, *, touch: bool = False, prefix: bool = True
    ) -> Task:
        """Lease, copy out, check, release; how long the leading run was."""
        ticket = yield self.lease(group, keys, request, touch=touch, prefix=prefix)
        if not isinstance(ticket, OpenTicket):
            return 0
        yield self._rest()
        yield self.read(ticket)
        yield self._rest()
        self.release(ticket)
        return len(ticket.states) - len(ticket.states.lstrip(bytes([KeyState.RAM])))

    def lease(
        self, group: int, keys: Sequence[bytes], request: int = 0, *, touch: bool = False, prefix: bool = True
    ) -> Task:
        """An open ticket; else the reply that brought none, None if there was no reply."""
        number, asked_at = self._next_ticket(), self.city.kernel.now

        def accept(reply: ev.Effect) -> OpenTicket | ev.Effect:
            if not isinstance(reply, ev.Leased) or not len(reply.slots):
                return reply
            found = tuple(key for key, state in zip(keys, reply.states, strict=False) if state == KeyState.RAM)
            names = self._names(group, found)
            copy = self.city.oracle.leased(self, number, names, reply.slots, reply.lengths, asked_at)
            ticket = self.leases[number] = OpenTicket(number, group, found, reply.slots, copy, reply.states)
            return ticket

        ticket = yield self.scheduler.call(
            lambda connection, call: ev.Lease(connection, call, number, group, list(keys), request, touch, prefix),
            self.habits.deadline_s,
            accept,
        )
        if ticket is None:
            self.scheduler.undo(ev.Release, number)
        return ticket

    def read(self, ticket: OpenTicket) -> Task:
        """Copy everything out and check; did it all hold still?"""
        return (yield self._copy_by_all(ticket.copy, self._copy_out))

    def release(self, ticket: OpenTicket) -> None:
        ticket.copy.over()
        del self.leases[ticket.number]
        self.scheduler.undo(ev.Release, ticket.number)

    def _copy_out(self, process: Process, copy: Copy, share: tuple[int, int]) -> Task:
        tables = [process.mapped[extent] for extent in copy.slots.extents]
        oracle = self.city.oracle
        read: list[list[Any]] = []
        all_valid = True
        for at, table in enumerate(tables):
            read.append([])
            for cell in copy.cells(at)[share[0] :: share[1]]:
                read[at].append(table.memory.cells[cell])
                if self.rng.random() < 0.5:
                    yield self._pause()
        for at, table in enumerate(tables):
            slot, generation = copy.slots.slots[at], copy.slots.generations[at]
            valid = table.generations[slot] == generation
            oracle.loaded(copy, at, share, read[at], valid)
            all_valid = all_valid and valid
        return all_valid

    # --- storing ----------------------------------------------------------------------------------------------------

    def store(
        self, group: int, keys: Sequence[bytes], request: int = 0, priority: Priority = Priority.INTERACTIVE
    ) -> Task:
        """Allocate, copy in, seal or abort; what the allocation said of each key, None if nobody answered."""
        ticket = yield self.allocate(group, keys, request, priority)
        if not isinstance(ticket, OpenTicket):
            return None if ticket is None else getattr(ticket, "states", b"")
        ok = yield self.fill(ticket)
        yield self._rest()
        if ok:
            ok = yield self.seal(ticket)
        if ok:
            self._settled(ticket)
        else:
            self.abort(ticket)
        return ticket.states

    def allocate(
        self, group: int, keys: Sequence[bytes], request: int = 0, priority: Priority = Priority.INTERACTIVE
    ) -> Task:
        """An open ticket; else the reply that brought none, None if there was no reply."""
        number, asked_at = self._next_ticket(), self.city.kernel.now

        def accept(reply: ev.Effect) -> OpenTicket | ev.Effect:
            if not isinstance(reply, ev.Allocated) or not len(reply.slots):
                return reply
            new = tuple(key for key, state in zip(keys, reply.states, strict=True) if state == AllocateState.NEW)
            names = self._names(group, new)
            writes = [self._write(group, name, priority) for name in names]
            copy = self.city.oracle.allocated(self, number, names, reply.slots, writes, asked_at)
            ticket = self.writes[number] = OpenTicket(number, group, new, reply.slots, copy, reply.states)
            return ticket

        ticket = yield self.scheduler.call(
            lambda connection, call: ev.Allocate(connection, call, number, group, list(keys), request, priority),
            self.habits.deadline_s,
            accept,
        )
        if ticket is None:
            self.scheduler.undo(ev.Abort, number)
        return ticket

    def fill(self, ticket: OpenTicket) -> Task:
        """Copy everything in; did it all go well?"""
        return (yield self._copy_by_all(ticket.copy, self._copy_in))

    def abort(self, ticket: OpenTicket) -> None:
        self._settled(ticket)
        self.scheduler.undo(ev.Abort, ticket.number)

    def _settled(self, ticket: OpenTicket) -> None:
        ticket.copy.over()
        del self.writes[ticket.number]

    def _next_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def _names(self, group: int, keys: tuple[bytes, ...]) -> tuple[Name, ...]:
        return tuple((self.tenant, self.namespace, group, key) for key in keys)

    def _write(self, group: int, name: Name, priority: Priority) -> Write:
        most = self.chunk_bytes[group]
        length = most if self.rng.random() >= self.habits.short_chance else self.rng.randint(1, most)
        return Write(name, length, priority)

    def _copy_in(self, process: Process, copy: Copy, share: tuple[int, int]) -> Task:
        tables = [process.mapped[extent] for extent in copy.slots.extents]
        gives_up = self.rng.random() < self.habits.fail_chance
        for at, table in enumerate(tables):
            for index, cell in list(enumerate(copy.cells(at)))[share[0] :: share[1]]:
                if self.rng.random() < 0.5:
                    yield self._pause()
                if gives_up and self.rng.random() < 0.3:
                    return False
                self.city.oracle.store(copy, at, table, cell, index)
        return not gives_up

    def seal(self, ticket: OpenTicket) -> Task:
        """Is it sealed? Some engines give up when there is no answer, others come back and try again."""
        ticket.copy.complete()
        lengths = tuple(write.length for write in ticket.copy.writes)
        stubborn = self.rng.random() < 0.5
        for _ in range(SEAL_TRIES):
            if ticket.copy.lost:
                return False
            connected = self.scheduler.connected()
            reply = yield self.scheduler.call(
                lambda connection, call: ev.Seal(connection, call, ticket.number, lengths), self.habits.deadline_s
            )
            if isinstance(reply, ev.Sealed):
                return reply.ok
            if connected and not stubborn:
                return False
            yield self.rng.uniform(0, 1.0)
        return False

    # --- copies -----------------------------------------------------------------------------------------------------

    def _copy_by_all(self, copy: Copy, part: Callable[[Process, Copy, tuple[int, int]], Task]) -> Task:
        """Every copier does its share of each slot; did all of them say that it went well?"""
        report = Report(len(self.copiers))
        for rank, process in enumerate(self.copiers):
            share = rank, len(self.copiers)
            copy.tell(process)
            self._reports[process].append(report)
            if process.alive:
                self._hand(process, copy, part, share, report)
            else:
                copy.end(process)
                self._inside(self.scheduler, lambda: report.say(ok=False))
        copy.handed(self.scheduler)
        yield report.settled
        return report.ok

    def _hand(
        self,
        process: Process,
        copy: Copy,
        part: Callable[[Process, Copy, tuple[int, int]], Task],
        share: tuple[int, int],
        report: Report,
    ) -> None:
        def work() -> Task:
            ok = False
            if copy.begin(process):
                if copy.writes:
                    process.copying[copy.ticket] = None
                if (yield process.map(copy.slots.extents)):
                    ok = yield part(process, copy, share)
            process.copying.pop(copy.ticket, None)
            copy.end(process)
            if copy.writes and process.role is Role.WORKER and self.rng.random() < self.habits.done_chance:
                process.tell(lambda connection: ev.Done(connection, (copy.ticket,)))
            if report in self._reports[process]:
                self._reports[process].remove(report)
                self._inside(self.scheduler, lambda: report.say(ok))

        if process is self.scheduler:
            process.run(work())
        else:
            self._inside(process, lambda: process.run(work()))

    def _inside(self, process: Process, call: Callable[[], None]) -> None:
        """A message inside the engine; `process` is who gets it."""
        self.city.kernel.after(self.rng.uniform(0, self.habits.inside_s_max), lambda: call() if process.alive else None)

    def _pause(self) -> Task:
        slow = self.rng.random() < self.habits.slow_chance
        yield self.rng.uniform(0, self.habits.slow_s_max if slow else self.habits.step_s_max)

    def _rest(self) -> Task:
        if self.rng.random() < self.habits.slow_chance:
            yield self.rng.uniform(0, self.habits.slow_s_max)
