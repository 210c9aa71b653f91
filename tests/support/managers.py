"""A manager on a bench: one session that says what a test wants, a clock that stands still.

Covers: what the façade and vLLM's scheduler call, in short. Not here: bytes, a daemon (`tests.support.kv`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, PrepareStoreOutput, ReqContext, ScheduleEndContext

from cachesvc.connector.requests import Group, Limits
from cachesvc.connector.scheduler import CachesvcManager
from tests.support.kv import FakeMembership, FakeSession, chain

STEP = ScheduleEndContext((), ())


class Ticking:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A manager, one request's view of it, and the session behind it."""

    def __init__(
        self, *groups: Group, ranks: int = 1, minimum: int = 0, deadline: float = 2.0, sessions: int = 1, **more: Any
    ) -> None:
        self.groups = groups or (Group(0, 16, True),)
        self.sessions = [FakeSession(len(self.groups)) for _ in range(sessions)]
        self.session = self.sessions[0]
        self.membership = FakeMembership(*self.sessions)
        self.clock = Ticking()
        limits = Limits(deadline, minimum, **more)
        self.manager = CachesvcManager(self.membership, self.groups, ranks, limits, self.clock)  # type: ignore[arg-type]
        self.manager.requests.idle = False
        self._keys: dict[str, tuple[Sequence[OffloadKey], ...]] = {}

    def arrive(self, name: str, *keys: Sequence[OffloadKey], adapter: Any = None, **params: Any) -> ReqContext:
        self.manager.requests.arrive(name, adapter)
        context = ReqContext(name, **params)
        self.manager.on_new_request(context)
        self._keys[name] = keys
        self.manager.requests.ask(name, keys)
        return context

    def ready(self, name: str, computed: int = 0) -> bool:
        return bool(self.manager.requests.ready(name, lambda: self._keys[name], computed))

    def hits(self, context: ReqContext, keys: Sequence[OffloadKey]) -> list[bool]:
        return [self.manager.lookup(key, context) is LookupResult.HIT for key in keys]

    def claimed(self, name: str, *keys: Sequence[OffloadKey], computed: int = 0) -> ReqContext:
        """A request that has what there is."""
        context = self.arrive(name, *keys)
        while not self.ready(name, computed):
            pass
        return context

    def load(self, name: str, *keys: Sequence[OffloadKey]) -> int:
        """A request that loads all keys; the transfer's number."""
        context = self.claimed(name, *keys)
        every = [key for group in keys for key in group]
        assert all(self.hits(context, every))
        spec = self.manager.prepare_load(every, context)
        self.manager.requests.scheduled(name, loads=True)
        return int(spec.number)

    def store(self, name: str, keys: Sequence[OffloadKey]) -> Any:
        context = ReqContext(name)
        if name not in self.manager.requests._requests:
            context = self.arrive(name, *([] for _ in self.groups))
        output = self.manager.prepare_store(keys, context)
        assert isinstance(output, PrepareStoreOutput)
        assert output.evicted_keys == []
        return output

    def counted(self, name: str) -> dict[str, int]:
        stats = self.stats()
        values = stats.data["data"].get(name, {}) if stats is not None else {}
        return {",".join(labels): value for labels, value in values.items()}

    def stats(self) -> Any:
        """What was counted since the last time."""
        return self.manager.get_stats()  # type: ignore[no-untyped-call]

    def clean(self) -> bool:
        """Nothing is held."""
        return not any(session.leases or session.writes for session in self.sessions)


KEYS = chain("p", 4)
