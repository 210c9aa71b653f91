"""Other systems beside which ours is measured, each as a server process of its own; absent ones say why.

Covers: Redis from the distribution over a unix socket, LMCache's server in shared-memory mode from an environment of
its own (`make bench-env-lmcache`). Not here: what is measured with them. Mooncake Store and InfiniStore aren't run:
over loopback TCP the first reached 0.06 to 0.12 of memcpy, the second doesn't start without RDMA devices.

Both keep nothing on disk, may hold as much as our arena, and evict when that is full.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError

from bench.harness import GUARD, one_thread_each, stop, wait_for

LMCACHE_CHUNK_TOKENS: Final = 256
LMCACHE_LAYER_BYTES: Final = 1 << 20
"""One layer of one chunk: 2 (K, V) × 256 tokens × 8 heads × 128 × 2 bytes."""
GIB: Final = 1 << 30


class AbsentError(Exception):
    """A peer isn't installed here; the text says how to get it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A peer's server process and its directory, both gone after `close`."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="cachesvc-bench-peer-"))
        command = [*GUARD, *(part.replace("HOME", str(self.home)) for part in command)]
        with (self.home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=environment or one_thread_each(),
            )

    def check(self) -> None:
        """RuntimeError with what it printed if it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(
                f"{self.process.args!r} ended: {(self.home / 'log').read_text(errors='replace')[-2000:]}"
            )

    def close(self) -> None:
        stop(self.process)
        shutil.rmtree(self.home, ignore_errors=True)


# --- Redis ------------------------------------------------------------------------------------------------------------


class RedisServer:
    """redis-server on a unix socket. AbsentError without the server or without redis-py and hiredis."""

    name = "redis"

    def __init__(self, memory_bytes: int) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise AbsentError("no redis-server: apt-get install redis-server")
        try:
            import hiredis
            import redis
        except ImportError as error:
            raise AbsentError(f"no {error.name} in this environment: pip install 'redis[hiredis]'") from error
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = (
            f"{version.split()[2].partition('=')[2]}, redis-py {redis.__version__}, hiredis {hiredis.__version__}"
        )
        settings = {"port": 0, "unixsocket": "HOME/socket", "save": "", "appendonly": "no", "maxmemory": memory_bytes}
        settings |= {"maxmemory-policy": "allkeys-lru"}
        self._server = Server(
            [program, *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]
        )
        self.address = str(self._server.home / "socket")
        try:
            wait_for("redis-server", self._answers)
        except BaseException:
            self.close()
            raise

    def _answers(self) -> bool:
        import redis

        self._server.check()
        try:
            return bool(connect(self.address).ping())
        except redis.ConnectionError:
            return False

    def close(self) -> None:
        self._server.close()


def connect(address: str) -> Any:
    """A redis-py client on a unix socket: replies read by hiredis, commands packed by Python.

    hiredis copies every command into a new string, which makes a SET of MiBs five times slower than need be.
    """
    import redis
    from redis.connection import PythonRespSerializer

    def encode(value: Any) -> Any:
        return value if isinstance(value, bytes | memoryview) else str(value).encode()

    packer = PythonRespSerializer(6000, encode)
    pool = redis.ConnectionPool(redis.UnixDomainSocketConnection, path=address, command_packer=packer)
    return redis.Redis(connection_pool=pool)


# --- LMCache ----------------------------------------------------------------------------------------------------------


def lmcache_environment(environment: Mapping[str, str] = os.environ) -> Path:
    """Where `make bench-env-lmcache` puts LMCache: outside the checkout, so that it outlives it."""
    named = environment.get("CACHESVC_BENCH_LMCACHE")
    if named:
        return Path(named)
    cache = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "/"), ".cache")
    return Path(cache) / "cachesvc" / "bench-lmcache"


class LmcacheServer:
    """`lmcache server` in shared-memory mode: its clients copy in and out of its memory themselves, as ours do."""

    name = "lmcache"

    def __init__(self, memory_bytes: int) -> None:
        self.python = lmcache_environment() / "bin" / "python"
        if not self.python.exists():
            raise AbsentError(f"no LMCache in {lmcache_environment()}: make bench-env-lmcache")
        self.shm_name = f"cachesvc_bench_{os.getpid()}"
        self.port, http_port = free_port(), free_port()
        flags = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--http-host": "127.0.0.1",
            "--http-port": http_port,
            "--supported-transfer-mode": "engine_driven",
            "--shm-name": self.shm_name,
            "--chunk-size": LMCACHE_CHUNK_TOKENS,
            "--l1-size-gb": memory_bytes / GIB,
            "--eviction-policy": "LRU",
        }
        command = [str(self.python.with_name("lmcache")), "server", "--no-l1-use-lazy", "--disable-observability"]
        self._server = Server([*command, *(str(part) for flag in flags.items() for part in flag)], lmcache_variables())
        self.home = self._server.home
        self._health = f"http://127.0.0.1:{http_port}/healthcheck"
        self.version = self._ask_version()
        try:
            wait_for("lmcache server", self._answers, 180)
        except BaseException:
            self.close()
            raise

    def _ask_version(self) -> str:
        code = "import importlib.metadata as m; print(m.version('lmcache'), 'torch', m.version('torch'))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def _answers(self) -> bool:
        self._server.check()
        try:
            with urllib.request.urlopen(self._health, timeout=5) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False

    def close(self) -> None:
        self._server.close()
        for left in Path("/dev/shm").glob(f"*{self.shm_name}*"):
            left.unlink(missing_ok=True)


def lmcache_variables() -> dict[str, str]:
    """LMCache counts its users by default, and prints a banner."""
    return one_thread_each() | {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}


class LmcacheClient:
    """`bench/lmcache_driver.py` in LMCache's environment: one client of its server, `chunks` a call.

    All clients of a server must have the same `chunk_bytes`, and `first_sequence` apart.
    """

    def __init__(
        self, server: LmcacheServer, chunk_bytes: int, chunks: int, buffer_bytes: int, first_sequence: int = 0
    ) -> None:
        self.check_size(chunk_bytes)
        script = Path(__file__).with_name("lmcache_driver.py")
        geometry = (
            server.port,
            server.shm_name,
            chunk_bytes // LMCACHE_LAYER_BYTES,
            chunks,
            buffer_bytes,
            first_sequence,
        )
        self._log = server.home / f"driver-{first_sequence}.log"
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 2> "$0"', str(self._log), str(server.python), str(script), *map(str, geometry)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=lmcache_variables(),
        )
        self._answer()

    @staticmethod
    def check_size(chunk_bytes: int) -> None:
        """AbsentError if it can't have chunks of this size here."""
        if chunk_bytes % LMCACHE_LAYER_BYTES:
            raise AbsentError(f"its chunks are whole layers of {LMCACHE_LAYER_BYTES} bytes here")

    def ask(self, what: str, count: int) -> dict[str, float]:
        """`what` = "store" or "retrieve", `count` calls one after the other; seconds and what went wrong."""
        assert self._process.stdin is not None, "made with a pipe"
        self._process.stdin.write(json.dumps([what, count]).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None, "made with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"lmcache driver ended: {self._log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "made with a pipe"
            pipe.close()
        stop(self._process)
