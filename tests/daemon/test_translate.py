"""The dictionary between wire and core."""

from __future__ import annotations

from typing import get_args

import pytest

from cachesvc.core import events as ev
from cachesvc.daemon import translate
from cachesvc.daemon.translate import EVENTS, hello_event, reply_of
from cachesvc.errors import ProtocolError
from cachesvc.types import Priority, Role
from cachesvc.wire import messages as wire
from cachesvc.wire.messages import pack_keys
from tests.support.daemon import hello

KEYS = [b"a", b"bb"]
BATCH = pack_keys(1, KEYS)
RUN = ev.SlotRun((1, 1), (7, 8), (0, 3))
SLOTS = wire.Slots([1, 1], [7, 8], [0, 3])


def test_every_request_has_a_way() -> None:
    assert EVENTS.keys() | {wire.Hello, wire.Ping, wire.Ask} == set(get_args(wire.ControlRequest))


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (wire.Lookup(1, BATCH, 5, True), ev.Lookup(9, 1, 1, KEYS, 5, True)),
        (wire.Lease(1, 2, BATCH, 5, True, False), ev.Lease(9, 1, 2, 1, KEYS, 5, True, False)),
        (wire.Release([1, 2]), ev.Release(9, (1, 2))),
        (wire.Allocate(1, 2, BATCH, 5, Priority.BATCH), ev.Allocate(9, 1, 2, 1, KEYS, 5, Priority.BATCH)),
        (
            wire.Claim(1, [wire.OpenWrite(3, BATCH, SLOTS)], [wire.OpenLease(4, SLOTS)]),
            ev.Claim(9, 1, (ev.WriteClaim(3, 1, tuple(KEYS), RUN),), (ev.LeaseClaim(4, RUN),)),
        ),
        (wire.Seal(1, 2, [3, 4]), ev.Seal(9, 1, 2, (3, 4))),
        (wire.Abort([1]), ev.Abort(9, (1,))),
        (wire.Done([]), ev.Done(9, ())),
        (wire.EndRequests([4]), ev.EndRequests(9, (4,))),
    ],
)
def test_requests(message: wire.ControlRequest, event: ev.Event) -> None:
    assert EVENTS[type(message)](message, 9) == event


def test_hello_takes_tenant_and_process_from_elsewhere() -> None:
    message = hello(
        session=b"s" * 16,
        writes=[wire.OpenWrite(3, BATCH, SLOTS)],
        leases=[wire.OpenLease(4, SLOTS)],
        chunk_bytes=[4096, 8192],
        role=Role.WORKER,
        member=b"m",
        open_writes=[5],
        open_leases=[6],
        over=True,
    )
    assert hello_event(message, 9, "tenant", 77) == ev.Hello(
        connection=9,
        tenant="tenant",
        process=77,
        call=1,
        session=b"s" * 16,
        role=Role.WORKER,
        namespace=bytes(16),
        label="test",
        components={"model": "m"},
        chunk_bytes=(4096, 8192),
        writes=(ev.WriteClaim(3, 1, tuple(KEYS), RUN),),
        leases=(ev.LeaseClaim(4, RUN),),
        member=b"m",
        open_writes=(5,),
        open_leases=(6,),
        over=True,
    )


@pytest.mark.parametrize(("arena", "claims"), [(b"", 1), (b"ours", 1), (b"another", 0)])
def test_slots_of_another_arena_are_not_claimed(arena: bytes, claims: int) -> None:
    """An extent of the same number is there, and somebody else may write it."""
    message = hello(writes=[wire.OpenWrite(3, BATCH, SLOTS)], leases=[wire.OpenLease(4, SLOTS)], arena=arena)
    event = hello_event(message, 9, "tenant", 77, b"ours")
    assert (len(event.writes), len(event.leases)) == (claims, claims)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chunk_bytes": [1 << 40]}, "a chunk of 1099511627776 bytes"),
        ({"components": {"x" * 5000: ""}}, "longer than 4096 characters"),
        ({"components": {str(n): "\u00e9" * 2000 for n in range(5)}}, "components of 20005 bytes, allowed are 16384"),
        ({"writes": [wire.OpenWrite(3, pack_keys(0, [b"a"]), SLOTS)]}, "claims 2 slots for 1 keys"),
        ({"writes": [wire.OpenWrite(3, wire.KeyBatch(64, 1, b"ab"), SLOTS)]}, "KV group 64"),
    ],
)
def test_what_hello_may_not_claim(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        hello_event(hello(**fields), 9, "t", None)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (wire.Seal(1, 2, [0] * 4097), "4097 lengths"),
        (wire.Seal(1, 2, [1 << 32]), "a chunk of 4294967296 bytes"),
        (wire.Release([0] * 8193), "8193 numbers"),
        (wire.Lookup(1, wire.KeyBatch(0, 0, b"")), "a key of 0 bytes"),
    ],
)
def test_numbers_that_do_not_fit(message: wire.ControlRequest, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        EVENTS[type(message)](message, 9)


def test_too_many_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "CLAIMED_SLOTS_MAX", 3)
    message = hello(leases=[wire.OpenLease(1, SLOTS), wire.OpenLease(2, SLOTS)])
    with pytest.raises(ProtocolError, match="4 slots claimed"):
        hello_event(message, 9, "t", None)


@pytest.mark.parametrize(
    ("effect", "message"),
    [
        (ev.Welcome(9, 1, (2,), (3,)), wire.Welcome(1, b"u", [2], [3], 6)),
        (ev.Claimed(9, 1, (2,), (3,)), wire.Claimed(1, [2], [3])),
        (ev.Looked(9, 1, b"\x01"), wire.Looked(1, b"\x01", 6)),
        (ev.Leased(9, 1, b"\x01\x01", RUN, (4, 5)), wire.Leased(1, b"\x01\x01", SLOTS, [4, 5], 6)),
        (ev.Allocated(9, 1, b"\x01\x01", RUN), wire.Allocated(1, b"\x01\x01", SLOTS, 6)),
        (ev.Sealed(9, 1, False), wire.Sealed(1, False)),
        (ev.Refused(9, 1, "limit", "why"), wire.Refused(1, "limit", "why")),
    ],
)
def test_replies(effect: translate.Reply, message: wire.ControlReply) -> None:
    assert reply_of(effect, b"u", 6) == message
