"""What happens to chunks: every answer to lookup, lease and allocate, the order of marks, who is evicted for whom."""

from __future__ import annotations

import pytest

from cachesvc.core import events as ev
from cachesvc.core import transfers
from cachesvc.core.slots import REUSE_DELAY_S
from cachesvc.core.transfers import Marks, by_extent, generations_of, slot_run
from cachesvc.types import KeyState, Priority
from tests.support.nodes import (
    BUSY,
    CALL,
    CHUNK,
    NEW,
    NO_ROOM,
    OTHER,
    PENDING,
    PER,
    PRESENT,
    RAM,
    RETRY,
    SPACE,
    Driven,
    keys,
    of,
    one_extent,
    only,
)

NEVER, EVICTED = KeyState.NEVER_STORED, KeyState.EVICTED
FULL = KeyState.NO_ROOM


# --- write ------------------------------------------------------------------------------------------------------------


def test_allocate_and_seal_mark_before_they_answer() -> None:
    d = one_extent()
    extent = d.extents()[0].number
    run = ev.SlotRun((extent,) * 3, (0, 1, 2), (0, 0, 0))
    assert d.do(ev.Allocate(1, CALL, 5, 0, keys(3), 0, Priority.INTERACTIVE)) == [
        ev.MarkWriting(extent, (0, 1, 2), (0, 0, 0)),
        ev.Allocated(1, CALL, bytes([NEW] * 3), run),
    ]
    assert d.lookup(1, keys(4)) == [PENDING] * 3 + [KeyState.NAMESPACE_NEW]
    assert d.do(ev.Seal(1, CALL, 5, (CHUNK, 10, 0))) == [
        ev.MarkSealed(extent, (0, 1, 2), (0, 0, 0), SPACE, 0, tuple(keys(3)), (CHUNK, 10, 0)),
        ev.Sealed(1, CALL, ok=True),
    ]
    assert d.lookup(1, keys(4)) == [RAM] * 3 + [NEVER]


def test_abort_frees_at_a_new_generation() -> None:
    d = one_extent()
    extent = d.extents()[0].number
    d.allocate(1, 5, keys(2))
    assert d.do(ev.Abort(1, (5, 99))) == [ev.MarkFree(extent, (0, 1), (1, 1))]
    assert d.do(ev.Abort(1, (5,))) == []
    assert d.lookup(1, keys(1)) == [KeyState.NAMESPACE_NEW]
    assert d.allocate(1, 6, keys(2)).slots == ev.SlotRun((extent, extent), (1, 0), (1, 1))


@pytest.mark.parametrize("before", [(), (ev.Seal(1, CALL, 5, (1, 1)),), (ev.Abort(1, (5,)),)])
def test_a_seal_of_no_open_ticket(before: tuple[ev.Event, ...]) -> None:
    d = one_extent()
    if before:
        d.allocate(1, 5, keys(2))
    for event in before:
        d.do(event)
    assert d.do(ev.Seal(1, CALL, 5, (1, 1))) == [ev.Sealed(1, CALL, ok=False)]


def test_a_batch_is_answered_key_by_key() -> None:
    d = one_extent()
    d.store(1, keys(1))
    d.allocate(1, 1, keys(1, 1))
    got = d.allocate(1, 2, [*keys(4), *keys(1, 3)])
    assert list(got.states) == [PRESENT, BUSY, NEW, NEW, BUSY]
    assert len(got.slots) == 2
    nothing = d.allocate(1, 3, keys(2))
    assert (list(nothing.states), len(nothing.slots)) == ([PRESENT, BUSY], 0)
    assert not d.seal(1, 3, 0), "no slot, no ticket"


def test_nothing_is_given_behind_a_hole() -> None:
    d = one_extent()
    d.store(1, keys(PER))
    d.lease(1, 1, keys(PER))
    states = d.allocate(1, 2, [*keys(1, 100), *keys(2), *keys(2, 101)]).states
    assert list(states) == [NO_ROOM, PRESENT, PRESENT, NO_ROOM, NO_ROOM]
    assert d.node.snapshot("t", d.now)["tenants"]["t"]["counts"]["refused"] == 3


def test_no_room_at_once_when_all_is_leased_and_room_when_it_ends() -> None:
    d = one_extent()
    d.store(1, keys(PER))
    d.lease(1, 1, keys(PER))
    assert d.store(1, keys(1, 100)) == [NO_ROOM]
    d.do(ev.Release(1, (1,)))
    assert d.store(1, keys(1, 100)) == [NEW]


def test_retry_while_memory_is_on_its_way() -> None:
    d = Driven(2, auto=False)
    d.hello(1)
    assert d.store(1, keys(1)) == [RETRY], "no extent yet"
    d.finish(0)
    format_extent = next(i for i, job in enumerate(d.jobs) if isinstance(job, ev.FormatExtent))
    d.finish(format_extent)
    assert d.store(1, keys(PER)) == [NEW] * PER
    assert d.store(1, keys(1, PER)) == [RETRY], "a second spare is being made: better than to evict"
    assert d.resident(keys(PER)) == keys(PER)
    d.finish_all()
    assert d.store(1, keys(PER, PER)) == [NEW] * PER
    assert d.store(1, keys(1, 100)) == [NEW], "nothing more is coming: evict"


def test_evict_when_memory_was_refused() -> None:
    d = Driven(2, auto=False)
    d.hello(1)
    d.finish(0)
    d.finish(1)
    (spare,) = d.jobs
    assert isinstance(spare, ev.MakeSpare)
    d.store(1, keys(PER))
    d.do(ev.SpareFailed(spare.extent, "no memory"))
    assert d.store(1, keys(1, PER)) == [NEW]


def test_the_first_of_two_writers_wins() -> None:
    """A claimed write and another session's write of the same key, after a restart."""
    d = Driven(1)
    d.hello(1)
    run = d.allocate(1, 5, keys(1)).slots
    d = d.restarted()
    d.hello(2, session=OTHER)
    assert d.store(2, keys(1)) == [NEW]
    d.hello(1, writes=[ev.WriteClaim(5, 0, tuple(keys(1)), run)])
    out = d.do(ev.Seal(1, CALL, 5, (1,)))
    assert out == [ev.MarkFree(run.extents[0], run.slots, (1,)), ev.Sealed(1, CALL, ok=True)]
    assert d.lookup(1, keys(1)) == [RAM]


def test_a_ticket_over_two_extents_is_marked_in_each() -> None:
    d = Driven(2)
    d.hello(1)
    d.store(1, keys(PER - 2, 500))
    first, second = (extent.number for extent in d.extents())
    out = d.do(ev.Allocate(1, CALL, 5, 0, keys(4), 0, Priority.INTERACTIVE))
    assert [(mark.extent, mark.slots) for mark in of(ev.MarkWriting, out)] == [
        (first, (PER - 2, PER - 1)),
        (second, (0, 1)),
    ]
    out = d.do(ev.Seal(1, CALL, 5, (1, 2, 3, 4)))
    assert [(mark.extent, mark.keys, mark.lengths) for mark in of(ev.MarkSealed, out)] == [
        (first, tuple(keys(2)), (1, 2)),
        (second, tuple(keys(2, 2)), (3, 4)),
    ]


# --- look -------------------------------------------------------------------------------------------------------------


def test_reasons_of_misses() -> None:
    d = one_extent(eviction="lru")
    assert d.lookup(1, keys(1)) == [KeyState.NAMESPACE_NEW]
    d.allocate(1, 1, keys(1))
    assert d.lookup(1, keys(2)) == [PENDING, KeyState.NAMESPACE_NEW]
    d.seal(1, 1, 1)
    assert d.lookup(1, keys(2)) == [RAM, NEVER]
    d.store(1, keys(PER, 1))
    assert d.lookup(1, keys(1)) == [EVICTED]
    d.allocate(1, 2, keys(1))
    assert d.lookup(1, keys(1)) == [PENDING]


def test_a_namespace_knows_no_chunk_of_another() -> None:
    d = one_extent()
    d.hello(2, session=OTHER, namespace=b"another-namespac")
    d.store(1, keys(2))
    assert d.lookup(2, keys(2)) == [KeyState.NAMESPACE_NEW] * 2
    assert d.store(2, keys(2)) == [NEW] * 2


def test_groups_of_a_namespace_are_apart() -> None:
    d = Driven(2)
    d.hello(1, chunk_bytes=(CHUNK, CHUNK))
    d.store(1, keys(2), group=1)
    assert d.lookup(1, keys(2)) == [KeyState.NAMESPACE_NEW] * 2
    assert d.lookup(1, keys(2), group=1) == [RAM] * 2


def test_arrivals_are_counted_once_with_reasons() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(PER))
    d.store(1, keys(1, PER))  # evicts one
    d.lookup(1, keys(PER))
    d.lookup(1, [*keys(2), *keys(1, 50)], touch=True)
    counts = d.node.snapshot("t", d.now)["tenants"]["t"]["counts"]
    assert counts["hits"] + counts["misses"].get("evicted", 0) == 2
    assert counts["misses"]["never_stored"] == 1
    d.lease(1, 1, keys(3, 60), touch=True)
    assert d.node.snapshot("t", d.now)["tenants"]["t"]["counts"]["misses"]["never_stored"] == 4


# --- lease ------------------------------------------------------------------------------------------------------------


def test_a_lease_of_the_leading_run() -> None:
    d = one_extent()
    d.store(1, keys(3))
    extent = d.extents()[0].number
    some = [*keys(2), *keys(1, 50), *keys(1, 2), *keys(1, 51)]
    assert d.do(ev.Lease(1, CALL, 5, 0, some, 0, touch=False, prefix=True)) == [
        ev.Leased(
            1,
            CALL,
            bytes([RAM, RAM, NEVER]),
            ev.SlotRun((extent, extent), (0, 1), (0, 0)),
            (CHUNK, CHUNK),
        )
    ]
    assert list(d.slab().leases) == [1, 1] + [0] * (PER - 2)


def test_a_lease_of_every_key_that_is_there() -> None:
    d = one_extent()
    d.store(1, keys(3))
    got = d.lease(1, 5, [*keys(2), *keys(1, 50), *keys(1, 2)], prefix=False)
    assert (list(got.states), got.slots.slots) == ([RAM, RAM, NEVER, RAM], (0, 1, 2))


def test_a_lease_of_nothing_is_no_ticket() -> None:
    d = one_extent()
    assert len(d.lease(1, 5, keys(1)).slots) == 0
    assert not d.node.sessions.by_connection[1].leases
    assert d.lease(1, 5, []) == ev.Leased(1, CALL, b"", ev.SlotRun((), (), ()), ())


def test_a_pending_chunk_ends_the_run() -> None:
    d = one_extent()
    d.store(1, keys(1))
    d.allocate(1, 5, keys(1, 1))
    assert list(d.lease(1, 6, keys(3)).states) == [RAM, PENDING]


def test_a_chunk_may_go_after_its_last_lease() -> None:
    """Half of the slots are read by two, half are being written."""
    d = one_extent()
    half, quarter = PER // 2, PER // 4
    d.store(1, keys(half))
    d.hello(2, session=OTHER)
    for connection in (1, 2):
        d.lease(connection, 1, keys(half))
        d.allocate(connection, 2, keys(quarter, 100 * connection))
    for connection, state in ((1, NO_ROOM), (2, NEW)):
        d.do(ev.Release(connection, (1,)))
        assert d.store(1, keys(1, 50)) == [state]


# --- caps -------------------------------------------------------------------------------------------------------------


def test_alone_a_session_may_hold_everything() -> None:
    d = one_extent()
    assert list(d.allocate(1, 1, keys(PER)).states) == [NEW] * PER
    d.seal(1, 1, PER)
    assert list(d.lease(1, 2, keys(PER)).states) == [RAM] * PER


def test_beside_another_a_session_holds_half() -> None:
    d = one_extent()
    d.hello(2, session=OTHER)
    half = PER // 2
    assert list(d.allocate(1, 1, keys(PER)).states) == [NEW] * half + [RETRY] * half
    assert list(d.allocate(1, 2, keys(1, 50)).states) == [RETRY], "tickets add up"
    assert d.store(2, keys(half, half)) == [NEW] * half
    d.seal(1, 1, half)
    assert list(d.lease(1, 3, keys(PER)).states) == [RAM] * half + [FULL]
    assert list(d.lease(1, 4, keys(1, half)).states) == [FULL]
    assert list(d.lease(2, 3, keys(half, half)).states) == [RAM] * half
    d.do(ev.Release(1, (3,)))
    assert list(d.lease(1, 4, keys(1, half)).states) == [RAM]


def test_beside_another_a_session_may_hold_half_of_what_the_class_can_become() -> None:
    """Two engines and an empty arena: a class began with one extent, and a prompt found room for half of that."""
    d = Driven(4, auto=False)
    d.hello(1)
    d.hello(2, session=OTHER)
    d.finish_all()
    assert d.store(1, keys(PER)) == [NEW] * PER, "one extent is there, three are spare"
    d.finish_all()
    assert list(d.lease(2, 50, keys(PER)).states) == [RAM] * PER


def test_half_in_leases_and_half_in_writing_are_not_everything() -> None:
    """Else one wedged session that reads and writes at the same time would starve all others."""
    d = one_extent()
    d.hello(2, session=OTHER)
    half, quarter = PER // 2, PER // 4
    d.store(1, keys(half))
    assert list(d.lease(1, 5, keys(half)).states) == [RAM] * half
    assert list(d.allocate(1, 6, keys(half, half)).states) == [NEW] * quarter + [RETRY] * quarter
    assert d.store(2, keys(quarter, PER)) == [NEW] * quarter
    d.do(ev.Release(1, (5,)))
    assert list(d.allocate(1, 7, keys(half, 2 * PER)).states) == [NEW] * quarter + [RETRY] * quarter


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("reading", [False, True])
def test_however_many_are_wedged_something_stays_for_the_next(count: int, reading: bool) -> None:
    """Each takes all that it is given, one after another; two took everything when each might have its half."""
    d = Driven(8)
    d.hello(1)
    for each in range(2, count + 2):
        d.hello(each, session=bytes([each]) * 16)
    slots = 8 * PER
    for first in range(0, slots, PER):
        d.store(1, keys(PER, first))
    held = []
    for each in range(2, count + 2):
        if reading:
            for first in range(0, slots, PER):
                d.store(each, keys(PER, 1000 * each + first))
            held.append(len(d.lease(each, 5, keys(slots, 1000 * each), prefix=False).slots))
        else:
            held.append(len(d.allocate(each, 5, keys(slots, 1000 * each)).slots))
    assert held[:3] == [slots // 2, slots // 4, slots // 8][:count]
    left = slots - sum(held)
    assert left >= 2
    assert d.store(1, keys(1)) == [NEW]
    assert list(d.allocate(1, 9, keys(slots, 9000)).states).count(NEW) == left // 2


def test_two_with_bursts_have_half_of_the_class_each() -> None:
    d = Driven(4)
    d.hello(1)
    d.hello(2, session=OTHER)
    for first in range(0, 4 * PER, PER):
        d.store(1, keys(PER, first))
    for each in (1, 2):
        assert list(d.allocate(each, 5, keys(2 * PER, 1000 * each)).states) == [NEW] * (2 * PER)


def test_many_may_read_the_same() -> None:
    """A prefix that all share takes from nobody what the first of them doesn't take already."""
    d = Driven(2)
    for each in range(1, 6):
        d.hello(each, session=bytes([each]) * 16)
    half = PER
    for first in range(0, half, 2):
        d.store(1, keys(2, first))
    for each in range(1, 6):
        assert list(d.lease(each, 5, keys(half)).states) == [RAM] * half
    d.store(1, keys(half // 2, 100))
    got = d.lease(1, 6, [*keys(half), *keys(half // 2, 100)], prefix=False)
    assert list(got.states) == [RAM] * half + [FULL] * (half // 2), "its own half is full"


def test_caps_name_the_keys_beyond_them() -> None:
    d = one_extent()
    d.hello(2, session=OTHER)
    half = PER // 2
    d.store(1, keys(half))
    d.store(1, keys(2, half))
    some = [*keys(1), *keys(1, 50), *keys(half + 1, 1)]
    got = d.lease(1, 5, some, prefix=False)
    assert list(got.states) == [RAM, NEVER] + [RAM] * (half - 1) + [FULL] * 2
    assert len(got.slots) == half


def test_what_is_read_twice_is_held_once() -> None:
    """Two prompts that share a prefix; two readers of the same chunk."""
    d = one_extent()
    d.hello(2, session=OTHER)
    half = PER // 2
    d.store(1, keys(half))
    d.store(1, keys(1, half))
    for ticket in range(10):
        assert list(d.lease(1, ticket, keys(half)).states) == [RAM] * half
    assert list(d.lease(1, 10, [*keys(2), *keys(1, half), *keys(1)]).states) == [RAM, RAM, FULL]
    assert list(d.lease(1, 11, [*keys(2), *keys(1, half), *keys(1)], prefix=False).states) == [RAM, RAM, FULL, RAM]
    for ticket in range(10):
        d.do(ev.Release(1, (ticket,)))
    assert list(d.lease(1, 12, keys(half + 1)).states) == [RAM] * half + [FULL]
    d.do(ev.Release(1, (10, 11, 12)))
    assert list(d.lease(1, 13, keys(1, half)).states) == [RAM]


def test_records_of_leases_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "LEASED_KEYS_PER_SESSION_MAX", 4)
    d = one_extent()
    d.store(1, keys(3))
    assert list(d.lease(1, 1, keys(3)).states) == [RAM] * 3
    assert list(d.lease(1, 2, keys(2)).states) == [FULL]
    assert list(d.lease(1, 3, keys(1)).states) == [RAM]


def test_a_session_without_connection_is_no_other_session() -> None:
    d = one_extent()
    d.hello(2, session=OTHER)
    d.allocate(2, 1, keys(1, 50))
    d.do(ev.ConnectionLost(2))
    assert list(d.allocate(1, 1, keys(PER)).states) == [NEW] * (PER - 1) + [NO_ROOM]


def test_what_one_session_held_alone_it_keeps() -> None:
    d = one_extent()
    d.store(1, keys(PER))
    d.lease(1, 1, keys(PER))
    d.hello(2, session=OTHER)
    assert list(d.allocate(2, 1, keys(1, 50)).states) == [NO_ROOM], "refused at once"
    d.do(ev.Release(1, (1,)))
    assert list(d.allocate(2, 1, keys(1, 50)).states) == [NEW]


def test_a_wedged_holder_leaves_half() -> None:
    """It leases and writes all that it may, and never lets go; the other one still stores and reads."""
    d = one_extent()
    d.hello(2, session=OTHER)
    half, quarter = PER // 2, PER // 4
    d.store(1, keys(half))
    assert list(d.lease(1, 1, keys(half)).states) == [RAM] * half
    assert list(d.allocate(1, 2, keys(PER, 100)).states) == [NEW] * quarter + [RETRY] * (PER - quarter)
    for i in range(40):
        assert d.store(2, keys(1, 200 + i)) == [NEW]
        assert d.resident(keys(1, 200 + i), 2)
    d.do(ev.Release(1, (1,)))
    assert list(d.allocate(1, 3, keys(PER, 200)).states)[-quarter:] == [RETRY] * quarter
    assert d.node.sessions.by_connection[1].holding(d.slab()).writing == half


def test_a_wedged_writer_leaves_leases() -> None:
    d = one_extent()
    d.hello(2, session=OTHER)
    half, quarter = PER // 2, PER // 4
    d.store(2, keys(half))
    d.allocate(1, 2, keys(half, 100))
    assert list(d.lease(1, 1, keys(half)).states) == [RAM] * quarter + [FULL]
    assert d.store(2, keys(1, 200)) == [NEW]


# --- tainted slots ----------------------------------------------------------------------------------------------------


def test_a_slot_whose_lease_was_lost_rests_before_it_is_used_again() -> None:
    d = one_extent(eviction="lru")
    extent = d.extents()[0].number
    d.store(1, keys(PER))
    d.lease(1, 1, keys(PER))
    d.hello(2, process=10)  # comes back and doesn't name the lease
    d.do(ev.ConnectionLost(1))
    assert d.lookup(2, keys(PER)) == [RAM] * PER, "the chunks are as good as before"
    out = d.do(ev.Allocate(2, CALL, 2, 0, keys(1, 50), 0, Priority.INTERACTIVE))
    assert out == [
        ev.MarkFree(extent, tuple(range(PER - 1, -1, -1)), (1,) * PER),
        ev.Allocated(2, CALL, bytes([RETRY]), ev.SlotRun((), (), ())),
    ]
    d.now += REUSE_DELAY_S - 0.01
    assert list(d.allocate(2, 2, keys(1, 50)).states) == [RETRY]
    d.now += 0.01
    got = d.allocate(2, 2, keys(1, 50))
    assert (list(got.states), got.slots.generations) == ([NEW], (1,))


def test_a_search_throws_few_resting_chunks_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "TAINTED_PASSED_MAX", 1)
    d = one_extent(eviction="lru")
    d.store(1, keys(PER))
    d.lease(1, 1, keys(PER))
    d.hello(2, process=10)
    assert list(d.allocate(2, 2, keys(3, 50)).states) == [RETRY] * 3
    assert d.resident(keys(PER), 2) == keys(PER - 2)


def test_a_slot_that_rested_is_clean_again() -> None:
    d = one_extent(eviction="lru")
    d.store(1, keys(PER))
    d.lease(1, 1, keys(1, PER - 1))
    d.hello(2, process=10)
    assert list(d.allocate(2, 2, keys(1, 50)).states) == [NEW], "the next coldest goes"
    assert d.slab().tainted == set()
    d.now += REUSE_DELAY_S
    assert d.store(2, keys(1, 51)) == [NEW]
    assert d.lookup(2, keys(PER)) == [RAM] * (PER - 2) + [EVICTED] * 2


def test_the_death_of_a_reader_taints_nothing() -> None:
    d = one_extent()
    d.hello(2, session=OTHER)
    d.store(1, keys(PER))
    d.lease(2, 1, keys(2))
    d.do(ev.ProcessDied(20))
    assert not d.slab().tainted
    assert d.store(1, keys(PER, 50)) == [NEW] * PER


# --- marks ------------------------------------------------------------------------------------------------------------


def test_slots_are_named_by_extent() -> None:
    d = Driven(3)
    d.hello(1)
    d.store(1, keys(2 * PER))
    slab = d.slab()
    first, second, *_ = (extent.number for extent in d.extents())
    numbers = [PER + 1, 0, PER, 3]
    assert list(by_extent(slab, numbers)) == [(second, (1, 0), [PER + 1, PER]), (first, (0, 3), [0, 3])]
    assert slot_run(slab, numbers) == ev.SlotRun((second, first, second, first), (1, 0, 0, 3), (0, 0, 0, 0))
    assert generations_of(slab, numbers) == (0, 0, 0, 0)
    out: list[ev.Effect] = []
    marks = Marks()
    marks.flush(out)
    assert out == []
    for n in numbers:
        marks.free(slab, n)
    marks.flush(out)
    assert out == [ev.MarkFree(second, (1, 0), (0, 0)), ev.MarkFree(first, (0, 3), (0, 0))]


def test_only_one_reply_ends_each_call() -> None:
    d = one_extent()
    replies = (ev.Allocated, ev.Sealed, ev.Leased, ev.Looked)
    for event in (
        ev.Allocate(1, CALL, 5, 0, keys(2), 1, Priority.INTERACTIVE),
        ev.Seal(1, CALL, 5, (1, 2)),
        ev.Lease(1, CALL, 6, 0, keys(2), 1, touch=True, prefix=True),
        ev.Lookup(1, CALL, 0, keys(2), 1, touch=True),
    ):
        out = d.do(event)
        assert isinstance(out[-1], replies), "the reply comes last"
        assert sum(isinstance(effect, replies) for effect in out) == 1
    assert only(ev.Looked, d.do(ev.Lookup(1, CALL, 0, [], 0, touch=True))).states == b""
