"""What the benches call inside a vLLM engine's processes, by name; imports nothing of ours, and vLLM only when asked.

Covers: CPU time, steps and what they cost, LMCache's connector. Functions are run by `EngineProcess.apply`, their
first argument is vLLM's `LLM`; the connector is found by vLLM itself (`kv_connector_module_path`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

MADV_POPULATE_WRITE: Final = 23

Step = tuple[float, float]
"""Milliseconds of CPU of one step: inside the scheduler's `schedule`, and of all threads in the whole step."""

_steps: list[Step] = []


def cpu_seconds(_llm: Any) -> float:
    """Of all threads of the engine's process so far, ended ones included."""
    return time.process_time()


def populate(_llm: Any, name: str) -> int:
    """Touch every page that is mapped here of files with `name` in theirs; how many bytes."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    touched = 0
    with open("/proc/self/maps") as maps:
        mappings = [line.split()[0].split("-") for line in maps if name in line]
    for mapping in mappings:
        first, end = (int(address, 16) for address in mapping)
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_POPULATE_WRITE):
            raise OSError(ctypes.get_errno(), "madvise")
        touched += end - first
    return touched


def watch_steps(llm: Any) -> None:
    """Note what each step costs from now on."""
    core = llm.llm_engine.engine_core.engine_core
    scheduler, spent = core.scheduler, [0.0]

    def schedule(*args: Any, inner: Callable[..., Any] = scheduler.schedule, **kwargs: Any) -> Any:
        before = time.thread_time()
        output = inner(*args, **kwargs)
        spent[0] += time.thread_time() - before
        return output

    def step(inner: Callable[..., Any] = llm.llm_engine.step) -> Any:
        spent[0], before = 0.0, time.process_time()
        outputs = inner()
        _steps.append((1000 * spent[0], 1000 * (time.process_time() - before)))
        return outputs

    scheduler.schedule, llm.llm_engine.step = schedule, step


def take_steps(_llm: Any) -> list[Step]:
    """The steps since the last time."""
    steps = list(_steps)
    _steps.clear()
    return steps


def __getattr__(name: str) -> Any:
    """What vLLM asks for by name, made only then: it needs what only some environments have."""
    if name == "LMCacheMPConnector":
        return _lmcache_connector()
    if name == "Amx":
        return _amx()
    raise AttributeError(name)


def _lmcache_connector() -> Any:
    """LMCache's connector, with one thing mended first.

    Without it vLLM 0.32 doesn't start on a CPU beside LMCache 0.5.6: looking for kernels, vLLM reads the `__dict__` of
    whatever lies in whatever module, and something in LMCache answers with an object that isn't a mapping.
    """
    from vllm.triton_utils import dispatcher

    def readable(value: Any) -> Mapping[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    # a name of that module's own hides the built-in function there, and nowhere else
    dispatcher.vars = readable
    from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector

    return LMCacheMPConnector


def _amx() -> type:
    """An extension of vLLM's worker that does nothing, after this process may use the CPU's AMX tiles.

    A process has to ask the kernel first; torch does so when it multiplies larger matrices, vLLM doesn't and dies of an
    illegal instruction if its first prompt in bfloat16 has a few tokens only.
    """
    import torch

    torch.cpu._init_amx()
    return type("Amx", (), {})
