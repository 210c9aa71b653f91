"""Which chunk is where: namespaces of tenants, their KV groups, and the keys in them.

Covers: key -> slot of what can be read, key -> ticket of what is being written, and the counters that operators read.
Not here: slots (`core.slots`), tickets (`core.sessions`).

A *space* is one KV group of one namespace of one tenant: the smallest thing inside which a key is unique. All chunks of
a space lie in one slab class. Spaces are numbered through the node, so that a slot's column can name its space in 4
bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import xxhash

from cachesvc.types import KeyState

if TYPE_CHECKING:
    from cachesvc.core.events import NamespaceRecord
    from cachesvc.core.sessions import WriteTicket
    from cachesvc.core.slots import SlabClass

NAMESPACES_PER_TENANT_MAX: Final = 1024

COMPONENT_BYTES_PER_TENANT_MAX: Final = 1 << 20
"""Names and values of all its namespaces' components: they are kept, saved and shown, but nothing else needs them."""


@dataclass(slots=True)
class Counts:
    """Monotonic counts of one namespace, in keys unless the name says bytes. A request's keys count when it arrives."""

    hits: int = 0
    misses: Counter[KeyState] = field(default_factory=Counter)
    stores: int = 0
    stored_bytes: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    evictions: int = 0
    aborts: int = 0
    refused: int = 0

    def add(self, other: Counts) -> None:
        """Sum `other` into this (totals, and namespaces that are forgotten)."""
        self.hits += other.hits
        self.misses.update(other.misses)
        self.stores += other.stores
        self.stored_bytes += other.stored_bytes
        self.loads += other.loads
        self.loaded_bytes += other.loaded_bytes
        self.evictions += other.evictions
        self.aborts += other.aborts
        self.refused += other.refused


@dataclass(slots=True, eq=False)
class Space:
    """One KV group of a namespace."""

    number: int
    group: int
    chunk_bytes: int
    slab: SlabClass
    namespace: Namespace
    sealed: dict[bytes, int] = field(default_factory=dict)
    """Key -> slot number, of every chunk that can be read; never a chunk in a draining extent."""
    writing: dict[bytes, WriteTicket] = field(default_factory=dict)
    """Key -> the ticket that will seal it; a quarantined ticket is not here (nobody will seal it)."""
    new: bool = True
    """Nothing was ever sealed here."""

    def held(self) -> bool:
        """Does anybody write or read a chunk of it?"""
        return bool(self.writing) or any(map(self.slab.leased, self.sealed.values()))

    def digest(self, key: bytes) -> int:
        """64 bits that stand for the key in the policy's ghosts; spaces of one class must not collide."""
        return xxhash.xxh3_64_intdigest(key, self.number)

    def absent_state_of_all(self) -> KeyState | None:
        """Why keys aren't in `sealed`, if that is the same for all; None = ask for each."""
        if self.writing:
            return None
        if self.new:
            return KeyState.NAMESPACE_NEW
        return None if self.slab.eviction.ghosts else KeyState.NEVER_STORED

    def absent_state(self, key: bytes) -> KeyState:
        """Why a key isn't in `sealed`."""
        if key in self.writing:
            return KeyState.PENDING
        if self.new:
            return KeyState.NAMESPACE_NEW
        if self.slab.eviction.is_ghost(self.digest(key)):
            return KeyState.EVICTED
        return KeyState.NEVER_STORED


@dataclass(slots=True, eq=False)
class Namespace:
    """A namespace as a tenant's engines declared it; `spaces[g]` is KV group g."""

    record: NamespaceRecord
    spaces: list[Space] = field(default_factory=list)
    sessions: int = 0
    counts: Counts = field(default_factory=Counts)
    component_bytes: int = 0

    def idle(self) -> bool:
        """No session has it open and no chunk is left: it can be forgotten."""
        return not self.sessions and not any(space.sealed or space.writing for space in self.spaces)


def component_bytes(components: Mapping[str, str]) -> int:
    """Bytes of names and values, in UTF-8."""
    return sum(len(name.encode()) + len(value.encode()) for name, value in components.items())


class Index:
    """All namespaces and spaces of the node, and the totals of namespaces that were forgotten."""

    def __init__(self) -> None:
        self.namespaces: dict[tuple[str, bytes], Namespace] = {}
        self.spaces: dict[int, Space] = {}
        self.forgotten: dict[str, Counts] = {}
        self._next_space = 1

    def find(self, tenant: str, namespace: bytes) -> Namespace | None:
        """The namespace, if any session of this tenant declared it."""
        return self.namespaces.get((tenant, namespace))

    def room(self, tenant: str, component_bytes: int = 0) -> bool:
        """May this tenant declare one more, with so many bytes of components? Forgets idle ones if that makes room."""
        mine = [key for key in self.namespaces if key[0] == tenant]
        count, held = len(mine), sum(self.namespaces[key].component_bytes for key in mine)
        for key in mine:
            if count < NAMESPACES_PER_TENANT_MAX and held + component_bytes <= COMPONENT_BYTES_PER_TENANT_MAX:
                break
            if self.namespaces[key].idle():
                count, held = count - 1, held - self.namespaces[key].component_bytes
                self.forget(*key)
        return count < NAMESPACES_PER_TENANT_MAX and held + component_bytes <= COMPONENT_BYTES_PER_TENANT_MAX

    def opened(self, namespace: Namespace) -> None:
        """A session opens a namespace that is known: it is the last to be given up."""
        key = namespace.record.tenant, namespace.record.namespace
        self.namespaces[key] = self.namespaces.pop(key)

    def unused(self, tenant: str) -> Namespace | None:
        """Of the tenant's namespaces that no session has open and nobody reads, the one opened longest ago; None if
        there is none."""
        for (owner, _), namespace in self.namespaces.items():
            if owner == tenant and not namespace.sessions and not any(map(Space.held, namespace.spaces)):
                return namespace
        return None

    def declare(self, record: NamespaceRecord, slabs: list[SlabClass]) -> Namespace:
        """Open a namespace that isn't known yet; `slabs[g]` is the slab class of group g."""
        namespace = Namespace(record, component_bytes=component_bytes(record.components))
        for group, (chunk_bytes, slab) in enumerate(zip(record.chunk_bytes, slabs, strict=True)):
            space = Space(self._next_space, group, chunk_bytes, slab, namespace)
            self._next_space += 1
            self.spaces[space.number] = space
            namespace.spaces.append(space)
        self.namespaces[record.tenant, record.namespace] = namespace
        return namespace

    def forget(self, tenant: str, namespace: bytes) -> None:
        """Drop an idle namespace; its counts stay in the tenant's totals."""
        gone = self.namespaces.pop((tenant, namespace))
        for space in gone.spaces:
            del self.spaces[space.number]
        self.forgotten.setdefault(tenant, Counts()).add(gone.counts)

    def records(self, tenant: str | None = None) -> tuple[NamespaceRecord, ...]:
        """What is known, of one tenant or of all."""
        return tuple(n.record for key, n in self.namespaces.items() if tenant in (None, key[0]))

    def totals(self, tenant: str) -> Counts:
        """Counts of a tenant over all its namespaces, past ones included."""
        total = Counts()
        total.add(self.forgotten.get(tenant, Counts()))
        for key, namespace in self.namespaces.items():
            if key[0] == tenant:
                total.add(namespace.counts)
        return total

    def forget_slot(self, slab: SlabClass, n: int) -> Space:
        """Take the chunk in slot `n` off the index; its space."""
        space = self.spaces[slab.spaces[n]]
        key = slab.keys[n]
        if key is None or space.sealed.get(key) != n:
            raise AssertionError(f"slot {n} holds a chunk that the index doesn't know")
        del space.sealed[key]
        return space

    def check_invariants(self) -> None:
        """Every indexed chunk is sealed in a usable extent under its key, and the other way round."""
        for space in self.spaces.values():
            for key, n in space.sealed.items():
                slab = space.slab
                assert slab.states[n] == 2, f"key {key.hex()} is indexed at slot {n} in state {slab.states[n]}"
                assert slab.keys[n] == key, f"slot {n} holds another key than the index says"
                assert slab.spaces[n] == space.number, f"slot {n} belongs to another space than the index says"
                assert not slab.extent_of(n).draining, f"key {key.hex()} is indexed in a draining extent"
            for key, ticket in space.writing.items():
                assert key in ticket.keys, f"key {key.hex()} waits for a ticket that doesn't write it"
                assert ticket.waiting is None, f"key {key.hex()} waits for a quarantined ticket"
        slabs = {id(space.slab): space.slab for space in self.spaces.values()}
        for slab in slabs.values():
            indexed = sum(len(space.sealed) for space in self.spaces.values() if space.slab is slab)
            assert indexed == len(slab.eviction), f"{indexed} chunks indexed, {len(slab.eviction)} tracked"
