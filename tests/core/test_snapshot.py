"""What operators see: numbers that add up, one tenant's or all."""

from __future__ import annotations

import json

import pytest

from cachesvc.core import events as ev
from cachesvc.core import snapshot as snapshot_module
from cachesvc.core.quota import TenantQuota
from cachesvc.core.snapshot import snapshot
from tests.support.nodes import CHUNK, EXTENT, OTHER, PER, SPACE, Driven, keys


def busy_node() -> Driven:
    """One extent: 3 chunks sealed, 2 of them leased, 1 slot being written, 1 quarantined, 3 free."""
    d = Driven(2, TenantQuota("t"), TenantQuota("u", EXTENT))
    d.hello(1)
    d.allocate(1, 5, keys(1, 60))
    d.do(ev.ConnectionLost(1))
    d.hello(2, session=OTHER)
    d.store(2, keys(3))
    d.lease(2, 5, keys(2))
    d.lease(2, 6, keys(1))
    d.allocate(2, 7, keys(1, 50))
    d.lookup(2, keys(4), touch=True)
    return d


def test_an_empty_node() -> None:
    d = Driven(2, auto=False)
    assert snapshot(d.node, None, d.now) == {
        "tenants": {
            "t": {
                "bytes": 0,
                "sessions": 0,
                "connections": 0,
                "processes": 0,
                "write_tickets": 0,
                "leases": 0,
                "classes": [],
                "counts": dict.fromkeys(
                    [
                        "hits",
                        "stores",
                        "stored_bytes",
                        "loads",
                        "loaded_bytes",
                        "evictions",
                        "aborts",
                        "refused",
                    ],
                    0,
                )
                | {"misses": {}},
                "namespaces": {},
                "namespaces_total": 0,
            }
        },
        "arena": {
            "extent_bytes": EXTENT,
            "bytes": 2 * EXTENT,
            "extents": {"total": 2, "spare": 0, "making": 1, "used": 0, "draining": 0, "retiring": 0},
            "moves": 0,
        },
        "restart": {"chunks_restored": 0, "orphans": 0, "grace": False},
    }


def test_a_busy_tenant() -> None:
    d = busy_node()
    tenant = snapshot(d.node, "t", d.now)["tenants"]["t"]
    assert tenant["classes"] == [
        {
            "slot_bytes": CHUNK,
            "extents": 1,
            "slots": PER,
            "sealed": 3,
            "writing": 1,
            "quarantined": 1,
            "leased": 2,
            "free": 3,
            "bytes": 3 * CHUNK,
        }
    ]
    counted = {name: tenant[name] for name in ("bytes", "sessions", "connections", "processes", "leases")}
    assert counted == {"bytes": 3 * CHUNK, "sessions": 2, "connections": 1, "processes": 2, "leases": 2}
    assert tenant["write_tickets"] == 2
    assert tenant["namespaces"] == {
        SPACE.hex()[:12]: {
            "label": "label",
            "chunks": 3,
            "chunk_bytes": [CHUNK],
            "sessions": 2,
            "counts": tenant["counts"],
        }
    }
    assert tenant["counts"] == {
        "hits": 3,
        "misses": {"never_stored": 1},
        "stores": 3,
        "stored_bytes": 3 * CHUNK,
        "loads": 3,
        "loaded_bytes": 3 * CHUNK,
        "evictions": 0,
        "aborts": 0,
        "refused": 0,
    }


def test_a_tenant_sees_no_other_and_no_arena() -> None:
    d = busy_node()
    assert snapshot(d.node, "u", d.now).keys() == {"tenants"}
    assert list(snapshot(d.node, "u", d.now)["tenants"]) == ["u"]
    assert list(snapshot(d.node, None, d.now)["tenants"]) == ["t", "u"]
    assert snapshot(d.node, "x", d.now) == {"tenants": {}}


def test_counts_of_a_forgotten_namespace_stay_in_the_tenants() -> None:
    d = Driven(1)
    d.hello(1)
    d.lookup(1, keys(3), touch=True)
    d.do(ev.ConnectionLost(1))
    d.hello(2, chunk_bytes=(2 * CHUNK,))
    tenant = d.node.snapshot("t", d.now)["tenants"]["t"]
    assert tenant["counts"]["misses"] == {"namespace_new": 3}
    assert tenant["namespaces"][SPACE.hex()[:12]]["counts"]["misses"] == {}


def test_extents_in_every_room() -> None:
    d = Driven(4, auto=False)
    d.hello(1)
    while len(d.node.extents.spares) < 2 or d.node.extents.making is not None:
        d.finish()
    used = d.extents()[0].number
    d.do(ev.ExtentsMapped(10, (used,)))
    d.store(1, keys(1))
    d.lease(1, 5, keys(1))
    d.do(ev.ExtentDamaged(used, "truncated"))
    d.after(0.25)
    rooms = snapshot(d.node, None, d.now)["arena"]["extents"]
    assert rooms == {"total": 4, "spare": 2, "making": 1, "used": 0, "draining": 1, "retiring": 0}
    d.do(ev.Release(1, (5,)))
    d.after(0.25)
    rooms = snapshot(d.node, None, d.now)["arena"]["extents"]
    assert (rooms["draining"], rooms["retiring"]) == (0, 1)


def test_it_is_plain_and_changes_nothing() -> None:
    d = busy_node()
    first = json.dumps(d.node.snapshot(None, d.now))
    assert json.dumps(d.node.snapshot(None, d.now)) == first
    d.node.check_invariants()


def test_namespaces_shown_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "NAMESPACES_SHOWN_MAX", 1)
    d = busy_node()
    d.hello(3, session=OTHER * 2, namespace=b"another-namespac")
    tenant = snapshot(d.node, "t", d.now)["tenants"]["t"]
    assert (len(tenant["namespaces"]), tenant["namespaces_total"]) == (1, 2)
