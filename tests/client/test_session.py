"""The session layer: batches, tickets, claims, and replies that can't be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachesvc.client.channel import State
from cachesvc.client.grants import Grant, Ticket
from cachesvc.client.session import TICKETS_OPEN_MAX, Session
from cachesvc.types import KEYS_PER_MESSAGE_MAX, AllocateState, KeyState, Role
from cachesvc.wire.framing import FRAME_BYTES_MAX, encode
from cachesvc.wire.messages import (
    Abort,
    Allocate,
    Allocated,
    Claim,
    Claimed,
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
    unpack_keys,
)
from tests.support.fake_daemon import Close, FakeDaemon, wait_for
from tests.support.joined import Joined, identity, many, run, soon

HANG_S = 30.0
RAM, NEVER, NO_ROOM = bytes([KeyState.RAM]), bytes([KeyState.NEVER_STORED]), bytes([KeyState.NO_ROOM])
NEW, PRESENT, RETRY = bytes([AllocateState.NEW]), bytes([AllocateState.PRESENT]), bytes([AllocateState.RETRY])


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Joined]:
    with FakeDaemon(tmp_path, slot_count=9000) as daemon:
        joined = Joined(daemon)
        yield joined
        joined.keeper.request_stop()
        joined.session._leases.clear()
        joined.session._writes.clear()
        joined.keeper.stop(HANG_S)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"session": b"s" * 15},
        {"session": b"s" * 65},
        {"chunk_bytes": ()},
        {"chunk_bytes": (0,)},
        {"chunk_bytes": ((1 << 31) + 1,)},
        {"chunk_bytes": (True,)},
        {"chunk_bytes": (4096.0,)},
        {"session": "s" * 16},
        {"label": "l" * 257},
        {"components": {"name": "x" * 4093}},
        {"components": {str(n): "" for n in range(65)}},
        {"chunk_bytes": (1,) * 65},
    ],
)
def test_an_identity_that_no_daemon_would_take(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"session|chunk_bytes|groups|label|component"):
        Session(identity(**changes), lambda: None)


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, [1]), (4096, [4096]), (4097, [4096, 1]), (9000, [4096, 4096, 808])]
)
def test_keys_are_split_into_batches(count: int, sizes: list[int]) -> None:
    keys = many(count)
    assert len(keys) == count
    assert keys.sizes() == sizes
    assert keys.batches == [pack_keys(0, part) for part in keys.parts()]
    assert [key for part in keys.parts() for key in part] == keys.keys


# --- lookup ---------------------------------------------------------------------------------------------------------


def test_a_lookup_probes_every_key(joined: Joined) -> None:
    joined.daemon.store(b"a", b"1")
    joined.daemon.store(b"c", b"3")
    assert joined.session.lookup(run(b"a", b"b", b"c"), soon(), request=5, touch=True) == RAM + NEVER + RAM
    (lookup,) = joined.daemon.got(Lookup)
    assert (lookup.request, lookup.touch, lookup.keys.group) == (5, True, 0)
    assert joined.session.misses[KeyState.NEVER_STORED] == 1


def test_groups_are_named_beside_the_keys(joined: Joined) -> None:
    joined.session.lookup(run(b"a", group=1), soon())
    assert joined.daemon.got(Lookup)[0].keys.group == 1


def test_nothing_is_asked_for_no_keys(joined: Joined) -> None:
    assert joined.session.lookup(run(), soon()) == b""
    assert joined.session.lease(run(), soon()).states == b""
    assert joined.session.allocate(run(), soon()).states == b""
    assert joined.daemon.got(Lookup) + joined.daemon.got(Lease) + joined.daemon.got(Allocate) == []


def test_large_batches_are_sent_before_any_reply_is_read(joined: Joined) -> None:
    """The daemon answers only when all parts have come: a client that waited between them would miss its deadline."""
    held: list[Lookup] = []

    def answer_the_last(lookup: Lookup) -> Any:
        held.append(lookup)
        if len(held) < 3:
            return None
        return [Looked(each.call, RAM * len(unpack_keys(each.keys)), 1) for each in held]

    joined.daemon.on[Lookup] = answer_the_last
    assert joined.session.lookup(many(9000), soon()) == RAM * 9000


# --- leases ---------------------------------------------------------------------------------------------------------


def test_a_lease_covers_the_leading_run(joined: Joined) -> None:
    for key in (b"a", b"b", b"d"):
        joined.daemon.store(key, key * 3)
    grant = joined.session.lease(run(b"a", b"b", b"c", b"d"), soon(), request=4, touch=True)
    assert grant.states == RAM + RAM + NEVER + NEVER
    assert [place[:2] for place in grant.places()] == [(1, 0), (1, 1)]
    assert grant.lengths == [3, 3]
    assert not joined.session.idle()
    joined.session.release(grant)
    assert joined.session.idle()
    assert joined.told(Release) == [Release([grant.tickets[0].number])]
    assert joined.session.misses[KeyState.NEVER_STORED] == 2 + 1  # and the lookup of `told`


def test_a_lease_of_every_key_that_is_there(joined: Joined) -> None:
    joined.daemon.store(b"b", b"2")
    grant = joined.session.lease(run(b"a", b"b", b"c"), soon(), prefix=False)
    assert grant.states == NEVER + RAM + NEVER
    assert len(list(grant.places())) == 1
    joined.session.release(grant)


def test_what_lies_behind_a_gap_in_an_earlier_batch_is_released(joined: Joined) -> None:
    keys = many(KEYS_PER_MESSAGE_MAX + 2)
    for key in keys.keys:
        if key != b"7":
            joined.daemon.store(key, b"x")
    grant = joined.session.lease(keys, soon())
    assert grant.states == RAM * 7 + NEVER * (len(keys) - 7)
    assert len(grant.tickets) == 1
    joined.session.release(grant)
    assert sorted(ticket for release in joined.told(Release) for ticket in release.tickets) == [1, 2]


def test_a_miss_opens_no_ticket(joined: Joined) -> None:
    grant = joined.session.lease(run(b"a"), soon())
    assert grant.tickets == []
    joined.session.release(grant)
    assert joined.told(Release) == []


# --- writes ---------------------------------------------------------------------------------------------------------


def test_a_write_is_allocated_and_sealed(joined: Joined) -> None:
    joined.daemon.store(b"b", b"2")
    grant = joined.session.allocate(run(b"a", b"b", b"c"), soon(), request=6)
    assert grant.states == NEW + PRESENT + NEW
    assert grant.tickets[0].keys == pack_keys(0, [b"a", b"c"])
    assert joined.session.seal(grant, [10, 20], soon())
    assert joined.session.idle()
    assert joined.daemon.got(Seal)[0].lengths == [10, 20]
    assert joined.daemon.chunks[b"c"][3] == 20
    assert joined.session.unsealed == 0


def test_a_seal_that_nobody_waits_for(joined: Joined) -> None:
    """The ticket stays open until the daemon's word is heard, with whatever is asked next."""
    grant = joined.session.allocate(run(b"a"), soon())
    assert joined.session.seal_soon(grant, [10], soon())
    assert joined.session.lookup(run(b"a"), soon()) == b"\x01"
    assert joined.session.idle()
    assert (joined.daemon.chunks[b"a"][3], joined.session.unsealed) == (10, 0)


def test_a_seal_that_nobody_waits_for_and_that_is_refused(joined: Joined) -> None:
    grant = joined.session.allocate(run(b"a"), soon())
    joined.daemon.on[Seal] = lambda message: Sealed(message.call, ok=False)
    assert joined.session.seal_soon(grant, [10], soon()), "it was on its way"
    joined.session.lookup(run(b"a"), soon())
    assert joined.session.idle()
    assert joined.session.unsealed == 1


def dying(daemon: FakeDaemon) -> None:
    """The next Seal is the last thing that the daemon hears."""

    def die(_: Seal) -> None:
        del daemon.on[Seal]
        raise Close

    daemon.on[Seal] = die


def test_a_seal_whose_outcome_nobody_knows_is_said_again(joined: Joined) -> None:
    """Kill -9 of the daemon between the seal and its word: the slot is written, its session comes back for it."""
    grant = joined.session.allocate(run(b"a"), soon())
    dying(joined.daemon)
    assert joined.session.seal_soon(grant, [10], soon())
    wait_for(lambda: len(joined.daemon.got(Seal)) == 2)
    joined.up()
    assert joined.session.lookup(run(b"a"), soon()) == b"\x01"
    assert joined.session.idle()
    assert joined.session.unsealed == 0


def test_a_seal_of_a_lost_write_is_not_said_again(joined: Joined) -> None:
    grant = joined.session.allocate(run(b"a"), soon())
    joined.daemon.on[Hello] = lambda hello: Welcome(hello.call, joined.daemon.arena, [], [], joined.daemon.version)
    dying(joined.daemon)
    assert joined.session.seal_soon(grant, [10], soon())
    wait_for(lambda: joined.session.unsealed == 1)
    assert joined.session.idle()
    assert len(joined.daemon.got(Seal)) == 1


def test_a_seal_without_a_daemon_is_false(joined: Joined) -> None:
    grant = joined.session.allocate(run(b"a"), soon())
    joined.daemon.stop()
    wait_for(lambda: joined.session.channel.state is State.DOWN)
    assert not joined.session.seal_soon(grant, [10], soon())
    assert joined.session.idle()
    assert joined.session.unsealed == 1


def test_a_write_is_aborted(joined: Joined) -> None:
    grant = joined.session.allocate(run(b"a"), soon())
    joined.session.abort(grant)
    assert joined.session.idle()
    assert joined.told(Abort) == [Abort([grant.tickets[0].number])]


def test_large_writes_are_sealed_part_by_part(joined: Joined) -> None:
    grant = joined.session.allocate(many(5000), soon())
    assert grant.states == NEW * 5000
    assert joined.session.seal(grant, list(range(5000)), soon())
    assert [seal.lengths for seal in joined.daemon.got(Seal)] == [list(range(4096)), list(range(4096, 5000))]
    assert joined.daemon.chunks[b"4999"][3] == 4999


def test_what_lies_behind_a_refusal_is_given_back(joined: Joined) -> None:
    def refuse_in_the_first(allocate: Allocate) -> Any:
        got = joined.daemon.usual(allocate)
        assert isinstance(got, Allocated)
        if len(got.states) == 2:
            return got
        slots = Slots(got.slots.extents[:-1], got.slots.slots[:-1], got.slots.generations[:-1])
        return Allocated(got.call, got.states[:-1] + bytes([AllocateState.NO_ROOM]), slots, 1)

    joined.daemon.on[Allocate] = refuse_in_the_first
    grant = joined.session.allocate(many(KEYS_PER_MESSAGE_MAX + 2), soon())
    assert grant.states == NEW * 4095 + bytes([AllocateState.NO_ROOM]) * 3
    assert len(grant.tickets) == 1
    assert joined.told(Abort) == [Abort([2])]
    assert joined.session.refusals[AllocateState.NO_ROOM] == 3
    joined.session.abort(grant)


def test_a_seal_that_is_refused_is_counted_and_aborted(joined: Joined) -> None:
    joined.daemon.on[Seal] = lambda seal: Sealed(seal.call, False)
    grant = joined.session.allocate(run(b"a"), soon())
    assert not joined.session.seal(grant, [1], soon())
    assert joined.session.idle()
    assert joined.session.unsealed == 1
    assert joined.told(Abort) == [Abort([1])]


def test_a_lost_write_is_not_sealed(joined: Joined) -> None:
    grant = joined.session.allocate(run(b"a"), soon())
    grant.tickets[0].lost = True
    assert grant.lost
    assert not joined.session.seal(grant, [1], soon())
    assert joined.daemon.got(Seal) == []
    assert joined.session.unsealed == 1


def test_too_many_open_tickets_are_refused_here(joined: Joined) -> None:
    for number in range(TICKETS_OPEN_MAX):
        joined.session._leases[10**6 + number] = Ticket(10**6 + number, Slots([], [], []))
    assert joined.session.lease(run(b"a"), soon()).states == NO_ROOM
    assert joined.session.allocate(run(b"a"), soon()).states == RETRY
    assert joined.daemon.got(Lease) + joined.daemon.got(Allocate) == []


# --- workers, requests ----------------------------------------------------------------------------------------------


def test_a_worker_names_what_it_writes_until_it_is_done(joined: Joined) -> None:
    joined.session.writes_elsewhere(77)
    hello = joined.session.hello(b"")
    assert hello.writes == [OpenWrite(77, KeyBatch(0, [], b""), Slots([], [], []))]
    joined.session.done([77, 78])
    joined.session.end_requests([5])
    assert joined.told(Done) == [Done([77, 78])]
    assert joined.told(EndRequests) == [EndRequests([5])]
    assert joined.session.idle()


# --- replies that can't be ------------------------------------------------------------------------------------------

ONE = Slots([1], [0], [1])
NONE = Slots([], [], [])
KEYS = pack_keys(0, [b"k"])


@pytest.mark.parametrize(
    "reply",
    [
        lambda x: Looked(x.call, b"", 1),
        lambda x: Looked(x.call, RAM * 3, 1),
        lambda x: Looked(x.call, b"\x00\x01", 1),
        lambda x: Sealed(x.call, True),
        lambda x: Leased(x.call, RAM * 2, NONE, [], 1),
    ],
)
def test_lookups_that_cannot_be(joined: Joined, reply: Any) -> None:
    joined.daemon.on[Lookup] = reply
    assert joined.session.lookup(run(b"a", b"b"), soon()) == bytes([KeyState.DAEMON_DOWN]) * 2
    assert joined.session.misses[KeyState.DAEMON_DOWN] == 2
    del joined.daemon.on[Lookup]
    joined.up()
    assert joined.session.lookup(run(b"a"), soon()) == NEVER


@pytest.mark.parametrize(
    "reply",
    [
        lambda x: Leased(x.call, b"", NONE, [], 1),
        lambda x: Leased(x.call, RAM, ONE, [1], 1),
        lambda x: Leased(x.call, RAM * 2, ONE, [1], 1),
        lambda x: Leased(x.call, NEVER + RAM, ONE, [1], 1),
        lambda x: Leased(x.call, RAM + NEVER, ONE, [], 1),
        lambda x: Leased(x.call, RAM + NEVER, NONE, [1], 1),
        lambda x: Leased(x.call, NEVER * 3, NONE, [], 1),
        lambda x: Leased(x.call, b"\xff", NONE, [], 1),
        lambda x: Looked(x.call, NEVER * 2, 1),
        lambda x: b"\x05\x00\x00\x00abcde",
    ],
)
def test_leases_that_cannot_be_are_undone(joined: Joined, reply: Any) -> None:
    joined.daemon.on[Lease] = reply
    grant = joined.session.lease(run(b"a", b"b"), soon())
    assert grant.states == bytes([KeyState.DAEMON_DOWN]) * 2
    assert joined.session.idle()
    joined.up()
    assert joined.told(Release) == [Release([1])]


@pytest.mark.parametrize(
    "reply",
    [
        lambda x: Allocated(x.call, NEW, ONE, 1),
        lambda x: Allocated(x.call, NEW * 2, ONE, 1),
        lambda x: Allocated(x.call, PRESENT * 2, ONE, 1),
        lambda x: Allocated(x.call, b"\x09\x09", NONE, 1),
        lambda x: Looked(x.call, NEVER * 2, 1),
    ],
)
def test_allocations_that_cannot_be_are_undone(joined: Joined, reply: Any) -> None:
    joined.daemon.on[Allocate] = reply
    assert joined.session.allocate(run(b"a", b"b"), soon()).states == RETRY * 2
    assert joined.session.idle()
    joined.up()
    assert joined.told(Abort) == [Abort([1])]


def test_a_seal_answered_by_nonsense_is_aborted(joined: Joined) -> None:
    joined.daemon.on[Seal] = lambda x: Looked(x.call, b"", 1)
    grant = joined.session.allocate(run(b"a"), soon())
    assert not joined.session.seal(grant, [1], soon())
    joined.up()
    assert joined.told(Abort) == [Abort([1])]


def test_limits_are_no_and_the_connection_stays(joined: Joined) -> None:
    for kind in (Lookup, Lease, Allocate, Seal):
        joined.daemon.on[kind] = lambda x: Refused(x.call, "limit", "too many")
    assert joined.session.lookup(run(b"a"), soon()) == NO_ROOM
    assert joined.session.lease(run(b"a"), soon()).states == NO_ROOM
    assert joined.session.allocate(run(b"a"), soon()).states == RETRY
    del joined.daemon.on[Allocate]
    grant = joined.session.allocate(run(b"a"), soon())
    assert not joined.session.seal(grant, [1], soon())
    assert joined.session.channel.state is State.UP
    assert len(joined.daemon.got(Hello)) == 1


# --- joining --------------------------------------------------------------------------------------------------------


def test_a_hello_names_what_is_open(joined: Joined) -> None:
    joined.daemon.store(b"r", b"1")
    lease = joined.session.lease(run(b"r"), soon())
    write = joined.session.allocate(run(b"w"), soon())
    hello = joined.session.hello(b"token")
    assert (hello.session, hello.role, hello.namespace, hello.chunk_bytes) == (
        b"s" * 16,
        Role.SCHEDULER,
        b"n" * 16,
        [4096, 100],
    )
    assert hello.token == b"token"
    assert hello.leases == [OpenLease(1, lease.tickets[0].slots)]
    assert hello.writes == [OpenWrite(2, pack_keys(0, [b"w"]), write.tickets[0].slots)]
    joined.session.release(lease)
    joined.session.abort(write)
    assert not joined.session.hello(b"").leases
    assert not joined.session.hello(b"").writes


def test_a_hello_always_fits_a_frame(joined: Joined) -> None:
    keys = pack_keys(0, [bytes(64)] * 4096)
    slots = Slots([2**63] * 4096, [2**63] * 4096, [2**63] * 4096)
    for number in range(100):
        joined.session._writes[number] = Ticket(number, slots, keys)
    hello = joined.session.hello(b"t" * 16)
    assert hello.writes
    assert len(encode(hello)) <= FRAME_BYTES_MAX


def test_what_a_welcome_does_not_keep_is_lost(joined: Joined) -> None:
    grants = [Grant(b"", [Ticket(number, ONE)]) for number in (1, 2)]
    joined.session._leases = {1: grants[0].tickets[0], 2: grants[1].tickets[0]}
    joined.session._writes = {3: Ticket(3, ONE, KEYS), 4: Ticket(4, ONE, KEYS)}
    joined.session.hello(b"")
    joined.session.welcomed(Welcome(1, joined.daemon.arena, [4], [1], 5))
    assert [grant.lost for grant in grants] == [False, True]
    assert [ticket.lost for ticket in joined.session._writes.values()] == [True, False]
    assert [claim.ticket for claim in joined.session.hello(b"").leases] == [1]


def test_nothing_survives_another_arena(joined: Joined) -> None:
    joined.session._leases = {1: Ticket(1, ONE)}
    joined.session.welcomed(Welcome(1, b"x" * 16, [], [1], 5))
    assert joined.session._leases[1].lost
    assert joined.session.extents.mapped == {}
    assert joined.session.arena == b"x" * 16


# --- more than a Hello can describe -----------------------------------------------------------------------------------


@pytest.fixture
def small_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot a message."""
    monkeypatch.setattr("cachesvc.client.session.CLAIM_BYTES_MAX", 60)


def test_what_a_hello_cannot_describe_it_names(joined: Joined, small_claims: None) -> None:
    """What it leaves out the daemon gives to others, while we still write there."""
    writes = [joined.session.allocate(run(key), soon()) for key in (b"a", b"b", b"c")]
    joined.daemon.store(b"r", b"1")
    joined.session.lease(run(b"r"), soon())
    writes[1].tickets[0].lost = True
    hello = joined.session.hello(b"")
    assert [write.ticket for write in hello.writes] == [1]
    assert (hello.open_writes, hello.open_leases, hello.leases) == ([2, 3], [4], []), "lost ones, too"
    assert hello.arena == joined.daemon.arena


def test_what_a_restarted_daemon_does_not_know_by_number_is_claimed(joined: Joined, small_claims: None) -> None:
    writes = [joined.session.allocate(run(key), soon()) for key in (b"a", b"b", b"c")]
    joined.daemon.on[Hello] = lambda hello: Welcome(hello.call, joined.daemon.arena, [1], [], 1)
    joined.daemon.on[Claim] = lambda claim: Claimed(claim.call, [t.ticket for t in claim.writes if t.ticket == 2], [])
    joined.daemon.stop()
    joined.daemon.restart()
    wait_for(lambda: len(joined.daemon.got(Claim)) == 2)
    joined.up()
    assert [claim.writes for claim in joined.daemon.got(Claim)] == [
        [OpenWrite(number, pack_keys(0, [key]), writes[number - 1].tickets[0].slots)]
        for number, key in ((2, b"b"), (3, b"c"))
    ]
    assert [grant.lost for grant in writes] == [False, False, True]


def test_nothing_is_claimed_of_another_arena(joined: Joined, small_claims: None) -> None:
    writes = [joined.session.allocate(run(key), soon()) for key in (b"a", b"b")]
    joined.daemon.on[Hello] = lambda hello: Welcome(hello.call, b"x" * 16, [], [], 1)
    joined.daemon.stop()
    joined.daemon.restart()
    wait_for(lambda: all(grant.lost for grant in writes))
    joined.up()
    assert not joined.daemon.got(Claim)
    hello = joined.session.hello(b"")
    assert (hello.writes, hello.open_writes) == ([], []), "these numbers mean nothing there"


def test_a_claim_answered_by_nonsense_costs_the_connection(joined: Joined, small_claims: None) -> None:
    for key in (b"a", b"b"):
        joined.session.allocate(run(key), soon())
    joined.daemon.on[Claim] = lambda claim: Sealed(claim.call, True)
    joined.daemon.stop()
    joined.daemon.restart()
    wait_for(lambda: "Claimed was to come" in joined.session.channel.error)


def test_tickets_of_two_sessions_have_different_numbers() -> None:
    """They may be told apart by nothing else, if both have the same session id."""
    sessions = [Session(identity(), lambda: None) for _ in range(2)]
    assert sessions[0].member != sessions[1].member
    assert next(sessions[0]._tickets) != next(sessions[1]._tickets)


# --- calls of very many messages --------------------------------------------------------------------------------------


def test_a_deadline_is_looked_at_between_windows(joined: Joined) -> None:
    """Our own slowness with a huge call is no fault of the daemon's, and the call ends in time."""
    keys = many(10 * KEYS_PER_MESSAGE_MAX)
    slow = time.monotonic() + 0.5

    def answer(lookup: Lookup) -> Looked:
        if lookup.call % 8 == 0:
            time.sleep(max(0.0, slow - time.monotonic()))
        return Looked(lookup.call, NEVER * len(unpack_keys(lookup.keys)), 1)

    joined.daemon.on[Lookup] = answer
    states = joined.session.lookup(keys, slow + 0.02)
    assert len(states) == len(keys)
    assert joined.session.channel.state is State.UP


def test_a_window_that_fails_ends_a_grant_and_keeps_what_came_before(joined: Joined) -> None:
    keys = many(9 * KEYS_PER_MESSAGE_MAX)

    def answer(allocate: Allocate) -> Any:
        if len(joined.daemon.got(Allocate)) > 8:
            raise Close
        count = len(unpack_keys(allocate.keys))
        return Allocated(allocate.call, NEW + PRESENT * (count - 1), ONE, 1)

    joined.daemon.on[Allocate] = answer
    grant = joined.session.allocate(keys, soon())
    assert len(grant.tickets) == 8
    assert len(grant.states) == len(keys)
    assert grant.states[8 * KEYS_PER_MESSAGE_MAX :] == RETRY * KEYS_PER_MESSAGE_MAX
    assert sorted(joined.session._writes) == [ticket.number for ticket in grant.tickets]


def test_nothing_is_asked_behind_a_gap_or_a_refusal(joined: Joined) -> None:
    keys = many(9 * KEYS_PER_MESSAGE_MAX)
    grant = joined.session.lease(keys, soon())
    assert grant.states == NEVER * len(keys)
    assert len(joined.daemon.got(Lease)) == 8
    joined.daemon.on[Allocate] = lambda a: Allocated(
        a.call, bytes([AllocateState.NO_ROOM]) * len(unpack_keys(a.keys)), Slots([], [], []), 1
    )
    refused = joined.session.allocate(keys, soon())
    assert refused.states == bytes([AllocateState.NO_ROOM]) * len(keys)
    assert len(joined.daemon.got(Allocate)) == 8


def test_an_interrupted_allocation_leaves_nothing_open(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cachesvc.client.session.allocated", interrupt)
        with pytest.raises(KeyboardInterrupt):
            joined.session.allocate(run(b"a"), soon())
    assert joined.session.idle()
    assert [abort.tickets for abort in joined.told(Abort)] == [[1]]
