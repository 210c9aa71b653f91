"""Which class has which extents: growing, moving, draining, damage, refusals, bytes that somebody still maps."""

from __future__ import annotations

import random

import pytest

from cachesvc.core import events as ev
from cachesvc.core.extents import MOVE_PATIENCE_S, MOVE_REST_S, PRESSURE_S, RETRY_MAKING_S
from cachesvc.core.slots import REUSE_DELAY_S
from cachesvc.types import AllocateState, KeyState, Priority
from tests.support.nodes import (
    CALL,
    CHUNK,
    NEW,
    NO_ROOM,
    OTHER,
    PER,
    RAM,
    RETRY,
    Driven,
    keys,
    of,
    only,
)

LARGE = 2 * CHUNK
SECOND = b"another-namespac"


def two_classes(extents_max: int = 4, **settings: str) -> Driven:
    """Session 1 has filled the arena with chunks of `CHUNK` bytes; session 2 has chunks of `LARGE` and just came."""
    d = Driven(extents_max, **settings)  # type: ignore[arg-type]
    d.hello(1)
    for i in range(extents_max):
        d.now += 1.0
        d.store(1, keys(PER, PER * i))
    d.now += 1.0
    return d


def second(d: Driven) -> list[ev.Effect]:
    return d.hello(2, session=OTHER, namespace=SECOND, chunk_bytes=(LARGE,))


def sizes(d: Driven) -> dict[int, int]:
    """Extents of each class of tenant t, draining ones aside."""
    return {size: len(slab.used_extents()) for (tenant, size), slab in d.node.extents.slabs.items() if tenant == "t"}


# --- growing ----------------------------------------------------------------------------------------------------------


def test_the_arena_is_made_one_spare_at_a_time() -> None:
    d = Driven(2, auto=False)
    assert d.jobs == [ev.MakeSpare(1)]
    assert d.after(1.0) == []
    assert d.finish() == [ev.MakeSpare(2)]
    assert d.finish() == []
    assert d.node.extents.spares == [1, 2]


def test_every_class_gets_its_first_extent_before_any_its_second() -> None:
    d = Driven(3, auto=False)
    d.hello(1)
    second(d)
    d.finish_all()
    d.store(1, keys(PER))
    d.store(2, keys(1))
    d.finish_all()
    assert sizes(d) == {CHUNK: 2, LARGE: 1}


def test_a_class_grows_before_it_is_full() -> None:
    d = Driven(2, auto=False)
    d.hello(1)
    d.finish_all()
    for number, key in enumerate(keys(PER // 2)):
        out = d.do(ev.Allocate(1, CALL, 5 + number, 0, [key], 0, Priority.INTERACTIVE))
        assert not of(ev.FormatExtent, out)
    out = d.do(ev.Allocate(1, CALL, 50, 0, keys(1, 50), 0, Priority.INTERACTIVE))
    assert isinstance(out[-2], ev.Allocated), "the reply doesn't wait"
    assert isinstance(out[-1], ev.FormatExtent)


def test_a_class_has_room_for_two_more_allocations_as_large_as_the_last() -> None:
    d = Driven(8, auto=False)
    d.hello(1)
    d.finish_all()
    assert sizes(d) == {CHUNK: 1}
    refused = d.allocate(1, 5, keys(2 * PER))
    d.finish_all()
    assert sizes(d) == {CHUNK: 5}, "PER are taken, 4 * PER are free"
    assert refused.states.count(AllocateState.RETRY) == PER
    for number in range(12):
        d.do(ev.Allocate(1, CALL, 10 + number, 0, keys(1, 1000 + number), 0, Priority.INTERACTIVE))
    d.finish_all()
    assert sizes(d) == {CHUNK: 5}, "nobody asks for so much any more"


def test_classes_of_nobody_get_nothing() -> None:
    d = Driven(2, auto=False)
    d.hello(1)
    d.do(ev.ConnectionLost(1))
    d.finish_all()
    assert (sizes(d), len(d.node.extents.spares)) == ({CHUNK: 0}, 2)
    d.hello(1)
    d.finish_all()
    assert sizes(d) == {CHUNK: 1}


def test_a_refused_spare_is_asked_for_again_later() -> None:
    d = Driven(1, auto=False)
    d.jobs.clear()
    assert d.do(ev.SpareFailed(1, "no memory")) == []
    assert d.after(RETRY_MAKING_S - 0.1) == []
    assert d.after(0.1) == [ev.MakeSpare(2)]


def test_a_format_that_failed() -> None:
    d = Driven(1, auto=False)
    d.hello(1)
    d.finish()
    (job,) = d.jobs
    assert isinstance(job, ev.FormatExtent)
    d.jobs.clear()
    d.tables.spares.clear()  # nothing is left of either
    d.do(ev.SpareFailed(job.extent, "disk says no"))
    assert d.store(1, keys(1)) == [RETRY]
    assert of(ev.MakeSpare, d.after(RETRY_MAKING_S)) == [ev.MakeSpare(3)]
    d.finish_all()
    assert d.store(1, keys(1)) == [NEW]


def test_a_format_that_failed_of_bytes_that_somebody_maps() -> None:
    d = two_classes(2)
    first = d.extents()[0].number
    d.do(ev.ExtentsMapped(10, (first,)))
    d.auto = False
    second(d)
    (job,) = d.jobs
    assert job == ev.FormatExtent(first, d.node.extents._next - 1, "t", LARGE)
    d.jobs.clear()
    d.do(ev.SpareFailed(job.extent, "no"))
    d.after(RETRY_MAKING_S)
    assert not d.jobs, "process 10 maps these bytes"
    d.do(ev.ProcessDied(10))
    assert len(of(ev.MakeSpare, d.jobs)) == 1


# --- moving -----------------------------------------------------------------------------------------------------------


def test_a_class_without_an_extent_gets_the_coldest() -> None:
    d = two_classes()
    d.lookup(1, keys(PER), touch=True)  # the first extent is hot again
    donor = d.extents()[1].number
    out = second(d)
    assert out[:3] == [
        only(ev.SaveNamespaces, out),
        ev.MarkFree(donor, tuple(range(PER)), (1,) * PER),
        ev.FormatExtent(donor, d.node.extents._next - 1, "t", LARGE),
    ]
    assert sizes(d) == {CHUNK: 3, LARGE: 1}
    assert d.resident(keys(4 * PER)) == [*keys(PER), *keys(2 * PER, 2 * PER)]
    assert d.store(2, keys(1)) == [NEW]


def test_draining_misses_at_once_and_moves_with_the_last_lease() -> None:
    d = two_classes(2)
    lease = d.lease(1, 5, keys(3))
    assert len(of(ev.MarkFree, second(d))) == 1
    assert d.lookup(1, keys(PER)) == [KeyState.NEVER_STORED] * PER
    assert list(d.lease(1, 6, keys(1)).states) == [KeyState.NEVER_STORED], "no new leases"
    assert sizes(d) == {CHUNK: 1, LARGE: 0}
    assert d.store(2, keys(1)) == [RETRY]
    out = d.do(ev.Release(1, (5,)))
    assert out == [ev.MarkFree(lease.slots.extents[0], (0, 1, 2), (1, 1, 1))]
    d.after(0.25)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}


def test_draining_waits_for_writers_and_drops_what_they_seal() -> None:
    d = Driven(1, auto=False)
    d.hello(1)
    d.finish_all()
    d.store(1, keys(2))
    d.allocate(1, 5, keys(2, 2))
    number = d.extents()[0].number
    d.do(ev.ExtentDamaged(number, "truncated"))
    assert d.after(1.0) == []
    out = d.do(ev.Seal(1, CALL, 5, (1, 1)))
    assert out == [ev.MarkFree(number, (2, 3), (1, 1)), ev.Sealed(1, CALL, ok=True)]
    assert d.lookup(1, keys(4)) == [KeyState.NEVER_STORED] * 4
    assert ev.DropExtent(number) in d.after(0.25)


def test_pressure_moves_an_extent_to_the_class_that_evicts_young_chunks() -> None:
    d = two_classes()
    second(d)
    for i in range(20):
        d.after(0.1)
        d.store(2, keys(1, i))
        if i == 5:
            assert sizes(d) == {CHUNK: 2, LARGE: 2}, "the next comes when this one has turned out not to be enough"
    assert sizes(d) == {CHUNK: 1, LARGE: 3}, "it evicts chunks of a second, the other keeps some of several"


def test_no_pressure_no_move() -> None:
    d = two_classes()
    second(d)
    for i in range(12):
        d.store(2, keys(1, i))
    d.now += PRESSURE_S
    d.after(0.25)
    assert sizes(d) == {CHUNK: 3, LARGE: 1}, "its evictions are long ago"


def test_a_connected_class_keeps_its_last_extent() -> None:
    d = two_classes(2)
    second(d)
    for i in range(40):
        d.now += 0.01
        d.store(2, keys(1, i))
        d.after(0.01)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}
    d.do(ev.ConnectionLost(1))
    for i in range(40):
        d.now += 0.01
        d.store(2, keys(1, i))
    d.after(0.25)
    assert sizes(d) == {CHUNK: 0, LARGE: 2}, "nobody is there for the other one"


def test_a_class_that_has_nothing_but_leases_is_under_pressure() -> None:
    """It has nothing to evict, so its evictions can't show that it lacks room."""
    d = two_classes()
    second(d)
    assert d.store(2, keys(PER // 2)) == [NEW] * (PER // 2)
    d.lease(2, 5, keys(PER // 2))
    d.now += 0.1
    assert d.store(2, keys(1, 50)) == [NO_ROOM], "at once, whatever will come"
    d.after(0.25)
    assert sizes(d) == {CHUNK: 2, LARGE: 2}
    assert d.store(2, keys(1, 50)) == [NEW]
    d.after(0.25)
    assert sizes(d) == {CHUNK: 2, LARGE: 2}


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_two_classes_under_load_both_get_space_and_nothing_ping_pongs(eviction: str) -> None:
    d = Driven(4, eviction=eviction)
    d.hello(1)
    second(d)
    moves = []
    for i in range(1000):
        d.now += 0.02
        d.store(1, keys(1, i))
        if i % 2 == 0:
            d.store(2, keys(1, i))
        # always a lease or two of what is youngest
        for connection in (1, 2):
            if i >= 10:
                d.do(ev.Release(connection, (i - 10,)))
            d.lease(connection, i, keys(1, i // 2 * 2))
        if i % 12 == 0:
            d.after(0.0)
        moves.append(d.node.extents.moved)
    assert min(sizes(d).values()) >= 1
    assert sum(sizes(d).values()) == 4
    assert moves[-1] <= 2, "it settles"
    assert moves[-1] == moves[500], "and stays"


@pytest.mark.parametrize("mean_s", [0.02, 0.5])
@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_uneven_load_does_not_make_extents_ping_pong(eviction: str, mean_s: float) -> None:
    """Bursts of stores at random moments: each class is under pressure and idle in turn, dozens of times a second, and
    an extent that has just come is all free. What a class got it keeps for a while."""
    draw = random.Random(f"{eviction} {mean_s}")
    d = Driven(8, eviction=eviction)
    d.hello(1)
    second(d)
    before, way, moved_at, moves = sizes(d), 0, d.now, 0
    for i in range(200):
        d.now += draw.expovariate(1 / mean_s)
        connection = draw.randrange(1, 3)
        for n in range(draw.randrange(1, 20)):
            d.store(connection, keys(1, 100 * i + n))
        if i % 10 == 0:
            d.after(0.0)
        after = sizes(d)
        if sum(before.values()) == 8 and after != before:
            turn = 1 if after[LARGE] > before[LARGE] else -1
            assert turn != -way or d.now - moved_at >= MOVE_REST_S, "an extent went back"
            way, moved_at, moves = turn, d.now, moves + 1
        assert min(after.values()) >= 1
        before = after
    assert moves <= d.now


def test_one_move_at_a_time() -> None:
    d = two_classes()
    d.lease(1, 5, keys(4 * PER), prefix=False)
    second(d)
    d.hello(3, session=b"third-of-sessions", namespace=b"third--namespace", chunk_bytes=(4 * CHUNK,))
    d.after(1.0)
    assert sum(e.draining for e in d.extents()) == 1
    d.do(ev.Release(1, (5,)))
    d.after(0.25)
    d.after(0.25)
    assert sizes(d) == {CHUNK: 2, LARGE: 1, 4 * CHUNK: 1}


def test_a_wedged_holder_does_not_hold_up_moves_for_ever() -> None:
    """Its leases lie in the coldest extent. After a while another one is taken, one that nobody holds."""
    d = two_classes()
    d.lease(1, 5, keys(1))
    d.lease(1, 6, keys(1, PER))
    second(d)
    assert d.store(2, keys(1)) == [RETRY]
    d.after(MOVE_PATIENCE_S - 0.1)
    assert d.store(2, keys(1)) == [RETRY]
    d.after(0.1)
    assert sizes(d) == {CHUNK: 2, LARGE: 1}
    assert d.resident(keys(4 * PER)) == [*keys(PER, PER), *keys(PER, 3 * PER)]
    assert d.store(2, keys(1)) == [NEW]
    stuck = next(e.number for e in d.extents() if e.draining)
    d.do(ev.Release(1, (5,)))
    d.after(0.25)
    assert ev.DropExtent(stuck) in d.log, "its memory comes back as a spare"
    assert d.node.extents.total() == 4


def test_an_extent_with_quarantined_slots_is_not_chosen() -> None:
    d = Driven(2)
    d.hello(1)
    d.allocate(1, 5, keys(1))
    d.do(ev.ConnectionLost(1))
    d.hello(3, session=b"s" * 16)
    d.now += 1.0
    d.store(3, keys(2 * PER - 1, 100))
    second(d)
    quarantined = [e for e in d.extents() if e.quarantined]
    assert len(quarantined) == 1
    assert not quarantined[0].draining
    assert sizes(d) == {CHUNK: 1, LARGE: 1}


def test_a_tainted_extent_rests_before_other_bytes_are_written_to_it() -> None:
    d = two_classes(2)
    d.lease(1, 5, keys(2))
    d.hello(3, process=10)  # comes back and doesn't name its lease: it may read on for a moment
    second(d)
    assert sizes(d) == {CHUNK: 1, LARGE: 0}
    d.after(REUSE_DELAY_S - 0.1)
    assert sizes(d) == {CHUNK: 1, LARGE: 0}
    d.after(0.1)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}


def test_a_lease_lost_while_draining_makes_it_rest_too() -> None:
    d = two_classes(2)
    d.lease(1, 5, keys(2))
    second(d)
    d.hello(3, process=10)
    d.after(REUSE_DELAY_S - 0.1)
    assert sizes(d) == {CHUNK: 1, LARGE: 0}
    d.after(0.1)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}


def test_resting_slots_make_their_draining_extent_rest() -> None:
    d = two_classes(2, eviction="lru")
    d.lease(1, 5, keys(1))
    d.hello(3, process=10)
    d.lookup(3, keys(2 * PER - 1, 1), touch=True)
    assert d.store(3, keys(1, 900)) == [NEW]
    assert len(d.slab().limbo) == 1
    d.lookup(3, keys(PER, PER), touch=True)
    second(d)
    assert (sizes(d), len(d.slab().limbo)) == ({CHUNK: 1, LARGE: 0}, 0)
    d.after(REUSE_DELAY_S)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}


def test_a_class_that_got_an_extent_gives_none_away_for_a_while() -> None:
    d = two_classes()
    second(d)
    for i in range(30):
        d.now += 0.1
        d.store(2, keys(1, i))
        d.after(0.0)
    assert sizes(d) == {CHUNK: 1, LARGE: 3}
    received = d.slab("t", LARGE).received_at
    while d.now < received + MOVE_REST_S - 0.2:
        d.now += 0.1
        d.store(1, keys(4, int(d.now * 100)))
        d.after(0.0)
        assert sizes(d) == {CHUNK: 1, LARGE: 3}
    d.now += 0.3
    d.store(1, keys(4, 50))
    d.after(0.0)
    assert sizes(d) == {CHUNK: 2, LARGE: 2}


# --- damage and shrinking ---------------------------------------------------------------------------------------------


def test_damage_drops_the_extent_once_nobody_holds_it() -> None:
    d = two_classes(2)
    number = d.extents()[0].number
    d.lease(1, 5, keys(1))
    out = d.do(ev.ExtentDamaged(number, "truncated"))
    assert out == [ev.MarkFree(number, tuple(range(1, PER)), (1,) * (PER - 1))]
    assert d.resident(keys(2 * PER)) == keys(PER, PER)
    assert d.do(ev.ExtentDamaged(number, "truncated")) == [], "it is reported as long as it is there"
    d.do(ev.Release(1, (5,)))
    d.after(0.25)
    assert number not in d.tables.tables
    assert d.do(ev.ExtentDamaged(number, "truncated")) == []
    assert d.store(1, keys(1, 900)) == [NEW]


def test_a_damaged_extent_is_not_moved() -> None:
    d = two_classes(2)
    number = d.extents()[0].number
    d.lease(1, 5, keys(1))
    second(d)
    d.do(ev.ExtentDamaged(number, "truncated"))
    d.do(ev.Release(1, (5,)))
    out = d.after(0.25)
    assert of(ev.DropExtent, out) == [ev.DropExtent(number)]
    assert not of(ev.FormatExtent, out)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}, "from a new spare"


def test_damage_under_a_wedged_lease_stops_no_move() -> None:
    d = two_classes(3)
    d.lease(1, 5, keys(1))
    d.do(ev.ExtentDamaged(d.extents()[0].number, "truncated"))
    second(d)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}


def test_a_smaller_arena_gives_up_spares_first_and_no_more_than_it_must() -> None:
    d = Driven(5)
    d.hello(1)
    for key in keys(PER - 1):
        d.store(1, [key])
    d.after(1.0)
    assert (sizes(d), len(d.node.extents.spares)) == ({CHUNK: 2}, 3)
    d = d.restarted(extents_max=3)
    assert len(of(ev.DropExtent, d.log)) == 2
    assert (len(d.node.extents.used), len(d.node.extents.spares)) == (2, 1)
    assert d.node.extents.total() == 3


def test_no_class_and_nothing_to_do() -> None:
    d = Driven(1)
    assert d.node.extents_of("t", {CHUNK}) == []
    assert d.after(1.0) == []
    assert d.do(ev.ExtentDamaged(1, "truncated")) == [], "a spare is nobody's business here"
    assert d.do(ev.ExtentsUnmapped(1, (1, 2))) == []


def test_refused_for_want_of_room_is_not_retry() -> None:
    d = two_classes(1)
    d.lease(1, 5, keys(PER))
    assert d.store(1, keys(1, 900)) == [NO_ROOM]
    assert d.lookup(1, keys(1)) == [RAM]
