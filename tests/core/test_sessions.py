"""Who holds what: writes of lost schedulers, leases of the living and the dead, sessions without pidfd, records."""

from __future__ import annotations

import pytest

from cachesvc.core import events as ev
from cachesvc.core import sessions
from cachesvc.core.sessions import Request, Session
from cachesvc.core.slots import SlabClass
from cachesvc.types import KeyState, Role
from tests.support.nodes import CALL, NEW, NO_ROOM, OTHER, PER, RAM, Driven, keys, of, only

QUARANTINE_S = 600.0


def engine(workers: int = 2, **settings: str) -> Driven:
    """One session: scheduler on connection 1 (process 10), workers on 2, 3 ... (processes 20, 30 ...)."""
    d = Driven(1, **settings)  # type: ignore[arg-type]
    d.hello(1)
    for number in range(2, workers + 2):
        d.hello(number, role=Role.WORKER)
    return d


def quarantined(d: Driven) -> int:
    return sum(extent.quarantined for extent in d.extents())


def freed(effects: list[ev.Effect]) -> int:
    return sum(len(mark.slots) for mark in of(ev.MarkFree, effects))


def write_claim(got: ev.Allocated, ticket: int, some: list[bytes]) -> ev.WriteClaim:
    return ev.WriteClaim(ticket, 0, tuple(some), got.slots)


# --- writes whose scheduler is lost -----------------------------------------------------------------------------------


def test_slots_wait_for_every_process_of_the_session() -> None:
    d = engine()
    d.allocate(1, 5, keys(2))
    assert d.do(ev.ConnectionLost(1)) == []
    assert quarantined(d) == 2
    assert d.lookup(2, keys(1)) == [KeyState.NAMESPACE_NEW], "nobody will seal it: it isn't pending"
    assert d.after(10 * QUARANTINE_S) == [], "time frees nothing that a pidfd can tell about"
    assert d.do(ev.ProcessDied(20)) == []
    assert d.do(ev.ProcessDied(10)) == []
    assert freed(d.do(ev.Done(3, (5,)))) == 2
    assert quarantined(d) == 0


def test_the_death_of_a_worker_takes_nothing_from_its_scheduler() -> None:
    d = engine(1)
    d.allocate(1, 5, keys(2))
    assert d.do(ev.ProcessDied(20)) == []
    assert d.seal(1, 5, 2)


def test_done_counts_before_the_scheduler_is_lost() -> None:
    d = engine(1)
    d.allocate(1, 5, keys(1))
    d.allocate(1, 6, keys(1, 1))
    assert d.do(ev.Done(2, (5, 99))) == []
    d.do(ev.ConnectionLost(1))
    assert freed(d.do(ev.ProcessDied(10))) == 1, "the worker is done with 5"
    assert freed(d.do(ev.Done(2, (6,)))) == 1


def test_done_of_a_process_does_not_speak_for_others() -> None:
    d = engine(2)
    d.allocate(1, 5, keys(1))
    d.do(ev.ConnectionLost(1))
    for _ in range(3):
        assert d.do(ev.Done(2, (5,))) == []
    assert quarantined(d) == 1


def test_done_without_pidfd_says_nothing() -> None:
    d = engine(0)
    d.hello(2, None, role=Role.WORKER)
    d.allocate(1, 5, keys(1))
    d.do(ev.ConnectionLost(1))
    assert d.do(ev.Done(2, (5,))) == []
    assert quarantined(d) == 1


def test_a_scheduler_that_comes_back_owns_again_what_it_names() -> None:
    d = engine(1)
    got = d.allocate(1, 5, keys(2))
    d.allocate(1, 6, keys(1, 2))
    d.do(ev.ConnectionLost(1))
    out = d.hello(4, process=10, writes=[write_claim(got, 5, keys(2))])
    assert only(ev.Welcome, out).writes_kept == (5,)
    assert freed(out) == 1, "6: nobody writes what the scheduler settled or never heard of"
    assert d.lookup(4, keys(3)) == [KeyState.PENDING] * 2 + [KeyState.NAMESPACE_NEW]
    assert d.seal(4, 5, 2)
    assert not d.seal(4, 6, 1)
    assert d.lookup(4, keys(2)) == [RAM] * 2


def test_it_may_come_back_before_its_old_connection_is_seen_to_end() -> None:
    d = engine(0)
    got = d.allocate(1, 5, keys(2))
    out = d.hello(4, process=10, writes=[write_claim(got, 5, keys(2))])
    assert only(ev.Welcome, out).writes_kept == (5,)
    assert d.do(ev.ConnectionLost(1)) == []
    assert d.seal(4, 5, 2)


def test_what_it_does_not_name_it_writes_no_more() -> None:
    d = engine(0)
    d.allocate(1, 5, keys(2))
    d.do(ev.ConnectionLost(1))
    out = d.hello(4, process=10)
    assert (freed(out), only(ev.Welcome, out).writes_kept) == (2, ())


def test_a_worker_that_comes_back_ends_nothing_by_what_it_leaves_out() -> None:
    """A job that it has yet to begin isn't in its Hello."""
    d = engine(1)
    got = d.allocate(1, 5, keys(1))
    d.allocate(1, 6, keys(1, 1))
    d.do(ev.ProcessDied(10))
    d.do(ev.ConnectionLost(2))
    out = d.hello(4, process=20, role=Role.WORKER, writes=[write_claim(got, 5, keys(1))])
    assert freed(out) == 0
    assert only(ev.Welcome, out).writes_kept == (), "only a scheduler owns"
    assert freed(d.do(ev.Done(4, (5,)))) == 1
    assert freed(d.do(ev.Done(4, (6,)))) == 1


def test_a_worker_that_comes_while_the_scheduler_is_away_is_waited_for() -> None:
    d = engine(0)
    d.allocate(1, 5, keys(1))
    d.do(ev.ConnectionLost(1))
    d.hello(4, role=Role.WORKER)
    assert freed(d.do(ev.ProcessDied(10))) == 0, "its job may have reached it before the scheduler died"
    assert freed(d.do(ev.ProcessDied(40))) == 1


def test_a_ticket_named_by_its_number_is_owned_again() -> None:
    """What doesn't fit into a Hello is named all the same: nothing that is still written is ever left out."""
    d = engine(0)
    d.allocate(1, 5, keys(2))
    d.allocate(1, 6, keys(1, 2))
    d.store(1, keys(2, 10))
    held = d.lease(1, 7, keys(1, 10)).slots
    d.lease(1, 8, keys(1, 11))
    d.do(ev.ConnectionLost(1))
    out = d.hello(4, process=10, open_writes=(5, 99), open_leases=(7, 98))
    assert only(ev.Welcome, out) == ev.Welcome(4, CALL, (5,), (7,))
    assert freed(out) == 1, "6"
    assert d.slab().tainted != set(), "8"
    assert d.seal(4, 5, 2)
    d.do(ev.Release(4, (7,)))
    assert list(d.slab().leases)[held.slots[0]] == 0


def test_scheduler_and_worker_in_one_process_speak_for_themselves() -> None:
    """As in vLLM: the worker's connection comes back first and names nothing, for its job is still queued."""
    d = Driven(2)
    d.hello(1, 10, member=b"s")
    d.hello(2, 10, role=Role.WORKER, member=b"w")
    got = d.allocate(1, 5, keys(2))
    d.do(ev.ConnectionLost(1))
    d.do(ev.ConnectionLost(2))
    assert freed(d.hello(3, 10, role=Role.WORKER, member=b"w")) == 0
    assert freed(d.do(ev.Done(3, (5,)))) == 0, "the scheduler may write, too"
    out = d.hello(4, 10, member=b"s", writes=[write_claim(got, 5, keys(2))])
    assert only(ev.Welcome, out).writes_kept == (5,)
    d.do(ev.ConnectionLost(4))
    assert freed(d.do(ev.ProcessDied(10))) == 2


# --- one session id, two schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("process", "member"), [(20, b""), (10, b"another")])
def test_a_scheduler_frees_nothing_of_the_one_before_it(process: int, member: bytes, cut: bool) -> None:
    """The first lives and writes on, knowing nothing: in another process, or in the same one."""
    d = engine(0)
    d.store(1, keys(2, 10))
    got = d.allocate(1, 5, keys(2))
    held = d.lease(1, 6, keys(2, 10)).slots
    if cut:
        d.do(ev.ConnectionLost(1))
    out = d.hello(2, process, member=member)
    assert only(ev.Welcome, out) == ev.Welcome(2, CALL, (), ())
    assert freed(out) == 0
    assert (quarantined(d), list(d.slab().leases)[held.slots[0]]) == (2, 1)
    assert not d.seal(2, 5, 2), "it isn't its ticket"
    d.do(ev.Abort(2, (5,)))
    d.do(ev.Release(2, (6,)))
    assert (quarantined(d), list(d.slab().leases)[held.slots[0]]) == (2, 1)
    d.do(ev.ConnectionLost(1))
    back = d.hello(3, 10, open_writes=(5,), open_leases=(6,))
    assert only(ev.Refused, back).kind == "session", "of two only the last that came is served"
    assert freed(back) == 0
    assert d.lookup(2, keys(1, 10)) == [RAM], "the other is served on"
    assert got.slots
    out = d.hello(4, 10, open_writes=(5,))
    assert list(d.slab().leases)[held.slots[0]] == 0, "it says that it has released it"
    assert freed(out) == 0
    assert freed(d.hello(5, 10)) == 2, "and settled that"
    assert only(ev.Welcome, d.hello(6, process, member=member)).writes_kept == ()


def test_what_a_scheduler_left_is_free_when_it_is_dead() -> None:
    d = engine(1)
    d.store(1, keys(2, 10))
    d.allocate(1, 5, keys(2))
    d.lease(1, 6, keys(2, 10))
    d.hello(4)
    assert freed(d.do(ev.ProcessDied(10))) == 0, "a worker lives"
    assert sum(d.slab().leases) == 2
    assert freed(d.do(ev.ProcessDied(20))) == 2
    assert sum(d.slab().leases) == 0
    assert d.lookup(4, keys(2, 10)) == [RAM] * 2


def test_a_past_scheduler_is_not_waited_for_by_later_ones() -> None:
    d = engine(0)
    d.hello(2)
    d.allocate(2, 5, keys(2))
    d.do(ev.ConnectionLost(2))
    assert freed(d.do(ev.ProcessDied(20))) == 2, "process 10 lives and knows nothing of it"


def test_a_past_scheduler_does_not_take_the_session_from_a_new_daemon() -> None:
    """It was told so by the daemon before; it claims what it still writes all the same."""
    d = engine(0)
    got = d.allocate(1, 5, keys(2))
    d.hello(2)
    d = d.restarted()
    claim = write_claim(got, 5, keys(2))
    assert only(ev.Refused, d.hello(1, writes=[claim], over=True)).kind == "session"
    assert only(ev.Welcome, d.hello(2)).writes_kept == ()
    d.after(2 * QUARANTINE_S)
    assert quarantined(d) == 2, "time doesn't free what was claimed"
    assert freed(d.hello(3, 10, over=True)) == 2


def test_schedulers_of_one_process_in_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "PAST_MAX", 3)
    d = Driven(1)
    for n in range(1, 9):
        d.hello(n, 10, member=b"%d" % n)
    session: Session = d.node.sessions.by_connection[8]
    assert [name for _, name in session.members] == [b"8"]
    assert len(session.past) == 3


def test_a_past_scheduler_without_a_pidfd() -> None:
    d = Driven(1)
    d.hello(1, None, member=b"a")
    d.store(1, keys(2))
    d.lease(1, 5, keys(2))
    d.allocate(1, 6, keys(1, 9))
    d.hello(2, None, member=b"b")
    assert sum(d.slab().leases) == 0, "its readers notice"
    assert only(ev.Refused, d.hello(3, None, member=b"a", open_writes=(6,), open_leases=(5,))).kind == "session"
    assert quarantined(d) == 1
    assert freed(d.after(QUARANTINE_S + 1.0)) == 1


@pytest.mark.parametrize("change", ["slots", "generations", "extents", "ticket"])
def test_a_claim_must_be_right(change: str) -> None:
    d = engine(0)
    run = d.allocate(1, 5, keys(1)).slots
    d.do(ev.ConnectionLost(1))
    claims = {
        "slots": ev.WriteClaim(5, 0, tuple(keys(1)), ev.SlotRun(run.extents, (3,), run.generations)),
        "generations": ev.WriteClaim(5, 0, tuple(keys(1)), ev.SlotRun(run.extents, run.slots, (9,))),
        "extents": ev.WriteClaim(5, 0, tuple(keys(1)), ev.SlotRun((77,), run.slots, run.generations)),
        "ticket": ev.WriteClaim(6, 0, tuple(keys(1)), run),
    }
    out = d.hello(4, process=10, writes=[claims[change]])
    assert only(ev.Welcome, out).writes_kept == ()
    assert not d.seal(4, 5, 1)
    if change != "ticket":
        assert quarantined(d) == 1, "it named the ticket: it may still write"
        assert freed(d.do(ev.Done(4, (5,)))) == 1


def test_a_ticket_named_twice_is_owned_once() -> None:
    d = engine(0)
    got = d.allocate(1, 5, keys(2))
    claim = write_claim(got, 5, keys(2))
    d.do(ev.ConnectionLost(1))
    assert only(ev.Welcome, d.hello(4, process=10, writes=[claim, claim])).writes_kept == (5,)
    assert d.seal(4, 5, 2)


def test_quarantined_slots_count_as_writing() -> None:
    d = engine(1)
    d.hello(9, session=OTHER)
    d.allocate(1, 5, keys(PER // 2))
    d.do(ev.ConnectionLost(1))
    # named, but not as it is: it may still be written, and isn't owned again
    d.hello(4, process=10, writes=[ev.WriteClaim(5, 0, (), ev.SlotRun((), (), ()))])
    assert quarantined(d) == PER // 2
    assert list(d.allocate(4, 6, keys(1, 50)).states) == [4], "RETRY: its half is taken"


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_outlives_the_connection_of_a_living_process() -> None:
    d = engine(1)
    d.store(1, keys(PER))
    d.lease(1, 5, keys(PER))
    d.do(ev.ConnectionLost(1))
    d.do(ev.ProcessDied(10))
    d.after(10 * QUARANTINE_S)
    d.hello(9, session=OTHER)
    assert d.store(9, keys(1, 50)) == [NO_ROOM], "a rank may be reading"
    d.do(ev.ProcessDied(20))
    assert d.store(9, keys(1, 50)) == [NEW]


def test_a_scheduler_that_comes_back_keeps_the_leases_it_names() -> None:
    d = engine(0)
    d.store(1, keys(4))
    held = d.lease(1, 5, keys(2)).slots
    other = d.lease(1, 6, keys(2, 2)).slots
    d.do(ev.ConnectionLost(1))
    claims = [ev.LeaseClaim(5, held), ev.LeaseClaim(6, held), ev.LeaseClaim(7, other)]
    assert only(ev.Welcome, d.hello(4, process=10, leases=claims)).leases_kept == (5,)
    assert list(d.slab().leases)[:4] == [1, 1, 0, 0]
    assert d.slab().tainted == set(other.slots)


def test_a_session_whose_processes_are_dead_reads_nothing() -> None:
    d = engine(0)
    d.store(1, keys(PER))
    d.lease(1, 5, keys(PER))
    assert d.do(ev.ProcessDied(10)) == []
    assert d.slab().tainted == set()
    d.hello(9, session=OTHER)
    assert d.store(9, keys(PER, 50)) == [NEW] * PER


# --- without pidfd ----------------------------------------------------------------------------------------------------


def test_time_stands_in_for_a_death_where_there_is_no_pidfd() -> None:
    d = Driven(1)
    d.hello(1, None)
    d.store(1, keys(4))
    d.lease(1, 5, keys(2))
    d.allocate(1, 6, keys(1, 50))
    d.do(ev.ConnectionLost(1))
    assert freed(d.after(QUARANTINE_S - 0.1)) == 0
    assert (quarantined(d), list(d.slab().leases)[:2]) == (1, [1, 1])
    assert freed(d.after(0.1)) == 1
    assert (quarantined(d), list(d.slab().leases)[:2]) == (0, [0, 0])
    assert d.slab().tainted == {0, 1}
    assert not d.node.sessions.by_name


def test_one_process_without_pidfd_makes_a_session_timed() -> None:
    d = Driven(1)
    d.hello(1)
    d.hello(2, None, role=Role.WORKER)
    d.allocate(1, 6, keys(1))
    d.do(ev.ProcessDied(10))
    assert quarantined(d) == 1
    d.do(ev.ConnectionLost(2))
    assert freed(d.after(QUARANTINE_S - 0.1)) == 0
    assert freed(d.after(0.2)) == 1


def test_time_does_not_replace_a_pidfd_that_is_there() -> None:
    d = Driven(1)
    d.hello(1, None)
    d.hello(2, role=Role.WORKER)
    d.store(1, keys(1, 9))
    d.lease(1, 5, keys(1, 9))
    d.allocate(1, 6, keys(1))
    d.do(ev.ConnectionLost(1))
    d.do(ev.ConnectionLost(2))
    d.after(2 * QUARANTINE_S)
    assert quarantined(d) == 1, "process 20 lives"
    assert freed(d.do(ev.ProcessDied(20))) == 1
    assert d.after(0.1) == []
    assert not d.node.sessions.by_name


def test_a_timed_scheduler_may_come_back() -> None:
    d = Driven(1)
    d.hello(1, None)
    got = d.allocate(1, 6, keys(1))
    d.allocate(1, 7, keys(1, 1))
    d.do(ev.ConnectionLost(1))
    d.after(1.0)
    out = d.hello(2, None, writes=[write_claim(got, 6, keys(1))])
    assert only(ev.Welcome, out).writes_kept == (6,)
    assert quarantined(d) == 1, "who knows which process that was"
    assert freed(d.after(QUARANTINE_S)) == 1
    assert d.seal(2, 6, 1)


def test_an_open_connection_keeps_timed_leases() -> None:
    d = Driven(1)
    d.hello(1, None)
    d.store(1, keys(1))
    d.lease(1, 5, keys(1))
    d.after(2 * QUARANTINE_S)
    assert list(d.slab().leases)[:1] == [1]


# --- records ----------------------------------------------------------------------------------------------------------


def test_requests_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "REQUESTS_PER_SESSION_MAX", 2)
    d = engine(0, eviction="lru")
    d.store(1, keys(4), request=1)
    d.store(1, keys(4, 4), request=2)
    d.lookup(1, keys(1, 4), request=3, touch=True)
    assert list(d.node.sessions.by_connection[1].requests) == [2, 3], "the oldest lost its protection"


def test_slots_of_requests_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "REQUEST_SLOTS_PER_SESSION_MAX", 6)
    d = engine(0)
    session = d.node.sessions.by_connection[1]
    d.store(1, keys(3), request=1)
    d.store(1, keys(3, 3), request=2)
    assert {number: len(request) for number, request in session.requests.items()} == {1: 3, 2: 3}
    d.store(1, keys(1, 6), request=2)
    assert {number: len(request) for number, request in session.requests.items()} == {2: 4}
    d.store(1, keys(7), request=2)
    assert {number: len(request) for number, request in session.requests.items()} == {2: 7}, "the last one stays"


def slab_of_keys() -> SlabClass:
    slab = SlabClass("t", 4096, 8, "lru")
    slab.add_extent(1)
    slab.keys[:] = keys(8)
    return slab


def test_slots_of_one_request_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "REQUEST_SLOTS_MAX", 3)
    line = Request().line(slab_of_keys())
    line.add([4, 5])
    line.add([6, 7])
    line.add([0])
    assert list(line.slots) == [4, 5, 6]


def test_a_request_forgets_slots_that_hold_something_else() -> None:
    slab = slab_of_keys()
    request = Request()
    line = request.line(slab)
    line.add([4, 5, 6])
    before = line.slots
    slab.departures += 1
    assert not line.forget_stale()
    assert line.slots is before, "the policy knows by the dict that it spares everything"
    slab.keys[5] = b"another"
    assert not line.forget_stale(), "nothing departed: not looked at again"
    slab.departures += 1
    assert line.missing([4, 5, None, 7]) == [5, 7]
    assert line.forget_stale()
    assert list(line.slots) == [4, 6]
    assert line.slots is not before, "or that it did"
    line.add([4, 7])
    assert list(line.slots) == [6, 4, 7], "in the order in which they came"
    assert (len(request), request.line(slab)) == (3, line)


def test_request_0_is_nobodys() -> None:
    d = engine(0)
    session: Session = d.node.sessions.by_connection[1]
    d.store(1, keys(2))
    d.lookup(1, keys(2), touch=True)
    assert not session.requests


def test_connected_sessions_are_counted_by_class() -> None:
    d = Driven(2)
    d.hello(1, chunk_bytes=(4096, 8192), namespace=b"n" * 16)
    d.hello(2, session=OTHER)
    small, large = d.slab(), d.slab("t", 8192)
    registry = d.node.sessions
    assert (registry.connected(small), registry.connected(large)) == (2, 1)
    d.do(ev.ConnectionLost(1))
    assert (registry.connected(small), registry.connected(large)) == (1, 0)
    d.do(ev.ConnectionLost(2))
    assert not registry._connected, "and nothing is left of it"
