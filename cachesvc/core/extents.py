"""Which slab class has which extents: making spares, growing, draining, moving.

Covers: the arena's budget of `extents_max` equal extents. Not here: slots inside an extent (`core.slots`), files
(`arena.host`), tenants' shares (`core.quota`).

An extent's life; every arrow but the dashed ones is an effect that the runner carries out and answers::

    MakeSpare            FormatExtent                   drain - - (nothing leased, writing, quarantined)
   ---------> SPARE ------------------> USED - - - - -> DRAINING --+--> FormatExtent as a new extent of the same tenant
                                                                   +--> DropExtent -> RETIRING - - (all clients unmapped
                                                                        or dead) - -> its bytes are free: MakeSpare

A `Move` says who gets the bytes of a draining extent. Inside a tenant it ends when the extent is handed on. Between
tenants the bytes come back with other numbers, maybe much later, and the move lasts until the receiver has them::

                 in use, DRAINING         DropExtent, RETIRING        free, SPARE being made       FormatExtent
    move begins ------------------> held ----------------------> promised -----------------------> move ends, the
                 |    charged to the donor, to come for the receiver   |  charged to the receiver    receiver rests
                 |                                                     +--> nobody of the receiver is there: a spare
                 +--> `MOVE_PATIENCE_S` are over, or the extent was damaged: forgotten, the bytes become a spare
                      of nobody's

While it lasts (a promise always, the rest for `MOVE_PATIENCE_S`) neither its donor gives nor its receiver gets another
extent across tenants, and while it drains neither moves any. Whoever is slow to unmap what was taken delays one move
and not more: an extent that such a process maps isn't taken as long as it hasn't.

Rules (design §5): an active class without an extent gets one before any class gets its second. A class grows while
there are spares. Then extents move: the one whose hottest slots are coldest, one at a time per tenant, and only if the
receiver evicts chunks younger than half the age of the donor's oldest. The factor makes it stable under even load:
moving an extent from n to n-1 and m to m+1 changes the ages' ratio by less than 4 wherever the donor keeps at least one
extent, so the opposite move can't be due right after it. Under uneven load two more rules do: what a class evicted
before it got an extent says nothing of how it fares with it, and a class that got one rests before it gives one.

What a tenant's clients damage is charged to the tenant as long as they map it: until then it grows to its even share at
the most and, but for what it is guaranteed, gets nothing that another tenant has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np

from cachesvc.core.events import DropExtent, Effect, FormatExtent, MakeSpare, SaveLastUse
from cachesvc.core.index import Index
from cachesvc.core.quota import Quotas
from cachesvc.core.sessions import Sessions
from cachesvc.core.slots import Extent, SlabClass, SlotState
from cachesvc.core.transfers import Marks

RETRY_MAKING_S: Final = 10.0
"""After memory for an extent was refused, ask again no sooner."""

PRESSURE_S: Final = 10.0
"""A class is under pressure while it evicted within this time."""

AGE_FACTOR: Final = 2.0

MOVE_PATIENCE_S: Final = 10.0
"""A move that waits longer for a holder holds up no other; from then on only extents that nobody holds are chosen."""

MOVE_REST_S: Final = 10.0
"""A class that got an extent of another gives none away for so long, however uneven the load is meanwhile."""

BURSTS_AHEAD: Final = 2
EXTENTS_AHEAD_MAX: Final = 4
"""A class is given extents until it has room for so many allocations as large as they were of late: an engine stores
what a step computed in one go, and a chunk that finds no room then makes everything behind it useless."""

CLASSES_PER_TENANT_MAX: Final = 256


@dataclass(slots=True)
class Move:
    """Who gets the bytes of an extent, and whose it was."""

    donor: str
    receiver: SlabClass
    since: float


class Extents:
    """Every extent of the arena. Owned by the node."""

    def __init__(
        self, index: Index, sessions: Sessions, quotas: Quotas, extent_bytes: int, eviction: str, next_extent: int
    ) -> None:
        self._index = index
        self._sessions = sessions
        self._quotas = quotas
        self.extent_bytes = extent_bytes
        self._eviction = eviction
        self._next = next_extent
        self.slabs: dict[tuple[str, int], SlabClass] = {}
        self.used: dict[int, tuple[SlabClass, Extent]] = {}
        self.spares: list[int] = []
        self.making: int | None = None
        self.formatting: dict[int, SlabClass] = {}
        self.moves: dict[int, Move] = {}
        """By the extent that the bytes were in; one that is nowhere any more was freed: a promise."""
        self.dropping: dict[int, str] = {}
        self.retiring: dict[int, str] = {}
        self.mapped: dict[int, set[tuple[int, int]]] = {}
        """Extent -> (process, extent number that it knows these bytes by): a moved extent keeps its data file."""
        self._renamed: dict[int, int] = {}
        self._damaged: dict[int, str] = {}
        """Extents, and the tenant whose clients damaged them, until their bytes are free."""
        self.versions: Counter[str] = Counter()
        self.moved = 0
        self._refused_until = float("-inf")
        self.growing = False
        self.may_move = True
        """False in the grace time after a restart, when somebody unknown may read any extent."""

    # --- classes ----------------------------------------------------------------------------------------------------

    def slab(self, tenant: str, slot_bytes: int) -> SlabClass:
        """The class of that slot size, made if it is new."""
        found = self.slabs.get((tenant, slot_bytes))
        if found is None:
            found = SlabClass(tenant, slot_bytes, self.extent_bytes // slot_bytes, self._eviction)
            self.slabs[tenant, slot_bytes] = found
        return found

    def room(self, tenant: str, sizes: set[int]) -> bool:
        """May this tenant have classes of these slot sizes? Forgets classes that nobody uses if that makes room."""
        mine = {size: slab for (owner, size), slab in self.slabs.items() if owner == tenant}
        if len(mine.keys() | sizes) <= CLASSES_PER_TENANT_MAX:
            return True
        declared = {id(space.slab) for space in self._index.spaces.values()}
        receiving = {id(move.receiver) for move in self.moves.values()}
        for size, slab in mine.items():
            empty = not slab.coming and all(extent is None for extent in slab.extents)
            if empty and size not in sizes and id(slab) not in declared | receiving:
                del self.slabs[tenant, size]
        left = {size for owner, size in self.slabs if owner == tenant}
        return len(left | sizes) <= CLASSES_PER_TENANT_MAX

    def usable(self, tenant: str, slot_bytes: set[int]) -> list[tuple[int, int, int]]:
        """(extent, slot size, slots) of a tenant's extents in these classes; draining ones are still mapped."""
        return [
            (number, slab.slot_bytes, slab.slots_per_extent)
            for number, (slab, _) in self.used.items()
            if slab.tenant == tenant and slab.slot_bytes in slot_bytes
        ]

    def find(self, number: int) -> tuple[SlabClass, Extent] | None:
        """The class and record of an extent in use."""
        return self.used.get(number)

    def counts(self) -> Counter[str]:
        """Extents that each tenant is charged for: those that it has, those promised to it, and those that it had and
        its clients still map."""
        counts: Counter[str] = Counter()
        counts.update(slab.tenant for slab, _ in self.used.values())
        counts.update(slab.tenant for slab in self.formatting.values())
        counts.update(self.dropping.values())
        counts.update(self.retiring.values())
        counts.update(move.receiver.tenant for number, move in self.moves.items() if not self._taken(number))
        return counts

    def _after_moves(self) -> Counter[str]:
        """`counts` when every move has come to its end."""
        counts = self.counts()
        for number, move in self.moves.items():
            if self._taken(number):
                counts[move.donor] -= 1
                counts[move.receiver.tenant] += 1
        return counts

    def _taken(self, number: int) -> bool:
        """Are the bytes of an extent that was in use still taken?"""
        return number in self.used or number in self.dropping or number in self.retiring

    def total(self) -> int:
        """Extents whose bytes are taken or about to be."""
        pending = len(self.formatting) + len(self.dropping) + len(self.retiring)
        return len(self.used) + len(self.spares) + (self.making is not None) + pending

    # --- what the runner reports ------------------------------------------------------------------------------------

    def spare_made(self, number: int) -> None:
        """Answers MakeSpare."""
        self.making = None
        self.spares.append(number)

    def failed(self, number: int, now: float) -> None:
        """Making or formatting was refused; nothing is left of the extent."""
        slab = self.formatting.pop(number, None)
        if slab is not None:
            slab.coming -= 1
            if number in self.mapped:
                self.retiring[number] = slab.tenant
        if self.making == number:
            self.making = None
        self._refused_until = now + RETRY_MAKING_S

    def formatted(self, number: int) -> None:
        """Answers FormatExtent: the class has one more."""
        slab = self.formatting.pop(number)
        slab.coming -= 1
        self.used[number] = slab, slab.add_extent(number)
        self.versions[slab.tenant] += 1

    def dropped(self, number: int) -> None:
        """Answers DropExtent: its bytes come back when nobody maps it any more."""
        tenant = self.dropping.pop(number)
        if self.mapped.get(number):
            self.retiring[number] = tenant
        else:
            self.mapped.pop(number, None)

    def map(self, process: int, extents: tuple[int, ...]) -> None:
        """A process got descriptors."""
        for number in extents:
            self.mapped.setdefault(self._renamed.get(number, number), set()).add((process, number))

    def unmap(self, process: int, extents: tuple[int, ...]) -> None:
        """A process gave extents up."""
        for number in extents:
            self._unmap(self._renamed.get(number, number), {(process, number)})

    def unmap_all(self, process: int) -> None:
        """A process died."""
        for number, holders in list(self.mapped.items()):
            self._unmap(number, {holder for holder in holders if holder[0] == process})

    def _unmap(self, number: int, gone: set[tuple[int, int]]) -> None:
        holders = self.mapped.get(number)
        if holders is None:
            return
        holders -= gone
        if not holders:
            del self.mapped[number]
            self.retiring.pop(number, None)
            self._renamed = {old: new for old, new in self._renamed.items() if new != number}

    # --- draining ---------------------------------------------------------------------------------------------------

    def damage(self, number: int, now: float, out: list[Effect]) -> None:
        """A client damaged it: it goes, though it was to move."""
        self._damaged[number] = self.used[number][0].tenant
        self.moves.pop(number, None)
        self._drain(number, now, out)

    def _move(self, number: int, receiver: SlabClass, now: float, out: list[Effect]) -> None:
        """Drain it, and let the receiver have its bytes."""
        self.moves[number] = Move(self.used[number][0].tenant, receiver, now)
        self._drain(number, now, out)

    def _drain(self, number: int, now: float, out: list[Effect]) -> None:
        """Its chunks are misses from now on; it is handed on, or goes, when nobody holds a slot."""
        slab, extent = self.used[number]
        if not extent.draining:
            slab.start_draining(extent)
            marks = Marks()
            first = extent.ordinal * slab.slots_per_extent
            for n in range(first, first + slab.slots_per_extent):
                if slab.states[n] == SlotState.SEALED:
                    self._index.forget_slot(slab, n)
                    slab.eviction.remove(n)
                    if not slab.leases[n]:
                        slab.unseal(n, now)
                        marks.free(slab, n)
            marks.flush(out)
        self.finish_drains(now, out)

    def finish_drains(self, now: float, out: list[Effect]) -> None:
        """Hand on every draining extent that nobody holds."""
        for number, (slab, extent) in list(self.used.items()):
            if extent.draining and not extent.busy and now >= extent.rests_until:
                self._hand_on(number, slab, extent, now, out)

    def _hand_on(self, number: int, slab: SlabClass, extent: Extent, now: float, out: list[Effect]) -> None:
        slab.remove_extent(extent)
        del self.used[number]
        self.versions[slab.tenant] += 1
        move = self.moves.get(number)
        if move is not None and move.receiver.tenant == slab.tenant:
            del self.moves[number]
            self.moved += 1
            move.receiver.received_at = now
            self._format(number, move.receiver, out)
        else:
            self.dropping[number] = slab.tenant
            out.append(DropExtent(number))

    def _keep_promises(self, now: float, out: list[Effect]) -> None:
        """Bytes that came free for somebody become that class's before anybody else is asked."""
        for number, move in list(self.moves.items()):
            if self._taken(number):
                continue
            slab = move.receiver
            counts = self.counts()
            counts[slab.tenant] -= 1
            if not self._sessions.connected(slab) or not self._quotas.may_receive(slab.tenant, counts):
                del self.moves[number]
            elif self.spares:
                del self.moves[number]
                slab.received_at = now
                self._format(self.spares.pop(0), slab, out)

    # --- planning ---------------------------------------------------------------------------------------------------

    def plan(self, now: float, out: list[Effect]) -> None:
        """Do what is due: make a spare, give spares to classes that want one, start a move."""
        if not self.growing:
            return
        self.finish_drains(now, out)
        self._shrink(now, out)
        if self.making is None and self.total() < self._quotas.extents_max and now >= self._refused_until:
            self.making = self._take_number()
            out.append(MakeSpare(self.making))
        self._damaged = {number: tenant for number, tenant in self._damaged.items() if self._taken(number)}
        self._keep_promises(now, out)
        for slab in sorted(self.slabs.values(), key=lambda s: len(s.used_extents())):
            self.offer(slab, now, out)
        self.moves = {n: m for n, m in self.moves.items() if n not in self.used or now < m.since + MOVE_PATIENCE_S}
        for slab in sorted(self.slabs.values(), key=lambda s: len(s.used_extents())):
            if self.may_move and not self.soon(slab):
                self._move_to(slab, now, out)

    def offer(self, slab: SlabClass, now: float, out: list[Effect]) -> None:
        """Give the class spares as long as there are any, it wants one and its tenant may have it."""
        while self.spares and self._wants(slab, now) and self._left(slab.tenant) > 0:
            self._format(self.spares.pop(0), slab, out)

    def _shrink(self, now: float, out: list[Effect]) -> None:
        """The arena was made smaller since the last run: spares go first, then the coldest extents."""
        if self.total() <= self._quotas.extents_max:
            return
        leaving = len(self.dropping) + len(self.retiring) + sum(e.draining for _, e in self.used.values())
        over = self.total() - leaving - self._quotas.extents_max
        while over > 0 and self.spares:
            over -= 1
            number = self.spares.pop()
            self.dropping[number] = ""
            out.append(DropExtent(number))
        if over > 0 and self.may_move:
            used = sorted((e.hottest, n) for n, (_, e) in self.used.items() if not e.draining)
            for _, number in used[:over]:
                self._drain(number, now, out)

    def soon(self, slab: SlabClass) -> bool:
        """Does the class get an extent in a moment, without anybody's doing?"""
        if slab.coming:
            return True
        coming = bool(self.spares) or self.making is not None
        return coming and self.growing and (self._promised(slab) > 0 or self._left(slab.tenant) > 0)

    def _promised(self, slab: SlabClass) -> int:
        """Extents that were taken from others for this class, whose bytes are free."""
        return sum(move.receiver is slab and not self._taken(number) for number, move in self.moves.items())

    def _left(self, tenant: str) -> int:
        """How many more extents the tenant may have that no other has."""
        return self._quotas.left(tenant, self.counts(), damaged=tenant in self._damaged.values())

    def growth(self, slab: SlabClass) -> int:
        """Slots that the class may get beside those it has, without taking any from another."""
        unused = self._quotas.extents_max - self.total() + len(self.spares) + (self.making is not None)
        if unused > 0:
            unused = min(unused, self._left(slab.tenant))
        return (slab.coming + self._promised(slab) + max(0, unused)) * slab.slots_per_extent

    def awaited(self, slab: SlabClass) -> bool:
        """Has the class no extent, and is the first on its way?"""
        return not slab.used_extents() and (self.soon(slab) or not self.growing)

    def _wants(self, slab: SlabClass, now: float) -> bool:
        """Is what is free, or soon will be, less than an engine may ask for while the next extent is being made?

        A first extent is for whoever is there, a next one for who stores: a class that is full and idle wants nothing.
        """
        if not self._sessions.connected(slab):
            return False
        if slab.used_extents() and now >= slab.asked_at + PRESSURE_S:
            return False
        ahead = min(BURSTS_AHEAD * slab.burst, EXTENTS_AHEAD_MAX * slab.slots_per_extent)
        coming = slab.coming * slab.slots_per_extent
        return slab.free_slots + coming < max(1, slab.slots_per_extent // 2, ahead)

    def _format(self, source: int, slab: SlabClass, out: list[Effect]) -> None:
        number = self._take_number()
        holders = self.mapped.pop(source, None)
        if holders:
            self.mapped[number] = holders
            for old, current in list(self._renamed.items()):
                if current == source:
                    self._renamed[old] = number
            self._renamed[source] = number
        self.formatting[number] = slab
        slab.coming += 1
        out.append(FormatExtent(source, number, slab.tenant, slab.slot_bytes))

    def _take_number(self) -> int:
        self._next += 1
        return self._next - 1

    def _move_to(self, receiver: SlabClass, now: float, out: list[Effect]) -> None:
        """Start one move towards `receiver` if the rules allow it."""
        if not self._sessions.connected(receiver):
            return
        counts = self._after_moves()
        without = not receiver.used_extents()
        entitled = self._quotas.entitled(receiver.tenant, counts) and receiver.free_slots == 0
        pressed = now - receiver.evicted_at < PRESSURE_S and receiver.evicted_at > receiver.received_at
        if not (without or entitled or pressed):
            return
        best: tuple[float, SlabClass, list[Extent]] | None = None
        for donor in self.slabs.values():
            if donor is receiver or self._engaged(donor.tenant, receiver.tenant, now):
                continue
            across = donor.tenant != receiver.tenant
            if across and receiver.tenant in self._damaged.values() and not entitled:
                continue
            age = self._age(donor, now)
            young = AGE_FACTOR * (now - receiver.evicted_last_use) < age
            rests = now < donor.received_at + MOVE_REST_S
            allowed = (pressed and young and not rests) or without or (entitled and across)
            if allowed and (best is None or age > best[0]) and self._may_give(donor, receiver, counts):
                extents = self._movable(donor, across=across)
                if extents:
                    best = age, donor, extents
        if best is not None:
            # an extent that somebody holds now drains later than one that nobody holds
            coldest = min(best[2], key=lambda extent: (extent.hottest, extent.busy))
            self._move(coldest.number, receiver, now, out)

    def _engaged(self, donor: str, receiver: str, now: float) -> bool:
        """Does a move that is under way stand against one between these tenants?"""
        for number, move in self.moves.items():
            if number in self.used:
                if {donor, receiver} & {move.donor, move.receiver.tenant}:
                    return True
            elif donor != receiver:
                fresh = now < move.since + MOVE_PATIENCE_S
                if move.receiver.tenant == receiver and (fresh or not self._taken(number)):
                    return True
                if move.donor == donor and fresh:
                    return True
        # nobody gains by taking what can't be made anew
        return donor != receiver and now < self._refused_until

    def _movable(self, donor: SlabClass, *, across: bool) -> list[Extent]:
        """Extents of a class that would come free soon if they were drained, as far as one can tell."""
        stuck = any(extent is not None and extent.draining for extent in donor.extents)
        extents = [e for e in donor.used_extents() if not e.quarantined and not (stuck and e.busy)]
        if not across:
            return extents
        going = [number for rooms in (self.dropping, self.retiring) for number, t in rooms.items() if t == donor.tenant]
        slow = set().union(*[self._mapping(number) for number in going])
        return [extent for extent in extents if slow.isdisjoint(self._mapping(extent.number))]

    def _mapping(self, number: int) -> set[int]:
        """Processes that map these bytes."""
        return {process for process, _ in self.mapped.get(number, ())}

    def _may_give(self, donor: SlabClass, receiver: SlabClass, counts: Counter[str]) -> bool:
        keeps = 1 if self._sessions.connected(donor) else 0
        if len(donor.used_extents()) <= keeps:
            return False
        if donor.tenant == receiver.tenant:
            return True
        return self._quotas.may_give(donor.tenant, counts) and self._quotas.may_receive(receiver.tenant, counts)

    @staticmethod
    def _age(slab: SlabClass, now: float) -> float:
        """Seconds since the chunk that would go next was used; infinite if a whole extent's worth of slots is free."""
        if slab.free_slots >= slab.slots_per_extent:
            return float("inf")
        oldest = slab.oldest_use()
        return 0.0 if oldest is None else now - oldest

    def save_last_use(self, out: list[Effect]) -> None:
        """Keep the order of eviction of what was used since the last time."""
        for number, (slab, extent) in self.used.items():
            if extent.dirty and not extent.draining:
                extent.dirty = False
                first = extent.ordinal * slab.slots_per_extent
                column = slab.last_use[first : first + slab.slots_per_extent]
                out.append(SaveLastUse(number, np.frombuffer(column, dtype=np.float64)))

    # --- checking ---------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Every extent is in one place, and the budget holds (a damaged or shrunk arena may be over it for a while)."""
        rooms = [set(self.used), set(self.spares), set(self.formatting), set(self.dropping), set(self.retiring)]
        assert sum(map(len, rooms)) == len(set().union(*rooms)), "an extent is in two places"
        assert len(set(self.spares)) == len(self.spares), "a spare is listed twice"
        for slab in self.slabs.values():
            slab.check_invariants()
            held = {number for number, (owner, _) in self.used.items() if owner is slab}
            assert held == {e.number for e in slab.extents if e is not None}, "class and arena disagree on extents"
            assert slab.coming == sum(1 for s in self.formatting.values() if s is slab)
        for number, move in self.moves.items():
            assert number not in self.used or self.used[number][1].draining, "an extent moves that isn't draining"
            assert self.slabs.get((move.receiver.tenant, move.receiver.slot_bytes)) is move.receiver, "a class is gone"
