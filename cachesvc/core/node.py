"""The node: one door through which everything happens. Pure: no I/O, no clock, no randomness.

`Node.handle(event, now) -> list[effect]`; the vocabulary is `core.events`. Covers: who may say what (connections,
roles, limits), sessions joining and dying, time. Not here: whether a namespace may be opened (`core.admission`), what a
message does to slots (`core.transfers`), extents (`core.extents`), restarts (`core.restore`).

A client's mistake is answered by Refused and changes nothing; an AssertionError out of `handle` is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

from cachesvc.core import events as ev
from cachesvc.core.admission import Admission, Rejected
from cachesvc.core.extents import Extents
from cachesvc.core.index import Index, Space
from cachesvc.core.quota import Quotas, TenantQuota
from cachesvc.core.restore import Restoration
from cachesvc.core.sessions import SESSIONS_MAX, Member, Session, Sessions, WriteTicket
from cachesvc.core.slots import WRITABLE, SlabClass, SlotState
from cachesvc.core.snapshot import snapshot
from cachesvc.core.transfers import Marks, Transfers, slot_run
from cachesvc.types import KEYS_PER_MESSAGE_MAX, Priority, Role, slot_bytes_for

WELCOME_WAIT_S: Final = 2.0
"""A Hello waits this long for the first extent of its class, so that the first write finds room."""

SAVE_LAST_USE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Plain values that a node is made with; bytes and seconds."""

    extent_bytes: int
    extents_max: int
    tenants: tuple[TenantQuota, ...]
    eviction: str = "arc"
    quarantine_s: float = 600.0
    restart_grace_s: float = 5.0


class Node:
    """All state of the service on one node. Owned by whoever calls `handle`, one caller at a time."""

    def __init__(self, settings: NodeSettings, next_extent: int = 1) -> None:
        self.settings = settings
        self.index = Index()
        self.sessions = Sessions()
        self.quotas = Quotas(settings.tenants, settings.extent_bytes, settings.extents_max)
        self.extents = Extents(
            self.index, self.sessions, self.quotas, settings.extent_bytes, settings.eviction, next_extent
        )
        self.transfers = Transfers(self.index, self.sessions, self.extents.soon, self.extents.growth)
        self.admission = Admission(self.index, self.extents, self.transfers, self.quotas)
        self.restoration = Restoration(self.index, self.extents)
        self._quarantined: dict[WriteTicket, None] = {}
        """An ordered set: a run with the same events does the same."""
        self._welcomes: list[tuple[float, Session, ev.Welcome]] = []
        self._orphans_until = float("inf")
        self._saved_at = float("-inf")
        self._doors: dict[type, Callable[[Any, float, list[ev.Effect]], None]] = {
            ev.Lookup: self._lookup,
            ev.Lease: self._lease,
            ev.Release: self._release,
            ev.Allocate: self._allocate,
            ev.Seal: self._seal,
            ev.Abort: self._abort,
            ev.Done: self._done,
            ev.EndRequests: self._end_requests,
            ev.Hello: self._hello,
            ev.Claim: self._claim,
            ev.ConnectionLost: self._connection_lost,
            ev.ProcessDied: self._process_died,
            ev.SpareMade: lambda e, now, out: self._extent_came(lambda: self.extents.spare_made(e.extent), now, out),
            ev.SpareFailed: lambda e, now, _: self.extents.failed(e.extent, now),
            ev.ExtentFormatted: lambda e, now, out: self._extent_came(
                lambda: self.extents.formatted(e.extent), now, out
            ),
            ev.ExtentDropped: lambda e, now, out: self._extent_came(lambda: self.extents.dropped(e.extent), now, out),
            ev.ExtentsMapped: lambda e, _now, _out: self.extents.map(e.process, e.extents),
            ev.ExtentsUnmapped: lambda e, _now, _out: self.extents.unmap(e.process, e.extents),
            ev.ExtentDamaged: self._damaged,
            ev.SpareRestored: lambda e, _now, _out: self.extents.spares.append(e.extent),
            ev.ExtentRestored: self._restored,
            ev.NamespacesRestored: self._namespaces_restored,
            ev.Started: self._started,
            ev.Tick: self._tick,
        }

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Let `event` happen at `now` (seconds, never going back); what is to be done, in order."""
        out: list[ev.Effect] = []
        try:
            self._doors[type(event)](event, now, out)
        except Rejected as no:
            # a rejection is decided before anything changed, idle namespaces and classes aside: those may be forgotten
            out.append(ev.Refused(event.connection, getattr(event, "call", 0), no.kind, no.detail))  # type: ignore[union-attr]
        return out

    # --- joining ----------------------------------------------------------------------------------------------------

    def _hello(self, event: ev.Hello, now: float, out: list[ev.Effect]) -> None:
        if event.connection in self.sessions.by_connection:
            raise Rejected("protocol", "hello was said on this connection already")
        self.admission.check(event)
        record = ev.NamespaceRecord(
            event.tenant, event.namespace, event.label, dict(event.components), event.chunk_bytes
        )
        session = self.sessions.by_name.get((event.tenant, event.session))
        if session is None:
            if len(self.sessions.by_name) >= SESSIONS_MAX:
                raise Rejected("limit", f"{SESSIONS_MAX} sessions are open on this node, the most it serves")
            session = Session(event.session, event.tenant, self.admission.open(record, now, out))
            session.namespace.sessions += 1
            self.sessions.by_name[event.tenant, event.session] = session
        elif session.namespace.record.namespace != event.namespace:
            raise Rejected("protocol", "this session is open in another namespace; start a new session for this one")
        else:
            self.admission.check_sizes(session.namespace, record)
        member = event.process, event.member
        if event.role is Role.WORKER:
            self._join_worker(session, event, member)
            welcome = ev.Welcome(event.connection, event.call, (), ())
        elif event.over or member in session.past:
            self._turn_away(session, event, member, now, out)
            return
        else:
            welcome = self._join_scheduler(session, event, member, now, out)
        self._welcomes.append((now + WELCOME_WAIT_S, session, welcome))
        self.extents.plan(now, out)
        self._send_welcomes(now, out)

    def _join_worker(self, session: Session, event: ev.Hello, member: Member) -> None:
        """It may write what the scheduler was given before it came, too: the scheduler's word reaches it otherwise."""
        self.sessions.join(session, event.connection, member, event.role)
        for ticket in session.writes.values():
            mine = ticket.waiting is not None and ticket.owner == session.head and member not in ticket.done
            if mine and ticket.waiting is not None and event.process is not None:
                ticket.waiting.add(member)

    def _join_scheduler(
        self, session: Session, event: ev.Hello, member: Member, now: float, out: list[ev.Effect]
    ) -> ev.Welcome:
        if session.scheduler is not None:
            # it reconnected before we saw its old connection end, or another one comes in its place
            self._lose(session.scheduler, now)
        if session.head is not None and session.head != member:
            self._make_past(session, session.head, now, out)
        session.head = member
        self.sessions.join(session, event.connection, member, event.role)
        session.scheduler = event.connection
        writes = dict.fromkeys(c.ticket for c in event.writes if self._claim_write(session, c, member))
        for number in event.open_writes:
            ticket = session.writes.get(number)
            if ticket is not None and ticket.owner == member and ticket.waiting is not None:
                self._own_again(ticket)
                writes[number] = None
        leases = dict.fromkeys(c.ticket for c in event.leases if self._claim_lease(session, c, member, now))
        for number in event.open_leases:
            lease = session.leases.get(number)
            if lease is not None and lease.owner == member:
                leases[number] = None
        self._end_unnamed(session, event, member, leases.keys(), now, out)
        return ev.Welcome(event.connection, event.call, tuple(writes), tuple(leases))

    def _make_past(self, session: Session, head: Member, now: float, out: list[ev.Effect]) -> None:
        """Another scheduler comes: this one is served no more, and what it holds waits until nobody can use it."""
        readers = session.users(head)
        marks = Marks()
        for lease in list(session.leases.values()):
            if lease.waiting is None:
                lease.waiting = set(readers)
                if not readers:
                    self.transfers.end_lease(lease, now, marks, released=False)
        marks.flush(out)
        session.requests.clear()
        if head[0] is None or head in session.members:
            session.add_past(head)
        session.forget_member(head)

    def _turn_away(self, session: Session, event: ev.Hello, member: Member, now: float, out: list[ev.Effect]) -> None:
        """A past scheduler says what it still uses: the rest is free, and that is all that is done for it."""
        if session.head == member:
            session.head = None
        session.add_past(member)
        self.sessions.know(session, member, event.role)
        for claim in event.writes:
            if claim.ticket not in session.writes and self._claim_write(session, claim, member):
                ticket = session.writes[claim.ticket]
                self.transfers.quarantine(ticket, now)
                self._quarantined[ticket] = None
        leases: set[int] = set()
        if event.process is not None:
            # without a pidfd nobody would hear of its end: its readers notice that the lease is lost
            leases = {c.ticket for c in event.leases if self._claim_lease(session, c, member, now)}
            leases.update(event.open_leases)
        for lease in session.leases.values():
            if lease.owner == member and lease.waiting is None and event.process is not None:
                lease.waiting = session.users(member)
        self._end_unnamed(session, event, member, leases, now, out)
        session.forget_member(member)
        self._forget_finished()
        detail = "another client with this session id came later: it is served, and this one isn't any more"
        out.append(ev.Refused(event.connection, event.call, "session", detail))

    def _claim(self, event: ev.Claim, now: float, out: list[ev.Effect]) -> None:
        session = self._scheduler(event.connection)
        member = self.sessions.member_of(event.connection)
        writes = tuple(c.ticket for c in event.writes if self._claim_write(session, c, member))
        leases = tuple(c.ticket for c in event.leases if self._claim_lease(session, c, member, now))
        out.append(ev.Claimed(event.connection, event.call, writes, leases))

    def _claim_write(self, session: Session, claim: ev.WriteClaim, member: Member) -> bool:
        ticket = session.writes.get(claim.ticket)
        if ticket is None:
            if claim.group >= len(session.namespace.spaces) or len(claim.keys) != len(claim.slots):
                return False
            space = session.namespace.spaces[claim.group]
            slots = self.restoration.claim_write(space, claim.slots)
            if slots is None or not session.room_for_tickets():
                return False
            ticket = WriteTicket(session, claim.ticket, space, list(claim.keys), slots, 0, Priority.INTERACTIVE)
            ticket.owner, ticket.hold_until = member, self._orphans_until
            session.writes[claim.ticket] = ticket
            session.holding(space.slab).writing += len(slots)
        elif (
            ticket.waiting is None or ticket.owner != member or slot_run(ticket.space.slab, ticket.slots) != claim.slots
        ):
            return False
        self._own_again(ticket)
        return True

    def _own_again(self, ticket: WriteTicket) -> None:
        self._quarantined.pop(ticket, None)
        self.transfers.own_again(ticket)

    def _claim_lease(self, session: Session, claim: ev.LeaseClaim, member: Member, now: float) -> bool:
        lease = session.leases.get(claim.ticket)
        if lease is not None:
            return lease.owner == member and slot_run(lease.slab, lease.slots) == claim.slots
        found = self.restoration.claim_lease(session.tenant, claim.slots, now)
        if found is None or not session.room_for_tickets():
            return False
        slab, slots = found
        self.transfers.hold(session, claim.ticket, slab, slots, member)
        return True

    def _end_unnamed(
        self,
        session: Session,
        event: ev.Hello,
        member: Member,
        leases: Collection[int],
        now: float,
        out: list[ev.Effect],
    ) -> None:
        """End what a scheduler was given and doesn't name in its Hello, or wrongly (leases): it settled those tickets,
        or never got the slots (the message, or the reply, was lost with the connection). Other schedulers' stay."""
        mine = [number for number, lease in session.leases.items() if lease.owner == member]
        self._end_leases(session, [number for number in mine if number not in leases], now, out)
        named = {claim.ticket for claim in event.writes}.union(event.open_writes)
        for ticket in list(session.writes.values()):
            if ticket.waiting is None or ticket.owner != member or ticket.number in named or member[0] is None:
                continue
            ticket.waiting.clear()
            self._settle_quarantined(ticket, now, out)

    def _end_leases(self, session: Session, numbers: Iterable[int], now: float, out: list[ev.Effect]) -> None:
        """End leases that nobody vouches for. Somebody may read there still: their slots are tainted."""
        marks = Marks()
        for number in numbers:
            self.transfers.end_lease(session.leases[number], now, marks, released=False)
        marks.flush(out)

    def _send_welcomes(self, now: float, out: list[ev.Effect]) -> None:
        waiting = []
        for until, session, welcome in self._welcomes:
            if now < until and any(self.extents.awaited(slab) for slab in session.slabs()):
                waiting.append((until, session, welcome))
            else:
                out.append(welcome)
        self._welcomes = waiting

    # --- requests ---------------------------------------------------------------------------------------------------

    def _session(self, connection: int) -> Session:
        session = self.sessions.by_connection.get(connection)
        if session is None:
            raise Rejected("protocol", "say hello first")
        return session

    def _space(self, session: Session, group: int, keys: list[bytes]) -> Space:
        if len(keys) > KEYS_PER_MESSAGE_MAX:
            raise Rejected("protocol", f"{len(keys)} keys in one message, {KEYS_PER_MESSAGE_MAX} is the most")
        if group >= len(session.namespace.spaces):
            raise Rejected("protocol", f"KV group {group} was not declared in hello")
        return session.namespace.spaces[group]

    def _scheduler(self, connection: int) -> Session:
        session = self._session(connection)
        if session.scheduler != connection:
            raise Rejected("protocol", "only the scheduler's connection of a session may do this")
        return session

    def _new_ticket(self, session: Session, ticket: int) -> None:
        if ticket in session.writes or ticket in session.leases:
            raise Rejected("protocol", f"ticket {ticket} is in use")

    def _lookup(self, event: ev.Lookup, now: float, out: list[ev.Effect]) -> None:
        session = self._session(event.connection)
        space = self._space(session, event.group, event.keys)
        if event.touch:
            states, found = self.transfers.find(space, event.keys)
            self.transfers.arrive(session, space, event.request, found, now)
            self.transfers.count(space, states, len(event.keys))
        else:
            states = self.transfers.look(space, event.keys)
        out.append(ev.Looked(event.connection, event.call, states))

    def _lease(self, event: ev.Lease, now: float, out: list[ev.Effect]) -> None:
        session = self._scheduler(event.connection)
        space = self._space(session, event.group, event.keys)
        self._new_ticket(session, event.ticket)
        states, found = self.transfers.find(space, event.keys)
        if event.touch:
            self.transfers.arrive(session, space, event.request, found, now)
        states, slots = self.transfers.lease(session, event.ticket, space, states, found, prefix=event.prefix)
        if event.touch:
            self.transfers.count(space, states, len(event.keys))
        lengths = tuple(space.slab.lengths[n] for n in slots)
        out.append(ev.Leased(event.connection, event.call, states, slot_run(space.slab, slots), lengths))

    def _release(self, event: ev.Release, now: float, out: list[ev.Effect]) -> None:
        session = self._scheduler(event.connection)
        marks = Marks()
        for number in event.tickets:
            lease = session.leases.get(number)
            if lease is not None and lease.owner == session.head:
                self.transfers.end_lease(lease, now, marks, released=True)
        marks.flush(out)

    def _allocate(self, event: ev.Allocate, now: float, out: list[ev.Effect]) -> None:
        session = self._scheduler(event.connection)
        space = self._space(session, event.group, event.keys)
        self._new_ticket(session, event.ticket)
        if not session.room_for_tickets():
            raise Rejected("limit", "too many tickets in flight: seal, abort or release some first")
        ticket = WriteTicket(session, event.ticket, space, [], [], event.request, event.priority)
        ticket.owner, ticket.hold_until = session.head, self.restoration.grace_until
        states = self.transfers.allocate(ticket, event.keys, now, out)
        out.append(ev.Allocated(event.connection, event.call, states, slot_run(space.slab, ticket.slots)))
        self.extents.offer(space.slab, now, out)

    def _seal(self, event: ev.Seal, now: float, out: list[ev.Effect]) -> None:
        session = self._scheduler(event.connection)
        ticket = session.writes.get(event.ticket)
        if ticket is None or ticket.waiting is not None:
            out.append(ev.Sealed(event.connection, event.call, ok=False))
            return
        if len(event.lengths) != len(ticket.slots):
            raise Rejected("protocol", f"{len(event.lengths)} lengths for {len(ticket.slots)} slots")
        if not all(0 <= length <= ticket.space.chunk_bytes for length in event.lengths):
            raise Rejected("protocol", f"a chunk has 0 to {ticket.space.chunk_bytes} bytes in this namespace")
        self.transfers.seal(ticket, event.lengths, now, out)
        out.append(ev.Sealed(event.connection, event.call, ok=True))

    def _abort(self, event: ev.Abort, _now: float, out: list[ev.Effect]) -> None:
        session = self._scheduler(event.connection)
        marks = Marks()
        for number in event.tickets:
            ticket = session.writes.get(number)
            if ticket is not None and ticket.waiting is None:
                self.transfers.abort(ticket, marks)
        marks.flush(out)

    def _done(self, event: ev.Done, now: float, out: list[ev.Effect]) -> None:
        session = self._session(event.connection)
        member = self.sessions.member_of(event.connection)
        if member[0] is None:
            return
        for number in event.tickets:
            ticket = session.writes.get(number)
            if ticket is not None:
                ticket.done.add(member)
                if ticket.waiting is not None:
                    ticket.waiting.discard(member)
                    self._settle_quarantined(ticket, now, out)

    def _end_requests(self, event: ev.EndRequests, _now: float, _out: list[ev.Effect]) -> None:
        session = self._session(event.connection)
        for number in event.requests:
            session.requests.pop(number, None)

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _connection_lost(self, event: ev.ConnectionLost, now: float, out: list[ev.Effect]) -> None:
        self._lose(event.connection, now)
        for ticket in list(self._quarantined):
            self._settle_quarantined(ticket, now, out)
        self._forget_finished()

    def _lose(self, connection: int, now: float) -> None:
        session = self.sessions.leave(connection, now)
        self._welcomes = [w for w in self._welcomes if w[2].connection != connection]
        if session is None or session.scheduler != connection:
            return
        session.scheduler = None
        for ticket in session.writes.values():
            if ticket.waiting is None:
                self.transfers.quarantine(ticket, now)
                self._quarantined[ticket] = None

    def _process_died(self, event: ev.ProcessDied, now: float, out: list[ev.Effect]) -> None:
        self.extents.unmap_all(event.process)
        for session in self.sessions.of_process(event.process):
            session.processes.discard(event.process)
            for connection in self.sessions.connections_of(session, event.process):
                # a child of the dead may keep the socket open, but it isn't who said hello
                self._lose(connection, now)
            self._forget_members(session, event.process, now, out)
            if not session.processes and not session.timed:
                self._end_everything(session, now, out)
        self._forget_finished()
        self.extents.plan(now, out)

    def _forget_members(self, session: Session, process: int, now: float, out: list[ev.Effect]) -> None:
        """Members of a dead process use nothing any more."""
        gone = {member for member in session.members if member[0] == process}
        for member in gone:
            del session.members[member]
            session.past.pop(member, None)
        for ticket in list(session.writes.values()):
            if ticket.waiting is not None:
                ticket.waiting -= gone
                self._settle_quarantined(ticket, now, out)
        marks = Marks()
        for lease in list(session.leases.values()):
            if lease.waiting is None and lease.owner in gone and not session.timed:
                lease.waiting = session.users(lease.owner)
            if lease.waiting is not None:
                lease.waiting -= gone
                if not lease.waiting:
                    self.transfers.end_lease(lease, now, marks, released=True)
        marks.flush(out)

    def _settle_quarantined(self, ticket: WriteTicket, now: float, out: list[ev.Effect]) -> None:
        """Free a quarantined ticket's slots if nobody can write them any more."""
        if ticket.waiting or now < ticket.hold_until:
            return
        if ticket.session.timed and now < ticket.since + self.settings.quarantine_s:
            return
        del self._quarantined[ticket]
        marks = Marks()
        self.transfers.abort(ticket, marks)
        marks.flush(out)

    def _end_everything(self, session: Session, now: float, out: list[ev.Effect]) -> None:
        """Every process of the session is known dead: nobody reads or writes."""
        marks = Marks()
        for lease in list(session.leases.values()):
            self.transfers.end_lease(lease, now, marks, released=True)
        for ticket in list(session.writes.values()):
            if now >= ticket.hold_until:
                self._quarantined.pop(ticket, None)
                self.transfers.abort(ticket, marks)
        marks.flush(out)

    def _forget_finished(self) -> None:
        for session in [s for s in self.sessions.by_name.values() if s.finished()]:
            self.sessions.forget(session)

    # --- extents and time -------------------------------------------------------------------------------------------

    def _extent_came(self, note: Callable[[], None], now: float, out: list[ev.Effect]) -> None:
        note()
        self.extents.plan(now, out)
        self._send_welcomes(now, out)

    def _damaged(self, event: ev.ExtentDamaged, now: float, out: list[ev.Effect]) -> None:
        if self.extents.find(event.extent) is not None:
            self.extents.damage(event.extent, now, out)

    def _restored(self, event: ev.ExtentRestored, now: float, out: list[ev.Effect]) -> None:
        fits = len(event.columns.states) == self.settings.extent_bytes // max(1, event.slot_bytes)
        if not fits or not self.quotas.knows(event.tenant):
            self.extents.dropping[event.extent] = event.tenant
            out.append(ev.DropExtent(event.extent))
            return
        self.restoration.extent(event, now + self.settings.restart_grace_s, out)

    def _namespaces_restored(self, event: ev.NamespacesRestored, _now: float, _out: list[ev.Effect]) -> None:
        for record in event.records:
            fits = slot_bytes_for(max(record.chunk_bytes)) <= self.settings.extent_bytes // 2
            if fits and self.quotas.knows(record.tenant):
                slabs = [self.extents.slab(record.tenant, slot_bytes_for(size)) for size in record.chunk_bytes]
                self.index.declare(record, slabs)

    def _started(self, _event: ev.Started, now: float, out: list[ev.Effect]) -> None:
        self.restoration.finish(now, self.settings.restart_grace_s)
        self.transfers.may_evict = self.extents.may_move = not self.in_grace(now)
        self._orphans_until = now + self.settings.quarantine_s
        self.extents.growing = True
        self.extents.plan(now, out)

    def _tick(self, _event: ev.Tick, now: float, out: list[ev.Effect]) -> None:
        self.transfers.may_evict = self.extents.may_move = not self.in_grace(now)
        if now >= self._orphans_until:
            self.restoration.free_orphans(out)
        for ticket in list(self._quarantined):
            self._settle_quarantined(ticket, now, out)
        for session in list(self.sessions.by_name.values()):
            gone = not session.connections and not session.processes
            if gone and session.leases and now >= session.lost_at + self.settings.quarantine_s:
                self._end_leases(session, list(session.leases), now, out)
        self._forget_finished()
        self.extents.plan(now, out)
        self._send_welcomes(now, out)
        if now >= self._saved_at + SAVE_LAST_USE_S:
            self._saved_at = now
            self.extents.save_last_use(out)

    # --- looking in -------------------------------------------------------------------------------------------------

    def being_written(self, event: ev.Lookup | ev.Lease) -> bool:
        """Is any of the keys asked for being written? Then its seal may be on its way, on another connection."""
        session = self.sessions.by_connection.get(event.connection)
        if session is None or event.group >= len(session.namespace.spaces):
            return False
        writing = session.namespace.spaces[event.group].writing
        return bool(writing) and not writing.keys().isdisjoint(event.keys)

    def extents_of(self, tenant: str, slot_bytes: set[int]) -> list[tuple[int, int, int]]:
        """(extent, slot size in bytes, slots) that a client of these classes maps."""
        return self.extents.usable(tenant, slot_bytes)

    def extents_version(self, tenant: str) -> int:
        """Changes whenever `extents_of` does."""
        return self.extents.versions[tenant]

    def namespaces(self, tenant: str | None = None) -> tuple[ev.NamespaceRecord, ...]:
        """What was declared, by one tenant or by all."""
        return self.index.records(tenant)

    def snapshot(self, tenant: str | None, now: float) -> dict[str, Any]:
        """Plain values for operators (`core.snapshot`)."""
        return snapshot(self, tenant, now)

    def in_grace(self, now: float) -> bool:
        """Is it so soon after a restart that nothing may be evicted?"""
        return now < self.restoration.grace_until

    def check_invariants(self) -> None:
        """From Started on, every structure agrees with every other; AssertionError with the story otherwise."""
        self.index.check_invariants()
        self.sessions.check_invariants()
        self.extents.check_invariants()
        self._check_holders()

    def _check_holders(self) -> None:
        """Every writing slot has one ticket, every lease count its leases, every quarantined slot a reason."""
        written: dict[tuple[int, int], WriteTicket | None] = {}
        leased: dict[tuple[int, int], int] = {}
        for session in self.sessions.by_name.values():
            for ticket in session.writes.values():
                assert (ticket.waiting is not None) == (ticket in self._quarantined)
                for n in ticket.slots:
                    place = id(ticket.space.slab), n
                    assert place not in written, f"slot {n} has two writers"
                    written[place] = ticket
                    quarantined = ticket.waiting is not None
                    state = SlotState.QUARANTINED if quarantined else SlotState.WRITING
                    assert ticket.space.slab.states[n] == state
            for lease in session.leases.values():
                for n in lease.slots:
                    leased[id(lease.slab), n] = leased.get((id(lease.slab), n), 0) + 1
        for slab, n in self.restoration.orphans.values():
            assert (id(slab), n) not in written, f"orphan {n} has a writer"
            written[id(slab), n] = None
        for slab in self.extents.slabs.values():
            self._check_columns(slab, written, leased)

    @staticmethod
    def _check_columns(
        slab: SlabClass, written: dict[tuple[int, int], WriteTicket | None], leased: dict[tuple[int, int], int]
    ) -> None:
        for n, (state, leases) in enumerate(zip(slab.states, slab.leases, strict=True)):
            assert leases == leased.get((id(slab), n), 0), f"slot {n} counts {leases} leases"
            assert (state in WRITABLE) == ((id(slab), n) in written), f"slot {n} in state {state} has no writer"
            assert not leases or state == SlotState.SEALED, f"slot {n} is leased in state {state}"
