"""Slots of one slab class: states, generations, free lists, leases, draining.

Covers: what state each slot is in and which extent it lies in. Not here: keys of namespaces (`core.index`), who holds a
slot and why (`core.sessions`, `core.transfers`), which class gets an extent (`core.extents`).

A slot's life; only the node moves it, and each arrow to FREE raises the generation::

              allocate            seal
      FREE ------------> WRITING ------> SEALED
       ^                  |    |            |
       |   abort          |    | connection | evict, drain (both only when unleased)
       +------------------+    | lost       |
       |                       v            |
       +---------------- QUARANTINED        |
       |   every process of the session is  |
       |   dead or done with it             |
       +------------------------------------+

A slot whose lease ended in any way but a release is *tainted*: when it is freed its generation is raised at once, but
it is handed out `REUSE_DELAY_S` later (it waits in limbo; in a draining extent, the extent waits), so that a reader
which copies and then checks the generation needs no memory fence.

Slots are numbered through the class: number = ordinal of the extent * slots_per_extent + slot in the extent. Columns
are `array.array`s: scalar reads and writes are the hot path, where numpy costs three times as much.
"""

from __future__ import annotations

import enum
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cachesvc.core.eviction import Eviction, make_eviction

REUSE_DELAY_S: Final = 1.0

DEPTH_STEP_S: Final = 1e-6
"""Chunks used at one moment get last-use times this far apart, deeper = older: a restart keeps the order leaf first."""


class SlotState(enum.IntEnum):
    """The first three are the states of a table word (`arena.layout`); a quarantined slot is *writing* there."""

    FREE = 0
    WRITING = 1
    SEALED = 2
    QUARANTINED = 3


WRITABLE: Final = (SlotState.WRITING, SlotState.QUARANTINED)
"""Somebody may write a slot in one of these states."""


@dataclass(slots=True, eq=False)
class Extent:
    """One extent of a class. `busy` counts slots that are leased, writing or quarantined: it drains when that is 0."""

    number: int
    ordinal: int
    free: array[int] = field(default_factory=lambda: array("I"))
    draining: bool = False
    busy: int = 0
    quarantined: int = 0
    rests_until: float = float("-inf")
    """Draining: not handed on before this, because a slot of it was tainted (seconds)."""
    hottest: float = 0.0
    dirty: bool = False


class SlabClass:
    """All slots of one tenant and slot size. Owned by the node; nothing here does I/O or reads a clock."""

    def __init__(self, tenant: str, slot_bytes: int, slots_per_extent: int, eviction: str) -> None:
        self.tenant = tenant
        self.slot_bytes = slot_bytes
        self.slots_per_extent = slots_per_extent
        self.eviction: Eviction = make_eviction(eviction, 0)
        self.extents: list[Extent | None] = []
        self.generations = array("Q")
        self.states = array("B")
        self.leases = array("I")
        self.spaces = array("I")
        self.lengths = array("I")
        self.last_use = array("d")
        self.keys: list[bytes | None] = []
        self.free_slots = 0
        self.sealed_slots = 0
        self.slot_count = 0
        """Slots in extents that aren't draining."""
        self.departures = 0
        """Chunks that left, for whatever reason."""
        self._filling = 0
        """Ordinal of the extent that gave the last free slot."""
        self.tainted: set[int] = set()
        self.limbo: deque[tuple[float, int]] = deque()
        self.coming = 0
        """Extents being formatted for this class."""
        self.burst = 0
        """The most slots that one allocation asked for, of late."""
        self.asked_at = float("-inf")
        """When an allocation last asked for a slot (seconds)."""
        self.evicted_at = float("-inf")
        """When this class last evicted a chunk for want of room, or found all in use, and when that chunk had last been
        used: now, if it is in use."""
        self.evicted_last_use = float("-inf")
        self.received_at = float("-inf")
        """When it last got an extent that was taken from another class (seconds)."""

    # --- where a slot lies ------------------------------------------------------------------------------------------

    def extent_of(self, n: int) -> Extent:
        """The extent that slot number `n` lies in."""
        extent = self.extents[n // self.slots_per_extent]
        if extent is None:
            raise AssertionError(f"slot {n} of class {self.slot_bytes} lies in no extent")
        return extent

    def place(self, n: int) -> tuple[int, int]:
        """(extent, slot) of slot number `n`: how everybody else names it."""
        return self.extent_of(n).number, n % self.slots_per_extent

    def number(self, extent: Extent, slot: int) -> int | None:
        """Slot number of a slot of one of our extents, None if there is no such slot."""
        if not 0 <= slot < self.slots_per_extent:
            return None
        return extent.ordinal * self.slots_per_extent + slot

    def used_extents(self) -> list[Extent]:
        """Extents that can take new chunks (not draining)."""
        return [extent for extent in self.extents if extent is not None and not extent.draining]

    # --- extents come and go ----------------------------------------------------------------------------------------

    def add_extent(self, number: int, generations: NDArray[np.uint64] | None = None) -> Extent:
        """Take in an extent, all of its slots free (at `generations`, else 0)."""
        per = self.slots_per_extent
        try:
            ordinal = self.extents.index(None)
        except ValueError:
            ordinal = len(self.extents)
            self.extents.append(None)
            self._grow(len(self.extents) * per)
        extent = Extent(number, ordinal)
        self.extents[ordinal] = extent
        first = ordinal * per
        if generations is not None:
            self.generations[first : first + per] = array("Q", generations.astype(np.uint64).tobytes())
        # popped from the end: the lowest slot first
        extent.free = array("I", range(first + per - 1, first - 1, -1))
        self.free_slots += per
        self.slot_count += per
        return extent

    def remove_extent(self, extent: Extent) -> None:
        """Forget a drained extent."""
        if extent.busy or not extent.draining:
            raise AssertionError(f"extent {extent.number} leaves its class with {extent.busy} busy slots")
        per = self.slots_per_extent
        first = extent.ordinal * per
        self.generations[first : first + per] = array("Q", bytes(8 * per))
        self.last_use[first : first + per] = array("d", bytes(8 * per))
        self.tainted.difference_update(range(first, first + per))
        self.extents[extent.ordinal] = None

    def start_draining(self, extent: Extent) -> None:
        """No slot of `extent` is handed out any more; the caller frees what is sealed and unleased."""
        extent.draining = True
        self.slot_count -= self.slots_per_extent
        resting = [when for when, n in self.limbo if self.extent_of(n) is extent]
        extent.rests_until = max(resting, default=extent.rests_until)
        self.limbo = deque((when, n) for when, n in self.limbo if self.extent_of(n) is not extent)
        self.free_slots -= len(extent.free)
        extent.free = array("I")

    def _grow(self, slots: int) -> None:
        more = slots - len(self.states)
        self.generations.extend(array("Q", bytes(8 * more)))
        self.states.extend(array("B", bytes(more)))
        self.leases.extend(array("I", bytes(4 * more)))
        self.spaces.extend(array("I", bytes(4 * more)))
        self.lengths.extend(array("I", bytes(4 * more)))
        self.last_use.extend(array("d", bytes(8 * more)))
        self.keys.extend([None] * more)
        self.eviction.resize(slots)

    # --- a slot's arrows --------------------------------------------------------------------------------------------

    def take_free(self, now: float) -> int | None:
        """FREE -> WRITING for any free slot; None if there is none."""
        while self.limbo and self.limbo[0][0] <= now:
            n = self.limbo.popleft()[1]
            self.extent_of(n).free.append(n)
            self.free_slots += 1
        if not self.free_slots:
            return None
        for ordinal in chain(range(self._filling, len(self.extents)), range(self._filling)):
            extent = self.extents[ordinal]
            if extent is not None and extent.free:
                self._filling = ordinal
                n = extent.free.pop()
                self.free_slots -= 1
                self.states[n] = SlotState.WRITING
                extent.busy += 1
                return n
        raise AssertionError(f"class {self.slot_bytes} counts {self.free_slots} free slots and has none")

    def reuse(self, n: int) -> None:
        """SEALED -> WRITING for an evicted, untainted slot, its generation raised."""
        self._check_unheld(n)
        self.departures += 1
        self.sealed_slots -= 1
        self.keys[n] = None
        self.generations[n] += 1
        self.states[n] = SlotState.WRITING
        self.extent_of(n).busy += 1

    def unseal(self, n: int, now: float) -> None:
        """SEALED -> FREE (through limbo if tainted). The caller took it off the index and the policy."""
        self._check_unheld(n)
        self.departures += 1
        self.sealed_slots -= 1
        self.keys[n] = None
        extent = self.extent_of(n)
        if n not in self.tainted:
            self._free(n, extent)
            return
        self.tainted.discard(n)
        self.rest(n, now + REUSE_DELAY_S)

    def rest(self, n: int, until: float) -> None:
        """A slot is FREE and its generation raised, but nobody gets it before `until`."""
        extent = self.extent_of(n)
        self.states[n] = SlotState.FREE
        self.generations[n] += 1
        if extent.draining:
            extent.rests_until = max(extent.rests_until, until)
        else:
            self.limbo.append((until, n))

    def _check_unheld(self, n: int) -> None:
        if self.states[n] != SlotState.SEALED or self.leases[n]:
            raise AssertionError(f"slot {n} is freed in state {self.states[n]} with {self.leases[n]} leases")

    def seal(self, n: int, space: int, key: bytes, length: int) -> None:
        """WRITING -> SEALED."""
        if self.states[n] != SlotState.WRITING:
            raise AssertionError(f"slot {n} is sealed in state {self.states[n]}")
        self.states[n] = SlotState.SEALED
        self.spaces[n] = space
        self.keys[n] = key
        self.lengths[n] = length
        self.sealed_slots += 1
        self.extent_of(n).busy -= 1

    def abort(self, n: int) -> None:
        """WRITING or QUARANTINED -> FREE: nobody writes it any more."""
        state = self.states[n]
        extent = self.extent_of(n)
        if state == SlotState.QUARANTINED:
            extent.quarantined -= 1
        elif state != SlotState.WRITING:
            raise AssertionError(f"slot {n} is aborted in state {state}")
        extent.busy -= 1
        self._free(n, extent)

    def quarantine(self, n: int) -> None:
        """WRITING -> QUARANTINED: somebody may still write it, nobody will seal it."""
        if self.states[n] != SlotState.WRITING:
            raise AssertionError(f"slot {n} is quarantined in state {self.states[n]}")
        self.states[n] = SlotState.QUARANTINED
        self.extent_of(n).quarantined += 1

    def own_again(self, n: int) -> None:
        """QUARANTINED -> WRITING: its session came back for it."""
        if self.states[n] != SlotState.QUARANTINED:
            raise AssertionError(f"slot {n} is owned again in state {self.states[n]}")
        self.states[n] = SlotState.WRITING
        self.extent_of(n).quarantined -= 1

    def _free(self, n: int, extent: Extent) -> None:
        self.states[n] = SlotState.FREE
        self.generations[n] += 1
        if not extent.draining:
            extent.free.append(n)
            self.free_slots += 1

    # --- leases -----------------------------------------------------------------------------------------------------

    def lease(self, numbers: Iterable[int]) -> None:
        """One more reader of these sealed slots."""
        for n in numbers:
            if not self.leases[n]:
                self.extent_of(n).busy += 1
            self.leases[n] += 1

    def unlease(self, n: int, *, released: bool) -> bool:
        """One reader less; True if that was the last. Not `released` = it may still read: the slot is tainted."""
        if not released:
            self.tainted.add(n)
        self.leases[n] -= 1
        if self.leases[n]:
            return False
        self.extent_of(n).busy -= 1
        return True

    def leased(self, n: int) -> bool:
        """Is anybody reading slot `n`? (Passed to the policy.)"""
        return self.leases[n] > 0

    # --- recency ----------------------------------------------------------------------------------------------------

    def used(self, numbers: Sequence[int], when: float) -> float:
        """Note that these slots, in prefix order, were used, the first at `when` (seconds); the time for a next one."""
        last_use = self.last_use
        stamp = when
        for n in numbers:
            last_use[n] = stamp
            stamp -= DEPTH_STEP_S
        per = self.slots_per_extent
        for ordinal in {n // per for n in numbers}:
            extent = self.extent_of(ordinal * per)
            extent.dirty = True
            extent.hottest = max(extent.hottest, when)
        return stamp

    def oldest_use(self) -> float | None:
        """When the chunk that would go next was last used; None if nothing can go."""
        n = self.eviction.coldest()
        return None if n is None else self.last_use[n]

    # --- checking ---------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Cross-check counts, free lists, policy and columns; AssertionError with the story otherwise."""
        self.eviction.check_invariants()
        limbo = {n for _, n in self.limbo}
        assert len(limbo) == len(self.limbo), "a slot rests twice"
        assert not any(self.states[n] or self.extent_of(n).draining for n in limbo), "a slot rests that isn't free"
        free = sealed = tracked = 0
        for extent in self.extents:
            if extent is None:
                continue
            first = extent.ordinal * self.slots_per_extent
            numbers = range(first, first + self.slots_per_extent)
            states = self.states[first : first + self.slots_per_extent]
            busy = sum(1 for n in numbers if self.leases[n] or self.states[n] in WRITABLE)
            assert busy == extent.busy, f"extent {extent.number}: {busy} busy slots, counted {extent.busy}"
            assert states.count(SlotState.QUARANTINED) == extent.quarantined, f"extent {extent.number}: quarantined"
            assert len(set(extent.free)) == len(extent.free), f"extent {extent.number}: a slot is free twice"
            assert all(n in numbers and not self.states[n] and n not in limbo for n in extent.free)
            if not extent.draining:
                waiting = sum(1 for n in limbo if n in numbers)
                assert states.count(SlotState.FREE) == len(extent.free) + waiting, (
                    f"extent {extent.number}: a free slot is lost"
                )
                tracked += states.count(SlotState.SEALED)
            free += len(extent.free)
            sealed += states.count(SlotState.SEALED)
        assert free == self.free_slots, f"{free} slots free, counted {self.free_slots}"
        assert sealed == self.sealed_slots, f"{sealed} slots sealed, counted {self.sealed_slots}"
        assert self.slot_count == len(self.used_extents()) * self.slots_per_extent, f"{self.slot_count} slots counted"
        assert tracked == len(self.eviction), f"{tracked} slots sealed in use, policy tracks {len(self.eviction)}"
