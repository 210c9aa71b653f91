"""What do requests that only wait cost those that are being answered?

A real vLLM engine on a CPU (a random Llama of 8 layers in bfloat16, one thread) answers as many requests as it may at
once (`max_num_seqs`), token by token, while 32 requests with long prompts, half of which lie in the cache, come and
have to wait. Subjects: vLLM without a connector, and with ours. In each round each of both takes three turns of some
steps: nobody waits, 32 wait, nobody waits (they were aborted). The same requests are answered all the time.

Values are CPU of a step in ms, medians over all steps of all rounds: of the thread that schedules inside `schedule()`
(the connector is asked there; the note has the tail: ours asks its daemon for what came in the first steps), and of all
threads in the whole step. The ratio of a whole step is that with 32 waiting by those before and after it, in the
round; that is what is judged.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Final

from bench import vllm_child
from bench.harness import Limit, Ratio, Report, Row, answer, arguments, percentile
from bench.vllm_engines import (
    NONE,
    OURS,
    Engine,
    Prompts,
    chunk_bytes,
    kv_bytes,
    model_of,
    start_caches,
    start_engines,
    warm,
)
from cachesvc.config import GIB, MIB
from cachesvc.demo.model import MID, TINY

TITLE: Final = __doc__.splitlines()[0]
SHAPES: Final = {"mid": MID, "tiny": TINY}
LIMIT: Final = Limit("ratio", at_most=1.03)
STEPS: Final = 100
WARM_STEPS: Final = 20
WARM_TOKENS: Final = 512
SPOKEN_TOKENS: Final = 256
"""Prompts of the requests that are answered."""


@dataclass
class Taken:
    """Steps of one subject: (CPU ms in `schedule()`, CPU ms in all), by round."""

    alone: list[list[vllm_child.Step]] = field(default_factory=list)
    waiting: list[list[vllm_child.Step]] = field(default_factory=list)

    def of_steps(self, what: int) -> tuple[list[float], list[float]]:
        """The median of each round, without and with those that wait: 0 = in `schedule()`, 1 = in all."""
        return [middle(some, what) for some in self.alone], [middle(some, what) for some in self.waiting]

    def tail(self) -> str:
        """What the median doesn't see of `schedule()` with those that wait."""
        spent = [step[0] for steps in self.waiting for step in steps]
        first = [sum(step[0] for step in steps) / len(steps) for steps in self.waiting]
        return f"p99 {percentile(spent, 99):.3g} ms, max {max(spent):.3g}, mean {mean(first):.3g}"


def middle(steps: list[vllm_child.Step], what: int) -> float:
    return median(step[what] for step in steps)


class Subject:
    """One engine with its requests, stepped by hand."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.taken = Taken()
        self._engine, self._options = engine, options
        self._prompts = Prompts(options.seed, SHAPES[options.model])
        self._stored = [self._prompts.tokens(options.tokens) for _ in range(2)]

    def start(self) -> None:
        """Store two long prompts, then have `max_num_seqs` requests that go on to the end."""
        warm(self._engine, self._engine, self._prompts, WARM_TOKENS)
        for document in self._stored:
            self._engine.ask(document)
        process, options = self._engine.process, self._options
        if not process.reset_prefix_cache():
            raise RuntimeError("blocks of requests that have ended are still held")
        self._engine.apply(vllm_child.watch_steps.__name__)
        process.auto_step(False)
        most = (options.pairs + 2) * (3 * options.steps + 2 * WARM_STEPS)
        for _ in range(options.answered):
            process.submit(self._prompts.tokens(SPOKEN_TOKENS), most)
        self._steps(WARM_STEPS)

    def turn(self) -> tuple[list[vllm_child.Step], list[vllm_child.Step]]:
        """A round: steps before and after together, and those between with everybody waiting."""
        process, options = self._engine.process, self._options
        before = self._steps(options.steps // 2)
        names = [process.submit(self._long(number)) for number in range(options.waiting)]
        waiting = self._steps(options.steps)
        states = process.state()["requests"]
        if any(states[name]["status"] not in ("WAITING", "PREEMPTED") for name in names):
            raise RuntimeError(f"somebody doesn't wait: {states}")
        process.abort(*names)
        process.wait(names)
        after = self._steps(options.steps // 2)
        return before + after, waiting

    def round(self, *, counts: bool) -> None:
        alone, waiting = self.turn()
        if counts:
            self.taken.alone.append(alone)
            self.taken.waiting.append(waiting)

    def _long(self, number: int) -> list[int]:
        """Half of them begin with a prompt that is stored."""
        stored = (
            self._stored[number // 2 % len(self._stored)] if number % 2 else self._prompts.tokens(len(self._stored[0]))
        )
        return stored + self._prompts.question()

    def _steps(self, count: int) -> list[vllm_child.Step]:
        self._engine.process.step(count)
        steps: list[vllm_child.Step] = [tuple(step) for step in self._engine.apply(vllm_child.take_steps.__name__)]
        if len(steps) != count:
            raise RuntimeError(f"{len(steps)} steps of {count}: the answers are too short")
        return steps


def rows_of(name: str, taken: Taken, options: argparse.Namespace) -> list[Row]:
    waiting = f"{options.waiting} wait"
    alone_in, waiting_in = taken.of_steps(0)
    alone_all, waiting_all = taken.of_steps(1)
    limit = LIMIT if name == OURS else None
    more = Ratio.of(waiting_in, alone_in)
    ratio = Ratio.of(waiting_all, alone_all)
    return [
        Row("schedule(), nobody waits", name, median(alone_in), "ms CPU"),
        Row(f"schedule(), {waiting}", name, median(waiting_in), "ms CPU", more, "nobody waits", note=taken.tail()),
        Row("whole step, nobody waits", name, median(alone_all), "ms CPU"),
        Row(f"whole step, {waiting}", name, median(waiting_all), "ms CPU", ratio, "nobody waits", limit),
    ]


def run(options: argparse.Namespace) -> Report:
    settings = {
        "rounds": options.pairs,
        "max_num_seqs": options.answered,
        "prompt_tokens": options.tokens,
        "model": options.model,
    }
    report = Report("decode_interference", TITLE, settings)
    shape = SHAPES[options.model]
    long_bytes = kv_bytes(shape, options.tokens)
    spoken = SPOKEN_TOKENS + (options.pairs + 2) * (3 * options.steps + 2 * WARM_STEPS)
    with ExitStack() as stack:
        caches, _ = start_caches(stack, (NONE, OURS), max(GIB, 8 * long_bytes), chunk_bytes(shape))
        engines = start_engines(
            stack,
            caches,
            1,
            model_of(shape),
            max_num_seqs=options.answered,
            max_model_len=max(options.tokens + 256, spoken),
            kv_cache_memory_bytes=max(256 * MIB, 2 * long_bytes, 2 * options.answered * kv_bytes(shape, spoken)),
        )
        subjects = [Subject(engine, options) for engine in engines]
        for subject in subjects:
            subject.start()
        for number in range(options.pairs + 1):
            for subject in subjects:
                subject.round(counts=number > 0)
        for cache, subject in zip(caches, subjects, strict=True):
            report.rows += rows_of(cache.name, subject.taken, options)
    return report


def main() -> None:
    parser = arguments(TITLE)
    parser.add_argument("--waiting", type=int, default=32, help="requests that wait (default: %(default)s)")
    parser.add_argument("--answered", type=int, default=4, help="requests that are answered (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of each prompt that waits (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a turn, even (default: %(default)s)")
    parser.add_argument("--model", choices=SHAPES, default="mid", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    answer(run, parser)


if __name__ == "__main__":
    main()
