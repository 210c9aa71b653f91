"""What a session is asked with and what it gets: identity, keys, tickets, grants.

Covers: plain values, checked. Not here: asking (`client.session`), what travels (`wire.messages`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from cachesvc.types import GROUPS_MAX, KEYS_PER_MESSAGE_MAX, KeyState, Role
from cachesvc.wire.messages import COMPONENTS_MAX, LABEL_CHARS_MAX, KeyBatch, Slots, pack_keys

WINDOW: Final = 8
"""Messages of one call that are sent before their replies are read; the deadline is looked at between windows."""

CHUNK_BYTES_MAX: Final = 1 << 31
COMPONENT_CHARS_MAX: Final = 4096
"""The daemon takes no larger chunk, nor a longer name and value of a component."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who joins which session, in which namespace; see `wire.messages.Hello`."""

    session: bytes
    role: Role
    namespace: bytes
    label: str
    components: dict[str, str]
    chunk_bytes: tuple[int, ...]

    def check(self) -> None:
        """ValueError for what no daemon would take."""
        if not isinstance(self.session, bytes):
            raise ValueError(f"a session id is bytes, not {self.session!r}")
        if not 16 <= len(self.session) <= 64:
            raise ValueError(f"a session id has 16 to 64 bytes, not {len(self.session)}")
        if not 1 <= len(self.chunk_bytes) <= GROUPS_MAX:
            raise ValueError(f"a namespace has 1 to {GROUPS_MAX} KV groups, not {len(self.chunk_bytes)}")
        for size in self.chunk_bytes:
            if type(size) is not int or not 0 < size <= CHUNK_BYTES_MAX:
                raise ValueError(f"chunk_bytes is 1 to {CHUNK_BYTES_MAX}, not {size!r}")
        if len(self.label) > LABEL_CHARS_MAX:
            raise ValueError(f"a label has at most {LABEL_CHARS_MAX} characters, not {len(self.label)}")
        if len(self.components) > COMPONENTS_MAX:
            raise ValueError(f"a namespace has at most {COMPONENTS_MAX} components, not {len(self.components)}")
        for name, value in self.components.items():
            if len(name) + len(value) > COMPONENT_CHARS_MAX:
                raise ValueError(
                    f"component {name[:40]!r} of a namespace is longer than {COMPONENT_CHARS_MAX} characters"
                )


class KeyRun:
    """Keys of one KV group, in prefix order, checked and packed for the wire in batches that a message may hold.

    ValueError for keys that aren't 1 to 64 bytes long, or a group that can't be.
    """

    __slots__ = ("batches", "group", "keys")

    def __init__(self, group: int, keys: Sequence[bytes]) -> None:
        self.group = group
        self.keys = keys
        self.batches = [pack_keys(group, part) for part in self.parts()]

    def __len__(self) -> int:
        return len(self.keys)

    def parts(self) -> list[Sequence[bytes]]:
        """The keys of each batch."""
        if len(self.keys) <= KEYS_PER_MESSAGE_MAX:
            return [self.keys] if self.keys else []
        return [self.keys[at : at + KEYS_PER_MESSAGE_MAX] for at in range(0, len(self.keys), KEYS_PER_MESSAGE_MAX)]

    def windows(self) -> Iterator[tuple[Sequence[KeyBatch], Sequence[Sequence[bytes]]]]:
        """Batches, and the keys of each, as many as are sent at once."""
        parts = self.parts()
        for at in range(0, len(parts), WINDOW):
            yield self.batches[at : at + WINDOW], parts[at : at + WINDOW]

    def sizes(self) -> list[int]:
        """How many keys each batch has."""
        return [len(part) for part in self.parts()]


@dataclass(slots=True, eq=False)
class Ticket:
    """One ticket: what one message got. `keys` of a write are those that got a slot, in the order of `slots`."""

    number: int
    slots: Slots
    keys: KeyBatch | None = None
    lost: bool = False
    arena: bytes = b""
    """Uuid of the arena that the slots are of: another one may have extents of the same numbers."""

    def claim_bytes(self) -> int:
        """About as many bytes as it takes to describe it."""
        return 32 + 24 * len(self.slots) + (len(self.keys.blob) if self.keys is not None else 0)


@dataclass(slots=True, eq=False)
class Grant:
    """What one call got: a state for each key, and tickets (one a message) for the keys that got a slot, in order."""

    states: bytes
    tickets: list[Ticket] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Bytes stored in each leased slot."""
    failed: KeyState = KeyState.DAEMON_DOWN
    """Why the last keys have no answer, if they have none."""

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(extent, slot, generation) of every slot, in order."""
        for ticket in self.tickets:
            yield from zip(ticket.slots.extents, ticket.slots.slots, ticket.slots.generations, strict=True)

    @property
    def arena(self) -> bytes:
        """Uuid of the arena that the slots are of. (Two arenas in one grant: all but the first one's are lost.)"""
        return self.tickets[0].arena if self.tickets else b""

    @property
    def lost(self) -> bool:
        """Is any of the tickets not ours any more?"""
        return any(ticket.lost for ticket in self.tickets)


class Peek:
    """What the daemon says of keys that were asked for without waiting; complete when `states` isn't None."""

    __slots__ = ("_missing", "_parts", "states")

    def __init__(self, sizes: Sequence[int]) -> None:
        self.states: bytes | None = None if sizes else b""
        """One `KeyState` byte a key, in the order asked."""
        self._parts = [b""] * len(sizes)
        self._missing = len(sizes)

    def take(self, part: int, states: bytes) -> None:
        """The answer to one message came."""
        self._parts[part] = states
        self._missing -= 1
        if not self._missing:
            self.states = b"".join(self._parts)
