"""An engine as the connector sees it, without vLLM's scheduler and model: KV tensors, workers, a manager, a session.

Covers: pages of ranks that hold parts of the same canonical bytes, keys, transfers from end to end in one process, a
session that says what a test wants. Not here: real engines (`tests/engines`), the daemon (`tests.support.daemon`).
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_offload.base import CopyRun, GPULoadStoreSpec, LookupResult, OffloadKey, ReqContext, make_offload_key

from cachesvc.client.channel import State
from cachesvc.client.grants import Grant, Identity, KeyRun, Peek, Ticket
from cachesvc.connector.copies import Copies, HostCopies, Page
from cachesvc.connector.layout import LayerPage
from cachesvc.connector.membership import Membership
from cachesvc.connector.requests import Group, Limits
from cachesvc.connector.scheduler import CachesvcManager
from cachesvc.connector.specs import SlotsSpec
from cachesvc.connector.worker import CachesvcWorker
from cachesvc.types import AllocateState, KeyState, Role
from cachesvc.wire.messages import Slots
from tests.support.daemon import wait_for

TOKENS = 16
"""Of a block."""


def block_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def chain(name: str, count: int, group: int = 0, first: int = 0) -> list[OffloadKey]:
    """Keys of a prompt's chunks."""
    return [make_offload_key(block_hash(f"{name}-{i}"), group) for i in range(first, first + count)]


class Clock:
    """Real time, and as much more as a test adds."""

    def __init__(self) -> None:
        self.more = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.more


# --- KV caches ------------------------------------------------------------------------------------------------------


def memory(blocks: int, page_bytes: int, device: str = "cpu") -> torch.Tensor:
    """A layer's pages, as vLLM hands them over, of random bytes."""
    return torch.randint(-128, 128, (blocks, page_bytes), dtype=torch.int8).to(device)


def whole_page(name: str, tensor: torch.Tensor) -> Page:
    """Of an engine without parallelism."""
    size = tensor.shape[1]
    return Page(LayerPage(name, size, size, agnostic=True), tensor, (CopyRun(0, 0, size, 1, size, size),), (1, 0))


def own_page(name: str, tensor: torch.Tensor) -> Page:
    """A page that nobody certifies."""
    size = tensor.shape[1]
    layer = LayerPage(name, size, size, agnostic=False, own=True)
    return Page(layer, tensor, (CopyRun(0, 0, size, 1, size, size),), (1, 0))


def part_page(name: str, tensor: torch.Tensor, rank: int, world: int, *, tokens: int = 1) -> Page:
    """A rank's heads of a page: in the canonical page a token has the heads of all ranks one after the other."""
    local = tensor.shape[1]
    heads = local // tokens
    run = CopyRun(0, rank * heads, heads, tokens, heads, heads * world)
    return Page(LayerPage(name, local * world, local, agnostic=True), tensor, (run,), (1, 0))


def copy_page(name: str, tensor: torch.Tensor, rank: int, world: int) -> Page:
    """A page that every rank holds whole; they take turns in writing it."""
    size = tensor.shape[1]
    run = CopyRun(0, 0, size, 1, size, size)
    return Page(LayerPage(name, size, size, agnostic=True), tensor, (run,), (world, rank))


def blocks_of(sizes: Sequence[int], *groups: Sequence[int], first: Sequence[int] | None = None) -> GPULoadStoreSpec:
    """VLLM's side of a transfer: blocks of each group."""
    every = [block for group in groups for block in group]
    assert list(sizes) == [len(group) for group in groups]
    return GPULoadStoreSpec(every, list(sizes), list(first or [0] * len(groups)))


def blocks(*groups: Sequence[int], first: Sequence[int] | None = None) -> GPULoadStoreSpec:
    return blocks_of([len(group) for group in groups], *groups, first=first)


# --- an engine ------------------------------------------------------------------------------------------------------


class Engine:
    """A manager and the workers of all ranks. `pages[rank][group]` are the layers' pages."""

    def __init__(
        self,
        address: Path | str,
        pages: Sequence[Sequence[Sequence[Page]]],
        *,
        name: str,
        per_chunk: int = 1,
        groups: Sequence[Group] | None = None,
        limits: Limits | None = None,
        copies: Callable[[], Copies] = HostCopies,
    ) -> None:
        self.clock = Clock()
        self.pages = pages
        self.membership = Membership(str(address), name, per_chunk, lambda _, epoch: {"name": name, "epoch": epoch}, "")
        self.workers = [CachesvcWorker(mine, rank, len(pages), "cpu", copies()) for rank, mine in enumerate(pages)]
        groups = groups or [Group(g, TOKENS * per_chunk, True) for g in range(len(pages[0]))]
        self.manager = CachesvcManager(self.membership, groups, len(pages), limits or Limits(2.0, 0), self.clock)
        self._jobs = itertools.count(1)

    def __enter__(self) -> Engine:
        self.membership.told([worker.layout for worker in self.workers])
        self.join()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.manager.shutdown()

    @property
    def session(self) -> Any:
        session = self.membership.session()
        assert session is not None, self.membership.closed
        return session

    def join(self) -> None:
        """Everybody is in the session, and knows the memory there is."""
        wait_for(self.membership.session)
        join = wait_for(self.membership.take_join)
        for worker in self.workers:
            worker.join(join)
        self.up()

    def up(self) -> None:
        wait_for(lambda: self.session.channel.state is State.UP)
        for worker in self.workers:
            assert worker._member is not None
            session = worker._member[1]
            wait_for(lambda session=session: session.channel.state is State.UP)

    # --- steps ------------------------------------------------------------------------------------------------------

    def arrive(self, name: str, *keys: Sequence[OffloadKey]) -> ReqContext:
        self.manager.requests.arrive(name, None)
        context = ReqContext(name)
        self.manager.on_new_request(context)
        self.manager.requests.ask(name, keys)
        return context

    def ready(self, name: str, *keys: Sequence[OffloadKey], computed: int = 0) -> None:
        """VLLM asks each step until the answer is final."""
        wait_for(lambda: self.manager.requests.ready(name, lambda: keys, computed))

    def hits(self, context: ReqContext, keys: Sequence[OffloadKey]) -> int:
        """The leading run that vLLM finds."""
        found = [self.manager.lookup(key, context) is LookupResult.HIT for key in keys]
        return [*found, False].index(False)

    def submit_store(self, spec: SlotsSpec, gpu: GPULoadStoreSpec) -> int:
        number = next(self._jobs)
        for worker in self.workers:
            assert worker.submit_store(number, gpu, spec)
        return number

    def submit_load(self, spec: SlotsSpec, gpu: GPULoadStoreSpec) -> int:
        number = next(self._jobs)
        for worker in self.workers:
            assert worker.submit_load(number, spec, gpu)
        return number

    def settle(self, number: int) -> dict[int, tuple[int, int]]:
        """Wait for a job on every rank, tell the manager; how it ended."""
        whole: dict[int, tuple[int, int]] = {}
        for worker in self.workers:
            worker.wait({number})
            assert [result.success for result in worker.get_finished()] == [True]
            for transfer, (good, bad) in worker.take_outcomes().items():
                before = whole.get(transfer, (0, 0))
                whole[transfer] = before[0] + good, before[1] + bad
        self.manager.settle(whole)
        return whole

    def store(self, name: str, keys: Sequence[OffloadKey], gpu: GPULoadStoreSpec) -> tuple[int, int]:
        """Store blocks under keys (of all groups in a row) until all can read them; ranks that did it, that failed."""
        context = self.arrive(name)
        output = self.prepare_store(keys, context)
        assert output.keys_to_store == list(keys)
        number = self.submit_store(output.store_spec, gpu)
        (outcome,) = self.settle(number).values()
        self.manager.on_request_finished(context)
        wait_for(self.session.idle)
        return outcome

    def prepare_store(self, keys: Collection[OffloadKey], context: ReqContext) -> Any:
        """The first extent is made by the first that wants it: try again as vLLM would with the next prompt."""

        def offer() -> Any:
            self.manager.requests._requests[context.req_id].full.clear()
            output = self.manager.prepare_store(keys, context)
            return output if output.keys_to_store else None

        return wait_for(offer)

    def load(self, name: str, keys: Sequence[Sequence[OffloadKey]], gpu: GPULoadStoreSpec) -> tuple[int, int]:
        """Load blocks under the keys of each group."""
        context = self.arrive(name, *keys)
        self.ready(name, *keys)
        spec = self.manager.prepare_load([key for group in keys for key in group], context)
        (outcome,) = self.settle(self.submit_load(spec, gpu)).values()
        self.manager.on_request_finished(context)
        return outcome


@contextmanager
def alone(address: Path | str, tensors: Sequence[torch.Tensor], **options: Any) -> Iterator[Engine]:
    """An engine of one rank and one KV group."""
    pages = [[[whole_page(f"l{i}", tensor) for i, tensor in enumerate(tensors)]]]
    with Engine(address, pages, **options) as engine:
        yield engine


# --- a session that says what a test wants --------------------------------------------------------------------------


class FakeChannel:
    def __init__(self, session: FakeSession) -> None:
        self.state = State.UP
        self.misses = 0
        self._session = session

    def listen(self) -> None:
        if self._session.prompt:
            self._session.answer()

    def missed(self) -> None:
        self.misses += 1
        self.state = State.DOWN


class FakeSession:
    """Chunks are in `there`; questions are answered with the next `listen` if `prompt`, else by `answer`."""

    def __init__(self, groups: int = 1) -> None:
        sizes = tuple(4096 * (g + 1) for g in range(groups))
        self.identity = Identity(b"s" * 16, Role.SCHEDULER, b"n" * 16, "fake", {}, sizes)
        self.arena = b"a" * 16
        self.refusal = ""
        self.channel = FakeChannel(self)
        self.prompt = True
        self.there: dict[tuple[int, bytes], KeyState] = {}
        self.writable: dict[bytes, AllocateState] = {}
        self.asked: list[tuple[Peek, list[KeyRun]]] = []
        self.peeks: list[tuple[int, bool]] = []
        """(request, touch) of every question."""
        self.leases: set[int] = set()
        self.writes: set[int] = set()
        self.sealed: list[bytes] = []
        self.aborted: list[bytes] = []
        self.ended: list[int] = []
        self.lost_next = False
        self._keys: dict[int, list[bytes]] = {}
        self._numbers = itertools.count(1)

    def put(self, keys: Sequence[OffloadKey], state: KeyState = KeyState.RAM) -> None:
        for key in keys:
            self.there[int.from_bytes(key[-4:], "big"), key[:-4]] = state

    def state(self, group: int, key: bytes) -> KeyState:
        return self.there.get((group, key), KeyState.NEVER_STORED)

    def peek(self, runs: Sequence[KeyRun], *, request: int = 0, touch: bool = False) -> Peek | None:
        if self.channel.state is not State.UP:
            return None
        peek = Peek([len(run) for run in runs if len(run)])
        self.asked.append((peek, list(runs)))
        self.peeks.append((request, touch))
        return peek

    def answer(self) -> None:
        """Answer everything that was asked."""
        asked, self.asked = self.asked, []
        for peek, runs in asked:
            for part, run in enumerate(run for run in runs if len(run)):
                peek.take(part, bytes(self.state(run.group, key) for key in run.keys))

    def lease(self, run: KeyRun, deadline: float, *, request: int = 0, prefix: bool = True) -> Grant:
        states = [self.state(run.group, key) for key in run.keys]
        if self.channel.state is not State.UP:
            states = [KeyState.DAEMON_DOWN] * len(states)
        if prefix:
            gap = next((i for i, state in enumerate(states) if state != KeyState.RAM), len(states))
            states = states[:gap] + [state if state != KeyState.RAM else states[gap] for state in states[gap:]]
        leased = [key for key, state in zip(run.keys, states, strict=True) if state == KeyState.RAM]
        grant = Grant(bytes(states))
        if leased:
            grant.tickets.append(self._open(self.leases, run.group, leased))
        return grant

    def release(self, grant: Grant, *, along: bool = False) -> None:
        for ticket in grant.tickets:
            self.leases.remove(ticket.number)

    def allocate(self, run: KeyRun, deadline: float, *, request: int = 0) -> Grant:
        states = [self.writable.get(key, AllocateState.NEW) for key in run.keys]
        if self.channel.state is not State.UP:
            states = [AllocateState.RETRY] * len(states)
        new = [key for key, state in zip(run.keys, states, strict=True) if state == AllocateState.NEW]
        grant = Grant(bytes(states))
        if new:
            grant.tickets.append(self._open(self.writes, run.group, new))
        return grant

    def abort(self, grant: Grant) -> None:
        for ticket in grant.tickets:
            self.writes.remove(ticket.number)
            self.aborted += self._keys[ticket.number]

    def seal_soon(self, grant: Grant, lengths: Sequence[int], deadline: float) -> bool:
        (ticket,) = grant.tickets
        assert len(lengths) == len(ticket.slots)
        self.writes.remove(ticket.number)
        if ticket.lost or self.channel.state is not State.UP:
            return False
        self.sealed += self._keys[ticket.number]
        return True

    def end_requests(self, requests: Sequence[int]) -> None:
        self.ended += requests

    def _open(self, tickets: set[int], group: int, keys: Sequence[bytes]) -> Ticket:
        number = next(self._numbers)
        tickets.add(number)
        self._keys[number] = list(keys)
        slots = Slots([group] * len(keys), list(range(len(keys))), [number] * len(keys))
        return Ticket(number, slots, lost=self.lost_next)


class FakeMembership:
    """In one session after the other."""

    def __init__(self, *sessions: FakeSession | None) -> None:
        self._sessions = list(sessions)
        self.renewed = 0
        self.closed = ""

    def session(self) -> Any:
        return self._sessions[0]

    def renew(self) -> None:
        self.renewed += 1
        if len(self._sessions) > 1:
            del self._sessions[0]

    def close(self) -> None:
        self.closed = "closed"
