"""One real vLLM engine in a process of its own, told what to do over pipes: the parent's side, which imports no vLLM.

Covers: starting, telling, waiting, stopping, killing. Not here: what the child does with it (`demo.child`), models
(`demo.model`), what the answers are compared with.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Self

import cachesvc
from cachesvc.config import child_environment
from cachesvc.demo import child
from cachesvc.demo.child import Answer
from cachesvc.errors import CachesvcError

__all__ = ["Answer", "EngineDiedError", "EngineError", "EngineHangsError", "EngineProcess", "EngineRaisedError"]

HANG_S: Final = 180.0
"""A guard: no wait takes longer. A cold prompt of 16k tokens may take a minute where two engines share a core."""

STOP_S: Final = 20.0
"""How long an engine may take to end when it is told to."""

LOG_TAIL_BYTES: Final = 3000

ENVIRONMENT: Final = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_COMPILE_DISABLE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""No network, no statistics, one thread a process: engines share the cores, and times can be compared."""

SETTINGS: Final[dict[str, Any]] = {
    "disable_log_stats": False,  # without them no counts of tokens
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 16384,
    "seed": 0,
}
"""Of vLLM's `LLM`, unless the caller says otherwise. In float32 a hit answers just what the prompt would have."""


class EngineError(CachesvcError):
    """An engine didn't do what it was told."""


class EngineDiedError(EngineError):
    """Its process has ended; the text has the end of its log."""


class EngineHangsError(EngineError):
    """It didn't answer in time; the process still runs."""


class EngineRaisedError(EngineError):
    """vLLM raised this in a call; the engine is there as vLLM left it. Starts with the name of the exception."""


class EngineProcess:
    """One engine. Not thread-safe. Killed when the `with` block ends, whatever state it is in.

    `settings` are keyword arguments of vLLM's `LLM` over `SETTINGS`, `env` is put over `ENVIRONMENT` and ours. Without
    `log` what the engine prints goes to a nameless file; errors show its end. Raises OSError if `python` can't be run.
    """

    def __init__(
        self,
        model: Path | str,
        settings: Mapping[str, Any] | None = None,
        *,
        python: Path | str = sys.executable,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        hang_s: float = HANG_S,
    ) -> None:
        self.hang_s = hang_s
        self.info: dict[str, Any] = {}
        """What it says of itself when it is ready: vllm, block_size, blocks, groups, import_s, start_s."""
        self._calls = itertools.count(1)
        self._requests = itertools.count(1)
        self._replies: dict[int, dict[str, Any]] = {}
        self._answers: dict[str, Answer] = {}
        self._unread = b""
        self._log: IO[bytes] = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115 - see kill
        given = {**SETTINGS, **(settings or {})}
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [str(python), "-m", child.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env=child_environment({**ENVIRONMENT, **_paths(), **_threads(given), **(env or {})}),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        try:
            self._send({"model": str(model), "settings": given})
        except BaseException:
            self.kill()
            raise

    @classmethod
    def start(cls, model: Path | str, settings: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """One that is ready to answer."""
        engine = cls(model, settings, **options)
        try:
            engine.wait_ready()
        except BaseException:
            engine.kill()
            raise
        return engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the process with the scheduler, and of the group."""
        return self._process.pid

    def wait_ready(self) -> Self:
        """Return when it can answer. EngineDiedError if it couldn't start."""
        self._hear(lambda: bool(self.info))
        return self

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], max_tokens: int = 16, **options: Any) -> str:
        """Hand in a request, don't wait for it; its name. Options:

        `cache_salt` str, `kv_transfer_params` dict, `lora` (name, number, path), `logprobs` bool, `sampling` dict of
        vLLM's SamplingParams. Greedy unless `sampling` says otherwise, and it goes on after an end-of-text token.
        """
        name = f"r{next(self._requests)}"
        request = {"name": name, "prompt": list(prompt), "max_tokens": max_tokens, **options}
        self.call("submit", request=request)
        return name

    def poll(self) -> dict[str, Answer]:
        """The answers that are there and weren't taken by `wait` yet, by the request's name; doesn't wait."""
        self._hear(lambda: True)
        return dict(self._answers)

    def wait(self, names: Iterable[str]) -> list[Answer]:
        """The answers of these requests, which are forgotten here, in this order."""
        names = list(names)
        self._hear(lambda: all(name in self._answers for name in names))
        return [self._answers.pop(name) for name in names]

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int = 16, **options: Any) -> list[Answer]:
        """Answer all of these at once; options as for `submit`."""
        return self.wait([self.submit(prompt, max_tokens, **options) for prompt in prompts])

    def abort(self, *names: str) -> None:
        """End requests; their answers come with what was said so far and finish_reason `abort`."""
        self.call("abort", names=list(names))

    # --- the rest of vLLM -------------------------------------------------------------------------------------------

    def reset_prefix_cache(self, *, reset_connector: bool = False, reset_running_requests: bool = False) -> bool:
        """vLLM's, and its answer."""
        arguments = {"reset_connector": reset_connector, "reset_running_requests": reset_running_requests}
        return bool(self.call("reset_prefix_cache", **arguments))

    def sleep(self, level: int = 1) -> None:
        """vLLM's: ends all requests (they answer `abort`) and resets the caches, the connector's too."""
        self.call("sleep", level=level)

    def wake_up(self) -> None:
        self.call("wake_up")

    def metrics(self) -> dict[str, float]:
        """The metrics of vLLM by `name{label=value,...}`, histograms as `..._sum` and `..._count`."""
        return dict(self.call("metrics"))

    def state(self) -> dict[str, Any]:
        """What the scheduler has: `work` (must it step?), and of each request by name its status and tokens."""
        return dict(self.call("state"))

    def settle(self) -> None:
        """Return when it has nothing to do any more: no request, and every store ended."""
        self.call("settle")

    def auto_step(self, on: bool) -> None:
        """False: it steps only when told to by `step`, so that a test can stop in the middle of something."""
        self.call("auto_step", on=on)

    def step(self, count: int = 1) -> bool:
        """Step so many times, or until there is nothing to do; is there still something?"""
        return bool(self.call("step", count=count))

    def apply(self, function: str, **arguments: Any) -> Any:
        """Call `package.module:function(llm, **arguments)` in the child; its result comes back by JSON."""
        return self.call("apply", function=function, arguments=arguments)

    def call(self, verb: str, **arguments: Any) -> Any:
        """Tell it to do something and wait for the answer. EngineRaisedError if vLLM raised."""
        number = next(self._calls)
        self._send({"id": number, "do": verb, **arguments})
        self._hear(lambda: number in self._replies)
        reply = self._replies.pop(number)
        if "raised" in reply:
            raise EngineRaisedError(reply["raised"])
        return reply["ok"]

    # --- its end ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let it shut down in good order; all its processes are dead when this returns."""
        self._close_pipe()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all its processes at once; all are dead when this returns. Also after `stop` or another `kill`."""
        members = self.processes()
        leftovers = set().union(*(_left_in_shm(pid) for pid in members))
        for pid, command in members.items():
            # it cleans up in /dev/shm after the ranks, and ends by itself then
            if "resource_tracker" not in command:
                _signal(pid, signal.SIGKILL)
        self._process.wait(self.hang_s)
        self._close_pipe()
        assert self._process.stdout is not None
        self._process.stdout.close()
        until = time.monotonic() + STOP_S
        while self.processes() and time.monotonic() < until:
            time.sleep(0.01)
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)
        for path in leftovers:
            path.unlink(missing_ok=True)
        if not self._log.closed:
            self._log.close()

    def processes(self) -> dict[int, str]:
        """Its processes that live, with their command lines: the child itself, with TP > 1 the ranks, helpers."""
        return _group(self.pid)

    def log_tail(self) -> str:
        """The end of what it has printed; empty after its end."""
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        return tail.decode(errors="replace")

    # --- lines ------------------------------------------------------------------------------------------------------

    def _close_pipe(self) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()

    def _send(self, line: dict[str, Any]) -> None:
        self._check_open()
        unsent = memoryview(json.dumps(line).encode() + b"\n")
        until = time.monotonic() + self.hang_s
        while unsent:
            _, writable, _ = select.select([], [self._to], [], max(0.0, until - time.monotonic()))
            if not writable:
                raise EngineHangsError(f"engine {self.pid} hasn't taken a line within {self.hang_s:g} s")
            try:
                unsent = unsent[os.write(self._to, unsent) :]
            except BrokenPipeError as error:
                raise self._died() from error

    def _hear(self, done: Any) -> None:
        """Read lines until `done()`; those that are there already in any case."""
        until = time.monotonic() + self.hang_s
        while True:
            left = 0.0 if done() else max(0.0, until - time.monotonic())
            self._check_open()
            readable, _, _ = select.select([self._from], [], [], left)
            if not readable:
                if done():
                    return
                raise EngineHangsError(f"engine {self.pid} hasn't answered within {self.hang_s:g} s")
            some = os.read(self._from, 1 << 20)
            if not some:
                if done():
                    return
                raise self._died()
            *lines, self._unread = (self._unread + some).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "answer" in line:
            answer = Answer(**line["answer"])
            self._answers[answer.request] = answer
        elif "ready" in line:
            self.info = line["ready"]
        else:
            self._replies[line["id"]] = line

    def _check_open(self) -> None:
        # the numbers of closed descriptors may be somebody else's by now
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise EngineDiedError(f"engine {self.pid} was stopped")

    def _died(self) -> EngineDiedError:
        code = self._process.wait(self.hang_s)
        return EngineDiedError(f"engine {self.pid} has ended with code {code}; the end of its log:\n{self.log_tail()}")


def _paths() -> dict[str, str]:
    """The child may run in another environment than we do, where this package is only if we say so."""
    above = Path(cachesvc.__file__).resolve().parent.parent
    return {} if above.name in ("site-packages", "dist-packages") else {"PYTHONPATH": str(above)}


def _threads(settings: Mapping[str, Any]) -> dict[str, str]:
    """A CPU for each rank; by itself vLLM wants a NUMA node for each."""
    ranks = settings.get("tensor_parallel_size", 1)
    cpus = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cpus[rank % len(cpus)]) for rank in range(ranks))
    return {"VLLM_CPU_OMP_THREADS_BIND": binding} if ranks > 1 else {}


def _group(leader: int) -> dict[int, str]:
    """Processes of a process group that aren't dead, with their command lines."""
    members = {}
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            # pid (any name) state parent group ...
            state, _, group = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                command = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ")
                members[int(entry)] = command.decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return members


def _left_in_shm(pid: int) -> set[Path]:
    """What the ranks of an engine have in /dev/shm between them, and nobody removes if they are killed."""
    try:
        maps = Path("/proc", str(pid), "maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {Path(path) for path in re.findall(r"(/dev/shm/vllm_dist_\S+)$", maps, re.MULTILINE)}


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
