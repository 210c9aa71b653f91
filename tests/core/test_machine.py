"""The node against an oracle: any order of events that clients, disks and crashes can make, bytes included.

The oracle knows what no node knows: which process may still write where, who reads what, and which bytes lie in each
page. It holds that a sealed slot has the bytes of its key, that a lease of the living is never taken, that bytes of the
dead and the unmapped come back, that a tainted slot rests. Not here: sizes of real life, seeds (`tests.sim`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachesvc.core import events as ev
from cachesvc.core.quota import TenantQuota
from cachesvc.types import KeyState, Priority, Role
from tests.support.engines import Engine, Held, Process, World
from tests.support.nodes import CALL, CHUNK, EXTENT, Driven, keys, of

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
        # a scheduler names what any of its ranks may still write
        named = [p.jobs for p in engine.processes] if process.role is Role.SCHEDULER else [process.jobs]
        claims = [(number, engine.writes[number]) for number in sorted(set().union(*named))]
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
TestNode.settings = settings(max_examples=60, stateful_step_count=60)


@pytest.mark.parametrize("seed", range(10))
def test_long_walks(seed: int) -> None:
    """The same rules, a thousand steps deep: hypothesis finds small examples, but few that begin with a full arena."""
    draw = random.Random(seed)
    machine = NodeMachine()
    machine.start(draw.choice(["arc", "lru"]), draw.random() < 0.5)
    engine, number, coin, group = (partial(draw.randrange, n) for n in (len(ENGINES), 100, 2, 4))

    def batch() -> list[bytes]:
        return keys(draw.randint(1, 8), draw.randint(0, 60))

    steps: list[tuple[float, Callable[[], None]]] = [
        (8, lambda: machine.store(engine(), batch(), group(), coin(), bool(coin()))),
        (4, lambda: machine.lease(engine(), number() % 30, bool(coin()), group(), bool(coin()))),
        (4, lambda: machine.pass_time(draw.choice([0.0, 0.1, 0.3, 0.3, 1.0, 1.0, 6.0, 20.0, 700.0]))),
        (3, lambda: machine.lookup(engine(), batch(), group(), bool(coin()), coin())),
        (3, lambda: machine.release(engine(), number())),
        (2, lambda: machine.allocate(engine(), batch(), group(), coin(), bool(coin()))),
        (2, lambda: machine.write(number(), bool(coin()))),
        (2, lambda: machine.seal(engine(), number())),
        (2, lambda: machine.join(engine(), draw.choice(list(Role)))),
        (2, lambda: machine.finish_job(number(), group() * 3) if machine.d.jobs else None),
        (1, machine.finish_jobs),
        (1, machine.come_back),
        (1, lambda: machine.abort(engine(), number())),
        (1, lambda: machine.done(number())),
        (1, lambda: machine.end_requests(engine(), [group()])),
        (1, lambda: machine.map_extents(engine())),
        (1, lambda: machine.unmap(number())),
        (0.5, lambda: machine.lose_connection(engine(), number(), now=True)),
        (0.3, lambda: machine.join_again(engine(), now=True)),
        (0.3, lambda: machine.lose_interest(engine(), number())),
        (0.3, lambda: machine.die(engine(), number(), bool(coin()), now=True)),
        (0.1, lambda: machine.damage(number(), now=True)),
        (0.1, lambda: machine.restart(draw.choice([0.1, 1.0, 20.0]), now=True)),
    ]
    weights = [weight for weight, _ in steps]
    for _ in range(1000):
        draw.choices(steps, weights)[0][1]()
        machine.sealed_slots_have_their_bytes()
        machine.leases_of_the_living_hold()
        machine.memory_is_bounded()
    machine.teardown()
