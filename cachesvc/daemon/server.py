"""The daemon's sockets: who may listen where, newcomers, control connections.

Covers: listening sockets with their modes, a connection's first two bytes, frames in and replies out, every limit on
connections. Not here: what a message means (`daemon.runner`), descriptors (`daemon.descriptors`).

One path serves both kinds of connection, so a newcomer's first byte decides::

    accept --> Newcomer: peeks one byte (recv takes no descriptors)
                 |-- "F" --> nothing was taken: DescriptorsConnection reads on with recvmsg
                 +-- else -> takes the preface; "C" of our version --> ControlConnection (asyncio transport)
                                                anything else      --> Refused, closed

Whatever a client's bytes cause ends its own connection only (`daemon.edge`). Owned by the daemon's loop.
"""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cachesvc.daemon.descriptors import Descriptors, DescriptorsConnection
from cachesvc.daemon.edge import Member, guard, last_words, refuse
from cachesvc.daemon.runner import Runner
from cachesvc.errors import OperatorError, ProtocolError
from cachesvc.wire.framing import PREFACE_BYTES, PREFACE_DESCRIPTORS, FrameReader, check_preface

LOG = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 1024
BACKLOG: Final = 1024
GREETING_S: Final = 10.0
"""A connection has this long for its preface and first message, and a refused one for reading why."""
SWEEP_S: Final = 1.0

SOCKET_BUFFER_BYTES: Final = 1 << 20
"""A lookup of 4,096 keys fits in one go; with the default the client would wait for us in the middle of it."""
ACCEPT_PAUSE_S: Final = 1.0
UNREAD_BYTES_MAX: Final = 4 << 20
"""Replies that a client hasn't read; above it is cut off."""


# --- listening --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """A listening socket; what comes through it belongs to `tenant` (None = the admin socket)."""

    path: Path
    listener: socket.socket
    tenant: str | None

    def close(self) -> None:
        """Listen no more, and remove the socket file."""
        self.listener.close()
        self.path.unlink(missing_ok=True)


def open_door(path: Path, mode: int, group: str | None, tenant: str | None) -> Door:
    """Listen on a unix socket at `path`; its directory is made, a stale socket file replaced.

    `group` by name or number owns it (None = the daemon's own). OperatorError: another daemon listens there, something
    else is there, a directory can't be written, the group is unknown.
    """
    group_number = -1 if group is None else _group_number(group)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_directory(path.parent, group_number)
        _remove_stale(path)
        # Linux gives the file the mode of the socket: there is no moment in which anybody else could connect
        os.fchmod(listener.fileno(), mode & 0o700)
        listener.bind(str(path))
        os.chown(path, -1, group_number)
        path.chmod(mode)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OperatorError(
            f"can't listen on {path}: {error.strerror or error}; make {path.parent} writable, or set another run_dir"
        ) from error
    except OperatorError:
        listener.close()
        raise
    return Door(path, listener, tenant)


def _make_directory(path: Path, group_number: int) -> None:
    """Make it and what is missing above; whoever may open the socket may get there, whatever our umask says."""
    if path.is_dir():
        return
    for missing in [place for place in reversed((path, *path.parents)) if not place.is_dir()]:
        missing.mkdir()
        missing.chmod(0o755)
    os.chown(path, -1, group_number)


def _group_number(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise OperatorError(f"there is no group {group!r}: create it or change `group` of the tenant") from error


def _remove_stale(path: Path) -> None:
    """Unlink a socket file that nobody listens on."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OperatorError(f"{path} exists and is no socket: remove it, or set another run_dir")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            # its backlog is full: somebody is there
            pass
    raise OperatorError(f"another daemon listens on {path}: stop it, or set another run_dir")


# --- connections ------------------------------------------------------------------------------------------------------


class Server:
    """Every listening socket and connection of the daemon."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.loop = asyncio.get_running_loop()
        self.members: set[Member] = set()
        self._descriptors = Descriptors(runner)
        self._doors: list[Door] = []
        self._opening: set[asyncio.Task[object]] = set()

    def open(self, door: Door) -> None:
        """Serve those who come through `door`."""
        self._doors.append(door)
        self.loop.add_reader(door.listener, self._accept, door)

    async def sweep(self) -> None:
        """Cut those who came and never said anything; until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.loop.time()
            for member in [m for m in self.members if m.deadline is not None and m.deadline <= now]:
                self.runner.count("silent")
                member.cut()

    async def close(self) -> None:
        """Accept nobody any more and cut everybody."""
        for door in self._doors:
            self.loop.remove_reader(door.listener)
        while self.members:
            for member in list(self.members):
                member.cut()
            # transports report their end in a later turn of the loop
            await asyncio.sleep(0)

    def _accept(self, door: Door) -> None:
        try:
            sock, _ = door.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                raise
            LOG.warning("can't accept a connection: %s", error.strerror)
            self.runner.count("accept_failed")
            # the listener stays readable: without a pause the loop would spin
            self.loop.remove_reader(door.listener)
            self.loop.call_later(ACCEPT_PAUSE_S, self._accept_again, door)
            return
        if len(self.members) >= CONNECTIONS_MAX:
            self.runner.count("too_many_connections")
            refuse(sock, ProtocolError(f"{CONNECTIONS_MAX} connections are open, the most this daemon serves"))
            return
        sock.setblocking(False)
        self.members.add(Newcomer(self, sock, door.tenant))

    def _accept_again(self, door: Door) -> None:
        if door.listener.fileno() >= 0:
            self.loop.add_reader(door.listener, self._accept, door)

    # --- a newcomer's ways on ---------------------------------------------------------------------------------------

    def serve_control(self, newcomer: Newcomer) -> None:
        """It said C: asyncio reads its socket from now on."""
        sock = newcomer.leave()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        connection = ControlConnection(self, newcomer.tenant, newcomer.deadline)
        self.members.add(connection)
        opening: asyncio.Task[object] = self.loop.create_task(
            self.loop.connect_accepted_socket(lambda: connection, sock)
        )
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    def serve_descriptors(self, newcomer: Newcomer) -> None:
        """It said F."""
        if newcomer.tenant is None:
            raise ProtocolError("the admin socket gives no extents: use the socket of a tenant")
        sock = newcomer.leave()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        connection = DescriptorsConnection(
            self._descriptors, sock, newcomer.tenant, newcomer.deadline, self.members.discard
        )
        self.members.add(connection)


class Newcomer:
    """A connection that hasn't said yet what it is."""

    def __init__(self, server: Server, sock: socket.socket, tenant: str | None) -> None:
        self.deadline: float | None = server.loop.time() + GREETING_S
        self.tenant = tenant
        self._server = server
        self._sock = sock
        self._preface = b""
        server.loop.add_reader(sock, self._readable)

    def leave(self) -> socket.socket:
        """It is known now what it is: somebody else serves its socket."""
        self._server.loop.remove_reader(self._sock)
        self._server.members.discard(self)
        return self._sock

    def cut(self) -> None:
        """Close at once."""
        self.leave().close()

    def _readable(self) -> None:
        error = guard(self._server.runner.counts, "a newcomer", self._greet)
        if error is not None:
            refuse(self.leave(), error)

    def _greet(self) -> None:
        try:
            if not self._preface and self._sock.recv(1, socket.MSG_PEEK) == PREFACE_DESCRIPTORS:
                self._server.serve_descriptors(self)
                return
            more = self._sock.recv(PREFACE_BYTES - len(self._preface))
        except BlockingIOError:
            return
        except OSError:
            self.cut()
            return
        self._preface += more
        if not more:
            self.cut()
        elif len(self._preface) == PREFACE_BYTES:
            check_preface(self._preface)
            self._server.serve_control(self)


class ControlConnection(asyncio.BufferedProtocol):
    """A control connection after its preface (`daemon.runner.Connection`)."""

    def __init__(self, server: Server, tenant: str | None, deadline: float | None) -> None:
        self.deadline = deadline
        self.tenant = tenant
        self.number = server.runner.join(self)
        self._server = server
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._doomed = False
        self._held: list[bytes] = []

    # --- what the runner does with it -------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Send a frame, never wait."""
        if self._transport is None:
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            LOG.warning("connection %d of %s closed: it doesn't read its replies", self.number, self.tenant)
            self._server.runner.count("slow")
            self._transport.abort()

    def finish(self) -> None:
        """Send what is left, then close; one that doesn't read is cut when the deadline comes."""
        self.deadline = self._server.loop.time() + GREETING_S
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Close at once."""
        self._doomed = True
        if self._transport is not None:
            self._transport.abort()

    # --- what asyncio does with it ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is asyncio's."""
        if isinstance(transport, asyncio.Transport):
            self._transport = transport
        if self._doomed:
            self.cut()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the reader knows better
        """Where to receive into."""
        return self._frames.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Something came."""
        self._guarded(lambda: self._take(nbytes))

    def _guarded(self, act: Callable[[], None]) -> None:
        error = guard(self._server.runner.counts, f"connection {self.number} of {self.tenant}", act)
        if error is not None:
            self.send(last_words(error))
            self.finish()

    def _take(self, nbytes: int) -> None:
        for payload in self._frames.advance(nbytes):
            if self._transport is None or self._transport.is_closing():
                return
            self.deadline = None
            if self._held or not self._server.runner.request(self, payload):
                self._hold([bytes(payload)])

    def _hold(self, payloads: list[bytes]) -> None:
        """Keep messages, in order, until the loop has read every socket that was readable when the first was read."""
        if not self._held:
            # one turn reads what was there; the next comes before anything that is read in it
            self._server.loop.call_soon(self._server.loop.call_soon, self._go_on)
        self._held += payloads

    def _go_on(self) -> None:
        held, self._held = self._held, []
        self._guarded(lambda: self._serve(held))

    def _serve(self, held: list[bytes]) -> None:
        for i, payload in enumerate(held):
            if self._transport is None or self._transport.is_closing():
                return
            if not self._server.runner.request(self, memoryview(payload), again=not i):
                self._hold(held[i:])
                return

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the why doesn't matter
        """The socket is closed."""
        self._server.members.discard(self)
        self._server.runner.leave(self)
