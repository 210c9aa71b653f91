"""A fake arena: memory, tables, and jobs that take their time, fail, or are cut short by a kill.

Covers: what `arena.host` and the two job threads of the daemon do to files, step by step, so that a crash can stop
between any two steps; what a start finds. Not here: what the bytes mean (`tests.sim.oracle`), the real formats
(`tests/arena`).

Memory is counted in *cells*; a slot is a run of cells, a cell holds whatever was stored last. A `Memory` is the data
file without its name: processes that have it mapped keep it when the file is renamed or unlinked, and so it is here. A
`Table` belongs to one extent number and is never used again: who has the old one mapped sees its last words for ever.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from cachesvc.core import events as ev
from tests.sim.kernel import Kernel

FREE, WRITING, SEALED = 0, 1, 2

Fields: TypeAlias = tuple[bytes, int, bytes, int]
"""(namespace, group, key, length in bytes) of a table entry."""

Job: TypeAlias = ev.MakeSpare | ev.FormatExtent | ev.DropExtent


@dataclass(slots=True, eq=False)
class Memory:
    """What a data file holds. `linked`: it has a name still. `mapped`: (pid, extent) of each mapping -> incarnation of
    the daemon that handed it out. `copies` and `raised` are the oracle's: who copies, when a reader lost which cell."""

    cells: list[Any]
    tenant: str | None = None
    linked: bool = True
    mapped: dict[tuple[int, int], int] = field(default_factory=dict)
    copies: list[tuple[Any, range]] = field(default_factory=list)
    raised: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Table:
    """The table of one extent. `sums[i]` is the checksum of an entry: what it was computed over."""

    extent: int
    tenant: str
    slot_bytes: int
    slot_cells: int
    memory: Memory
    generations: list[int]
    states: list[int]
    fields: list[Fields | None]
    sums: list[tuple[Fields, int] | None]
    last_use: list[float]

    def cells(self, slot: int) -> range:
        return range(slot * self.slot_cells, (slot + 1) * self.slot_cells)

    def valid(self, slot: int) -> Fields | None:
        """The fields of a sealed entry whose checksum fits."""
        fields = self.fields[slot]
        if self.states[slot] != SEALED or fields is None or self.sums[slot] != (fields, self.generations[slot]):
            return None
        return fields

    def columns(self) -> ev.TableColumns:
        """As `arena.layout.decode_table` gives them."""
        valid = [self.valid(slot) for slot in range(len(self.states))]
        states = [
            WRITING if state == SEALED and fields is None else state
            for state, fields in zip(self.states, valid, strict=True)
        ]
        return ev.TableColumns(
            generations=np.array(self.generations, np.uint64),
            states=np.array(states, np.uint8),
            namespaces=[fields[0] if fields else b"" for fields in valid],
            groups=[fields[1] if fields else 0 for fields in valid],
            keys=[fields[2] if fields else b"" for fields in valid],
            lengths=np.array([fields[3] if fields else 0 for fields in valid], np.uint32),
            last_use=np.array(self.last_use, np.float64),
        )


class Watcher(Protocol):
    """Is told of every word of a table just before it is set (`tests.sim.oracle.Oracle`)."""

    def freeing(self, table: Table, slot: int, generation: int) -> None: ...
    def writing(self, table: Table, slot: int, generation: int) -> None: ...
    def sealing(self, table: Table, slot: int, generation: int, fields: Fields) -> None: ...
    def formatting(self, source: Memory, old: Table | None, job: ev.FormatExtent) -> None: ...
    def dropping(self, table: Table) -> None: ...


@dataclass(frozen=True, slots=True)
class Troubles:
    """How slow and how broken the disk is: seconds, and chances between 0 and 1."""

    job_s_max: float = 0.0
    make_fails: float = 0.0
    format_fails: float = 0.0


class Disk:
    """Files of one arena. Survives the daemon; a crash cuts its jobs short."""

    def __init__(
        self, kernel: Kernel, rng: random.Random, extent_bytes: int, cell_bytes: int, troubles: Troubles
    ) -> None:
        self.troubles = troubles
        self.extent_bytes = extent_bytes
        self.cell_bytes = cell_bytes
        self.spares: dict[int, Memory] = {}
        self.extents: dict[int, Table] = {}
        self.unlinked: list[Memory] = []
        """Without a name, maybe mapped still."""
        self.namespaces: tuple[ev.NamespaceRecord, ...] = ()
        self.next_extent = 1
        self.watcher: Watcher | None = None
        self._kernel = kernel
        self._rng = rng
        self._queues: dict[bool, deque[tuple[Job, Callable[[ev.Event], None]]]] = {True: deque(), False: deque()}
        self._numbers: set[int] = set()
        self._life = 0

    # --- words ------------------------------------------------------------------------------------------------------

    def mark(self, effect: ev.Effect, step: Callable[[], None]) -> None:
        """Carry out what the loop does to files, `step()` before each store that a kill can come before."""
        watch = self.watcher
        match effect:
            case ev.MarkFree() | ev.MarkWriting():
                table = self.extents[effect.extent]
                free = isinstance(effect, ev.MarkFree)
                for slot, generation in zip(effect.slots, effect.generations, strict=True):
                    step()
                    if watch is not None:
                        (watch.freeing if free else watch.writing)(table, slot, generation)
                    table.generations[slot], table.states[slot] = generation, FREE if free else WRITING
            case ev.MarkSealed():
                self._mark_sealed(effect, step)
            case ev.SaveLastUse():
                step()
                self.extents[effect.extent].last_use = effect.last_use.tolist()
            case ev.SaveNamespaces():
                step()
                self.namespaces = effect.records

    def _mark_sealed(self, effect: ev.MarkSealed, step: Callable[[], None]) -> None:
        table = self.extents[effect.extent]
        rows = zip(effect.slots, effect.generations, effect.keys, effect.lengths, strict=True)
        for slot, generation, key, length in rows:
            fields = effect.namespace, effect.group, key, length
            step()
            table.fields[slot] = fields
            step()
            table.sums[slot] = fields, generation
            step()
            if self.watcher is not None:
                self.watcher.sealing(table, slot, generation, fields)
            table.generations[slot], table.states[slot] = generation, SEALED

    # --- jobs -------------------------------------------------------------------------------------------------------

    def start(self, job: Job, done: Callable[[ev.Event], None]) -> None:
        """Queue a job in its thread; `done(event)` if it reports something."""
        queue = self._queues[isinstance(job, ev.MakeSpare)]
        queue.append((job, done))
        if len(queue) == 1:
            self._schedule(queue)

    def _schedule(self, queue: deque[tuple[Job, Callable[[ev.Event], None]]]) -> None:
        life = self._life

        def finish() -> None:
            if life != self._life:
                return
            job, done = queue.popleft()
            event = self._carry_out(job)
            if queue:
                self._schedule(queue)
            done(event)

        self._kernel.after(self._rng.uniform(0, self.troubles.job_s_max), finish)

    def _carry_out(self, job: Job) -> ev.Event:
        chance = self._rng.random()
        match job:
            case ev.MakeSpare():
                self._number(job.extent)
                if chance < self.troubles.make_fails:
                    return ev.SpareFailed(job.extent, "no space left on device")
                self.spares[job.extent] = Memory([None] * (self.extent_bytes // self.cell_bytes))
                return ev.SpareMade(job.extent)
            case ev.FormatExtent():
                self._number(job.extent)
                return self._format(job, fails=chance < self.troubles.format_fails)
            case ev.DropExtent():
                self._unlink(job.extent)
                return ev.ExtentDropped(job.extent)

    def _number(self, extent: int) -> None:
        assert extent not in self._numbers, f"extent number {extent} is used twice"
        self._numbers.add(extent)
        self.next_extent = max(self.next_extent, extent + 1)

    def _format(self, job: ev.FormatExtent, *, fails: bool) -> ev.Event:
        memory = self._memory_of(job.source)
        if self.watcher is not None:
            self.watcher.formatting(memory, self.extents.get(job.source), job)
        if fails:
            self._unlink(job.source)
            return ev.SpareFailed(job.extent, "input/output error")
        self.spares.pop(job.source, None)
        self.extents.pop(job.source, None)
        memory.tenant = job.tenant
        slots = self.extent_bytes // job.slot_bytes
        self.extents[job.extent] = Table(
            extent=job.extent,
            tenant=job.tenant,
            slot_bytes=job.slot_bytes,
            slot_cells=job.slot_bytes // self.cell_bytes,
            memory=memory,
            generations=[0] * slots,
            states=[FREE] * slots,
            fields=[None] * slots,
            sums=[None] * slots,
            last_use=[0.0] * slots,
        )
        return ev.ExtentFormatted(job.extent)

    def _memory_of(self, extent: int) -> Memory:
        return self.spares[extent] if extent in self.spares else self.extents[extent].memory

    def _unlink(self, extent: int) -> None:
        table = self.extents.pop(extent, None)
        memory = self.spares.pop(extent, None)
        if table is not None:
            if self.watcher is not None:
                self.watcher.dropping(table)
            memory = table.memory
        if memory is not None:
            memory.linked = False
            self.unlinked.append(memory)

    # --- a kill -----------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """The daemon is killed: the job that each thread is at happened not at all, halfway, or without being told."""
        self._life += 1
        for queue in self._queues.values():
            if queue:
                job = queue[0][0]
                outcome = self._rng.choice(("not yet", "halfway", "untold"))
                if outcome == "untold":
                    self._carry_out(job)
                elif outcome == "halfway":
                    self._halfway(job)
            queue.clear()

    def _halfway(self, job: Job) -> None:
        """A start finds files that don't belong together, and unlinks them."""
        if isinstance(job, ev.MakeSpare):
            self._number(job.extent)
        elif isinstance(job, ev.FormatExtent):
            self._number(job.extent)
            if self.watcher is not None:
                self.watcher.formatting(self._memory_of(job.source), self.extents.get(job.source), job)
            self._unlink(job.source)
        elif isinstance(job, ev.DropExtent):
            self._unlink(job.extent)
