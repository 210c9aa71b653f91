"""The façade: what vLLM loads, and what puts vLLM's parts and ours together.

Covers: settings that vLLM must have, the handshake between workers and scheduler, the order in which transfers are
settled, reports of failed loads. Not here: deciding (`connector.scheduler`), copying (`connector.worker`).

`CachesvcConnector` is vLLM's `OffloadingConnector` with our spec: vLLM decides which blocks of which request are stored
and loaded, and fences them; we say what there is, lease, allocate and copy. vLLM makes one connector in each worker and
then one in the scheduler's process::

    worker     register_kv_caches -> our worker, its RankLayout --handshake--> scheduler   the identity can be known now
    scheduler  Metadata.join      <-- the session, once -- build_connector_meta            each step
    worker     WorkerMetadata.outcomes -- how transfers ended --> update_connector_output  settled before vLLM hears
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingSpec, OffloadKey, make_offload_key

from cachesvc.connector import identity, metrics
from cachesvc.connector.adapters import Adapters
from cachesvc.connector.copies import copies_for, pages_of
from cachesvc.connector.guard import harmless
from cachesvc.connector.layout import RankLayout, blocks_per_chunk
from cachesvc.connector.membership import Membership
from cachesvc.connector.requests import Group, Limits
from cachesvc.connector.scheduler import CachesvcManager
from cachesvc.connector.settings import Settings, check_version
from cachesvc.connector.specs import Handshake, Metadata, WorkerMetadata
from cachesvc.connector.weights import Identified
from cachesvc.connector.worker import CachesvcWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

FENCED_IN_MULTI_SINCE: Final = (0, 33)
"""Below, `MultiConnector` lets blocks be used again while we still store them."""

IDLE_LOAD_S: Final = 0.003
"""vLLM looks for the end of a load once a step, and sleeps for as long as this after a step without work."""

WHOLE_WINDOWS_SINCE: Final = (0, 33)
"""Below, a sliding window's chunk of several blocks may be offered for storing with a block missing in it."""


@dataclass(frozen=True)
class _Building:
    """What our spec needs beside what vLLM gives to a spec."""

    vllm_config: VllmConfig
    kv_cache_config: KVCacheConfig
    settings: Settings


_building: ContextVar[_Building] = ContextVar("building")


class CachesvcConnector(OffloadingConnector):
    """vLLM's door to the node's cache; see the module's docstring."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        settings = prepare(vllm_config, kv_cache_config)
        with _as_context(_Building(vllm_config, kv_cache_config, settings)):
            super().__init__(vllm_config, role, kv_cache_config)
        self._several_groups = len(kv_cache_config.kv_cache_groups) > 1
        self._adapters = Adapters()
        self._loading: dict[int, str] = {}
        self._bad_blocks: set[int] = set()

    # --- scheduler ------------------------------------------------------------------------------------------------

    @property
    def _manager(self) -> CachesvcManager:
        manager = self.scheduler.manager
        assert isinstance(manager, CachesvcManager)
        return manager

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Handshake]) -> None:
        """The workers' KV caches are there, in all stages. (MultiConnector gives its first child's to all children.)"""
        ours = [handshake.layout for handshake in metadata.values() if isinstance(handshake, Handshake)]
        self._manager.membership.told(ours)

    def on_new_request(self, request: Request) -> None:
        """A request came: see what there is for it."""
        lora = request.lora_request
        adapter = partial(self._adapters.digest, lora.lora_path) if lora is not None else None
        self._manager.requests.arrive(request.request_id, adapter)
        super().on_new_request(request)
        if not request.skip_reading_prefix_cache:
            self._manager.requests.ask(request.request_id, self._keys(request))

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded; None: ask again. vLLM's scan of keys is spared until the answer is final."""
        if not request.skip_reading_prefix_cache and not self._manager.requests.ready(
            request.request_id, lambda: self._keys(request), num_computed_tokens
        ):
            return None, False
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request is taken on: what isn't loaded now needs no lease."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._manager.requests.scheduled(request.request_id, loads=num_external_tokens > 0)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        """What the workers do in this step."""
        meta = super().build_connector_meta(scheduler_output)
        manager = self._manager
        manager.requests.idle = not scheduler_output.total_num_scheduled_tokens
        return Metadata.around(meta, manager.membership.take_join(), idle=manager.requests.idle)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Settle what ended before vLLM hears of it: it may have forgotten the transfer."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, WorkerMetadata):
            self._manager.settle(meta.outcomes)
        super().update_connector_output(connector_output)

    def _keys(self, request: Request) -> list[list[OffloadKey]]:
        """The keys of all whole chunks of the request, by group."""
        return [
            [
                make_offload_key(block_hash, group.group_idx)
                for block_hash in islice(request.block_hashes, group.hashes_per_chunk - 1, None, group.hashes_per_chunk)
            ]
            for group in self.scheduler.config.kv_group_configs
        ]

    # --- worker ---------------------------------------------------------------------------------------------------

    @property
    def _worker(self) -> CachesvcWorker:
        worker = self.connector_worker.worker if self.connector_worker is not None else None
        assert isinstance(worker, CachesvcWorker)
        return worker

    def get_handshake_metadata(self) -> Handshake:
        """What this rank's KV cache looks like."""
        return Handshake(self._worker.layout)

    def handle_preemptions(self, kv_connector_metadata: Metadata) -> None:
        """Blocks are about to be used again; comes before everything else of a step."""
        self._take_join(kv_connector_metadata)
        super().handle_preemptions(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Metadata) -> None:
        """What to do in this step."""
        self._take_join(connector_metadata)
        super().bind_connector_metadata(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Submit the copies of this step."""
        meta = self._connector_metadata
        assert isinstance(meta, Metadata)
        self._loading.update((number, job.req_id) for number, job in meta.load_jobs.items())
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Which requests' loads have ended, and which of them failed."""
        meta = self._connector_metadata
        if isinstance(meta, Metadata) and meta.idle:
            self._worker.linger(IDLE_LOAD_S)
        results = super().get_transfer_results(finished_req_ids)
        failed = self._failed_loads(results.finished_recving or set())
        if failed:
            results.failed_recving = (results.failed_recving or set()) | failed
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load failed, of loads that ended in this step."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        """What ended on this rank."""
        meta = super().build_connector_worker_meta()
        outcomes = self._worker.take_outcomes() if self.connector_worker is not None else {}
        if meta is None and not outcomes:
            return None
        return WorkerMetadata.around(meta or OffloadingWorkerMetadata(), outcomes)

    def _take_join(self, meta: Metadata) -> None:
        join, meta.join = meta.join, None
        if join is not None:
            self._worker.join(join)

    def _failed_loads(self, finished: set[str]) -> set[str]:
        """Requests whose load has failed, if that is how vLLM wants to be told: it takes blocks where there is one
        KV group, requests where there are several."""
        failed = set()
        for number, blocks in self._worker.take_failed_loads().items():
            request_id = self._loading.get(number)
            if self._several_groups and request_id is not None:
                failed.add(request_id)
            elif not self._several_groups:
                self._bad_blocks.update(blocks)
        self._loading = {number: req for number, req in self._loading.items() if req not in finished}
        return failed

    # --- both -----------------------------------------------------------------------------------------------------

    @classmethod
    def build_prom_metrics(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        """Metrics are shown by a process in which no connector was made: it doesn't know our spec yet."""
        vllm_config.kv_transfer_config.kv_connector_extra_config.update(SPEC)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)


class CachesvcSpec(OffloadingSpec):
    """vLLM's factory of both sides."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG003 - vLLM's
        """Our metrics, for vLLM's /metrics."""
        return dict(metrics.DEFINITIONS)

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._context = _building.get()

    def get_manager(self) -> CachesvcManager:
        """The scheduler's side."""
        context = self._context
        settings, vllm_config = context.settings, context.vllm_config
        weights = Identified(vllm_config)

        def components(ranks: Sequence[RankLayout], epoch: str) -> dict[str, str] | None:
            weights.wait()
            content = weights.result()
            if content is None:
                raise ValueError(weights.error)
            return identity.components(vllm_config, context.kv_cache_config, ranks, content, epoch)

        label = str(vllm_config.model_config.served_model_name or vllm_config.model_config.model)
        membership = Membership(settings.address, label, self.blocks_per_chunk, components, settings.reset_epoch)
        limits = Limits(settings.load_deadline_ms / 1000, settings.min_load_tokens, settings.on_reset == "fresh")
        return CachesvcManager(membership, self._groups(), self.config.parallel.world_size, limits)

    def get_worker(self, kv_caches: CanonicalKVCaches) -> CachesvcWorker:
        """One rank's side."""
        names = [group.layer_names for group in self.config.groups]
        pages = pages_of(kv_caches, names)
        memory = _memory_of(self._context.vllm_config, [name for layers in names for name in layers])
        parallel = self.config.parallel
        return CachesvcWorker(
            pages, parallel.rank, parallel.world_size, memory, copies_for(kv_caches.tensors[0].tensor.device)
        )

    def _groups(self) -> list[Group]:
        groups = []
        for group in self.config.groups:
            spec = self._context.kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec
            tokens = group.tokens_per_block * self.blocks_per_chunk
            groups.append(Group(group.group_id, tokens, isinstance(spec, FullAttentionSpec)))
        return groups


@harmless(lambda *_: "")
def _memory_of(vllm_config: VllmConfig, layers: Sequence[str]) -> str:
    """How the bytes of this rank's KV cache are to be read; "": nobody knows, so they aren't shared."""
    return identity.memory_of(vllm_config, layers)


SPEC: Final = {"spec_name": CachesvcSpec.__name__, "spec_module_path": __name__}

with suppress(ValueError):  # MultiConnector finds its children's statistics by this name alone
    KVConnectorFactory.register_connector(CachesvcConnector.__name__, __name__, CachesvcConnector.__name__)


def prepare(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Settings:
    """Check what the user set, and set what vLLM must have for us. ValueError says what to change."""
    release = check_version(vllm.__version__)
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    extra = transfer.kv_connector_extra_config
    settings = Settings.read(extra)
    if parallel.nnodes > 1:
        raise ValueError("cachesvc doesn't serve engines that span nodes yet: run one engine a node")
    around = _multi_connector()
    if around is not None:
        if release < FENCED_IN_MULTI_SINCE:
            raise ValueError(
                "inside MultiConnector, vLLM below 0.33 reuses blocks while they are stored: use vLLM 0.33"
            )
        around.kv_load_failure_policy = "recompute"  # vLLM asks its settings, not those of its children
    several = len(kv_cache_config.kv_cache_groups) > 1
    sized = "block_size" in extra or int(extra.get("blocks_per_chunk", 1)) != 1
    if several and release < WHOLE_WINDOWS_SINCE and sized:
        raise ValueError(
            "vLLM below 0.33 stores incomplete chunks of several KV groups: leave blocks_per_chunk and block_size away"
        )
    if "blocks_per_chunk" not in extra and "block_size" not in extra:
        one = several and release < WHOLE_WINDOWS_SINCE
        extra["blocks_per_chunk"] = 1 if one else _default_blocks_per_chunk(vllm_config, kv_cache_config)
    transfer.kv_load_failure_policy = "recompute"
    extra.update(SPEC, canonical_layout=True, sync_load_budget_bytes=0)
    return settings


def _default_blocks_per_chunk(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    ranks = vllm_config.parallel_config.world_size
    rows, tokens = [], []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        layers = 1 if isinstance(spec, UniformTypeKVCacheSpecs) else len(group.layer_names)
        rows.append(spec.page_size_bytes * layers * ranks)
        tokens.append(spec.block_size)
    return blocks_per_chunk(rows, tokens)


def _multi_connector() -> Any:
    """Settings of the MultiConnector that makes us at this moment, if one does: its children's don't say so."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").endswith(".multi_connector") and "vllm_config" in frame.f_locals:
            return frame.f_locals["vllm_config"].kv_transfer_config
        frame = frame.f_back
    return None


@contextmanager
def _as_context(building: _Building) -> Iterator[None]:
    token = _building.set(building)
    try:
        yield
    finally:
        _building.reset(token)
