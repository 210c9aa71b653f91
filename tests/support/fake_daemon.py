"""A small daemon for tests of the client: real sockets and real extent files, any reply can be replaced.

Covers: both kinds of connection, one namespace's chunks in a dict, stalls, silence, garbage, coming back with or
without its memory. Not here: eviction, limits, tenants, more than one session at a time: that is the real daemon's
(`tests.support.daemon`).

`on[Type]` replaces the reply to messages of a type: a function from the message to what is sent: a message, bytes as
they are, a list of those, or None for silence; `Close` raised in it closes the connection. `received` holds every
message, in order.
"""

from __future__ import annotations

import mmap
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from cachesvc.arena.layout import (
    STATE_FREE,
    STATE_SEALED,
    STATE_WRITING,
    Header,
    TableWriter,
    encode_header,
    table_bytes,
)
from cachesvc.types import AllocateState, KeyState
from cachesvc.wire import messages as m
from cachesvc.wire.framing import (
    PREFACE_DESCRIPTORS,
    FrameReader,
    decode_control_request,
    decode_descriptor_request,
    encode,
)

HANG_S = 30.0
BOOT = b"b" * 16
TOKEN = b"t" * 16

Answer: TypeAlias = m.Message | bytes | list[Any] | None


class Close(Exception):  # noqa: N818 - a word of the script, not an error
    """The daemon closes the connection instead of answering."""


def wait_for(what: Callable[[], Any]) -> Any:
    """The first true answer of `what()`; AssertionError if none comes."""
    until = time.monotonic() + HANG_S
    while not (answer := what()):
        assert time.monotonic() < until, f"waited {HANG_S} s in vain for {what}"
        time.sleep(0.002)
    return answer


class FakeExtent:
    """One extent on disk, with its table mapped for writing."""

    def __init__(self, folder: Path, arena: bytes, number: int, slot_bytes: int, slot_count: int) -> None:
        self.number, self.slot_bytes, self.slot_count = number, slot_bytes, slot_count
        self.data = folder / f"extent-{number:08d}.data"
        self.table = folder / f"extent-{number:08d}.table"
        with self.data.open("wb") as file:
            file.truncate(slot_bytes * slot_count)
        inode = self.data.stat().st_ino
        header = Header(arena, BOOT, number, inode, "default", slot_bytes * slot_count, slot_bytes, slot_count)
        self.table.write_bytes(encode_header(header).ljust(table_bytes(slot_count), b"\0"))
        with self.table.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._writer = TableWriter(self._memory, slot_count)
        self.free = list(range(slot_count - 1, -1, -1))

    def mark(self, slot: int, generation: int, state: int) -> None:
        self._writer.mark([slot], [generation], state)

    def open(self) -> tuple[int, int]:
        return os.open(self.data, os.O_RDWR), os.open(self.table, os.O_RDONLY)

    def close(self) -> None:
        self._writer.release()
        self._memory.close()


class Peer:
    """One connection to the fake."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.preface = b""
        self.frames = FrameReader()

    @property
    def descriptors(self) -> bool:
        return self.preface[:1] == PREFACE_DESCRIPTORS


class FakeDaemon:
    """Serves `path` from a thread of its own until `close`. `restart` begins anew, as a daemon would after kill -9."""

    def __init__(self, folder: Path, *, slot_bytes: int = 4096, slot_count: int = 64) -> None:
        self.path = str(folder / "fake.sock")
        self.arena = os.urandom(16)
        self.version = 1
        self.extents: dict[int, FakeExtent] = {}
        self.chunks: dict[bytes, tuple[int, int, int, int]] = {}
        """Key -> extent, slot, generation, bytes stored."""
        self.writes: dict[int, list[tuple[bytes, int, int, int]]] = {}
        """Ticket -> key, extent, slot, generation."""
        self.leases: set[int] = set()
        self.received: list[m.Message] = []
        self.on: dict[type, Callable[[Any], Answer]] = {}
        self._folder, self._slot_bytes, self._slot_count = folder, slot_bytes, slot_count
        self._generation = 0
        self._turn = threading.Lock()  # held while a message is handled; by `stall` too
        self._listener: socket.socket | None = None
        self._peers: list[Peer] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._closing: list[FakeExtent] = []

    # --- what tests do ----------------------------------------------------------------------------------------------

    def start(self) -> FakeDaemon:
        if not self.extents:
            self.add_extent()
        self._stopping = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, args=(self._listener,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Like kill -9: connections end, files stay."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join(HANG_S)
            assert not self._thread.is_alive()
            self._thread = None
            Path(self.path).unlink()

    def restart(self, *, cold: bool = False) -> None:
        """Start again; `cold` = nothing of before is known, another arena."""
        if cold:
            self.arena = os.urandom(16)
            self.chunks.clear()
            self.writes.clear()
            self.leases.clear()
            self.replace_extents()
        self.start()

    def close(self) -> None:
        self.stop()
        for extent in (*self.extents.values(), *self._closing):
            extent.close()

    def __enter__(self) -> FakeDaemon:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def stall(self) -> None:
        """From now on nothing is read, until `resume`; like SIGSTOP."""
        assert self._turn.acquire(timeout=HANG_S)

    def resume(self) -> None:
        self._turn.release()

    def add_extent(self) -> FakeExtent:
        number = max((*self.extents, *(extent.number for extent in self._closing)), default=0) + 1
        self.extents[number] = FakeExtent(self._folder, self.arena, number, self._slot_bytes, self._slot_count)
        self.version += 1
        return self.extents[number]

    def drop_extent(self, number: int) -> None:
        self._closing.append(self.extents.pop(number))
        self.chunks = {key: place for key, place in self.chunks.items() if place[0] != number}
        self.version += 1

    def replace_extents(self) -> None:
        for number in list(self.extents):
            self.drop_extent(number)
        self.add_extent()

    def evict(self, key: bytes) -> None:
        """The slot of a key is given to somebody else."""
        extent, slot, generation, _ = self.chunks.pop(key)
        self.extents[extent].mark(slot, generation + 1, STATE_FREE)
        self.extents[extent].free.append(slot)

    def store(self, key: bytes, data: bytes) -> None:
        """As if another client had put it."""
        extent, slot, generation = self._take_slot()
        with self.extents[extent].data.open("r+b") as file:
            file.seek(slot * self._slot_bytes)
            file.write(data)
        self.extents[extent].mark(slot, generation, STATE_SEALED)
        self.chunks[key] = extent, slot, generation, len(data)

    def got(self, kind: type) -> list[Any]:
        """Every message of a type received so far."""
        return [message for message in list(self.received) if isinstance(message, kind)]

    # --- the thread -------------------------------------------------------------------------------------------------

    def _serve(self, listener: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while not self._stopping:
                for key, _ in selector.select(0.02):
                    with self._turn:
                        if key.fileobj is listener:
                            peer = Peer(listener.accept()[0])
                            peer.sock.settimeout(HANG_S)
                            self._peers.append(peer)
                            selector.register(peer.sock, selectors.EVENT_READ, peer)
                        elif not self._heard(key.data):
                            selector.unregister(key.data.sock)
                            key.data.sock.close()
        for peer in self._peers:
            peer.sock.close()
        self._peers.clear()
        listener.close()

    def _heard(self, peer: Peer) -> bool:
        """Handle what one read brings; False = the connection has ended."""
        try:
            if len(peer.preface) < 2:
                got, fds, _, _ = socket.recv_fds(peer.sock, 2 - len(peer.preface), 4)
                peer.preface += got
                _close_all(fds)
                return bool(got)
            space = peer.frames.buffer()
            got, fds, _, _ = socket.recv_fds(peer.sock, len(space), 4)
            _close_all(fds)
            space[: len(got)] = got
            decode: Callable[[memoryview], m.Message]
            decode = decode_descriptor_request if peer.descriptors else decode_control_request
            for payload in peer.frames.advance(len(got)):
                message = decode(payload)
                self.received.append(message)
                self._answer(peer, message)
        except (OSError, Close):
            return False
        return bool(got)

    def _answer(self, peer: Peer, message: m.Message) -> None:
        scripted = self.on.get(type(message))
        answer = scripted(message) if scripted is not None else self.usual(message)
        for part in answer if isinstance(answer, list) else [answer]:
            if isinstance(part, m.ExtentsHeld):
                self._send_extents(peer, part)
            elif part is not None:
                peer.sock.sendall(part if isinstance(part, bytes) else encode(part))

    def _send_extents(self, peer: Peer, reply: m.ExtentsHeld) -> None:
        fds = [fd for info in reply.extents if info.attached for fd in self.extents[info.extent].open()]
        try:
            socket.send_fds(peer.sock, [encode(reply)], fds)
        finally:
            _close_all(fds)

    # --- what a daemon answers --------------------------------------------------------------------------------------

    def usual(self, message: m.Message) -> Answer:
        """The reply of a daemon that has nothing against it."""
        answers: dict[type, Callable[[Any], Answer]] = {
            m.Hello: self._hello,
            m.Lookup: lambda x: m.Looked(x.call, self._states(x.keys), self.version),
            m.Lease: self._lease,
            m.Release: lambda x: self.leases.difference_update(x.tickets),
            m.Allocate: self._allocate,
            m.Seal: self._seal,
            m.Abort: self._abort,
            m.Ping: lambda x: m.Pong(x.call, self.version),
            m.Attach: lambda x: m.Attached(x.call, TOKEN),
            m.ExtentsWanted: self._extents,
        }
        answer = answers.get(type(message))
        return answer(message) if answer is not None else None

    def _hello(self, hello: m.Hello) -> Answer:
        writes = [claim.ticket for claim in hello.writes if claim.ticket in self.writes]
        leases = [claim.ticket for claim in hello.leases if claim.ticket in self.leases]
        self.leases.intersection_update(leases)
        self._abort(m.Abort([ticket for ticket in self.writes if ticket not in writes]))
        return m.Welcome(hello.call, self.arena, writes, leases, self.version)

    def _states(self, keys: m.KeyBatch) -> bytes:
        return bytes(KeyState.RAM if key in self.chunks else KeyState.NEVER_STORED for key in m.unpack_keys(keys))

    def _lease(self, lease: m.Lease) -> Answer:
        states = self._states(lease.keys)
        if lease.prefix:
            run = len(states) - len(states.lstrip(b"\x01"))
            states = states[: run + 1]
        found = [
            self.chunks[key]
            for key, state in zip(m.unpack_keys(lease.keys), states, strict=False)
            if state == KeyState.RAM
        ]
        if found:
            self.leases.add(lease.ticket)
        slots = m.Slots([place[0] for place in found], [place[1] for place in found], [place[2] for place in found])
        return m.Leased(lease.call, states, slots, [place[3] for place in found], self.version)

    def _take_slot(self) -> tuple[int, int, int]:
        """Any slot that was never given, or was given back."""
        self._generation += 1
        for extent in self.extents.values():
            if extent.free:
                slot = extent.free.pop()
                extent.mark(slot, self._generation, STATE_WRITING)
                return extent.number, slot, self._generation
        raise LookupError("full")

    def _allocate(self, allocate: m.Allocate) -> Answer:
        states = bytearray()
        places: list[tuple[bytes, int, int, int]] = []
        for key in m.unpack_keys(allocate.keys):
            if key in self.chunks:
                states.append(AllocateState.PRESENT)
                continue
            self.writes[allocate.ticket] = places
            try:
                places.append((key, *self._take_slot()))
            except LookupError:
                states.append(AllocateState.NO_ROOM)
            else:
                states.append(AllocateState.NEW)
        slots = m.Slots([p[1] for p in places], [p[2] for p in places], [p[3] for p in places])
        return m.Allocated(allocate.call, bytes(states), slots, self.version)

    def _seal(self, seal: m.Seal) -> Answer:
        places = self.writes.pop(seal.ticket, None)
        for (key, extent, slot, generation), length in zip(places or [], seal.lengths, strict=False):
            self.chunks[key] = extent, slot, generation, length
            self.extents[extent].mark(slot, generation, STATE_SEALED)
        return m.Sealed(seal.call, places is not None)

    def _abort(self, abort: m.Abort) -> Answer:
        for ticket in abort.tickets:
            for _, extent, slot, generation in self.writes.pop(ticket, []):
                if extent in self.extents:
                    self.extents[extent].mark(slot, generation + 1, STATE_FREE)
                    self.extents[extent].free.append(slot)
        return None

    def _extents(self, wanted: m.ExtentsWanted) -> Answer:
        infos = [
            m.ExtentInfo(number, extent.slot_bytes, extent.slot_count, number not in wanted.held)
            for number, extent in self.extents.items()
            if extent.slot_bytes in wanted.slot_bytes
        ]
        return m.ExtentsHeld(wanted.call, self.version, infos, False)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
