"""The worker's side: copies between the KV cache of one rank and slots.

Covers: joining the session, copying in a thread of its own, checking what was copied, telling how it ended. Not here:
which slots (`connector.scheduler`), where in a slot (`connector.layout`), how bytes move (`connector.copies`).

A job::

    submit_* (engine's thread) --> queue --> copy thread: mapped? still ours? copy; still ours? --> done
                                                                                                     |
    get_finished (engine's thread) takes what is done; the rank's word goes to the scheduler <-------+

vLLM is always told that a job succeeded (it would end the worker otherwise); what really happened goes beside it: each
rank tells for each transfer whether it did its part, and a failed load also names its blocks, in the same step.

A load is checked after the copy: the slot's word in its table must still be that of the leased generation, or the bytes
may be somebody else's. A store is checked before: the slot must be given out to its ticket.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult

from cachesvc.client.channel import State
from cachesvc.client.keeper import Keeper
from cachesvc.client.mappings import Mapping
from cachesvc.client.session import Session
from cachesvc.connector.copies import Copies, Page
from cachesvc.connector.guard import tell
from cachesvc.connector.layout import GroupLayout, Piece, RankLayout, pieces, rows
from cachesvc.connector.membership import enter
from cachesvc.connector.specs import GroupSlots, Join, SlotsSpec
from cachesvc.types import Role

JOINED_S: Final = 1.0
"""How long after it was submitted a job waits for its session: a worker joins when the scheduler has."""

MAPPED_S: Final = 0.5
STOP_S: Final = 2.0


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    """vLLM's."""
    store: bool
    blocks: GPULoadStoreSpec
    slots: SlotsSpec
    fence: Any
    """Of the engine's own work on the KV cache, as `Copies.fence` gave it."""
    submitted_at: float
    good: bool = False
    copied_bytes: int = 0
    done_at: float = 0.0
    finished: threading.Event = field(default_factory=threading.Event)


class _Move(NamedTuple):
    page: Page
    extent: memoryview
    piece: Piece
    offset: int
    """Of the page in the rows."""


class CachesvcWorker(OffloadingWorker):
    """One rank's copies. Owns a copy thread, and the rank's part in the session, until `shutdown`."""

    def __init__(self, pages: Sequence[Sequence[Page]], rank: int, world: int, memory: str, copies: Copies) -> None:
        """`pages[g]`: the layers of KV group g; `memory`: what decides how their bytes are to be read."""
        self._pages = pages
        self.layout = RankLayout(
            rank, world, memory, tuple(tuple(page.layer for page in pages) for pages in self._pages)
        )
        self._rank = rank
        self._copies = copies
        self._member: tuple[Join, Session, Keeper] | None = None
        self._jobs: dict[int, _Job] = {}
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._outcomes: dict[int, tuple[int, int]] = {}
        self._failed_loads: dict[int, list[int]] = {}
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()  # a job has ended since the last `get_finished`

    # --- the façade, in the engine's thread -----------------------------------------------------------------------

    def join(self, join: Join) -> None:
        """Write and read in this session from now on. Jobs of another one that are still to be copied fail."""
        self._leave(0.0)
        self._member = (join, *enter(join, Role.WORKER))

    def take_outcomes(self) -> dict[int, tuple[int, int]]:
        """Transfers that ended here since the last time: number -> (1, 0) for done, (0, 1) for failed."""
        outcomes, self._outcomes = self._outcomes, {}
        return outcomes

    def take_failed_loads(self) -> dict[int, list[int]]:
        """Loads reported as finished that have failed: vLLM's job -> its blocks."""
        failed, self._failed_loads = self._failed_loads, {}
        return failed

    def linger(self, seconds: float) -> None:
        """Wait a moment for a load to end, if there is one: the engine has nothing else to do."""
        if any(not job.store for job in self._jobs.values()):
            self._ended.wait(seconds)

    # --- what vLLM calls, in the engine's thread ------------------------------------------------------------------

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: SlotsSpec) -> bool:
        """Copy blocks to slots."""
        return self._submit(_Job(job_id, True, src_spec, dst_spec, self._copies.fence(), time.monotonic()))

    def submit_load(
        self,
        job_id: int,
        src_spec: SlotsSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        """Copy slots to blocks."""
        return self._submit(_Job(job_id, False, dst_spec, src_spec, self._copies.fence(), time.monotonic()))

    def get_finished(self) -> list[TransferResult]:
        """Jobs that ended; always with success, see the module's docstring."""
        results = []
        self._ended.clear()
        while not self._done.empty():
            job = self._done.get()
            del self._jobs[job.number]
            self._outcomes[job.slots.number] = (1, 0) if job.good else (0, 1)
            if not job.good and not job.store:
                self._failed_loads[job.number] = [int(block) for block in job.blocks.block_ids]
            seconds = max(job.done_at - job.submitted_at, 1e-9)
            results.append(
                TransferResult(job.number, success=True, transfer_size=job.copied_bytes, transfer_time=seconds)
            )
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Return when these copies have ended, well or not: their blocks are about to be used for something else."""
        for number in job_ids:
            job = self._jobs.get(number)
            if job is not None:
                job.finished.wait()

    def shutdown(self) -> None:
        """End the copies that are queued, leave the session."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(STOP_S)
        self._leave(STOP_S)

    # --- the copy thread ------------------------------------------------------------------------------------------

    def _submit(self, job: _Job) -> bool:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cachesvc-copy-kv", daemon=True)
            self._thread.start()
        self._jobs[job.number] = job
        self._queue.put(job)
        return True

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._copy(job)
            except Exception as error:
                # whatever it was: this job has failed, and the next may not
                tell(f"{type(self).__name__}.copy", error)
            job.done_at = time.monotonic()
            self._done.put(job)
            self._ended.set()
            job.finished.set()

    def _copy(self, job: _Job) -> None:
        member, slots = self._member, job.slots
        if slots.lost or member is None or slots.session != member[0].session:
            return
        join, session, _ = member
        if not self._joined(session, job.submitted_at + JOINED_S):
            return
        for ticket in slots.tickets:
            session.writes_elsewhere(ticket)
        try:
            mapped = self._mapped(session, slots)
            if mapped is not None and (not job.store or self._all_writing(mapped, slots)):
                self._copies.begin(job.fence)
                try:
                    job.copied_bytes = self._copy_all(self._moves(job, join.groups, mapped), store=job.store)
                finally:
                    self._copies.end()
                job.good = job.store or self._all_sealed(mapped, slots)
        finally:
            if slots.tickets:
                session.done(slots.tickets)

    @staticmethod
    def _joined(session: Session, until: float) -> bool:
        """Does the daemon know that this process may write? Otherwise it would give its slots to others if we died."""
        while session.channel.state is not State.UP:
            if session.refusal or time.monotonic() >= until:
                return False
            time.sleep(0.001)
        return True

    @staticmethod
    def _mapped(session: Session, slots: SlotsSpec) -> dict[int, Mapping] | None:
        """The extents of a transfer, by number; None: one of them can't be mapped, or is of another arena by now."""
        wanted = {extent for group in slots.groups for extent in group.extents}
        if not session.extents.ensure(wanted, time.monotonic() + MAPPED_S):
            return None
        mapped = session.extents.mapped
        found = {
            extent: mapped[extent] for extent in wanted if extent in mapped and mapped[extent].arena == slots.arena
        }
        return found if len(found) == len(wanted) else None

    @staticmethod
    def _all_sealed(mapped: dict[int, Mapping], slots: SlotsSpec) -> bool:
        return all(mapped[extent].sealed(slot, generation) for extent, slot, generation in _places(slots.groups))

    @staticmethod
    def _all_writing(mapped: dict[int, Mapping], slots: SlotsSpec) -> bool:
        return all(mapped[extent].writing(slot, generation) for extent, slot, generation in _places(slots.groups))

    def _moves(self, job: _Job, layouts: Sequence[GroupLayout], mapped: dict[int, Mapping]) -> list[_Move]:
        """What is to be copied, layer after layer. ValueError: blocks and slots don't fit together."""
        moves: list[_Move] = []
        at, spec = 0, job.blocks
        for g, (size, first) in enumerate(zip(spec.group_sizes, spec.block_indices, strict=True)):
            slots, layout = job.slots.groups[g], layouts[g]
            blocks = [int(block) for block in spec.block_ids[at : at + size]]
            at += size
            skip = first % layout.blocks_per_chunk if blocks else 0
            whole = len(slots.slots) * layout.blocks_per_chunk
            if job.store and (skip or len(blocks) != whole):
                # a chunk with a hole in it must not get into the pool
                raise ValueError(f"{len(blocks)} blocks to store after {skip} others, its chunks have {whole}")
            sizes = [mapped[extent].slot_bytes for extent in slots.extents]
            found = rows(layout, sizes, slots.extents, slots.slots, blocks, skip)
            shares = {(1, 0): pieces(found)}
            for page, offset in zip(self._pages[g], layout.offsets[self._rank], strict=True):
                # ranks that hold the same bytes take turns in writing them
                count, index = share = page.writers if job.store else (1, 0)
                if share not in shares:
                    shares[share] = pieces(row for row in found if row[2] % count == index)
                moves += [_Move(page, mapped[piece.extent].data, piece, offset) for piece in shares[share]]
        return moves

    def _copy_all(self, moves: Sequence[_Move], *, store: bool) -> int:
        """Copy; how many bytes."""
        return sum(self._copies.copy(page, extent, piece, at, store=store) for page, extent, piece, at in moves)

    def _leave(self, wait_s: float) -> None:
        member, self._member = self._member, None
        if member is not None:
            member[2].stop(wait_s)


def _places(groups: Sequence[GroupSlots]) -> list[tuple[int, int, int]]:
    return [place for group in groups for place in zip(group.extents, group.slots, group.generations, strict=True)]
