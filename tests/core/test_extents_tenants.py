"""Which tenant has which extents: shares, moves between tenants, bytes that somebody still maps, damage."""

from __future__ import annotations

from cachesvc.core import events as ev
from cachesvc.core.extents import MOVE_PATIENCE_S, PRESSURE_S, RETRY_MAKING_S
from cachesvc.core.quota import TenantQuota
from cachesvc.types import Priority
from tests.core.test_extents import LARGE, SECOND, second, sizes, two_classes
from tests.support.nodes import CALL, CHUNK, EXTENT, NEW, NO_ROOM, OTHER, PER, RETRY, Driven, keys, of

# --- tenants ----------------------------------------------------------------------------------------------------------


def test_a_guaranteed_minimum_is_kept_free() -> None:
    d = Driven(4, TenantQuota("t"), TenantQuota("u", 2 * EXTENT))
    d.hello(1)
    assert d.store(1, keys(PER - 1)) == [NEW] * (PER - 1)
    assert d.store(1, keys(PER + 1, 100)) == [NEW] * (PER + 1)
    assert d.store(1, keys(1, 200)) == [NEW], "evicts its own, two spares belong to u"
    assert (sizes(d), len(d.node.extents.spares)) == ({CHUNK: 2}, 2)


def test_spares_kept_for_others_do_not_stop_moves() -> None:
    d = Driven(4, TenantQuota("t"), TenantQuota("u", 2 * EXTENT))
    d.hello(1)
    d.store(1, keys(PER - 1))
    d.store(1, keys(PER + 1, 100))
    second(d)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}
    assert len(d.node.extents.spares) == 2


def test_a_tenant_stays_below_its_maximum() -> None:
    d = Driven(4, TenantQuota("t", 0, 2 * EXTENT))
    d.hello(1)
    for i in range(10):
        d.store(1, keys(4, 4 * i))
    assert (sizes(d), len(d.node.extents.spares)) == ({CHUNK: 2}, 2)
    second(d)
    assert sizes(d) == {CHUNK: 1, LARGE: 1}, "what one class has too much the other gets"


def test_across_tenants_bytes_are_free_when_all_have_unmapped() -> None:
    d = Driven(2, TenantQuota("t"), TenantQuota("u", EXTENT), auto=False)
    d.node.quotas._min["u"] = 0  # t took all of it before u was guaranteed anything
    d.hello(1)
    d.finish_all()
    d.store(1, keys(PER))
    d.finish_all()
    d.store(1, keys(PER, PER))
    d.node.quotas._min["u"] = 1
    taken = d.extents()[0].number
    for process in (10, 11):
        d.do(ev.ExtentsMapped(process, (taken, d.extents()[1].number)))
    d.hello(2, tenant="u", session=OTHER)
    assert d.jobs == [ev.DropExtent(taken)], "never the bytes of one tenant to another"
    d.finish()
    assert d.node.snapshot(None, d.now)["arena"]["extents"]["retiring"] == 1
    d.do(ev.ExtentsUnmapped(10, (taken,)))
    d.after(1.0)
    assert d.jobs == []
    d.do(ev.ProcessDied(11))
    (job,) = d.jobs
    assert isinstance(job, ev.MakeSpare)
    d.finish_all()
    assert d.store(2, keys(1)) == [NEW]
    d.after(60.0)
    assert sizes(d) == {CHUNK: 1}


def test_unmapping_before_the_files_are_gone() -> None:
    d = two_classes(2)
    number = d.extents()[0].number
    d.do(ev.ExtentsMapped(10, (number,)))
    d.auto = False
    d.do(ev.ExtentDamaged(number, "truncated"))
    d.do(ev.ExtentsUnmapped(10, (number,)))
    d.finish()
    assert not d.node.extents.retiring
    assert [job for job in d.jobs if isinstance(job, ev.MakeSpare)]


def test_bytes_are_followed_through_new_names() -> None:
    """An extent moves twice inside its tenant; who mapped the first or the second name holds the bytes of the third."""
    d = two_classes(2)
    names = [d.extents()[0].number]
    d.do(ev.ExtentsMapped(10, (names[0],)))
    second(d)
    names.append(d.extents("t", LARGE)[0].number)
    d.do(ev.ExtentsMapped(20, (names[1],)))
    d.do(ev.ConnectionLost(2))
    d.store(1, keys(PER, 900))
    d.after(20.0)
    d.store(1, keys(PER, 950))
    d.after(0.25)
    assert sizes(d) == {CHUNK: 2, LARGE: 0}
    (name,) = {e.number for e in d.extents()} & {d.node.extents._next - 1}
    names.append(name)
    d.do(ev.ExtentsMapped(10, (names[2],)))
    d.do(ev.ExtentDamaged(names[2], "truncated"))
    assert list(d.node.extents.retiring) == [names[2]]
    d.do(ev.ExtentsUnmapped(10, (names[2],)))
    d.do(ev.ExtentsUnmapped(20, (names[1],)))
    d.do(ev.ExtentsUnmapped(20, (names[1], 77)))
    assert list(d.node.extents.retiring) == [names[2]], "10 still maps it under its first name"
    d.do(ev.ExtentsUnmapped(10, (names[0],)))
    assert not d.node.extents.retiring
    assert not d.node.extents._renamed
    assert not d.node.extents.mapped


def test_a_guaranteed_tenant_gets_its_share_back() -> None:
    d = Driven(3, TenantQuota("t"), TenantQuota("u", 2 * EXTENT))
    d.node.quotas._min["u"] = 0
    d.hello(1)
    d.store(1, keys(3 * PER - 3))
    for i in range(10):
        d.store(1, keys(3, 100 + 3 * i))
    assert sizes(d) == {CHUNK: 3}
    d.node.quotas._min["u"] = 2
    d.hello(2, tenant="u", session=OTHER)
    d.store(2, keys(PER))
    d.store(2, keys(1, 500))
    d.after(0.25)
    assert len(d.extents("u")) == 2
    assert sizes(d) == {CHUNK: 1}
    for i in range(30):
        d.store(2, keys(1, 600 + i))
        d.after(0.25)
    assert sizes(d) == {CHUNK: 1}, "a connected class keeps its last"


# --- moves between tenants --------------------------------------------------------------------------------------------


def two_tenants(*mapping: int, extents_max: int = 4) -> Driven:
    """Tenant t has filled the arena, and these processes of it map it; nobody of u is there yet."""
    d = Driven(extents_max, TenantQuota("t"), TenantQuota("u"))
    d.hello(1)
    for i in range(extents_max):
        d.now += 1.0
        d.store(1, keys(PER, PER * i))
    for process in mapping:
        d.do(ev.ExtentsMapped(process, tuple(extent.number for extent in d.extents())))
    d.now += PRESSURE_S
    return d


def dropped(d: Driven) -> list[int]:
    return [effect.extent for effect in of(ev.DropExtent, d.log)]


def test_a_tenant_gives_one_extent_and_no_more_until_its_clients_let_go() -> None:
    d = two_tenants(10, 11)
    coldest = d.extents()[0].number
    d.hello(2, tenant="u", session=OTHER)
    assert dropped(d) == [coldest]
    for _ in range(200):
        d.do(ev.ExtentsUnmapped(10, (dropped(d)[0],)))
        d.after(0.5)
        assert d.store(2, keys(1)) in ([RETRY], [NO_ROOM])
    assert len(dropped(d)) == 1, "process 11 maps what was taken, and all the rest"
    assert len(d.extents()) == 3
    assert d.node.extents.counts() == {"t": 4}
    d.do(ev.ProcessDied(11))
    assert d.node.extents.counts() == {"t": 3, "u": 1}
    assert d.store(2, keys(1)) == [NEW]


def test_who_is_slow_to_let_go_does_not_hold_up_what_it_does_not_map() -> None:
    d = two_tenants()
    first = d.extents()[0].number
    d.do(ev.ExtentsMapped(11, (first, first + 1)))
    d.hello(2, tenant="u", session=OTHER)
    d.after(MOVE_PATIENCE_S - 0.1)
    assert dropped(d) == [first]
    d.after(0.2)
    assert dropped(d) == [first, first + 2], "first + 1 is colder, but 11 maps it"
    assert d.store(2, keys(1)) == [NEW]


def test_bytes_that_came_free_for_a_tenant_are_for_nobody_else() -> None:
    d = two_tenants(10)
    d.auto = False
    d.hello(2, tenant="u", session=OTHER)
    d.finish()
    (taken,) = dropped(d)
    d.do(ev.ExtentsUnmapped(10, (taken,)))
    d.after(0.25)
    assert d.jobs == [ev.MakeSpare(d.node.extents._next - 1)]
    assert d.node.extents.counts() == {"t": 3, "u": 1}
    # t wants it, too, and would come first
    d.do(ev.Allocate(1, CALL, 5, 0, keys(1, 900), 0, Priority.INTERACTIVE))
    assert d.allocate(2, 6, keys(1)).states == bytes([RETRY]), "in a moment"
    d.finish()
    assert [(job.tenant, job.slot_bytes) for job in of(ev.FormatExtent, d.jobs)] == [("u", CHUNK)]
    d.finish_all()
    assert not d.node.extents.moves
    assert d.slab("u").received_at == d.now


def test_what_was_promised_to_somebody_who_left_is_a_spare() -> None:
    d = two_tenants(10)
    d.hello(2, tenant="u", session=OTHER)
    d.do(ev.ConnectionLost(2))
    d.do(ev.ExtentsUnmapped(10, tuple(dropped(d))))
    d.after(0.25)
    assert (d.extents("u"), len(d.node.extents.spares)) == ([], 1)
    assert not d.node.extents.moves
    assert d.store(1, keys(1, 900)) == [RETRY]
    assert d.store(1, keys(1, 900)) == [NEW]
    assert sizes(d) == {CHUNK: 4}


def test_a_promise_waits_for_memory_and_nothing_else_is_taken_meanwhile() -> None:
    d = two_tenants()
    d.auto = False
    d.hello(2, tenant="u", session=OTHER)
    d.finish()
    for _ in range(5):
        (job,) = d.jobs
        assert isinstance(job, ev.MakeSpare)
        d.jobs.clear()
        d.do(ev.SpareFailed(job.extent, "no memory"))
        d.after(RETRY_MAKING_S)
    assert len(dropped(d)) == 1
    d.finish_all()
    assert len(d.extents("u")) == 1


def test_a_full_idle_tenant_wants_nothing_and_the_busy_one_gets_all_but_its_last() -> None:
    """Each number is an extent that was made: one for a move's spare, one for its table."""
    d = two_tenants()
    made = d.node.extents._next
    d.hello(2, tenant="u", session=OTHER)
    for i in range(400):
        d.now += 0.1
        d.store(2, keys(1, i))
        d.after(0.0)
    assert (sizes(d), len(d.extents("u"))) == ({CHUNK: 1}, 3)
    assert len(dropped(d)) == 3
    assert d.node.extents._next - made == 6


def test_spares_are_not_for_who_stores_nothing() -> None:
    d = two_tenants()
    d.do(ev.ExtentDamaged(d.extents()[0].number, "truncated"))
    d.after(1.0)
    assert (sizes(d), len(d.node.extents.spares)) == ({CHUNK: 3}, 1)
    d.store(1, keys(1, 900))
    assert sizes(d) == {CHUNK: 4}


def test_what_a_tenant_damages_is_charged_to_it() -> None:
    """It takes nothing of others while it maps the ruins, and no more than its even share of what is free."""
    d = two_tenants(extents_max=6)
    d.hello(2, tenant="u", session=OTHER)
    for _ in range(100):
        for extent in d.extents("u"):
            d.do(ev.ExtentsMapped(20, (extent.number,)))
            d.do(ev.ExtentDamaged(extent.number, "truncated"))
        d.after(1.0)
        d.store(2, keys(1))
    assert (sizes(d), d.node.extents.counts()["u"]) == ({CHUNK: 5}, 1)
    d.do(ev.ConnectionLost(1))
    d.do(ev.ProcessDied(10))
    for number in [extent.number for extent in d.extents()]:
        d.do(ev.ExtentDamaged(number, "truncated"))  # gone at once: nobody maps them
    for _ in range(100):
        for extent in d.extents("u"):
            d.do(ev.ExtentsMapped(20, (extent.number,)))
            d.do(ev.ExtentDamaged(extent.number, "truncated"))
        d.after(1.0)
        d.store(2, keys(1))
    assert (len(d.node.extents.spares), d.node.extents.counts()["u"]) == (3, 3)
    d.do(ev.ProcessDied(20))
    d.hello(3, tenant="u", session=OTHER)
    d.after(1.0)
    assert d.store(3, keys(1)) == [NEW]


def test_moves_inside_a_tenant_go_on_while_another_waits_for_bytes() -> None:
    d = two_tenants(10)
    d.hello(2, tenant="u", session=OTHER)
    assert len(dropped(d)) == 1
    d.hello(3, session=b"third-of-sessions", namespace=SECOND, chunk_bytes=(LARGE,))
    d.after(0.25)
    assert sizes(d) == {CHUNK: 2, LARGE: 1}
