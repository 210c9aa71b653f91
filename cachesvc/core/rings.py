"""Rings of slots and of ghosts: the numeric columns under the policies of `core.eviction`.

Covers: circular doubly linked lists in arrays, slots that are parked or spared while a victim is sought, digests of
evicted keys and how they are found. Not here: which ring a slot belongs in, when a ghost is too old (`core.eviction`).

A ring's sentinel is the node that bears the ring's number, 1 and up; slot n is node n + `FIRST`; node 0 is none::

      ring --hotter--> coldest --hotter--> ... --hotter--> hottest --hotter--> ring        (`colder` the other way)

Columns are `array.array`s: scalar reads and writes are the hot path, where numpy costs three times as much. All of it
is owned by one `core.eviction.Eviction`; nothing here depends on `hash()`, so that a run can be repeated.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Final, TypeAlias

from cachesvc.types import Priority

FIRST: Final = 1 + 2 * len(Priority)
"""The node of slot 0, after the sentinels of two rings a priority."""

PARKED: Final = 0x80
"""In a node's `where`, beside its ring: off that ring until unparked, but counted in it."""

RING: Final = PARKED - 1

CHAIN_MAX: Final = 16
"""Ghosts in one chain of their table. One honest chain in 10^14 is longer; keys that a client made to collide cost
ghosts, never time."""

IsHeld: TypeAlias = Callable[[int], bool]

Trail: TypeAlias = list[int]
"""For each ring the node that the next one of a line goes behind, 0 for none: where a request's chunks end."""


def no_trail() -> Trail:
    """The trail of a line that has nobody yet."""
    return [0] * FIRST


class Rings:
    """Rings over numbered nodes, each node with a digest. A node that is off its ring points at itself."""

    def __init__(self) -> None:
        self.hotter = array("I", range(FIRST))
        self.colder = array("I", range(FIRST))
        self.where = array("B", bytes(FIRST))
        """The ring of each node, 0 for none; maybe with `PARKED`."""
        self.digests = array("Q", bytes(8 * FIRST))
        self.counts = [0] * FIRST
        """Nodes of each ring, parked ones included."""

    def set_nodes(self, nodes: int) -> None:
        """Columns for `nodes` nodes besides the sentinels; what is cut off MUST be in no ring."""
        size = FIRST + nodes
        more = max(0, size - len(self.where))
        for column in (self.hotter, self.colder, self.where, self.digests):
            column.frombytes(bytes(column.itemsize * more))
            del column[size:]

    def add(self, node: int, ring: int, digest: int) -> None:
        """Put a node that is in no ring at the hot end of one."""
        if self.where[node]:
            raise AssertionError(f"node {node} joins ring {ring} but is in ring {self.where[node]}")
        self.where[node] = ring
        self.digests[node] = digest
        self.counts[ring] += 1
        hotter, colder = self.hotter, self.colder
        hottest = colder[ring]
        hotter[hottest] = node
        colder[node] = hottest
        hotter[node] = ring
        colder[ring] = node

    def drop(self, node: int) -> None:
        """Take a node out of its ring, parked or not. It MUST be in one."""
        ring = self.where[node] & RING
        if not ring:
            raise AssertionError(f"node {node} leaves its ring but is in none")
        self.where[node] = 0
        self.counts[ring] -= 1
        hotter, colder = self.hotter, self.colder
        above, below = hotter[node], colder[node]
        hotter[below] = above
        colder[above] = below

    def members(self, ring: int) -> list[int]:
        """Nodes of a ring, coldest first, parked ones left out. Ends even where links lead nowhere."""
        found: list[int] = []
        node = self.hotter[ring]
        while node != ring and len(found) < len(self.where):
            found.append(node)
            node = self.hotter[node]
        return found

    def check_invariants(self) -> None:
        """Links lead there and back, and every node that says it is in a ring is met there once or is parked."""
        parked = [0] * FIRST
        for node in range(FIRST, len(self.where)):
            if self.where[node] & PARKED:
                parked[self.where[node] & RING] += 1
                assert self.hotter[node] == self.colder[node] == node, f"parked node {node} is on a ring"
        for ring in range(1, FIRST):
            members = self.members(ring)
            colder = ring
            for node in (*members, ring):
                assert self.colder[node] == colder, f"node {node}: colder is {self.colder[node]}, came from {colder}"
                colder = node
            assert all(self.where[node] == ring for node in members), f"ring {ring} has a node of another"
            held = len(members) + parked[ring]
            assert held == self.counts[ring], f"ring {ring} has {held} nodes, counted {self.counts[ring]}"
        tracked = len(self.where) - FIRST - self.where[FIRST:].count(0)
        assert tracked == sum(self.counts), f"{tracked} nodes are in a ring, counted {sum(self.counts)}"


class SlotRings(Rings):
    """The rings of the sealed slots, with what `evict` passes over."""

    def __init__(self) -> None:
        super().__init__()
        self._all_spared: list[Container[int] | None] = [None] * FIRST
        """What spared all slots of a ring when `take` last went round it; None once anything joined or moved."""

    def insert(self, node: int, ring: int, digest: int) -> None:
        """Put a slot that is in no ring at the hot end of one."""
        self.add(node, ring, digest)
        self._all_spared[ring] = None

    def heat(self, node: int, ring: int) -> None:
        """Move a slot, parked or not, to the hot end of `ring`, which may be the one it is in."""
        hotter, colder = self.hotter, self.colder
        if self.where[node] != ring:
            self._move(node, ring)
        above, below = hotter[node], colder[node]
        hotter[below] = above
        colder[above] = below
        hottest = colder[ring]
        hotter[hottest] = node
        colder[node] = hottest
        hotter[node] = ring
        colder[ring] = node
        self._all_spared[ring] = None

    def refresh(self, node: int) -> None:
        """Move a slot, parked or not, to the hot end of its ring."""
        self.heat(node, self.ring_of(node))

    def line_up(self, nodes: Iterable[int], rings: Sequence[int], trail: Trail) -> None:
        """Move slots, parked or not, one behind the other: each just colder than the last of its ring in `trail`, or to
        the hot end if that is gone. A slot of ring r goes to `rings[r]`; one that isn't tracked is passed over."""
        hotter, colder, where = self.hotter, self.colder, self.where
        for node in nodes:
            before = where[node]
            ring = rings[before & RING]
            leader = trail[ring]
            if not ring or (leader == node and before == ring):
                continue
            if before != ring:
                self._move(node, ring)
            above, below = hotter[node], colder[node]
            hotter[below] = above
            colder[above] = below
            if where[leader] != ring or leader == node:
                leader = ring
            below = colder[leader]
            hotter[below] = node
            colder[node] = below
            hotter[node] = leader
            colder[leader] = node
            trail[ring] = node
            self._all_spared[ring] = None

    def ring_of(self, node: int) -> int:
        """The ring of a slot, parked or not. The slot MUST be tracked."""
        ring = self.where[node] & RING
        if not ring:
            raise AssertionError(f"slot {node - FIRST} is not tracked")
        return ring

    def _move(self, node: int, ring: int) -> None:
        self.counts[self.ring_of(node)] -= 1
        self.counts[ring] += 1
        self.where[node] = ring

    def park(self, node: int) -> None:
        """Take a slot off its ring but keep it counted there."""
        above, below = self.hotter[node], self.colder[node]
        self.hotter[below] = above
        self.colder[above] = below
        self.hotter[node] = self.colder[node] = node
        self.where[node] |= PARKED

    def unpark(self, node: int) -> None:
        """Put a parked slot at the cold end of its ring; nothing if it isn't parked."""
        if not self.where[node] & PARKED:
            return
        ring = self.where[node] = self.where[node] & RING
        coldest = self.hotter[ring]
        self.hotter[ring] = node
        self.colder[node] = ring
        self.hotter[node] = coldest
        self.colder[coldest] = node
        self._all_spared[ring] = None

    def take(self, ring: int, held: IsHeld, spared: Container[int]) -> int:
        """Take out the coldest node of `ring` that is neither held nor spared; 0 if there is none.

        Parks and refreshes what it passes."""
        if self._all_spared[ring] is spared:
            return 0
        hotter = self.hotter
        first_spared = 0
        while (node := hotter[ring]) != ring:
            if node == first_spared:
                self._all_spared[ring] = spared
                return 0
            slot = node - FIRST
            if slot in spared:
                first_spared = first_spared or node
                self.heat(node, ring)
            elif held(slot):
                self.park(node)
            else:
                above = hotter[ring] = hotter[node]
                self.colder[above] = ring
                self.where[node] = 0
                self.counts[ring] -= 1
                return node
        return 0


class Ghosts(Rings):
    """Digests of what was evicted, in the order in which it was; found by digest through chains of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 0
        """Ghosts of all rings together; the oldest of the longest ring makes room."""
        self.total = 0
        self._heads = array("I", [0])
        """First node of each chain, 0 for none; a power of two of them."""
        self._chain = array("I", bytes(4 * FIRST))
        """Next node of the same chain, or next free node."""
        self._free = 0
        """First of the free nodes that were used before; those from `_fresh` on never were."""
        self._fresh = FIRST

    def find(self, digest: int) -> int:
        """The node that remembers `digest`, else 0."""
        digests = self.digests
        node = self._heads[digest & (len(self._heads) - 1)]
        while node and digests[node] != digest:
            node = self._chain[node]
        return node

    def remember(self, ring: int, digest: int) -> None:
        """Make `digest` the latest ghost of `ring`."""
        if self.total >= self.limit:
            self.forget_oldest(self._longest())
        heads, chain = self._heads, self._chain
        if self._free:
            node = self._free
            self._free = chain[node]
        else:
            node = self._fresh
            self._fresh += 1
        bucket = digest & (len(heads) - 1)
        first = heads[bucket]
        heads[bucket] = node
        chain[node] = first
        self.add(node, ring, digest)
        self.total += 1
        if first:
            self._cut(first)

    def _cut(self, node: int) -> None:
        """Forget the end of a chain if what follows its first ghost, `node` and more, is as long as it may get."""
        chain = self._chain
        length = 1
        while after := chain[node]:
            node = after
            length += 1
        if length >= CHAIN_MAX:
            self.forget(node)

    def _longest(self) -> int:
        return self.counts.index(max(self.counts))

    def forget(self, node: int) -> None:
        """Remember a ghost no longer. `node` MUST be one."""
        self.drop(node)
        self.total -= 1
        heads, chain = self._heads, self._chain
        bucket = self.digests[node] & (len(heads) - 1)
        before = heads[bucket]
        if before == node:
            heads[bucket] = chain[node]
        else:
            while chain[before] != node:
                before = chain[before]
            chain[before] = chain[node]
        chain[node] = self._free
        self._free = node

    def forget_oldest(self, ring: int) -> None:
        """Forget the oldest ghost of a ring that has any."""
        self.forget(self.hotter[ring])

    def resize(self, capacity: int) -> None:
        """Room for the ghosts of `capacity` slots.

        When the table of chains changes its size (it doubles, or shrinks to less than half) every ghost is chained
        anew: 0.2 s for a million."""
        # What is evicted and not yet inserted again (being written) comes on top of what a policy's windows allow.
        self.limit = capacity + capacity // 8 + 1
        while self.total > self.limit:
            self.forget_oldest(self._longest())
        nodes = len(self.where) - FIRST
        if self.limit > nodes:
            self._set_nodes()
            if capacity > len(self._heads):
                self._make_chains(capacity)
        elif self.limit < nodes // 2:
            # By halves, so that giving up a hundred extents one by one doesn't build a hundred tables.
            self._compact()
            self._make_chains(capacity)

    def _set_nodes(self) -> None:
        self.set_nodes(self.limit)
        self._chain.frombytes(bytes(4 * max(0, len(self.where) - len(self._chain))))
        del self._chain[len(self.where) :]

    def _compact(self) -> None:
        """Move all ghosts to the lowest nodes, in the same order, and give up the rest. Leaves no valid chain."""
        kept = [(ring, self.digests[node]) for ring in range(1, FIRST) for node in self.members(ring)]
        self.set_nodes(0)
        for sentinel in range(FIRST):
            self.hotter[sentinel] = self.colder[sentinel] = sentinel
        self.counts = [0] * FIRST
        self._set_nodes()
        for node, (ring, digest) in enumerate(kept, FIRST):
            self.add(node, ring, digest)
        self._fresh, self._free = FIRST + len(kept), 0

    def _make_chains(self, capacity: int) -> None:
        """Chain every ghost anew, in a table for `capacity` of them."""
        size = 1 << max(0, capacity - 1).bit_length()
        self._heads = heads = array("I", bytes(4 * size))
        for node in range(FIRST, self._fresh):
            if self.where[node]:
                bucket = self.digests[node] & (size - 1)
                self._chain[node] = heads[bucket]
                heads[bucket] = node

    def check_invariants(self) -> None:
        """Also: every ghost is in the chain of its digest, once, and every other node is free or fresh."""
        super().check_invariants()
        assert self.total == sum(self.counts) <= self.limit, f"{self.total} ghosts, limit {self.limit}: {self.counts}"
        chained = 0
        for bucket in range(len(self._heads)):
            for node in self._follow(self._heads[bucket]):
                chained += 1
                assert self.where[node], f"chain {bucket} leads to node {node}, which is no ghost"
                assert self.digests[node] & (len(self._heads) - 1) == bucket, f"node {node} is in chain {bucket}"
        assert chained == self.total, f"{chained} ghosts are in chains, {self.total} exist"
        free = len(self._follow(self._free))
        used = self._fresh - FIRST
        assert self.total + free == used, f"{self.total} ghosts and {free} free nodes of {used}"

    def _follow(self, node: int) -> list[int]:
        found: list[int] = []
        while node and len(found) < len(self.where):
            found.append(node)
            node = self._chain[node]
        return found


class Columns:
    """What the policies of one slab class share: the rings of its slots and those of its ghosts.

    Bytes a slot: 17 for the slot, 24 for ghosts (there may be 9 for 8 slots), 4 to 8 for the table of their chains, and
    up to 6 % that arrays reserve: 48 to 52.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = 0
        self.slots = SlotRings()
        self.ghosts = Ghosts()
        self.resize(capacity)

    def resize(self, capacity: int) -> None:
        """Columns for `capacity` slots; slots beyond leave their rings, and ghosts beyond the limit are forgotten."""
        slots = self.slots
        for node in range(FIRST + capacity, len(slots.where)):
            if slots.where[node]:
                slots.drop(node)
        slots.set_nodes(capacity)
        if capacity != self.capacity:
            self.ghosts.resize(capacity)
        self.capacity = capacity

    def check_invariants(self) -> None:
        """Check both; AssertionError with the story otherwise."""
        self.slots.check_invariants()
        self.ghosts.check_invariants()
        nodes = len(self.slots.where) - FIRST
        assert nodes == self.capacity, f"columns for {nodes} slots, capacity {self.capacity}"
