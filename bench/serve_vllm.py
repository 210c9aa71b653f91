"""What do users of two vLLM servers behind a round-robin get from a cache that both share?

Two `vllm serve` on a CPU (a random Llama of 8 layers in bfloat16, one thread each), a round-robin of our own before
them, and `vllm bench serve` as the users, with its data set of repeated prefixes: so many random prefixes, each the
beginning of so many prompts, in random order, arriving at random moments. Without sharing every prefix is computed by
both servers. Subjects: without a connector, ours, LMCache's MP connector (its server in shared-memory mode), one after
the other, as six servers at once would need 15 GB: in each round every subject gets the same prompts at the same
moments, and all prompts are new in each round. A few others come first, to warm up.

Values: p50 and p99 of the time to the first token, in a round, as `vllm bench serve` tells them; prompt tokens that the
engines computed, as their metrics tell (and in the note how many came from their own prefix caches, and from outside).
Each is the median over the rounds, the ratio is to vLLM without a connector in the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.error import URLError

import cachesvc
from bench.harness import GUARD, Report, Row, answer, arguments, wait_for
from bench.harness import Pairs as Compared
from bench.peers import AbsentError, Server, free_port
from bench.vllm_engines import (
    AMX,
    DTYPE,
    LMCACHE,
    NONE,
    OURS,
    Cache,
    chunk_bytes,
    kv_bytes,
    model_of,
    start_cache,
    vllm_python,
)
from cachesvc.config import GIB, MIB, child_environment
from cachesvc.demo.engine import ENVIRONMENT
from cachesvc.demo.model import MID, TINY

TITLE: Final = __doc__.splitlines()[0]
SHAPES: Final = {"mid": MID, "tiny": TINY}
NAME: Final = "bench"
START_S: Final = 600.0
"""A guard against hanging. Two servers need half a minute on two idle cores."""
RUN_S: Final = 300.0
OUTPUT_TOKENS: Final = 8
WARM_SEED: Final = 1 << 20
SOURCES: Final = ("local_compute", "local_cache_hit", "external_kv_transfer")
"""VLLM's words for where a prompt's tokens came from."""
LINE_BYTES_MAX: Final = 1 << 20


# --- the round-robin --------------------------------------------------------------------------------------------------


class RoundRobin:
    """HTTP on a port of 127.0.0.1: each request goes to the next server. One request a connection, bodies by length."""

    def __init__(self, ports: Iterable[int]) -> None:
        self.port = free_port()
        self._ports = itertools.cycle(ports)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="round-robin", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=LINE_BYTES_MAX))

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.split(b"\r\n")[:-2]
            # the answer ends with its connection, so the next request comes on one of its own
            kept = [line for line in lines if not line.lower().startswith(b"connection:")]
            lengths = [line for line in lines if line.lower().startswith(b"content-length:")]
            body = await reader.readexactly(int(lengths[0].partition(b":")[2])) if lengths else b""
            answers, server = await asyncio.open_connection("127.0.0.1", next(self._ports))
            try:
                server.write(b"\r\n".join([*kept, b"Connection: close", b"", b""]) + body)
                while some := await answers.read(1 << 16):
                    writer.write(some)
                    await writer.drain()
            finally:
                server.close()
        except (OSError, asyncio.IncompleteReadError):
            pass  # whoever has gone; the users count what failed
        finally:
            writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


# --- servers ----------------------------------------------------------------------------------------------------------


def vllm_environment(cache: Cache | None = None) -> dict[str, str]:
    """For vLLM's own programs, which keep their processes. Left alone, workers would all take the same cores."""
    ours = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    ours |= {
        "PYTHONPATH": str(Path(cachesvc.__file__).resolve().parent.parent),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return dict(child_environment(ours | (cache.env if cache else {})))


class VllmServer:
    """`vllm serve`; gone after `close`. Doesn't wait until it answers."""

    def __init__(self, cache: Cache, model: Path, kv_cache_bytes: int, tokens_max: int) -> None:
        self.name = cache.name
        self.port = free_port()
        flags: dict[str, object] = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--served-model-name": NAME,
            "--dtype": DTYPE,
            "--worker-extension-cls": AMX,
            "--kv-cache-memory-bytes": kv_cache_bytes,
            "--max-model-len": tokens_max,
        }
        if cache.transfer:
            flags["--kv-transfer-config"] = json.dumps(cache.transfer)
        command = [str(cache.python), "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--enforce-eager"]
        self._server = Server(
            [*command, *(str(part) for flag in flags.items() for part in flag)], vllm_environment(cache)
        )

    def answers(self) -> bool:
        """RuntimeError if it has ended."""
        self._server.check()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False

    def prompt_tokens(self) -> dict[str, float]:
        """By source, so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        found = [line for line in lines if line.startswith("vllm:prompt_tokens_by_source_total{")]
        return {
            source: sum(float(line.split()[-1]) for line in found if f'source="{source}"' in line) for source in SOURCES
        }

    def close(self) -> None:
        self._server.close()


@dataclass
class Pair:
    """Two servers of one subject and what stands before them."""

    name: str
    servers: list[VllmServer]
    proxy: RoundRobin

    def prompt_tokens(self) -> dict[str, float]:
        each = [server.prompt_tokens() for server in self.servers]
        return {source: sum(one[source] for one in each) for source in SOURCES}


def start_pair(stack: ExitStack, *settings: Any) -> Pair:
    """Both at once, there is a core for each; settings as for `VllmServer`."""
    servers = [stack.enter_context(closing(VllmServer(*settings))) for _ in range(2)]
    for server in servers:
        wait_for(f"vllm serve, {server.name},", server.answers, START_S, 0.2)
    proxy = stack.enter_context(closing(RoundRobin([server.port for server in servers])))
    return Pair(servers[0].name, servers, proxy)


# --- users ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """What the users of one subject got in one round."""

    p50_ms: float
    p99_ms: float
    tokens: dict[str, float]
    """Of prompts, by source."""

    @property
    def computed(self) -> float:
        return self.tokens["local_compute"]


def users(pair: Pair, model: Path, options: argparse.Namespace, seed: int) -> Round:
    """`vllm bench serve`, once. RuntimeError unless every request was answered."""
    with tempfile.TemporaryDirectory(prefix="cachesvc-bench-") as home:
        flags: dict[str, object] = {
            "--base-url": f"http://127.0.0.1:{pair.proxy.port}",
            "--model": NAME,
            "--tokenizer": model,
            "--dataset-name": "prefix_repetition",
            "--prefix-repetition-num-prefixes": options.prefixes,
            "--prefix-repetition-prefix-len": options.prefix_tokens,
            "--prefix-repetition-suffix-len": options.suffix_tokens,
            "--prefix-repetition-output-len": OUTPUT_TOKENS,
            "--num-prompts": options.prefixes * options.repeats,
            "--request-rate": options.rate,
            "--seed": seed,
            "--percentile-metrics": "ttft",
            "--metric-percentiles": "50,99",
            "--result-dir": home,
            "--result-filename": "result.json",
        }
        command = [*GUARD, str(vllm_python()), "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
        command += ["--save-result", "--ignore-eos", "--disable-tqdm"]
        before = pair.prompt_tokens()
        done = subprocess.run(
            [*command, *(str(part) for flag in flags.items() for part in flag)],
            check=False,
            capture_output=True,
            text=True,
            env=vllm_environment(),
            timeout=RUN_S,
        )
        if done.returncode:
            raise RuntimeError(f"vllm bench serve, {pair.name}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        result = json.loads(Path(home, "result.json").read_text())
    if result["completed"] != options.prefixes * options.repeats:
        raise RuntimeError(f"{pair.name}: only {result['completed']} requests were answered; {done.stdout[-2000:]}")
    after = pair.prompt_tokens()
    tokens = {source: after[source] - before[source] for source in SOURCES}
    return Round(result["p50_ttft_ms"], result["p99_ttft_ms"], tokens)


# --- rounds -----------------------------------------------------------------------------------------------------------


def rows_of(rounds: dict[str, list[Round]]) -> list[Row]:
    rows = []
    cases = (
        ("TTFT p50", "p50_ms", "ms"),
        ("TTFT p99", "p99_ms", "ms"),
        ("prompt tokens computed", "computed", "tokens"),
    )
    for case, name_of_value, unit in cases:
        base: list[float] = [getattr(one, name_of_value) for one in rounds[NONE]]
        for name, some in rounds.items():
            pairs = Compared([getattr(one, name_of_value) for one in some], base)
            middle = {source: median(one.tokens[source] for one in some) for source in SOURCES[1:]}
            note = f"{middle[SOURCES[1]]:g} of its own, {middle[SOURCES[2]]:g} loaded" if unit == "tokens" else ""
            ratio, to = (None, "") if name == NONE else (pairs.ratio, NONE)
            rows.append(Row(case, name, pairs.value, unit, ratio, to, note=note))
    return rows


def run(options: argparse.Namespace) -> Report:
    shape, model = SHAPES[options.model], model_of(SHAPES[options.model])
    settings = {name: getattr(options, name) for name in ("prefixes", "repeats", "prefix_tokens", "suffix_tokens")}
    settings |= {"requests_per_s": options.rate, "rounds": options.pairs, "dtype": DTYPE, "model": options.model}
    report = Report("serve_vllm", TITLE, settings)
    prompt_tokens = options.prefix_tokens + options.suffix_tokens
    round_bytes = kv_bytes(shape, options.prefixes * options.repeats * prompt_tokens)
    rounds: dict[str, list[Round]] = {}
    absent: list[Row] = []
    for name in [NONE, OURS, *([LMCACHE] if options.peers else [])]:
        with ExitStack() as stack:
            try:
                cache = start_cache(stack, name, max(GIB, 2 * round_bytes), chunk_bytes(shape))
            except AbsentError as reason:
                absent.append(Row("all", name, None, "ms", note=f"absent: {reason}"))
                continue
            # twice the prompt: vLLM refuses texts by their length, and thinks of words without the spaces between them
            pair = start_pair(stack, cache, model, max(256 * MIB, round_bytes), 2 * prompt_tokens)
            users(pair, model, argparse.Namespace(**vars(options) | {"prefixes": 2, "repeats": 4}), WARM_SEED)
            rounds[name] = [users(pair, model, options, options.seed + number) for number in range(options.pairs)]
    report.rows += rows_of(rounds) + absent
    return report


def main() -> None:
    parser = arguments(TITLE)
    parser.set_defaults(pairs=2)
    parser.add_argument("--prefixes", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=6, help="prompts a prefix (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--suffix-tokens", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second (default: %(default)s)")
    parser.add_argument("--model", choices=SHAPES, default="mid", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave LMCache out")
    answer(run, parser)


if __name__ == "__main__":
    main()
