"""Requests: what there is for each of them in the pool, asked for before it is needed and leased when it is.

Covers: asking, waiting for writers, leasing, doubting what couldn't be loaded. Not here: transfers, and what vLLM calls
(`connector.scheduler`), the daemon's answers (`client.session`).

A request, as seen from here; vLLM's scheduler thread draws every arrow::

    arrive --> QUEUED --our turn--> ASKED --answer--> KNOWN --vLLM asks--> READY --scheduled--> IDLE --vLLM asks--+
                 ^                                      |                    holds leases, or        (preempted,  |
                 +------ the answer is old, or ---------+                    is known to have none   load failed) |
                 |       a chunk is being written: until `load_deadline_s`                                        |
                 +------------------------------------------------------------------------------------------------+

*Asking* is a peek: it takes no lease, since a deep queue of leases would pin the arena, and nobody waits for its
answer. One peek is on its way at a time, so that no other call waits behind many. What vLLM asks for in QUEUED and
ASKED is answered "not yet", which costs no scan of keys. READY leases the leading run in one call.
"""

from __future__ import annotations

import enum
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm.v1.kv_offload.base import OffloadKey, get_offload_block_hash

from cachesvc.client.channel import State
from cachesvc.client.grants import Grant, KeyRun, Peek
from cachesvc.client.session import Session
from cachesvc.connector.guard import LOG, harmless
from cachesvc.connector.membership import Membership
from cachesvc.connector.metrics import Counts
from cachesvc.connector.namespace import adapter_key
from cachesvc.types import KeyState

CLAIM_S: Final = 0.05
"""How long a lease may take, in which the engine does nothing else."""

FRESH_S: Final = 0.1
"""An answer older than this is asked for again: a queued request's chunks may have come meanwhile."""

PENDING_S: Final = 0.005
"""How soon to ask again for a chunk that somebody is writing."""

DOUBT_S: Final = 1.0

FAILURES_MAX: Final = 3

PAUSE_S: Final = 10.0
"""A key whose load failed is a miss for so long; after so many failures in a row, everything is, for so long."""

IDLE_ASK_S: Final = 0.0005
"""How long an engine that has nothing else to do waits for an answer at once."""


class Stage(enum.Enum):
    """See the module's drawing."""

    QUEUED = "queued"
    ASKED = "asked"
    KNOWN = "known"
    READY = "ready"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Group:
    """One KV group, as vLLM offloads it; its place in the list of groups is its number in messages."""

    group_id: int
    """vLLM's, as its keys name it."""
    tokens_per_chunk: int
    full_attention: bool
    """Every chunk before a hit is needed; else the last ones are (sliding window, recurrent state)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of the engine."""

    load_deadline_s: float
    min_load_tokens: int
    renew_on_reset: bool = True


@dataclass(slots=True, eq=False)
class Request:
    """One of vLLM's requests. Only `Requests` changes it, but for `loads`, `named`, `full` and leases handed on."""

    number: int
    """The daemon's name for it."""
    adapter: bytes | None
    """Digest of the LoRA adapter's content when the request came."""
    adapter_now: Callable[[], bytes | None] | None = None
    loads: bool = True
    """Its user lets it load."""
    keys: Sequence[Sequence[OffloadKey]] = ()
    """By group, in prefix order."""
    stage: Stage = Stage.IDLE
    touched: bool = False
    named: bool = False
    """The daemon has heard of it."""
    since: float | None = None
    """When vLLM first wanted to schedule it, in this turn."""
    known_at: float = 0.0
    ask_at: float = 0.0
    asked_at: float = 0.0
    peek: Peek | None = None
    states: list[bytes] = field(default_factory=list)
    """By group, one `KeyState` a key."""
    present: frozenset[OffloadKey] = frozenset()
    """Keys that were in RAM when it was told: they needn't be stored."""
    leased_from: int = 0
    """First token that the leases cover, if they cover any."""
    arena: bytes = b""
    """Uuid of the arena in which the leases are."""
    session: Session | None = None
    """In which it has its leases."""
    grants: list[Grant] = field(default_factory=list)
    places: dict[OffloadKey, tuple[int, int, int]] = field(default_factory=dict)
    """(extent, slot, generation) of what is leased."""
    failed: set[OffloadKey] = field(default_factory=set)
    full: set[int] = field(default_factory=set)
    """Groups in which a chunk found no room: what comes behind a hole can't be reached."""


class Requests:
    """See the module's drawing. Used by the scheduler's thread only."""

    def __init__(
        self,
        membership: Membership,
        groups: Sequence[Group],
        limits: Limits,
        counts: Counts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.idle = True
        """The last step of the engine had nothing to compute."""
        self._membership = membership
        self._groups = groups
        self._limits = limits
        self._counts = counts
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._last = 0
        self._queue: deque[Request] = deque()
        self._asked: Request | None = None
        self._doubted: dict[OffloadKey, float] = {}
        self._failures = 0
        self._paused_until = 0.0

    def get(self, request_id: str) -> Request | None:
        """A request that has come and hasn't ended."""
        return self._requests.get(request_id)

    # --- what the façade says -------------------------------------------------------------------------------------

    @harmless(lambda *_, **__: None)
    def arrive(self, request_id: str, adapter: Callable[[], bytes | None] | None) -> None:
        """A request came. `adapter`: what tells the digest of its LoRA adapter's content as it is now, if it uses one;
        without one nothing is cached."""
        self._last += 1
        digest = adapter() if adapter is not None else None
        if adapter is None or digest is not None:
            self._requests[request_id] = Request(self._last, digest, adapter)

    @harmless(lambda *_, **__: None)
    def ask(self, request_id: str, keys: Sequence[Sequence[OffloadKey]]) -> None:
        """See what there is for a request that has just come: `keys` by group, in prefix order."""
        request = self._requests.get(request_id)
        if request is not None and request.loads and self._membership.session() is not None:
            request.keys, request.stage = keys, Stage.QUEUED
            self._queue.append(request)
            self.pump()

    @harmless(lambda self, request_id, *_: self._without(request_id))
    def ready(self, request_id: str, keys: Callable[[], Sequence[Sequence[OffloadKey]]], computed: int) -> bool:
        """May vLLM scan for this request's hits now? `computed`: tokens that it has itself; `keys`: all there are now.

        True: what `lookup` says from now on is final, and leased. False: ask again in the next step.
        """
        request, session = self._requests.get(request_id), self._membership.session()
        if request is None:
            return True
        now = self._clock()
        if session is None or not request.loads or now < self._paused_until:
            self.drop(request, Stage.READY)
            return True
        if request.stage is Stage.READY:
            if computed >= request.leased_from:
                return True
            # vLLM has lost blocks of its own since
            self.drop(request, Stage.IDLE)
        if request.stage is Stage.IDLE:
            request.keys, request.stage, request.ask_at = keys(), Stage.QUEUED, now
            self._queue.appendleft(request)
        fresh, request.since = request.since is None, now if request.since is None else request.since
        self.pump(first=request)
        while fresh and self.idle and request.stage is Stage.ASKED and self._clock() < now + IDLE_ASK_S:
            # an idle engine would sleep for longer than the answer takes
            time.sleep(IDLE_ASK_S / 10)
            self.pump()
        if session.channel.state is not State.UP:
            self._conclude(request, computed, KeyState.DAEMON_DOWN)
            return True
        if request.stage is Stage.KNOWN:
            if now - request.known_at > FRESH_S:
                self._again(request, now)
                return False
            run = self._leading_run(request, computed)
            if self._wait_for_writer(request, computed, run, now):
                return False
            self._claim(session, request, computed, run)
            return True
        if now - request.since > self._limits.load_deadline_s and self._is_overdue(request, now):
            session.channel.missed()
            self._conclude(request, computed, KeyState.DEADLINE)
            return True
        return False

    @harmless(lambda *_, **__: None)
    def scheduled(self, request_id: str, *, loads: bool) -> None:
        """The request is taken on; if it loads nothing, its leases end."""
        request = self._requests.get(request_id)
        if request is not None and not loads:
            self.drop(request, Stage.IDLE)

    @harmless(lambda *_, **__: None)
    def preempted(self, request_ids: Iterable[str]) -> None:
        """These were thrown back into the queue."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self.drop(request, Stage.IDLE)

    def end(self, request_id: str) -> None:
        """Nothing more of this request; its transfers go on."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self.drop(request, Stage.IDLE)
        session = self._membership.session()
        if session is not None and request.named:
            session.end_requests([request.number])

    def forget_all(self) -> None:
        """No request has any leases, or questions, from now on."""
        for request in self._requests.values():
            self.drop(request, Stage.IDLE)
            request.full.clear()
            request.present = frozenset()
        self._queue.clear()
        self._asked = None

    # --- loads that ended -----------------------------------------------------------------------------------------

    def loaded(self) -> None:
        """A load succeeded."""
        self._failures = 0

    def failed(self, request_id: str, keys: Iterable[OffloadKey]) -> None:
        """A load failed: its keys are misses, to its request as long as that lives, to others for a while."""
        now, keys = self._clock(), list(keys)
        request = self._requests.get(request_id)
        if request is not None:
            request.failed.update(keys)
        self._doubted = {key: until for key, until in self._doubted.items() if until > now}
        self._doubted.update(dict.fromkeys(keys, now + DOUBT_S))
        self._failures += 1
        if self._failures >= FAILURES_MAX:
            LOG.warning("cachesvc: %d loads in a row failed, none for %d s", self._failures, PAUSE_S)
            self._failures, self._paused_until = 0, now + PAUSE_S

    # --- asking ---------------------------------------------------------------------------------------------------

    def pump(self, first: Request | None = None) -> None:
        """Hear the answer to the question that is out; ask the next, that of `first` if it's waiting."""
        session = self._membership.session()
        if session is None:
            return
        asked = self._asked
        if asked is not None:
            session.channel.listen()
            self._hear(asked)
        if self._asked is not None or not self._queue:
            return
        now = self._clock()
        waiting = first is not None and first.stage is Stage.QUEUED and first.ask_at <= now
        request = first if waiting else next((other for other in self._queue if other.ask_at <= now), None)
        if request is None or session.channel.state is not State.UP:
            return
        self._queue.remove(request)
        request.stage = Stage.READY  # and it stays so, without anything, if its keys can't be asked for
        runs = [KeyRun(number, self.wire(keys, request)) for number, keys in enumerate(request.keys)]
        request.peek = session.peek(runs, request=request.number, touch=not request.touched)
        if request.peek is None:
            request.stage = Stage.QUEUED
            self._queue.append(request)
            return
        request.stage, request.asked_at = Stage.ASKED, now
        request.touched = request.named = True
        self._asked = request
        self._hear(request)

    def _hear(self, request: Request) -> None:
        """If the answer to its question is there, note it."""
        if request.peek is None or request.peek.states is None:
            return
        states, at = request.peek.states, 0
        request.states = []
        for keys in request.keys:
            request.states.append(states[at : at + len(keys)])
            at += len(keys)
        request.present = frozenset(
            key
            for keys, states in zip(request.keys, request.states, strict=True)
            for key, state in zip(keys, states, strict=True)
            if state == KeyState.RAM
        )
        request.peek, request.stage, request.known_at = None, Stage.KNOWN, self._clock()
        if self._asked is request:
            self._asked = None

    def _is_overdue(self, request: Request, now: float) -> bool:
        """Is it the daemon that keeps a request waiting? A step of the engine may take longer than any deadline, and
        then the question went out only now."""
        if self._asked is None and request.stage is Stage.QUEUED:
            request.ask_at = now
            self.pump(first=request)
        return self._asked is not None and now - self._asked.asked_at > CLAIM_S

    def _again(self, request: Request, ask_at: float) -> None:
        request.stage, request.ask_at = Stage.QUEUED, ask_at
        self._queue.appendleft(request)
        self.pump(first=request)

    def _wait_for_writer(self, request: Request, computed: int, run: int, now: float) -> bool:
        """Is the first chunk that is missing one that somebody writes just now, and is there time to wait for it?"""
        if request.since is None or now - request.since > self._limits.load_deadline_s:
            return False
        for group, states in zip(self._groups, request.states, strict=True):
            gap = max(run, computed) // group.tokens_per_chunk
            if group.full_attention and states[gap : gap + 1] == bytes([KeyState.PENDING]):
                self._again(request, now + PENDING_S)
                return True
        return False

    def _leading_run(self, request: Request, computed: int) -> int:
        """Tokens, from the first, up to which all groups that need everything have everything."""
        runs = []
        for group, keys, states in zip(self._groups, request.keys, request.states, strict=True):
            if not group.full_attention:
                continue
            start = at = computed // group.tokens_per_chunk
            while at < len(keys) and states[at] == KeyState.RAM and not self._is_doubted(request, keys[at]):
                at += 1
            runs.append(at * group.tokens_per_chunk if at > start else computed)
        if runs:
            return min(runs)
        # no such group: whatever there is may be of use
        return max(
            (len(keys) * g.tokens_per_chunk for g, keys in zip(self._groups, request.keys, strict=True)), default=0
        )

    def _is_doubted(self, request: Request, key: OffloadKey) -> bool:
        return key in request.failed or self._doubted.get(key, 0.0) > self._clock()

    # --- leases ---------------------------------------------------------------------------------------------------

    def _claim(self, session: Session, request: Request, computed: int, run: int) -> None:
        """Lease what the run needs. READY afterwards, with or without."""
        self._count(request, computed, run)
        request.stage, request.session, request.leased_from = Stage.READY, session, computed
        if run - computed < self._limits.min_load_tokens:
            if run > computed:
                self._counts.missed(KeyState.FILTERED, 1)
            return
        deadline, request.arena = self._clock() + CLAIM_S, session.arena
        for number, group in enumerate(self._groups):
            start, stop = computed // group.tokens_per_chunk, -(-run // group.tokens_per_chunk)
            keys, states = request.keys[number][start:stop], request.states[number][start:stop]
            if not group.full_attention:
                keys = [
                    key
                    for key, state in zip(keys, states, strict=True)
                    if state == KeyState.RAM and not self._is_doubted(request, key)
                ]
            self._lease(session, request, number, keys, deadline)

    def _lease(
        self, session: Session, request: Request, number: int, keys: Sequence[OffloadKey], deadline: float
    ) -> None:
        if not keys:
            return
        run = KeyRun(number, self.wire(keys, request))
        whole = self._groups[number].full_attention
        grant = session.lease(run, deadline, request=request.number, prefix=whole)
        if not grant.tickets:
            return
        request.grants.append(grant)
        leased = [key for key, state in zip(keys, grant.states, strict=True) if state == KeyState.RAM]
        request.places.update(zip(leased, grant.places(), strict=True))

    def drop(self, request: Request, stage: Stage) -> None:
        """End its leases and its questions."""
        grants, request.grants, request.places = request.grants, [], {}
        for grant in grants:
            if request.session is not None:
                request.session.release(grant, along=True)
        if request.stage is Stage.QUEUED and request in self._queue:
            self._queue.remove(request)
        if self._asked is request:
            self._asked = None
        request.peek, request.session = None, None
        request.stage, request.since, request.leased_from = stage, None, 0

    def _conclude(self, request: Request, computed: int, reason: KeyState) -> None:
        """It has waited enough: nothing is loaded, for this reason."""
        for group, keys in zip(self._groups, request.keys, strict=True):
            if group.full_attention:
                self._counts.missed(reason, max(0, len(keys) - computed // group.tokens_per_chunk))
        self.drop(request, Stage.READY)

    def _without(self, request_id: str) -> bool:
        """After a fault: vLLM may go on, and finds nothing."""
        request = self._requests.get(request_id)
        if request is not None:
            request.stage, request.places = Stage.READY, {}
        return True

    def wire(self, keys: Sequence[OffloadKey], request: Request) -> list[bytes]:
        """The keys as the daemon has them: their group travels beside them, an adapter's content in them."""
        if request.adapter is None:
            return [get_offload_block_hash(key) for key in keys]
        return [adapter_key(get_offload_block_hash(key), request.adapter) for key in keys]

    def _count(self, request: Request, computed: int, run: int) -> None:
        """Hits and misses of what vLLM didn't have itself, in chunks, when its request is about to be scheduled."""
        for group, keys, states in zip(self._groups, request.keys, request.states, strict=True):
            hits = max(0, run - computed) // group.tokens_per_chunk
            start = computed // group.tokens_per_chunk + hits
            if not group.full_attention or start - hits >= len(states):
                continue
            self._counts.hit(hits)
            missed = Counter(states[start:])
            missed[KeyState.PENDING_TIMEOUT] += missed[KeyState.PENDING]
            if request.failed or self._doubted:
                there = (key for key, state in zip(keys[start:], states[start:], strict=True) if state == KeyState.RAM)
                missed[KeyState.LOAD_FAILED] += sum(self._is_doubted(request, key) for key in there)
            for state, count in missed.items():
                if state >= KeyState.NEVER_STORED:
                    self._counts.missed(KeyState(state), count)
