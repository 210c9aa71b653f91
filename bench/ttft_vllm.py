"""How long until the first token, when another engine has stored the prompt's KV cache, and what does a connector cost?

Real vLLM engines on a CPU, a random Llama of 8 layers in bfloat16 (8 KiB of KV cache a token), one thread each, one
request at a time: a new document of 2k, 4k, 8k tokens and a question of 40. In each round, for each document,

- *cold*: a first engine computes document and question, and stores;
- *local hit*: the same engine answers another question about it from its own prefix cache;
- *shared hit*: a second engine, which has never seen the document, loads it.

Subjects: vLLM without a connector (it has no shared hit), ours, vLLM's ExampleConnector (its files lie in memory),
LMCache's MP connector and server in shared-memory mode (its pages are touched before, ours aren't). Right before each
hit of a subject comes a local hit of the engine without connector, the base of all hits; a cold prompt's base is that
engine's cold prompt in the same round, with the same tokens.

Values are wall times to the first token. CPU is what the engine's process spent on a request until it had nothing to do
any more, with storing and without the servers. Judged: shared hits of 8k; the CPU that a local hit costs more than its
base; the CPU of a cold prompt of 8k without what memcpy of its KV cache costs, by the base's.

That a hit was loaded isn't believed: ours must have counted as many loaded chunks as the document has, for the others
there is only vLLM's plan. Afterwards a hit of each says 16 tokens; how many are those of the base's local hit stands in
the note (the computation has the same shape then, so in bfloat16, too, they should be).
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import numpy as np

from bench.harness import Limit, Pairs, Report, Row, answer, arguments, numbers
from bench.vllm_engines import (
    BLOCK_TOKENS,
    NONE,
    OURS,
    SUBJECTS,
    Asked,
    Engine,
    Prompts,
    chunk_bytes,
    chunk_tokens,
    kv_bytes,
    model_of,
    start_caches,
    start_engines,
    touch,
    warm,
)
from cachesvc.config import GIB, MIB
from cachesvc.demo.model import MID, TINY, Shape

TITLE: Final = __doc__.splitlines()[0]
SHAPES: Final = {"mid": MID, "tiny": TINY}
SAID_TOKENS: Final = 16
JUDGED_TOKENS: Final = 8192
SHARED: Final = Limit("ratio", at_most=1.1)
LOCAL_MS: Final = Limit("value", at_most=2.0)
COLD: Final = Limit("ratio", at_most=1.02)
AFTER_S: Final = 0.05
"""After a cold prompt: what some connectors do after vLLM has nothing to do any more."""


@dataclass
class Taken:
    """All requests of one kind of one subject, each with its base."""

    asked: list[Asked] = field(default_factory=list)
    base: list[Asked] = field(default_factory=list)
    floors_ms: list[float] = field(default_factory=list)
    """CPU of memcpy of the same KV cache, of cold prompts."""

    @property
    def wall(self) -> Pairs:
        return Pairs([one.ttft_ms for one in self.asked], [one.ttft_ms for one in self.base])

    @property
    def cpu(self) -> Pairs:
        return Pairs([one.cpu_ms for one in self.asked], [one.cpu_ms for one in self.base])


class Memcpy:
    """The floor of a store: KV cache to memory, all of it written before, through buffers of several documents."""

    def __init__(self, size: int, buffers: int = 4) -> None:
        self._sources = [np.ones(size, np.uint8) for _ in range(buffers)]
        self._targets = [np.ones(size, np.uint8) for _ in range(buffers)]
        self._next = 0

    def cpu_ms(self) -> float:
        """Of one copy."""
        self._next = (self._next + 1) % len(self._sources)
        before = time.process_time()
        np.copyto(self._targets[self._next], self._sources[self._next])
        return 1000 * (time.process_time() - before)


class Bench:
    """Engines in pairs: the first stores, the second loads. `base` is the engine without connector."""

    def __init__(self, engines: list[Engine], shape: Shape, prompts: Prompts) -> None:
        pairs: dict[str, list[Engine]] = {}
        for engine in engines:
            pairs.setdefault(engine.cache.name, []).append(engine)
        [self.base] = pairs.pop(NONE)
        self.pairs = {name: (writer, reader) for name, (writer, reader) in pairs.items()}
        self._shape, self._prompts = shape, prompts

    def warm(self, tokens: int) -> None:
        warm(self.base, self.base, self._prompts, tokens)
        for writer, reader in self.pairs.values():
            warm(writer, reader, self._prompts, tokens)

    def measure(self, tokens: int, rounds: int) -> dict[tuple[str, str], Taken]:
        """By kind and subject."""
        taken = {(kind, name): Taken() for kind in ("cold", "local", "shared") for name in self.pairs}
        memcpy = Memcpy(kv_bytes(self._shape, tokens))
        for _ in range(rounds):
            document = self._prompts.tokens(tokens)
            prompt = document + self._prompts.question()
            base = self.base.ask(prompt)
            for name, (writer, _) in self.pairs.items():
                cold = taken["cold", name]
                cold.asked.append(self._cold(writer, prompt))
                cold.base.append(base)
                cold.floors_ms.append(memcpy.cpu_ms())
            for name, (writer, reader) in self.pairs.items():
                self._hit(taken["local", name], writer, document, loads=False)
                self._hit(taken["shared", name], reader, document, loads=True)
        return taken

    @staticmethod
    def _cold(engine: Engine, prompt: list[int]) -> Asked:
        asked = engine.ask(prompt)
        time.sleep(AFTER_S)
        return asked

    def _hit(self, taken: Taken, engine: Engine, document: list[int], *, loads: bool) -> None:
        base, before = self.base.ask(document + self._prompts.question()), engine.loaded_chunks()
        asked = engine.ask(document + self._prompts.question())
        check(self.base, base, len(document), 0)
        check(engine, asked, *((0, len(document)) if loads else (len(document), 0)))
        chunks = engine.loaded_chunks() - before
        if loads and engine.cache.name == OURS and chunks * chunk_tokens(self._shape) != len(document):
            raise RuntimeError(f"ours loaded {chunks:g} chunks of a document of {len(document)} tokens")
        taken.asked.append(asked)
        taken.base.append(base)

    def agreement(self, tokens: int) -> dict[str, int]:
        """How many tokens of a shared hit are those of the base's local hit, by subject."""
        document, question = self._prompts.tokens(tokens), self._prompts.question()
        self.base.ask(document + self._prompts.question())
        said = self.base.ask(document + question, SAID_TOKENS).token_ids
        agreed = {}
        for name, (writer, reader) in self.pairs.items():
            writer.ask(document + self._prompts.question())
            heard = reader.ask(document + question, SAID_TOKENS).token_ids
            agreed[name] = sum(a == b for a, b in zip(said, heard, strict=True))
        return agreed


def check(engine: Engine, asked: Asked, local: int, loaded: int) -> None:
    """RuntimeError if it wasn't the kind of hit that it should be."""
    if (asked.local_tokens, asked.loaded_tokens) != (local, loaded):
        found = f"{asked.local_tokens} tokens locally and {asked.loaded_tokens} loaded"
        raise RuntimeError(f"{engine.cache.name}: {found}, not {local} and {loaded}; {counters(engine)}")


def counters(engine: Engine) -> str:
    """What our connector says."""
    ours = {name: value for name, value in engine.process.metrics().items() if "cachesvc" in name and value}
    return ", ".join(f"{name} {value:g}" for name, value in ours.items())


def rows_of(tokens: int, taken: dict[tuple[str, str], Taken], agreed: dict[str, int]) -> list[Row]:
    """The rows of one length of documents."""
    rows: list[Row] = []
    judged = tokens == JUDGED_TOKENS
    for kind, title in (("cold", "cold"), ("local", "local hit"), ("shared", "shared hit")):
        some = {name: one for (of, name), one in taken.items() if of == kind}
        base = [one for each in some.values() for one in each.base]
        unit, base_kind = f"{title} of {tokens}", "cold" if kind == "cold" else "local hit"
        if kind != "shared":
            cpu = median(one.cpu_ms for one in base)
            rows.append(Row(unit, NONE, median(one.ttft_ms for one in base), "ms", note=f"{cpu:.4g} ms CPU"))
        for name, one in some.items():
            note = f"{one.cpu.value:.4g} ms CPU"
            if kind == "shared":
                floor = median(taken["cold", name].floors_ms)
                note += f"; memcpy {floor:.3g} ms; {agreed[name]} of {SAID_TOKENS} tokens agree"
            limit = SHARED if kind == "shared" and judged and name == OURS else None
            rows.append(Row(unit, name, one.wall.value, "ms", one.wall.ratio, f"{NONE}, {base_kind}", limit, note))
    for name in {name: None for _, name in taken}:
        rows += cpu_rows(tokens, name, taken["local", name], taken["cold", name])
    return rows


def cpu_rows(tokens: int, name: str, local: Taken, cold: Taken) -> list[Row]:
    """What the connector costs where it brings nothing."""
    judged = name == OURS
    more = [ours - base for ours, base in zip(local.cpu.values, local.cpu.base, strict=True)]
    floor = median(cold.floors_ms)
    rest = [cpu - copied for cpu, copied in zip(cold.cpu.values, cold.floors_ms, strict=True)]
    pairs, limit = Pairs(rest, cold.cpu.base), COLD if judged and tokens == JUDGED_TOKENS else None
    return [
        Row(
            f"local hit of {tokens}: CPU more than {NONE}",
            name,
            median(more),
            "ms",
            limit=LOCAL_MS if judged else None,
            note=f"{min(more):.3g} to {max(more):.3g}",
        ),
        Row(
            f"cold of {tokens}: CPU without memcpy of its KV cache",
            name,
            pairs.value,
            "ms",
            pairs.ratio,
            f"{NONE}, cold",
            limit,
            f"memcpy {floor:.3g} ms",
        ),
    ]


def run(options: argparse.Namespace) -> Report:
    shape: Shape = SHAPES[options.model]
    names = [name for name in SUBJECTS if name in (NONE, OURS) or options.peers]
    report = Report("ttft_vllm", TITLE, {"dtype": "bfloat16", "model": options.model, "rounds": options.pairs})
    with ExitStack() as stack:
        stored = sum(options.tokens) * (options.pairs + 1) + 100 * BLOCK_TOKENS
        caches, absent = start_caches(stack, names, max(GIB, 2 * kv_bytes(shape, stored)), chunk_bytes(shape))
        engines = start_engines(
            stack,
            caches,
            2,
            model_of(shape),
            kv_cache_memory_bytes=max(256 * MIB, 3 * kv_bytes(shape, max(options.tokens))),
            max_model_len=max(options.tokens) + 2 * BLOCK_TOKENS,
        )
        report.settings["vllm"] = engines[0].process.info["vllm"]
        bench = Bench(engines, shape, Prompts(options.seed, shape))
        bench.warm(min(options.tokens))
        touch(engines)
        for tokens in options.tokens:
            taken = bench.measure(tokens, options.pairs)
            report.rows += rows_of(tokens, taken, bench.agreement(tokens))
    report.rows += [Row("all", name, None, "ms", note=f"absent: {reason}") for name, reason in absent.items()]
    return report


def main() -> None:
    parser = arguments(TITLE)
    parser.set_defaults(pairs=5)
    parser.add_argument("--tokens", type=numbers, default=[2048, 4096, 8192], help="whole chunks (default: 2k,4k,8k)")
    parser.add_argument("--model", choices=SHAPES, default="mid", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave the other connectors out")
    answer(run, parser)


if __name__ == "__main__":
    main()
