"""Real vLLM engines on a real, small daemon, and what a test asks of both.

Covers: starting engines that are connected, prompts, comparing answers, counting what happened. Faults inside an engine
are in `tests.engines.faults`, engines themselves in `cachesvc.demo.engine`.

What was loaded is never proven by vLLM's count of an answer alone: it's made at admission. `Tally` counts what the
daemon leased and what the connector loaded to the last byte.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cachesvc.demo.child import Answer
from cachesvc.demo.engine import EngineProcess
from cachesvc.demo.model import TINY, Shape, cached_model
from tests.support.daemon import Daemon, wait_for

BLOCK = 128
"""Tokens of one of vLLM's blocks on the CPU."""
CHUNK = 2 * BLOCK
"""Tokens of a chunk of `TINY`: 512 KiB in float32."""
CHUNK_BYTES = 512 << 10

HANG_S = 120.0
SETTLED_S = 2.5
PATIENCE_S = 0.5
VERY_PATIENT_S = 20.0
"""With two engines of two ranks, which spin, the daemon was seen to wait for a core for 2 s."""
CLOSE = 1e-3
"""How far logprobs may be apart where the same is computed in another order; wrong KV moves them by whole numbers."""

Prompt = list[int]


def words(seed: int | str, count: int) -> Prompt:
    """A prompt that shares no block with one of another seed."""
    draw = random.Random(seed)
    return [draw.randrange(3, 2000) for _ in range(count)]


def wait_long(what: Callable[[], Any]) -> Any:
    """The first true answer of `what()`, with patience for an engine on a busy core."""
    return wait_for(what, HANG_S)


# --- engines ----------------------------------------------------------------------------------------------------------


class Engines:
    """Starts engines; all that it started are dead when the `with` block ends."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._open = ExitStack()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def model(self, shape: Shape = TINY, seed: int = 0) -> Path:
        return settled(cached_model(shape, self._models, seed=seed, dtype="float32"))

    def plain(self, shape: Shape = TINY, **settings: Any) -> EngineProcess:
        """One without a connector."""
        return self._enter(EngineProcess(self.model(shape), settings)).wait_ready()

    def begin(
        self,
        address: Path | str,
        model: Path | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> EngineProcess:
        """One that has a connector and may not be ready yet. `extra`: settings of the connector."""
        connector = {
            "kv_connector": "CachesvcConnector",
            "kv_connector_module_path": "cachesvc.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"address": str(address), **(extra or {})},
        }
        return self._enter(EngineProcess(model or self.model(), {"kv_transfer_config": connector, **settings}, env=env))

    def start(self, daemon: Daemon, model: Path | None = None, **options: Any) -> EngineProcess:
        """One whose processes all are connected."""
        return ready(self.begin(daemon.socket(), model, **options))

    def pair(self, daemon: Daemon, model: Path | None = None, **options: Any) -> tuple[EngineProcess, EngineProcess]:
        """Two that agree in everything, started at the same time."""
        one, two = (self.begin(daemon.socket(), model, **options) for _ in range(2))
        return ready(one), ready(two)

    def _enter(self, engine: EngineProcess) -> EngineProcess:
        self._open.enter_context(engine)
        return engine


def ready(engine: EngineProcess, patience_s: float = PATIENCE_S) -> EngineProcess:
    """Wait until it's started and all of its processes are connected: a rank joins with a step."""
    engine.wait_ready()
    engine.apply("tests.engines.faults:be_patient", seconds=patience_s)

    def joined() -> bool:
        # as long as that: on CPUs with AMX vLLM 0.32 dies if a first prompt in bfloat16 is shorter than a tile
        engine.generate([words("hello", 40)], max_tokens=1)
        return connected(engine)

    wait_long(joined)
    return engine


def settled(folder: Path) -> Path:
    """Wait until the files in it are so old that an engine believes that it loaded just them."""
    changed = max(path.stat().st_ctime for path in [folder, *folder.iterdir()])
    time.sleep(max(0.0, changed + SETTLED_S - time.time()))
    return folder


def connected(engine: EngineProcess) -> bool:
    """Are its scheduler and all of its ranks welcome at the daemon?"""
    return bool(engine.apply("tests.engines.faults:connected"))


def faults_of(engine: EngineProcess) -> dict[str, int]:
    """Exceptions of ours that were kept from vLLM, in all its processes."""
    return dict(engine.apply("tests.engines.faults:guarded"))


def answer(engine: EngineProcess, prompt: Sequence[int], **options: Any) -> Answer:
    """Of one request by itself, with logprobs, every store of it ended."""
    said = answer_now(engine, prompt, **options)
    engine.settle()
    return said


def answer_now(engine: EngineProcess, prompt: Sequence[int], **options: Any) -> Answer:
    """The same, whatever else is still going on in the engine."""
    [said] = engine.generate([prompt], **{"max_tokens": 8, "logprobs": True, **options})
    return said


# --- comparing --------------------------------------------------------------------------------------------------------


def assert_same(one: Answer, other: Answer) -> None:
    """The same tokens with the same probabilities, to the last bit."""
    assert one.error is None
    assert other.error is None
    assert one.token_ids == other.token_ids
    assert one.logprobs == other.logprobs


def assert_alike(one: Answer, other: Answer) -> None:
    """The same tokens with nearly the same probabilities: the two were computed in pieces of different sizes."""
    assert one.error is None
    assert other.error is None
    assert one.token_ids == other.token_ids
    assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE)


class Right:
    """What an engine without a connector says. Asked once for each prompt, unless `again`: a hit of its own cache."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._said: dict[tuple[int, ...], Answer] = {}

    def __call__(self, prompt: Sequence[int], *, again: bool = False, max_tokens: int = 8) -> Answer:
        key = (max_tokens, *prompt)
        if again or key not in self._said:
            said = answer(self._engine, prompt, max_tokens=max_tokens)
            if again:
                return said
            self._said[key] = said
        return self._said[key]


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """What has happened so far, as the daemon and an engine's connector count it, in chunks."""

    leased: int
    sealed: int
    hits: int
    loaded: int
    stored: int
    failed_loads: int
    failed_stores: int

    def __sub__(self, before: Tally) -> Tally:
        return Tally(**{name: value - getattr(before, name) for name, value in vars(self).items()})


def tally(daemon: Daemon, engine: EngineProcess) -> Tally:
    """Of this moment."""
    counts, mine = daemon.tenant()["counts"], engine.metrics()
    return Tally(
        leased=counts["loads"],
        sealed=counts["stores"],
        hits=int(mine.get("vllm:cachesvc_hit_chunks", 0)),
        loaded=int(mine.get("vllm:cachesvc_loaded_chunks", 0)),
        stored=int(mine.get("vllm:cachesvc_stored_chunks", 0)),
        failed_loads=int(mine.get("vllm:cachesvc_failed_transfers{direction=load}", 0)),
        failed_stores=int(mine.get("vllm:cachesvc_failed_transfers{direction=store}", 0)),
    )


class Counting:
    """`with counting(daemon, engine) as seen: ...`, then `seen.loaded` and so on: what happened inside."""

    def __init__(self) -> None:
        self.tally = Tally(0, 0, 0, 0, 0, 0, 0)
        self.missed: dict[str, int] = {}
        """By reason, as vLLM's metrics show them."""

    def __getattr__(self, name: str) -> int:
        return int(getattr(self.tally, name))


@contextmanager
def counting(daemon: Daemon, engine: EngineProcess) -> Iterator[Counting]:
    seen = Counting()
    before, missed = tally(daemon, engine), misses(engine)
    yield seen
    seen.tally = tally(daemon, engine) - before
    after = misses(engine)
    seen.missed = {reason: n - missed.get(reason, 0) for reason, n in after.items() if n != missed.get(reason, 0)}


def misses(engine: EngineProcess) -> dict[str, int]:
    """Chunks that its requests didn't find so far, by reason."""
    return _by_label(engine, "vllm:cachesvc_missed_chunks{reason=")


def refused(engine: EngineProcess) -> dict[str, int]:
    """Chunks of it that got no slot so far, by reason."""
    return _by_label(engine, "vllm:cachesvc_refused_chunks{reason=")


def _by_label(engine: EngineProcess, start: str) -> dict[str, int]:
    found = engine.metrics().items()
    return {name[len(start) : -1]: int(value) for name, value in found if name.startswith(start) and value}


def nothing_held(daemon: Daemon) -> bool:
    """Is no lease, no ticket and no *writing* or quarantined slot left?"""
    tenant = daemon.tenant()
    slabs = tenant["classes"]
    held = sum(slab["writing"] + slab["leased"] + slab["quarantined"] for slab in slabs)
    whole = all(slab["free"] + slab["sealed"] == slab["slots"] for slab in slabs)
    return whole and not held and not tenant["write_tickets"] and not tenant["leases"]


def writing(daemon: Daemon) -> int:
    """Slots in *writing*."""
    return sum(slab["writing"] for slab in daemon.tenant()["classes"])


def leased(daemon: Daemon) -> int:
    """Slots under a lease."""
    return sum(slab["leased"] for slab in daemon.tenant()["classes"])


def namespaces(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """What the daemon says of each."""
    return dict(daemon.tenant()["namespaces"])
