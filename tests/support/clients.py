"""Client processes, from the test's side: start, tell, stop, kill.

Covers: `tests.support.worker` in a process of its own, told what to do a line at a time. Not here: what it does then.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.support.daemon import HANG_S, KIB

ROOT = Path(__file__).resolve().parent.parent.parent
CHUNK_BYTES = 64 * KIB


class Raised(Exception):  # noqa: N818 - what happened there, told here
    """A call in the client process raised this."""


class ClientProcess:
    """A process with one client, started by the command `within` if there is one. Killed when the `with` block ends,
    whatever state it is in."""

    def __init__(self, within: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*within, sys.executable, "-m", "tests.support.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.seconds = 0.0
        """How long the last call took."""
        self._unread = b""

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self.process.pid

    # --- telling ----------------------------------------------------------------------------------------------------

    def send(self, verb: str, **arguments: Any) -> None:
        """Tell it to do something, don't wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": verb, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """What it answers next; Raised if the call raised."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._unread:
            readable, _, _ = select.select([descriptor], [], [], HANG_S)
            assert readable, f"no answer within {HANG_S} s"
            more = os.read(descriptor, 1 << 20)
            assert more, f"the client process has ended with code {self.process.wait()}"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        self.seconds = answer.get("seconds", 0.0)
        if "raised" in answer:
            raise Raised(answer["raised"])
        return answer["ok"]

    def do(self, verb: str, **arguments: Any) -> Any:
        """Tell it to do something and wait for the answer."""
        self.send(verb, **arguments)
        return self.answer()

    def open(self, address: Path | str, **options: Any) -> ClientProcess:
        """Open its client; it is connected and its memory is mapped then, if the daemon is there."""
        usual = {"namespace": "e2e", "chunk_bytes": CHUNK_BYTES}
        self.do("open", address=str(address), **(usual | options))
        return self

    # --- signals ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """SIGSTOP; it is stopped when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; it is dead and reaped when this returns."""
        self.process.kill()
        self.process.wait(HANG_S)
        for pipe in self.process.stdin, self.process.stdout:
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue


class Clients(ExitStack):
    """Starts client processes; all of them are dead at the end."""

    def start(self, within: Sequence[str] = ()) -> ClientProcess:
        """One that has no client yet."""
        return self.enter_context(ClientProcess(within))

    def open(self, address: Path | str, **options: Any) -> ClientProcess:
        return self.start().open(address, **options)

    def open_many(self, count: int, address: Path | str, **options: Any) -> list[ClientProcess]:
        """They start at the same time: an interpreter takes a while."""
        started = [self.start() for _ in range(count)]
        return [client.open(address, **options) for client in started]


def names(prefix: str, numbers: Iterable[int]) -> list[str]:
    """Keys `<prefix>-<number>`."""
    return [f"{prefix}-{number}" for number in numbers]
