"""Wire messages <-> events and effects of the core, one line each way: the dictionary of the daemon.

Covers: which message becomes which event, which effect becomes which reply, limits that only the wire knows (numbers
that must fit the core's columns). Not here: decoding bytes (`wire.framing`), carrying effects out (`daemon.runner`).

Pure. What a client sent wrong is a ProtocolError with the reason.

    message of a client           event           |  effect       message to the client
    Hello                         Hello           |  Welcome      Welcome + arena uuid, extents version
    Claim                         Claim           |  Claimed      Claimed
    Lookup                        Lookup          |  Looked       Looked + extents version
    Lease                         Lease           |  Leased       Leased + extents version
    Allocate                      Allocate        |  Allocated    Allocated + extents version
    Seal                          Seal            |  Sealed       Sealed
    Release Abort Done            the same        |  Refused      Refused
    EndRequests                   EndRequests     |
    Ping Ask                      none: the runner answers by itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from cachesvc.core import events
from cachesvc.core.index import component_bytes
from cachesvc.errors import ProtocolError
from cachesvc.types import KEYS_PER_MESSAGE_MAX
from cachesvc.wire import messages as wire
from cachesvc.wire.messages import unpack_keys

CHUNK_BYTES_MAX: Final = 1 << 31
"""A slot's length is a u32 column; the arena refuses far smaller chunks by its extent size."""

NUMBERS_PER_MESSAGE_MAX: Final = 8192
"""Tickets or requests in one one-way message."""

COMPONENT_CHARS_MAX: Final = 4096
"""Name and value of one namespace component."""

COMPONENTS_BYTES_MAX: Final = 16 * 1024
"""Names and values of all components of a namespace, in UTF-8."""

CLAIMED_SLOTS_MAX: Final = 1 << 17
"""Slots that one Hello claims, all tickets together; a frame couldn't hold more anyway."""

Reply: TypeAlias = (
    events.Welcome | events.Claimed | events.Looked | events.Leased | events.Allocated | events.Sealed | events.Refused
)
"""Effects that answer a call."""


# --- client to core -------------------------------------------------------------------------------------------------


def hello_event(
    message: wire.Hello, connection: int, tenant: str, process: int | None, arena: bytes = b""
) -> events.Hello:
    """`tenant` comes from the socket and `process` from the token: neither is the client's to claim. Slots of another
    arena than ours, `arena`, aren't claimed at all: their numbers mean something else here."""
    if max(message.chunk_bytes) > CHUNK_BYTES_MAX:
        raise ProtocolError(f"a chunk of {max(message.chunk_bytes)} bytes, allowed are {CHUNK_BYTES_MAX}")
    for name, value in message.components.items():
        if len(name) + len(value) > COMPONENT_CHARS_MAX:
            raise ProtocolError(f"namespace component {name[:40]!r} is longer than {COMPONENT_CHARS_MAX} characters")
    if (size := component_bytes(message.components)) > COMPONENTS_BYTES_MAX:
        raise ProtocolError(
            f"namespace components of {size} bytes, allowed are {COMPONENTS_BYTES_MAX}: hash some first"
        )
    writes, leases = _claims(message)
    if message.arena not in (b"", arena):
        writes, leases = (), ()
    return events.Hello(
        connection=connection,
        tenant=tenant,
        process=process,
        call=message.call,
        session=message.session,
        role=message.role,
        namespace=message.namespace,
        label=message.label,
        components=message.components,
        chunk_bytes=tuple(message.chunk_bytes),
        writes=writes,
        leases=leases,
        member=message.member,
        open_writes=_numbers(message.open_writes),
        open_leases=_numbers(message.open_leases),
        over=message.over,
    )


def _claims(
    message: wire.Hello | wire.Claim,
) -> tuple[tuple[events.WriteClaim, ...], tuple[events.LeaseClaim, ...]]:
    claimed = sum(len(write.slots) for write in message.writes) + sum(len(lease.slots) for lease in message.leases)
    if claimed > CLAIMED_SLOTS_MAX:
        raise ProtocolError(f"{claimed} slots claimed in one message, allowed are {CLAIMED_SLOTS_MAX}")
    return (
        tuple(_write_claim(ticket) for ticket in message.writes),
        tuple(events.LeaseClaim(ticket.ticket, _slot_run(ticket.slots)) for ticket in message.leases),
    )


def _claim(message: wire.Claim, connection: int) -> events.Event:
    writes, leases = _claims(message)
    return events.Claim(connection, message.call, writes, leases)


def _write_claim(ticket: wire.OpenWrite) -> events.WriteClaim:
    keys = unpack_keys(ticket.keys)
    if len(keys) != len(ticket.slots):
        raise ProtocolError(f"write ticket {ticket.ticket} claims {len(ticket.slots)} slots for {len(keys)} keys")
    return events.WriteClaim(ticket.ticket, ticket.keys.group, tuple(keys), _slot_run(ticket.slots))


def _slot_run(slots: wire.Slots) -> events.SlotRun:
    return events.SlotRun(tuple(slots.extents), tuple(slots.slots), tuple(slots.generations))


def _lookup(message: wire.Lookup, connection: int) -> events.Event:
    keys = unpack_keys(message.keys)
    return events.Lookup(connection, message.call, message.keys.group, keys, message.request, message.touch)


def _lease(message: wire.Lease, connection: int) -> events.Event:
    keys = unpack_keys(message.keys)
    return events.Lease(
        connection,
        message.call,
        message.ticket,
        message.keys.group,
        keys,
        message.request,
        message.touch,
        message.prefix,
    )


def _allocate(message: wire.Allocate, connection: int) -> events.Event:
    keys = unpack_keys(message.keys)
    return events.Allocate(
        connection,
        message.call,
        message.ticket,
        message.keys.group,
        keys,
        message.request,
        message.priority,
    )


def _seal(message: wire.Seal, connection: int) -> events.Event:
    if len(message.lengths) > KEYS_PER_MESSAGE_MAX:
        raise ProtocolError(f"{len(message.lengths)} lengths in one seal, at most {KEYS_PER_MESSAGE_MAX}")
    if message.lengths and max(message.lengths) > CHUNK_BYTES_MAX:
        raise ProtocolError(f"a chunk of {max(message.lengths)} bytes, allowed are {CHUNK_BYTES_MAX}")
    return events.Seal(connection, message.call, message.ticket, tuple(message.lengths))


def _numbers(numbers: Iterable[int]) -> tuple[int, ...]:
    some = tuple(numbers)
    if len(some) > NUMBERS_PER_MESSAGE_MAX:
        raise ProtocolError(f"{len(some)} numbers in one message, at most {NUMBERS_PER_MESSAGE_MAX}")
    return some


EVENTS: Final[dict[type[Any], Callable[[Any, int], events.Event]]] = {
    wire.Claim: _claim,
    wire.Lookup: _lookup,
    wire.Lease: _lease,
    wire.Release: lambda message, connection: events.Release(connection, _numbers(message.tickets)),
    wire.Allocate: _allocate,
    wire.Seal: _seal,
    wire.Abort: lambda message, connection: events.Abort(connection, _numbers(message.tickets)),
    wire.Done: lambda message, connection: events.Done(connection, _numbers(message.tickets)),
    wire.EndRequests: lambda message, connection: events.EndRequests(connection, _numbers(message.requests)),
}
"""Message type -> what makes its event from it and the connection's number. Hello, Ping, Ask are the runner's."""


# --- core to client -------------------------------------------------------------------------------------------------


def _wire_slots(run: events.SlotRun) -> wire.Slots:
    return wire.Slots(list(run.extents), list(run.slots), list(run.generations))


def reply_of(effect: Reply, arena: bytes, extents_version: int) -> wire.ControlReply:
    """The message that carries a reply; `arena` is the uuid, `extents_version` the tenant's."""
    match effect:
        case events.Looked():
            return wire.Looked(effect.call, effect.states, extents_version)
        case events.Leased():
            slots = _wire_slots(effect.slots)
            return wire.Leased(effect.call, effect.states, slots, list(effect.lengths), extents_version)
        case events.Allocated():
            return wire.Allocated(effect.call, effect.states, _wire_slots(effect.slots), extents_version)
        case events.Sealed():
            return wire.Sealed(effect.call, effect.ok)
        case events.Welcome():
            return wire.Welcome(effect.call, arena, list(effect.writes_kept), list(effect.leases_kept), extents_version)
        case events.Claimed():
            return wire.Claimed(effect.call, list(effect.writes_kept), list(effect.leases_kept))
        case events.Refused():
            return wire.Refused(effect.call, effect.kind, effect.detail)
