"""I/O that the core asked for and the loop must not wait for: extents are made, formatted and dropped.

Covers: two threads, one order each, and the event that each job ends in. Not here: what is done to files
(`arena.host`), why (`core.extents`).

    thread   jobs                        takes
    memory   MakeSpare                   a quarter of a second per GiB: every page is touched
    files    FormatExtent, DropExtent    milliseconds; in the order they were asked for

A job never raises: failure is an event too. The core bounds the queues: one spare is made at a time, and there are no
more extents than the arena holds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from cachesvc.arena.host import HostArena
from cachesvc.core.events import (
    DropExtent,
    Event,
    ExtentDropped,
    ExtentFormatted,
    FormatExtent,
    MakeSpare,
    SpareFailed,
    SpareMade,
)

LOG = logging.getLogger(__name__)

Job: TypeAlias = MakeSpare | FormatExtent | DropExtent


class Jobs:
    """Runs jobs in threads; `done(event)` and `failed()` are called on the loop. Made and closed on the loop."""

    def __init__(self, arena: HostArena, done: Callable[[Event], None], failed: Callable[[], None]) -> None:
        self._arena = arena
        self._done = done
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._memory = ThreadPoolExecutor(1, "cachesvc-memory")
        self._files = ThreadPoolExecutor(1, "cachesvc-files")
        self._closed = False

    def start(self, job: Job) -> None:
        """Queue a job."""
        thread = self._memory if isinstance(job, MakeSpare) else self._files
        thread.submit(self._run, job)

    def close(self) -> None:
        """Finish what runs and what is queued for files; outcomes are not reported any more."""
        self._closed = True
        self._memory.shutdown(wait=False, cancel_futures=True)
        self._files.shutdown(wait=True)
        self._memory.shutdown(wait=True)

    def _run(self, job: Job) -> None:
        """In a thread: one of the four edges where any exception is caught."""
        try:
            event = self._carry_out(job)
        except OSError as error:
            LOG.warning("%s failed: %s", type(job).__name__, error)
            event = self._failure(job, str(error))
        except Exception as error:
            LOG.exception("%s failed: this is a bug", type(job).__name__)
            event = self._failure(job, f"{type(error).__name__}: {error}")
        self._report(lambda: self._done(event))

    def _carry_out(self, job: Job) -> Event:
        match job:
            case MakeSpare():
                self._arena.make_spare(job.extent)
                return SpareMade(job.extent)
            case FormatExtent():
                self._arena.format(job.source, job.extent, job.tenant, job.slot_bytes)
                return ExtentFormatted(job.extent)
            case DropExtent():
                self._arena.drop(job.extent)
                return ExtentDropped(job.extent)

    def _failure(self, job: Job, reason: str) -> Event:
        self._report(self._failed)
        return failure(job, reason)

    def _report(self, news: Callable[[], None]) -> None:
        """Tell the loop. Not while stopping: the next start finds what this job did."""

        def on_the_loop() -> None:
            if not self._closed:
                news()

        if not self._closed:
            self._loop.call_soon_threadsafe(on_the_loop)


def failure(job: Job, reason: str) -> Event:
    """What a failed job means to the core."""
    match job:
        case MakeSpare() | FormatExtent():
            return SpareFailed(job.extent, reason)
        case DropExtent():
            # if the files are still there, the next MakeSpare fails for want of memory and is tried again later
            return ExtentDropped(job.extent)
