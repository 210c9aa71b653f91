"""What happens to chunks: allocate, seal, abort, quarantine, lease, release, evict, touch.

Covers: every change of a slot that a client causes. Not here: who may speak for which session (`core.node`), where
extents come from (`core.extents`). Table marks are collected per call and leave in one effect per extent and kind.

Invariants kept here: a key is in `Space.sealed` exactly while its slot is sealed in a usable extent and tracked by the
policy; a key is in `Space.writing` exactly while an owned ticket writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from cachesvc.core.events import Effect, MarkFree, MarkSealed, MarkWriting, SlotRun
from cachesvc.core.index import Index, Namespace, Space
from cachesvc.core.rings import no_trail
from cachesvc.core.sessions import (
    LEASED_KEYS_PER_SESSION_MAX,
    LeaseTicket,
    Line,
    Member,
    Session,
    Sessions,
    WriteTicket,
)
from cachesvc.core.slots import SlabClass
from cachesvc.types import KEY_MISS_FIRST, AllocateState, KeyState, Priority

TAINTED_PASSED_MAX: Final = 16
"""Chunks whose slots must rest first that the search for one slot throws away; beyond it the key says RETRY."""

REFRESH_S: Final = 1.0
REFRESH_SLOT_S: Final = 1e-3
"""An allocation moves what its request has to the hot end again this long (plus this long a slot) after it arrived or
was moved: that costs 1 us a slot, and the order among them is right without."""

_RAM = bytes([KeyState.RAM])
_ABSENT = bytes(1)


class Marks:
    """Slots to mark *free* at their (raised) generations; one effect an extent."""

    def __init__(self) -> None:
        self._free: dict[SlabClass, list[int]] = {}

    def free(self, slab: SlabClass, n: int) -> None:
        """Slot number `n` is free."""
        self._free.setdefault(slab, []).append(n)

    def flush(self, out: list[Effect]) -> None:
        """Hand them over."""
        for slab, numbers in self._free.items():
            for extent, slots, some in by_extent(slab, numbers):
                out.append(MarkFree(extent, slots, generations_of(slab, some)))


def by_extent(slab: SlabClass, numbers: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...], list[int]]]:
    """(extent, slots in it, their slot numbers) for each extent, in the order of first appearance."""
    per = slab.slots_per_extent
    groups: dict[int, list[int]] = {}
    for n in numbers:
        groups.setdefault(n // per, []).append(n)
    for some in groups.values():
        yield slab.extent_of(some[0]).number, tuple([n % per for n in some]), some


def generations_of(slab: SlabClass, numbers: Sequence[int]) -> tuple[int, ...]:
    """What these slots' generations are now."""
    return tuple(map(slab.generations.__getitem__, numbers))


def slot_run(slab: SlabClass, numbers: Sequence[int]) -> SlotRun:
    """How everybody else names these slot numbers."""
    per = slab.slots_per_extent
    extents = {ordinal: slab.extent_of(ordinal * per).number for ordinal in {n // per for n in numbers}}
    return SlotRun(
        tuple([extents[n // per] for n in numbers]),
        tuple([n % per for n in numbers]),
        generations_of(slab, numbers),
    )


class Transfers:
    """Moves slots for sessions. Owned by the node; `may_evict` is False in the grace time after a restart, `more_soon`
    says that a class gets an extent in a moment, `growth` how many slots it may get without taking any from others."""

    def __init__(
        self,
        index: Index,
        sessions: Sessions,
        more_soon: Callable[[SlabClass], bool],
        growth: Callable[[SlabClass], int],
    ) -> None:
        self.index = index
        self.sessions = sessions
        self.may_evict = True
        self._more_soon = more_soon
        self._growth = growth

    # --- looking ----------------------------------------------------------------------------------------------------

    def look(self, space: Space, keys: list[bytes]) -> bytes:
        """One `KeyState` byte a key. Asks for no slot numbers: a quarter of a lookup's time goes into touching them."""
        return self._explain(space, keys, bytes(map(space.sealed.__contains__, keys)))

    def find(self, space: Space, keys: list[bytes]) -> tuple[bytes, list[int | None]]:
        """One `KeyState` byte a key, and the slot numbers."""
        found = list(map(space.sealed.get, keys))
        if None not in found:
            return _RAM * len(keys), found
        return self._explain(space, keys, bytes([n is not None for n in found])), found

    @staticmethod
    def _explain(space: Space, keys: list[bytes], present: bytes) -> bytes:
        """States of keys; `present` has a byte of each: 1, which is KeyState.RAM, or 0, which becomes a reason."""
        if 0 not in present:
            return present
        why = space.absent_state_of_all()
        if why is not None:
            return present.replace(_ABSENT, bytes([why]))
        absent = space.absent_state
        return bytes([state or absent(key) for key, state in zip(keys, present, strict=True)])

    def arrive(self, session: Session, space: Space, number: int, found: Sequence[int | None], now: float) -> None:
        """The arrival of a request: each resident chunk of it is touched once, deepest coldest: that is to go first.

        A later batch of the same request touches what the earlier ones didn't have, and goes behind them.
        """
        line = session.request(number).line(space.slab)
        slots = line.missing(found)
        space.slab.eviction.touch_all(slots, line.trail)
        self._follow(session, line, slots, now)

    @staticmethod
    def count(space: Space, states: bytes, keys: int) -> None:
        """Count an arrival: keys behind the end of `states` (a leading run that ended) share its last reason."""
        counts = space.namespace.counts
        hits = states.count(_RAM)
        counts.hits += hits
        if hits == keys:
            return
        for state in states:
            if state >= KEY_MISS_FIRST:
                counts.misses[KeyState(state)] += 1
        if states and len(states) < keys and states[-1] >= KEY_MISS_FIRST:
            counts.misses[KeyState(states[-1])] += keys - len(states)

    # --- reading ----------------------------------------------------------------------------------------------------

    def lease(
        self, session: Session, ticket: int, space: Space, states: bytes, found: Sequence[int | None], *, prefix: bool
    ) -> tuple[bytes, list[int]]:
        """Lease what `states` calls RAM; answers the states, shortened to the leading run and its first gap if
        `prefix`, and the slot numbers leased. What the session's cap refuses says NO_ROOM."""
        if prefix:
            run = len(states) - len(states.lstrip(_RAM))
            states, found = states[: run + 1], found[: run + 1]
        slab = space.slab
        slots = [n for n in found if n is not None]
        refused = self._refused(session, slab, slots)
        if refused:
            states, slots = _refuse_leases(states, slots, refused, prefix=prefix)
        if slots:
            self.hold(session, ticket, slab, slots, session.head)
            counts = space.namespace.counts
            counts.loads += len(slots)
            counts.loaded_bytes += sum(map(slab.lengths.__getitem__, slots))
        return states, slots

    def _refused(self, session: Session, slab: SlabClass, slots: list[int]) -> set[int]:
        """Slots that the session may not lease now: those it doesn't hold already and that its cap has no room for."""
        held = session.holding(slab)
        if not session.room_for_tickets() or held.leased_keys + len(slots) > LEASED_KEYS_PER_SESSION_MAX:
            return set(slots)
        growth = self._growth(slab)
        room = self.sessions.room(session, slab, len(held.leases), growth)
        unheld = self.sessions.unheld(session, slab, growth)
        if len(slots) <= min(room, unheld):
            return set()
        refused = set()
        for n in dict.fromkeys(n for n in slots if n not in held.leases):
            # what others read already takes nothing from anybody
            taken = not slab.leases[n]
            if room <= 0 or (taken and unheld <= 0):
                refused.add(n)
            else:
                room -= 1
                unheld -= taken
        return refused

    @staticmethod
    def hold(session: Session, ticket: int, slab: SlabClass, slots: list[int], owner: Member | None) -> LeaseTicket:
        """The session reads these slots from now on, under a new ticket."""
        slab.lease(slots)
        held = session.holding(slab)
        leases = held.leases
        for n in slots:
            leases[n] = leases.get(n, 0) + 1
        held.leased_keys += len(slots)
        lease = session.leases[ticket] = LeaseTicket(session, ticket, slab, slots, owner)
        return lease

    def end_lease(self, ticket: LeaseTicket, now: float, marks: Marks, *, released: bool) -> None:
        """The reader is gone. Chunks of draining extents go with their last lease; parked ones may be evicted again."""
        slab = ticket.slab
        del ticket.session.leases[ticket.number]
        held = ticket.session.holding(slab)
        held.leased_keys -= len(ticket.slots)
        for n in ticket.slots:
            held.leases[n] -= 1
            if not held.leases[n]:
                del held.leases[n]
            if not slab.unlease(n, released=released):
                continue
            if slab.extent_of(n).draining:
                slab.unseal(n, now)
                marks.free(slab, n)
            else:
                slab.eviction.unpark(n)

    # --- writing ----------------------------------------------------------------------------------------------------

    def allocate(self, ticket: WriteTicket, keys: list[bytes], now: float, out: list[Effect]) -> bytes:
        """Slots for `keys`, in prefix order, into the (empty) ticket; one `AllocateState` byte a key.

        Once a key found no room, nothing later gets a slot: a chunk behind a hole can't be reached.
        """
        session, space = ticket.session, ticket.space
        slab = space.slab
        line = session.request(ticket.request).line(slab)
        if line.slots and now >= line.refresh_at:
            self._refresh(line, now)
        # all of them before the first slot is sought: none may be evicted for another
        session.note(line, line.missing(map(space.sealed.get, keys)))
        marks = Marks()
        may_evict = self.may_evict and not self._more_soon(slab)
        growth = self._growth(slab)
        room = self.sessions.room(session, slab, session.holding(slab).writing, growth)
        room = min(room, self.sessions.unheld(session, slab, growth))
        states = bytearray()
        closed: AllocateState | None = None
        for key in keys:
            if key in space.sealed:
                states.append(AllocateState.PRESENT)
                continue
            if key in space.writing:
                states.append(AllocateState.BUSY)
                continue
            n = None
            if closed is None and len(ticket.slots) >= room:
                closed = AllocateState.RETRY
            elif closed is None:
                n = slab.take_free(now)
                if n is None and may_evict:
                    n = self._evict(line, ticket, now, marks)
            if n is None:
                closed = closed or self._why_no_slot(slab)
                states.append(closed)
                continue
            ticket.keys.append(key)
            ticket.slots.append(n)
            space.writing[key] = ticket
            states.append(AllocateState.NEW)
        if ticket.slots:
            session.writes[ticket.number] = ticket
            session.holding(slab).writing += len(ticket.slots)
        refused = sum(1 for state in states if state >= AllocateState.RETRY)
        if ticket.slots or refused:
            slab.asked_at = now
        slab.burst = max(len(ticket.slots) + refused, slab.burst - slab.burst // 8)
        space.namespace.counts.refused += refused
        marks.flush(out)
        for extent, slots, some in by_extent(slab, ticket.slots):
            out.append(MarkWriting(extent, slots, generations_of(slab, some)))
        return bytes(states)

    def _evict(self, line: Line, ticket: WriteTicket, now: float, marks: Marks) -> int | None:
        """Take a slot from the chunk that is to go first, but not from the ticket's own request."""
        slab = line.slab
        for _ in range(TAINTED_PASSED_MAX + 1):
            n = slab.eviction.evict(ticket.priority, slab.leased, line.slots)
            if n is None and line.forget_stale():
                n = slab.eviction.evict(ticket.priority, slab.leased, line.slots)
            if n is None:
                if ticket.priority is Priority.INTERACTIVE:
                    # all is in use: that is pressure too, else a class of nothing but leases would never get more
                    slab.evicted_at = slab.evicted_last_use = now
                return None
            self.index.forget_slot(slab, n).namespace.counts.evictions += 1
            slab.evicted_at, slab.evicted_last_use = now, slab.last_use[n]
            if n not in slab.tainted:
                slab.reuse(n)
                return n
            slab.unseal(n, now)
            marks.free(slab, n)
        return None

    def drop(self, namespace: Namespace, now: float, out: list[Effect]) -> None:
        """Give up every chunk of a namespace that nobody holds."""
        marks = Marks()
        for space in namespace.spaces:
            for n in list(space.sealed.values()):
                self.index.forget_slot(space.slab, n).namespace.counts.evictions += 1
                space.slab.eviction.remove(n)
                space.slab.unseal(n, now)
                marks.free(space.slab, n)
        marks.flush(out)

    def _why_no_slot(self, slab: SlabClass) -> AllocateState:
        """RETRY if waiting a moment can help without anybody's doing."""
        soon = slab.limbo or not self.may_evict or not slab.slot_count or self._more_soon(slab)
        return AllocateState.RETRY if soon else AllocateState.NO_ROOM

    def seal(self, ticket: WriteTicket, lengths: Sequence[int], now: float, out: list[Effect]) -> None:
        """Make the chunks of an owned ticket readable, the deepest the coldest, what its request has already hotter."""
        space, session = ticket.space, ticket.session
        slab = space.slab
        self._settle(ticket)
        marks = Marks()
        kept: dict[int, tuple[bytes, int]] = {}
        for n, key, length in zip(ticket.slots, ticket.keys, lengths, strict=True):
            if key in space.sealed or slab.extent_of(n).draining:
                slab.abort(n)
                marks.free(slab, n)
                continue
            slab.seal(n, space.number, key, length)
            space.sealed[key] = n
            kept[n] = key, length
        counts = space.namespace.counts
        counts.stores += len(kept)
        counts.stored_bytes += sum(length for _, length in kept.values())
        space.new = space.new and not kept
        numbers = list(kept)
        for n in numbers:
            slab.eviction.insert(n, space.digest(kept[n][0]), ticket.priority)
        request = session.requests.get(ticket.request)
        line = Line(slab) if request is None else request.line(slab)
        slab.eviction.refresh_all(numbers, line.trail)
        self._follow(session, line, numbers, now)
        for extent, slots, some in by_extent(slab, numbers):
            keys, sizes = zip(*[kept[n] for n in some], strict=True)
            generations = generations_of(slab, some)
            namespace = space.namespace.record.namespace
            out.append(MarkSealed(extent, slots, generations, namespace, space.group, keys, sizes))
        marks.flush(out)

    def abort(self, ticket: WriteTicket, marks: Marks) -> None:
        """Nobody writes its slots any more: they are free again."""
        self._settle(ticket)
        slab = ticket.space.slab
        ticket.space.namespace.counts.aborts += len(ticket.slots)
        for n in ticket.slots:
            slab.abort(n)
            marks.free(slab, n)

    def _settle(self, ticket: WriteTicket) -> None:
        del ticket.session.writes[ticket.number]
        ticket.session.holding(ticket.space.slab).writing -= len(ticket.slots)
        self._unlist(ticket)

    @staticmethod
    def _unlist(ticket: WriteTicket) -> None:
        for key in ticket.keys:
            if ticket.space.writing.get(key) is ticket:
                del ticket.space.writing[key]

    # --- a writer is lost -------------------------------------------------------------------------------------------

    def quarantine(self, ticket: WriteTicket, now: float) -> None:
        """The scheduler's connection is lost: nobody will seal it, its living members may still write."""
        ticket.waiting = ticket.session.users(ticket.owner) - ticket.done
        ticket.since = now
        self._unlist(ticket)
        for n in ticket.slots:
            ticket.space.slab.quarantine(n)

    def own_again(self, ticket: WriteTicket) -> None:
        """Its session came back and named it."""
        ticket.waiting = None
        slab = ticket.space.slab
        for key, n in zip(ticket.keys, ticket.slots, strict=True):
            slab.own_again(n)
            ticket.space.writing.setdefault(key, ticket)

    # --- recency ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _follow(session: Session, line: Line, slots: list[int], now: float) -> None:
        """A request has these slots, too, and they stand behind what it had."""
        if not line.slots:
            line.refresh_at = now + REFRESH_S + len(slots) * REFRESH_SLOT_S
        line.stamp = line.slab.used(slots, min(now, line.stamp))
        session.note(line, slots)

    @staticmethod
    def _refresh(line: Line, now: float) -> None:
        """Move what a request has to the hot end, without counting it as another use."""
        line.forget_stale()
        slots = list(line.slots)
        line.trail = no_trail()
        line.slab.eviction.refresh_all(slots, line.trail)
        line.stamp = line.slab.used(slots, now)
        line.refresh_at = now + REFRESH_S + len(slots) * REFRESH_SLOT_S


def _refuse_leases(states: bytes, slots: list[int], refused: set[int], *, prefix: bool) -> tuple[bytes, list[int]]:
    """Turn the RAM states of refused slots into NO_ROOM; a leading run ends there."""
    no_room = bytes([KeyState.NO_ROOM])
    if prefix:
        run = next(i for i, n in enumerate(slots) if n in refused)
        return states[:run] + no_room, slots[:run]
    each = iter(slots)
    answer = bytes(KeyState.NO_ROOM if state == KeyState.RAM and next(each) in refused else state for state in states)
    return answer, [n for n in slots if n not in refused]
