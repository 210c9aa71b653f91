"""What can happen to a node (events) and what it wants done (effects): the whole vocabulary of `core.Node`.

`Node.handle(event, now) -> list[effect]` is the one door. Events come from connections, finished I/O and the clock;
effects are carried out by `daemon.runner` **in list order**, so that table marks reach shared memory before the reply
that lets a client rely on them. All are frozen; bytes and tuples are never changed after they were made.

Numbers that name things, all chosen outside and opaque here unless said otherwise:

- `connection` one control connection (runner)
- `process` one client process, known by its pidfd (runner; None = it gave none)
- `call` the request number of a connection, echoed in the reply (client)
- `ticket` one write or lease in flight, unique in its session (client): an abort or release needs no reply to be named
- `request` the engine's request that a batch belongs to, unique in its session, 0 = none (client)
- `extent` never used twice in the life of an arena (node)

Not here: how they look on the wire (`wire.messages`), how a mark is written (`arena.layout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cachesvc.types import Priority, Role

# --- values inside events and effects -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Some slots, as three columns of equal length; `generations` is what each had when it was handed out."""

    extents: tuple[int, ...]
    slots: tuple[int, ...]
    generations: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True)
class WriteClaim:
    """A write ticket that a reconnecting session still holds open; `keys[i]` is being written into `slots[i]`."""

    ticket: int
    group: int
    keys: tuple[bytes, ...]
    slots: SlotRun


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    """A lease that a reconnecting session still reads under."""

    ticket: int
    slots: SlotRun


@dataclass(frozen=True, slots=True)
class NamespaceRecord:
    """What a tenant's namespace was declared with; `components` say why two namespaces differ (shown to operators)."""

    tenant: str
    namespace: bytes
    label: str
    components: Mapping[str, str]
    chunk_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TableColumns:
    """One extent's table as `arena.layout` decoded it: columns of length `slot_count`, entries checked already.

    `states` holds 0 free, 1 writing, 2 sealed (`core.slots.SlotState`); an entry whose checksum failed arrives as
    *writing* (nobody may read it, and somebody may hold it). Keys, lengths, namespaces, groups are meaningful where
    sealed. `last_use` is in seconds of the clock that `now` comes from.
    """

    generations: NDArray[np.uint64]
    states: NDArray[np.uint8]
    namespaces: Sequence[bytes]
    groups: Sequence[int]
    keys: Sequence[bytes]
    lengths: NDArray[np.uint32]
    last_use: NDArray[np.float64]


# --- events: connections --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """A client joins a session (or comes back to it) and opens its namespace; `chunk_bytes[g]` is group g's.

    The tenant comes from the socket, never from the client. `member` tells the clients of one process apart.
    `open_writes` and `open_leases` are numbers of tickets that it may still use and that `writes` and `leases` don't
    describe: together these four are complete, and what they leave out it uses no more. `over`: it was told that
    another scheduler came after it, and only says what it still holds.
    """

    connection: int
    tenant: str
    process: int | None
    call: int
    session: bytes
    role: Role
    namespace: bytes
    label: str
    components: Mapping[str, str]
    chunk_bytes: tuple[int, ...]
    writes: tuple[WriteClaim, ...] = ()
    leases: tuple[LeaseClaim, ...] = ()
    member: bytes = b""
    open_writes: tuple[int, ...] = ()
    open_leases: tuple[int, ...] = ()
    over: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """After Welcome: descriptions of tickets that Hello had no room for and that the daemon didn't know by number."""

    connection: int
    call: int
    writes: tuple[WriteClaim, ...]
    leases: tuple[LeaseClaim, ...]


@dataclass(frozen=True, slots=True)
class Lookup:
    """State of every key. With `touch` this is the request's arrival: recency is touched once, tail first."""

    connection: int
    call: int
    group: int
    keys: list[bytes]
    request: int
    touch: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """Lease what is sealed in RAM: the leading run if `prefix`, else every such key. Answered per key."""

    connection: int
    call: int
    ticket: int
    group: int
    keys: list[bytes]
    request: int
    touch: bool
    prefix: bool


@dataclass(frozen=True, slots=True)
class Release:
    """End leases; unknown tickets are ignored (the reply that named one may have been late)."""

    connection: int
    tickets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Allocate:
    """Slots for keys in prefix order; one ticket covers all slots given."""

    connection: int
    call: int
    ticket: int
    group: int
    keys: list[bytes]
    request: int
    priority: Priority


@dataclass(frozen=True, slots=True)
class Seal:
    """All copies of a write ticket are done; `lengths[i]` bytes were written into its i-th slot."""

    connection: int
    call: int
    ticket: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Give up write tickets; nobody writes their slots any more. Unknown tickets are ignored."""

    connection: int
    tickets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """This process no longer writes the slots of these tickets (asked for when the scheduler's connection is lost)."""

    connection: int
    tickets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndRequests:
    """Requests ended: their chunks lose the protection from their own request's allocations."""

    connection: int
    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection is gone, for whatever reason; its process may live on."""

    connection: int


@dataclass(frozen=True, slots=True)
class ProcessDied:
    """The pidfd says that every thread of the process has ended: it reads and writes nothing any more."""

    process: int


# --- events: extents and time ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpareMade:
    """The data file of `extent` exists, reserved and populated, and belongs to no slab class yet."""

    extent: int


@dataclass(frozen=True, slots=True)
class SpareFailed:
    """`extent` couldn't be made (answers MakeSpare) or formatted (answers FormatExtent): nothing is left of it, nor of
    the source. `reason` is for the operator."""

    extent: int
    reason: str


@dataclass(frozen=True, slots=True)
class ExtentFormatted:
    """`extent` has its table and can be used. Answers FormatExtent."""

    extent: int


@dataclass(frozen=True, slots=True)
class ExtentDropped:
    """Both files of `extent` are unlinked (its bytes come back when the last process unmaps). Answers DropExtent."""

    extent: int


@dataclass(frozen=True, slots=True)
class ExtentsMapped:
    """Descriptors of `extents` were handed to `process`."""

    process: int
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExtentsUnmapped:
    """`process` says that it has unmapped and closed `extents`."""

    process: int
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExtentDamaged:
    """Somebody truncated the data file or broke the table: nothing in `extent` may be served again."""

    extent: int
    reason: str


@dataclass(frozen=True, slots=True)
class SpareRestored:
    """At start: a spare of the last run was found."""

    extent: int


@dataclass(frozen=True, slots=True)
class ExtentRestored:
    """At start: an extent of the last run was found and its table read."""

    extent: int
    tenant: str
    slot_bytes: int
    columns: TableColumns


@dataclass(frozen=True, slots=True)
class NamespacesRestored:
    """At start, before any ExtentRestored: the namespaces that the last run knew."""

    records: tuple[NamespaceRecord, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """At start, after everything was restored: the arena may grow, and the grace time begins if extents came back."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; sent a few times a second."""


Event: TypeAlias = (
    Hello
    | Claim
    | Lookup
    | Lease
    | Release
    | Allocate
    | Seal
    | Abort
    | Done
    | EndRequests
    | ConnectionLost
    | ProcessDied
    | SpareMade
    | SpareFailed
    | ExtentFormatted
    | ExtentDropped
    | ExtentsMapped
    | ExtentsUnmapped
    | ExtentDamaged
    | SpareRestored
    | ExtentRestored
    | NamespacesRestored
    | Started
    | Tick
)

# --- effects: replies -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answers Hello. Claims that are not in `writes_kept` / `leases_kept` are lost: stop using their slots."""

    connection: int
    call: int
    writes_kept: tuple[int, ...]
    leases_kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Claimed:
    """Answers Claim, as Welcome does for the claims of Hello."""

    connection: int
    call: int
    writes_kept: tuple[int, ...]
    leases_kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Looked:
    """Answers Lookup: one `KeyState` byte a key."""

    connection: int
    call: int
    states: bytes


@dataclass(frozen=True, slots=True)
class Leased:
    """Answers Lease: one `KeyState` byte a key; `slots` and `lengths` (bytes stored) for those of RAM, in order."""

    connection: int
    call: int
    states: bytes
    slots: SlotRun
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Allocated:
    """Answers Allocate: one `AllocateState` byte a key; `slots` for those that say NEW, in order."""

    connection: int
    call: int
    states: bytes
    slots: SlotRun


@dataclass(frozen=True, slots=True)
class Sealed:
    """Answers Seal; False = the ticket is not (or no longer) this session's, nothing was sealed."""

    connection: int
    call: int
    ok: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Answers a call that breaks a rule or a limit; `kind` is "namespace", "limit", "session" or "protocol".

    "session" means that another scheduler of the session came later, "protocol" that the connection is closed after
    the reply.
    """

    connection: int
    call: int
    kind: str
    detail: str


# --- effects: tables and extents ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MarkWriting:
    """Set the state words of slots of one extent to *writing* at these generations."""

    extent: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MarkSealed:
    """Write the fields of slots of one extent, then each entry's checksum, then its word as *sealed*."""

    extent: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]
    namespace: bytes
    group: int
    keys: tuple[bytes, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MarkFree:
    """Set the state words of slots of one extent to *free* at these (raised) generations."""

    extent: int
    slots: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveLastUse:
    """Write the last-use column of one extent (seconds, one a slot): order of eviction after a restart."""

    extent: int
    last_use: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SaveNamespaces:
    """Keep these records across restarts."""

    records: tuple[NamespaceRecord, ...]


@dataclass(frozen=True, slots=True)
class MakeSpare:
    """Make, reserve and populate the data file of a new extent. Answered by SpareMade or SpareFailed."""

    extent: int


@dataclass(frozen=True, slots=True)
class FormatExtent:
    """Turn the data file of `source` (a spare, or a drained extent of the same tenant) into `extent`: new table, all
    slots free at generation 0; the old table is unlinked first. Answered by ExtentFormatted or SpareFailed."""

    source: int
    extent: int
    tenant: str
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class DropExtent:
    """Unlink both files. Answered by ExtentDropped."""

    extent: int


Effect: TypeAlias = (
    Welcome
    | Claimed
    | Looked
    | Leased
    | Allocated
    | Sealed
    | Refused
    | MarkWriting
    | MarkSealed
    | MarkFree
    | SaveLastUse
    | SaveNamespaces
    | MakeSpare
    | FormatExtent
    | DropExtent
)
