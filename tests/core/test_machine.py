"""The node against an oracle: any order of events that clients, disks and crashes can make, bytes included.

The oracle knows what no node knows: which process may still write where, who reads what, and which bytes lie in each
page. It holds that a sealed slot has the bytes of its key, that a lease of the living is never taken, that bytes of the
dead and the unmapped come back, that a tainted slot rests. Not here: sizes of real life, seeds (`tests.sim`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachesvc.core import events as ev
from cachesvc.core.quota import TenantQuota
from cachesvc.core.slots import REUSE_DELAY_S
from cachesvc.types import KeyState, Priority, Role
from tests.support.nodes import CALL, CHUNK, EXTENT, Driven, Table, Tables, keys, of

EXTENTS = 4
ENGINES = [
    # tenant, namespace, bytes of each group's chunks
    ("t", b"namespace-number", (CHUNK,)),
    ("t", b"namespace-number", (CHUNK,)),
    ("t", b"another-namespac", (CHUNK, 2 * CHUNK)),
    ("u", b"namespace-number", (2 * CHUNK,)),
]
NAMED_WITHIN_S = 5.0
QUARANTINE_S = 600.0


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


small = st.integers(0, 30)
seldom = st.integers(0, 7).map(lambda n: n == 5)
some_keys = st.builds(keys, st.integers(1, 8), st.integers(0, 40))
which = st.integers(0, len(ENGINES) - 1)


class NodeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.last_number = 0
        self.engines: list[Engine] = []
        self.stored: list[list[bytes]] = [keys(1)]

    @initialize(eviction=st.sampled_from(["arc", "lru"]), quota=st.booleans())
    def start(self, eviction: str, quota: bool) -> None:
        tenants = (TenantQuota("t"), TenantQuota("u", EXTENT if quota else 0, 2 * EXTENT if quota else None))
        self.d = Driven(EXTENTS, *tenants, auto=False, tables=self.world, eviction=eviction)
        self.engines = [Engine(b"session-number-%d" % i, *engine) for i, engine in enumerate(ENGINES)]
        self.restarted_at = float("-inf")
        self.finish_jobs()
        for engine in range(len(ENGINES)):
            self.join(engine, Role.SCHEDULER)
        self.join(0, Role.WORKER)
        self.finish_jobs()

    def number(self) -> int:
        self.last_number += 1
        return self.last_number

    def do(self, event: ev.Event) -> list[ev.Effect]:
        self.world.now = self.d.now
        out = self.d.do(event)
        assert not [effect for effect in of(ev.Refused, out) if effect.kind == "protocol"]
        for welcome in of(ev.Welcome, out):
            self.welcomed(welcome)
        return out

    def scheduler(self, which: int) -> tuple[Engine, int] | None:
        engine = self.engines[which]
        process = engine.scheduler()
        if process is None or process.connection is None:
            return None
        return engine, process.connection

    # --- processes --------------------------------------------------------------------------------------------------

    @rule(which=which, role=st.sampled_from(Role))
    def join(self, which: int, role: Role) -> None:
        """A process starts, or one that lost its connection comes back."""
        engine = self.engines[which]
        alone = [p for p in engine.processes if p.connection is None and p.role is role]
        if alone:
            process = alone[0]
        elif len([p for p in engine.processes if p.role is role]) < (1 if role is Role.SCHEDULER else 2):
            process = Process(self.number(), role)
            engine.processes.append(process)
        else:
            return
        self.hello(engine, process)

    @rule(which=which, now=seldom)
    def join_again(self, which: int, now: bool) -> None:
        """The scheduler comes back before its old connection is seen to end."""
        process = self.engines[which].scheduler()
        if process is not None and now:
            self.hello(self.engines[which], process)

    def hello(self, engine: Engine, process: Process) -> None:
        process.connection, process.known = self.number(), True
        leases: tuple[ev.LeaseClaim, ...] = ()
        if process.role is Role.SCHEDULER:
            for number, held in list(engine.leases.items()):
                if held.group == 99:  # lost interest: not named
                    self.lose_lease(engine, number)
            leases = tuple(ev.LeaseClaim(number, held.run) for number, held in engine.leases.items())
        claims = [(number, engine.writes[number]) for number in sorted(process.jobs)]
        self.do(
            ev.Hello(
                process.connection,
                engine.tenant,
                process.number,
                CALL,
                engine.session,
                process.role,
                engine.namespace,
                "label",
                {},
                engine.chunk_bytes,
                tuple(ev.WriteClaim(number, held.group, tuple(held.keys), held.run) for number, held in claims),
                leases,
            )
        )

    def lose_lease(self, engine: Engine, number: int) -> None:
        held = engine.leases.pop(number)
        if held.sure:
            self.world.tainted |= {(id(place.table), place.slot) for place in held.places if place.valid()}

    def welcomed(self, welcome: ev.Welcome) -> None:
        for engine in self.engines:
            process = engine.scheduler()
            if process is None or process.connection != welcome.connection:
                continue
            for number, held in list(engine.leases.items()):
                held.sure = number in welcome.leases_kept
                if not held.sure:
                    del engine.leases[number]
            for number in welcome.writes_kept:
                engine.writes[number].sure = True
            for number in sorted(process.jobs - set(welcome.writes_kept)):
                process.jobs.remove(number)
                engine.ours.discard(number)
                self.do(ev.Done(welcome.connection, (number,)))
            engine.ours &= set(welcome.writes_kept)

    @rule(which=which, n=small, now=seldom)
    def lose_connection(self, which: int, n: int, now: bool) -> None:
        connected = [p for p in self.engines[which].processes if p.connection is not None]
        if connected and now:
            process = connected[n % len(connected)]
            connection, process.connection = process.connection, None
            assert connection is not None
            self.do(ev.ConnectionLost(connection))

    @rule(which=which, n=small, first=st.booleans(), now=seldom)
    def die(self, which: int, n: int, first: bool, now: bool) -> None:
        engine = self.engines[which]
        if not engine.processes or not now:
            return
        process = engine.processes.pop(n % len(engine.processes))
        connection = process.connection
        for data, holders in self.world.mapped.items():
            self.world.mapped[data] = {holder for holder in holders if holder[0] != process.number}
        if process.role is Role.SCHEDULER:
            engine.ours.clear()
        if not engine.processes:
            engine.leases.clear()
        if connection is not None and first:
            self.do(ev.ConnectionLost(connection))
        self.do(ev.ProcessDied(process.number))
        if connection is not None and not first:
            self.do(ev.ConnectionLost(connection))
        if process.role is Role.SCHEDULER:
            # a new scheduler of the same session would not know its leases; engines don't do that
            for other in list(engine.processes):
                self.die(which, engine.processes.index(other), first, now=True)

    # --- chunks -----------------------------------------------------------------------------------------------------

    @rule(which=which, some=some_keys, request=st.integers(0, 3), touch=st.booleans(), group=st.integers(0, 1))
    def lookup(self, which: int, some: list[bytes], request: int, touch: bool, group: int) -> None:
        if found := self.scheduler(which):
            engine, connection = found
            self.do(ev.Lookup(connection, CALL, group % len(engine.chunk_bytes), some, request, touch))

    @rule(which=which, some=some_keys, request=st.integers(0, 3), group=st.integers(0, 1), low=st.booleans())
    def allocate(self, which: int, some: list[bytes], request: int, group: int, low: bool) -> None:
        if not (found := self.scheduler(which)):
            return
        engine, connection = found
        group, number = group % len(engine.chunk_bytes), self.number()
        present = [key for key, state in zip(some, self.states(connection, group, some), strict=True) if state == 1]
        out = self.do(ev.Allocate(connection, CALL, number, group, some, request, Priority(not low)))
        (got,) = of(ev.Allocated, out)
        new = [key for key, state in zip(some, got.states, strict=True) if state == 1]
        refused = [i for i, state in enumerate(got.states) if state >= 4]
        assert not refused or all(state != 1 for state in got.states[refused[0] :]), "a slot behind a hole"
        assert [s for s in self.states(connection, group, present) if s != 1] == [], "a chunk of its own batch went"
        assert len(new) == len(got.slots)
        if new:
            engine.writes[number] = Held(group, new, got.slots, self.world.places(got.slots))
            engine.ours.add(number)
            for process in engine.processes:
                process.jobs.add(number)

    @rule(which=which, some=some_keys, request=st.integers(0, 3), group=st.integers(0, 1), low=st.booleans())
    def store(self, which: int, some: list[bytes], request: int, group: int, low: bool) -> None:
        before = self.last_number
        self.allocate(which, some, request, group, low)
        engine = self.engines[which]
        for number in sorted(engine.ours):
            if number > before:
                self.stored.append(engine.writes[number].keys)
                self.seal(which, sorted(engine.ours).index(number))

    @rule(which=which, some=some_keys, request=st.integers(0, 3))
    def store_more(self, which: int, some: list[bytes], request: int) -> None:
        self.store(which, some, request, group=0, low=False)

    def states(self, connection: int, group: int, some: list[bytes]) -> list[int]:
        (looked,) = of(ev.Looked, self.do(ev.Lookup(connection, CALL, group, some, 0, touch=False)))
        return list(looked.states)

    def writers(self) -> Iterator[tuple[Engine, Process, int]]:
        for engine in self.engines:
            for process in engine.processes:
                for number in sorted(process.jobs):
                    yield engine, process, number

    @rule(n=small, scribble=st.booleans())
    def write(self, n: int, scribble: bool) -> None:
        """Some process writes some job, whatever the node thinks of it by now; at first nonsense."""
        writers = list(self.writers())
        if writers:
            engine, _, number = writers[n % len(writers)]
            self.put(engine, number, scribble)

    def put(self, engine: Engine, number: int, scribble: bool = False) -> None:
        held = engine.writes[number]
        for key, place in zip(held.keys, held.places, strict=True):
            for page in range(place.page, place.page + place.table.slot_bytes // CHUNK):
                token = (engine.tenant, engine.namespace, held.group, b"" if scribble else key)
                self.world.pages[place.data, page] = token

    @rule(which=which, n=small)
    def seal(self, which: int, n: int) -> None:
        """Every rank has written and is done."""
        if (found := self.scheduler(which)) and found[0].ours:
            engine, connection = found
            number = sorted(engine.ours)[n % len(engine.ours)]
            self.put(engine, number)
            self.forget_write(engine, number)
            lengths = (CHUNK,) * len(engine.writes[number].keys)
            self.do(ev.Seal(connection, CALL, number, lengths))

    @rule(which=which, n=small)
    def abort(self, which: int, n: int) -> None:
        if (found := self.scheduler(which)) and found[0].ours:
            engine, connection = found
            number = sorted(engine.ours)[n % len(engine.ours)]
            self.forget_write(engine, number)
            self.do(ev.Abort(connection, (number, 12345678)))

    @staticmethod
    def forget_write(engine: Engine, number: int) -> None:
        engine.ours.remove(number)
        for process in engine.processes:
            process.jobs.discard(number)

    @rule(n=small)
    def done(self, n: int) -> None:
        """A worker ends a job that its scheduler has given up or lost."""
        lost = [(e, p, number) for e, p, number in self.writers() if number not in e.ours and p.connection]
        if lost:
            _, process, number = lost[n % len(lost)]
            process.jobs.remove(number)
            assert process.connection is not None
            self.do(ev.Done(process.connection, (number,)))

    @rule(which=which, n=small, prefix=st.booleans(), request=st.integers(0, 3), touch=st.booleans())
    def lease(self, which: int, n: int, prefix: bool, request: int, touch: bool) -> None:
        some = self.stored[-1 - n % len(self.stored)]
        if not (found := self.scheduler(which)):
            return
        engine, connection = found
        number = self.number()
        (got,) = of(
            ev.Leased, self.do(ev.Lease(connection, CALL, number, 0, some, request, touch=touch, prefix=prefix))
        )
        mine = [key for key, state in zip(some, got.states, strict=False) if state == KeyState.RAM]
        assert len(mine) == len(got.slots)
        if mine:
            engine.leases[number] = Held(0, mine, got.slots, self.world.places(got.slots))

    @rule(which=which, n=small)
    def release(self, which: int, n: int) -> None:
        if (found := self.scheduler(which)) and found[0].leases:
            engine, connection = found
            number = sorted(engine.leases)[n % len(engine.leases)]
            del engine.leases[number]
            self.do(ev.Release(connection, (number, 12345678)))

    @rule(which=which, n=small)
    def lose_interest(self, which: int, n: int) -> None:
        """The scheduler comes back and doesn't name one of its leases, though a rank may still read."""
        engine = self.engines[which]
        process = engine.scheduler()
        if engine.leases and process is not None:
            engine.leases[sorted(engine.leases)[n % len(engine.leases)]].group = 99
            self.hello(engine, process)

    @rule()
    def come_back(self) -> None:
        for which in range(len(self.engines)):
            for role in (Role.SCHEDULER, Role.WORKER):
                self.join(which, role)

    @rule(which=which, requests=st.lists(st.integers(0, 4), max_size=3))
    def end_requests(self, which: int, requests: list[int]) -> None:
        if found := self.scheduler(which):
            self.do(ev.EndRequests(found[1], tuple(requests)))

    # --- memory and time --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.d.jobs)
    @rule(n=small, fails=st.integers(0, 9))
    def finish_job(self, n: int, fails: int) -> None:
        job = self.d.jobs.pop(n % len(self.d.jobs))
        if fails == 0 and isinstance(job, ev.MakeSpare):
            self.do(ev.SpareFailed(job.extent, "no memory"))
            return
        self.world.now = self.d.now
        self.do(self.world.finish(job))

    @rule()
    def finish_jobs(self) -> None:
        while self.d.jobs:
            self.finish_job(0, 1)

    @rule(which=which)
    def map_extents(self, which: int) -> None:
        engine = self.engines[which]
        extents = tuple(number for number, _, _ in self.d.node.extents_of(engine.tenant, {CHUNK, 2 * CHUNK}))
        for process in engine.processes:
            if process.connection is not None and extents:
                for number in extents:
                    self.world.mapped.setdefault(self.world.data[number], set()).add((process.number, number))
                self.do(ev.ExtentsMapped(process.number, extents))

    @rule(n=small)
    def unmap(self, n: int) -> None:
        held = [(data, holder) for data, holders in self.world.mapped.items() for holder in sorted(holders)]
        if held:
            data, (process, number) = held[n % len(held)]
            self.world.mapped[data].remove((process, number))
            self.do(ev.ExtentsUnmapped(process, (number,)))

    @rule(n=small, now=seldom)
    def damage(self, n: int, now: bool) -> None:
        usable = sorted(self.world.tables)
        if usable and now:
            self.do(ev.ExtentDamaged(usable[n % len(usable)], "truncated"))

    @rule(seconds=st.sampled_from([0.0, 0.3, 0.3, 1.0, 1.0, 6.0, 30.0, 700.0]))
    def pass_time(self, seconds: float) -> None:
        self.d.now += seconds
        self.do(ev.Tick())
        if self.d.now >= self.restarted_at + NAMED_WITHIN_S:
            for engine in self.engines:
                engine.leases = {number: held for number, held in engine.leases.items() if held.sure}
        if self.d.now >= self.restarted_at + QUARANTINE_S:
            self.give_up_what_nobody_named()

    def give_up_what_nobody_named(self) -> None:
        """The one case where time frees a slot whose writer had a pidfd."""
        for engine, process, number in list(self.writers()):
            if not (engine.writes[number].sure and process.known):
                process.jobs.remove(number)
                if process.role is Role.SCHEDULER:
                    engine.ours.discard(number)

    @rule(after=st.sampled_from([0.1, 1.0, 20.0]), now=seldom)
    def restart(self, after: float, now: bool) -> None:
        """The daemon is killed: connections and jobs are gone."""
        if not now:
            return
        self.d = self.d.restarted(after)
        self.restarted_at = self.d.now
        self.world.mapped.clear()
        self.world.tainted.clear()
        for engine in self.engines:
            for process in engine.processes:
                process.connection, process.known = None, False
            for held in (*engine.leases.values(), *engine.writes.values()):
                held.sure = False

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def sealed_slots_have_their_bytes(self) -> None:
        for extent, table in self.world.tables.items():
            for slot, (_, state) in enumerate(table.words):
                if state == 2:
                    namespace, group, key, _ = table.fields[slot]
                    pages = table.slot_bytes // CHUNK
                    for page in range(slot * pages, slot * pages + pages):
                        found = self.world.pages[self.world.data[extent], page]
                        assert found == (table.tenant, namespace, group, key), f"wrong bytes in {extent}, {slot}"

    @invariant()
    def leases_of_the_living_hold(self) -> None:
        for engine in self.engines:
            for held in engine.leases.values():
                for key, place in zip(held.keys, held.places, strict=True):
                    if held.sure:
                        assert place.valid(), "a lease was taken from a living session"
                    if place.valid():
                        found = self.world.pages[place.data, place.page]
                        assert found[3] == key, "a reader would take wrong bytes for right"

    @invariant()
    def memory_is_bounded(self) -> None:
        files = set(self.world.data.values()) | {data for data, holders in self.world.mapped.items() if holders}
        assert len(files) <= EXTENTS, "bytes were promised that somebody still maps"

    def teardown(self) -> None:
        if not self.engines:
            return
        for which in range(len(self.engines)):
            while self.engines[which].processes:
                self.die(which, 0, first=True, now=True)
        for _ in range(40):
            self.d.now += 60.0
            self.do(ev.Tick())
            while self.d.jobs:
                self.finish_job(0, 1)
        for table in self.world.tables.values():
            assert all(state in (0, 2) for _, state in table.words), "a slot leaked"
        assert not self.d.node.sessions.by_name
        assert self.d.node.extents.total() == EXTENTS
        assert not self.d.node.extents.mapped
        for slab in self.d.node.extents.slabs.values():
            assert sum(slab.leases) == 0
            assert not slab.limbo or slab.take_free(self.d.now) is not None


TestNode = NodeMachine.TestCase
TestNode.settings = settings(
    max_examples=int(os.environ.get("CACHESVC_MACHINE_EXAMPLES", "60")), stateful_step_count=60
)
