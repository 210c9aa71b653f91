"""What the connector counts, in vLLM's own metrics: why there was no hit, what was stored, what failed.

Covers: names, labels and the bag that vLLM collects each step. Not here: what the client counts for its own users
(`client.session`), the daemon's metrics.
"""

from __future__ import annotations

from typing import Final

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingMetricMetadata

from cachesvc.types import AllocateState, KeyState

HITS: Final = "vllm:cachesvc_hit_chunks"
MISSES: Final = "vllm:cachesvc_missed_chunks"
LOADS: Final = "vllm:cachesvc_loaded_chunks"
STORES: Final = "vllm:cachesvc_stored_chunks"
REFUSED: Final = "vllm:cachesvc_refused_chunks"
FAILED: Final = "vllm:cachesvc_failed_transfers"

DEFINITIONS: Final[dict[str, OffloadingMetricMetadata]] = {
    HITS: OffloadingCounterMetadata("Chunks that requests found in the cache when they were about to be scheduled."),
    MISSES: OffloadingCounterMetadata("Chunks that requests didn't find, by reason.", ("reason",)),
    LOADS: OffloadingCounterMetadata("Chunks that were loaded, every byte of them checked to be what was leased."),
    STORES: OffloadingCounterMetadata("Chunks that were stored."),
    REFUSED: OffloadingCounterMetadata("Chunks that got no slot to be stored in, by reason.", ("reason",)),
    FAILED: OffloadingCounterMetadata("Loads and stores that failed on some rank.", ("direction",)),
}


class Counts:
    """Counts since the last `take`. Used by the scheduler's thread only."""

    def __init__(self) -> None:
        self._stats = OffloadingConnectorStats()

    def hit(self, chunks: int) -> None:
        """Found when a request was about to be scheduled."""
        self._add(HITS, chunks)

    def missed(self, reason: KeyState, chunks: int) -> None:
        """Not found."""
        self._add(MISSES, chunks, reason.name.lower())

    def loaded(self, chunks: int) -> None:
        """In the KV cache, all ranks."""
        self._add(LOADS, chunks)

    def stored(self, chunks: int) -> None:
        """Sealed, or about to be."""
        self._add(STORES, chunks)

    def refused(self, reason: int, chunks: int) -> None:
        """No slot; `reason` is an `AllocateState`."""
        self._add(REFUSED, chunks, AllocateState(reason).name.lower())

    def failed(self, *, store: bool) -> None:
        """A transfer failed on some rank."""
        self._add(FAILED, 1, "store" if store else "load")

    def take(self) -> OffloadingConnectorStats | None:
        """What was counted; None if nothing."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, OffloadingConnectorStats()
        return stats

    def _add(self, name: str, count: int, *labels: str) -> None:
        if count:
            self._stats.increase_counter(name, count, labels)
