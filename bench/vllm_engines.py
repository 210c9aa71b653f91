"""What the benches with real vLLM engines share: environments, the caches that are compared, engines, prompts.

Covers: vLLM without a connector, with ours and our daemon, with vLLM's ExampleConnector (files), with LMCache's MP
connector and server (shared memory). Not here: what is measured, what runs inside the engines (`bench.vllm_child`).

vLLM lives in an environment of its own: `make vllm-env`, or whatever Python `CACHESVC_VLLM_PYTHON` names. LMCache's
server has another (`make bench-env-lmcache`), and an engine that uses it needs both: `make bench-env-vllm-lmcache`, or
`CACHESVC_VLLM_LMCACHE_PYTHON`. The bench itself runs in neither.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import vllm_child
from bench.harness import Daemon, store, wait_for
from bench.peers import AbsentError, LmcacheServer, lmcache_variables
from cachesvc import Client
from cachesvc.config import MIB, cache_dir
from cachesvc.demo.engine import EngineProcess
from cachesvc.demo.model import MID, Shape, cached_model

DTYPE: Final = "bfloat16"
BYTES_PER_ELEMENT: Final = 2
BLOCK_TOKENS: Final = 128
"""VLLM's on a CPU."""
QUESTION_TOKENS: Final = 40
FIRST_TOKEN: Final = 3
"""Ids below are special."""
WARM_S: Final = 120.0
FILLED_AT_ONCE: Final = 32
AMX: Final = f"{vllm_child.__name__}.Amx"
"""VLLM's worker_extension_cls of all engines."""

NONE: Final = "without connector"
OURS: Final = "cachesvc"
EXAMPLE: Final = "ExampleConnector"
LMCACHE: Final = "LMCache MP"
SUBJECTS: Final = (NONE, OURS, EXAMPLE, LMCACHE)

LOADED: Final = "vllm:cachesvc_loaded_chunks"


def vllm_python(environment: Mapping[str, str] = os.environ) -> Path:
    """A Python with vLLM. AbsentError if nobody named one and this one has none."""
    named = environment.get("CACHESVC_VLLM_PYTHON")
    if named:
        return Path(named)
    if importlib.util.find_spec("vllm") is None:
        raise AbsentError("no vLLM: make vllm-env, and name its Python in CACHESVC_VLLM_PYTHON")
    return Path(sys.executable)


def both_python(environment: Mapping[str, str] = os.environ) -> Path:
    """A Python with vLLM and LMCache. AbsentError if there is none."""
    named = environment.get("CACHESVC_VLLM_LMCACHE_PYTHON")
    python = Path(named) if named else cache_dir(environment) / "bench-vllm-lmcache" / "bin" / "python"
    if not python.exists():
        raise AbsentError(f"no vLLM beside LMCache at {python}: make bench-env-vllm-lmcache")
    return python


def model_of(shape: Shape = MID) -> Path:
    """The model of all engines, written when it's wanted first."""
    return cached_model(shape, cache_dir() / "bench", dtype=DTYPE)


def kv_bytes(shape: Shape, tokens: int) -> int:
    """KV cache of so many tokens."""
    return tokens * shape.kv_elements_per_token * BYTES_PER_ELEMENT


def chunk_tokens(shape: Shape) -> int:
    """Of our chunks: whole blocks, at least 1 MiB if that isn't more than 256 tokens."""
    return BLOCK_TOKENS if kv_bytes(shape, BLOCK_TOKENS) >= MIB else 2 * BLOCK_TOKENS


def chunk_bytes(shape: Shape) -> int:
    """Of our chunks."""
    return kv_bytes(shape, chunk_tokens(shape))


# --- caches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """How an engine is told to use a cache."""

    name: str
    python: Path
    transfer: dict[str, Any] | None
    """VLLM's kv_transfer_config."""
    env: dict[str, str] = field(default_factory=dict)
    shm_name: str = ""
    """Part of the names of its shared memory, if that is to be touched before (ours isn't)."""

    @property
    def settings(self) -> dict[str, Any]:
        """For vLLM."""
        return {"dtype": DTYPE, "worker_extension_cls": AMX} | (
            {"kv_transfer_config": self.transfer} if self.transfer else {}
        )


def start_cache(stack: ExitStack, name: str, memory_bytes: int, chunk: int) -> Cache:
    """The service behind it runs until `stack` ends; `chunk` bytes have our chunks. AbsentError if something isn't
    installed."""
    connector: dict[str, Any] = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if name == NONE:
        return Cache(name, vllm_python(), None)
    if name == OURS:
        daemon = stack.enter_context(Daemon(memory_bytes))
        fill(daemon, chunk)
        connector |= {"kv_connector": "CachesvcConnector", "kv_connector_module_path": "cachesvc.connector"}
        connector["kv_connector_extra_config"] = {"address": daemon.address}
        return Cache(name, vllm_python(), connector)
    if name == EXAMPLE:
        # in memory, as all the others
        home = tempfile.mkdtemp(prefix="cachesvc-bench-", dir="/dev/shm")
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        connector |= {"kv_connector": name, "kv_connector_extra_config": {"shared_storage_path": home}}
        return Cache(name, vllm_python(), connector)
    assert name == LMCACHE, f"there are {SUBJECTS}, {name!r} isn't one"
    python = both_python()
    server = stack.enter_context(closing(LmcacheServer(memory_bytes)))
    connector |= {"kv_connector": "LMCacheMPConnector", "kv_connector_module_path": vllm_child.__name__}
    connector["kv_connector_extra_config"] = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port}
    return Cache(name, python, connector, lmcache_variables(), server.shm_name)


def fill(daemon: Daemon, chunk: int) -> None:
    """Have the arena full of other chunks of the same size, as it is after some hours: each store has to evict then."""
    capacity = daemon.ram_bytes // chunk
    with Client(daemon.address, namespace="before", chunk_bytes=chunk) as client:
        for first in range(0, 2 * capacity, FILLED_AT_ONCE):
            store(client, range(first, first + FILLED_AT_ONCE))


def start_caches(
    stack: ExitStack, names: Iterable[str], memory_bytes: int, chunk: int
) -> tuple[list[Cache], dict[str, str]]:
    """Those that are here, and why the others aren't."""
    found, absent = [], {}
    for name in names:
        try:
            found.append(start_cache(stack, name, memory_bytes, chunk))
        except AbsentError as reason:
            if name in (NONE, OURS):
                raise
            absent[name] = str(reason)
    return found, absent


# --- engines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, from its arrival until the engine has nothing to do any more."""

    ttft_ms: float
    cpu_ms: float
    """Of all the engine's threads, stores that follow included."""
    token_ids: tuple[int, ...]
    local_tokens: int
    loaded_tokens: int
    """As vLLM planned it; what was really loaded the cache itself must say."""


class Engine:
    """One engine that runs until its `ExitStack` ends."""

    def __init__(self, cache: Cache, process: EngineProcess) -> None:
        self.cache = cache
        self.process = process

    def ask(self, prompt: list[int], max_tokens: int = 1) -> Asked:
        """Answer it, and wait until its stores have ended. RuntimeError if vLLM refused."""
        before = self.apply(vllm_child.cpu_seconds.__name__)
        [answer] = self.process.generate([prompt], max_tokens)
        self.process.settle()
        cpu = self.apply(vllm_child.cpu_seconds.__name__) - before
        if answer.error:
            raise RuntimeError(f"{self.cache.name}: {answer.error}")
        local, loaded = answer.local_tokens, answer.loaded_tokens
        return Asked(1000 * answer.ttft_s, 1000 * cpu, tuple(answer.token_ids), local, loaded)

    def loaded_chunks(self) -> float:
        """Ours only: chunks that are really there, every byte of them checked to be what was leased."""
        return sum(value for name, value in self.process.metrics().items() if name.startswith(LOADED))

    def apply(self, function: str, **arguments: Any) -> Any:
        """A function of `bench.vllm_child`."""
        return self.process.apply(f"{vllm_child.__name__}:{function}", **arguments)


def start_engines(stack: ExitStack, caches: Iterable[Cache], each: int, model: Path, **settings: Any) -> list[Engine]:
    """`each` engines a cache, two at a time as more would only get into each other's way."""
    engines: list[Engine] = []
    for cache in caches:
        started = []
        for _ in range(1 if cache.name == NONE else each):
            process = EngineProcess(model, cache.settings | settings, python=cache.python, env=cache.env)
            started.append(stack.enter_context(process))
        engines += [Engine(cache, process.wait_ready()) for process in started]
    return engines


def touch(engines: Iterable[Engine]) -> None:
    """Map every page of the shared memory of those who want it: nobody is to pay for page faults of the first use."""
    for engine in engines:
        if engine.cache.shm_name and not engine.apply(vllm_child.populate.__name__, name=engine.cache.shm_name):
            raise RuntimeError(f"{engine.cache.name} hasn't mapped {engine.cache.shm_name}: not in shared-memory mode")


# --- prompts ----------------------------------------------------------------------------------------------------------


class Prompts:
    """Random documents and questions, every one of them new."""

    def __init__(self, seed: int = 0, shape: Shape = MID) -> None:
        self._draw = random.Random(seed)
        self._vocab = shape.vocab

    def tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(FIRST_TOKEN, self._vocab) for _ in range(count)]

    def question(self) -> list[int]:
        return self.tokens(QUESTION_TOKENS)


def warm(writer: Engine, reader: Engine, prompts: Prompts, tokens: int) -> None:
    """Every path once, and again until the cache is joined: what one stores the other (or itself, afterwards) loads."""

    def shared() -> bool:
        document = prompts.tokens(tokens)
        writer.ask(document + prompts.question())
        writer.ask(document + prompts.question())
        if reader is writer and not reader.process.reset_prefix_cache():
            raise RuntimeError(f"{reader.cache.name} holds blocks of requests that have ended")
        asked = reader.ask(document + prompts.question())
        return writer.cache.transfer is None or asked.loaded_tokens == tokens

    wait_for(f"a first hit of {writer.cache.name}", shared, WARM_S, 0.2)
