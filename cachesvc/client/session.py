"""One process's part in a session: calls in the daemon's words, and the tickets that are open.

Covers: batches of any size, tickets and what becomes of them, reasons of misses. Not here: the public API
(`client.client`), the connection and its states (`client.channel`), reconnecting (`client.keeper`). The connector
builds on this layer: several KV groups, a deadline for each call, roles.

A ticket is open from the daemon's reply until its owner settles it; meanwhile every Hello names it::

    lease / allocate --> open --> release | seal | abort      (settled: forgotten here)
                           \\--> lost: the daemon came back without it, or with another arena

A Hello names all of them, lost ones too: what it leaves out the daemon gives to others. As many as fit are described in
full there, writes first, for a daemon that has restarted and has to find them by their slots. The rest are named by
number, which is enough for one that hasn't; those that it doesn't know are described in Claims after the Welcome::

    Hello --> Welcome --> lost: described, not kept
                 |---> kept
                 +---> Claim --> Claimed --> kept, or lost

Bytes under a lost lease count as changed; a lost write is never sealed. "No" is a value here: whatever happens to the
daemon, calls answer, with the reason as state. ValueError is for the caller's mistakes only: keys, groups, sizes.

A session is *superseded* when another scheduler came with the same session id: the daemon refuses it from then on, and
it never tries to be served again. It says Hello only to tell what it still uses, until that is nothing.

`_leases` and `_writes` are changed by the thread whose ticket it is, in single steps, and read by the background
thread.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final, TypeVar

from cachesvc.client.channel import Channel
from cachesvc.client.grants import WINDOW, Grant, Identity, KeyRun, Peek, Ticket
from cachesvc.client.mappings import Extents
from cachesvc.client.replies import NO_SLOTS, allocated, expect, leased, looked, of
from cachesvc.types import (
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
    Claim,
    Claimed,
    ControlReply,
    Done,
    EndRequests,
    Hello,
    KeyBatch,
    Lease,
    Leased,
    Lookup,
    OpenLease,
    OpenWrite,
    Refused,
    Release,
    Seal,
    Sealed,
    Welcome,
    pack_keys,
)

TICKETS_OPEN_MAX: Final = 4096
"""Half of what the daemon allows a session; above it calls answer NO_ROOM."""

CLAIM_BYTES_MAX: Final = FRAME_BYTES_MAX // 2
"""Of tickets described in one message, as estimated."""


PATIENCE_S: Final = 0.1
"""What a daemon must be given to be blamed for a missed deadline, if the caller used up the rest itself."""


MEMBER_BYTES: Final = 8
_FIRST_TICKETS: Final = 1 << 50

_RAM: Final = bytes([KeyState.RAM])
_NEW: Final = bytes([AllocateState.NEW])

T = TypeVar("T")


class Session:
    """A process's part in a session. Thread-safe; no call takes longer than its deadline (monotonic seconds)."""

    def __init__(self, identity: Identity, wake: Callable[[], None], first_ticket: int | None = None) -> None:
        """`first_ticket`: the lowest number of its tickets (default: a random one, as no two in a session share it)."""
        identity.check()
        self.identity = identity
        self.member = secrets.token_bytes(MEMBER_BYTES)
        """Tells it from other sessions of this process."""
        self.channel = Channel(wake, self._hear)
        self.extents = Extents(slot_bytes_for(size) for size in identity.chunk_bytes)
        self.arena = b""
        """Uuid of the daemon's arena; b"" until it was heard."""
        self.refusal = ""
        """Why the daemon won't have this namespace, and never had; "" once it does."""
        self.superseded = ""
        """Who took our place; nothing works from then on. "" = nobody did."""
        self.misses: dict[KeyState, int] = {state: 0 for state in KeyState if state >= KeyState.NEVER_STORED}
        """Keys asked for and not had, by reason."""
        self.refusals: dict[AllocateState, int] = {state: 0 for state in AllocateState if state >= AllocateState.BUSY}
        """Keys that got no slot to write, by reason; RETRY also when there was no answer."""
        self.unsealed = 0
        """Write tickets that couldn't be sealed."""
        self._tickets = itertools.count(1 + secrets.randbelow(_FIRST_TICKETS) if first_ticket is None else first_ticket)
        self._requests = itertools.count(1 << 63 | secrets.randbits(32) << 30)
        self._welcomed = False
        self._named: frozenset[int] = frozenset()
        """Tickets that the last Hello named."""
        self._described: frozenset[int] = frozenset()
        """Those of them that it described in full."""
        self._told: frozenset[int] | None = None
        """Tickets named in the last Hello that was refused because we are superseded."""
        self._leases: dict[int, Ticket] = {}
        self._writes: dict[int, Ticket] = {}
        self._sealing: dict[int, tuple[Grant, list[int]]] = {}
        """Call number of a Seal that nobody waits for -> what it seals (one ticket) and the lengths."""
        self._peeking: dict[int, tuple[Peek, int, int]] = {}
        """Call number of a Lookup that nobody waits for -> whose it is, which part of it, how many keys."""
        self._counting = threading.Lock()  # the counters above

    # --- asking -----------------------------------------------------------------------------------------------------

    def lookup(self, keys: KeyRun, deadline: float, *, request: int = 0, touch: bool = False) -> bytes:
        """One `KeyState` byte a key; every key is probed. `touch`: this is the arrival of `request`."""
        states = b""
        for batches, parts in keys.windows():
            calls = [Lookup(self.channel.number(), batch, request, touch) for batch in batches]

            def accept(replies: list[ControlReply], sizes: Sequence[int] = tuple(map(len, parts))) -> bytes:
                return b"".join([looked(reply, size) for reply, size in zip(replies, sizes, strict=True)])

            got = self._window(calls, accept, deadline, None, first=not states)
            if isinstance(got, KeyState):
                states += of(got, len(keys) - len(states))
                break
            states += got
        self.count_misses(states)
        return states

    def peek(self, runs: Sequence[KeyRun], *, request: int = 0, touch: bool = False) -> Peek | None:
        """Like `lookup`, of several runs one after the other, without waiting; None: it couldn't be asked.

        The answer is in what this returns after a later `channel.listen`, or call; it never comes if the connection is
        lost, unless it's `welcomed` again: then everything counts as a miss.
        """
        number = self.channel.number
        calls = [Lookup(number(), batch, request, touch) for run in runs for batch in run.batches]
        sizes = [size for run in runs for size in run.sizes()]
        peek = Peek(sizes)
        for part, (call, size) in enumerate(zip(calls, sizes, strict=True)):
            self._peeking[call.call] = peek, part, size
        if calls and not self.channel.post(calls, 0.0):
            for call in calls:
                self._peeking.pop(call.call, None)
            return None
        return peek

    def lease(
        self, keys: KeyRun, deadline: float, *, request: int = 0, touch: bool = False, prefix: bool = True
    ) -> Grant:
        """Lease what is in RAM: the leading run, or with `prefix` False every such key. `release` what it returns.

        States are of `KeyState`; those behind the leading run's end repeat the state of the gap.
        """
        grant, room = Grant(b""), self._room(keys)
        for batches, parts in keys.windows() if room else ():
            tickets = [next(self._tickets) for _ in batches]
            calls = [
                Lease(self.channel.number(), ticket, batch, request, touch, prefix)
                for ticket, batch in zip(tickets, batches, strict=True)
            ]

            def accept(
                replies: list[ControlReply], tickets: Sequence[int] = tickets, parts: Sequence[Sequence[bytes]] = parts
            ) -> None:
                for ticket, reply, part in zip(tickets, replies, parts, strict=True):
                    self._accept_lease(grant, ticket, leased(reply, len(part), prefix=prefix), prefix=prefix)

            if not self._granted(grant, self._leases, calls, accept, tickets, Release, deadline):
                break
            if prefix and grant.states.count(_RAM) < len(grant.states):
                grant.states += of(grant.states[-1], len(keys) - len(grant.states))
                break
        grant.states += of(grant.failed if room else KeyState.NO_ROOM, len(keys) - len(grant.states))
        self.count_misses(grant.states)
        return grant

    def allocate(
        self, keys: KeyRun, deadline: float, *, request: int = 0, priority: Priority = Priority.INTERACTIVE
    ) -> Grant:
        """Slots for the keys that are new, in prefix order. `seal` or `abort` what it returns.

        States are of `AllocateState`; without an answer all are RETRY. Once a message met a refusal, what later
        messages got is given back: it would lie behind a hole.
        """
        grant = Grant(b"")
        for batches, parts in keys.windows() if self._room(keys) else ():
            tickets = [next(self._tickets) for _ in batches]
            calls = [
                Allocate(self.channel.number(), ticket, batch, request, priority)
                for ticket, batch in zip(tickets, batches, strict=True)
            ]

            def accept(
                replies: list[ControlReply], tickets: Sequence[int] = tickets, parts: Sequence[Sequence[bytes]] = parts
            ) -> None:
                for ticket, reply, part in zip(tickets, replies, parts, strict=True):
                    self._accept_write(grant, ticket, allocated(reply, len(part)), keys.group, part)

            if not self._granted(grant, self._writes, calls, accept, tickets, Abort, deadline):
                break
            refused = next((state for state in grant.states if state >= AllocateState.RETRY), None)
            if refused is not None:
                grant.states += of(refused, len(keys) - len(grant.states))
                break
        grant.states += of(AllocateState.RETRY, len(keys) - len(grant.states))
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
        calls, at = [], 0
        for ticket in grant.tickets:
            mine = list(lengths[at : at + len(ticket.slots)])
            at += len(mine)
            if not ticket.lost:
                calls.append(Seal(self.channel.number(), ticket.number, mine))

        def accept(replies: list[ControlReply]) -> int:
            return sum(not isinstance(reply, Refused) and expect(reply, Sealed).ok for reply in replies)

        sealed = 0
        try:
            for first in range(0, len(calls), WINDOW):
                got = self._window(calls[first : first + WINDOW], accept, deadline, None, first=not first)
                if isinstance(got, KeyState):
                    break
                sealed += got
        finally:
            if sealed < len(grant.tickets):
                # an abort of what was sealed after all changes nothing
                self._settle(self._writes, grant, Abort)
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
        if self.channel.post([Seal(call, ticket.number, list(lengths))], deadline):
            return True
        if self._sealing.pop(call, None) is not None:
            self._settle(self._writes, grant, Abort)
            self._count_unsealed(1)
        return False

    def writes_elsewhere(self, ticket: int) -> None:
        """This process, a worker, writes slots of a ticket that the session's scheduler holds, until `done`."""
        self._writes[ticket] = Ticket(ticket, NO_SLOTS, KeyBatch(0, [], b""), arena=self.arena)

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
        identity = self.identity
        writes, leases = list(self._writes.values()), list(self._leases.values())
        claims = self._claims(
            [t for t in (*writes, *leases) if not t.lost or (self.superseded and t.arena == self.arena)]
        )
        self._named = frozenset(ticket.number for ticket in (*writes, *leases))
        self._described = described = frozenset(ticket.number for ticket in claims)
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
            member=self.member,
            arena=self.arena,
            open_writes=self._by_number(writes, described),
            open_leases=self._by_number(leases, described),
            over=bool(self.superseded),
        )

    def _by_number(self, tickets: Sequence[Ticket], described: Collection[int]) -> list[int]:
        """Those of this arena that aren't described."""
        return [t.number for t in tickets if t.number not in described and t.arena in (b"", self.arena)]

    def turned_away(self, why: str) -> None:
        """The daemon answered Hello so: another scheduler has this session."""
        self.superseded = why
        self._told = self._named
        for ticket in (*list(self._writes.values()), *list(self._leases.values())):
            ticket.lost = True

    def untold(self) -> bool:
        """Superseded: have tickets ended that the daemon believes to be in use?"""
        return bool(self._told) and self._told != frozenset((*self._writes, *self._leases))

    def welcomed(self, welcome: Welcome) -> None:
        """The daemon knows us again; what it hasn't kept is lost.

        Nothing can have been opened since `hello`: no call gets an answer while there is no connection.
        """
        other = self.extents.enter(welcome.arena)
        self.arena = welcome.arena
        self.refusal, self._welcomed = "", True
        for tickets, kept in (self._writes, set(welcome.writes_kept)), (self._leases, set(welcome.leases_kept)):
            for ticket in list(tickets.values()):
                if ticket.number not in kept and not other and ticket.number not in self._described:
                    continue  # named by number, not known by number: see `claims_left`
                if other or ticket.number not in kept:
                    ticket.lost = True
        for call in list(self._peeking):
            asked = self._peeking.pop(call, None)
            if asked is not None:
                asked[0].take(asked[1], of(KeyState.DAEMON_DOWN, asked[2]))

    def refused(self, why: str) -> None:
        """The daemon answered Hello so: it won't have this namespace. Only news if it never had it."""
        if not self._welcomed:
            self.refusal = why

    def claims_left(self, welcome: Welcome) -> list[Claim]:
        """After Welcome: descriptions of tickets that it doesn't keep and that Hello only named by number."""
        kept = {*welcome.writes_kept, *welcome.leases_kept}
        tickets = [*list(self._writes.values()), *list(self._leases.values())]
        left = [t for t in tickets if t.number not in kept and t.number not in self._described and not t.lost]
        claims = []
        while left and self.identity.role is Role.SCHEDULER:
            some = self._claims(left)
            if not some:
                break
            left = left[len(some) :]
            claims.append(
                Claim(
                    self.channel.number(),
                    [OpenWrite(t.number, t.keys, t.slots) for t in some if t.keys is not None],
                    [OpenLease(t.number, t.slots) for t in some if t.keys is None],
                )
            )
        return claims

    def claimed(self, claim: Claim, reply: ControlReply) -> None:
        """The answer to one of `claims_left`: what isn't kept is lost."""
        answer = expect(reply, Claimed)
        kept = {*answer.writes_kept, *answer.leases_kept}
        for number in (*[w.ticket for w in claim.writes], *[lease.ticket for lease in claim.leases]):
            ticket = self._writes.get(number) or self._leases.get(number)
            if ticket is not None and number not in kept:
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
        asked = self._peeking.get(reply.call) if self._peeking else None
        if asked is not None:
            peek, part, size = asked
            peek.take(part, looked(reply, size))
            self._peeking.pop(reply.call, None)

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

    @staticmethod
    def _claims(tickets: Sequence[Ticket]) -> list[Ticket]:
        """The first of them, as many as one message can describe."""
        claims, room_bytes = [], CLAIM_BYTES_MAX
        for ticket in tickets:
            room_bytes -= ticket.claim_bytes()
            if room_bytes < 0:
                break
            claims.append(ticket)
        return claims

    # --- tickets ----------------------------------------------------------------------------------------------------

    def private_request(self) -> int:
        """A number for a request that the caller has none for. `end_requests` when it is over."""
        return next(self._requests)

    def _room(self, keys: KeyRun) -> bool:
        """May there be a ticket more for each batch?"""
        return len(self._leases) + len(self._writes) + len(keys.batches) <= TICKETS_OPEN_MAX

    def _window(
        self,
        calls: Sequence[Lookup | Lease | Allocate | Seal],
        accept: Callable[[list[ControlReply]], T],
        deadline: float,
        undo: tuple[type[Release | Abort], Sequence[int]] | None,
        *,
        first: bool,
    ) -> T | KeyState:
        """Some messages of a call that has more. What we did with the earlier answers isn't the daemon's slowness."""
        if first:
            return self.channel.call(calls, accept, deadline, undo)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return KeyState.DEADLINE
        return self.channel.call(calls, accept, deadline, undo, blame=left_s >= PATIENCE_S)

    def _granted(
        self,
        grant: Grant,
        opened: dict[int, Ticket],
        calls: Sequence[Lease | Allocate],
        accept: Callable[[list[ControlReply]], None],
        tickets: Sequence[int],
        undo: type[Release | Abort],
        deadline: float,
    ) -> bool:
        """Did a window bring its part of a grant? If not, or after an exception, nothing of it is open; after an
        exception nothing of the whole grant, as nobody gets to see it."""
        before = len(grant.tickets), len(grant.lengths), len(grant.states)
        try:
            failed = self._window(calls, accept, deadline, (undo, tickets), first=not grant.states)
        except BaseException:
            for ticket in [*[t.number for t in grant.tickets], *tickets]:
                opened.pop(ticket, None)
            self.channel.tell(undo, [ticket.number for ticket in grant.tickets])
            raise
        if failed is None:
            return True
        for ticket in tickets:
            opened.pop(ticket, None)
        del grant.tickets[before[0] :], grant.lengths[before[1] :]
        grant.states, grant.failed = grant.states[: before[2]], failed
        return False

    def _accept_lease(self, grant: Grant, ticket: int, leased: Leased, *, prefix: bool) -> None:
        states, slots = leased.states, leased.slots
        if prefix and grant.states.count(_RAM) < len(grant.states):
            states = of(grant.states[-1], len(states))
            if len(slots):
                self.channel.tell(Release, [ticket])
        elif len(slots):
            opened = self._leases[ticket] = Ticket(ticket, slots, arena=self.arena)
            grant.tickets.append(opened)
            grant.lengths += leased.lengths
        grant.states += states

    def _accept_write(self, grant: Grant, ticket: int, got: Allocated, group: int, part: Sequence[bytes]) -> None:
        states, slots = got.states, got.slots
        refused = next((state for state in grant.states if state >= AllocateState.RETRY), None)
        if refused is not None:
            states = states.replace(_NEW, of(refused, 1))
            if len(slots):
                self.channel.tell(Abort, [ticket])
        elif len(slots):
            new = [key for key, state in zip(part, states, strict=True) if state == AllocateState.NEW]
            opened = self._writes[ticket] = Ticket(ticket, slots, pack_keys(group, new), arena=self.arena)
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
