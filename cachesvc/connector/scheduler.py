"""The scheduler's side: what can be loaded, what is to be stored, and what becomes of transfers.

Covers: what vLLM calls, slots to store in, settling. Not here: asking and leasing (`connector.requests`), what vLLM
schedules (`OffloadingConnectorScheduler`, which calls us), bytes (`connector.worker`), the daemon's answers
(`client.session`).

A transfer, load or store, is ours until every rank has told how it ended, whatever vLLM has forgotten meanwhile (it
forgets all jobs when its cache is reset)::

    prepare_load | prepare_store --> OPEN --each rank: ok or failed--> all ok: released | sealed
                                                                       one failed: released, its keys doubted | aborted

Nothing here waits for a daemon that doesn't answer: one missed deadline and the client answers by itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)

from cachesvc.client.channel import State
from cachesvc.client.grants import Grant, KeyRun
from cachesvc.client.session import Session
from cachesvc.connector.guard import harmless
from cachesvc.connector.membership import Membership
from cachesvc.connector.metrics import Counts
from cachesvc.connector.requests import Group, Limits, Request, Requests, Stage
from cachesvc.connector.specs import GroupSlots, SlotsSpec
from cachesvc.types import AllocateState

ALLOCATE_S: Final = 0.005
RETRY_S: Final = 0.001
"""An extent that is being made is worth asking again, within the time that an allocation has."""


SEAL_S: Final = 0.05
"""How long a finished store waits for its turn to tell the daemon: its copies were dearer than that."""

UNSEALED_S: Final = 30.0
"""How long a finished store waits for a daemon that is away before it's given up."""


@dataclass(slots=True, eq=False)
class _Transfer:
    session: Session
    request: str
    store: bool
    keys: list[OffloadKey]
    grants: list[Grant]
    lengths: list[int]
    """Of a store: bytes of each grant's chunks (they are all of one group)."""
    good: int = 0
    bad: int = 0


class CachesvcManager(OffloadingManager):
    """See the module's docstring. Used by the scheduler's thread only."""

    def __init__(
        self,
        membership: Membership,
        groups: Sequence[Group],
        ranks: int,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = Counts()
        self.membership = membership
        self.requests = Requests(membership, groups, limits, self.counts, clock)
        self._groups = groups
        self._number_of = {group.group_id: number for number, group in enumerate(groups)}
        self._ranks = ranks
        self._limits = limits
        self._clock = clock
        self._transfers: dict[int, _Transfer] = {}
        self._last_transfer = 0
        self._unsealed: deque[tuple[float, _Transfer]] = deque()

    # --- the façade -------------------------------------------------------------------------------------------------

    @harmless(lambda *_, **__: None)
    def settle(self, outcomes: dict[int, tuple[int, int]]) -> None:
        """Transfers ended on some ranks: number -> ranks that did their part, and ranks that failed."""
        for number, (good, bad) in outcomes.items():
            transfer = self._transfers.get(number)
            if transfer is None:
                continue
            transfer.good += good
            transfer.bad += bad
            if transfer.good + transfer.bad >= self._ranks:
                del self._transfers[number]
                self._end(transfer)
        self._seal_later()

    # --- what vLLM's scheduler calls ------------------------------------------------------------------------------

    @harmless(lambda *_, **__: LookupResult.MISS)
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT: leased for this request."""
        request = self.requests.get(req_context.req_id)
        return LookupResult.HIT if request is not None and key in request.places else LookupResult.MISS

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> str:
        """Where a hit comes from: a value of vLLM's `CacheHitSource`, which 0.31 doesn't have."""
        return "host"

    @harmless(lambda self, *_, **__: self._nowhere())
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> SlotsSpec:
        """Where these hits lie. Never asks the daemon: they are leased, or the transfer is lost from the beginning."""
        request = self.requests.get(req_context.req_id)
        session = request.session if request is not None else None
        if request is None or session is None:
            return self._nowhere()
        groups = [GroupSlots() for _ in self._groups]
        lost = any(grant.lost for grant in request.grants)
        for key in keys:
            place = request.places.get(key)
            if place is None:
                lost = True
                continue
            group = groups[self._number_of[get_offload_group_idx(key)]]
            group.extents.append(place[0])
            group.slots.append(place[1])
            group.generations.append(place[2])
        transfer = _Transfer(session, req_context.req_id, False, list(keys), request.grants, [])
        request.grants = []
        self.requests.drop(request, Stage.IDLE)
        return SlotsSpec(self._open(transfer), session.identity.session, request.arena, groups, [], lost=lost)

    @harmless(lambda self, *_, **__: self._nothing())
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        """Slots for those of the keys that are new; never None, which vLLM would ask again each step."""
        request, session = self.requests.get(req_context.req_id), self.membership.session()
        if request is None or session is None or session.channel.state is not State.UP:
            self.counts.refused(AllocateState.RETRY, len(keys))
            return self._nothing()
        if request.adapter_now is not None and request.adapter_now() != request.adapter:
            # overwritten since: nobody knows which of the two these blocks were computed with
            return self._nothing()
        by_group: dict[int, list[OffloadKey]] = {}
        for key in keys:
            if key in request.present:
                continue  # asked for a moment ago: a local hit's blocks are offered again, each time
            by_group.setdefault(self._number_of[get_offload_group_idx(key)], []).append(key)
        deadline, arena, request.named = self._clock() + ALLOCATE_S, session.arena, True
        groups = [GroupSlots() for _ in self._groups]
        transfer = _Transfer(session, req_context.req_id, True, [], [], [])
        try:
            for number in sorted(by_group):
                if number not in request.full:
                    self._allocate(transfer, request, number, by_group[number], groups[number], deadline)
        except BaseException:
            for grant in transfer.grants:
                session.abort(grant)
            raise
        if not transfer.keys:
            return self._nothing()
        tickets = [ticket.number for grant in transfer.grants for ticket in grant.tickets]
        spec = SlotsSpec(self._open(transfer), session.identity.session, arena, groups, tickets)
        return PrepareStoreOutput(keys_to_store=transfer.keys, store_spec=spec, evicted_keys=[])

    @harmless(lambda *_, **__: RequestOffloadingContext())
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """What its user lets it do. (`arrive` was before.)"""
        request = self.requests.get(req_context.req_id)
        if request is not None:
            most = (req_context.kv_transfer_params or {}).get("max_load_tokens")
            local = req_context.load_tier_filter.allows(Medium.CPU, Locality.LOCAL)
            request.loads = local and (type(most) is not int or most >= self._limits.min_load_tokens)
        return RequestOffloadingContext()

    @harmless(lambda *_, **__: None)
    def on_request_finished(self, req_context: ReqContext) -> None:
        """Nothing more of this request; its transfers go on."""
        self.requests.end(req_context.req_id)

    @harmless(lambda *_, **__: None)
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Once a step: hear answers, ask the next question. (Before or after the stores of the step.)"""
        self.requests.preempted(context.preempted_req_ids)
        self.requests.pump()
        self._seal_later()

    @harmless(lambda *_, **__: False)
    def has_pending_work(self) -> bool:
        """As long as a transfer is open the engine has to go on with its steps, or it never hears of its end."""
        return bool(self._transfers or self._unsealed)

    @harmless(lambda *_, **__: None)
    def reset_cache(self) -> None:
        """The engine's weights may be others from now on: nothing is deleted, nothing is shared with before."""
        self.requests.forget_all()
        if self._limits.renew_on_reset:
            self.membership.renew()

    def get_stats(self):  # type: ignore[no-untyped-def]
        """What was counted since the last time."""
        return self.counts.take()

    @harmless(lambda *_, **__: None)
    def shutdown(self) -> None:
        """The engine ends."""
        self.requests.forget_all()
        self.membership.close()

    # --- stores ---------------------------------------------------------------------------------------------------

    def _allocate(
        self,
        transfer: _Transfer,
        request: Request,
        number: int,
        keys: list[OffloadKey],
        group: GroupSlots,
        deadline: float,
    ) -> None:
        """Slots for the new ones of one group's keys, into `group` and `transfer`."""
        session = transfer.session
        while keys:
            run = KeyRun(number, self.requests.wire(keys, request))
            grant = session.allocate(run, deadline, request=request.number)
            new = [key for key, state in zip(keys, grant.states, strict=True) if state == AllocateState.NEW]
            if grant.tickets:
                transfer.keys += new
                for ticket in grant.tickets:
                    transfer.grants.append(Grant(b"", [ticket]))
                    transfer.lengths.append(session.identity.chunk_bytes[number])
                for extent, slot, generation in grant.places():
                    group.extents.append(extent)
                    group.slots.append(slot)
                    group.generations.append(generation)
            refused = [at for at, state in enumerate(grant.states) if state >= AllocateState.RETRY]
            if not refused:
                return
            later = grant.states[refused[0]] == AllocateState.RETRY and session.channel.state is State.UP
            if later and self._clock() + RETRY_S < deadline:
                time.sleep(RETRY_S)
                keys = keys[refused[0] :]
                continue
            self.counts.refused(grant.states[refused[0]], len(refused))
            if self._groups[number].full_attention:
                request.full.add(number)
            return

    def _end(self, transfer: _Transfer) -> None:
        """Every rank has told."""
        session = transfer.session
        if not transfer.store:
            for grant in transfer.grants:
                session.release(grant, along=True)
            self._loaded(transfer)
        elif transfer.bad:
            self.counts.failed(store=True)
            for grant in transfer.grants:
                session.abort(grant)
        else:
            self._unsealed.append((self._clock() + UNSEALED_S, transfer))

    def _loaded(self, transfer: _Transfer) -> None:
        if transfer.bad:
            self.counts.failed(store=False)
            self.requests.failed(transfer.request, transfer.keys)
        else:
            self.counts.loaded(len(transfer.keys))
            self.requests.loaded()

    def _seal_later(self) -> None:
        """Seal what is copied, in order, as soon as there is a daemon to tell."""
        while self._unsealed:
            until, transfer = self._unsealed[0]
            session = transfer.session
            if session.channel.state is not State.UP and self._clock() < until and not session.refusal:
                return
            self._unsealed.popleft()
            for grant, length in zip(transfer.grants, transfer.lengths, strict=True):
                count = sum(len(ticket.slots) for ticket in grant.tickets)
                if session.seal_soon(grant, [length] * count, self._clock() + SEAL_S):
                    self.counts.stored(count)
                else:
                    self.counts.failed(store=True)

    # --- small things ---------------------------------------------------------------------------------------------

    def _open(self, transfer: _Transfer) -> int:
        self._last_transfer += 1
        self._transfers[self._last_transfer] = transfer
        return self._last_transfer

    def _nowhere(self) -> SlotsSpec:
        """A load that fails from the beginning; nobody waits for it here."""
        return SlotsSpec(0, b"", b"", [GroupSlots() for _ in self._groups], [], lost=True)

    def _nothing(self) -> PrepareStoreOutput:
        return PrepareStoreOutput(keys_to_store=[], store_spec=self._nowhere(), evicted_keys=[])
