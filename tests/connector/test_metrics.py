"""Our counters reach vLLM's own /metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

from cachesvc.connector.connector import CachesvcConnector, CachesvcSpec
from cachesvc.connector.metrics import DEFINITIONS, FAILED, HITS, LOADS, MISSES, REFUSED, STORES, Counts
from cachesvc.types import AllocateState, KeyState


def counted() -> Counts:
    counts = Counts()
    counts.hit(3)
    counts.missed(KeyState.EVICTED, 2)
    counts.missed(KeyState.EVICTED, 2)
    counts.missed(KeyState.DEADLINE, 1)
    counts.loaded(3)
    counts.stored(4)
    counts.refused(AllocateState.NO_ROOM, 5)
    counts.failed(store=True)
    counts.failed(store=False)
    return counts


def test_nothing_was_counted() -> None:
    counts = Counts()
    counts.hit(0)
    counts.missed(KeyState.EVICTED, 0)
    assert counts.take() is None


def test_counts_are_taken_once() -> None:
    counts = counted()
    stats = counts.take()
    assert stats is not None
    assert stats.data["data"] == {
        HITS: {(): 3},
        MISSES: {("evicted",): 4, ("deadline",): 1},
        LOADS: {(): 3},
        STORES: {(): 4},
        REFUSED: {("no_room",): 5},
        FAILED: {("store",): 1, ("load",): 1},
    }
    assert counts.take() is None


def test_they_add_up_with_vllms_own() -> None:
    stats = OffloadingConnectorStats()
    for _ in range(2):
        mine = counted().take()
        assert mine is not None
        stats.aggregate(mine)
    assert stats.data["data"][STORES] == {(): 8}


def test_all_names_are_defined_and_vllms() -> None:
    assert {HITS, MISSES, LOADS, STORES, REFUSED, FAILED} == set(DEFINITIONS)
    assert all(name.startswith("vllm:cachesvc_") for name in DEFINITIONS)
    assert CachesvcSpec.build_metric_definitions({}) == DEFINITIONS


def test_prometheus_shows_them(monkeypatch: Any) -> None:
    registry = CollectorRegistry()

    def within(kind: type) -> Any:
        return lambda **arguments: kind(**arguments, registry=registry)

    base = {kind: kind for kind in (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)}
    transfer = SimpleNamespace(kv_connector_extra_config={})
    shown = CachesvcConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=transfer),
        {kind: within(kind) for kind in base},
        ["engine"],
        {0: ["0"]},
    )
    stats = counted().take()
    assert stats is not None
    shown.observe(stats.data)
    text = prometheus_client.generate_latest(registry).decode()
    assert 'vllm:cachesvc_hit_chunks_total{engine="0"} 3.0' in text
    assert 'vllm:cachesvc_missed_chunks_total{engine="0",reason="evicted"} 4.0' in text
    assert 'vllm:cachesvc_refused_chunks_total{engine="0",reason="no_room"} 5.0' in text
    assert 'vllm:cachesvc_failed_transfers_total{direction="load",engine="0"} 1.0' in text
