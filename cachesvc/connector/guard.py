"""The edge towards vLLM: no exception of ours may pass it.

An exception in a scheduler's method ends EngineCore, one in a worker's ends the worker; either costs every request that
the engine serves. So what vLLM calls is wrapped: a fault becomes the harmless answer (a miss, nothing to store), is
counted, and is logged with its trace the first time it happens at a place.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

LOG: Final = logging.getLogger("vllm.cachesvc")
"""vLLM shows what is logged below `vllm`."""

faults: Final[Counter[str]] = Counter()
"""Exceptions that were kept from vLLM, by the function in which they ended."""

P = ParamSpec("P")
R = TypeVar("R")


def harmless(answer: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate what vLLM calls: after an exception it returns what `answer`, called with the same arguments, says."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                tell(function.__qualname__, error)
                return answer(*args, **kwargs)

        return call

    return decorate


def tell(place: str, error: Exception) -> None:
    """Count a fault, and log it if it's the first at its place."""
    faults[place] += 1
    if faults[place] == 1:
        LOG.error("%s failed, the engine goes on without what it was to do: %r", place, error, exc_info=error)
