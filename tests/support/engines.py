"""Engines and memory as they really are, beside what a node knows of them: the model of `tests.core.test_machine`.

Covers: which process may write where, what lies in each page, what is mapped, which slots are tainted; checks of marks
and jobs against it. Not here: what happens in which order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cachesvc.core import events as ev
from cachesvc.core.slots import REUSE_DELAY_S
from cachesvc.types import Role
from tests.support.nodes import CHUNK, Table, Tables


@dataclass(frozen=True)
class Place:
    """A slot as a client has mapped it: a table, a data file and a page in it, none of which a new name changes."""

    table: Table
    slot: int
    generation: int
    data: int
    page: int

    def valid(self) -> bool:
        """What a reader checks after it has copied."""
        return self.table.words[self.slot] == (self.generation, 2)

    def __hash__(self) -> int:
        return hash((id(self.table), self.slot, self.generation))


@dataclass
class Held:
    """A ticket as its engine knows it."""

    group: int
    keys: list[bytes]
    run: ev.SlotRun
    places: list[Place]
    sure: bool = True
    """The node knows that it is held."""


@dataclass
class Process:
    number: int
    role: Role
    connection: int | None = None
    jobs: set[int] = field(default_factory=set)
    """Write tickets whose slots it may still write."""
    known: bool = True
    """The node that runs now has seen it."""


@dataclass
class Engine:
    """All processes of a session, as they see it. The first process is the scheduler."""

    session: bytes
    tenant: str
    namespace: bytes
    chunk_bytes: tuple[int, ...]
    processes: list[Process] = field(default_factory=list)
    writes: dict[int, Held] = field(default_factory=dict)
    """Those of a scheduler that has lost hope for them stay here while any process may write."""
    ours: set[int] = field(default_factory=set)
    """Writes that the scheduler hopes to seal."""
    leases: dict[int, Held] = field(default_factory=dict)

    def scheduler(self) -> Process | None:
        return next((p for p in self.processes if p.role is Role.SCHEDULER), None)


class World(Tables):
    """Tables, and the bytes beside them; checks what the node does to both."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.data: dict[int, int] = {}
        """Extent -> its data file."""
        self.pages: dict[tuple[int, int], tuple[str, bytes, int, bytes]] = {}
        self.tainted: set[tuple[int, int]] = set()
        self.freed: dict[tuple[int, int], float] = {}
        self.mapped: dict[int, set[tuple[int, int]]] = {}
        """Data file -> (process, extent number that it knows it by)."""

    def places(self, run: ev.SlotRun) -> list[Place]:
        found = []
        for extent, slot, generation in zip(run.extents, run.slots, run.generations, strict=True):
            table = self.tables[extent]
            found.append(Place(table, slot, generation, self.data[extent], slot * table.slot_bytes // CHUNK))
        return found

    def mark(self, effect: ev.Effect) -> None:
        if isinstance(effect, ev.MarkFree | ev.MarkWriting):
            table = id(self.tables[effect.extent])
            for slot in effect.slots:
                if (table, slot) not in self.tainted:
                    continue
                if isinstance(effect, ev.MarkFree):
                    self.freed[table, slot] = self.now
                else:
                    assert self.now >= self.freed.pop((table, slot)) + REUSE_DELAY_S, "a tainted slot didn't rest"
                    self.tainted.remove((table, slot))
        super().mark(effect)

    def finish(self, job: ev.Effect) -> ev.Event:
        gone = None
        if isinstance(job, ev.MakeSpare):
            self.data[job.extent] = job.extent
        elif isinstance(job, ev.FormatExtent):
            if job.source in self.tables:
                gone = id(self.tables[job.source])
            self.data[job.extent] = self.data.pop(job.source)
        elif isinstance(job, ev.DropExtent):
            gone = id(self.tables[job.extent]) if job.extent in self.tables else None
            del self.data[job.extent]
        if gone is not None:
            for table, slot in sorted(self.tainted):
                if table == gone:
                    rested = self.now >= self.freed.pop((table, slot)) + REUSE_DELAY_S
                    assert rested or isinstance(job, ev.DropExtent), "a tainted extent didn't rest"
                    self.tainted.remove((table, slot))
        return super().finish(job)
