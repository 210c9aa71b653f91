"""Every message of the wire protocol, version 1: msgpack arrays tagged by a small integer.

Covers: what client and daemon say to each other on the two kinds of connection, and the packing of key batches.
Not here: frames and the preface of a connection (`wire.framing`), what a message means (`core.events`).

A connection starts with a preface of two bytes, kind and version (`wire.framing.preface`):

- kind `C`, **control**: requests with a `call` number, each answered by one reply with the same number; messages
  without `call` are one-way. The first must be Hello. Replies come in the order of the requests.
- kind `F`, **descriptors**: the first must be Attach, with the sender's own pidfd as SCM_RIGHTS; then ExtentsWanted,
  answered by ExtentsHeld with two descriptors (data read-write, table read-only) for each extent that the client
  lacked.

A process opens F first: Attached gives it the token that it names in the Hello of its control connection.
Lists of slots travel as three columns; a batch of keys travels as one blob plus lengths, beside the KV group it is of.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

from cachesvc.errors import ProtocolError
from cachesvc.types import GROUPS_MAX, KEY_BYTES_MAX, KEYS_PER_MESSAGE_MAX, NAMESPACE_BYTES, Priority, Role

WIRE_VERSION: Final = 1

LABEL_CHARS_MAX: Final = 256
COMPONENTS_MAX: Final = 64

U64: TypeAlias = Annotated[int, Meta(ge=0)]
"""Every number of the protocol: msgpack has none above 2**64 - 1, and none here is below 0."""

# --- parts ----------------------------------------------------------------------------------------------------------


class KeyBatch(msgspec.Struct, frozen=True, array_like=True):
    """Keys of one KV group; `lengths` is one number if all keys have the same length, else one a key (bytes)."""

    group: U64
    lengths: U64 | list[U64]
    blob: bytes


class Slots(msgspec.Struct, frozen=True, array_like=True):
    """Slots as three columns of equal length."""

    extents: list[U64]
    slots: list[U64]
    generations: list[U64]

    def __post_init__(self) -> None:
        """Columns of different length are refused, here and (as ProtocolError) by the peer's decoder."""
        if not len(self.extents) == len(self.slots) == len(self.generations):
            raise ValueError("the columns of slots have different lengths")

    def __len__(self) -> int:
        return len(self.slots)


class OpenWrite(msgspec.Struct, frozen=True, array_like=True):
    """A write ticket that the client still holds open when it comes back."""

    ticket: U64
    keys: KeyBatch
    slots: Slots


class OpenLease(msgspec.Struct, frozen=True, array_like=True):
    """A lease that the client still reads under when it comes back."""

    ticket: U64
    slots: Slots


class ExtentInfo(msgspec.Struct, frozen=True, array_like=True):
    """One extent of the client's tenant; `attached` says that its two descriptors come with this message, in order."""

    extent: U64
    slot_bytes: U64
    slot_count: U64
    attached: bool


# --- control: client to daemon --------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Join a session. `session` 16-64 bytes; `token` from Attached (b"" = no pidfd); `namespace` a 16-byte digest,
    `label` and `components` are for operators; `chunk_bytes[g]` is KV group g's.

    `member` tells the clients of one process apart. A scheduler names every ticket that it may still use: as many as a
    frame holds in full, in `writes` and `leases`, for a daemon that has restarted (`arena`: the uuid of the arena that
    their slots are of); of all others the numbers, in `open_writes` and `open_leases`. What a Hello leaves out is over.
    `over`: it was told that another scheduler came after it ("session"), and only says what it still holds.
    """

    call: U64
    session: Annotated[bytes, Meta(min_length=16, max_length=64)]
    role: Role
    token: Annotated[bytes, Meta(max_length=16)]
    namespace: Annotated[bytes, Meta(min_length=NAMESPACE_BYTES, max_length=NAMESPACE_BYTES)]
    label: Annotated[str, Meta(max_length=LABEL_CHARS_MAX)]
    components: Annotated[dict[str, str], Meta(max_length=COMPONENTS_MAX)]
    chunk_bytes: Annotated[list[Annotated[int, Meta(ge=1)]], Meta(min_length=1, max_length=GROUPS_MAX)]
    writes: list[OpenWrite]
    leases: list[OpenLease]
    member: Annotated[bytes, Meta(max_length=16)] = b""
    arena: Annotated[bytes, Meta(max_length=16)] = b""
    open_writes: list[U64] = []
    open_leases: list[U64] = []
    over: bool = False


class Lookup(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """State of every key; `touch` = this is the arrival of `request`, touch recency once."""

    call: U64
    keys: KeyBatch
    request: U64 = 0
    touch: bool = False


class Lease(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Lease what is in RAM: the leading run if `prefix`, else every such key. The client chooses `ticket`."""

    call: U64
    ticket: U64
    keys: KeyBatch
    request: U64 = 0
    touch: bool = False
    prefix: bool = True


class Release(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """One-way: end leases."""

    tickets: list[U64]


class Allocate(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Slots for keys in prefix order. The client chooses `ticket`; `priority` is a `types.Priority`."""

    call: U64
    ticket: U64
    keys: KeyBatch
    request: U64 = 0
    priority: Priority = Priority.INTERACTIVE


class Seal(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Every copy of the ticket is done; `lengths` in bytes, one a slot given."""

    call: U64
    ticket: U64
    lengths: list[U64]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """One-way: give up write tickets; nobody writes their slots any more."""

    tickets: list[U64]


class Done(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """One-way: this process writes the slots of these write tickets no more."""

    tickets: list[U64]


class EndRequests(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """One-way: these requests ended."""

    requests: list[U64]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Is the daemon there? Answered by Pong."""

    call: U64


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """An operator's question, allowed without Hello; `what` is "status" or "namespaces". Answered by Report."""

    call: U64
    what: str


class Claim(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """After Welcome: tickets that Hello named by number only and that the daemon, restarted, doesn't know. Answered by
    Claimed."""

    call: U64
    writes: list[OpenWrite]
    leases: list[OpenLease]


# --- control: daemon to client --------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """Answers Hello: the arena's uuid (16 bytes), and which of the claimed tickets are still owned."""

    call: U64
    arena: bytes
    writes_kept: list[U64]
    leases_kept: list[U64]
    extents_version: U64


class Looked(msgspec.Struct, frozen=True, array_like=True, tag=34):
    """One `types.KeyState` byte a key."""

    call: U64
    states: bytes
    extents_version: U64


class Leased(msgspec.Struct, frozen=True, array_like=True, tag=35):
    """One `types.KeyState` byte a key; slots and stored lengths (bytes) of those that say RAM, in order."""

    call: U64
    states: bytes
    slots: Slots
    lengths: list[U64]
    extents_version: U64


class Allocated(msgspec.Struct, frozen=True, array_like=True, tag=36):
    """One `types.AllocateState` byte a key; slots of those that say NEW, in order."""

    call: U64
    states: bytes
    slots: Slots
    extents_version: U64


class Sealed(msgspec.Struct, frozen=True, array_like=True, tag=37):
    """False: the ticket was not this session's any more, nothing was sealed."""

    call: U64
    ok: bool


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=38):
    """`extents_version` differs from what the client knows = ask for extents on the F connection."""

    call: U64
    extents_version: U64


class Report(msgspec.Struct, frozen=True, array_like=True, tag=39):
    """Answers Ask: JSON."""

    call: U64
    body: bytes


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=40):
    """The call broke a rule. `kind`: "namespace" (another chunk_bytes), "limit", "session" (another scheduler of it
    came later), or "protocol" (and the connection is closed after it; `call` is 0 if the message had none that could
    be read)."""

    call: U64
    kind: str
    detail: str


class Claimed(msgspec.Struct, frozen=True, array_like=True, tag=41):
    """Answers Claim: which of its tickets are owned again."""

    call: U64
    writes_kept: list[U64]
    leases_kept: list[U64]


# --- descriptors ----------------------------------------------------------------------------------------------------


class Attach(msgspec.Struct, frozen=True, array_like=True, tag=65):
    """Carries the sender's own pidfd, or no descriptor where the kernel has none."""

    call: U64


class ExtentsWanted(msgspec.Struct, frozen=True, array_like=True, tag=66):
    """Which extents of these slab classes (slot sizes in bytes) exist? `held` need no descriptors."""

    call: U64
    slot_bytes: list[U64]
    held: list[U64]


class Unmapped(msgspec.Struct, frozen=True, array_like=True, tag=67):
    """One-way: these extents are unmapped and closed here."""

    extents: list[U64]


class Attached(msgspec.Struct, frozen=True, array_like=True, tag=97):
    """Names this process in the Hello of its control connection; b"" if no pidfd came."""

    call: U64
    token: bytes


class ExtentsHeld(msgspec.Struct, frozen=True, array_like=True, tag=98):
    """Every extent of the classes asked for; unmap what is not listed. `more` = ask again, descriptors are left."""

    call: U64
    extents_version: U64
    extents: list[ExtentInfo]
    more: bool


ControlRequest: TypeAlias = (
    Hello | Claim | Lookup | Lease | Release | Allocate | Seal | Abort | Done | EndRequests | Ping | Ask
)
ControlReply: TypeAlias = Welcome | Claimed | Looked | Leased | Allocated | Sealed | Pong | Report | Refused
DescriptorRequest: TypeAlias = Attach | ExtentsWanted | Unmapped
DescriptorReply: TypeAlias = Attached | ExtentsHeld | Refused
Message: TypeAlias = ControlRequest | ControlReply | DescriptorRequest | DescriptorReply


# --- batches of keys ------------------------------------------------------------------------------------------------

KEYS_PER_UNPACK: Final = 64
"""Keys that one struct call cuts out of a blob: 13 ns a key at 32 bytes, where slices take 64."""


def pack_keys(group: int, keys: Sequence[bytes]) -> KeyBatch:
    """Keys of one group as one blob. ValueError (it is the caller's fault) for a key that isn't bytes, 1 to
    KEY_BYTES_MAX of them, for more than KEYS_PER_MESSAGE_MAX keys, or a group that can't be."""
    if not 0 <= group < GROUPS_MAX:
        raise ValueError(f"KV group {group}, there are at most {GROUPS_MAX}")
    if len(keys) > KEYS_PER_MESSAGE_MAX:
        raise ValueError(f"{len(keys)} keys in one message, at most {KEYS_PER_MESSAGE_MAX}")
    if not keys:
        return KeyBatch(group, [], b"")
    try:
        blob = b"".join(keys)
        lengths = list(map(len, keys))
    except TypeError as error:
        raise ValueError(f"keys are bytes: {error}") from error
    # other buffers are joined, too, and some have another length than bytes: the peer would cut them elsewhere
    if not isinstance(keys[0], bytes):
        raise ValueError(f"keys are bytes, not {type(keys[0]).__name__}")
    length = lengths[0]
    if lengths.count(length) == len(keys):
        check_key_length(length)
        _check_blob(blob, length * len(keys))
        return KeyBatch(group, length, blob)
    check_key_length(min(lengths))
    check_key_length(max(lengths))
    _check_blob(blob, sum(lengths))
    return KeyBatch(group, lengths, blob)


def _check_blob(blob: bytes, size: int) -> None:
    if len(blob) != size:
        raise ValueError(f"keys are bytes, and these of {size} have {len(blob)} bytes")


def check_key_length(length: int) -> None:
    """ValueError unless a key may have this many bytes."""
    if not 1 <= length <= KEY_BYTES_MAX:
        raise ValueError(f"a key of {length} bytes, allowed are 1 to {KEY_BYTES_MAX}")


def unpack_keys(batch: KeyBatch) -> list[bytes]:
    """The keys of a batch from the peer; ProtocolError for whatever `pack_keys` would not have packed."""
    if batch.group >= GROUPS_MAX:
        raise ProtocolError(f"KV group {batch.group}, there are at most {GROUPS_MAX}")
    if isinstance(batch.lengths, int):
        return _unpack_uniform(batch.blob, batch.lengths)
    return _unpack_mixed(batch.blob, batch.lengths)


def _unpack_uniform(blob: bytes, length: int) -> list[bytes]:
    if not 1 <= length <= KEY_BYTES_MAX:
        raise ProtocolError(f"a key of {length} bytes, allowed are 1 to {KEY_BYTES_MAX}")
    count, rest = divmod(len(blob), length)
    if rest:
        raise ProtocolError(f"{len(blob)} bytes of keys are no multiple of their length, {length}")
    if count > KEYS_PER_MESSAGE_MAX:
        raise ProtocolError(f"{count} keys in one message, at most {KEYS_PER_MESSAGE_MAX}")
    whole = count - count % KEYS_PER_UNPACK
    keys: list[bytes] = []
    if whole:
        for some in _cutter(length).iter_unpack(memoryview(blob)[: whole * length]):
            keys += some
    keys += [blob[at : at + length] for at in range(whole * length, len(blob), length)]
    return keys


@lru_cache(maxsize=KEY_BYTES_MAX)
def _cutter(length: int) -> struct.Struct:
    return struct.Struct(f"{length}s" * KEYS_PER_UNPACK)


def _unpack_mixed(blob: bytes, lengths: list[int]) -> list[bytes]:
    if len(lengths) > KEYS_PER_MESSAGE_MAX:
        raise ProtocolError(f"{len(lengths)} keys in one message, at most {KEYS_PER_MESSAGE_MAX}")
    if sum(lengths) != len(blob):
        raise ProtocolError(f"lengths of keys add up to {sum(lengths)} bytes, there are {len(blob)}")
    if lengths and not 1 <= min(lengths) <= max(lengths) <= KEY_BYTES_MAX:
        raise ProtocolError(f"keys of {min(lengths)} to {max(lengths)} bytes, allowed are 1 to {KEY_BYTES_MAX}")
    ends = list(accumulate(lengths))
    return [blob[end - length : end] for length, end in zip(lengths, ends, strict=True)]
