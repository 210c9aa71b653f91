"""One vLLM engine, told what to do over pipes: the child's side, `python -m cachesvc.demo.child`.

Covers: vLLM's `LLM` and the loop around it; only here vLLM is imported. Not here: the parent's side (`demo.engine`).

JSON lines. The parent's first is the model and the settings, each one after it a call `{"id", "do", ...}`; the child
says `{"ready": ...}` once, `{"id", "ok"}` or `{"id", "raised"}` for each call, and `{"answer": ...}` when a request has
ended. What vLLM prints goes to a log file. The child ends when the parent's pipe closes.

vLLM's scheduler runs in the child's own process, with TP > 1 the ranks in processes of their own; all of them are one
process group. The child steps as vLLM's server does, also while no request is there but the connector has work: stores
are submitted with the step after the one that computed them, and vLLM's offline `LLM` never makes that step.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Final, TextIO

IDLE_STEP_S: Final = 0.001
"""Pause after a step in which nothing was computed, as vLLM's server makes it: copies run in other threads."""

END_S: Final = 10.0
"""How long an engine whose parent is gone may take to end in good order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request. Times in seconds from when the child took it up, CPU time of all its threads.

    The three counts of prompt tokens are vLLM's own, made when the request is *admitted*: `loaded_tokens` was promised
    by the connector then, and stays what it was if the load failed and the tokens were computed after all. Whoever
    claims that something was loaded asks the daemon, too. -1 where vLLM didn't say.
    """

    request: str
    token_ids: list[int]
    finish_reason: str | None
    """vLLM's: length, stop, abort, error; None if it was never admitted."""
    prompt_tokens: int
    computed_tokens: int = -1
    local_tokens: int = -1
    loaded_tokens: int = -1
    ttft_s: float = 0.0
    ttft_cpu_s: float = 0.0
    total_s: float = 0.0
    cpu_s: float = 0.0
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens that were chosen, if asked for."""
    error: str | None = None
    """Name and text of the exception that vLLM refused the request with, or that it ended it with an error."""


@dataclass(slots=True)
class _Running:
    """A request that hasn't ended. `number` is vLLM's own name of it."""

    number: str
    prompt_tokens: int
    started: float
    started_cpu: float
    first: tuple[float, float] | None = None
    """Seconds until its first token: wall, CPU."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached: int = -1


class _Child:
    """vLLM's `LLM`, and the loop around it. Everything in one thread; calls come through a queue."""

    def __init__(self, llm: Any, replies: TextIO) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self._replies = replies
        self._running: dict[str, _Running] = {}
        self._prefills: dict[str, Any] = {}
        """vLLM's counts of a request's prompt by vLLM's name of it; the answers that it hands out have only the sum."""
        self._settling: list[int] = []
        self._stepping = True
        self._watch_prefills()

    def _watch_prefills(self) -> None:
        client = self.engine.engine_core
        inner = client.get_output

        def get_output() -> Any:
            outputs = inner()
            for output in outputs.outputs:
                if getattr(output, "prefill_stats", None) is not None:
                    self._prefills[output.request_id] = output.prefill_stats
            return outputs

        client.get_output = get_output

    def serve(self, lines: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        """Until None comes."""
        while True:
            busy = self._busy()
            if not busy:
                self._settled()
            try:
                line = lines.get(block=not (busy and self._stepping))
            except queue.Empty:
                self._step()
                continue
            if line is None:
                return
            self._do(line)

    def _busy(self) -> bool:
        """The condition for the next step of vLLM's server, see `EngineCoreProc.has_work`."""
        return bool(self.engine.has_unfinished_requests() or self.core.scheduler.has_requests())

    def _settled(self) -> None:
        for number in self._settling:
            self._say({"id": number, "ok": None})
        self._settling.clear()

    def _say(self, line: dict[str, Any]) -> None:
        self._replies.write(json.dumps(line) + "\n")
        self._replies.flush()

    def _do(self, line: dict[str, Any]) -> None:
        number, verb = line.pop("id"), line.pop("do")
        if verb == "settle":
            self._settling.append(number)
            return
        try:
            self._say({"id": number, "ok": getattr(self, f"do_{verb}")(**line)})
        except Exception as error:  # whatever vLLM or a test's function raises is the parent's to judge
            self._say({"id": number, "raised": f"{type(error).__name__}: {error}"})

    # --- requests ---------------------------------------------------------------------------------------------------

    def do_submit(self, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        name, prompt = request["name"], {"type": "token", "prompt_token_ids": request["prompt"]}
        if request.get("cache_salt"):
            prompt["cache_salt"] = request["cache_salt"]
        sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": request["max_tokens"], "detokenize": False}
        if request.get("logprobs"):
            sampling["logprobs"] = 0
        if request.get("kv_transfer_params"):
            sampling["extra_args"] = {"kv_transfer_params": request["kv_transfer_params"]}
        params = SamplingParams(**{**sampling, **request.get("sampling", {})})
        lora = LoRARequest(*request["lora"]) if request.get("lora") else None
        running = _Running("", len(request["prompt"]), time.perf_counter(), time.process_time())
        try:
            running.number = self.engine.add_request(name, prompt, params, lora_request=lora)
        except Exception as error:  # a server tells the user, and goes on
            self._answer(name, running, None, f"{type(error).__name__}: {error}")
        else:
            self._running[name] = running

    def do_abort(self, names: list[str]) -> None:
        self.engine.abort_request(names)
        for name in names:
            if name in self._running:
                self._answer(name, self._running.pop(name), "abort", None)

    def _step(self) -> bool:
        """Was anything said?"""
        before = time.perf_counter()
        outputs = self.engine.step()
        for output in outputs:
            self._heard(output)
        if not outputs and time.perf_counter() - before < IDLE_STEP_S:
            time.sleep(IDLE_STEP_S)
        return bool(outputs)

    def _heard(self, output: Any) -> None:
        running = self._running.get(output.request_id)
        if running is None:
            return
        said = output.outputs[0]
        running.token_ids = list(said.token_ids)
        running.cached = -1 if output.num_cached_tokens is None else output.num_cached_tokens
        if said.logprobs:
            chosen = zip(running.token_ids, said.logprobs, strict=True)
            running.logprobs = [float(step[token].logprob) for token, step in chosen]
        if running.first is None and running.token_ids:
            running.first = time.perf_counter() - running.started, time.process_time() - running.started_cpu
        if output.finished:
            self._running.pop(output.request_id)
            error = "vLLM ended it with an error" if said.finish_reason == "error" else None
            self._answer(output.request_id, running, said.finish_reason, error)

    def _answer(self, name: str, running: _Running, finish_reason: str | None, error: str | None) -> None:
        prefill = self._prefills.pop(running.number, None)
        computed, local, loaded = -1, -1, -1
        if prefill is not None:
            computed, local = prefill.num_computed_tokens, prefill.num_local_cached_tokens
            loaded = prefill.num_external_cached_tokens
        elif running.cached >= 0:
            computed = running.prompt_tokens - running.cached
        answer = Answer(
            request=name,
            token_ids=running.token_ids,
            finish_reason=finish_reason,
            prompt_tokens=running.prompt_tokens,
            computed_tokens=computed,
            local_tokens=local,
            loaded_tokens=loaded,
            ttft_s=running.first[0] if running.first else 0.0,
            ttft_cpu_s=running.first[1] if running.first else 0.0,
            total_s=time.perf_counter() - running.started,
            cpu_s=time.process_time() - running.started_cpu,
            logprobs=running.logprobs,
            error=error,
        )
        self._say({"answer": asdict(answer)})

    # --- the rest of vLLM -------------------------------------------------------------------------------------------

    def do_reset_prefix_cache(self, reset_connector: bool, reset_running_requests: bool) -> bool:
        return bool(self.engine.reset_prefix_cache(reset_running_requests, reset_connector))

    def do_sleep(self, level: int) -> None:
        try:
            self.engine.sleep(level)
        finally:
            # it drops all requests inside, and tells those outside only in a server
            known = self.core.scheduler.requests
            for name, running in list(self._running.items()):
                if running.number not in known or known[running.number].is_finished():
                    self.do_abort([name])

    def do_wake_up(self) -> None:
        # vLLM's sleep may have raised before it slept; waking is harmless then
        self.engine.wake_up()

    def do_metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self.engine.get_metrics():
            labels = ",".join(f"{k}={v}" for k, v in metric.labels.items() if k not in ("engine", "model_name"))
            name = f"{metric.name}{{{labels}}}" if labels else metric.name
            if hasattr(metric, "value"):
                found[name] = metric.value
            elif hasattr(metric, "sum"):
                found |= {f"{name}_sum": metric.sum, f"{name}_count": metric.count}
        return found

    def do_state(self) -> dict[str, Any]:
        names = {running.number: name for name, running in self._running.items()}
        requests = {
            names.get(number, number): {
                "status": request.status.name,
                "prompt": request.num_prompt_tokens,
                "computed": request.num_computed_tokens,
                "said": len(request.output_token_ids),
            }
            for number, request in self.core.scheduler.requests.items()
        }
        return {"work": self._busy(), "requests": requests}

    def do_auto_step(self, on: bool) -> None:
        self._stepping = on

    def do_step(self, count: int) -> bool:
        for _ in range(count):
            if not self._busy():
                break
            self._step()
        return self._busy()

    def do_apply(self, function: str, arguments: dict[str, Any]) -> Any:
        module, _, name = function.partition(":")
        return getattr(import_module(module), name)(self.llm, **arguments)


def _read(lines: TextIO, into: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """In a thread: the parent's lines. When the pipe closes everything here ends, in good order if that is quick."""
    for line in lines:
        into.put(json.loads(line))
    into.put(None)
    time.sleep(END_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """The child process."""
    # what vLLM and its ranks print to stdout goes to the log, what they read from stdin is nothing
    replies, lines = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    calls: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines, calls), daemon=True).start()
    first = calls.get()
    if first is None:
        return
    before = time.perf_counter()
    import vllm

    imported = time.perf_counter()
    settings = first["settings"]
    ranks = settings.get("tensor_parallel_size", 1)
    settings.setdefault("distributed_executor_backend", "uni" if ranks == 1 else "mp")
    llm = vllm.LLM(first["model"], **settings)
    child = _Child(llm, replies)
    config = child.core.scheduler.kv_cache_config
    ready = {
        "vllm": vllm.__version__,
        "block_size": child.core.scheduler.block_size,
        "blocks": config.num_blocks,
        "groups": len(config.kv_cache_groups),
        "import_s": imported - before,
        "start_s": time.perf_counter() - imported,
    }
    child._say({"ready": ready})
    child.serve(calls)
    child.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
