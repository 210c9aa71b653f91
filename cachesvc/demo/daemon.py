"""A daemon for the demo: `cachesvc serve` as a child process, in a directory of its own that is gone afterwards.

Covers: starting, killing, starting again, its counters. Not here: anybody else's daemon (`cachesvc.cli`).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from cachesvc.cli import ask
from cachesvc.config import format_size
from cachesvc.errors import OperatorError

TMPFS: Final = Path("/dev/shm")  # noqa: S108 - mkdtemp
"""Where all of it lies, as the files of a pool have to."""

START_S: Final = 60.0
STOP_S: Final = 20.0
"""Guards against hanging; it takes a second."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the daemon says of its only tenant. `sharing` is how many engines are in the namespace of most engines."""

    chunks: int
    loads: int
    loaded_bytes: int
    misses: dict[str, int]
    sharing: int
    namespaces: int
    connections: int
    restored: int

    @property
    def why(self) -> str:
        """The misses by reason."""
        return ", ".join(f"{n} {reason}" for reason, n in self.misses.items() if n) or "no misses"


class Daemon:
    """Ready when made; gone, with all that it made, when the `with` block ends. OperatorError if it can't start."""

    def __init__(self, ram_bytes: int) -> None:
        try:
            self.home = Path(tempfile.mkdtemp(prefix="cachesvc-demo-", dir=TMPFS))
        except OSError as error:
            raise OperatorError(f"{TMPFS}: {error.strerror}; the demo needs room in it") from error
        self.socket = self.home / "run" / "default" / "cachesvc.sock"
        self._admin = self.home / "run" / "admin.sock"
        self._ram_bytes = ram_bytes
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Run it, again after `kill`; it answers when this returns."""
        settings = {
            "run_dir": str(self.home / "run"),
            "root": str(self.home / "root"),
            "arena_dir": str(self.home / "arena"),
            "ram_bytes": format_size(self._ram_bytes),
            "http": {"address": "off"},
        }
        config, log = self.home / "config.yaml", self.home / "log"
        config.write_text(json.dumps(settings))  # which is YAML
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "cachesvc", "serve", "--config", str(config)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        until = time.monotonic() + START_S
        while b" ready: " not in log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > until:
                *_, last = log.read_text(errors="replace").splitlines() or ["it said nothing"]
                raise OperatorError(f"the daemon of the demo didn't start: {last}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL; it is dead when this returns."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_S)

    def counters(self) -> Counters:
        """Read from the daemon now. OperatorError if it doesn't answer."""
        status: dict[str, Any] = json.loads(ask("status", self._admin))
        tenant = status["tenants"]["default"]
        return Counters(
            chunks=sum(slab["sealed"] for slab in tenant["classes"]),
            loads=tenant["counts"]["loads"],
            loaded_bytes=tenant["counts"]["loaded_bytes"],
            misses=tenant["counts"]["misses"],
            sharing=max((one["sessions"] for one in tenant["namespaces"].values()), default=0),
            namespaces=tenant["namespaces_total"],
            connections=tenant["connections"],
            restored=status["restart"]["chunks_restored"],
        )

    def close(self) -> None:
        """Stop it and remove everything of it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.home, ignore_errors=True)
