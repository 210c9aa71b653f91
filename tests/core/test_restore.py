"""A daemon that was killed: what its tables bring back, who owns what again, what waits and for how long."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cachesvc.core import events as ev
from cachesvc.core.quota import TenantQuota
from cachesvc.core.rings import FIRST
from cachesvc.types import KeyState, Priority, Role
from tests.support.nodes import (
    CALL,
    CHUNK,
    EXTENT,
    NEW,
    OTHER,
    PENDING,
    PER,
    RAM,
    RETRY,
    SPACE,
    Driven,
    Table,
    Tables,
    keys,
    of,
    only,
)

GRACE_S = 5.0
QUARANTINE_S = 600.0


def freed(effects: list[ev.Effect]) -> int:
    return sum(len(mark.slots) for mark in of(ev.MarkFree, effects))


def orphans(d: Driven) -> int:
    count: int = d.node.snapshot(None, d.now)["restart"]["orphans"]
    return count


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_every_sealed_chunk_is_back() -> None:
    d = Driven(3)
    d.hello(1, chunk_bytes=(CHUNK, 2 * CHUNK))
    d.store(1, keys(5))
    d.store(1, keys(3, 100), group=1)
    d.allocate(1, 9, keys(1, 50))
    before = d.lease(1, 10, keys(5))
    d = d.restarted()
    d.hello(2, chunk_bytes=(CHUNK, 2 * CHUNK))
    assert d.lookup(2, keys(6)) == [RAM] * 5 + [KeyState.NEVER_STORED]
    assert d.lookup(2, keys(3, 100), group=1) == [RAM] * 3
    again = d.lease(2, 10, keys(5))
    assert (again.slots, again.lengths) == (before.slots, before.lengths)
    assert d.node.snapshot(None, d.now)["restart"] == {"chunks_restored": 8, "orphans": 1, "grace": True}


def test_an_empty_start_has_no_grace_time() -> None:
    d = Driven(1)
    assert not d.node.in_grace(d.now)
    d.hello(1)
    d.store(1, keys(PER))
    assert d.store(1, keys(1, 50)) == [NEW]


def test_a_namespace_is_known_again() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(1))
    d = d.restarted()
    assert [record.label for record in d.node.namespaces()] == ["label"]
    hello = ev.Hello(2, "t", 20, CALL, OTHER, Role.SCHEDULER, SPACE, "label", {}, (2 * CHUNK,))
    assert d.refused(hello)[0] == "namespace", "it has chunks of another size"


def test_strangers_are_freed() -> None:
    """Chunks whose namespace was not saved in time: nobody can name them any more."""
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(3))
    d.tables.records = ()
    d = d.restarted()
    assert [(mark.slots, mark.generations) for mark in of(ev.MarkFree, d.log)] == [((0, 1, 2), (1, 1, 1))]
    d.hello(2)
    assert d.lookup(2, keys(3)) == [KeyState.NAMESPACE_NEW] * 3


def test_a_chunk_of_another_size_than_its_namespace_says_is_a_stranger() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(1))
    d.tables.records = (dataclasses.replace(d.tables.records[0], chunk_bytes=(2 * CHUNK,)),)
    assert freed(d.restarted().log) == 1


def test_slots_of_strangers_are_nobodys_in_the_grace_time() -> None:
    """Somebody may read them under a lease that he has not named yet."""
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(3))
    d.tables.records = ()
    d = d.restarted()
    d.hello(2)
    d.store(2, keys(PER - 3, 50))
    assert d.store(2, keys(1, 60)) == [RETRY]
    d.after(GRACE_S)
    assert d.store(2, keys(3, 60)) == [NEW] * 3


def test_the_grace_time_begins_when_everything_was_read() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(PER))
    tables = d.tables
    tables.records = ()
    d = Driven(1, tables=tables, now=200.0, started=False)
    d.now += 3.0
    d.do(ev.Started())
    d.hello(2)
    d.after(GRACE_S - 0.1)
    assert d.store(2, keys(1, 60)) == [RETRY]
    d.after(0.1)
    assert d.store(2, keys(1, 60)) == [NEW]


def test_of_two_copies_one_is_kept() -> None:
    """A chunk in a draining extent that was leased, and stored again elsewhere."""
    d = Driven(2)
    d.hello(1)
    d.store(1, keys(PER))
    d.lease(1, 5, keys(1))
    d.do(ev.ExtentDamaged(d.extents()[0].number, "truncated"))
    assert d.store(1, keys(1)) == [NEW]
    d = d.restarted()
    d.hello(2)
    assert d.lookup(2, keys(2)) == [RAM, KeyState.NEVER_STORED]
    assert sum(state == 2 for table in d.tables.tables.values() for _, state in table.words) == 1


def test_an_extent_of_an_unknown_tenant_goes() -> None:
    d = Driven(2, TenantQuota("t"), TenantQuota("u"))
    d.hello(1)
    d.hello(2, tenant="u", session=OTHER)
    d.store(1, keys(1))
    d.store(2, keys(1))
    tables = d.tables
    gone = d.extents("u")[0].number
    d = Driven(2, TenantQuota("t"), tables=tables, now=200.0)
    assert ev.DropExtent(gone) in d.log
    assert [table.tenant for table in tables.tables.values()] == ["t"]
    assert [record.tenant for record in d.node.namespaces()] == ["t"]
    d.hello(1)
    assert d.lookup(1, keys(1)) == [RAM]


def test_an_extent_with_another_number_of_slots_goes() -> None:
    tables = Tables()
    tables.tables[3] = Table("t", CHUNK, [(0, 0)] * (PER - 1), {}, [0.0] * (PER - 1))
    d = Driven(1, tables=tables)
    assert of(ev.DropExtent, d.log) == [ev.DropExtent(3)]


def test_spares_are_used_again() -> None:
    tables = Tables()
    tables.spares = [4, 9]
    d = Driven(2, tables=tables, auto=False)
    assert not d.jobs
    d.hello(1)
    assert d.jobs == [ev.FormatExtent(4, 10, "t", CHUNK)]


def test_a_smaller_arena_gives_up_the_coldest_after_the_grace_time() -> None:
    d = Driven(3)
    d.hello(1)
    for batch in range(3):
        d.now += 1.0
        d.store(1, keys(PER, PER * batch))
    d.after(1.0)
    d = d.restarted(extents_max=1)
    d.hello(1)
    assert d.resident(keys(3 * PER)) == keys(3 * PER), "somebody may read any of them"
    d.after(GRACE_S)
    assert d.resident(keys(3 * PER)) == keys(PER, 2 * PER)
    assert d.store(1, keys(1, 900)) == [NEW]


def test_no_extent_moves_in_the_grace_time() -> None:
    d = Driven(2)
    d.hello(1)
    d.store(1, keys(2 * PER))
    d = d.restarted()
    d.hello(2, session=OTHER, namespace=b"another-namespac", chunk_bytes=(2 * CHUNK,))
    d.after(GRACE_S - 0.1)
    assert d.resident(keys(2 * PER), 2) == []
    assert (len(d.extents()), len(d.extents("t", 2 * CHUNK))) == (2, 0)
    d.after(0.1)
    assert (len(d.extents()), len(d.extents("t", 2 * CHUNK))) == (1, 1)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", ["lru", "arc"])
def test_the_order_of_eviction_is_kept_leaf_first(eviction: str) -> None:
    d = Driven(2, eviction=eviction)
    d.hello(1)
    d.now += 1.0
    for step in range(4):
        d.store(1, keys(2, 2 * step), request=5)
    d.now += 1.0
    d.store(1, keys(4, 100))
    d.now += 1.0
    d.lookup(1, keys(4), request=6, touch=True)
    d.after(1.0)
    d = d.restarted()
    rings = d.slab().eviction._slots
    order = [d.slab().keys[node - FIRST] for ring in (3, 4) for node in rings.members(ring)]
    assert order == [*keys(4, 4)[::-1], *keys(4, 100)[::-1], *keys(4)[::-1]]


def test_a_prompt_stored_in_steps_and_a_crash() -> None:
    """The last step's chunks are deeper than all before, and colder."""
    d = Driven(2)
    d.hello(1)
    d.now += 1.0
    for step in range(8):
        d.store(1, keys(1, step), request=5)
        d.now += 1e-7
    d.after(1.0)
    saved = {
        table.fields[slot][2]: used
        for table in d.tables.tables.values()
        for slot, used in enumerate(table.last_use)
        if slot in table.fields
    }
    assert sorted(saved, key=saved.__getitem__) == keys(8)[::-1]


# --- grace time -------------------------------------------------------------------------------------------------------


def test_nothing_is_evicted_in_the_grace_time() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(PER))
    d = d.restarted()
    d.hello(2)
    assert d.store(2, keys(1, 50)) == [RETRY]
    d.after(GRACE_S - 0.1)
    assert d.store(2, keys(1, 50)) == [RETRY]
    d.after(0.1)
    assert d.store(2, keys(1, 50)) == [NEW]


def test_leases_are_kept_if_named_in_time() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(PER))
    held = d.lease(1, 5, keys(PER)).slots
    d = d.restarted()
    d.now += GRACE_S - 0.1
    out = d.hello(2, leases=[ev.LeaseClaim(5, held), ev.LeaseClaim(5, held)])
    assert only(ev.Welcome, out).leases_kept == (5,)
    d.after(GRACE_S)
    d.hello(3, session=OTHER)
    assert d.store(3, keys(1, 50)) == [5], "NO_ROOM: all of it is read"
    d.do(ev.Release(2, (5,)))
    assert d.store(3, keys(1, 50)) == [NEW]


def test_leases_named_too_late_are_lost() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(2))
    held = d.lease(1, 5, keys(2)).slots
    d = d.restarted()
    d.after(GRACE_S)
    assert only(ev.Welcome, d.hello(2, leases=[ev.LeaseClaim(5, held)])).leases_kept == ()


def test_leases_that_cannot_be() -> None:
    d = Driven(3, TenantQuota("t"), TenantQuota("u"))
    d.hello(1, chunk_bytes=(CHUNK, 2 * CHUNK))
    d.hello(2, tenant="u", session=OTHER)
    d.store(1, keys(2))
    d.store(1, keys(2), group=1)
    d.store(2, keys(2))
    small = d.lease(1, 5, keys(2)).slots
    large = d.lease(1, 6, keys(2), group=1).slots
    foreign = d.lease(2, 5, keys(2)).slots
    open_write = d.allocate(1, 7, keys(1, 9)).slots
    d = d.restarted()
    mixed = ev.SlotRun(small.extents + large.extents, small.slots + large.slots, small.generations + large.generations)
    wrong = [
        foreign,
        mixed,
        open_write,
        ev.SlotRun((), (), ()),
        ev.SlotRun(small.extents, small.slots, (0, 1)),
        ev.SlotRun(small.extents, (0, PER), (0, 0)),
        ev.SlotRun((99, 99), small.slots, (0, 0)),
    ]
    claims = [ev.LeaseClaim(number, run) for number, run in enumerate(wrong)]
    out = d.hello(1, chunk_bytes=(CHUNK, 2 * CHUNK), leases=[*claims, ev.LeaseClaim(50, small)])
    assert only(ev.Welcome, out).leases_kept == (50,)


def test_what_a_session_reads_without_a_lease_after_the_grace_time_may_go() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(PER))
    d.lease(1, 5, keys(PER))
    d = d.restarted()
    d.after(GRACE_S)
    d.hello(2, session=OTHER)
    assert d.store(2, keys(1, 50)) == [NEW]


# --- writes -----------------------------------------------------------------------------------------------------------


def written(ticket: int = 5, count: int = 2) -> tuple[Driven, ev.WriteClaim]:
    """A daemon that was killed under a writer, started again."""
    d = Driven(1)
    d.hello(1)
    run = d.allocate(1, ticket, keys(count)).slots
    return d.restarted(), ev.WriteClaim(ticket, 0, tuple(keys(count)), run)


def test_a_write_that_is_named_goes_on() -> None:
    d, claim = written()
    assert orphans(d) == 2
    assert only(ev.Welcome, d.hello(2, writes=[claim])).writes_kept == (5,)
    assert orphans(d) == 0
    assert d.lookup(2, keys(2)) == [PENDING] * 2
    assert d.do(ev.Seal(2, CALL, 5, (1, 2)))[-1] == ev.Sealed(2, CALL, ok=True)
    assert d.lookup(2, keys(2)) == [RAM] * 2


def test_a_write_that_is_named_twice_goes_on_once() -> None:
    d, claim = written()
    assert only(ev.Welcome, d.hello(2, writes=[claim, claim])).writes_kept == (5,)
    other = dataclasses.replace(claim, ticket=6)
    assert only(ev.Welcome, d.hello(3, session=OTHER, writes=[other])).writes_kept == ()
    assert d.seal(2, 5, 2)


def test_a_write_may_be_aborted_after_a_restart() -> None:
    d, claim = written()
    d.hello(2, writes=[claim])
    assert freed(d.do(ev.Abort(2, (5,)))) == 2


def test_what_nobody_names_is_freed_by_time() -> None:
    d, claim = written()
    assert freed(d.after(QUARANTINE_S - 1.1)) == 0
    d.hello(2)
    assert freed(d.after(0.1)) == 0, "a hello that doesn't name it proves nothing of another session's writer"
    assert freed(d.after(1.1)) == 2
    assert only(ev.Welcome, d.hello(3, session=OTHER, writes=[claim])).writes_kept == ()


def test_writes_that_cannot_be() -> None:
    d = Driven(3)
    d.hello(1, chunk_bytes=(CHUNK, 2 * CHUNK))
    run = d.allocate(1, 5, keys(2)).slots
    d.store(1, keys(1, 50))
    d = d.restarted()
    some = tuple(keys(2))
    twice = ev.SlotRun(run.extents, (0, 0), run.generations)
    wrong = [
        ev.WriteClaim(1, 1, some, run),
        ev.WriteClaim(2, 7, some, run),
        ev.WriteClaim(3, 0, some[:1], run),
        ev.WriteClaim(4, 0, some, ev.SlotRun(run.extents, run.slots, (0, 1))),
        ev.WriteClaim(5, 0, some, ev.SlotRun(run.extents, (0, 2), run.generations)),
        ev.WriteClaim(6, 0, some, twice),
    ]
    out = d.hello(2, chunk_bytes=(CHUNK, 2 * CHUNK), writes=[*wrong, ev.WriteClaim(9, 0, some, run)])
    assert only(ev.Welcome, out).writes_kept == (9,)


def test_another_tenant_cannot_own_them() -> None:
    d = Driven(2, TenantQuota("t"), TenantQuota("u"))
    d.hello(1)
    run = d.allocate(1, 5, keys(1)).slots
    d = d.restarted()
    claim = ev.WriteClaim(5, 0, tuple(keys(1)), run)
    assert only(ev.Welcome, d.hello(2, tenant="u", writes=[claim]) + d.log).writes_kept == ()
    assert only(ev.Welcome, d.hello(3, writes=[claim])).writes_kept == (5,)


def test_a_claimed_write_that_is_lost_again_waits_like_an_orphan() -> None:
    """Ranks of its session that haven't come back yet may be writing, however long they take."""
    d, claim = written()
    d.hello(2, process=20, writes=[claim])
    assert freed(d.do(ev.ProcessDied(20))) == 0
    assert freed(d.after(QUARANTINE_S - 1.1)) == 0
    assert freed(d.after(1.2)) == 2
    assert not d.node.sessions.by_name


def test_a_claimed_write_that_is_lost_twice_may_be_named_again() -> None:
    d, claim = written()
    d.hello(2, process=20, writes=[claim])
    d.do(ev.ConnectionLost(2))
    assert only(ev.Welcome, d.hello(3, process=20, writes=[claim])).writes_kept == (5,)
    assert d.seal(3, 5, 2)


def test_a_write_begun_in_the_grace_time_waits_for_its_end() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(1))
    d = d.restarted()
    d.hello(2, process=20)
    d.allocate(2, 5, keys(1, 50))
    assert freed(d.do(ev.ProcessDied(20))) == 0
    assert freed(d.after(GRACE_S)) == 1


def test_a_second_crash_loses_nothing_more() -> None:
    d, claim = written()
    d.hello(2, writes=[claim])
    d.store(2, keys(2, 50))
    d = d.restarted()
    d = d.restarted()
    assert only(ev.Welcome, d.hello(2, writes=[claim])).writes_kept == (5,)
    assert d.lookup(2, keys(2, 50)) == [RAM] * 2


def test_a_damaged_extent_with_orphans_goes_when_they_do() -> None:
    d, _ = written()
    number = d.extents()[0].number
    d.do(ev.ExtentDamaged(number, "truncated"))
    assert number in d.tables.tables
    d.after(QUARANTINE_S)
    assert number not in d.tables.tables


def test_columns_may_say_anything_of_slots_that_are_not_sealed() -> None:
    states = np.array([0, 1] * (PER // 2), np.uint8)
    garbage = ev.TableColumns(
        np.arange(PER, dtype=np.uint64) + (1 << 50),
        states,
        [b"x"] * PER,
        [99] * PER,
        [b""] * PER,
        np.full(PER, 1 << 31, np.uint32),
        np.full(PER, 50.0),
    )
    d = Driven(1, started=False)
    d.node.handle(ev.ExtentRestored(3, "t", CHUNK, garbage), d.now)
    d.node.handle(ev.Started(), d.now)
    d.node.check_invariants()
    assert EXTENT // CHUNK == PER
    d.tables.tables[3] = Table("t", CHUNK, [(i + (1 << 50), i % 2) for i in range(PER)], {}, [0.0] * PER)
    d.hello(1)
    got = d.allocate(1, 1, keys(PER // 2))
    assert got.slots.generations == tuple((1 << 50) + i for i in range(0, PER, 2))
    assert d.do(ev.Allocate(1, CALL, 2, 0, keys(1, 90), 0, Priority.INTERACTIVE))[-1].states == bytes([RETRY])  # type: ignore[union-attr]


def test_what_a_hello_had_no_room_for_is_claimed_after_it() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(2, 10))
    run = d.allocate(1, 5, keys(2)).slots
    held = d.lease(1, 6, keys(2, 10)).slots
    d = d.restarted()
    out = d.hello(2, open_writes=(5,), open_leases=(6,))
    assert only(ev.Welcome, out) == ev.Welcome(2, CALL, (), ()), "a new daemon knows no numbers"
    claim = ev.Claim(2, CALL, (ev.WriteClaim(5, 0, tuple(keys(2)), run),), (ev.LeaseClaim(6, held),))
    assert only(ev.Claimed, d.do(claim)) == ev.Claimed(2, CALL, (5,), (6,))
    d.after(2 * QUARANTINE_S)
    assert d.seal(2, 5, 2), "time doesn't free what was claimed"
    assert only(ev.Claimed, d.do(claim)) == ev.Claimed(2, CALL, (), (6,)), "and not twice"


def test_only_the_scheduler_claims() -> None:
    d = Driven(1)
    d.hello(1, role=Role.WORKER)
    assert d.refused(ev.Claim(1, CALL, (), ()))[0] == "protocol"
