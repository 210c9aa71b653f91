"""One process's part in a session: calls in the daemon's words, and the tickets that are open.

Covers: batches of any size, tickets and what becomes of them, reasons of misses. Not here: the public API
(`client.client`), the connection and its states (`client.channel`), reconnecting (`client.keeper`). The connector
builds on this layer: several KV groups, a deadline for each call, roles.

A ticket is open from the daemon's reply until its owner settles it; meanwhile every Hello names it::

    lease / allocate --> open --> release | seal | abort      (settled: forgotten here)
                           \\--> lost: the daemon came back without it, or with another arena

Bytes under a lost lease count as changed; a lost write is never sealed. "No" is a value here: whatever happens to the
daemon, calls answer, with the reason as state. ValueError is for the caller's mistakes only: keys, groups, sizes.

`_leases` and `_writes` are changed by the thread whose ticket it is, in single steps, and read by the background
thread.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cachesvc.client.channel import Channel
from cachesvc.client.mappings import Extents
from cachesvc.errors import ProtocolError
from cachesvc.types import (
    GROUPS_MAX,
    KEYS_PER_MESSAGE_MAX,
    AllocateState,
    KeyState,
    Priority,
    Role,
    slot_bytes_for,
)
from cachesvc.wire.framing import FRAME_BYTES_MAX
from cachesvc.wire.messages import (
    Abort,
    Allocate,
    Allocated,
    ControlReply,
    Done,
    EndRequests,
    Hello,
    KeyBatch,
    Lease,
    Leased,
    Looked,
    Lookup,
    OpenLease,
    OpenWrite,
    Refused,
    Release,
    Seal,
    Sealed,
    Slots,
    Welcome,
    pack_keys,
)

TICKETS_OPEN_MAX: Final = 4096
"""Half of what the daemon allows a session; above it calls answer NO_ROOM."""

CLAIM_BYTES_MAX: Final = FRAME_BYTES_MAX // 2
"""Of tickets named in a Hello, as estimated; more can't be claimed and are lost."""

_RAM: Final = bytes([KeyState.RAM])
_NEW: Final = bytes([AllocateState.NEW])
_NO_SLOTS: Final = Slots([], [], [])
_KEY_STATES: Final = bytes(KeyState)
_ALLOCATE_STATES: Final = bytes(AllocateState)

R = TypeVar("R", bound=ControlReply)


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
        if not 16 <= len(self.session) <= 64:
            raise ValueError(f"a session id has 16 to 64 bytes, not {len(self.session)}")
        if not 1 <= len(self.chunk_bytes) <= GROUPS_MAX:
            raise ValueError(f"a namespace has 1 to {GROUPS_MAX} KV groups, not {len(self.chunk_bytes)}")
        for size in self.chunk_bytes:
            if not isinstance(size, int) or not 0 < size < 1 << 32:
                raise ValueError(f"chunk_bytes is 1 to {(1 << 32) - 1}, not {size!r}")


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


@dataclass(slots=True, eq=False)
class Grant:
    """What one call got: a state for each key, and tickets (one a message) for the keys that got a slot, in order."""

    states: bytes
    tickets: list[Ticket] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Bytes stored in each leased slot."""

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(extent, slot, generation) of every slot, in order."""
        for ticket in self.tickets:
            yield from zip(ticket.slots.extents, ticket.slots.slots, ticket.slots.generations, strict=True)

    @property
    def lost(self) -> bool:
        """Is any of the tickets not ours any more?"""
        return any(ticket.lost for ticket in self.tickets)


class Session:
    """A process's part in a session. Thread-safe; no call takes longer than its deadline (monotonic seconds)."""

    def __init__(self, identity: Identity, wake: Callable[[], None]) -> None:
        identity.check()
        self.identity = identity
        self.channel = Channel(wake, self._hear)
        self.extents = Extents(slot_bytes_for(size) for size in identity.chunk_bytes)
        self.arena = b""
        """Uuid of the daemon's arena; b"" until it was heard."""
        self.refusal = ""
        """Why the daemon won't have this namespace; nothing works from then on."""
        self.misses: dict[KeyState, int] = {state: 0 for state in KeyState if state >= KeyState.NEVER_STORED}
        """Keys asked for and not had, by reason."""
        self.refusals: dict[AllocateState, int] = {state: 0 for state in AllocateState if state >= AllocateState.BUSY}
        """Keys that got no slot to write, by reason; RETRY also when there was no answer."""
        self.unsealed = 0
        """Write tickets that couldn't be sealed."""
        self._tickets = itertools.count(1)
        self._leases: dict[int, Ticket] = {}
        self._writes: dict[int, Ticket] = {}
        self._sealing: dict[int, tuple[Grant, list[int]]] = {}
        """Call number of a Seal that nobody waits for -> what it seals (one ticket) and the lengths."""
        self._counting = threading.Lock()  # the counters above

    # --- asking -----------------------------------------------------------------------------------------------------

    def lookup(self, keys: KeyRun, deadline: float, *, request: int = 0, touch: bool = False) -> bytes:
        """One `KeyState` byte a key; every key is probed. `touch`: this is the arrival of `request`."""
        number, sizes = self.channel.number, keys.sizes()
        calls = [Lookup(number(), batch, request, touch) for batch in keys.batches]

        def accept(replies: list[ControlReply]) -> bytes:
            return b"".join([_looked(reply, size) for reply, size in zip(replies, sizes, strict=True)])

        states = self.channel.call(calls, accept, deadline) if calls else b""
        if isinstance(states, KeyState):
            states = _of(states, len(keys))
        self.count_misses(states)
        return states

    def lease(
        self, keys: KeyRun, deadline: float, *, request: int = 0, touch: bool = False, prefix: bool = True
    ) -> Grant:
        """Lease what is in RAM: the leading run, or with `prefix` False every such key. `release` what it returns.

        States are of `KeyState`; those behind the leading run's end repeat the state of the gap.
        """
        tickets = self._number_tickets(keys)
        calls = [
            Lease(self.channel.number(), ticket, batch, request, touch, prefix)
            for ticket, batch in zip(tickets, keys.batches, strict=False)
        ]

        def accept(replies: list[ControlReply]) -> Grant:
            grant = Grant(b"")
            for ticket, reply, size in zip(tickets, replies, keys.sizes(), strict=True):
                self._accept_lease(grant, ticket, _leased(reply, size, prefix=prefix), prefix=prefix)
            return grant

        grant = self.channel.call(calls, accept, deadline, (Release, tickets)) if calls else KeyState.NO_ROOM
        if isinstance(grant, KeyState):
            grant = Grant(_of(grant, len(keys)))
        self.count_misses(grant.states)
        return grant

    def allocate(
        self, keys: KeyRun, deadline: float, *, request: int = 0, priority: Priority = Priority.INTERACTIVE
    ) -> Grant:
        """Slots for the keys that are new, in prefix order. `seal` or `abort` what it returns.

        States are of `AllocateState`; without an answer all are RETRY. Once a message met a refusal, what later
        messages got is given back: it would lie behind a hole.
        """
        tickets = self._number_tickets(keys)
        calls = [
            Allocate(self.channel.number(), ticket, batch, request, priority)
            for ticket, batch in zip(tickets, keys.batches, strict=False)
        ]

        def accept(replies: list[ControlReply]) -> Grant:
            grant = Grant(b"")
            for ticket, reply, part in zip(tickets, replies, keys.parts(), strict=True):
                self._accept_write(grant, ticket, _allocated(reply, len(part)), keys.group, part)
            return grant

        grant = self.channel.call(calls, accept, deadline, (Abort, tickets)) if calls else KeyState.NO_ROOM
        if isinstance(grant, KeyState):
            grant = Grant(_of(AllocateState.RETRY, len(keys)))
        if grant.states.count(_NEW) < len(keys):
            with self._counting:
                for reason in self.refusals:
                    self.refusals[reason] += grant.states.count(reason)
        return grant

    # --- settling ---------------------------------------------------------------------------------------------------

    def release(self, grant: Grant, *, along: bool = False) -> None:
        """End the leases of a grant. Once only. `along`: the daemon hears of it with the next call, a little later."""
        self._settle(self._leases, grant, Release, along=along)

    def abort(self, grant: Grant) -> None:
        """Give up the writes of a grant: nobody writes their slots any more. Once only."""
        self._settle(self._writes, grant, Abort)

    def seal(self, grant: Grant, lengths: Sequence[int], deadline: float) -> bool:
        """Every copy into the slots of a grant is done, `lengths` bytes each: are all of its chunks readable now?

        False: some tickets weren't sealed (lost, no daemon, deadline missed). They are counted, and aborted. Once only.
        """
        calls, tickets, at = [], [], 0
        for ticket in grant.tickets:
            mine = list(lengths[at : at + len(ticket.slots)])
            at += len(mine)
            if not ticket.lost:
                calls.append(Seal(self.channel.number(), ticket.number, mine))
                tickets.append(ticket.number)

        def accept(replies: list[ControlReply]) -> int:
            return sum(not isinstance(reply, Refused) and _expect(reply, Sealed).ok for reply in replies)

        sealed: int | KeyState = 0
        try:
            if calls:
                sealed = self.channel.call(calls, accept, deadline)
        finally:
            if isinstance(sealed, KeyState) or sealed < len(grant.tickets):
                # an abort of what was sealed after all changes nothing
                self._settle(self._writes, grant, Abort)
                sealed = 0 if isinstance(sealed, KeyState) else sealed
                with self._counting:
                    self.unsealed += len(grant.tickets) - sealed
            else:
                self._settle(self._writes, grant, None)
        return sealed == len(grant.tickets)

    def seal_soon(self, grant: Grant, lengths: Sequence[int], deadline: float) -> bool:
        """Like `seal` of one ticket, without waiting for the daemon's word: True says that the seal is on its way.

        The daemon finds it before any later question of anybody. Until its word has come the ticket stays open, so a
        daemon that dies meanwhile gets the same seal again from `seals_again`.
        """
        (ticket,) = grant.tickets
        if ticket.lost:
            self._settle(self._writes, grant, Abort)
            self._count_unsealed(1)
            return False
        call = self.channel.number()
        self._sealing[call] = grant, list(lengths)
        if self.channel.post(Seal(call, ticket.number, list(lengths)), deadline):
            return True
        if self._sealing.pop(call, None) is not None:
            self._settle(self._writes, grant, Abort)
            self._count_unsealed(1)
        return False

    def writes_elsewhere(self, ticket: int) -> None:
        """This process, a worker, writes slots of a ticket that the session's scheduler holds, until `done`."""
        self._writes[ticket] = Ticket(ticket, _NO_SLOTS, KeyBatch(0, [], b""))

    def done(self, tickets: Sequence[int]) -> None:
        """This process writes the slots of these tickets of the session no more."""
        for ticket in tickets:
            self._writes.pop(ticket, None)
        self.channel.tell(Done, tickets)

    def end_requests(self, requests: Sequence[int]) -> None:
        """These requests ended."""
        self.channel.tell(EndRequests, requests)

    def count_misses(self, states: bytes) -> None:
        """Count the keys that `states` (of `KeyState`) calls misses."""
        if states.count(_RAM) == len(states):
            return
        with self._counting:
            for reason in self.misses:
                self.misses[reason] += states.count(reason)

    def idle(self) -> bool:
        """Is no ticket open?"""
        return not self._leases and not self._writes

    # --- joining (background thread) --------------------------------------------------------------------------------

    def hello(self, token: bytes) -> Hello:
        """What to say first on a new connection."""
        identity, claims = self.identity, self._claims()
        return Hello(
            call=self.channel.number(),
            session=identity.session,
            role=identity.role,
            token=token,
            namespace=identity.namespace,
            label=identity.label,
            components=dict(identity.components),
            chunk_bytes=list(identity.chunk_bytes),
            writes=[
                OpenWrite(ticket.number, ticket.keys, ticket.slots) for ticket in claims if ticket.keys is not None
            ],
            leases=[OpenLease(ticket.number, ticket.slots) for ticket in claims if ticket.keys is None],
        )

    def welcomed(self, welcome: Welcome) -> None:
        """The daemon knows us again; what it hasn't kept is lost.

        Nothing can have been opened since `hello`: no call gets an answer while there is no connection.
        """
        other = self.extents.enter(welcome.arena)
        self.arena = welcome.arena
        for tickets, kept in (self._writes, welcome.writes_kept), (self._leases, welcome.leases_kept):
            for ticket in list(tickets.values()):
                if other or ticket.number not in kept:
                    ticket.lost = True

    def seals_again(self) -> list[Seal]:
        """After Welcome: the seals whose outcome nobody knows, for the new connection."""
        unknown, self._sealing = self._sealing, {}
        seals = []
        for grant, lengths in unknown.values():
            (ticket,) = grant.tickets
            if ticket.lost:
                self._settle(self._writes, grant, None)
                self._count_unsealed(1)
            else:
                seals.append(Seal(self.channel.number(), ticket.number, lengths))
                self._sealing[seals[-1].call] = grant, lengths
        return seals

    def _hear(self, reply: ControlReply) -> None:
        """Every reply passes here, in the thread that holds the channel."""
        found = self._sealing.pop(reply.call, None) if self._sealing else None
        if found is not None:
            sealed = isinstance(reply, Sealed) and reply.ok
            self._settle(self._writes, found[0], None)
            self._count_unsealed(0 if sealed else 1)

    def _count_unsealed(self, tickets: int) -> None:
        with self._counting:
            self.unsealed += tickets

    def disown(self) -> None:
        """In the child of a fork: nothing here is ours, and nothing is sent."""
        self.channel.disown()
        self.extents.disown()
        self._counting = threading.Lock()
        for ticket in (*self._writes.values(), *self._leases.values()):
            ticket.lost = True

    def _claims(self) -> list[Ticket]:
        """Open tickets, writes first, as many as a Hello can name."""
        claims, room_bytes = [], CLAIM_BYTES_MAX
        for ticket in (*list(self._writes.values()), *list(self._leases.values())):
            room_bytes -= 32 + 24 * len(ticket.slots) + (len(ticket.keys.blob) if ticket.keys is not None else 0)
            if not ticket.lost and room_bytes >= 0:
                claims.append(ticket)
        return claims

    # --- tickets ----------------------------------------------------------------------------------------------------

    def _number_tickets(self, keys: KeyRun) -> list[int]:
        """A ticket number for each batch; none at all if too many are open."""
        if len(self._leases) + len(self._writes) + len(keys.batches) > TICKETS_OPEN_MAX:
            return []
        return [next(self._tickets) for _ in keys.batches]

    def _accept_lease(self, grant: Grant, ticket: int, leased: Leased, *, prefix: bool) -> None:
        states, slots = leased.states, leased.slots
        if prefix and grant.states.count(_RAM) < len(grant.states):
            states = _of(grant.states[-1], len(states))
            if len(slots):
                self.channel.tell(Release, [ticket])
        elif len(slots):
            opened = self._leases[ticket] = Ticket(ticket, slots)
            grant.tickets.append(opened)
            grant.lengths += leased.lengths
        grant.states += states

    def _accept_write(self, grant: Grant, ticket: int, got: Allocated, group: int, part: Sequence[bytes]) -> None:
        states, slots = got.states, got.slots
        refused = next((state for state in grant.states if state >= AllocateState.RETRY), None)
        if refused is not None:
            states = states.replace(_NEW, _of(refused, 1))
            if len(slots):
                self.channel.tell(Abort, [ticket])
        elif len(slots):
            new = [key for key, state in zip(part, states, strict=True) if state == AllocateState.NEW]
            opened = self._writes[ticket] = Ticket(ticket, slots, pack_keys(group, new))
            grant.tickets.append(opened)
        grant.states += states

    def _settle(
        self,
        tickets: dict[int, Ticket],
        grant: Grant,
        kind: type[Release] | type[Abort] | None,
        *,
        along: bool = False,
    ) -> None:
        for ticket in grant.tickets:
            del tickets[ticket.number]
        if kind is not None and grant.tickets:
            tell = self.channel.tell_along if along else self.channel.tell
            tell(kind, [ticket.number for ticket in grant.tickets])


# --- replies that may be believed -----------------------------------------------------------------------------------


def _of(state: int, count: int) -> bytes:
    """`count` times the same state."""
    return bytes((state,)) * count


def _expect(reply: ControlReply, kind: type[R]) -> R:
    if not isinstance(reply, kind):
        raise ProtocolError(f"{type(reply).__name__} came where {kind.__name__} was to come")
    return reply


def _looked(reply: ControlReply, size: int) -> bytes:
    """The states of a lookup of `size` keys. A refusal (a limit) says that there is no room."""
    if isinstance(reply, Refused):
        return _of(KeyState.NO_ROOM, size)
    states = _expect(reply, Looked).states
    if len(states) != size or states.translate(None, _KEY_STATES):
        raise ProtocolError(f"{len(states)} states came for {size} keys, or states that nobody knows")
    return states


def _leased(reply: ControlReply, size: int, *, prefix: bool) -> Leased:
    """A lease of `size` keys with a state for each: what is missing behind a leading run gets the state of the gap."""
    if isinstance(reply, Refused):
        return Leased(reply.call, _of(KeyState.NO_ROOM, size), _NO_SLOTS, [], 0)
    leased = _expect(reply, Leased)
    states, count = leased.states, len(leased.slots)
    ends_in_gap = prefix and states != b"" and states[-1] != KeyState.RAM and len(states) < size
    if (len(states) != size and not ends_in_gap) or states.translate(None, _KEY_STATES):
        raise ProtocolError(f"{len(states)} states came for {size} keys, or states that nobody knows")
    if prefix:
        states += _of(states[-1], size - len(states))
    run = len(states) - len(states.lstrip(_RAM)) if prefix else count
    if not states.count(_RAM) == run == count == len(leased.lengths):
        raise ProtocolError(f"{count} slots and {len(leased.lengths)} lengths came for {states.count(_RAM)} leases")
    return Leased(leased.call, states, leased.slots, leased.lengths, leased.extents_version)


def _allocated(reply: ControlReply, size: int) -> Allocated:
    """An allocation for `size` keys. A refusal (a limit) says to try again."""
    if isinstance(reply, Refused):
        return Allocated(reply.call, _of(AllocateState.RETRY, size), _NO_SLOTS, 0)
    allocated = _expect(reply, Allocated)
    states, count = allocated.states, len(allocated.slots)
    if len(states) != size or states.count(_NEW) != count or states.translate(None, _ALLOCATE_STATES):
        raise ProtocolError(f"{len(states)} states and {count} slots came for {size} keys, or states that nobody knows")
    return allocated
