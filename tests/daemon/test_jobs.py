"""I/O jobs: the event that each ends in, order, failures, stopping. The arena is a fake that does as it is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cachesvc.core import events as ev
from cachesvc.daemon.jobs import Jobs

RECORD = ev.NamespaceRecord("t", bytes(16), "label", {}, (4096,))
FORMAT = ev.FormatExtent(1, 2, "t", 4096)


class FakeArena:
    """Notes its calls; `act` is what each does besides."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.act = act

    def make_spare(self, *args: Any) -> None:
        self.act()
        self.calls.append(("make", *args))

    def format(self, *args: Any) -> None:
        self.act()
        self.calls.append(("format", *args))

    def drop(self, *args: Any) -> None:
        self.act()
        self.calls.append(("drop", *args))


def outcomes(arena: FakeArena, *todo: Any) -> tuple[list[ev.Event], int]:
    """Every event that these jobs end in, and how many failed."""
    failed = 0

    async def scenario() -> list[ev.Event]:
        def fail() -> None:
            nonlocal failed
            failed += 1

        news: asyncio.Queue[ev.Event] = asyncio.Queue()
        jobs = Jobs(arena, news.put_nowait, fail)  # type: ignore[arg-type]
        for job in todo:
            jobs.start(job)
        events = [await news.get() for _ in todo]
        jobs.close()
        return events

    return asyncio.run(scenario()), failed


def test_each_job_and_its_event() -> None:
    arena = FakeArena()
    for job, event in (
        (ev.MakeSpare(1), ev.SpareMade(1)),
        (FORMAT, ev.ExtentFormatted(2)),
        (ev.DropExtent(2), ev.ExtentDropped(2)),
    ):
        assert outcomes(arena, job) == ([event], 0)
    assert arena.calls == [("make", 1), ("format", 1, 2, "t", 4096), ("drop", 2)]


def test_files_in_order_and_not_behind_memory() -> None:
    making = threading.Event()

    class SlowMemory(FakeArena):
        def make_spare(self, *args: Any) -> None:
            assert making.wait(30)
            super().make_spare(*args)

        def drop(self, *args: Any) -> None:
            super().drop(*args)
            making.set()

    arena = SlowMemory()
    events, _ = outcomes(arena, ev.MakeSpare(9), FORMAT, ev.DropExtent(1))
    assert [call[0] for call in arena.calls] == ["format", "drop", "make"]
    assert events == [ev.ExtentFormatted(2), ev.ExtentDropped(1), ev.SpareMade(9)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_failures_are_events_too(error: Exception) -> None:
    def fail() -> None:
        raise error

    events, failed = outcomes(FakeArena(fail), ev.MakeSpare(1), FORMAT, ev.DropExtent(3))
    assert failed == 3
    assert {type(event) for event in events} == {ev.SpareFailed, ev.ExtentDropped}
    reasons = [event.reason for event in events if isinstance(event, ev.SpareFailed)]
    assert all(error.args[-1] in reason for reason in reasons)


def test_nothing_is_reported_once_closed() -> None:
    async def scenario() -> None:
        news: list[ev.Event] = []
        jobs = Jobs(FakeArena(), news.append, lambda: None)  # type: ignore[arg-type]
        jobs.start(ev.MakeSpare(1))
        jobs.close()
        await asyncio.sleep(0.01)
        assert news == []

    asyncio.run(scenario())
