"""Namespaces and spaces: what is known, what is forgotten, what the counts remember; digests of keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cachesvc.core import events as ev
from cachesvc.core import index as index_module
from cachesvc.core.index import Counts, Index, Namespace, component_bytes
from cachesvc.core.slots import SlabClass
from cachesvc.types import KeyState
from tests.support.nodes import CHUNK, OTHER, PER, SPACE, Driven, keys


def record(name: bytes, tenant: str = "t", chunk_bytes: tuple[int, ...] = (CHUNK,)) -> ev.NamespaceRecord:
    return ev.NamespaceRecord(tenant, name.ljust(16), name.decode(), {}, chunk_bytes)


def slab(tenant: str = "t") -> SlabClass:
    return SlabClass(tenant, CHUNK, PER, "lru")


def declared(index: Index, name: bytes, tenant: str = "t") -> Namespace:
    return index.declare(record(name, tenant), [slab(tenant)])


def test_namespaces_belong_to_tenants() -> None:
    index = Index()
    mine, theirs = declared(index, b"a"), declared(index, b"a", "u")
    assert index.find("t", b"a".ljust(16)) is mine
    assert index.find("u", b"a".ljust(16)) is theirs
    assert index.find("t", b"b".ljust(16)) is None
    assert [r.tenant for r in index.records()] == ["t", "u"]
    assert [r.tenant for r in index.records("u")] == ["u"]


def test_every_group_is_a_space_of_its_own() -> None:
    index = Index()
    small, large = slab(), SlabClass("t", 2 * CHUNK, PER // 2, "lru")
    namespace = index.declare(record(b"a", chunk_bytes=(CHUNK, 2 * CHUNK, CHUNK)), [small, large, small])
    assert [(s.group, s.chunk_bytes, s.slab) for s in namespace.spaces] == [
        (0, CHUNK, small),
        (1, 2 * CHUNK, large),
        (2, CHUNK, small),
    ]
    assert len({s.number for s in namespace.spaces}) == 3
    assert len({s.digest(b"key") for s in namespace.spaces}) == 3, "ghosts of one class don't mix spaces up"
    assert namespace.spaces[0].digest(b"key") == namespace.spaces[0].digest(b"key")


def test_digests_have_64_bits() -> None:
    space = declared(Index(), b"a").spaces[0]
    digests = [space.digest(key) for key in keys(1000)]
    assert len(set(digests)) == 1000
    assert max(digests) < 1 << 64
    assert max(digests) > 1 << 60


def test_numbers_of_spaces_are_not_used_again() -> None:
    index = Index()
    first = declared(index, b"a").spaces[0].number
    index.forget("t", b"a".ljust(16))
    assert declared(index, b"a").spaces[0].number != first
    assert list(index.spaces) == [first + 1]


def test_counts_of_forgotten_namespaces_stay() -> None:
    index = Index()
    namespace = declared(index, b"a")
    namespace.counts.hits = 3
    namespace.counts.misses[KeyState.EVICTED] = 2
    declared(index, b"b").counts.hits = 1
    declared(index, b"a", "u").counts.hits = 100
    index.forget("t", b"a".ljust(16))
    total = index.totals("t")
    assert (total.hits, total.misses) == (4, {KeyState.EVICTED: 2})
    total.hits = 99
    assert index.totals("t").hits == 4, "a sum, not the counter itself"
    assert index.totals("nobody") == Counts()


def test_counts_add_up_in_every_field() -> None:
    def some(n: int) -> Counts:
        counts = Counts(misses=Counter({KeyState.EVICTED: n}))
        for name in Counts.__dataclass_fields__.keys() - {"misses"}:
            setattr(counts, name, n)
        return counts

    total = some(1)
    total.add(some(2))
    assert total == some(3)


def test_room_is_made_by_forgetting_the_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "NAMESPACES_PER_TENANT_MAX", 2)
    index = Index()
    busy, idle = declared(index, b"a"), declared(index, b"b")
    busy.sessions = 1
    assert index.room("u")
    assert index.room("t")
    assert [r.label for r in index.records()] == ["a"]
    assert index.room("t")
    again = index.declare(idle.record, [slab()])
    again.spaces[0].sealed[b"key"] = 0
    assert not index.room("t"), "one is open, one has chunks"


def test_room_for_components_is_made_by_forgetting_the_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "COMPONENT_BYTES_PER_TENANT_MAX", 100)
    index = Index()
    kept = declared(index, b"a")
    record = replace(kept.record, namespace=b"b".ljust(16), label="b", components={"\u00e9": "x" * 58})
    idle = index.declare(record, [slab()])
    kept.sessions = 1
    assert (kept.component_bytes, idle.component_bytes) == (component_bytes(kept.record.components), 60)
    assert index.room("t", 40 - kept.component_bytes)
    assert index.find("t", record.namespace) is idle
    assert index.room("u", 100)
    assert not index.room("u", 101)
    assert index.room("t", 41)
    assert index.find("t", record.namespace) is None
    assert not index.room("t", 101)


def test_a_namespace_is_idle_without_sessions_and_chunks() -> None:
    d = Driven(1)
    d.hello(1)
    namespace = d.node.index.find("t", SPACE)
    assert namespace is not None
    assert not namespace.idle()
    d.store(1, keys(1))
    d.do(ev.ConnectionLost(1))
    assert not namespace.idle(), "a chunk is left"
    d.hello(2, session=OTHER, namespace=b"another-namespac")
    d.store(2, keys(PER))
    assert namespace.idle()


def test_why_a_key_is_absent() -> None:
    d = Driven(1, eviction="lru")
    d.hello(1)
    namespace = d.node.index.find("t", SPACE)
    assert namespace is not None
    space = namespace.spaces[0]
    assert space.absent_state(b"x") is KeyState.NAMESPACE_NEW
    d.store(1, keys(PER + 1))
    assert space.absent_state(b"x") is KeyState.NEVER_STORED
    d.store(1, keys(1, PER))
    assert space.absent_state(keys(PER)[-1]) is KeyState.EVICTED
    d.allocate(1, 5, keys(PER)[-1:])
    assert space.absent_state(keys(PER)[-1]) is KeyState.PENDING


def test_why_all_absent_keys_are_absent() -> None:
    d = Driven(1, eviction="lru")
    d.hello(1)
    namespace = d.node.index.find("t", SPACE)
    assert namespace is not None
    space = namespace.spaces[0]

    def why() -> tuple[KeyState | None, set[KeyState]]:
        some = [*keys(PER + 2), b"x"]
        return space.absent_state_of_all(), {space.absent_state(key) for key in some if key not in space.sealed}

    assert why() == (KeyState.NAMESPACE_NEW, {KeyState.NAMESPACE_NEW})
    d.allocate(1, 5, keys(1))
    assert why() == (None, {KeyState.PENDING, KeyState.NAMESPACE_NEW})
    d.seal(1, 5, 1)
    assert why() == (KeyState.NEVER_STORED, {KeyState.NEVER_STORED})
    d.store(1, keys(PER, 1))
    assert why() == (None, {KeyState.NEVER_STORED, KeyState.EVICTED})


def test_forgetting_a_slot_that_is_not_indexed_is_a_bug() -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(1))
    d.node.index.forget_slot(d.slab(), 0)
    with pytest.raises(AssertionError, match="doesn't know"):
        d.node.index.forget_slot(d.slab(), 0)
    with pytest.raises(AssertionError, match="0 chunks indexed, 1 tracked"):
        d.node.index.check_invariants()


@pytest.mark.parametrize(
    ("break_it", "story"),
    [
        (lambda d: d.slab().keys.__setitem__(0, b"x"), "another key"),
        (lambda d: d.slab().states.__setitem__(0, 0), "state 0"),
        (lambda d: d.slab().spaces.__setitem__(0, 77), "another space"),
        (lambda d: setattr(d.extents()[0], "draining", True), "draining"),
    ],
)
def test_what_the_invariants_see(break_it: object, story: str) -> None:
    d = Driven(1)
    d.hello(1)
    d.store(1, keys(1))
    break_it(d)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=story):
        d.node.index.check_invariants()
