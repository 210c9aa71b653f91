"""A node and short ways to talk to it: what the tests of `core` share.

Covers: a clock that moves by hand, tables and spares as plain values that survive a restart, jobs that are answered
at once or when the test says so. Every event is followed by `check_invariants`, every mark is checked. Not here:
faults and seeds (`tests.sim`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from cachesvc.core import events as ev
from cachesvc.core.node import Node, NodeSettings
from cachesvc.core.quota import TenantQuota
from cachesvc.core.slots import Extent, SlabClass
from cachesvc.types import AllocateState, KeyState, Priority, Role

CHUNK = 4096
PER = 8
"""Slots of `CHUNK` bytes in an extent."""

EXTENT = PER * CHUNK
SESSION = b"session-number-1"
OTHER = b"session-number-2"
SPACE = b"namespace-number"
CALL = 7

RAM, PENDING = KeyState.RAM, KeyState.PENDING
NEW, PRESENT, BUSY = AllocateState.NEW, AllocateState.PRESENT, AllocateState.BUSY
RETRY, NO_ROOM = AllocateState.RETRY, AllocateState.NO_ROOM

Some = TypeVar("Some")


def keys(count: int, first: int = 0) -> list[bytes]:
    """Keys `first` ... `first + count - 1`."""
    return [b"key-%06d" % i for i in range(first, first + count)]


def of(kind: type[Some], effects: Iterable[object]) -> list[Some]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def only(kind: type[Some], effects: Iterable[object]) -> Some:
    """The one effect of a kind."""
    (effect,) = of(kind, effects)
    return effect


@dataclass
class Table:
    """One extent's table: a word (generation, state) and the fields of each slot."""

    tenant: str
    slot_bytes: int
    words: list[tuple[int, int]]
    fields: dict[int, tuple[bytes, int, bytes, int]] = field(default_factory=dict)
    last_use: list[float] = field(default_factory=list)

    def columns(self) -> ev.TableColumns:
        """As `arena.layout` decodes it."""
        rows = [self.fields.get(slot, (b"", 0, b"", 0)) for slot in range(len(self.words))]
        return ev.TableColumns(
            np.array([generation for generation, _ in self.words], np.uint64),
            np.array([state for _, state in self.words], np.uint8),
            [row[0] for row in rows],
            [row[1] for row in rows],
            [row[2] for row in rows],
            np.array([row[3] for row in rows], np.uint32),
            np.array(self.last_use, np.float64),
        )


class Tables:
    """What outlives a daemon. Carries marks and finished jobs out and checks that they make sense."""

    def __init__(self) -> None:
        self.spares: list[int] = []
        self.tables: dict[int, Table] = {}
        self.records: tuple[ev.NamespaceRecord, ...] = ()

    def mark(self, effect: ev.Effect) -> None:
        """Carry out a mark; AssertionError if no right core asks for it."""
        match effect:
            case ev.MarkWriting():
                for slot, generation in zip(effect.slots, effect.generations, strict=True):
                    before, state = self.tables[effect.extent].words[slot]
                    assert (state, before) == (0, generation) or (state, before + 1) == (2, generation)
                    self.tables[effect.extent].words[slot] = generation, 1
            case ev.MarkSealed():
                table = self.tables[effect.extent]
                rows = zip(effect.slots, effect.generations, effect.keys, effect.lengths, strict=True)
                for slot, generation, key, length in rows:
                    assert table.words[slot] == (generation, 1), "only what was being written is sealed"
                    assert 0 <= length <= table.slot_bytes
                    table.fields[slot] = effect.namespace, effect.group, key, length
                    table.words[slot] = generation, 2
            case ev.MarkFree():
                for slot, generation in zip(effect.slots, effect.generations, strict=True):
                    before, state = self.tables[effect.extent].words[slot]
                    assert state != 0, "freed twice"
                    assert generation == before + 1, "free means a new generation"
                    self.tables[effect.extent].words[slot] = generation, 0
            case ev.SaveLastUse():
                assert len(effect.last_use) == len(self.tables[effect.extent].words)
                self.tables[effect.extent].last_use = effect.last_use.tolist()
            case ev.SaveNamespaces():
                self.records = effect.records

    def finish(self, job: ev.Effect) -> ev.Event:
        """Carry out a job; the event that answers it."""
        if isinstance(job, ev.MakeSpare):
            self.spares.append(job.extent)
            return ev.SpareMade(job.extent)
        if isinstance(job, ev.FormatExtent):
            if job.source in self.spares:
                self.spares.remove(job.source)
            else:
                assert self.tables.pop(job.source).tenant == job.tenant, "bytes of another tenant"
            slots = EXTENT // job.slot_bytes
            self.tables[job.extent] = Table(job.tenant, job.slot_bytes, [(0, 0)] * slots, {}, [0.0] * slots)
            return ev.ExtentFormatted(job.extent)
        assert isinstance(job, ev.DropExtent)
        if job.extent in self.spares:
            self.spares.remove(job.extent)
        else:
            del self.tables[job.extent]
        return ev.ExtentDropped(job.extent)


class Driven:
    """A node that is fed by hand. `log` has every effect so far; with `auto` jobs are answered at once, else they wait
    in `jobs`."""

    def __init__(
        self,
        extents_max: int = 4,
        *tenants: TenantQuota,
        auto: bool = True,
        tables: Tables | None = None,
        now: float = 100.0,
        eviction: str = "arc",
        started: bool = True,
    ) -> None:
        self.tables = tables or Tables()
        used = [*self.tables.tables, *self.tables.spares, 0]
        settings = NodeSettings(EXTENT, extents_max, tenants or (TenantQuota("t"),), eviction)
        self.node = Node(settings, max(used) + 1)
        self.now = now
        self.auto = auto
        self.jobs: list[ev.Effect] = []
        self.log: list[ev.Effect] = []
        self._ticket = 1 << 20
        if self.tables.records:
            self.do(ev.NamespacesRestored(self.tables.records))
        for number in self.tables.spares:
            self.do(ev.SpareRestored(number))
        for number, table in list(self.tables.tables.items()):
            self.do(ev.ExtentRestored(number, table.tenant, table.slot_bytes, table.columns()))
        if started:
            self.do(ev.Started())

    def restarted(self, after: float = 1.0, **changes: int) -> Driven:
        """Another node on the same tables: this one was killed."""
        extents_max = changes.get("extents_max", self.node.settings.extents_max)
        settings = self.node.settings
        return Driven(
            extents_max,
            *settings.tenants,
            auto=self.auto,
            tables=self.tables,
            now=self.now + after,
            eviction=settings.eviction,
        )

    def do(self, event: ev.Event) -> list[ev.Effect]:
        """Let an event happen; its own effects."""
        out = self.node.handle(event, self.now)
        self.log += out
        for effect in out:
            if isinstance(effect, ev.MakeSpare | ev.FormatExtent | ev.DropExtent):
                self.jobs.append(effect)
            else:
                self.tables.mark(effect)
        if self.node.extents.growing:
            self.node.check_invariants()
        while self.auto and self.jobs:
            self.finish()
        return out

    def finish(self, index: int = 0) -> list[ev.Effect]:
        """Carry out and answer a waiting job."""
        return self.do(self.tables.finish(self.jobs.pop(index)))

    def finish_all(self) -> None:
        """Carry out and answer jobs until none waits."""
        while self.jobs:
            self.finish()

    def after(self, seconds: float) -> list[ev.Effect]:
        """Time passes, then a tick comes."""
        self.now += seconds
        return self.do(ev.Tick())

    # --- clients ----------------------------------------------------------------------------------------------------

    def hello(
        self,
        connection: int,
        process: int | None = -1,
        session: bytes = SESSION,
        *,
        role: Role = Role.SCHEDULER,
        tenant: str = "t",
        namespace: bytes = SPACE,
        chunk_bytes: tuple[int, ...] = (CHUNK,),
        writes: Sequence[ev.WriteClaim] = (),
        leases: Sequence[ev.LeaseClaim] = (),
        member: bytes = b"",
        open_writes: tuple[int, ...] = (),
        open_leases: tuple[int, ...] = (),
        over: bool = False,
    ) -> list[ev.Effect]:
        """A process joins; it has ten times its connection's number unless named."""
        process = connection * 10 if process == -1 else process
        return self.do(
            ev.Hello(
                connection,
                tenant,
                process,
                CALL,
                session,
                role,
                namespace,
                "label",
                {"model": "m"},
                chunk_bytes,
                tuple(writes),
                tuple(leases),
                member,
                open_writes,
                open_leases,
                over,
            )
        )

    def lookup(
        self, connection: int, some: list[bytes], *, request: int = 0, touch: bool = False, group: int = 0
    ) -> list[int]:
        """The states of keys."""
        out = self.do(ev.Lookup(connection, CALL, group, some, request, touch))
        return list(only(ev.Looked, out).states)

    def lease(
        self,
        connection: int,
        ticket: int,
        some: list[bytes],
        *,
        prefix: bool = True,
        request: int = 0,
        touch: bool = False,
        group: int = 0,
    ) -> ev.Leased:
        """Lease keys."""
        return only(ev.Leased, self.do(ev.Lease(connection, CALL, ticket, group, some, request, touch, prefix)))

    def allocate(
        self,
        connection: int,
        ticket: int,
        some: list[bytes],
        *,
        request: int = 0,
        priority: Priority = Priority.INTERACTIVE,
        group: int = 0,
    ) -> ev.Allocated:
        """Slots for keys."""
        out = self.do(ev.Allocate(connection, CALL, ticket, group, some, request, priority))
        return only(ev.Allocated, out)

    def seal(self, connection: int, ticket: int, count: int, length: int = CHUNK) -> bool:
        """Seal a ticket of `count` slots."""
        return only(ev.Sealed, self.do(ev.Seal(connection, CALL, ticket, (length,) * count))).ok

    def store(
        self,
        connection: int,
        some: list[bytes],
        *,
        request: int = 0,
        priority: Priority = Priority.INTERACTIVE,
        group: int = 0,
    ) -> list[int]:
        """Allocate and seal at once; the states of the allocation."""
        self._ticket += 1
        got = self.allocate(connection, self._ticket, some, request=request, priority=priority, group=group)
        if len(got.slots):
            assert self.seal(connection, self._ticket, len(got.slots))
        return list(got.states)

    def refused(self, event: ev.Event) -> tuple[str, str]:
        """Kind and detail of a refusal that is the only effect."""
        (effect,) = self.do(event)
        assert isinstance(effect, ev.Refused)
        return effect.kind, effect.detail

    # --- looking in -------------------------------------------------------------------------------------------------

    def slab(self, tenant: str = "t", slot_bytes: int = CHUNK) -> SlabClass:
        """A slab class."""
        return self.node.extents.slabs[tenant, slot_bytes]

    def extents(self, tenant: str = "t", slot_bytes: int = CHUNK) -> list[Extent]:
        """The extents of a class, draining ones included."""
        return [extent for extent in self.slab(tenant, slot_bytes).extents if extent is not None]

    def resident(self, some: list[bytes], connection: int = 1, group: int = 0) -> list[bytes]:
        """Those of the keys that can be read."""
        states = self.lookup(connection, some, group=group)
        return [key for key, state in zip(some, states, strict=True) if state == RAM]


def one_extent(*, eviction: str = "arc") -> Driven:
    """A node of one extent of `PER` slots, and session 1."""
    d = Driven(1, eviction=eviction)
    d.hello(1)
    return d
