"""One rank's copies, through the extents of a real daemon: right bytes, or a failed transfer that is told as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec

from cachesvc.client.channel import State
from cachesvc.connector.copies import HostCopies, Page, TorchCopies
from cachesvc.connector.layout import Piece, join
from cachesvc.connector.requests import Group
from cachesvc.connector.specs import GroupSlots, Join, SlotsSpec
from cachesvc.connector.worker import JOINED_S, CachesvcWorker
from tests.support.daemon import HANG_S, Daemon, shared_directory, wait_for
from tests.support.fake_daemon import FakeDaemon
from tests.support.kv import (
    Engine,
    alone,
    blocks,
    chain,
    copy_page,
    memory,
    own_page,
    part_page,
    whole_page,
)

pytestmark = pytest.mark.usefixtures("patient")


def torch_copies() -> TorchCopies:
    return TorchCopies(torch.device("cpu"))


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One that a test may kill."""
    with shared_directory() as arena_dir, Daemon(tmp_path, arena_dir) as daemon:
        yield daemon


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [HostCopies, torch_copies])
def test_what_is_stored_is_loaded_by_another_engine(copies: Any, daemon: Daemon) -> None:
    name = copies.__name__
    first, second = [memory(8, 4096), memory(8, 1000)], [memory(8, 4096), memory(8, 1000)]
    untouched = [tensor.clone() for tensor in second]
    keys = chain("p", 3)
    with (
        alone(daemon.socket(), first, name=name) as writer,
        alone(daemon.socket(), second, name=name, copies=copies) as reader,
    ):
        assert writer.store("w", keys, blocks([5, 6, 1])) == (1, 0)
        assert reader.load("r", [keys], blocks([2, 0, 7])) == (1, 0)
    for mine, theirs, before in zip(second, first, untouched, strict=True):
        assert torch.equal(mine[[2, 0, 7]], theirs[[5, 6, 1]])
        assert torch.equal(mine[[1, 3, 4, 5, 6]], before[[1, 3, 4, 5, 6]])


@pytest.mark.parametrize("copies", [HostCopies, torch_copies])
def test_chunks_of_several_blocks_are_loaded_from_the_middle(copies: Any, daemon: Daemon) -> None:
    name = f"middle-{copies.__name__}"
    first, second = [memory(16, 512)] * 1, [memory(16, 512)]
    before = second[0].clone()
    keys = chain("p", 3)
    with alone(daemon.socket(), first, name=name, per_chunk=4, copies=copies) as writer:
        assert writer.store("w", keys, blocks(range(1, 13))) == (1, 0)
        with alone(daemon.socket(), second, name=name, per_chunk=4, copies=copies) as reader:
            # vLLM has the first five blocks itself, and wants eleven of twelve: blocks 5 ... 10 of its request
            assert reader.load("r", [keys[1:]], blocks([15, 0, 3, 4, 5, 9], first=[5])) == (1, 0)
    assert torch.equal(second[0][[15, 0, 3, 4, 5, 9]], first[0][6:12])
    others = [1, 2, 6, 7, 8, 10, 11, 12, 13, 14]
    assert torch.equal(second[0][others], before[others])


def two_groups() -> list[list[list[Page]]]:
    return [
        [[whole_page("full", memory(8, 4096))], [whole_page("sw1", memory(8, 512)), whole_page("sw2", memory(8, 64))]]
    ]


def test_groups_have_chunks_of_their_own(daemon: Daemon) -> None:
    first, second = two_groups(), two_groups()
    full, window = chain("p", 3), chain("p", 1, group=1, first=2)
    groups = [Group(0, 16, True), Group(1, 16, False)]
    with (
        Engine(daemon.socket(), first, name="groups", groups=groups) as writer,
        Engine(daemon.socket(), second, name="groups", groups=groups) as reader,
    ):
        assert writer.store("w", full + window, blocks([1, 2, 3], [6])) == (1, 0)
        assert reader.load("r", [full, chain("p", 3, group=1)], blocks([4, 5, 6], [])) == (0, 1), "slots without blocks"
        reader.clock.more = 5
        context = reader.arrive("r2", full, chain("p", 3, group=1))
        reader.ready("r2", full, chain("p", 3, group=1))
        spec = reader.manager.prepare_load(full + window, context)
        number = reader.submit_load(spec, blocks([4, 5, 6], [0], first=[0, 2]))
        assert list(reader.settle(number).values()) == [(1, 0)]
    assert torch.equal(second[0][0][0].tensor[[4, 5, 6]], first[0][0][0].tensor[[1, 2, 3]])
    for layer in range(2):
        assert torch.equal(second[0][1][layer].tensor[0], first[0][1][layer].tensor[6])


# --- ranks ----------------------------------------------------------------------------------------------------------


def split(whole: torch.Tensor, world: int, tokens: int) -> list[torch.Tensor]:
    parts = whole.reshape(whole.shape[0], tokens, world, -1)
    return [parts[:, :, rank].reshape(whole.shape[0], -1).contiguous() for rank in range(world)]


def test_two_ranks_and_one_read_each_others_bytes(daemon: Daemon) -> None:
    tokens, whole, other = 16, memory(6, 4096), memory(6, 4096)
    parts = split(whole, 2, tokens)
    there = [torch.zeros_like(part) for part in parts]
    two = [[[part_page("l", part, rank, 2, tokens=tokens)]] for rank, part in enumerate(parts)]
    back = [[[part_page("l", part, rank, 2, tokens=tokens)]] for rank, part in enumerate(there)]
    keys, more = chain("two", 2), chain("one", 2)
    with Engine(daemon.socket(), two, name="tp") as wide, alone(daemon.socket(), [other], name="tp") as narrow:
        assert wide.store("w", keys, blocks([1, 2])) == (2, 0)
        assert narrow.load("r", [keys], blocks([4, 5])) == (1, 0)
        assert torch.equal(other[[4, 5]], whole[[1, 2]])
        assert narrow.store("w", more, blocks([0, 4])) == (1, 0)
        with Engine(daemon.socket(), back, name="tp") as wide_again:
            assert wide_again.load("r", [more], blocks([0, 3])) == (2, 0)
    for rank, part in enumerate(split(other, 2, tokens)):
        assert torch.equal(there[rank][[0, 3]], part[[0, 4]])


def test_ranks_that_hold_the_same_take_turns_in_writing(daemon: Daemon) -> None:
    ranks = [memory(8, 4096) for _ in range(4)]
    pages = [[[copy_page("l", tensor, rank, 4)]] for rank, tensor in enumerate(ranks)]
    target = memory(8, 4096)
    written: list[int] = []
    with (
        Engine(daemon.socket(), pages, name="turns") as writer,
        alone(daemon.socket(), [target], name="turns") as reader,
    ):
        context = writer.arrive("w")
        output = writer.prepare_store(chain("p", 6), context)
        number = writer.submit_store(output.store_spec, blocks([1, 2, 3, 4, 5, 6]))
        for worker in writer.workers:
            worker.wait({number})
            (result,) = worker.get_finished()
            written.append(result.transfer_size or 0)
            writer.manager.settle(worker.take_outcomes())
        assert reader.load("r", [chain("p", 6)], blocks([0, 1, 2, 3, 4, 5])) == (1, 0)
        # every rank needs all of it back
        other = [memory(8, 4096) for _ in range(4)]
        everywhere = [[[copy_page("l", tensor, rank, 4)]] for rank, tensor in enumerate(other)]
        with Engine(daemon.socket(), everywhere, name="turns") as again:
            assert again.load("r", [chain("p", 6)], blocks([0, 1, 2, 3, 4, 5])) == (4, 0)
    assert sum(written) == 6 * 4096
    assert written == [4096, 2 * 4096, 2 * 4096, 4096]
    for i, block in enumerate([1, 2, 3, 4, 5, 6]):
        assert torch.equal(target[i], ranks[block % 4][block])
        assert all(torch.equal(tensor[i], target[i]) for tensor in other)


def test_uncertified_pages_of_ranks_lie_side_by_side(daemon: Daemon) -> None:
    first = [[memory(4, 512), memory(4, 512)], [memory(4, 512), memory(4, 512)]]
    second = [[torch.zeros_like(tensor) for tensor in rank] for rank in first]

    def pages(tensors: list[list[torch.Tensor]]) -> list[list[list[Page]]]:
        return [[[own_page("a", rank[0]), own_page("b", rank[1])]] for rank in tensors]

    keys = chain("p", 2)
    with (
        Engine(daemon.socket(), pages(first), name="own") as writer,
        Engine(daemon.socket(), pages(second), name="own") as reader,
    ):
        assert writer.store("w", keys, blocks([1, 2])) == (2, 0)
        assert reader.load("r", [keys], blocks([3, 0])) == (2, 0)
    for before, after in zip(first, second, strict=True):
        for layer in range(2):
            assert torch.equal(after[layer][[3, 0]], before[layer][[1, 2]])


# --- blocks and slots that don't fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpu",
    [
        blocks([1, 2, 3]),
        blocks([1, 2, 3, 4, 5]),
        blocks([2, 3, 4], first=[1]),
        blocks([1, 2, 3, 4], first=[1]),
        blocks([]),
        blocks([1, 2], [3, 4]),
        blocks([1, 2, 3, 99]),
    ],
)
def test_a_store_that_does_not_fit_fails(gpu: GPULoadStoreSpec, daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="misfit", per_chunk=2) as engine:
        context = engine.arrive("w")
        keys = chain("misfit", 2)
        output = engine.prepare_store(keys, context)
        (outcome,) = engine.settle(engine.submit_store(output.store_spec, gpu)).values()
        assert outcome == (0, 1)
        engine.arrive("r", keys)
        engine.ready("r", keys)
        assert engine.hits(context, keys) == 0


@pytest.mark.parametrize(
    "gpu", [blocks([1, 2]), blocks([1, 2, 3, 4, 5]), blocks([1, 2, 3, 4], first=[1]), blocks([1, 2, 3, 99])]
)
def test_a_load_that_does_not_fit_fails_and_names_its_blocks(gpu: GPULoadStoreSpec, daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="misload", per_chunk=2) as engine:
        keys = chain(str(time.monotonic_ns()), 2)
        assert engine.store("w", keys, blocks([1, 2, 3, 4])) == (1, 0)
        context = engine.arrive("r", keys)
        engine.ready("r", keys)
        number = engine.submit_load(engine.manager.prepare_load(keys, context), gpu)
        (worker,) = engine.workers
        worker.wait({number})
        assert worker.take_failed_loads() == {}, "not before vLLM hears that it ended"
        worker.get_finished()
        assert worker.take_failed_loads() == {number: gpu.block_ids.tolist()}
        assert worker.take_failed_loads() == {}
        assert list(worker.take_outcomes().values()) == [(0, 1)]
        assert worker.take_outcomes() == {}


# --- slots that aren't ours any more --------------------------------------------------------------------------------


def tampered(spec: SlotsSpec, **changes: Any) -> SlotsSpec:
    fields = {"lost": False} | {
        name: getattr(spec, name) for name in ("number", "session", "arena", "groups", "tickets")
    }
    return SlotsSpec(**(fields | changes))


def older(spec: SlotsSpec) -> list[GroupSlots]:
    return [GroupSlots(g.extents, g.slots, [generation - 1 for generation in g.generations]) for g in spec.groups]


def test_a_slot_that_was_given_to_somebody_else_fails_the_load(daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="reused") as engine:
        keys = chain("p", 2)
        assert engine.store("w", keys, blocks([1, 2])) == (1, 0)
        context = engine.arrive("r", keys)
        engine.ready("r", keys)
        spec = engine.manager.prepare_load(keys, context)
        number = engine.submit_load(tampered(spec, groups=older(spec)), blocks([5, 6]))
        (worker,) = engine.workers
        worker.wait({number})
        worker.get_finished()
        assert worker.take_failed_loads() == {number: [5, 6]}


class Pausing(HostCopies):
    """Stops in the middle of a job until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.pause = False
        self.copied = 0

    def copy(self, page: Page, extent: memoryview, piece: Piece, offset: int, *, store: bool) -> int:
        copied = super().copy(page, extent, piece, offset, store=store)
        self.copied += 1
        if self.pause:
            self.reached.set()
            assert self.go_on.wait(HANG_S)
        return copied


def test_a_slot_that_is_given_away_during_the_copy_fails_the_load(tmp_path: Path) -> None:
    copies = Pausing()
    with FakeDaemon(tmp_path) as fake, alone(fake.path, [memory(8, 4096)], name="m", copies=lambda: copies) as engine:
        keys = chain("p", 1)
        assert engine.store("w", keys, blocks([1])) == (1, 0)
        context = engine.arrive("r", keys)
        wait_for(lambda: keys[0][:-4] in fake.chunks)
        engine.ready("r", keys)
        assert engine.hits(context, keys) == 1
        copies.pause = True
        number = engine.submit_load(engine.manager.prepare_load(keys, context), blocks([5]))
        assert copies.reached.wait(HANG_S)
        assert engine.workers[0].get_finished() == []
        fake.evict(keys[0][:-4])
        copies.go_on.set()
        assert list(engine.settle(number).values()) == [(0, 1)]


def test_a_slot_that_is_not_given_out_is_not_written(daemon: Daemon) -> None:
    copies = Pausing()
    with alone(daemon.socket(), [memory(8, 4096)], name="sealed", copies=lambda: copies) as engine:
        keys = chain("p", 1)
        context = engine.arrive("w")
        spec = engine.prepare_store(keys, context).store_spec
        assert list(engine.settle(engine.submit_store(spec, blocks([1]))).values()) == [(1, 0)]
        assert copies.copied == 1
        wait_for(engine.session.idle)
        assert engine.session.unsealed == 0
        # the same slot, sealed by now; and another generation of it
        for groups in spec.groups, older(spec):
            number = engine.submit_store(tampered(spec, number=99, groups=groups), blocks([2]))
            assert engine.settle(number) == {99: (0, 1)}
        assert copies.copied == 1


@pytest.mark.parametrize("changes", [{"lost": True}, {"session": b"other session..."}, {"arena": b"another arena..."}])
@pytest.mark.parametrize("store", [True, False])
def test_specs_of_elsewhere_fail(changes: dict[str, Any], store: bool, daemon: Daemon) -> None:
    copies = Pausing()
    with alone(daemon.socket(), [memory(8, 4096)], name="elsewhere", copies=lambda: copies) as engine:
        keys = chain(str(time.monotonic_ns()), 1)
        context = engine.arrive("w", keys)
        spec = engine.prepare_store(keys, context).store_spec
        if not store:
            engine.settle(engine.submit_store(spec, blocks([1])))
            engine.ready("w", keys)
            spec = engine.manager.prepare_load(keys, context)
        done = copies.copied
        submit = engine.submit_store if store else engine.submit_load
        assert list(engine.settle(submit(tampered(spec, **changes), blocks([2]))).values()) == [(0, 1)]
        assert copies.copied == done


def test_an_extent_that_cannot_be_mapped_fails(daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="unmapped") as engine:
        context = engine.arrive("w")
        spec = engine.prepare_store(chain("p", 1), context).store_spec
        groups = [GroupSlots([77], g.slots, g.generations) for g in spec.groups]
        (outcome,) = engine.settle(engine.submit_store(tampered(spec, groups=groups), blocks([1]))).values()
        assert outcome == (0, 1)


# --- no daemon ------------------------------------------------------------------------------------------------------


def lonely(copies: Any = HostCopies) -> CachesvcWorker:
    return CachesvcWorker([[whole_page("l", memory(8, 4096))]], 0, 1, "cpu", copies())


def a_join(worker: CachesvcWorker, address: Path | str, session: bytes = b"s" * 16) -> Join:
    return Join(str(address), session, b"n" * 16, "lonely", {"name": "lonely"}, join([worker.layout], 1))


def a_spec(session: bytes = b"s" * 16, number: int = 5) -> SlotsSpec:
    return SlotsSpec(number, session, b"a" * 16, [GroupSlots([1], [0], [1])], [3])


def outcome_of(worker: CachesvcWorker, number: int) -> dict[int, tuple[int, int]]:
    worker.wait({number})
    assert [(result.job_id, result.success) for result in worker.get_finished()] == [(number, True)]
    return worker.take_outcomes()


def test_a_worker_that_never_joined_fails_everything() -> None:
    worker = lonely()
    assert worker.submit_store(1, blocks([1]), a_spec())
    assert outcome_of(worker, 1) == {5: (0, 1)}
    assert worker.submit_load(2, a_spec(), blocks([3]), expedited=True)
    assert outcome_of(worker, 2) == {5: (0, 1)}
    assert worker.take_failed_loads() == {2: [3]}
    worker.shutdown()


def test_without_a_daemon_many_jobs_together_wait_for_one_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    really = CachesvcWorker._joined

    def joined(session: Any, until: float) -> bool:
        waits.append(until - time.monotonic())
        return really(session, until)

    monkeypatch.setattr(CachesvcWorker, "_joined", staticmethod(joined))
    worker = lonely()
    worker.join(a_join(worker, tmp_path / "nobody.sock"))
    for number in range(1, 6):
        worker.submit_store(number, blocks([1]), a_spec(number=number))
    worker.wait(set(range(1, 6)))
    assert len(worker.get_finished()) == 5
    assert worker.take_outcomes() == dict.fromkeys(range(1, 6), (0, 1))
    assert all(wait < JOINED_S / 2 for wait in waits[1:]), "the first has used up the time of all"
    worker.shutdown()


def test_a_daemon_that_refuses_the_worker(daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="refuses") as engine:
        namespace = engine.session.identity.namespace
        worker = CachesvcWorker([[whole_page("l", memory(8, 12288))]], 0, 1, "cpu", HostCopies())
        told = Join(str(daemon.socket()), b"t" * 16, namespace, "", {"name": "refuses"}, join([worker.layout], 1))
        worker.join(told)
        worker.submit_load(1, a_spec(b"t" * 16), blocks([1]))
        assert outcome_of(worker, 1) == {5: (0, 1)}
        assert worker.take_failed_loads() == {1: [1]}
        worker.shutdown()


def test_a_daemon_with_another_arena_gets_nothing_written(tmp_path: Path) -> None:
    """It died and came back empty: its slots have the same numbers, and are given to others."""
    copies = Pausing()
    with FakeDaemon(tmp_path) as fake, alone(fake.path, [memory(8, 4096)], name="m", copies=lambda: copies) as engine:
        context = engine.arrive("w")
        spec = engine.prepare_store(chain("p", 1), context).store_spec
        old = spec.groups[0]
        fake.stop()
        fake.restart(cold=True)
        wait_for(lambda: engine.session.arena == fake.arena)
        engine.up()
        # as bad as it can be: the new arena has the very same place, in writing for somebody else
        (extent,) = fake.extents.values()
        wanted = GroupSlots([extent.number], old.slots, old.generations)
        extent.mark(old.slots[0], old.generations[0], 1)
        (worker,) = engine.workers
        assert worker._member is not None
        wait_for(lambda: extent.number in worker._member[1].extents.mapped)
        assert worker._member[1].extents.mapped[extent.number].writing(old.slots[0], old.generations[0])
        number = engine.submit_store(tampered(spec, groups=[wanted]), blocks([1]))
        assert list(engine.settle(number).values()) == [(0, 1)]
        assert copies.copied == 0


def test_a_daemon_that_dies_during_a_copy(own_daemon: Daemon) -> None:
    """The copy ends, the store is sealed when the daemon is back."""
    copies = Pausing()
    keys = chain("p", 2)
    with alone(own_daemon.socket(), [memory(8, 4096)], name="dies", copies=lambda: copies) as engine:
        context = engine.arrive("w")
        spec = engine.prepare_store(keys, context).store_spec
        copies.pause = True
        number = engine.submit_store(spec, blocks([1, 2]))
        assert copies.reached.wait(HANG_S)
        own_daemon.stop(9)
        wait_for(lambda: engine.session.channel.state is not State.UP)
        copies.go_on.set()
        assert list(engine.settle(number).values()) == [(1, 0)]
        assert engine.manager.has_pending_work()
        own_daemon.start()
        engine.up()
        engine.manager.settle({})
        assert not engine.manager.has_pending_work()
        wait_for(engine.session.idle)
        assert engine.session.unsealed == 0
        assert engine.load("r", [keys], blocks([5, 6])) == (1, 0)
        tensor = engine.pages[0][0][0].tensor
        assert torch.equal(tensor[[5, 6]], tensor[[1, 2]])


# --- waiting, joining, ending ---------------------------------------------------------------------------------------


def test_wait_returns_when_the_copies_have_ended(daemon: Daemon) -> None:
    copies = Pausing()
    with alone(daemon.socket(), [memory(8, 4096)], name="waits", copies=lambda: copies) as engine:
        context = engine.arrive("w")
        spec = engine.prepare_store(chain("p", 1), context).store_spec
        copies.pause = True
        number = engine.submit_store(spec, blocks([1]))
        (worker,) = engine.workers
        returned = threading.Event()

        def wait() -> None:
            worker.wait({number, 12345})
            returned.set()

        threading.Thread(target=wait, daemon=True).start()
        assert copies.reached.wait(HANG_S)
        assert not returned.wait(0.05)
        assert worker.get_finished() == []
        copies.go_on.set()
        assert returned.wait(HANG_S)
        (result,) = worker.get_finished()
        assert (result.job_id, result.success, result.transfer_size) == (number, True, 4096)
        assert result.transfer_time > 0
        worker.wait({number})
        engine.manager.settle(worker.take_outcomes())


def test_a_fault_of_one_job_is_its_own(daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="fault") as engine:
        context = engine.arrive("w")
        spec = engine.prepare_store(chain("p", 1), context).store_spec
        bad = engine.submit_store(tampered(spec, groups=[GroupSlots([1], [], [])]), blocks([1]))
        good = engine.submit_store(spec, blocks([1]))
        (worker,) = engine.workers
        worker.wait({bad, good})
        assert [result.job_id for result in worker.get_finished()] == [bad, good]
        engine.manager.settle(worker.take_outcomes())


def test_a_fault_of_the_copy_ends_the_copies_that_began(daemon: Daemon) -> None:
    class Breaking(HostCopies):
        calls: list[str] = []  # noqa: RUF012

        def begin(self, fence: Any) -> None:
            self.calls.append("begin")

        def copy(self, page: Page, extent: memoryview, piece: Piece, offset: int, *, store: bool) -> int:
            self.calls.append("copy")
            raise RuntimeError("an illegal memory access was encountered")

        def end(self) -> None:
            self.calls.append("end")

    with alone(daemon.socket(), [memory(8, 4096)], name="breaks", copies=Breaking) as engine:
        keys = chain("p", 1)
        context = engine.arrive("w", keys)
        spec = engine.prepare_store(keys, context).store_spec
        assert list(engine.settle(engine.submit_store(spec, blocks([1]))).values()) == [(0, 1)]
        assert Breaking.calls == ["begin", "copy", "end"]
        assert engine.session.idle(), "aborted"


def test_the_fence_is_of_the_moment_of_submitting(daemon: Daemon) -> None:
    class Fencing(HostCopies):
        def __init__(self) -> None:
            super().__init__()
            self.fences, self.begun = 0, []  # type: ignore[var-annotated]

        def fence(self) -> Any:
            self.fences += 1
            return self.fences

        def begin(self, fence: Any) -> None:
            self.begun.append(fence)

    copies = Fencing()
    with alone(daemon.socket(), [memory(8, 4096)], name="fences", copies=lambda: copies) as engine:
        assert engine.store("w", chain("p", 1), blocks([1])) == (1, 0)
        assert engine.store("w", chain("q", 1), blocks([1])) == (1, 0)
    assert copies.begun == [1, 2]


def test_a_new_session_fails_what_was_to_be_copied_in_the_old_one(daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="renewed") as engine:
        context = engine.arrive("w")
        keys = chain("p", 1)
        spec = engine.prepare_store(keys, context).store_spec
        old = engine.session
        engine.manager.reset_cache()
        engine.join()
        assert engine.session is not old
        assert list(engine.settle(engine.submit_store(spec, blocks([1]))).values()) == [(0, 1)]
        wait_for(lambda: old.channel.state is State.CLOSED)
        engine.manager.on_request_finished(context)
        assert engine.store("w2", keys, blocks([1])) == (1, 0)


def test_shutdown_ends_what_is_queued_and_leaves(daemon: Daemon) -> None:
    with alone(daemon.socket(), [memory(8, 4096)], name="ends") as engine:
        context = engine.arrive("w")
        spec = engine.prepare_store(chain("p", 1), context).store_spec
        number = engine.submit_store(spec, blocks([1]))
        (worker,) = engine.workers
        assert worker._member is not None
        session = worker._member[1]
        worker.shutdown()
        worker.wait({number})
        assert [result.job_id for result in worker.get_finished()] == [number]
        engine.manager.settle(worker.take_outcomes())
        wait_for(lambda: session.channel.state is State.CLOSED)
        worker.shutdown()


def test_a_worker_without_jobs_has_no_thread() -> None:
    before = {thread.name for thread in threading.enumerate()}
    worker = lonely()
    assert worker.get_finished() == []
    worker.wait({1, 2})
    assert {thread.name for thread in threading.enumerate()} == before
    worker.shutdown()
