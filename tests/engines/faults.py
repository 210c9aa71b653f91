"""Faults inside an engine: functions that run in its processes, by `EngineProcess.apply`, and the switch in the test's.

Covers: copies that wait, copies that fail in the middle, ranks that reach no daemon, reading the state of our parts.
Not here: killing and stopping (`cachesvc.demo.engine`, `tests.support.daemon`).

A switch is a file in a folder: every process of an engine sees it at once, and no message has to reach a thread that
copies.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachesvc.demo.engine import EngineProcess

POLL_S = 0.002

# --- in the test's process --------------------------------------------------------------------------------------------


class Switches:
    """Faults of one engine, on while their `with` block runs."""

    def __init__(self, engine: EngineProcess, folder: Path) -> None:
        self._folder = folder
        engine.apply(f"{__name__}:install", folder=str(folder))

    @contextmanager
    def holding(self, kind: str) -> Iterator[None]:
        """Copies of this kind (`store`, `load`) stop in their middle: a part is copied, the rest is not."""
        with self._on(f"hold-{kind}"):
            yield

    @contextmanager
    def failing(self, kind: str, *ranks: int) -> Iterator[None]:
        """Copies of this kind fail in their middle on these ranks."""
        names = [f"fail-{kind}-{rank}" for rank in ranks]
        for name in names:
            (self._folder / name).touch()
        try:
            yield
        finally:
            for name in names:
                (self._folder / name).unlink()

    def held(self, kind: str) -> bool:
        """Has a copy of this kind come to where it stops? (Since the engine started.)"""
        return (self._folder / f"held-{kind}").exists()

    def let_go(self, kind: str) -> None:
        """Let copies that stand go on, before `holding` ends."""
        (self._folder / f"hold-{kind}").unlink(missing_ok=True)

    def forget(self) -> None:
        """`held` is False again."""
        for path in self._folder.glob("held-*"):
            path.unlink()

    @contextmanager
    def _on(self, name: str) -> Iterator[None]:
        path = self._folder / name
        path.touch()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


# --- in the engine's scheduler process --------------------------------------------------------------------------------


def _executor(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor


def _manager(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector._manager


def install(llm: Any, folder: str) -> None:
    """Let the copies of all ranks heed switches in this folder."""
    _executor(llm).collective_rpc(_install, args=(folder,))


def connected(llm: Any) -> bool:
    session = _manager(llm).membership.session()
    up = session is not None and session.channel.state.name == "UP"
    return up and all(_executor(llm).collective_rpc(_connected))


def refusal(llm: Any) -> str:
    """Why there is no connection."""
    session = _manager(llm).membership.session()
    return "" if session is None else str(session.channel.error)


def be_patient(llm: Any, seconds: float) -> None:
    """Deadlines of a product are too short for a test that shares two cores with ten processes, some of which spin: a
    daemon that isn't run for a while is no fault here."""
    from cachesvc.client import channel
    from cachesvc.connector import requests, scheduler

    scheduler.ALLOCATE_S = requests.CLAIM_S = seconds  # type: ignore[misc]
    channel.PONG_S = max(channel.PONG_S, seconds)  # type: ignore[misc]


def guarded(llm: Any) -> dict[str, int]:
    """Exceptions that were kept from vLLM, of all processes."""
    from cachesvc.connector.guard import faults

    total = Counter(faults)
    if llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        for some in _executor(llm).collective_rpc(_guarded):
            total.update(some)
    return dict(total)


def refuse_rank(llm: Any, rank: int, address: str) -> None:
    """This rank looks for its daemon at another address. Before the first step: a rank joins with it."""
    _executor(llm).collective_rpc(_refuse, args=(rank, address))


def unpause(llm: Any) -> None:
    """Forget that loads have failed; else none is tried for a while."""
    manager = _manager(llm)
    manager.requests._failures, manager.requests._paused_until = 0, 0.0


# --- in the process of each rank --------------------------------------------------------------------------------------


def _our_worker() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker


def _install(_: Any, folder: str) -> None:
    worker = _our_worker()
    worker._copies = _Faulty(worker._copies, Path(folder), worker._rank)


def _connected(_: Any) -> bool:
    member = _our_worker()._member
    return member is not None and member[1].channel.state.name == "UP"


def _guarded(_: Any) -> dict[str, int]:
    from cachesvc.connector.guard import faults

    return dict(faults)


def _refuse(_: Any, rank: int, address: str) -> None:
    worker = _our_worker()
    if worker._rank == rank:
        join = worker.join
        worker.join = lambda told: join(replace(told, address=address))


class _Faulty:
    """Copies that wait or fail after their first piece, while a file says so."""

    def __init__(self, copies: Any, folder: Path, rank: int) -> None:
        self._copies, self._folder, self._rank = copies, folder, rank
        self._pieces = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copies, name)

    def begin(self, fence: Any) -> None:
        self._pieces = 0
        self._copies.begin(fence)

    def copy(self, *args: Any, store: bool) -> int:
        kind = "store" if store else "load"
        self._pieces += 1
        if self._pieces == 2:
            self._halfway(kind)
        return int(self._copies.copy(*args, store=store))

    def _halfway(self, kind: str) -> None:
        if self._on(f"hold-{kind}"):
            (self._folder / f"held-{kind}").touch()
            while self._on(f"hold-{kind}"):
                time.sleep(POLL_S)
        if self._on(f"fail-{kind}-{self._rank}"):
            raise OSError(f"a {kind} fails in its middle")

    def _on(self, name: str) -> bool:
        return os.path.exists(self._folder / name)
