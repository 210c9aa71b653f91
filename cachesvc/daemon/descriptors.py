"""The descriptors connection: a process proves who it is and gets the descriptors of its tenant's extents.

Covers: Attach, ExtentsWanted and Unmapped on a raw non-blocking socket (asyncio's transports can't pass descriptors),
and who was handed which extent. Not here: what a process's death means (`daemon.processes`), which extents there are
(`core.extents`).

A client connects here first: the token that it gets goes into the Hello of its control connection. Replies are small
and rare; a client that doesn't read them is cut off instead of buffered for.

An extent that was handed out counts as mapped by the process until every connection of this process that was handed it
has said Unmapped, or the process is dead: a connection that just ends says nothing about mappings. Owned by the loop.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from cachesvc.core.events import ExtentsMapped, ExtentsUnmapped
from cachesvc.daemon.edge import Member, guard, refuse
from cachesvc.daemon.runner import Runner
from cachesvc.errors import ProtocolError
from cachesvc.wire.framing import PREFACE_BYTES, FrameReader, check_preface, decode_descriptor_request, encode
from cachesvc.wire.messages import Attach, Attached, ExtentInfo, ExtentsHeld, ExtentsWanted, Unmapped

EXTENTS_PER_MESSAGE_MAX: Final = 64
"""Two descriptors each; the kernel passes at most 253 in one message."""

RECEIVED_DESCRIPTORS_MAX: Final = 4
"""One is expected; more than one is refused, more than this the kernel closes."""

_DESCRIPTOR_BYTES: Final = array.array("i").itemsize


class Descriptors:
    """Every descriptors connection, by the process behind it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._of_process: defaultdict[int, set[DescriptorsConnection]] = defaultdict(set)

    def attached(self, connection: DescriptorsConnection) -> None:
        """A connection knows its process."""
        if connection.process is not None:
            self._of_process[connection.process].add(connection)

    def closed(self, connection: DescriptorsConnection) -> None:
        """It is gone; what it was handed may be mapped still."""
        if connection.process is not None:
            others = self._of_process[connection.process]
            others.discard(connection)
            if not others:
                del self._of_process[connection.process]

    def hand(self, connection: DescriptorsConnection, extents: set[int]) -> None:
        """The connection's process is about to have these mapped."""
        fresh = extents - connection.handed
        connection.handed |= fresh
        if connection.process is not None and fresh:
            self.runner.dispatch(ExtentsMapped(connection.process, tuple(fresh)))

    def give_up(self, connection: DescriptorsConnection, extents: set[int]) -> None:
        """A client of this process has them unmapped; other clients in the same process may have them still."""
        connection.handed -= extents
        if connection.process is None:
            return
        kept = {e for other in self._of_process[connection.process] for e in other.handed}
        self.runner.dispatch(ExtentsUnmapped(connection.process, tuple(extents - kept)))


class DescriptorsConnection:
    """One of them, from its preface on. `handed` are the extents that its client has, as far as is known."""

    def __init__(
        self,
        registry: Descriptors,
        sock: socket.socket,
        tenant: str,
        deadline: float | None,
        gone: Callable[[Member], None],
    ) -> None:
        self.deadline = deadline
        self.process: int | None = None
        self.handed: set[int] = set()
        self._registry = registry
        self._sock = sock
        self._tenant = tenant
        self._gone = gone
        self._preface = b""
        self._frames = FrameReader()
        self._received: list[int] = []
        asyncio.get_running_loop().add_reader(sock, self._readable)

    def cut(self) -> None:
        """Close at once."""
        if self._sock.fileno() < 0:
            return
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self._close_received()
        self._registry.closed(self)
        self._gone(self)

    # --- receiving --------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        error = guard(self._registry.runner.counts, f"a descriptors connection of {self._tenant}", self._receive)
        if error is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            refuse(self._sock.dup(), error)
            self.cut()

    def _receive(self) -> None:
        space = socket.CMSG_SPACE(RECEIVED_DESCRIPTORS_MAX * _DESCRIPTOR_BYTES)
        missing = PREFACE_BYTES - len(self._preface)
        into = memoryview(bytearray(missing)) if missing else self._frames.buffer()
        try:
            n, ancillary, flags, _ = self._sock.recvmsg_into([into], space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self.cut()
            return
        self._received += _passed(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"more than {RECEIVED_DESCRIPTORS_MAX} descriptors in one message")
        if n == 0:
            self.cut()
        elif missing:
            self._preface += bytes(into[:n])
            if n == missing:
                check_preface(self._preface)
        else:
            for payload in self._frames.advance(n):
                self._take(payload)
                if self._sock.fileno() < 0:
                    return

    def _take(self, payload: memoryview) -> None:
        message = decode_descriptor_request(payload)
        if isinstance(message, Attach):
            self._attach(message)
            return
        if self.deadline is not None:
            raise ProtocolError("a descriptors connection starts with Attach")
        if self._received:
            raise ProtocolError("a descriptor came with a message that has none")
        if isinstance(message, ExtentsWanted):
            self._answer(message)
        elif isinstance(message, Unmapped):
            self._registry.give_up(self, set(message.extents))

    def _attach(self, message: Attach) -> None:
        if self.deadline is None:
            raise ProtocolError("this connection is attached already")
        if len(self._received) > 1:
            raise ProtocolError("Attach carries one descriptor, the sender's own pidfd")
        processes = self._registry.runner.processes
        token = processes.attach(self._received.pop(), self._sock) if self._received else b""
        self.process = processes.number(token)
        self.deadline = None
        self._registry.attached(self)
        self._send(encode(Attached(message.call, token)), [])

    # --- answering --------------------------------------------------------------------------------------------------

    def _answer(self, message: ExtentsWanted) -> None:
        node, arena = self._registry.runner.node, self._registry.runner.arena
        usable = node.extents_of(self._tenant, set(message.slot_bytes))
        held = set(message.held)
        lacking = [extent for extent, _, _ in usable if extent not in held]
        sent = set(lacking[:EXTENTS_PER_MESSAGE_MAX])
        reply = ExtentsHeld(
            message.call,
            node.extents_version(self._tenant),
            [ExtentInfo(extent, size, count, extent in sent) for extent, size, count in usable],
            len(lacking) > len(sent),
        )
        descriptors = [fd for extent, _, _ in usable if extent in sent for fd in arena.descriptors(extent)]
        # counted as mapped before it can be: an extent must not be thought free while a client has it
        self._registry.hand(self, sent | {extent for extent, _, _ in usable if extent in held})
        self._send(encode(reply), descriptors)

    def _send(self, frame: bytes, descriptors: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            sent = self._sock.sendmsg([frame], ancillary)
        except OSError:
            sent = 0
        if sent < len(frame):
            self._registry.runner.count("slow")
            self.cut()

    def _close_received(self) -> None:
        for fd in self._received:
            os.close(fd)
        self._received.clear()


def _passed(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in a message's ancillary data."""
    passed = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            passed.frombytes(data[: len(data) - len(data) % _DESCRIPTOR_BYTES])
    return list(passed)
