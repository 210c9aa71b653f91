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
from time import perf_counter
from typing import Final

from cachesvc.core.events import ExtentsMapped, ExtentsUnmapped
from cachesvc.daemon.edge import Member, files_max, guard, tell
from cachesvc.daemon.runner import Runner
from cachesvc.daemon.shares import Share
from cachesvc.errors import ProtocolError
from cachesvc.wire.framing import PREFACE_BYTES, FrameReader, check_preface, decode_descriptor_request, encode
from cachesvc.wire.messages import Attach, Attached, ExtentInfo, ExtentsHeld, ExtentsWanted, Unmapped

EXTENTS_PER_MESSAGE_MAX: Final = 64
"""Two descriptors each; the kernel passes at most 253 in one message."""

RECEIVED_DESCRIPTORS_MAX: Final = 4
"""One is expected; more than one is refused, more than this the kernel closes."""

FRAME_BYTES_MAX: Final = 1 << 18
"""Names the extents that a client has: more than 50,000."""
FRAME_S: Final = 10.0
"""From the first byte of a message to its last."""

_DESCRIPTOR_BYTES: Final = array.array("i").itemsize


class Descriptors:
    """Every descriptors connection, by the process behind it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.files_max = files_max()
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
        share: Share,
        sock: socket.socket,
        tenant: str,
        deadline: float,
        gone: Callable[[Member], None],
    ) -> None:
        self.tenant: str | None = tenant
        self.process: int | None = None
        self.handed: set[int] = set()
        self._registry = registry
        self._share = share
        self._sock = sock
        self._tenant = tenant
        self._gone = gone
        self._attach_until: float | None = deadline
        """None once it is attached."""
        self._frame_until: float | None = None
        self._preface = b""
        self._frames = FrameReader(FRAME_BYTES_MAX)
        self._received: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._readable)

    def overdue(self, now: float) -> bool:
        """Did it not attach, or not send the rest of a message, in time?"""
        return any(until is not None and until <= now for until in (self._attach_until, self._frame_until))

    def shrink(self) -> None:
        """Give back a buffer that has grown."""
        self._frames.shrink()

    def cut(self) -> None:
        """Close at once."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._close_received()
        self._registry.closed(self)
        self._gone(self)

    # --- receiving --------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        self._guarded(self._receive)

    def _guarded(self, act: Callable[[], None]) -> None:
        error = guard(self._registry.runner.counts, f"a descriptors connection of {self._tenant}", act)
        if error is not None and self._sock.fileno() >= 0:
            tell(self._sock, error)
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
        if ancillary or flags & socket.MSG_CTRUNC:
            self._keep(_passed(ancillary), whole=not flags & socket.MSG_CTRUNC)
        if n == 0:
            self.cut()
        elif missing:
            self._preface += bytes(into[:n])
            if n == missing:
                check_preface(self._preface)
        else:
            self._frames.received(n)
            # until what came is served nothing more is read
            self._loop.remove_reader(self._sock)
            self._share.serve(self._serve)

    def _keep(self, passed: list[int], *, whole: bool) -> None:
        """One descriptor a connection, until Attach is here whole: with more a client could take all that we have."""
        self._received += passed
        if not whole:
            raise ProtocolError(f"more than {RECEIVED_DESCRIPTORS_MAX} descriptors in one message")
        if passed and self._attach_until is None:
            raise ProtocolError("a descriptor came with a message that has none")
        if len(self._received) > 1:
            raise ProtocolError("Attach carries one descriptor, the sender's own pidfd")
        if passed and passed[0] >= self._registry.files_max:
            raise ProtocolError("the daemon has no file descriptors left: raise its limit (nofile)")

    def _serve(self, until: float) -> bool:
        """`shares.Work`: what has come so far."""
        if self._sock.fileno() < 0:
            return False
        more = False

        def act() -> None:
            nonlocal more
            more = self._take_all(until)

        self._guarded(act)
        if self._sock.fileno() < 0:
            return False
        if not more:
            self._loop.add_reader(self._sock, self._readable)
        return more

    def _take_all(self, until: float) -> bool:
        """One message after the other; True: there may be more."""
        taken = False
        while (payload := self._frames.next()) is not None:
            self._take(payload)
            taken = True
            if self._sock.fileno() < 0:
                return False
            if perf_counter() >= until:
                # the rest of a message can't come while we don't read
                self._frame_until = None
                return True
        if not self._frames.pending:
            self._frame_until = None
        elif taken or self._frame_until is None:
            self._frame_until = self._loop.time() + FRAME_S
        return False

    def _take(self, payload: memoryview) -> None:
        message = decode_descriptor_request(payload)
        if isinstance(message, Attach):
            self._attach(message)
            return
        if self._attach_until is not None:
            raise ProtocolError("a descriptors connection starts with Attach")
        if isinstance(message, ExtentsWanted):
            self._answer(message)
        elif isinstance(message, Unmapped):
            self._registry.give_up(self, set(message.extents))

    def _attach(self, message: Attach) -> None:
        if self._attach_until is None:
            raise ProtocolError("this connection is attached already")
        processes = self._registry.runner.processes
        token = processes.attach(self._received.pop(), self._sock) if self._received else b""
        self.process = processes.number(token)
        self._attach_until = None
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
