"""What travels inside an engine: it survives pickle and vLLM's own ways of joining it."""

from __future__ import annotations

import pickle
from functools import reduce

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from cachesvc.connector.layout import GroupLayout, LayerPage, RankLayout
from cachesvc.connector.specs import GroupSlots, Handshake, Join, Metadata, SlotsSpec, WorkerMetadata
from cachesvc.types import Role

JOIN = Join("/s", b"s" * 16, b"n" * 16, "model", {"a": "b"}, (GroupLayout(2, 100, ((0,),)), GroupLayout(2, 8, ((0,),))))


def test_all_of_it_pickles() -> None:
    handshake = Handshake(RankLayout(0, 1, "cpu", ((LayerPage("a", 1, 1, agnostic=True),),)))
    assert pickle.loads(pickle.dumps(handshake)) == handshake
    assert pickle.loads(pickle.dumps(JOIN)) == JOIN
    spec = SlotsSpec(7, b"s" * 16, b"a" * 16, [GroupSlots([1], [2], [3]), GroupSlots()], [9], lost=True)
    again = pickle.loads(pickle.dumps(spec))
    assert vars(again) == vars(spec)
    outcomes = WorkerMetadata(outcomes={3: (1, 0)})
    assert pickle.loads(pickle.dumps(outcomes)) == outcomes


def test_a_join_is_an_identity_in_each_role() -> None:
    identity = JOIN.identity(Role.WORKER)
    identity.check()
    assert (identity.session, identity.role, identity.namespace) == (b"s" * 16, Role.WORKER, b"n" * 16)
    assert identity.chunk_bytes == (200, 16)
    assert identity.components == {"a": "b"}


def test_metadata_keeps_what_vllm_put_into_it() -> None:
    job = TransferJob("r", GPULoadStoreSpec([1], [1], [0]), SlotsSpec(1, b"", b"", [], []))
    meta = Metadata.around(OffloadingConnectorMetadata({1: job}, {2: job}, {3}), JOIN)
    assert isinstance(meta, OffloadingConnectorMetadata)
    assert (meta.load_jobs, meta.store_jobs, meta.jobs_to_flush, meta.join) == ({1: job}, {2: job}, {3}, JOIN)


def of_rank(jobs: dict[int, int], outcomes: dict[int, tuple[int, int]]) -> WorkerMetadata:
    meta = OffloadingWorkerMetadata()
    meta.completed_jobs.update(jobs)
    meta.transfer_stats.store.record(100, 0.5)
    return WorkerMetadata.around(meta, outcomes)


def test_outcomes_of_several_ranks_add_up() -> None:
    whole = reduce(
        lambda a, b: a.aggregate(b),
        [
            of_rank({1: 1, 2: 1}, {11: (1, 0), 12: (0, 1)}),
            of_rank({1: 1}, {11: (1, 0)}),
            of_rank({2: 1}, {12: (1, 0), 13: (0, 1)}),
        ],
    )
    assert isinstance(whole, WorkerMetadata)
    assert whole.outcomes == {11: (2, 0), 12: (1, 1), 13: (0, 1)}
    assert whole.completed_jobs == {1: 2, 2: 2}
    assert whole.transfer_stats.store.bytes == 300


def test_a_rank_may_have_nothing_of_ours_to_tell() -> None:
    whole = of_rank({1: 1}, {11: (1, 0)}).aggregate(OffloadingWorkerMetadata())
    assert whole.outcomes == {11: (1, 0)}
    alone = of_rank({}, {11: (1, 0)})
    assert alone.aggregate(of_rank({}, {})).outcomes == {11: (1, 0)}
    assert alone.outcomes == {11: (1, 0)}
