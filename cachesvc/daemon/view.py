"""The daemon as other threads see it: questions that are answered on the loop, with a limit on the wait.

Covers: the one way from the admin thread into the loop. Not here: the answers (`daemon.runner`), HTTP (`admin.app`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any, Final, TypeVar

from cachesvc.daemon.runner import Runner
from cachesvc.errors import CachesvcError

ANSWER_S: Final = 2.0

T = TypeVar("T")


class UnansweredError(CachesvcError):
    """The loop didn't answer in time, or has ended: the daemon is wedged, overloaded or stopping."""


class View:
    """Made on the loop, used by any thread. Every question raises UnansweredError after `ANSWER_S` seconds."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._loop = asyncio.get_running_loop()

    def status(self) -> dict[str, Any]:
        """The body of `/v1/status`."""
        return self._ask(lambda: self._runner.report("status", None))

    def namespaces(self) -> dict[str, Any]:
        """The body of `/v1/namespaces`."""
        return self._ask(lambda: self._runner.report("namespaces", None))

    def figures(self) -> dict[str, Any]:
        """What `/metrics` is made from."""
        return self._ask(self._runner.figures)

    def ready(self) -> bool:
        """Are the sockets open and is the arena restored?"""
        return self._ask(lambda: self._runner.ready)

    def _ask(self, question: Callable[[], T]) -> T:
        async def answer() -> T:
            return question()

        asking = answer()
        try:
            waiting = asyncio.run_coroutine_threadsafe(asking, self._loop)
        except RuntimeError as error:
            asking.close()
            raise UnansweredError("the daemon has stopped") from error
        try:
            return waiting.result(ANSWER_S)
        except (TimeoutError, CancelledError) as error:
            waiting.cancel()
            raise UnansweredError(f"the daemon's loop didn't answer within {ANSWER_S:g} s") from error
