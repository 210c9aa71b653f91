"""vLLM's real scheduler, our connector on both sides, and a model that only writes what its KV cache has to hold.

Covers: steps of an engine of one or two ranks in this process. A block's bytes follow from the tokens up to its end, so
each block that a request stands on can be checked, wherever it came from. Not here: real models (`tests/engines`).
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request

from cachesvc.client.channel import State
from cachesvc.connector.connector import CachesvcConnector
from cachesvc.connector.copies import HostCopies
from cachesvc.connector.specs import Handshake
from cachesvc.connector.worker import CachesvcWorker
from tests.support.daemon import wait_for
from tests.support.kv import copy_page, part_page, whole_page

PAGE_BYTES = 4096


def bytes_of(group: int, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """What a block of a KV group holds whose last token is the last of these."""
    digest = hashlib.sha512(repr((group, list(tokens))).encode()).digest()
    return np.frombuffer(digest * (PAGE_BYTES // len(digest)), np.int8)


class Steps:
    """An engine; `turns`: its ranks hold the same bytes, else each a part of every page."""

    def __init__(self, config: VllmConfig, cache: KVCacheConfig, *, turns: bool = False) -> None:
        init_none_hash(sha256)
        self.cache = cache
        self.block_size = cache.kv_cache_groups[0].kv_cache_spec.block_size
        config.cache_config.num_gpu_blocks = cache.num_blocks
        self.scheduler = Scheduler(config, cache, Mock(), self.block_size)
        self.connector: Any = self.scheduler.connector
        self.ranks = config.parallel_config.world_size
        self.turns = turns
        width = PAGE_BYTES // (1 if turns else self.ranks)
        groups = range(len(cache.kv_cache_groups))
        self.memory = [
            [torch.zeros(cache.num_blocks, width, dtype=torch.int8) for _ in groups] for _ in range(self.ranks)
        ]
        self.workers = [self._worker(config, rank) for rank in range(self.ranks)]
        self.aggregator = KVOutputAggregator(self.ranks)
        self.hasher = get_request_block_hasher(self.block_size, sha256)
        self.requests: dict[str, Request] = {}
        self.blocks: dict[str, list[list[int]]] = {}
        self.computed: dict[str, int] = {}
        """Tokens that the model had to compute, by request."""
        self.finished: set[str] = set()
        self.failed_steps = 0
        """Steps in which vLLM was told of a failed load."""
        self.counted: dict[str, float] = {}
        """What the manager counted, by metric and labels."""
        really = self.manager.get_stats
        self.manager.get_stats = lambda: self._note(really())
        layouts = {(0, rank): Handshake(worker._worker.layout) for rank, worker in enumerate(self.workers)}
        self.connector.set_xfer_handshake_metadata_pp_aware(layouts)

    def _note(self, stats: Any) -> Any:
        for name, value in (stats.reduce() if stats is not None else {}).items():
            self.counted[name] = self.counted.get(name, 0) + value
        return stats

    def _worker(self, config: VllmConfig, rank: int) -> Any:
        connector: Any = CachesvcConnector(config, KVConnectorRole.WORKER, self.cache)
        pages = []
        for group, tensor in enumerate(self.memory[rank]):
            name = self.cache.kv_cache_groups[group].layer_names[0]
            if self.ranks == 1:
                pages.append([whole_page(name, tensor)])
            elif self.turns:
                pages.append([copy_page(name, tensor, rank, self.ranks)])
            else:
                pages.append([part_page(name, tensor, rank, self.ranks)])
        connector.connector_worker.worker = CachesvcWorker(pages, rank, self.ranks, "cpu", HostCopies())
        return connector

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.connector.shutdown()

    @property
    def manager(self) -> Any:
        return self.connector.scheduler.manager

    def joined(self) -> Steps:
        """Step until all of it is in the session."""
        membership = self.manager.membership
        session = wait_for(lambda: membership.session() or membership.closed)
        assert not membership.closed, membership.closed
        wait_for(lambda: session.channel.state is State.UP)
        self.step()
        for worker in self.workers:
            mine = worker._worker._member[1]
            wait_for(lambda mine=mine: mine.channel.state is State.UP)
        return self

    # --- a model ----------------------------------------------------------------------------------------------------

    def _write(self, group: int, block: int, tokens: Sequence[int]) -> None:
        whole = torch.from_numpy(bytes_of(group, tokens).copy())
        for rank in range(self.ranks):
            part = whole if self.ranks == 1 or self.turns else whole.reshape(self.ranks, -1)[rank]
            self.memory[rank][group][block] = part

    def _check(self, group: int, block: int, tokens: Sequence[int], what: str) -> None:
        whole = torch.from_numpy(bytes_of(group, tokens).copy())
        for rank in range(self.ranks):
            part = whole if self.ranks == 1 or self.turns else whole.reshape(self.ranks, -1)[rank]
            assert torch.equal(self.memory[rank][group][block], part), f"{what}: wrong bytes, group {group}"

    def _compute(self, name: str, start: int, count: int) -> None:
        """Check what the request stands on, write what it adds."""
        request, size = self.requests[name], self.block_size
        tokens = list(request.all_token_ids)
        for group, numbers in enumerate(self.blocks[name]):
            spec = self.cache.kv_cache_groups[group].kv_cache_spec
            seen = start - spec.sliding_window + 1 if isinstance(spec, SlidingWindowSpec) else 0
            for at in range(max(0, seen) // size, start // size):
                assert numbers[at], f"{name}: no block {at} of group {group}"
                self._check(group, numbers[at], tokens[: (at + 1) * size], name)
            for at in range(start // size, (start + count) // size):
                if numbers[at]:
                    self._write(group, numbers[at], tokens[: (at + 1) * size])
        self.computed[name] = self.computed.get(name, 0) + count

    def _run(self, output: Any) -> ModelRunnerOutput:
        for new in output.scheduled_new_reqs:
            self.blocks[new.req_id] = [list(numbers) for numbers in new.block_ids]
            self._compute(new.req_id, new.num_computed_tokens, output.num_scheduled_tokens[new.req_id])
        cached = output.scheduled_cached_reqs
        for name, more, start in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self.blocks[name] = [list(numbers) for numbers in more]
            elif more is not None:
                for numbers, some in zip(self.blocks[name], more, strict=True):
                    numbers.extend(some)
            self._compute(name, start, output.num_scheduled_tokens[name])
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.requests[name]
            done = request.num_computed_tokens >= request.num_tokens
            sampled.append([7] if done else [])
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        output = self.scheduler.schedule()
        metas = [pickle.loads(pickle.dumps(output.kv_connector_metadata)) for _ in self.workers]
        for worker, meta in zip(self.workers, metas, strict=True):
            worker.handle_preemptions(meta)
            worker.bind_connector_metadata(meta)
        ran = self._run(output)
        told = []
        for worker in self.workers:
            worker.start_load_kv(None)
            worker.wait_for_save()
            results = worker.get_transfer_results(output.finished_req_ids)
            mine = KVConnectorOutput(
                finished_sending=results.finished_sending,
                finished_recving=results.finished_recving,
                failed_recving=results.failed_recving,
                invalid_block_ids=worker.get_block_ids_with_load_errors(),
                kv_connector_worker_meta=worker.build_connector_worker_meta(),
            )
            worker.clear_connector_metadata()
            told.append(ModelRunnerOutput(ran.req_ids, ran.req_id_to_index, ran.sampled_token_ids))
            told[-1].kv_connector_output = mine
        whole = self.aggregator.aggregate(told)
        assert whole is not None
        assert whole.kv_connector_output is not None
        self.failed_steps += bool(
            whole.kv_connector_output.invalid_block_ids or whole.kv_connector_output.failed_recving
        )
        outputs = self.scheduler.update_from_output(output, whole)
        for some in outputs.values():
            self.finished |= {each.request_id for each in some.outputs if each.finish_reason is not None}

    def add(self, name: str, tokens: Sequence[int], *, output_tokens: int = 2, **params: Any) -> None:
        sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True, extra_args=params or None)
        sampling.update_from_generation_config({}, 1)
        self.requests[name] = Request(name, list(tokens), sampling, None, block_hasher=self.hasher)
        self.scheduler.add_request(self.requests[name])

    def until(self, what: Any) -> None:
        """Step until it is so."""

        def stepped() -> Any:
            answer = what()
            if not answer:
                self.step()
            return answer

        wait_for(stepped)

    def answer(self, name: str, tokens: Sequence[int], **options: Any) -> int:
        """Serve one request; how many tokens of it were computed here."""
        self.add(name, tokens, **options)
        self.until(lambda: name in self.finished)
        return self.computed[name]

    def settle(self) -> None:
        """Step until nothing is under way and the daemon knows it."""
        self.step()
        self.until(lambda: not self.connector.has_pending_push_work())
        session = self.manager.membership.session()
        wait_for(lambda: session is None or session.idle())

    def forget(self) -> None:
        """The engine's own prefix cache is empty; the connector hears nothing of it."""
        assert self.scheduler.reset_prefix_cache()
