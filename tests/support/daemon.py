"""A real daemon in a process of its own, in directories of its own, and a bare client that says just what a test wants.

Covers: starting, stopping, killing, waiting for its lines; frames over its sockets. Not here: a fake daemon, the real
client. Everything is cleaned up by `close`: processes by their pid, the arena in /dev/shm, the rest by pytest.
"""

from __future__ import annotations

import array
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from cachesvc.types import Role
from cachesvc.wire.framing import (
    PREFACE_CONTROL,
    PREFACE_DESCRIPTORS,
    FrameReader,
    decode_control_reply,
    decode_descriptor_reply,
    encode,
    preface,
)
from cachesvc.wire.messages import (
    Ask,
    Attach,
    Attached,
    ControlReply,
    DescriptorReply,
    Hello,
    Message,
    Report,
    Welcome,
)

HANG_S = 30.0
"""Nothing here takes a tenth of it."""

KIB = 1 << 10
MIB = 1 << 20


def wait_for(what: Any, seconds: float = HANG_S) -> Any:
    """The first true answer of `what()`; AssertionError if none comes."""
    until = time.monotonic() + seconds
    while True:
        answer = what()
        if answer:
            return answer
        assert time.monotonic() < until, f"waited {seconds} s in vain for {what}"
        time.sleep(0.005)


@contextmanager
def shared_directory() -> Iterator[Path]:
    """A directory in memory, gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="cachesvc-test-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def small_mount(size_bytes: int) -> Iterator[Path]:
    """A directory on a tmpfs of its own, of this size. Needs root."""
    with shared_directory() as path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", path], check=True)
        try:
            yield path
        finally:
            # lazily: a test that failed may still have files open there
            subprocess.run(["umount", "--lazy", path], check=True)


class Daemon:
    """`python -m cachesvc serve`, stopped when the `with` block ends. `settings` override the small default config."""

    def __init__(self, home: Path, arena_dir: Path, **settings: Any) -> None:
        self.home = home
        self.settings: dict[str, Any] = {
            "run_dir": str(home / "run"),
            "root": str(home / "root"),
            "state_dir": str(home / "state"),
            "arena_dir": str(arena_dir),
            "ram_bytes": "64MiB",
            "extent_bytes": "16MiB",
            "http": {"address": "off"},
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def launch(self, *flags: str) -> subprocess.Popen[bytes]:
        """Start it, don't wait."""
        config = self.home / "config.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        command = [sys.executable, "-m", "cachesvc", "serve", "--config", str(config), *flags]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        return self.process

    def start(self, *flags: str) -> None:
        """Start it and wait until it is ready."""
        process = self.launch(*flags)
        wait_for(lambda: " ready: " in self.log or process.poll() is not None)
        assert process.poll() is None, self.log

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(HANG_S)

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP; it is stopped when this returns."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def status(self, tenant: str | None = None) -> dict[str, Any]:
        """What it says of itself, on the admin socket or to a tenant."""
        with Wire(self.admin_socket if tenant is None else self.socket(tenant)) as wire:
            report = wire.call(Ask(1, "status"))
        assert isinstance(report, Report)
        body: dict[str, Any] = json.loads(report.body)
        return body

    def tenant(self, name: str = "default") -> dict[str, Any]:
        """What it says of a tenant."""
        return dict(self.status()["tenants"][name])

    def slab(self) -> dict[str, Any]:
        """What it says of the only slab class of the only tenant."""
        [found] = self.tenant()["classes"]
        return dict(found)

    def open_tickets(self) -> int:
        """Writes and leases of the only tenant."""
        tenant = self.tenant()
        return int(tenant["write_tickets"] + tenant["leases"])

    def nothing_leaks(self, processes: int) -> bool:
        """Is every slot free or sealed, no ticket open, nobody known but so many processes, each a session?"""
        status = self.status()
        tenant = status["tenants"]["default"]
        [slab] = tenant["classes"]
        held = tenant["write_tickets"] + tenant["leases"] + slab["writing"] + slab["quarantined"] + slab["leased"]
        there = tenant["sessions"], tenant["processes"]
        whole = bool(slab["free"] + slab["sealed"] == slab["slots"])
        return whole and not held and not status["restart"]["orphans"] and there == (processes, processes)

    def evictions(self, tenant: str = "default") -> int:
        """Chunks of a tenant that were evicted since it started."""
        return int(self.tenant(tenant)["counts"]["evictions"])

    @property
    def log_path(self) -> Path:
        return self.home / "log"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def admin_socket(self) -> Path:
        return Path(self.settings["run_dir"]) / "admin.sock"

    def socket(self, tenant: str = "default") -> Path:
        return Path(self.settings["run_dir"]) / tenant / "cachesvc.sock"

    def http(self) -> str:
        """The base URL of its HTTP server, once that is there."""
        line = wait_for(lambda: next((x for x in self.log.splitlines() if " HTTP on http" in x), None))
        return str(line).rpartition(" ")[2]


def connect(path: Path | str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(HANG_S)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


class Wire:
    """A control connection that sends what it is told to, and waits for replies."""

    def __init__(self, path: Path | str, first: bytes | None = None) -> None:
        self.socket = connect(path)
        self._frames = FrameReader()
        self._replies: list[ControlReply] = []
        self.raw(preface(PREFACE_CONTROL) if first is None else first)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def raw(self, some: bytes) -> None:
        self.socket.sendall(some)

    def send(self, *messages: Message) -> None:
        self.raw(b"".join(map(encode, messages)))

    def reply(self) -> ControlReply | None:
        """The next reply, None at the end of the connection."""
        while not self._replies:
            try:
                n = self.socket.recv_into(self._frames.buffer())
            except ConnectionResetError:
                return None
            if not n:
                return None
            self._replies += [decode_control_reply(payload) for payload in self._frames.advance(n)]
        return self._replies.pop(0)

    def call(self, message: Message) -> ControlReply:
        self.send(message)
        reply = self.reply()
        assert reply is not None, f"closed instead of an answer to {message}"
        return reply

    def hello(self, **fields: Any) -> Welcome:
        """Join a session of one's own in a namespace of 4 KiB chunks, and be welcome."""
        reply = self.call(hello(**fields))
        assert isinstance(reply, Welcome), reply
        return reply


def hello(**fields: Any) -> Hello:
    """A Hello of a scheduler; `fields` override."""
    usual: dict[str, Any] = {
        "call": 1,
        "session": os.urandom(16),
        "role": Role.SCHEDULER,
        "token": b"",
        "namespace": bytes(16),
        "label": "test",
        "components": {"model": "m"},
        "chunk_bytes": [4096],
        "writes": [],
        "leases": [],
    }
    return Hello(**(usual | fields))


class DescriptorsWire:
    """A descriptors connection; `reply` gives the message and the descriptors that came with it."""

    def __init__(self, path: Path | str, *, descriptors: list[int] | None = None) -> None:
        """Send Attach with these descriptors, our own pidfd unless told otherwise."""
        self._begin(path)
        pidfd = os.pidfd_open(os.getpid())
        try:
            self.send(Attach(1), [pidfd] if descriptors is None else descriptors, preface(PREFACE_DESCRIPTORS))
        finally:
            os.close(pidfd)

    @classmethod
    def bare(cls, path: Path | str) -> DescriptorsWire:
        """One that has said nothing yet."""
        wire = cls.__new__(cls)
        wire._begin(path)
        return wire

    def _begin(self, path: Path | str) -> None:
        self.socket = connect(path)
        self._frames = FrameReader()
        self._replies: list[DescriptorReply] = []

    def __enter__(self) -> DescriptorsWire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def attach(self) -> bytes:
        """The token that answers Attach."""
        reply, _ = self.reply()
        assert isinstance(reply, Attached), reply
        return reply.token

    def send(self, message: Message, descriptors: list[int] | None = None, before: bytes = b"") -> None:
        self.raw(before + encode(message), descriptors)

    def raw(self, some: bytes, descriptors: list[int] | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        sent = self.socket.sendmsg([some], ancillary)
        if sent < len(some):
            self.socket.sendall(some[sent:])

    def reply(self) -> tuple[DescriptorReply | None, list[int]]:
        """The next reply, None at the end of the connection."""
        passed = array.array("i")
        while not self._replies:
            try:
                n, ancillary, _, _ = self.socket.recvmsg_into([self._frames.buffer()], socket.CMSG_SPACE(4 * 200))
            except ConnectionResetError:
                return None, list(passed)
            for _, _, data in ancillary:
                passed.frombytes(data)
            if not n:
                return None, list(passed)
            self._replies += [decode_descriptor_reply(payload) for payload in self._frames.advance(n)]
        return self._replies.pop(0), list(passed)
