"""Names and sums of the metrics, from readings made by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cachesvc import metrics
from cachesvc.metrics import LATENCY_BOUNDS_S, Latency, exposition

COUNTS = {
    "hits": 10,
    "misses": {"evicted": 2, "never_stored": 5},
    "stores": 4,
    "stored_bytes": 4096,
    "loads": 3,
    "loaded_bytes": 300,
    "evictions": 1,
    "aborts": 1,
    "refused": 6,
}
SOME = COUNTS | {"hits": 4, "misses": {"evicted": 1}, "stores": 1}


def tenant(**fields: Any) -> dict[str, Any]:
    slab = {"slot_bytes": 4096, "sealed": 3, "writing": 1, "leased": 2, "quarantined": 1, "free": 9}
    return {
        "bytes": 12288,
        "sessions": 1,
        "connections": 2,
        "processes": 2,
        "write_tickets": 1,
        "leases": 2,
        "classes": [slab],
        "counts": COUNTS,
        "namespaces": {"a" * 12: {"counts": SOME}},
        **fields,
    }


def figures(**tenants: Any) -> dict[str, Any]:
    latency = Latency()
    for seconds in (0.00001, 0.0001, 0.3, 50.0):
        latency.observe(seconds)
    return {
        "status": {
            "tenants": tenants,
            "arena": {"bytes": 1 << 26, "extents": {"total": 4, "used": 3, "spare": 1}, "moves": 2},
            "restart": {"chunks_restored": 7, "orphans": 1},
            "daemon": {"uptime_s": 1.5, "connections": 2, "processes": 2, "problems": {"protocol": 3}},
        },
        "calls": {"lookup": latency.plain()},
    }


def samples(reading: dict[str, Any]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, content_type = exposition(reading)
    assert content_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def labels(**some: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(some.items()))


def test_what_dashboards_rely_on() -> None:
    seen = samples(figures(default=tenant()))
    of = {"tier": "ram", "tenant": "default"}
    assert seen["cachesvc_bytes", labels(**of)] == 12288
    assert seen["cachesvc_leases", labels(tenant="default")] == 2
    assert seen["cachesvc_quarantined_slots", labels(**of, slot_bytes="4096")] == 1
    assert seen["cachesvc_arena_bytes", labels(tier="ram")] == 1 << 26
    assert seen["cachesvc_extents", labels(tier="ram", state="spare")] == 1
    assert seen["cachesvc_problems_total", labels(reason="protocol")] == 3
    assert {name for name, _ in seen} >= {
        "cachesvc_hits_total",
        "cachesvc_misses_total",
        "cachesvc_evictions_total",
        "cachesvc_stored_bytes_total",
        "cachesvc_rpc_seconds_bucket",
    }
    assert all(name.startswith("cachesvc_") for name, _ in seen)


def test_namespaces_and_the_rest_add_up_to_the_tenant() -> None:
    seen = samples(figures(default=tenant()))
    of = {"tier": "ram", "tenant": "default"}
    assert seen["cachesvc_hits_total", labels(**of, namespace="a" * 12)] == 4
    assert seen["cachesvc_hits_total", labels(**of, namespace="other")] == 6
    missed = {
        (dict(key)["namespace"][:5], dict(key)["reason"]): n
        for (name, key), n in seen.items()
        if name == "cachesvc_misses_total"
    }
    assert missed == {
        ("aaaaa", "evicted"): 1,
        ("other", "evicted"): 1,
        ("other", "never_stored"): 5,
    }


def test_namespaces_have_a_limit_over_all_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "NAMESPACE_SERIES_MAX", 3)
    many = {f"{n:012x}": {"counts": COUNTS | {"hits": 1}} for n in range(5)}
    seen = samples(figures(one=tenant(namespaces=dict(list(many.items())[:2])), two=tenant(namespaces=many)))
    hits = {
        (dict(k)["tenant"], dict(k)["namespace"]): n for (name, k), n in seen.items() if name == "cachesvc_hits_total"
    }
    assert hits == {
        ("one", f"{0:012x}"): 1,
        ("one", f"{1:012x}"): 1,
        ("one", "other"): 8,
        ("two", f"{0:012x}"): 1,
        ("two", "other"): 9,
    }


def test_latency_is_a_cumulative_histogram() -> None:
    seen = samples(figures())
    buckets = {dict(k)["le"]: n for (name, k), n in seen.items() if name == "cachesvc_rpc_seconds_bucket"}
    assert len(buckets) == len(LATENCY_BOUNDS_S) + 1
    assert (buckets["2e-05"], buckets["0.0001"], buckets["0.25"], buckets["1.0"], buckets["+Inf"]) == (1, 2, 2, 3, 4)
    assert seen["cachesvc_rpc_seconds_count", labels(call="lookup")] == 4
    assert seen["cachesvc_rpc_seconds_sum", labels(call="lookup")] == pytest.approx(50.30011)


def test_a_reading_is_a_copy() -> None:
    latency = Latency()
    plain = latency.plain()
    latency.observe(1)
    assert sum(plain["counts"]) == 0


def test_an_engine_does_not_load_prometheus() -> None:
    code = "import sys, cachesvc.metrics; assert 'prometheus_client' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
