"""Who holds what: sessions of engines, their processes, tickets and requests.

Covers: the records and the registry of them. Not here: what happens to the slots of a ticket (`core.transfers`).

A session is all processes of one engine. It lives as long as a connection is open or a ticket isn't settled, and while
two of its processes live: one that comes back may hand out a slot that the other, not yet back, will write::

      Hello (first process)               last connection gone, nothing held, at most one process alive
    ------------------------> SESSION -----------------------------------------------------------------> gone
                               |  ^
     scheduler's connection    |  | Hello of a scheduler that names its open tickets
     lost: tickets of writes   v  |
     are quarantined, leases  SESSION WITHOUT SCHEDULER
     stay

A **member** is one client object in one process: a process may have several (vLLM's scheduler and worker can live in
one), and what one of them says about its tickets says nothing about the others'. One scheduler is the **head**: every
ticket is of the head that asked for it, its *owner*. Another scheduler under the same session id becomes the head, and
the one before is **past**: it is told so whenever it comes back, and what it still holds waits for it::

                   Hello of another scheduler
    HEAD ------------------------------------------> PAST    its Hello says what it still uses, and is refused
     |  its process died: another may come            |
     +-----------------> gone <-----------------------+      its process died

A **write ticket** is *owned* (`waiting is None`: the head will seal or abort it) or *quarantined*: `waiting` is the set
of members that may still write its slots, its owner and every worker; empty = its slots are free again. A member leaves
it when its process dies or when it says Done. The owner's own Hello, which names all that it holds, ends the waiting
for everybody if it leaves the ticket out: it settled it, after its workers had finished, or it never got the slots. A
worker's Hello ends nothing: a job that it has yet to begin isn't named in it; and a worker that joins later is waited
for, too.

A **lease** is held until it is released, or every process of its session is dead; of a past scheduler, until that one
and the workers are (its `waiting`), or it leaves the lease out of its Hello. Sessions with a process that gave no pidfd
are *timed*: for them, and only for them, time (`quarantine_s`) stands in for a death.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from cachesvc.core.rings import Trail, no_trail
from cachesvc.types import Priority, Role

if TYPE_CHECKING:
    from cachesvc.core.index import Namespace, Space
    from cachesvc.core.slots import SlabClass

Member: TypeAlias = tuple[int | None, bytes]
"""A client object: its process (None = it gave no pidfd) and the name that it has there (b"" = the only one)."""

SESSIONS_MAX: Final = 1024
PAST_MAX: Final = 1024
"""Past schedulers that a session remembers; the one forgotten first could come back as if it were new."""

TICKETS_PER_SESSION_MAX: Final = 8192
LEASED_KEYS_PER_SESSION_MAX: Final = 1 << 20
"""Slots in all leases of a session on one class, a slot in two of them counted twice: what the records may cost."""

REQUESTS_PER_SESSION_MAX: Final = 4096
REQUEST_SLOTS_MAX: Final = 1 << 17
"""Slots remembered of one request; beyond it (2 M tokens at 16 a chunk) they are treated as anybody's."""

REQUEST_SLOTS_PER_SESSION_MAX: Final = 1 << 20
"""Slots remembered of all requests of a session; beyond it the oldest requests are forgotten."""


@dataclass(slots=True, eq=False)
class WriteTicket:
    """One allocation in flight: `keys[i]` is being written into slot number `slots[i]` of the space's class."""

    session: Session
    number: int
    space: Space
    keys: list[bytes]
    slots: list[int]
    request: int
    priority: Priority
    owner: Member | None = None
    """The scheduler that asked for it."""
    done: set[Member] = field(default_factory=set)
    """Members that said they write its slots no more."""
    waiting: set[Member] | None = None
    since: float = 0.0
    """When it was quarantined (seconds)."""
    hold_until: float = float("-inf")
    """Not freed before this: processes that a restarted daemon hasn't seen again yet may still write."""


@dataclass(slots=True, eq=False)
class LeaseTicket:
    """One lease in flight on slot numbers of one class."""

    session: Session
    number: int
    slab: SlabClass
    slots: list[int]
    owner: Member | None = None
    """The scheduler that asked for it."""
    waiting: set[Member] | None = None
    """Who may still read, if its owner is past."""


@dataclass(slots=True, eq=False)
class Line:
    """What a request has touched or stored in one class, in prefix order, and where that ends in the order of eviction:
    what it has next goes behind."""

    slab: SlabClass
    slots: dict[int, bytes | None] = field(default_factory=dict)
    """Slot number -> key, the very object that the class has: generations begin anew when an extent is used again."""
    trail: Trail = field(default_factory=no_trail)
    stamp: float = float("inf")
    """At most this is the last use (seconds) of what comes next."""
    _departures: int = 0
    """Of the class, when it last forgot what was stale."""
    refresh_at: float = float("-inf")
    """When all of it is to be moved to the hot end again (seconds)."""

    def missing(self, numbers: Iterable[int | None]) -> list[int]:
        """Those of the slots that it hasn't, or had when they held something else."""
        mine, keys = self.slots.get, self.slab.keys
        return [n for n in numbers if n is not None and mine(n) is not keys[n]]

    def add(self, numbers: Sequence[int]) -> None:
        """It has these, too, from now on, if they aren't too many."""
        mine, keys = self.slots, self.slab.keys
        for n in islice(numbers, max(0, REQUEST_SLOTS_MAX - len(mine))):
            mine.pop(n, None)
            mine[n] = keys[n]

    def forget_stale(self) -> bool:
        """Forget slots that hold something else by now; True if there were any. In a new dict: see `core.eviction`."""
        if self._departures == self.slab.departures:
            return False
        self._departures, keys = self.slab.departures, self.slab.keys
        living = {n: key for n, key in self.slots.items() if keys[n] is key}
        if len(living) == len(self.slots):
            return False
        self.slots = living
        return True


@dataclass(slots=True, eq=False)
class Request:
    """What an engine's request has, in each class."""

    lines: dict[SlabClass, Line] = field(default_factory=dict)

    def line(self, slab: SlabClass) -> Line:
        """Its line in one class."""
        line = self.lines.get(slab)
        if line is None:
            line = self.lines[slab] = Line(slab)
        return line

    def __len__(self) -> int:
        return sum(len(line.slots) for line in self.lines.values())


@dataclass(slots=True)
class Held:
    """Slots of one class that a session holds."""

    leases: dict[int, int] = field(default_factory=dict)
    """Slot number -> in how many of its leases it is: what a session reads twice it holds once."""
    leased_keys: int = 0
    """Sum of the values of `leases`."""
    writing: int = 0


@dataclass(slots=True, eq=False)
class Session:
    """All processes of one engine, in one namespace of one tenant. Owned by the node."""

    name: bytes
    tenant: str
    namespace: Namespace
    processes: set[int] = field(default_factory=set)
    connections: set[int] = field(default_factory=set)
    members: dict[Member, Role] = field(default_factory=dict)
    """Those whose processes live, as far as they gave a pidfd."""
    head: Member | None = None
    """The scheduler that came last."""
    past: dict[Member, None] = field(default_factory=dict)
    """Schedulers that came before it, in that order."""
    scheduler: int | None = None
    """The connection of the head: it allocates, seals and leases."""
    timed: bool = False
    lost_at: float = 0.0
    """When the last connection was lost (seconds)."""
    writes: dict[int, WriteTicket] = field(default_factory=dict)
    leases: dict[int, LeaseTicket] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    held: dict[SlabClass, Held] = field(default_factory=dict)
    noted: int = 0
    """At least the slots that its requests remember."""

    def request(self, number: int) -> Request:
        """The request of that number, known from now on; for number 0 = none, one that nobody will remember."""
        if not number:
            return Request()
        known = self.requests.get(number)
        if known is None:
            if len(self.requests) >= REQUESTS_PER_SESSION_MAX:
                # an engine that never ends its requests loses the protection of its oldest
                del self.requests[next(iter(self.requests))]
            known = self.requests[number] = Request()
        return known

    def note(self, line: Line, numbers: Sequence[int]) -> None:
        """These slots belong to one of its requests from now on."""
        line.add(numbers)
        self.noted += len(numbers)
        if self.noted > REQUEST_SLOTS_PER_SESSION_MAX:
            self.noted = sum(map(len, self.requests.values()))
            # to well below, so that this is rare; the latest stays
            while self.noted > REQUEST_SLOTS_PER_SESSION_MAX // 2 and len(self.requests) > 1:
                oldest = next(iter(self.requests))
                self.noted -= len(self.requests.pop(oldest))

    def users(self, owner: Member | None) -> set[Member]:
        """Who may use slots that `owner` was given: itself and the workers."""
        return {member for member, role in self.members.items() if member == owner or role is Role.WORKER}

    def add_past(self, member: Member) -> None:
        """Another scheduler came after this one."""
        self.past.pop(member, None)
        self.past[member] = None
        if len(self.past) > PAST_MAX:
            del self.past[next(iter(self.past))]

    def forget_member(self, member: Member) -> None:
        """Wait no more for a past scheduler that holds nothing: a process may make any number of them."""
        tickets: list[WriteTicket | LeaseTicket] = [*self.writes.values(), *self.leases.values()]
        if any(t.owner == member or (t.waiting is not None and member in t.waiting) for t in tickets):
            return
        self.members.pop(member, None)
        if member[0] is not None and not any(process == member[0] for process, _ in self.members):
            self.processes.discard(member[0])

    def holding(self, slab: SlabClass) -> Held:
        """What it holds of a class."""
        held = self.held.get(slab)
        if held is None:
            held = self.held[slab] = Held()
        return held

    def room_for_tickets(self) -> bool:
        """May it have one more ticket in flight?"""
        return len(self.writes) + len(self.leases) < TICKETS_PER_SESSION_MAX

    def finished(self) -> bool:
        """Nobody is there, nothing is held, and no two processes are left that must know of each other."""
        return not (self.connections or self.writes or self.leases) and len(self.processes) < 2

    def slabs(self) -> set[SlabClass]:
        """The classes that its namespace's groups lie in."""
        return {space.slab for space in self.namespace.spaces}


class Sessions:
    """The registry: sessions by name, by connection, by process."""

    def __init__(self) -> None:
        self.by_name: dict[tuple[str, bytes], Session] = {}
        self.by_connection: dict[int, Session] = {}
        self._member_of: dict[int, Member] = {}
        self._connected: Counter[SlabClass] = Counter()

    def join(self, session: Session, connection: int, member: Member, role: Role) -> None:
        """A connection of a member belongs to the session from now on."""
        if not session.connections:
            self._connected.update(session.slabs())
        self.by_connection[connection] = session
        self._member_of[connection] = member
        session.connections.add(connection)
        self.know(session, member, role)

    def know(self, session: Session, member: Member, role: Role) -> None:
        """A member takes part in the session, connected or not."""
        self.by_name[session.tenant, session.name] = session
        process = member[0]
        if process is None:
            session.timed = True
        else:
            session.processes.add(process)
            session.members[member] = role

    def leave(self, connection: int, now: float) -> Session | None:
        """The connection is gone; the session it was of."""
        session = self.by_connection.pop(connection, None)
        self._member_of.pop(connection, None)
        if session is not None:
            session.connections.discard(connection)
            session.lost_at = now
            if not session.connections:
                self._connected.subtract(session.slabs())
                self._connected = +self._connected
        return session

    def member_of(self, connection: int) -> Member:
        """The member behind a connection that is there."""
        return self._member_of[connection]

    def connections_of(self, session: Session, process: int) -> list[int]:
        """Connections of a session that lead to this process."""
        return [connection for connection in session.connections if self._member_of[connection][0] == process]

    def of_process(self, process: int) -> list[Session]:
        """Every session that the process takes part in."""
        return [session for session in self.by_name.values() if process in session.processes]

    def connected(self, slab: SlabClass) -> int:
        """How many connected sessions use this class."""
        return self._connected[slab]

    def room(self, session: Session, slab: SlabClass, taken: int, growth: int) -> int:
        """How many slots of a class the session may take beside the `taken` ones that it has in leases, or in writing:
        while another session is connected, half of the class in each and three quarters in both together, so that a
        wedged holder starves nobody; alone, all of it. Less than 0 if it has too many already.

        Of the class as large as it may become: as long as it may grow by `growth` slots, nobody is starved.
        """
        slots = slab.slot_count + growth
        others = self._connected[slab] - (1 if session.connections else 0)
        if others <= 0:
            return slots - taken
        held = session.holding(slab)
        return min(slots // 2 - taken, slots * 3 // 4 - len(held.leases) - held.writing)

    def unheld(self, session: Session, slab: SlabClass, growth: int) -> int:
        """How many slots of a class that nobody holds the session may take, as far as others are concerned. With one of
        them connected `room` is enough. With more something stays for whoever comes next, however many are wedged:
        together they hold three quarters, and beyond that each at most as much as it leaves.
        """
        slots = slab.slot_count + growth
        others = self._connected[slab] - (1 if session.connections else 0)
        if others <= 1:
            return slots
        held = session.holding(slab)
        busy = sum(extent.busy for extent in slab.extents if extent is not None and not extent.draining)
        return max(slots * 3 // 4 - busy, (slots - busy - len(held.leases) - held.writing) // 2)

    def forget(self, session: Session) -> None:
        """The session has finished."""
        del self.by_name[session.tenant, session.name]
        session.namespace.sessions -= 1

    def check_invariants(self) -> None:
        """Counts of holdings match the tickets; every connection's session is registered."""
        for session in self.by_name.values():
            for slab, held in session.held.items():
                leased = Counter(n for t in session.leases.values() if t.slab is slab for n in t.slots)
                writing = sum(len(t.slots) for t in session.writes.values() if t.space.slab is slab)
                counted = held.leases, held.leased_keys, held.writing
                assert (leased, leased.total(), writing) == counted, f"session {session.name!r} miscounts"
            assert session.noted >= sum(map(len, session.requests.values())), f"session {session.name!r} misnotes"
            for ticket in session.writes.values():
                assert ticket.waiting is None or ticket.waiting <= session.members.keys()
            for lease in session.leases.values():
                assert lease.waiting is None or (lease.waiting and lease.waiting <= session.members.keys())
            assert {process for process, _ in session.members} <= session.processes
            assert session.head not in session.past
        for slab, count in self._connected.items():
            assert count == sum(1 for s in self.by_name.values() if s.connections and slab in s.slabs())
        for connection, session in self.by_connection.items():
            assert connection in session.connections
            assert self.by_name.get((session.tenant, session.name)) is session
