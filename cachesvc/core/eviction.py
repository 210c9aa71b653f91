"""Which slot of a slab class goes next: LRU or ARC, one instance a priority, over shared columns of numbers.

Covers: the order of eviction, what is passed over, ghosts of what was evicted, priorities before the policy.
Not here: the columns and how a ring is walked (`core.rings`), who holds a slot and what a request touches
(`core.transfers`), what a digest is made of (`core.index`).

A priority has two rings of slots, *once* and *again*; LRU uses the first only. An evicted key leaves a *ghost*, which
joins the ghost ring of the same number::

                      insert, digest unknown               insert, digest is a ghost
                               |                                      |
                               v           touch                      v
        evict <------------  once  ------------------------------>  again  ------------> evict
          |       (ARC's T1, LRU's only list)                    (ARC's T2)                |
          v                                                                                v
        ghost in once (B1)                                                  ghost in again (B2)

Rules that the caller's order of calls makes or breaks:

- **Leaf first.** Touch what a request finds along one *trail*, insert what it stores and refresh it along the same: the
  head of a prefix is then hotter than anything behind it, and slots go in the order in which a tree would give up its
  leaves (LRU; ARC in each ring). The trail makes that O(1) a chunk, however long the prompt.
- **Held** slots are *parked* when `evict` meets them: off their ring, still counted in it, not met again. The end of
  the last lease (`unpark`) puts them at the cold end in the order of release, so release a prefix head first. A touch
  or refresh of a parked slot puts it at the hot end at once (and a touch counts as a use): it is still sealed; if it
  is still held when it gets cold, it is parked again.
- **Spared** slots go to the hot end when met, and keep their order. A ring found to have nothing else is skipped as
  long as `evict` is called with *the same container* and nothing joins or moves in the ring: the container MUST NOT
  lose members meanwhile. (Else each of an allocation's evictions would go round all chunks of its own request.)
- **Restart.** Inserting in order of last use, oldest first, is enough: ARC starts with everything in *once* and no
  ghosts, and learns again.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

from cachesvc.core.rings import FIRST, Columns, IsHeld, Trail, no_trail
from cachesvc.types import Priority


class EvictionPolicy(Protocol):
    """Orders the sealed slots of one slab class. A slot is a number < capacity; a digest is 64 bits of its key.

    Owned by `core.slots.SlabClass`; every method but `resize` and `check_invariants` is O(1) amortised. A MUST that is
    broken is a bug of the caller: AssertionError, or what `check_invariants` finds.
    """

    def insert(self, slot: int, digest: int) -> None:
        """A slot was sealed: it becomes the most recent. MUST not be tracked already."""

    def touch(self, slot: int) -> None:
        """A *new* request arrived that wants this slot (once per request): recency and, in ARC, frequency.
        MUST be tracked; a parked one is put back too."""

    def refresh(self, slot: int) -> None:
        """Move to the most recent end of the list it is in; never counts as a second use (same request again).
        MUST be tracked; a parked one is put back too."""

    def remove(self, slot: int) -> None:
        """Forget a slot without remembering a ghost (drained, damaged). MUST be tracked; may be parked."""

    def evict(self, held: IsHeld, spared: Container[int]) -> int | None:
        """Choose, forget (leaving a ghost) and return a victim; None if every slot is held or spared.

        `held(slot)` = leased: passed over and **parked** (off the lists, so that it isn't met again) until `unpark`.
        `spared` = slots of the allocating request: passed over and refreshed, leased or not. Each is met at most once a
        call.
        """

    def unpark(self, slot: int) -> None:
        """The last lease of a slot ended: a parked one goes back to the coldest end of its list; else nothing."""

    def coldest(self) -> int | None:
        """The slot that `evict` would look at first, parked ones aside; for comparing ages between classes."""

    def is_ghost(self, digest: int) -> bool:
        """Was the key evicted not long ago (as far as the ghost list reaches)?"""

    def resize(self, capacity: int) -> None:
        """The class has now `capacity` slots (extents came or went). Slots >= capacity are forgotten without a ghost,
        and so are the oldest of more ghosts than it may have now."""

    def check_invariants(self) -> None:
        """Cross-check lists, counts, columns; AssertionError with the story otherwise."""

    def __len__(self) -> int:
        """Slots tracked, parked ones included."""


class _Level:
    """What LRU and ARC of one priority do alike. Methods: see EvictionPolicy."""

    def __init__(self, columns: Columns, level: int) -> None:
        self._columns = columns
        self._slots = columns.slots
        self._ghosts = columns.ghosts
        self._once = 1 + 2 * level
        self._again = self._once + 1

    def refresh(self, slot: int) -> None:
        self._slots.refresh(slot + FIRST)

    def remove(self, slot: int) -> None:
        self._slots.drop(slot + FIRST)

    def unpark(self, slot: int) -> None:
        self._slots.unpark(slot + FIRST)

    def is_ghost(self, digest: int) -> bool:
        return self._ghosts.find(digest) != 0

    @property
    def touched(self) -> int:
        """The ring that a touch takes a slot to."""
        raise NotImplementedError

    def touch(self, slot: int) -> None:
        self._slots.heat(slot + FIRST, self.touched)

    def __len__(self) -> int:
        return self._slots.counts[self._once] + self._slots.counts[self._again]


class Lru(_Level):
    """Least recently used. Its ghosts, the last `capacity` evicted, only tell why a key is missing."""

    def insert(self, slot: int, digest: int) -> None:
        self._slots.insert(slot + FIRST, self._once, digest)
        ghost = self._ghosts.find(digest)
        if ghost:
            self._ghosts.forget(ghost)

    @property
    def touched(self) -> int:
        return self._once

    def evict(self, held: IsHeld, spared: Container[int]) -> int | None:
        node = self._slots.take(self._once, held, spared)
        if not node:
            return None
        self._ghosts.remember(self._once, self._slots.digests[node])
        self._trim()
        return node - FIRST

    def coldest(self) -> int | None:
        node = self._slots.hotter[self._once]
        return None if node == self._once else node - FIRST

    def resize(self, capacity: int) -> None:
        self._columns.resize(capacity)
        self._trim()

    def _trim(self) -> None:
        while self._ghosts.counts[self._once] > self._columns.capacity:
            self._ghosts.forget_oldest(self._once)

    def check_invariants(self) -> None:
        self._columns.check_invariants()
        self.check_level()

    def check_level(self) -> None:
        """What holds for this priority, the shared columns aside."""
        assert not self._slots.counts[self._again], "LRU has slots in a second ring"
        ghosts, capacity = self._ghosts.counts[self._once], self._columns.capacity
        assert ghosts <= capacity, f"LRU remembers {ghosts} ghosts with {capacity} slots"


class Arc(_Level):
    """Adaptive replacement cache: N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache",
    FAST 2003. *once* is their T1, *again* T2, the ghost rings B1 and B2, `_target` p, `capacity` c.

    In the paper one request finds a ghost, adapts p, evicts and inserts. Here a slot is evicted when its write begins
    and inserted when it is sealed, which makes three differences: p adapts at the insert, after the eviction; which
    ghost was found can't break the tie |T1| = p; B1 and B2 are cut after the insert instead of before (the same ghosts
    go). A key whose ghost is of another priority counts as used again, but says nothing of this one's p. p is at most
    the number of slots that this priority has: c, in a full cache of one priority.
    """

    def __init__(self, columns: Columns, level: int) -> None:
        super().__init__(columns, level)
        self._target = 0.0
        """Slots that *once* should have."""

    def insert(self, slot: int, digest: int) -> None:
        ghost = self._ghosts.find(digest)
        self._slots.insert(slot + FIRST, self._again if ghost else self._once, digest)
        if ghost:
            self._adapt(self._ghosts.where[ghost])
            self._ghosts.forget(ghost)
        self._trim()

    def _adapt(self, ring: int) -> None:
        """A ghost of `ring` came back: that ring's slots should have been more."""
        once, again = self._ghosts.counts[self._once], self._ghosts.counts[self._again]
        target, slots = self._target, float(len(self))
        if ring == self._once:
            self._target = min(slots, target + max(1.0, again / once))
        elif ring == self._again:
            self._target = max(0.0, min(slots, target) - max(1.0, once / again))

    @property
    def touched(self) -> int:
        return self._again

    def evict(self, held: IsHeld, spared: Container[int]) -> int | None:
        slots = self._slots
        ring, other = self._order()
        node = slots.take(ring, held, spared)
        if not node:
            ring = other
            node = slots.take(ring, held, spared)
            if not node:
                return None
        self._ghosts.remember(ring, slots.digests[node])
        return node - FIRST

    def _order(self) -> tuple[int, int]:
        """The ring that is to give up a slot, and the one that does if it can't."""
        if self._slots.counts[self._once] > self._target:
            return self._once, self._again
        return self._again, self._once

    def coldest(self) -> int | None:
        for ring in self._order():
            node = self._slots.hotter[ring]
            if node != ring:
                return node - FIRST
        return None

    def resize(self, capacity: int) -> None:
        self._columns.resize(capacity)
        self._target = min(self._target, float(capacity))
        self._trim()

    def _trim(self) -> None:
        """|T1| + |B1| <= c and |T1| + |T2| + |B1| + |B2| <= 2c."""
        slots, ghosts, capacity = self._slots.counts, self._ghosts.counts, self._columns.capacity
        once, again = self._once, self._again
        while slots[once] + ghosts[once] > capacity:
            self._ghosts.forget_oldest(once)
        while slots[once] + slots[again] + ghosts[once] + ghosts[again] > 2 * capacity:
            self._ghosts.forget_oldest(again)

    def check_invariants(self) -> None:
        self._columns.check_invariants()
        self.check_level()

    def check_level(self) -> None:
        """What holds for this priority, the shared columns aside."""
        capacity = self._columns.capacity
        ghosts = self._ghosts.counts[self._once]
        once = self._slots.counts[self._once] + ghosts
        both = len(self) + ghosts + self._ghosts.counts[self._again]
        assert once <= capacity, f"{once} slots and ghosts used once, {capacity} allowed"
        assert both <= 2 * capacity, f"{both} slots and ghosts, {2 * capacity} allowed"
        assert 0.0 <= self._target <= capacity, f"target {self._target} of {capacity} slots"


class Eviction:
    """What a slab class holds: a policy for each priority over the same columns; the lowest priority goes first.

    A chunk keeps the priority with which it was stored. Methods: see EvictionPolicy.
    """

    def __init__(self, columns: Columns, levels: tuple[Lru | Arc, ...]) -> None:
        self._columns = columns
        self._slots = columns.slots
        self._levels = levels
        self._reach = tuple(levels[: level + 1] for level in range(len(levels)))
        """The priorities that an allocation of each priority may evict from, lowest first."""
        self._touched = (0, *(level.touched for level in levels for _ in range(2)))
        """Ring -> the ring that a touch takes a slot of it to."""

    def insert(self, slot: int, digest: int, priority: Priority) -> None:
        """A slot was sealed: it becomes the most recent of its priority. MUST not be tracked already."""
        self._levels[priority].insert(slot, digest)

    def touch(self, slot: int) -> None:
        self.touch_all((slot,), no_trail())

    def refresh(self, slot: int) -> None:
        self._slots.refresh(slot + FIRST)

    def touch_all(self, slots: Sequence[int], trail: Trail) -> None:
        """A new request wants these slots, in prefix order: each goes behind the one before it, the first behind
        `trail`, or to the hot end if that is empty."""
        self._slots.line_up([slot + FIRST for slot in slots], self._touched, trail)

    def refresh_all(self, slots: Sequence[int], trail: Trail) -> None:
        """The same for a request that has them already: no second use. Those that aren't tracked are passed over."""
        self._slots.line_up([slot + FIRST for slot in slots], range(FIRST), trail)

    def remove(self, slot: int) -> None:
        self._slots.drop(slot + FIRST)

    def evict(self, priority: Priority, held: IsHeld, spared: Container[int]) -> int | None:
        """A victim for an allocation of `priority`: from the lowest priority that has one, never from a higher one."""
        for level in self._reach[priority]:
            slot = level.evict(held, spared) if len(level) else None
            if slot is not None:
                return slot
        return None

    def unpark(self, slot: int) -> None:
        self._slots.unpark(slot + FIRST)

    def coldest(self) -> int | None:
        """The slot that an allocation of the highest priority would look at first, parked ones aside."""
        for level in self._levels:
            slot = level.coldest()
            if slot is not None:
                return slot
        return None

    def is_ghost(self, digest: int) -> bool:
        return self._columns.ghosts.find(digest) != 0

    @property
    def ghosts(self) -> int:
        """How many keys are remembered."""
        return self._columns.ghosts.total

    def resize(self, capacity: int) -> None:
        for level in self._levels:
            level.resize(capacity)

    def check_invariants(self) -> None:
        self._columns.check_invariants()
        for level in self._levels:
            level.check_level()

    def __len__(self) -> int:
        return sum(self._slots.counts)


def make_eviction(kind: str, capacity: int) -> Eviction:
    """The eviction that settings name, "arc" or "lru", for `capacity` slots. ValueError for another name."""
    policies: dict[str, type[Lru | Arc]] = {"arc": Arc, "lru": Lru}
    if kind not in policies:
        raise ValueError(f"eviction is {kind!r}; it can be {' or '.join(policies)}")
    columns = Columns(capacity)
    return Eviction(columns, tuple(policies[kind](columns, level) for level in Priority))
