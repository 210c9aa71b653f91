"""Words and limits shared by core, wire, daemon and client.

Covers: plain enums, limits and value types that cross a layer. Not here: wire messages (`wire.messages`),
events and effects (`core.events`), settings (`config`).
"""

from __future__ import annotations

import enum
import hashlib
from typing import Final

KEY_BYTES_MAX: Final = 64
"""A longer key is refused: it would not fit a table entry (`arena.layout`)."""

KEYS_PER_MESSAGE_MAX: Final = 4096
"""One message holds the daemon's only thread for about a millisecond at this size; clients split larger batches."""

PAGE_BYTES: Final = 4096
"""Slots are multiples of it: O_DIRECT and mmap want it so."""

GROUPS_MAX: Final = 64
"""KV groups of one namespace; hybrid models of today have at most six."""

NAMESPACE_BYTES: Final = 16
"""Length of a namespace digest."""

NAMESPACE_USER: Final = b"user\0"
NAMESPACE_CONNECTOR: Final = b"connector\0"
"""What a namespace digest is taken over begins with one of these, so that a name that a user chose never meets the
namespace of an engine, whatever the name is."""


class KeyState(enum.IntEnum):
    """What a lookup says of one key; one byte on the wire. Values >= 16 are misses, and the value is the reason."""

    RAM = 1
    """Sealed in host RAM: a lease can be had now."""
    PENDING = 2
    """Somebody is writing it at this moment."""
    LOWER = 3
    """In a tier below RAM: it must be promoted first."""
    NEVER_STORED = 16
    EVICTED = 17
    PENDING_TIMEOUT = 18
    DEADLINE = 19
    DAEMON_DOWN = 20
    LOAD_FAILED = 21
    FILTERED = 22
    NAMESPACE_NEW = 23
    """Nothing was ever stored under this namespace."""
    NO_ROOM = 24
    """Present, but this session may not hold more leases now."""


KEY_MISS_FIRST: Final = 16
"""A `KeyState` at or above this is a miss."""


class AllocateState(enum.IntEnum):
    """What an allocation says of one key; one byte on the wire."""

    NEW = 1
    """A slot was given: write it, then seal or abort the ticket."""
    PRESENT = 2
    """Sealed already: nothing to write."""
    BUSY = 3
    """Somebody else writes it at this moment."""
    RETRY = 4
    """Not now (a cap of this session, or an extent is being made); the same key may be offered again."""
    NO_ROOM = 5
    """Nothing can be evicted for it."""


class Priority(enum.IntEnum):
    """Who may evict whom: an allocation evicts chunks of its own priority or lower, lowest first."""

    BATCH = 0
    INTERACTIVE = 1


class Role(enum.StrEnum):
    """What a process does in its session. Only a scheduler's connection allocates, seals and leases."""

    SCHEDULER = "scheduler"
    WORKER = "worker"


def slot_bytes_for(chunk_bytes: int) -> int:
    """The slab class of a chunk: `chunk_bytes` rounded up to whole pages, in bytes."""
    return -(-chunk_bytes // PAGE_BYTES) * PAGE_BYTES


def user_namespace(name: str) -> bytes:
    """Digest of a namespace that a user named; ValueError if the name can't be written in UTF-8."""
    return hashlib.blake2b(NAMESPACE_USER + name.encode(), digest_size=NAMESPACE_BYTES).digest()
