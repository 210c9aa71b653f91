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
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

from cachesvc.daemon.descriptors import Descriptors, DescriptorsConnection
from cachesvc.daemon.edge import Member, files_max, guard, last_words, refuse
from cachesvc.daemon.runner import Runner
from cachesvc.daemon.shares import Share
from cachesvc.errors import OperatorError, ProtocolError
from cachesvc.wire.framing import BUFFER_BYTES_MIN, PREFACE_BYTES, PREFACE_DESCRIPTORS, FrameReader, check_preface

LOG = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 1024
ADMIN_CONNECTIONS_MAX: Final = 16
"""Kept for the admin socket; what is left is divided among the tenants, so that none can shut others out."""
BACKLOG: Final = 1024
GREETING_S: Final = 10.0
"""A connection has this long for its preface and Hello or Attach, and a refused one for reading why."""
FRAME_S: Final = 10.0
"""From the first byte of a message to its last."""
SWEEP_S: Final = 1.0

SOCKET_BUFFER_BYTES: Final = 1 << 20
"""A lookup of 4,096 keys fits in one go; with the default the client would wait for us in the middle of it."""
ACCEPT_PAUSE_S: Final = 1.0
UNREAD_BYTES_MAX: Final = 4 << 20
"""Replies that a client hasn't read; above it is cut off."""
UNREAD_OF_TENANT_BYTES_MAX: Final = 32 << 20
"""The same for all connections of a tenant; above, the one that reads least is cut off."""
GROWN_OF_TENANT_BYTES_MAX: Final = 64 << 20
"""What the buffers of half messages may grow by, over all connections of a tenant."""


# --- listening --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """A listening socket; what comes through it belongs to `tenant` (None = the admin socket)."""

    path: Path
    listener: socket.socket
    tenant: str | None
    inode: tuple[int, int]
    """Device and number of the socket file that we made."""

    def close(self) -> None:
        """Listen no more, and remove the socket file, if it is still ours: another daemon may have taken the place."""
        self.listener.close()
        if _inode(self.path) == self.inode:
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
        inode = _inode(path)
    except OSError as error:
        listener.close()
        raise OperatorError(
            f"can't listen on {path}: {error.strerror or error}; make {path.parent} writable, or set another run_dir"
        ) from error
    except OperatorError:
        listener.close()
        raise
    if inode is None:
        listener.close()
        raise OperatorError(f"{path} was removed as soon as it was made: is another daemon starting there?")
    return Door(path, listener, tenant, inode)


def _inode(path: Path) -> tuple[int, int] | None:
    """What tells a file from every other that is there now; None if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
        self._shares: dict[str | None, Share] = {}
        self._descriptors = Descriptors(runner)
        self._doors: list[Door] = []
        self._opening: set[asyncio.Task[object]] = set()
        self._files_max = files_max()

    def open(self, door: Door) -> None:
        """Serve those who come through `door`."""
        self._doors.append(door)
        self.loop.add_reader(door.listener, self._accept, door)

    async def sweep(self) -> None:
        """Cut those who came and never said anything, or half of it, and take back memory; until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.loop.time()
            for member in list(self.members):
                member.shrink()
                if member.overdue(now):
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

    # --- who is here ------------------------------------------------------------------------------------------------

    def share(self, tenant: str | None) -> Share:
        """What a tenant takes of the daemon; None is the admin socket."""
        share = self._shares.get(tenant)
        if share is None:
            share = self._shares[tenant] = Share(self.loop)
        return share

    def enter(self, member: Member) -> None:
        """One more connection."""
        self.members.add(member)
        self.share(member.tenant).connections += 1

    def exit(self, member: Member) -> None:
        """It is gone."""
        if member in self.members:
            self.members.remove(member)
            self.share(member.tenant).connections -= 1

    def relieve(self, tenant: str | None) -> None:
        """A tenant's clients leave too much unread: cut off those that read least."""
        share = self.share(tenant)
        slow = [m for m in self.members if isinstance(m, ControlConnection) and m.tenant == tenant]
        share.unread_bytes = sum(member.count_unread() for member in slow)
        for member in sorted(slow, key=lambda m: m.unread_bytes, reverse=True):
            if share.unread_bytes <= UNREAD_OF_TENANT_BYTES_MAX:
                return
            member.too_slow()

    def shrink(self, tenant: str | None) -> None:
        """Take back what a tenant's connections don't need now."""
        for member in self.members:
            if member.tenant == tenant:
                member.shrink()

    def _most(self, tenant: str | None) -> int:
        """Connections that a tenant may have."""
        if tenant is None:
            return ADMIN_CONNECTIONS_MAX
        tenants = sum(door.tenant is not None for door in self._doors)
        return max(1, (CONNECTIONS_MAX - ADMIN_CONNECTIONS_MAX) // tenants)

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
        most = self._most(door.tenant)
        if self.share(door.tenant).connections >= most:
            self.runner.count("too_many_connections")
            refuse(sock, ProtocolError(f"{most} connections are open, the most this daemon serves on this socket"))
        elif door.tenant is not None and sock.fileno() >= self._files_max:
            self.runner.count("too_many_files")
            refuse(sock, ProtocolError("the daemon has no file descriptors left: raise its limit (nofile)"))
        else:
            sock.setblocking(False)
            self.enter(Newcomer(self, sock, door.tenant))

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
        self.enter(connection)
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
        self.enter(
            DescriptorsConnection(
                self._descriptors, self.share(newcomer.tenant), sock, newcomer.tenant, newcomer.deadline, self.exit
            )
        )


class Newcomer:
    """A connection that hasn't said yet what it is."""

    def __init__(self, server: Server, sock: socket.socket, tenant: str | None) -> None:
        self.deadline = server.loop.time() + GREETING_S
        self.tenant = tenant
        self._server = server
        self._sock = sock
        self._preface = b""
        server.loop.add_reader(sock, self._readable)

    def leave(self) -> socket.socket:
        """It is known now what it is: somebody else serves its socket."""
        self._server.loop.remove_reader(self._sock)
        self._server.exit(self)
        return self._sock

    def overdue(self, now: float) -> bool:
        """Did its time to greet run out?"""
        return self.deadline <= now

    def shrink(self) -> None:
        """It has nothing."""

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
    """A control connection after its preface (`daemon.runner.Connection`).

    It reads on only when every message that it has is served: what waits lies in its buffer, in order.
    """

    def __init__(self, server: Server, tenant: str | None, deadline: float) -> None:
        self.tenant = tenant
        self.number = server.runner.join(self)
        self.unread_bytes = 0
        """As far as they were counted."""
        self._server = server
        self._share = server.share(tenant)
        self._frames = FrameReader()
        self._grown_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._doomed = False
        self._greeted = False
        self._deadline: float | None = deadline
        """When it has to have said Hello, or to have read why it is refused."""
        self._frame_deadline: float | None = None
        """When a message of which there is a part has to be here whole."""
        self._put_off: memoryview | None = None
        """A message that the runner wants to be asked again about."""

    # --- what the runner does with it -------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Send a frame, never wait."""
        if self._transport is None:
            return
        self._transport.write(frame)
        unread = self._transport.get_write_buffer_size()
        if unread != self.unread_bytes:
            self._share.unread_bytes += unread - self.unread_bytes
            self.unread_bytes = unread
            if unread > UNREAD_BYTES_MAX:
                self.too_slow()
            elif self._share.unread_bytes > UNREAD_OF_TENANT_BYTES_MAX:
                self._server.relieve(self.tenant)

    def finish(self) -> None:
        """Send what is left, then close; one that doesn't read is cut when the deadline comes."""
        self._deadline = self._server.loop.time() + GREETING_S
        if self._transport is not None:
            self._transport.close()

    # --- what the server does with it -------------------------------------------------------------------------------

    def overdue(self, now: float) -> bool:
        """Did it not greet, or not send the rest of a message, in time?"""
        return any(until is not None and until <= now for until in (self._deadline, self._frame_deadline))

    def shrink(self) -> None:
        """Give back a buffer that has grown."""
        self._frames.shrink()
        self._count_grown()

    def count_unread(self) -> int:
        """How much is really unread now."""
        self.unread_bytes = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self.unread_bytes

    def too_slow(self) -> None:
        """It doesn't read."""
        LOG.warning("connection %d of %s closed: it doesn't read its replies", self.number, self.tenant)
        self._server.runner.count("slow")
        self._share.unread_bytes -= self.unread_bytes
        self.unread_bytes = 0
        self.cut()

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
        self._frames.received(nbytes)
        if not self._share.serve(self._serve) and self._transport is not None:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the why doesn't matter
        """The socket is closed."""
        self._share.grown_bytes -= self._grown_bytes
        self._share.unread_bytes -= self.unread_bytes
        self._grown_bytes = self.unread_bytes = 0
        self._server.exit(self)
        self._server.runner.leave(self)

    # --- serving ----------------------------------------------------------------------------------------------------

    def _serve(self, until: float) -> bool:
        """`shares.Work`: what has come so far."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        more = False

        def act() -> None:
            nonlocal more
            more = self._answer(transport, until)

        error = guard(self._server.runner.counts, f"connection {self.number} of {self.tenant}", act)
        if error is not None:
            self._put_off = None
            self.send(last_words(error))
            self.finish()
            return False
        if more or self._put_off is not None:
            # the rest of a message can't come while we don't read
            self._frame_deadline = None
            transport.pause_reading()
        elif not transport.is_reading():
            transport.resume_reading()
        return more

    def _answer(self, transport: asyncio.Transport, until: float) -> bool:
        """One message after the other; True: there may be more."""
        runner = self._server.runner
        again = self._put_off is not None
        served = False
        while (payload := self._put_off or self._frames.next()) is not None:
            if not runner.request(self, payload, again=again):
                self._put_off = payload
                self._try_again_later()
                return False
            again, served, self._put_off = False, True, None
            if transport.is_closing():
                return False
            if not self._greeted:
                self._greet()
            if perf_counter() >= until:
                return True
        self._await_rest(served=served)
        return False

    def _greet(self) -> None:
        """A tenant's client stays if it has joined a session; whoever may use the admin socket stays anyway."""
        if self.tenant is None or self._server.runner.joined(self):
            self._greeted = True
            self._deadline = None

    def _try_again_later(self) -> None:
        """Wait until the loop has read every socket that was readable when this message was read."""
        # one turn reads what was there; the next comes before anything that is read in it
        call_soon = self._server.loop.call_soon
        call_soon(call_soon, self._share.serve, self._serve)

    def _await_rest(self, *, served: bool) -> None:
        """Every whole message is served; a part of the next may be here."""
        if not self._frames.pending:
            self._frame_deadline = None
        elif served or self._frame_deadline is None:
            self._frame_deadline = self._server.loop.time() + FRAME_S
        if self._count_grown() and self._share.grown_bytes > GROWN_OF_TENANT_BYTES_MAX:
            self._server.shrink(self.tenant)
            if self._share.grown_bytes > GROWN_OF_TENANT_BYTES_MAX:
                raise ProtocolError("too many large messages are half here: send them one after the other")

    def _count_grown(self) -> bool:
        """Has the buffer grown or shrunk since it was counted?"""
        grown = self._frames.capacity - BUFFER_BYTES_MIN
        if grown == self._grown_bytes:
            return False
        self._share.grown_bytes += grown - self._grown_bytes
        self._grown_bytes = grown
        return True
