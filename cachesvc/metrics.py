"""What the daemon times, and how Prometheus reads what it counts.

Covers: a latency histogram cheap enough for the loop, and the metric families made from one reading of the daemon. Not
here: the counting (`core.index`, `daemon.runner`), the HTTP endpoint (`admin.app`).

`prometheus_client` is imported in functions that only the daemon's admin thread calls: neither an engine nor the
daemon's start pays for it. Names are a contract with dashboards: prefix `cachesvc_`, units last, labels `tier`,
`tenant`, `reason`, `namespace` (its first 12 hex digits; at most `NAMESPACE_SERIES_MAX`, the rest is `other`), and each
on its own metric `state`, `slot_bytes`, `call`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from prometheus_client.core import Metric

LATENCY_BOUNDS_S: Final = (
    *(0.00002, 0.00005, 0.0001, 0.0002, 0.0005),
    *(0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0),
)
"""Upper bounds of the buckets in seconds; one more bucket is open."""

NAMESPACE_SERIES_MAX: Final = 200
"""Over all tenants: an engine that resets often must not flood whoever scrapes."""

TIER: Final = "ram"

Values: TypeAlias = Mapping[Any, float]
"""Label values (a tuple of strings) -> what the metric says."""

Figures: TypeAlias = Mapping[str, Any]
"""One reading of the daemon, plain values only (`daemon.runner.Runner.figures`)."""


class Latency:
    """A histogram of seconds. Written by one thread, a copy is given out."""

    __slots__ = ("_counts", "_total_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self._total_s += seconds

    def plain(self) -> dict[str, Any]:
        """`counts` of each bucket, not cumulative, and `total_s`, the sum of all durations."""
        return {"counts": list(self._counts), "total_s": self._total_s}


# --- exposition -----------------------------------------------------------------------------------------------------


def exposition(figures: Figures) -> tuple[bytes, str]:
    """The body and content type of `/metrics`."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Reading(Collector):
        def collect(self) -> Iterator[Metric]:
            return families(figures)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Reading())
    return generate_latest(registry), CONTENT_TYPE_LATEST


def families(figures: Figures) -> Iterator[Metric]:
    """Every metric family of the daemon."""
    status = figures["status"]
    yield from _arena(status)
    yield from _daemon(status["daemon"])
    yield from _tenants(status["tenants"])
    yield from _counters(status["tenants"])
    yield _calls(figures["calls"])


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"cachesvc_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], values: Values) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"cachesvc_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _arena(status: Mapping[str, Any]) -> Iterator[Metric]:
    arena, restart = status["arena"], status["restart"]
    yield _gauge("arena_bytes", "Size of the arena", ("tier",), {(TIER,): arena["bytes"]})
    states = {(TIER, state): n for state, n in arena["extents"].items() if state != "total"}
    yield _gauge("extents", "Extents by what is done with them", ("tier", "state"), states)
    yield _counter("extent_moves", "Extents moved between slab classes", ("tier",), {(TIER,): arena["moves"]})
    yield _gauge(
        "restored_chunks", "Chunks back after the last start", ("tier",), {(TIER,): restart["chunks_restored"]}
    )
    yield _gauge(
        "orphaned_slots", "Slots being written when the daemon started", ("tier",), {(TIER,): restart["orphans"]}
    )


def _daemon(daemon: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("uptime_seconds", "Time since the start", (), {(): daemon["uptime_s"]})
    yield _gauge("connections", "Open control connections", (), {(): daemon["connections"]})
    yield _gauge("processes", "Client processes that are watched", (), {(): daemon["processes"]})
    problems = {(reason,): n for reason, n in daemon["problems"].items()}
    yield _counter("problems", "What went wrong, by reason", ("reason",), problems)


def _tenants(tenants: Mapping[str, Any]) -> Iterator[Metric]:
    for name, text in (
        ("sessions", "Sessions (engines) that are known"),
        ("write_tickets", "Writes in flight"),
        ("leases", "Leases that are held"),
    ):
        yield _gauge(name, text, ("tenant",), {(tenant,): body[name] for tenant, body in tenants.items()})
    resident = {(TIER, tenant): body["bytes"] for tenant, body in tenants.items()}
    yield _gauge("bytes", "Bytes that sealed chunks take up, padding included", ("tier", "tenant"), resident)
    for state in ("sealed", "writing", "leased", "quarantined", "free"):
        slots = {
            (TIER, tenant, str(slab["slot_bytes"])): slab[state]
            for tenant, body in tenants.items()
            for slab in body["classes"]
        }
        yield _gauge(f"{state}_slots", f"Slots that are {state}", ("tier", "tenant", "slot_bytes"), slots)


_COUNTERS: Final = (
    ("hits", "hits", "Keys found when a request arrived"),
    ("evictions", "evictions", "Chunks evicted"),
    ("stores", "stores", "Chunks sealed"),
    ("stored_bytes", "stored_bytes", "Bytes of chunks sealed"),
    ("loads", "loads", "Chunks leased"),
    ("loaded_bytes", "loaded_bytes", "Bytes of chunks leased"),
    ("aborts", "aborts", "Writes given up"),
    ("refused", "refused_stores", "Keys that got no slot"),
)


def _counters(tenants: Mapping[str, Any]) -> Iterator[Metric]:
    rows = list(_rows(tenants))
    labels = ("tier", "tenant", "namespace")
    for field, name, text in _COUNTERS:
        yield _counter(name, text, labels, {(TIER, *key): counts[field] for key, counts in rows})
    misses = {
        (tenant, namespace, reason): n for (tenant, namespace), counts in rows for reason, n in counts["misses"].items()
    }
    yield _counter("misses", "Keys not found when a request arrived", ("tenant", "namespace", "reason"), misses)


def _rows(tenants: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    """Counts by (tenant, namespace), at most `NAMESPACE_SERIES_MAX` named; `other` is what a tenant has more."""
    left = NAMESPACE_SERIES_MAX
    for tenant, body in tenants.items():
        rest = _flat(body["counts"])
        for namespace, entry in list(body["namespaces"].items())[:left]:
            left -= 1
            rest.subtract(_flat(entry["counts"]))
            yield (tenant, namespace), entry["counts"]
        yield (tenant, "other"), _unflat(rest)


def _flat(counts: Mapping[str, Any]) -> Counter[tuple[str, str]]:
    flat = Counter({("", name): n for name, n in counts.items() if name != "misses"})
    flat.update({("misses", reason): n for reason, n in counts["misses"].items()})
    return flat


def _unflat(flat: Counter[tuple[str, str]]) -> dict[str, Any]:
    counts: dict[str, Any] = {name: n for (of, name), n in flat.items() if not of}
    return counts | {"misses": {name: n for (of, name), n in flat.items() if of}}


def _calls(calls: Mapping[str, Any]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(
        "cachesvc_rpc_seconds", "From a message's last byte to its reply's handing over", labels=("call",)
    )
    bounds = [*map(str, LATENCY_BOUNDS_S), "+Inf"]
    for call, latency in calls.items():
        buckets = list(zip(bounds, map(float, accumulate(latency["counts"])), strict=True))
        family.add_metric((call,), buckets, sum_value=latency["total_s"])
    return family
