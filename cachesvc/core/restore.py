"""What a restarted daemon knows: chunks back from the tables, and slots that somebody may still hold.

Covers: rebuilding classes, index and policy from table columns; the grace time; orphans. Not here: reading the tables
(`arena.layout`), the tickets once they are claimed (`core.transfers`).

After a restart the daemon doesn't know who reads and writes. So for `restart_grace_s` nothing is evicted or reused and
no extent moves, while sessions come back and name their leases. Every slot found *writing* is an **orphan**,
quarantined: a session that names it (extent, slot, generation) in its Hello owns it again, and `quarantine_s` after the
start time frees the rest: the one case where time frees a slot whose writer had a pidfd. A write that was claimed and
is then lost again waits as long: processes that haven't come back yet may still be at it.

A lease that nobody named has ended unseen, so its slot can't be tainted (`core.slots`): nobody knows which. Its reader
is safe all the same: a new owner writes only after a message has come to it, which takes a thousand times as long as a
core may reorder the reader's last load of the generation.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cachesvc.core.events import Effect, ExtentRestored, SlotRun
from cachesvc.core.extents import Extents
from cachesvc.core.index import Index, Space
from cachesvc.core.slots import Extent, SlabClass, SlotState
from cachesvc.core.transfers import Marks
from cachesvc.types import Priority


class Restoration:
    """State of a restart, until its last orphan is gone. Owned by the node."""

    def __init__(self, index: Index, extents: Extents) -> None:
        self._index = index
        self._extents = extents
        self.chunks = 0
        self.orphans: dict[tuple[int, int], tuple[SlabClass, int]] = {}
        """(extent, slot) -> class and slot number."""
        self.grace_until = float("-inf")

    # --- reading tables ---------------------------------------------------------------------------------------------

    def extent(self, event: ExtentRestored, rests_until: float, out: list[Effect]) -> None:
        """Take in one extent. Chunks of namespaces that nobody remembers, and those that another extent has too, are
        freed, but somebody may read them: nobody gets their slots before `rests_until` (seconds)."""
        slab = self._extents.slab(event.tenant, event.slot_bytes)
        columns = event.columns
        extent = slab.add_extent(event.extent, columns.generations)
        first = extent.ordinal * slab.slots_per_extent
        spaces = self._spaces(event)
        strangers: list[int] = []
        keys, lengths = columns.keys, columns.lengths.tolist()
        last_use = columns.last_use
        slab.last_use[first : first + len(last_use)] = array("d", last_use.astype(np.float64).tobytes())
        namespaces, groups, sealed = columns.namespaces, columns.groups, int(SlotState.SEALED)
        for slot in np.flatnonzero(columns.states == sealed).tolist():
            space = spaces.get((namespaces[slot], groups[slot]))
            n = first + slot
            key = keys[slot]
            if space is None or key in space.sealed:
                strangers.append(n)
                continue
            slab.states[n] = sealed
            slab.spaces[n] = space.number
            slab.keys[n] = key
            slab.lengths[n] = lengths[slot]
            space.sealed[key] = n
            space.new = False
        extent.hottest = float(last_use.max(initial=0.0))
        self._restore_states(slab, extent, columns.states)
        marks = Marks()
        for n in strangers:
            slab.rest(n, rests_until)
            marks.free(slab, n)
        marks.flush(out)
        chunks = slab.states[first : first + slab.slots_per_extent].count(sealed)
        slab.sealed_slots += chunks
        self.chunks += chunks
        self._extents.used[event.extent] = slab, extent
        self._extents.versions[event.tenant] += 1

    def _spaces(self, event: ExtentRestored) -> Mapping[tuple[bytes, int], Space]:
        return {
            (namespace.record.namespace, space.group): space
            for (tenant, _), namespace in self._index.namespaces.items()
            if tenant == event.tenant
            for space in namespace.spaces
            if space.slab.slot_bytes == event.slot_bytes
        }

    def _restore_states(self, slab: SlabClass, extent: Extent, states: NDArray[np.uint8]) -> None:
        """Free list and orphans of an extent."""
        first = extent.ordinal * slab.slots_per_extent
        for slot in np.flatnonzero(states == SlotState.WRITING).tolist():
            slab.states[first + slot] = SlotState.QUARANTINED
            extent.busy += 1
            extent.quarantined += 1
            self.orphans[extent.number, slot] = slab, first + slot
        free = (np.flatnonzero(states == SlotState.FREE)[::-1] + first).tolist()
        slab.free_slots += len(free) - len(extent.free)
        extent.free = array("I", free)

    def finish(self, now: float, grace_s: float) -> None:
        """Every table was read: give the policies their order, and let the grace time begin if anything came back."""
        for slab in self._extents.slabs.values():
            insert = slab.eviction.insert
            digests = {
                n: space.digest(key)
                for space in self._index.spaces.values()
                if space.slab is slab
                for key, n in space.sealed.items()
            }
            for n in sorted(digests, key=slab.last_use.__getitem__):
                insert(n, digests[n], Priority.INTERACTIVE)
        if self._extents.used:
            self.grace_until = now + grace_s
            for slab in self._extents.slabs.values():
                slab.limbo = deque((self.grace_until, n) for _, n in slab.limbo)

    # --- claims -----------------------------------------------------------------------------------------------------

    def claim_write(self, space: Space, run: SlotRun) -> list[int] | None:
        """Slot numbers of a write that its session still has in flight, no orphans any more; None = it is lost."""
        places = list(zip(run.extents, run.slots, strict=True))
        numbers: list[int] = []
        for place, generation in zip(places, run.generations, strict=True):
            orphan = self.orphans.get(place)
            if orphan is None or orphan[0] is not space.slab or orphan[0].generations[orphan[1]] != generation:
                return None
            numbers.append(orphan[1])
        if len(set(places)) != len(places):
            return None
        for place in places:
            del self.orphans[place]
        return numbers

    def claim_lease(self, tenant: str, run: SlotRun, now: float) -> tuple[SlabClass, list[int]] | None:
        """Class and slot numbers of a lease that its session still reads under; None = it is lost."""
        if now >= self.grace_until or not run.slots:
            return None
        numbers: list[int] = []
        slabs: set[int] = set()
        slab: SlabClass | None = None
        for number, slot, generation in zip(run.extents, run.slots, run.generations, strict=True):
            found = self._extents.find(number)
            if found is None or found[0].tenant != tenant:
                return None
            slab = found[0]
            slabs.add(id(slab))
            n = slab.number(found[1], slot)
            if n is None or slab.states[n] != SlotState.SEALED or slab.generations[n] != generation:
                return None
            numbers.append(n)
        if slab is None or len(slabs) != 1:
            return None
        return slab, numbers

    def free_orphans(self, out: list[Effect]) -> None:
        """Nobody named them in time."""
        marks = Marks()
        for slab, n in self.orphans.values():
            slab.abort(n)
            marks.free(slab, n)
        self.orphans.clear()
        marks.flush(out)
