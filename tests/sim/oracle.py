"""What is right, known without the node: who writes and reads which memory, what was sealed, what may be handed out.

Covers: checks at every store into a table, every reply, every step of a copy. It sees what clients see (replies,
tables, memory), what clients do, and what the daemon takes in; of the node it uses only `check_invariants` and nothing
to judge by. Not here: what happens (`tests.sim.world`).

What it holds the daemon to:

- a read whose generation didn't change has exactly the bytes that one client wrote completely and sealed under that
  key, in that namespace and tenant, with the length that it said
- memory is freed, handed out or moved only when no living process may still write it, and nobody reads it under a lease
- a word changes only along the arrows of `core.slots`, with the generation that the arrow asks for
- RAM, PRESENT and leases name exactly what the tables hold sealed: a sealed chunk is found, restart or not
- in the grace time after a restart nothing sealed is freed
- memory whose reader lost its lease, as far as this incarnation of the daemon knew of it, is handed out no sooner than
  `REUSE_S` after its generation was raised
- what may be evicted: nothing of the same request, nothing of a higher priority; nothing leaves its tenant
- an extent is made only while files and mappings of unlinked files leave room for it

Excused, because the design says so (`Oracle.excuses`): time may free memory of a writer that gave no pidfd, or that
hasn't named its ticket to a restarted daemon, `quarantine_s` later; a lease that wasn't named within the grace time is
lost. A restart also forgets which memory rests after a reader lost it: more than `REUSE_S` isn't promised across a
crash. A writer that is excused this way is killed before it can write on: its bytes would be nobody's fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from cachesvc.core import events as ev
from cachesvc.core.node import Node, NodeSettings
from cachesvc.types import AllocateState, KeyState, Priority, Role
from tests.sim.disk import FREE, SEALED, WRITING, Disk, Fields, Memory, Table
from tests.sim.kernel import Kernel

if TYPE_CHECKING:
    from tests.sim.engine import Engine
    from tests.sim.process import Process

REUSE_S = 1.0

AT_ONCE_MAX = 1000
"""Events at one moment; more is an endless loop."""

Name: TypeAlias = tuple[str, bytes, int, bytes]
"""(tenant, namespace, group, key) of a chunk."""

Place: TypeAlias = tuple[int, int]
"""(extent, slot)."""


class Wrong(AssertionError):  # noqa: N818 - a verdict
    """The daemon did what it must not."""


@dataclass(slots=True, eq=False)
class Write:
    """One write of one chunk: its cells hold (this, index)."""

    name: Name
    length: int
    priority: Priority
    complete: bool = False
    """Every cell was stored, and its scheduler may ask for the seal."""
    sealed: bool = False


class Copy:
    """One ticket's truth: who may still touch which memory. Of a lease, `writes` is empty."""

    def __init__(
        self,
        engine: Engine,
        ticket: int,
        slots: ev.SlotRun,
        tables: Sequence[Table | None],
        names: tuple[Name, ...],
        writes: Sequence[Write],
        lengths: tuple[int, ...],
        born: int,
        asked_at: float,
    ) -> None:
        self.engine = engine
        self.ticket = ticket
        self.slots = slots
        self.names = names
        self.writes = writes
        self.lengths = lengths
        self.born = born
        self.asked_at = asked_at
        self.kept = born
        """The last incarnation of the daemon that knew of it."""
        self.lost = False
        self.pending: dict[Process, bool] = {engine.scheduler: True}
        """Who may touch the memory, and who has begun to."""
        self.seen: dict[int, Write] = {}
        """Of a lease: whose bytes were read, by position."""
        self._places = [
            (table.memory, table.cells(slot)) if table is not None else (None, range(0))
            for table, slot in zip(tables, slots.slots, strict=True)
        ]
        for memory, cells in self._places:
            if memory is not None:
                memory.copies.append((self, cells))

    def cells(self, at: int) -> range:
        return self._places[at][1]

    def tell(self, process: Process) -> None:
        """A process is told to copy."""
        self.pending.setdefault(process, False)

    def begin(self, process: Process) -> bool:
        """A process wants to begin what it was told: may it?"""
        if process is not self.engine.scheduler and not process.welcomed_since(self.asked_at):
            return False
        self.pending[process] = True
        return True

    def handed(self, scheduler: Process) -> None:
        """Everybody was told."""
        if scheduler not in self.engine.copiers:
            self.end(scheduler)

    def end(self, process: Process) -> None:
        """A process copies no more."""
        self.pending.pop(process, None)
        if not self.pending and not self.engine.scheduler.alive:
            self.over()

    def complete(self) -> None:
        for write in self.writes:
            write.complete = True

    def over(self) -> None:
        """The ticket is settled."""
        self.pending.clear()
        for memory, cells in self._places:
            if memory is not None and (self, cells) in memory.copies:
                memory.copies.remove((self, cells))

    def touched_by(self) -> list[Process]:
        """Living processes that may still touch the memory."""
        return [
            process
            for process, begun in self.pending.items()
            if process.alive and (begun or process.welcomed_since(self.asked_at))
        ]

    def leased(self) -> bool:
        """Does somebody rely on this lease?"""
        return not self.writes and not self.lost and (self.engine.scheduler.alive or bool(self.touched_by()))


class Oracle:
    """Told of everything; raises `Wrong`. `counts` are what happened, by name."""

    def __init__(self, kernel: Kernel, disk: Disk, settings: NodeSettings, check_every: int = 1) -> None:
        self.kernel = kernel
        self.disk = disk
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.check_every = check_every
        """Events between two calls of `Node.check_invariants`."""
        self.kill: Callable[[Process], None] = lambda process: process.die()
        self.sealed: dict[Name, dict[Place, Write]] = {}
        self._chunks: dict[Place, tuple[Name, Write]] = {}
        self._owners: dict[Place, tuple[Engine, int]] = {}
        """Who was given a slot to write, and by which incarnation."""
        self._issued: dict[tuple[Engine, int], tuple[int, int]] = {}
        """Incarnation and request of each write ticket."""
        self._fading: set[int] = set()
        """Extents in which a sealed chunk wasn't found any more: they must be on their way out."""
        self._damaged: set[int] = set()
        self._protected: dict[tuple[Engine, int], set[tuple[int, int, int]]] = {}
        self._due: dict[int, tuple[set[int], set[int]]] = {}
        """Connection -> tickets that its Welcome has to keep."""
        self._connecting: dict[int, Process] = {}
        self._joined: dict[int, Process] = {}
        """Connection -> process, of those whose Hello was taken in by this incarnation."""
        self._lost_at: dict[Engine, float] = {}
        """When the daemon saw the scheduler's connection end."""
        self._gone_at: dict[Engine, float] = {}
        """When it saw the last connection of the engine end."""
        self._schedulers: dict[Engine, int] = {}
        self._incarnation = 0
        self._started_at = float("-inf")
        self._restored = False
        self._ready = False
        self._event: ev.Event | None = None
        self._handled = 0
        self._handled_at = float("-inf")
        self._at_once = 0
        disk.watcher = self

    def _wrong(self, text: str) -> None:
        raise Wrong(text)

    # --- clients ----------------------------------------------------------------------------------------------------

    def connecting(self, connection: int, process: Process) -> None:
        self._connecting[connection] = process

    def allocated(
        self,
        engine: Engine,
        ticket: int,
        names: tuple[Name, ...],
        slots: ev.SlotRun,
        writes: list[Write],
        asked_at: float,
    ) -> Copy:
        """A scheduler has the reply to Allocate in its socket."""
        return Copy(engine, ticket, slots, self._tables(slots), names, writes, (), self._incarnation, asked_at)

    def leased(
        self,
        engine: Engine,
        ticket: int,
        names: tuple[Name, ...],
        slots: ev.SlotRun,
        lengths: tuple[int, ...],
        asked_at: float,
    ) -> Copy:
        """A scheduler has the reply to Lease in its socket."""
        return Copy(engine, ticket, slots, self._tables(slots), names, (), lengths, self._incarnation, asked_at)

    def _tables(self, slots: ev.SlotRun) -> list[Table | None]:
        return [self.disk.extents.get(extent) for extent in slots.extents]

    def store(self, copy: Copy, at: int, table: Table, cell: int, index: int) -> None:
        """A process stores one cell of a chunk."""
        slot, generation = copy.slots.slots[at], copy.slots.generations[at]
        if self.disk.extents.get(table.extent) is not table:
            self._wrong(f"extent {table.extent} went while {copy.engine.name} may write slot {slot}")
        if (table.generations[slot], table.states[slot]) != (generation, WRITING):
            self._wrong(
                f"slot {slot} of extent {table.extent} isn't {copy.engine.name}'s any more, and it writes there"
            )
        table.memory.cells[cell] = copy.writes[at], index

    def loaded(self, copy: Copy, at: int, share: tuple[int, int], read: Sequence[Any], valid: bool) -> None:
        """A process has read its share of a chunk, and found the generation changed or not (`valid`)."""
        self.counts["reads" if valid else "reads invalid"] += 1
        if not valid:
            return
        length, name = copy.lengths[at], copy.names[at]
        cells = -(-length // self.disk.cell_bytes)
        indices = range(len(copy.cells(at)))[share[0] :: share[1]]
        for index, held in zip(indices, read, strict=True):
            if index >= cells:
                break
            if held is None or held[1] != index:
                self._wrong(f"{copy.engine.name} read {held} as cell {index} of {name}")
            write = held[0]
            if copy.seen.setdefault(at, write) is not write:
                self._wrong(f"{copy.engine.name} read {name} half from one write and half from another")
            if write.name != name or not write.sealed or write.length != length:
                self._wrong(f"{copy.engine.name} read {write} as {name} of {length} bytes")

    def died(self, process: Process) -> None:
        """A client process is dead: it copies no more, and nothing is mapped by it."""
        for memory in self._memories():
            for copy, _ in list(memory.copies):
                copy.end(process)
            memory.mapped = {who: life for who, life in memory.mapped.items() if who[0] != process.pid}

    def _memories(self) -> list[Memory]:
        return [*[table.memory for table in self.disk.extents.values()], *self.disk.unlinked]

    # --- the daemon -------------------------------------------------------------------------------------------------

    def started(self, incarnation: int, settings: NodeSettings) -> None:
        """A daemon starts: it knows the tables and nothing else."""
        self._incarnation = incarnation
        self.settings = settings
        self._started_at = self.kernel.now
        self._restored = bool(self.disk.extents)
        self._ready = False
        self._fading.clear()
        self._protected.clear()
        self._joined.clear()
        self._schedulers.clear()
        for memory in self._memories():
            memory.raised.clear()
        self.counts["starts"] += 1

    def handling(self, event: ev.Event) -> None:
        """The daemon is about to take an event in."""
        self._event = event
        match event:
            case ev.Hello():
                process = self._joined[event.connection] = self._connecting[event.connection]
                if event.role is Role.SCHEDULER:
                    self._schedulers[process.engine] = event.connection
                    self._due[event.connection] = self._claims_due(process.engine, event)
            case ev.ConnectionLost():
                self._connection_lost(event.connection)
            case ev.EndRequests():
                engine = self._joined[event.connection].engine if event.connection in self._joined else None
                for request in event.requests if engine is not None else ():
                    self._protected.pop((engine, request), None)  # type: ignore[arg-type]
            case ev.ExtentDamaged():
                self._damaged.add(event.extent)

    def _connection_lost(self, connection: int) -> None:
        process = self._joined.pop(connection, None)
        if process is None:
            return
        engine = process.engine
        if self._schedulers.get(engine) == connection:
            del self._schedulers[engine]
            self._lost_at[engine] = self.kernel.now
            for key in [key for key in self._protected if key[0] is engine]:
                del self._protected[key]
        if not any(other.engine is engine for other in self._joined.values()):
            self._gone_at[engine] = self.kernel.now

    def replying(self, event: ev.Event, effect: ev.Effect) -> None:
        """The daemon answers; `event` is what made it answer, and for all but Welcome the question."""
        connection = getattr(effect, "connection", 0)
        process = self._joined.get(connection)
        if process is None:
            return
        if isinstance(effect, ev.Welcome):
            self._kept(process, effect)
        if isinstance(effect, ev.Claimed):
            self._are_kept(process.engine, effect)
        engine = process.engine
        match event, effect:
            case ev.Lookup(), ev.Looked():
                self._looked(engine, event, effect.states, None)
            case ev.Lease(), ev.Leased():
                self._looked(engine, event, effect.states, effect)
            case ev.Allocate(), ev.Allocated():
                self._allocated(engine, event, effect)
            case _, ev.Refused():
                self.counts[f"refused: {effect.kind}"] += 1

    def _claims_due(self, engine: Engine, event: ev.Hello) -> tuple[set[int], set[int]]:
        """Tickets (writes, leases) that a Hello names and the daemon has no right to lose."""

        def holds(run: ev.SlotRun, state: int) -> bool:
            rows = zip(run.extents, run.slots, run.generations, strict=True)
            tables = self.disk.extents
            return all(
                extent in tables
                and (tables[extent].generations[slot], tables[extent].states[slot]) == (generation, state)
                for extent, slot, generation in rows
            )

        writes = {claim.ticket for claim in event.writes if holds(claim.slots, WRITING)}
        leases = set()
        for claim in event.leases:
            ticket = engine.leases.get(claim.ticket)
            known = ticket is not None and ticket.copy.kept == self._incarnation and engine.scheduler.pidfd
            gone = self._fading.union(self._damaged).intersection(claim.slots.extents)
            if holds(claim.slots, SEALED) and (known or (self._in_grace() and not gone)):
                leases.add(claim.ticket)
        return writes, leases

    def _kept(self, process: Process, welcome: ev.Welcome) -> None:
        engine = process.engine
        if process.role is not Role.SCHEDULER:
            return
        writes, leases = self._due.pop(welcome.connection)
        if not (writes <= set(welcome.writes_kept) and leases <= set(welcome.leases_kept)):
            self._wrong(f"{engine.name} named writes {writes} and leases {leases}, and was answered {welcome}")
        self.counts["claims kept"] += len(writes) + len(leases)
        self._are_kept(engine, welcome)

    def _are_kept(self, engine: Engine, answer: ev.Welcome | ev.Claimed) -> None:
        for tickets, kept in (engine.writes, answer.writes_kept), (engine.leases, answer.leases_kept):
            for ticket in tickets.values():
                if ticket.number in kept:
                    ticket.copy.kept = self._incarnation

    def handled(self, event: ev.Event, node: Node) -> None:
        """Everything that follows from an event has been done."""
        self._event = None
        self._handled += 1
        self.counts["events"] += 1
        self._at_once = self._at_once + 1 if self.kernel.now == self._handled_at else 0
        self._handled_at = self.kernel.now
        if self._at_once > AT_ONCE_MAX:
            self._wrong("the daemon goes round in circles")
        if isinstance(event, ev.ProcessDied | ev.ConnectionLost):
            self._nothing_left_of_the_dead()
        if isinstance(event, ev.Started):
            self._ready = True
        if self._ready and self._handled % self.check_every == 0:
            # before that the policies don't know yet what the tables hold
            node.check_invariants()

    def making(self) -> None:
        """The daemon asks for another extent: is there room?"""
        mapped = [
            memory
            for memory in self.disk.unlinked
            if any(incarnation == self._incarnation for incarnation in memory.mapped.values())
        ]
        taken = len(self.disk.spares) + len(self.disk.extents) + len(mapped)
        if taken >= self.settings.extents_max:
            self._wrong(f"another extent is made while {taken} are there, {len(mapped)} of them only mapped")

    def check_end(self) -> None:
        """Nobody holds anything: what isn't found is not there."""
        for name, places in self.sealed.items():
            for extent, slot in places:
                if extent in self._fading:
                    self._wrong(f"{name} lies in slot {slot} of extent {extent} and isn't found")

    # --- replies ----------------------------------------------------------------------------------------------------

    def _find(self, name: Name) -> Place | None:
        """Where a chunk that ought to be found lies; None if there is none, or only in extents on their way out."""
        for place in self.sealed.get(name, ()):
            if place[0] not in self._fading:
                return place
        return None

    def _must_be_absent(self, name: Name) -> None:
        """The daemon says that it hasn't got it: then its extent is draining, and shows nothing any more."""
        for extent, _ in self.sealed.get(name, ()):
            if extent not in self._fading:
                self._fading.add(extent)
                self.counts["extents fading"] += 1

    def _must_be_present(self, name: Name) -> Place:
        place = self._find(name)
        if place is None:
            self._wrong(f"{name} is said to be there, and no table has it")
            raise AssertionError
        return place

    def _looked(self, engine: Engine, event: ev.Lookup | ev.Lease, states: bytes, leased: ev.Leased | None) -> None:
        rows = iter(range(len(leased.slots))) if leased is not None else iter(())
        noted = self._protected.setdefault((engine, event.request), set()) if event.request else set()
        for key, state in zip(event.keys, states, strict=leased is None):
            name = engine.tenant, engine.namespace, event.group, key
            self.counts[f"answers {KeyState(state).name}"] += 1
            if state == KeyState.NO_ROOM:
                continue
            if state != KeyState.RAM:
                self._must_be_absent(name)
                continue
            extent, slot = self._must_be_present(name)
            table = self.disk.extents[extent]
            if event.touch:
                noted.add((extent, slot, table.generations[slot]))
            if leased is not None:
                at = next(rows)
                given = leased.slots.extents[at], leased.slots.slots[at], leased.slots.generations[at]
                fields = table.valid(slot)
                if (
                    given != (extent, slot, table.generations[slot])
                    or fields is None
                    or fields[3] != leased.lengths[at]
                ):
                    self._wrong(
                        f"the lease of {name} names {given} of {leased.lengths[at]} bytes, it is at {extent, slot}"
                    )

    def _allocated(self, engine: Engine, event: ev.Allocate, effect: ev.Allocated) -> None:
        rows = iter(zip(effect.slots.extents, effect.slots.slots, effect.slots.generations, strict=True))
        self._issued[engine, event.ticket] = self._incarnation, event.request
        noted = self._protected.setdefault((engine, event.request), set()) if event.request else set()
        for key, state in zip(event.keys, effect.states, strict=True):
            name = engine.tenant, engine.namespace, event.group, key
            self.counts[f"allocations {AllocateState(state).name}"] += 1
            if state == AllocateState.PRESENT:
                extent, slot = self._must_be_present(name)
                noted.add((extent, slot, self.disk.extents[extent].generations[slot]))
                continue
            self._must_be_absent(name)
            if state != AllocateState.NEW:
                continue
            extent, slot, generation = next(rows)
            table = self.disk.extents[extent]
            if table.tenant != engine.tenant or table.slot_bytes not in engine.slot_sizes:
                self._wrong(f"{engine.name} is given a slot of {table.tenant}, {table.slot_bytes} bytes")
            if (table.generations[slot], table.states[slot]) != (generation, WRITING):
                self._wrong(f"{engine.name} is given slot {slot} of extent {extent}, whose word says otherwise")
            if (extent, slot) in self._owners:
                self._wrong(f"slot {slot} of extent {extent} is given to {engine.name} and is somebody's")
            self._owners[extent, slot] = engine, self._incarnation

    # --- words (tests.sim.disk.Watcher) -----------------------------------------------------------------------------

    def freeing(self, table: Table, slot: int, generation: int) -> None:
        if table.states[slot] == FREE or generation != table.generations[slot] + 1:
            self._wrong(f"slot {slot} of extent {table.extent} is freed in state {table.states[slot]} at {generation}")
        if table.states[slot] == SEALED:
            self._unseal(table, slot)
        self._owners.pop((table.extent, slot), None)
        spared = table.extent in self._damaged or (self._in_grace() and table.states[slot] == SEALED)
        what = f"slot {slot} of extent {table.extent} is freed"
        self._vacate(table.memory, table.cells(slot), what, lost_anyway=spared)

    def writing(self, table: Table, slot: int, generation: int) -> None:
        place = table.extent, slot
        state = table.states[slot]
        raised = generation - table.generations[slot]
        if (state, raised) not in ((FREE, 0), (SEALED, 1)):
            self._wrong(f"slot {slot} of extent {table.extent} is handed out in state {state}, generation + {raised}")
        if state == SEALED:
            self._evicting(table, slot)
            self._unseal(table, slot)
        self._vacate(table.memory, table.cells(slot), f"slot {slot} of extent {table.extent} is handed out")
        for cell in table.cells(slot):
            if self.kernel.now < table.memory.raised.get(cell, float("-inf")) + REUSE_S - 1e-9:
                self._wrong(f"{place} is handed out too soon after a reader lost it")

    def _evicting(self, table: Table, slot: int) -> None:
        name, write = self._chunks[table.extent, slot]
        event = self._event
        self.counts["evictions"] += 1
        if not isinstance(event, ev.Allocate):
            return
        if write.priority > event.priority:
            self._wrong(f"{name} of priority {write.priority.name} is evicted for priority {event.priority.name}")
        engine = self._joined[event.connection].engine
        if (table.extent, slot, table.generations[slot]) in self._protected.get((engine, event.request), ()):
            self._wrong(f"{name} is evicted for a later chunk of its own request {event.request}")

    def _unseal(self, table: Table, slot: int) -> None:
        name, _ = self._chunks.pop((table.extent, slot))
        del self.sealed[name][table.extent, slot]
        if not self._in_grace() or table.extent in self._damaged:
            return
        if not self.sealed[name]:
            self._wrong(f"{name} is dropped in the grace time after a restart")
        # one of two copies goes: who reads it finds the generation raised, but nobody writes there in the grace time
        self.counts["twins dropped"] += 1
        for cell in table.cells(slot):
            table.memory.raised[cell] = self._started_at + self.settings.restart_grace_s - REUSE_S

    def _in_grace(self) -> bool:
        return self._restored and self.kernel.now < self._started_at + self.settings.restart_grace_s

    def sealing(self, table: Table, slot: int, generation: int, fields: Fields) -> None:
        place = table.extent, slot
        if (table.generations[slot], table.states[slot]) != (generation, WRITING):
            self._wrong(f"{place} is sealed in state {table.states[slot]} at another generation")
        name: Name = table.tenant, *fields[:3]
        write: Write | None = None
        for index, cell in enumerate(table.cells(slot)[: -(-fields[3] // self.disk.cell_bytes)]):
            held = table.memory.cells[cell]
            if held is None or held[1] != index or (write is not None and held[0] is not write):
                self._wrong(f"{name} is sealed with {held} in cell {index}")
            write = held[0]
        if write is None or not write.complete or write.name != name or write.length != fields[3]:
            self._wrong(f"{name} of {fields[3]} bytes is sealed over {write}")
            return
        write.sealed = True
        self._owners.pop(place, None)
        self.sealed.setdefault(name, {})[place] = write
        self._chunks[place] = name, write
        self.counts["seals"] += 1
        if isinstance(self._event, ev.Seal):
            engine = self._joined[self._event.connection].engine
            incarnation, request = self._issued[engine, self._event.ticket]
            if request and incarnation == self._incarnation:
                self._protected.setdefault((engine, request), set()).add((*place, generation))

    def formatting(self, source: Memory, old: Table | None, job: ev.FormatExtent) -> None:
        if source.tenant not in (None, job.tenant):
            self._wrong(f"memory of {source.tenant} goes to {job.tenant}")
        if old is not None:
            self._leaving(old)
            self.counts["extents moved"] += 1
        self._vacate(source, range(len(source.cells)), f"extent {job.source} becomes {job.extent}")

    def dropping(self, table: Table) -> None:
        self._leaving(table)
        self._vacate(table.memory, range(len(table.memory.cells)), f"extent {table.extent} is dropped")
        self.counts["extents dropped"] += 1

    def _leaving(self, table: Table) -> None:
        if any(table.states):
            self._wrong(f"extent {table.extent} leaves with words {table.states}")

    # --- who may touch it still -------------------------------------------------------------------------------------

    def _vacate(self, memory: Memory, cells: range, what: str, *, lost_anyway: bool = False) -> None:
        """Memory changes hands: nobody may write it, and nobody may read it under a lease."""
        for copy, range_ in list(memory.copies):
            if range_.stop <= cells.start or cells.stop <= range_.start:
                continue
            if copy.writes:
                for process in copy.touched_by():
                    if not self._excuses_write(process, copy):
                        self._wrong(f"{what} while process {process.pid} of {copy.engine.name} may write it")
                    self.counts["writers excused"] += 1
                    self.kill(process)
                continue
            if copy.leased():
                if not self._excuses_lease(copy, lost_anyway=lost_anyway):
                    self._wrong(f"{what} while {copy.engine.name} holds a lease on it")
                self.counts["leases lost"] += 1
                copy.lost = True
            if copy.touched_by() and copy.kept == self._incarnation:
                for cell in range_:
                    memory.raised[cell] = self.kernel.now
            # from now on its generation check tells it
            memory.copies.remove((copy, range_))

    def _excuses_write(self, process: Process, copy: Copy) -> bool:
        """May time alone have freed it?"""
        engine, now, quarantine_s = copy.engine, self.kernel.now, self.settings.quarantine_s
        if copy.born != self._incarnation:
            known = copy.kept == self._incarnation and process in self._joined.values()
            if not known and now >= self._started_at + quarantine_s:
                return True
        return not process.pidfd and engine in self._lost_at and now >= self._lost_at[engine] + quarantine_s

    def _excuses_lease(self, copy: Copy, *, lost_anyway: bool) -> bool:
        """May it have ended without a release? `lost_anyway`: a restarted daemon may drop what it can't serve, while
        nobody has named a lease on it."""
        engine, now = copy.engine, self.kernel.now
        if copy.kept != self._incarnation and (lost_anyway or now >= self._started_at + self.settings.restart_grace_s):
            return True
        if any(process.alive and process.pidfd for process in engine.processes) or engine not in self._gone_at:
            return False
        connected = any(process.engine is engine for process in self._joined.values())
        return not connected and now >= self._gone_at[engine] + self.settings.quarantine_s

    def _nothing_left_of_the_dead(self) -> None:
        """An engine that the daemon knows to be dead, every process and connection, writes nothing."""
        if self._in_grace():
            # processes that haven't come back yet may be about
            return
        for place, (engine, incarnation) in self._owners.items():
            if incarnation != self._incarnation or engine.alive or not all(p.pidfd for p in engine.processes):
                continue
            if any(engine.city.daemon.knows(process.pid) for process in engine.processes):
                continue
            if not any(process.engine is engine for process in self._joined.values()):
                self._wrong(f"{place} is still {engine.name}'s, and every process of it is known to be dead")
