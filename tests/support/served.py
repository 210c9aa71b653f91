"""A daemon's server, runner, core and arena on the test's own loop: for tests that look inside or change limits."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from cachesvc.arena.host import HostArena
from cachesvc.core.events import Started
from cachesvc.core.node import Node, NodeSettings
from cachesvc.core.quota import TenantQuota
from cachesvc.daemon.runner import Runner
from cachesvc.daemon.server import Server, open_door
from tests.support.daemon import KIB, shared_directory

EXTENT_BYTES = 256 * KIB


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until it is so; pytest's timeout guards it."""
    while not condition():  # noqa: ASYNC110 - what is waited for is done by code that knows no event
        await asyncio.sleep(0.001)


@asynccontextmanager
async def running(extents: int = 4) -> AsyncIterator[Runner]:
    """A runner on a small arena of two tenants, `one` and `two`; no sockets, no ticks."""
    with shared_directory() as shared, tempfile.TemporaryDirectory() as home:
        (shared / "arena").mkdir(0o700)
        arena = HostArena(shared / "arena", Path(home) / "state", extents * EXTENT_BYTES, EXTENT_BYTES)
        arena.scan()
        quotas = (TenantQuota("one"), TenantQuota("two"))
        runner = Runner(
            Node(NodeSettings(EXTENT_BYTES, extents, quotas), arena.next_extent), arena, Path(home) / "state"
        )
        try:
            runner.dispatch(Started())
            await until(lambda: len(runner.node.extents.spares) == extents)
            yield runner
            runner.node.check_invariants()
        finally:
            runner.close()
            arena.close()


@asynccontextmanager
async def served(tenant: str | None = "one") -> AsyncIterator[tuple[Server, Path]]:
    """A server on top of it, with one door."""
    async with running() as runner:
        server = Server(runner)
        with tempfile.TemporaryDirectory() as home:
            door = open_door(Path(home) / "x.sock", 0o600, None, tenant)
            server.open(door)
            parts = [asyncio.create_task(runner.ticks()), asyncio.create_task(server.sweep())]
            try:
                yield server, door.path
            finally:
                for part in parts:
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)
                await server.close()
                door.close()
