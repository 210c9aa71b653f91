"""`cachesvc demo`: two vLLM engines share a long prompt, with a daemon of their own, and with --kill that daemon dies.

Covers: the story that is told, what must have happened in it, the tables. Not here: engines (`demo.engine`), the daemon
(`demo.daemon`), models (`demo.model`).

Engine 1 answers a document with question 1 (cold) and question 2 (its own prefix cache), engine 2 the document with
question 2 (loaded from the pool) and question 3. Everything in float32, where a hit computes what the first engine
computed, number by number: so the answers to question 2 must be equal, logprobs and all. Whether the document was
loaded, the daemon and the connector say, too: vLLM counts when a load begins.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cachesvc.config import MIB, cache_dir
from cachesvc.demo.child import Answer
from cachesvc.demo.daemon import Counters, Daemon
from cachesvc.demo.engine import EngineError, EngineProcess
from cachesvc.demo.model import MID, cached_model
from cachesvc.errors import CachesvcError, OperatorError

QUESTION_TOKENS: Final = 24
ANSWER_TOKENS: Final = 16
WARM_UP_TOKENS: Final = 520
CHUNK_TOKENS_MAX: Final = 256
"""The connector makes no larger chunks unless it is told to, so less of a document is never stored."""

COPIED: Final = "vllm:cachesvc_loaded_chunks"
"""The connector's count of chunks that it has copied and checked."""

SETTLED_S: Final = 3.0
"""A model younger than this at an engine's start isn't shared: files have coarse clocks."""

READY_S: Final = 120.0
"""A guard: how long two engines may take until the first chunk went from one to the other."""


class Failure(CachesvcError):  # noqa: N818 - of the demo, not of a part of it
    """The demo didn't show what it promises; the text says what was seen instead."""


def run(model: Path | None, tokens: int, kill: bool, console: Console) -> None:
    """The whole demo. Failure if it didn't show what it promises, OperatorError if it can't run here."""
    if find_spec("vllm") is None:
        raise OperatorError("vLLM isn't in this environment: run `make demo`, which makes one that has it")
    with _cleanup() as cleanup:
        story = Story(console)
        stage = Stage(story, cleanup, model, tokens)
        try:
            table = _killed(stage, story) if kill else _shared(stage, story)
        except (EngineError, OperatorError) as error:
            raise Failure(f"in the middle of it: {error}") from error
    console.print(table)


# --- telling ----------------------------------------------------------------------------------------------------------


class Story:
    """Prints what happens while it happens: a line a step, with the time it took."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, what: str) -> Iterator[Callable[[str], None]]:
        """While the block runs; call what it gives with what came out."""
        said = ""

        def done(outcome: str) -> None:
            nonlocal said
            said = f": [bold]{escape(outcome)}[/]"

        started, mark = time.monotonic(), "[red]✗[/]"
        try:
            with self._console.status(f"{what} ..."):
                yield done
            mark = "[green]✓[/]"
        finally:
            self._console.print(f"{mark} {what}{said} [dim]({_time(time.monotonic() - started)})[/]", highlight=False)


@contextmanager
def _cleanup() -> Iterator[ExitStack]:
    """A stack that is unwound whatever ends the block, SIGTERM and Ctrl-C too; these don't interrupt the unwinding."""
    stack = ExitStack()
    if threading.current_thread() is not threading.main_thread():
        with stack:
            yield stack
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stack
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        try:
            stack.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _numbers(answer: Answer) -> str:
    parts = [f"{answer.computed_tokens} tokens computed"]
    parts += [f"{answer.local_tokens} from its own cache"] if answer.local_tokens else []
    parts += [f"{answer.loaded_tokens} loaded from the pool"] if answer.loaded_tokens else []
    return f"{', '.join(parts)}, first token after {_time(answer.ttft_s)}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


# --- the stage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model: what its config.json says."""

    vocab: int
    context: int
    kv_bytes_per_token: int

    @classmethod
    def read(cls, model: Path) -> Sizes:
        """OperatorError if that is no model."""
        try:
            whole: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
            text = whole.get("text_config", whole)
            heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
            kv_heads = int(text.get("num_key_value_heads") or heads)
            head_dim = int(text.get("head_dim") or hidden // heads)
            float32_bytes = 4
            kv_bytes = 2 * int(text["num_hidden_layers"]) * kv_heads * head_dim * float32_bytes
            return cls(int(text["vocab_size"]), int(text["max_position_embeddings"]), kv_bytes)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise OperatorError(
                f"--model {model}: {error!r} in its config.json; name the directory of a causal language model"
            ) from error


def _let_settle(model: Path) -> None:
    """Wait until the model is clearly older than the engines: else nobody can say that they loaded what lies there."""
    newest = max(path.stat().st_ctime for path in (model, *model.iterdir()))
    while time.time() - newest < SETTLED_S:
        time.sleep(0.1)


class Stage:
    """A daemon, two engines that have warmed up, a document and three questions."""

    def __init__(self, story: Story, cleanup: ExitStack, model: Path | None, tokens: int) -> None:
        with story.step("A small model with random weights" if model is None else "The model") as done:
            path = cached_model(MID, cache_dir() / "demo") if model is None else model
            sizes = Sizes.read(path)
            _let_settle(path)
            done(path.name)
        context = tokens + QUESTION_TOKENS + ANSWER_TOKENS
        if context > sizes.context:
            raise OperatorError(f"--tokens {tokens}: this model reads {sizes.context} tokens at most; ask for fewer")
        self.tokens = tokens
        self._vocab = sizes.vocab
        self._seed = 0
        kv_bytes = -(-3 * context * sizes.kv_bytes_per_token // (64 * MIB)) * 64 * MIB
        memory = max(512 * MIB, kv_bytes)
        with story.step("A daemon with a pool in RAM") as done:
            self.daemon = cleanup.enter_context(Daemon(memory))
            done(f"{memory // MIB} MiB")
        with story.step("Two vLLM engines, one line of configuration each") as done:
            settings = {
                "kv_cache_memory_bytes": max(256 * MIB, kv_bytes),
                "kv_transfer_config": {
                    "kv_connector": "CachesvcConnector",
                    "kv_connector_module_path": "cachesvc.connector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"address": str(self.daemon.socket)},
                },
                "max_model_len": max(context, 2048),
            }
            self.one = cleanup.enter_context(EngineProcess(path, settings))
            self.two = cleanup.enter_context(EngineProcess(path, settings))
            self.one.wait_ready()
            self.two.wait_ready()
            done(f"vLLM {self.one.info['vllm']}")
        with story.step("Both warm up with short prompts that have nothing to do with it"):
            self._warm_up()
        self.document = self._words(tokens)
        self.questions = [self._words(QUESTION_TOKENS) for _ in range(3)]

    def _words(self, count: int) -> list[int]:
        """Tokens that no prompt before had in this order. The first ids of a vocabulary are special often."""
        self._seed += 1
        low, high = self._vocab // 8, self._vocab
        state = self._seed
        words = []
        for _ in range(count):
            # a linear congruential generator; the document must be the same every time, nothing more
            state = (6364136223846793005 * state + 1442695040888963407) % (1 << 64)
            words.append(low + (state >> 33) % (high - low))
        return words

    def _warm_up(self) -> None:
        """Until a prompt of engine 1 was loaded by engine 2: then both know what they share, and have every page."""
        until = time.monotonic() + READY_S
        while True:
            words = self._words(WARM_UP_TOKENS)
            for engine in (self.one, self.two):
                [answer] = right(engine.generate([words]))
                engine.settle()
            if answer.loaded_tokens > 0:
                return
            if time.monotonic() > until:
                seen = self.daemon.counters()
                raise Failure(
                    f"engine 2 loaded nothing that engine 1 stored in {READY_S:g} s: {seen.chunks} chunks, "
                    f"{seen.sharing} engines in one of {seen.namespaces} namespaces, {seen.why}"
                )
            time.sleep(0.2)

    def ask(self, engine: EngineProcess, question: int) -> Answer:
        """The document and question 1, 2 or 3; everything is stored when this returns."""
        [answer] = right(engine.generate([self.prompt(question)], ANSWER_TOKENS, logprobs=True))
        engine.settle()
        return answer

    def seen(self) -> Seen:
        """The counts of now."""
        return Seen(self.daemon.counters(), self.copied())

    def copied(self) -> int:
        """Chunks that engine 2 has loaded so far."""
        return int(sum(value for name, value in self.two.metrics().items() if name.startswith(COPIED)))

    def prompt(self, question: int) -> list[int]:
        return self.document + self.questions[question - 1]


def right(answers: list[Answer]) -> list[Answer]:
    """The answers. Failure if vLLM refused or ended one with an error."""
    for answer in answers:
        if answer.error is not None or answer.finish_reason != "length":
            raise Failure(f"a request ended with {answer.finish_reason or 'a refusal'}: {answer.error}")
    return answers


@dataclass(frozen=True, slots=True)
class Seen:
    """Before or after a request: what the daemon counts, and what engine 2 says that it copied, in chunks."""

    daemon: Counters
    copied: int


def check_loaded(answer: Answer, tokens: int, before: Seen, after: Seen) -> None:
    """Failure if less than the document, but for a chunk, was loaded: by what vLLM says when the load begins, the
    daemon when it hands out the chunks, or the connector when it has copied them."""
    least = tokens - CHUNK_TOKENS_MAX
    leased, copied = after.daemon.loads - before.daemon.loads, after.copied - before.copied
    said = (
        f"no shared hit: of {tokens} tokens vLLM counts {max(0, answer.loaded_tokens)} as loaded, the daemon {leased} "
        f"chunks as leased and the connector {copied} as copied; the pool has {after.daemon.chunks} chunks, its misses "
        f"are {after.daemon.why}"
    )
    if answer.loaded_tokens < least or min(leased, copied) * CHUNK_TOKENS_MAX < least:
        raise Failure(said)


def check_equal(what: str, answer: Answer, expected: Answer, *, exactly: bool = False) -> None:
    """Failure if two answers differ in a token; `exactly`: or in a bit of a token's probability, which they don't if
    the same tokens were computed on top of the same KV bytes."""
    if answer.token_ids != expected.token_ids:
        raise Failure(f"{what} differ: {answer.token_ids} and {expected.token_ids}")
    if exactly and answer.logprobs != expected.logprobs:
        raise Failure(f"{what} are the same words with other probabilities: wrong KV bytes were read")


# --- two stories ------------------------------------------------------------------------------------------------------


def _shared(stage: Stage, story: Story) -> Table:
    rows: list[tuple[str, str, str, Answer]] = []

    def tell(name: str, engine: EngineProcess, question: int, kind: str) -> Answer:
        with story.step(f"{name} reads {stage.tokens} tokens and question {question}") as done:
            answer = stage.ask(engine, question)
            done(_numbers(answer))
        rows.append((name, f"document + Q{question}", kind, answer))
        return answer

    tell("Engine 1", stage.one, 1, "cold")
    local = tell("Engine 1", stage.one, 2, "local hit")
    before = stage.seen()
    shared = tell("Engine 2", stage.two, 2, "shared hit")
    check_loaded(shared, stage.tokens, before, stage.seen())
    check_equal("the answers of engine 1 and engine 2 to question 2", shared, local, exactly=True)
    tell("Engine 2", stage.two, 3, "local hit, of what was loaded")
    return _table(
        f"A prompt of {stage.tokens} tokens and a question, two engines",
        rows,
        "The answers of both engines to Q2 are equal.",
    )


def _killed(stage: Stage, story: Story) -> Table:
    rows: list[tuple[str, str, str, Answer]] = []
    with story.step("Engine 1 reads the document and questions 1, 2 and 3") as done:
        cold, local, third = (stage.ask(stage.one, question) for question in (1, 2, 3))
        before = stage.daemon.counters()
        done(f"{before.chunks} chunks in the pool")
    rows.append(("Engine 1", "document + Q1", "cold", cold))
    rows.append(("Engine 1", "document + Q2", "local hit", local))
    with story.step("Engine 2 reads it with question 2, and the daemon is killed (-9) in the middle") as done:
        answer = _interrupted(stage)
        check_equal("the answers to question 2 with and without a daemon killed in the middle", answer, local)
        done(_numbers(answer))
    rows.append(("Engine 2", "document + Q2", "daemon killed meanwhile", answer))
    with story.step("Engine 2 forgets it and reads it with question 3, without a daemon") as done:
        stage.two.reset_prefix_cache()
        answer = stage.ask(stage.two, 3)
        check_equal("the answers to question 3 with and without a daemon", answer, third)
        done(_numbers(answer))
    rows.append(("Engine 2", "document + Q3", "no daemon", answer))
    with story.step("The daemon is started again") as done:
        stage.daemon.start()
        after = _reconnected(stage.daemon, before)
        done(f"{after.chunks} chunks are back")
    if after.chunks != before.chunks:
        raise Failure(f"{before.chunks} chunks before the kill, {after.chunks} after the restart")
    with story.step("Engine 2 forgets it again and reads it with question 2") as done:
        stage.two.reset_prefix_cache()
        seen = stage.seen()
        answer = stage.ask(stage.two, 2)
        check_loaded(answer, stage.tokens, seen, stage.seen())
        check_equal("the answers to question 2 before the kill and after it", answer, local, exactly=True)
        done(_numbers(answer))
    rows.append(("Engine 2", "document + Q2", "shared hit, daemon restarted", answer))
    return _table(
        "kill -9 of the daemon under two engines",
        rows,
        f"All answers are right. Chunks in the pool: {before.chunks} before the kill, {after.chunks} after it.",
    )


def _interrupted(stage: Stage) -> Answer:
    """Engine 2's answer to question 2; the daemon dies when the engine has begun to load.

    Either end is right: what was leased is still there, or the load fails and the tokens are computed after all.
    """
    engine, copied = stage.two, stage.copied()
    engine.auto_step(False)
    name = engine.submit(stage.prompt(2), ANSWER_TOKENS, logprobs=True)
    until = time.monotonic() + READY_S
    while engine.state()["requests"][name]["status"] == "WAITING" and time.monotonic() < until:
        engine.step()
    stage.daemon.kill()
    engine.auto_step(True)
    [answer] = right(engine.wait([name]))
    engine.settle()
    if (stage.copied() - copied) * CHUNK_TOKENS_MAX < answer.loaded_tokens:
        return replace(answer, computed_tokens=answer.prompt_tokens, loaded_tokens=0)
    return answer


def _reconnected(daemon: Daemon, before: Counters) -> Counters:
    """The counters, as soon as both engines are back."""
    until = time.monotonic() + READY_S
    while True:
        seen = daemon.counters()
        if (seen.sharing, seen.connections) >= (before.sharing, before.connections):
            return seen
        if time.monotonic() > until:
            raise Failure(f"{seen.sharing} engines came back to the restarted daemon, there were {before.sharing}")
        time.sleep(0.05)


def _table(title: str, rows: list[tuple[str, str, str, Answer]], caption: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("engine", "asked", "what it was"):
        table.add_column(column)
    for column in ("computed", "own cache", "loaded", "first token"):
        table.add_column(column, justify="right")
    for engine, asked, kind, answer in rows:
        counts = (answer.computed_tokens, answer.local_tokens, answer.loaded_tokens)
        table.add_row(engine, asked, kind, *map(str, counts), _time(answer.ttft_s))
    return table
