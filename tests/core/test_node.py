"""The door: who may join and say what, sessions that end, time, and that the same events do the same again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from cachesvc.core import events as ev
from cachesvc.core import index, sessions
from cachesvc.core.node import WELCOME_WAIT_S
from cachesvc.core.quota import TenantQuota
from cachesvc.types import GROUPS_MAX, KEYS_PER_MESSAGE_MAX, KeyState, Priority, Role
from tests.support.nodes import CALL, CHUNK, EXTENT, NEW, OTHER, PER, SESSION, SPACE, Driven, keys, of, only

HELLO = ev.Hello(1, "t", 10, CALL, SESSION, Role.SCHEDULER, SPACE, "label", {"model": "m"}, (CHUNK,))
RECORD = ev.NamespaceRecord("t", SPACE, "label", {"model": "m"}, (CHUNK,))


# --- hello ------------------------------------------------------------------------------------------------------------


def test_hello_opens_a_namespace_and_waits_for_the_first_extent() -> None:
    d = Driven(auto=False)
    assert d.jobs == [ev.MakeSpare(1)]
    assert d.do(HELLO) == [ev.SaveNamespaces((RECORD,))]
    assert d.finish() == [ev.MakeSpare(2), ev.FormatExtent(1, 3, "t", CHUNK)]
    assert d.finish(1) == [ev.Welcome(1, CALL, (), ())]


def test_a_welcome_waits_no_longer_than_it_must() -> None:
    d = Driven(auto=False)
    d.do(HELLO)
    assert d.after(WELCOME_WAIT_S - 0.01) == []
    assert d.after(0.01) == [ev.Welcome(1, CALL, (), ())]
    assert not of(ev.Welcome, d.after(1.0))


def test_a_welcome_does_not_wait_for_what_cannot_come() -> None:
    d = Driven(auto=False)
    d.do(ev.SpareFailed(1, "no memory"))
    d.jobs.clear()
    assert only(ev.Welcome, d.do(HELLO)) == ev.Welcome(1, CALL, (), ())


def test_nobody_waits_for_the_welcome_of_a_lost_connection() -> None:
    d = Driven(auto=False)
    d.do(HELLO)
    d.do(ev.ConnectionLost(1))
    assert d.after(WELCOME_WAIT_S) == []


def test_a_second_process_joins_at_once() -> None:
    d = Driven()
    d.do(HELLO)
    hello = dataclasses.replace(HELLO, connection=2, process=20, role=Role.WORKER)
    assert d.do(hello) == [ev.Welcome(2, CALL, (), ())]
    assert d.node.namespaces() == (RECORD,)
    assert d.node.snapshot("t", d.now)["tenants"]["t"]["processes"] == 2


@pytest.mark.parametrize(
    ("change", "kind", "detail"),
    [
        ({"tenant": "x"}, "protocol", "tenant 'x' is not configured"),
        ({"session": b"s" * 15}, "protocol", "16 to 64 bytes, not 15"),
        ({"session": b"s" * 65}, "protocol", "16 to 64 bytes, not 65"),
        ({"namespace": b"n"}, "protocol", "16 bytes, not 1"),
        ({"chunk_bytes": ()}, "protocol", "KV groups, not 0"),
        ({"chunk_bytes": (CHUNK,) * (GROUPS_MAX + 1)}, "protocol", f"KV groups, not {GROUPS_MAX + 1}"),
        ({"chunk_bytes": (0,)}, "namespace", "at least 1, not 0"),
        ({"chunk_bytes": (EXTENT // 2 + 1,)}, "namespace", f"extent_bytes: {2 * EXTENT} or more"),
    ],
)
def test_a_hello_that_breaks_a_rule(change: dict[str, object], kind: str, detail: str) -> None:
    d = Driven()
    refusal = d.refused(dataclasses.replace(HELLO, **change))  # type: ignore[arg-type]
    assert refusal[0] == kind
    assert detail in refusal[1]
    assert d.node.namespaces() == ()
    assert not d.node.sessions.by_name


def test_the_largest_chunk_is_half_an_extent() -> None:
    d = Driven()
    assert of(ev.Welcome, d.do(dataclasses.replace(HELLO, chunk_bytes=(EXTENT // 2,))) + d.log)


def test_hello_twice_on_a_connection() -> None:
    d = Driven()
    d.do(HELLO)
    assert d.refused(HELLO) == ("protocol", "hello was said on this connection already")


def test_a_session_has_one_namespace() -> None:
    d = Driven()
    d.do(HELLO)
    kind, detail = d.refused(dataclasses.replace(HELLO, connection=2, namespace=b"another-namespac"))
    assert (kind, "start a new session" in detail) == ("protocol", True)


@pytest.mark.parametrize("session", [SESSION, OTHER])
def test_a_namespace_has_one_size_of_chunk(session: bytes) -> None:
    d = Driven()
    d.do(HELLO)
    other = dataclasses.replace(HELLO, connection=2, session=session, role=Role.WORKER, chunk_bytes=(CHUNK, 1))
    kind, detail = d.refused(other)
    assert kind == "namespace"
    assert detail == (
        "namespace 'label' holds chunks of [4096] bytes, not [4096, 1]: use another namespace for another chunk_bytes"
    )
    assert d.node.sessions.by_connection.keys() == {1}


def test_an_idle_namespace_may_be_declared_anew() -> None:
    d = Driven()
    d.do(HELLO)
    d.do(ev.ConnectionLost(1))
    hello = dataclasses.replace(HELLO, connection=2, chunk_bytes=(2 * CHUNK,))
    record = dataclasses.replace(RECORD, chunk_bytes=(2 * CHUNK,))
    assert only(ev.SaveNamespaces, d.do(hello)).records == (record,)


def test_sessions_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachesvc.core.node.SESSIONS_MAX", 1)
    d = Driven()
    d.do(HELLO)
    assert d.refused(dataclasses.replace(HELLO, connection=2, session=OTHER))[0] == "limit"
    assert of(ev.Welcome, d.hello(3, role=Role.WORKER)), "a process more is no session more"
    d.do(ev.ConnectionLost(1))
    d.do(ev.ConnectionLost(3))
    d.do(ev.ProcessDied(30))
    assert of(ev.Welcome, d.hello(4, session=OTHER))


def test_namespaces_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "NAMESPACES_PER_TENANT_MAX", 2)
    d = Driven(4, TenantQuota("t"), TenantQuota("u"))
    d.hello(1, session=b"a" * 16, namespace=b"a" * 16)
    d.hello(2, session=b"b" * 16, namespace=b"b" * 16)
    third = dataclasses.replace(HELLO, connection=3, process=30, session=b"c" * 16, namespace=b"c" * 16)
    kind, detail = d.refused(third)
    assert (kind, detail.startswith("tenant 't' has its most namespaces")) == ("limit", True)
    assert of(ev.Welcome, d.hello(4, session=b"d" * 16, namespace=b"d" * 16, tenant="u") + d.log)
    d.store(1, keys(1))
    d.do(ev.ConnectionLost(1))
    d.do(ev.ConnectionLost(2))
    assert {r.namespace[:1] for r in only(ev.SaveNamespaces, d.do(third)).records} == {b"a", b"c", b"d"}


def test_chunks_of_a_namespace_that_nobody_has_open_make_room_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "NAMESPACES_PER_TENANT_MAX", 2)
    d = Driven(4)
    for connection, name in ((1, b"a"), (2, b"b"), (3, b"a")):
        d.hello(connection, session=name * 8 + bytes(8 + connection), namespace=name * 16)
        d.store(connection, keys(3))
        d.do(ev.ConnectionLost(connection))
    out = d.hello(4, namespace=b"c" * 16)
    assert len(only(ev.MarkFree, out).slots) == 3
    assert [r.namespace[:1] for r in only(ev.SaveNamespaces, out).records] == [b"a", b"c"], "a was opened later than b"
    counts = d.node.index.totals("t")
    assert (counts.stores, counts.evictions) == (6, 3)
    d.store(4, keys(1))
    again = dataclasses.replace(HELLO, connection=5, process=50, session=b"5" * 16, namespace=b"b" * 16)
    d.do(again)
    assert d.resident(keys(3), 5) == []
    d.hello(6, session=b"6" * 16, namespace=b"c" * 16)
    assert d.resident(keys(1), 6) == keys(1)


def test_chunks_that_somebody_may_still_read_make_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "NAMESPACES_PER_TENANT_MAX", 1)
    d = Driven(4)
    d.hello(1)
    d.store(1, keys(3))
    d.lease(1, 5, keys(1))
    d.do(ev.ConnectionLost(1))
    second = dataclasses.replace(HELLO, connection=2, process=20, session=OTHER, namespace=b"b" * 16)
    assert d.refused(second)[0] == "limit", "process 10 lives and reads"
    d = d.restarted()
    assert d.refused(second)[0] == "limit", "it may come back and name what it reads"
    d.after(10.0)
    assert of(ev.Welcome, d.do(second))


def test_slot_sizes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachesvc.core.extents.CLASSES_PER_TENANT_MAX", 2)
    d = Driven()
    d.hello(1, session=b"a" * 16, namespace=b"a" * 16, chunk_bytes=(CHUNK, 2 * CHUNK))
    third = dataclasses.replace(
        HELLO, connection=3, process=30, session=b"c" * 16, namespace=b"c" * 16, chunk_bytes=(3 * CHUNK, CHUNK)
    )
    assert d.refused(third) == ("limit", "tenant 't' has its most slot sizes, all of them in use")
    assert d.node.namespaces()[0].namespace == b"a" * 16
    d.do(ev.ConnectionLost(1))
    assert d.refused(third)[0] == "limit", "its classes have extents, and a namespace that may come back"


def test_slot_sizes_of_known_namespaces_stay_without_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachesvc.core.extents.CLASSES_PER_TENANT_MAX", 2)
    d = Driven(auto=False)
    d.hello(1, session=b"a" * 16, namespace=b"a" * 16, chunk_bytes=(CHUNK, 2 * CHUNK))
    d.do(ev.ConnectionLost(1))
    other = dataclasses.replace(HELLO, connection=2, session=OTHER, chunk_bytes=(3 * CHUNK,))
    assert d.refused(other)[0] == "limit"
    assert len(d.node.extents.slabs) == 2


def test_slot_sizes_that_nobody_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachesvc.core.extents.CLASSES_PER_TENANT_MAX", 2)
    monkeypatch.setattr(index, "NAMESPACES_PER_TENANT_MAX", 1)
    d = Driven(auto=False)
    for number in range(1, 6):
        assert of(ev.SaveNamespaces, d.hello(number, namespace=b"%16d" % number, chunk_bytes=(number % 4 * CHUNK + 1,)))
        d.do(ev.ConnectionLost(number))
        assert len(d.node.extents.slabs) <= 2


# --- who may say what -------------------------------------------------------------------------------------------------

REQUESTS: list[Callable[[int], ev.Event]] = [
    lambda c: ev.Lookup(c, CALL, 0, keys(1), 0, False),
    lambda c: ev.Lease(c, CALL, 1, 0, keys(1), 0, False, True),
    lambda c: ev.Allocate(c, CALL, 1, 0, keys(1), 0, Priority.BATCH),
    lambda c: ev.Seal(c, CALL, 1, (1,)),
    lambda c: ev.Release(c, (1,)),
    lambda c: ev.Abort(c, (1,)),
    lambda c: ev.Done(c, (1,)),
    lambda c: ev.EndRequests(c, (1,)),
]
SCHEDULERS_ONLY = (ev.Lease, ev.Allocate, ev.Seal, ev.Release, ev.Abort)


@pytest.mark.parametrize("make", REQUESTS)
def test_hello_comes_first(make: Callable[[int], ev.Event]) -> None:
    event = make(5)
    assert Driven().do(event) == [ev.Refused(5, getattr(event, "call", 0), "protocol", "say hello first")]


@pytest.mark.parametrize("make", REQUESTS)
def test_what_only_a_scheduler_may_say(make: Callable[[int], ev.Event]) -> None:
    d = Driven()
    d.hello(1)
    d.hello(2, role=Role.WORKER)
    refused = of(ev.Refused, d.do(make(2)))
    if isinstance(make(2), SCHEDULERS_ONLY):
        assert (refused[0].kind, refused[0].detail) == (
            "protocol",
            "only the scheduler's connection of a session may do this",
        )
    else:
        assert not refused
    assert not of(ev.Refused, d.do(make(1)))


def test_a_scheduler_that_was_replaced_is_nobody() -> None:
    d = Driven()
    d.hello(1)
    d.hello(2, process=10)
    assert d.refused(ev.Seal(1, CALL, 1, ())) == ("protocol", "say hello first")
    assert d.do(ev.ConnectionLost(1)) == []
    assert d.store(2, keys(1)) == [NEW]


@pytest.mark.parametrize("kind", [ev.Lookup, ev.Lease, ev.Allocate])
def test_groups_and_keys_have_limits(kind: type) -> None:
    d = Driven()
    d.hello(1)

    def event(group: int, count: int) -> ev.Event:
        some = keys(count)
        if kind is ev.Lookup:
            return ev.Lookup(1, CALL, group, some, 0, False)
        if kind is ev.Lease:
            return ev.Lease(1, CALL, 1, group, some, 0, False, True)
        return ev.Allocate(1, CALL, 1, group, some, 0, Priority.INTERACTIVE)

    assert d.refused(event(1, 1)) == ("protocol", "KV group 1 was not declared in hello")
    assert d.refused(event(0, KEYS_PER_MESSAGE_MAX + 1))[0] == "protocol"
    assert not of(ev.Refused, d.do(event(0, KEYS_PER_MESSAGE_MAX)))


def test_a_ticket_in_use_is_refused() -> None:
    d = Driven()
    d.hello(1)
    d.store(1, keys(1))
    d.lease(1, 5, keys(1))
    d.allocate(1, 6, keys(1, 1))
    for ticket in (5, 6):
        detail = f"ticket {ticket} is in use"
        assert d.refused(ev.Lease(1, CALL, ticket, 0, keys(1), 0, False, True)) == ("protocol", detail)
        assert d.refused(ev.Allocate(1, CALL, ticket, 0, keys(1), 0, Priority.BATCH)) == ("protocol", detail)
    d.do(ev.Release(1, (5,)))
    assert len(d.lease(1, 5, keys(1)).slots) == 1


def test_tickets_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "TICKETS_PER_SESSION_MAX", 2)
    d = Driven()
    d.hello(1)
    d.store(1, keys(1))
    d.allocate(1, 1, keys(1, 1))
    d.lease(1, 2, keys(1))
    assert d.refused(ev.Allocate(1, CALL, 3, 0, keys(1, 2), 0, Priority.BATCH))[0] == "limit"
    assert list(d.lease(1, 3, keys(1)).states) == [KeyState.NO_ROOM]
    assert d.seal(1, 1, 1), "what is open can be ended"
    assert len(d.allocate(1, 3, keys(1, 2)).slots) == 1


@pytest.mark.parametrize(
    ("lengths", "detail"),
    [
        ((1,), "1 lengths for 2 slots"),
        ((1, CHUNK + 1), f"a chunk has 0 to {CHUNK} bytes in this namespace"),
        ((1, -1), f"a chunk has 0 to {CHUNK} bytes in this namespace"),
    ],
)
def test_lengths_that_cannot_be(lengths: tuple[int, ...], detail: str) -> None:
    d = Driven()
    d.hello(1)
    d.allocate(1, 1, keys(2))
    assert d.refused(ev.Seal(1, CALL, 1, lengths)) == ("protocol", detail)
    assert d.seal(1, 1, 2), "and nothing had changed"


def test_a_chunk_is_no_longer_than_declared_though_its_slot_is() -> None:
    d = Driven()
    d.hello(1, chunk_bytes=(CHUNK - 1,))
    d.allocate(1, 1, keys(1))
    assert d.refused(ev.Seal(1, CALL, 1, (CHUNK,)))[0] == "protocol"
    assert d.seal(1, 1, 1, CHUNK - 1)


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_session_ends_when_nobody_is_left() -> None:
    d = Driven()
    d.hello(1)
    assert d.do(ev.ConnectionLost(1)) == []
    assert not d.node.sessions.by_name
    assert d.do(ev.ProcessDied(10)) == []
    assert d.do(ev.ConnectionLost(1)) == [], "twice is once"


def test_a_dead_process_has_no_connection() -> None:
    """A child may hold its socket open: that would count as a connected session for ever."""
    d = Driven()
    d.hello(1)
    d.store(1, keys(PER))
    d.lease(1, 1, keys(2))
    (slot,) = d.allocate(1, 2, keys(1, PER)).slots.slots
    freed = d.do(ev.ProcessDied(10))
    assert [mark.slots for mark in of(ev.MarkFree, freed)] == [(slot,)]
    assert not d.node.sessions.by_name
    assert d.refused(ev.Lookup(1, CALL, 0, keys(1), 0, False)) == ("protocol", "say hello first")
    assert d.do(ev.ConnectionLost(1)) == []


def test_processes_know_of_each_other_until_one_is_left() -> None:
    """The scheduler comes back first and hands a slot to a worker that isn't back yet; then the scheduler dies."""
    d = Driven()
    d.hello(1)
    d.hello(2, role=Role.WORKER)
    d.do(ev.ConnectionLost(1))
    d.do(ev.ConnectionLost(2))
    d.hello(3, process=10)
    d.allocate(3, 1, keys(1))
    assert d.do(ev.ProcessDied(10)) == [], "the worker may be writing"
    assert d.node.snapshot("t", d.now)["tenants"]["t"]["classes"][0]["quarantined"] == 1
    assert len(of(ev.MarkFree, d.do(ev.ProcessDied(20)))) == 1
    assert not d.node.sessions.by_name


def test_a_process_in_two_sessions() -> None:
    d = Driven()
    d.hello(1, process=10)
    d.hello(2, process=10, session=OTHER)
    d.allocate(1, 1, keys(1))
    d.allocate(2, 1, keys(1, 1))
    assert len(of(ev.MarkFree, d.do(ev.ProcessDied(10)))) == 2
    assert not d.node.sessions.by_name


# --- time and sameness ------------------------------------------------------------------------------------------------


def test_last_use_is_saved_when_something_was_used() -> None:
    d = Driven()
    d.hello(1)
    d.after(1.0)
    d.store(1, keys(3))
    saved = only(ev.SaveLastUse, d.after(1.0))
    assert list(saved.last_use[:3]) == pytest.approx([d.now - 1.0] * 3, abs=1e-5)
    assert list(saved.last_use[3:]) == [0.0] * (PER - 3)
    assert d.after(1.0) == [], "nothing was used since"
    d.lookup(1, keys(1))
    d.lease(1, 1, keys(1))
    assert d.after(1.0) == [], "lookups and leases touch nothing"
    d.lookup(1, keys(1), touch=True)
    assert d.after(0.4) == [], "not more often than once a second"
    assert len(of(ev.SaveLastUse, d.after(0.6))) == 1


def test_the_same_events_do_the_same() -> None:
    def run() -> list[ev.Effect]:
        d = Driven(3, TenantQuota("t", EXTENT), TenantQuota("u", EXTENT))
        for number, (tenant, session) in enumerate([("t", SESSION), ("t", OTHER), ("u", SESSION)], 1):
            d.hello(number, session=session, tenant=tenant)
            for ticket in range(6):
                d.allocate(number, ticket, keys(2, 10 * number + 2 * ticket))
        for number in (1, 2, 3):
            d.do(ev.ConnectionLost(number))
            d.after(0.3)
        d.hello(4, process=10)
        d.store(4, keys(20))
        for process in (20, 30, 10):
            d.do(ev.ProcessDied(process))
        d.after(700.0)
        return d.log

    first = run()
    ballast = [object() for _ in range(10_000)]  # other addresses, other hashes of objects
    again = run()
    assert len(ballast) == 10_000
    assert _plain(first) == _plain(again)


def _plain(effects: list[ev.Effect]) -> list[str]:
    return [
        f"{effect.extent} {effect.last_use.tolist()}" if isinstance(effect, ev.SaveLastUse) else repr(effect)
        for effect in effects
    ]


def test_a_tenant_sees_its_own() -> None:
    d = Driven(4, TenantQuota("t"), TenantQuota("u"))
    d.hello(1)
    d.hello(2, session=OTHER, tenant="u", chunk_bytes=(2 * CHUNK,))
    assert [r.tenant for r in d.node.namespaces("t")] == ["t"]
    assert [r.tenant for r in d.node.namespaces()] == ["t", "u"]
    ((t_extent, slot_bytes, slots),) = d.node.extents_of("t", {CHUNK, 2 * CHUNK})
    assert (slot_bytes, slots) == (CHUNK, PER)
    ((u_extent, _, _),) = d.node.extents_of("u", {CHUNK, 2 * CHUNK})
    assert t_extent != u_extent
    assert d.node.extents_of("u", {CHUNK}) == []


def test_the_version_of_extents_rises_with_every_change() -> None:
    d = Driven(2)
    versions = [d.node.extents_version("t")]
    d.hello(1)
    versions.append(d.node.extents_version("t"))
    d.store(1, keys(PER - 1))
    versions.append(d.node.extents_version("t"))
    d.do(ev.ExtentDamaged(d.extents()[0].number, "truncated"))
    versions.append(d.node.extents_version("t"))
    assert versions[0] < versions[1] < versions[2] < versions[3]
