"""Extents as this process sees them: the descriptors connection, the mappings of slots.

Covers: proving who we are (Attach), asking for extents, mapping, populating and giving up. Not here: when that is done
(`client.keeper`), which slots somebody may touch (`client.session`).

A mapping lives as long as somebody needs it, by reference counts alone: `Extents.mapped` holds it while the daemon
lists the extent, and every view of a slot holds the memory behind it. When the last of them is gone the memory is
unmapped, and the background thread tells the daemon::

    listed ------> mapped ------> populated          not listed any more, views alive ------> unmapped, `gone`
       descriptors        background                                           last view dies          Unmapped is sent

Pages are populated before they are used if there is time for it: a first touch of a page inside a copy costs four times
the copy. It is done through ctypes, which lets other threads run (`mmap.madvise` doesn't), in steps.

A view handed out must not be used in the child of a fork: nobody knows when the child is dead.
"""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import socket
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cachesvc.arena.layout import STATE_SEALED, STATE_WRITING, decode_header, table_bytes, word, words_view
from cachesvc.errors import FormatError, ProtocolError
from cachesvc.wire.framing import PREFACE_DESCRIPTORS, FrameReader, decode_descriptor_reply, encode, preface
from cachesvc.wire.messages import Attach, Attached, DescriptorReply, ExtentInfo, ExtentsHeld, ExtentsWanted, Unmapped

POPULATE_STEP_BYTES: Final = 64 << 20
"""About 16 ms: what closing a client may have to wait for."""

DESCRIPTORS_PER_MESSAGE_MAX: Final = 253
"""The kernel's limit."""

EXTENT_BYTES_MAX: Final = 1 << 40
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
_DESCRIPTOR_BYTES: Final = array.array("i").itemsize

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapping:
    """One extent, mapped: `data` read-write, the table read-only."""

    __slots__ = ("__weakref__", "_populated", "_table", "_words", "arena", "data", "extent", "slot_bytes")

    def __init__(self, info: ExtentInfo, arena: bytes, data_fd: int, table_fd: int) -> None:
        """OSError if it can't be mapped, FormatError if the table isn't that of this extent of this arena."""
        size = info.slot_bytes * info.slot_count
        if not 0 < size <= EXTENT_BYTES_MAX:
            raise FormatError(f"extent {info.extent} has {info.slot_count} slots of {info.slot_bytes} bytes")
        try:
            memory = mmap.mmap(data_fd, size)
            self._table = mmap.mmap(table_fd, table_bytes(info.slot_count), prot=mmap.PROT_READ)
        except ValueError as error:
            raise FormatError(f"extent {info.extent} can't be mapped: {error}") from error
        header = decode_header(self._table)
        if (header.arena, header.extent, header.slot_bytes, header.slot_count) != (
            arena,
            info.extent,
            info.slot_bytes,
            info.slot_count,
        ):
            raise FormatError(f"the table that came for extent {info.extent} is another's")
        self.arena = arena
        """Uuid of the arena that the extent is of: another one may have an extent of the same number."""
        self.extent = info.extent
        self.slot_bytes = info.slot_bytes
        self.data = memoryview(memory)
        self._words: NDArray[np.uint64] = words_view(self._table, info.slot_count)
        self._populated = 0

    def view(self, slot: int, length: int) -> memoryview | None:
        """The first `length` bytes of a slot, writable; None if there are none. It keeps the memory mapped."""
        if not 0 <= slot < len(self._words) or not 0 <= length <= self.slot_bytes:
            return None
        start = slot * self.slot_bytes
        return self.data[start : start + length]

    def sealed(self, slot: int, generation: int) -> bool:
        """Does the slot still hold what it held at `generation`?"""
        return bool(self._words.item(slot) == word(generation, STATE_SEALED))

    def writing(self, slot: int, generation: int) -> bool:
        """Is the slot given out for writing at `generation`, as far as its table says?"""
        return bool(self._words.item(slot) == word(generation, STATE_WRITING))

    def populate(self, counts: Counter[str]) -> bool:
        """Map the pages of the next step; is there more to do? What the kernel refuses is counted and left alone."""
        left = len(self.data) - self._populated
        if not left:
            return False
        step = min(POPULATE_STEP_BYTES, left)
        if not self._populated:
            table = np.frombuffer(self._table, np.uint8)
            _libc.madvise(table.ctypes.data, len(table), _MADV_POPULATE_READ)
        memory = np.frombuffer(self.data, np.uint8)
        if _libc.madvise(memory.ctypes.data + self._populated, step, _MADV_POPULATE_WRITE):
            counts["populate_" + errno.errorcode.get(ctypes.get_errno(), "failed")] += 1
            step = left  # EINVAL: a kernel before 5.14; pages are mapped when they are touched
        self._populated += step
        return self._populated < len(self.data)


class Extents:
    """All mappings of one client, and its descriptors connection.

    `mapped` is read by any thread and changed by whoever holds the lock; the rest belongs to the holder of the lock.
    """

    def __init__(self, slot_bytes: Iterable[int]) -> None:
        self.mapped: dict[int, Mapping] = {}
        self.version = -1
        """`extents_version` that `mapped` stands for; -1 = none."""
        self.counts: Counter[str] = Counter()
        """Things that went wrong without harm, by name."""
        self._slot_bytes = sorted(set(slot_bytes))
        self._arena = b""
        self._lock = threading.Lock()  # one question and its answer on the socket; changes of `mapped`
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._call = 0
        self._gone: deque[tuple[bytes, int]] = deque()

    # --- the descriptors connection ---------------------------------------------------------------------------------

    def attach(self, path: str, timeout_s: float) -> bytes:
        """Connect, prove who we are; the token for Hello. OSError, ProtocolError: it didn't work."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._disconnect()
            pidfd = _own_pidfd()
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket, self._reader = sock, FrameReader()
                sock.settimeout(timeout_s)
                sock.connect(path)
                sock.sendall(preface(PREFACE_DESCRIPTORS))
                self._call += 1
                reply, _ = self._ask(Attach(self._call), deadline, pidfd)
            except BaseException:
                self._disconnect()
                raise
            finally:
                for fd in pidfd:
                    os.close(fd)
            if not isinstance(reply, Attached):
                self._disconnect()
                raise ProtocolError("no token came on the descriptors connection")
            return reply.token

    def attached(self) -> bool:
        """Is there a descriptors connection?"""
        return self._socket is not None

    def refresh(self, deadline: float) -> bool:
        """Ask which extents there are, map what is new, give up what is not listed; did that work before `deadline`?

        After a failure the connection is gone: `attach` again.
        """
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            more = self._socket is not None
            if not more:
                return False
            while more:
                self._call += 1
                wanted = ExtentsWanted(self._call, self._slot_bytes, list(self.mapped))
                reply, descriptors = self._ask(wanted, deadline, ())
                try:
                    more = self._take(reply, descriptors)
                finally:
                    for fd in descriptors:
                        os.close(fd)
        except (OSError, ProtocolError):
            self.counts["descriptors_connection_lost"] += 1
            self._disconnect()
            return False
        finally:
            self._lock.release()
        return True

    def ensure(self, extents: Iterable[int], deadline: float) -> bool:
        """Are these extents mapped, now or after asking for them?"""
        missing = set(extents) - self.mapped.keys()
        return not missing or (self.refresh(deadline) and missing <= self.mapped.keys())

    def report_gone(self) -> None:
        """Tell the daemon what isn't mapped any more."""
        if not self._gone:
            return
        with self._lock:
            if self._socket is None:
                return
            gone = [self._gone.popleft() for _ in range(len(self._gone))]
            extents = [extent for arena, extent in gone if arena == self._arena]
            try:
                if extents:
                    self._socket.settimeout(1.0)
                    self._socket.sendall(encode(Unmapped(extents)))
            except OSError:
                self._gone.extend(gone)
                self._disconnect()

    def _ask(
        self, message: Attach | ExtentsWanted, deadline: float, pass_on: Sequence[int]
    ) -> tuple[DescriptorReply, list[int]]:
        """The answer, and the descriptors that came with it: the caller closes them."""
        sock = self._socket
        if sock is None:
            raise ConnectionResetError("no descriptors connection")
        frame = encode(message)
        sent = socket.send_fds(sock, [frame], list(pass_on))
        if sent < len(frame):
            sock.sendall(frame[sent:])
        space = socket.CMSG_SPACE(DESCRIPTORS_PER_MESSAGE_MAX * _DESCRIPTOR_BYTES)
        descriptors: list[int] = []
        try:
            while True:
                sock.settimeout(max(1e-3, deadline - time.monotonic()))
                n, ancillary, flags, _ = sock.recvmsg_into([self._reader.buffer()], space, socket.MSG_CMSG_CLOEXEC)
                descriptors += _passed(ancillary)
                if not n:
                    raise ConnectionResetError("the daemon closed the descriptors connection")
                if flags & socket.MSG_CTRUNC:
                    raise ProtocolError("descriptors were lost on the way: too many files are open in this process")
                for payload in self._reader.advance(n):
                    reply = decode_descriptor_reply(payload)
                    if reply.call != message.call or self._reader.pending:
                        raise ProtocolError(f"the daemon answered {reply!r}")
                    return reply, descriptors
        except BaseException:
            for fd in descriptors:
                os.close(fd)
            raise

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- mappings ---------------------------------------------------------------------------------------------------

    def enter(self, arena: bytes) -> bool:
        """The daemon says which arena it has; is it another one than before? Then nothing mapped is of any use."""
        with self._lock:
            other = self._arena not in (b"", arena)
            if other:
                self.mapped = {}
            self._arena = arena
            self.version = -1
            return other

    def populate(self) -> bool:
        """One step of mapping pages, of any extent; was there something to do?"""
        return any(mapping.populate(self.counts) for mapping in list(self.mapped.values()))

    def close(self) -> None:
        """Give up everything, and say so: else the daemon would count it as ours until this process ends. Views that
        are alive keep their memory, of which the daemon never hears."""
        with self._lock:
            self.mapped = {}
            self.version = -1
        self.report_gone()
        with self._lock:
            self._disconnect()

    def disown(self) -> None:
        """In the child of a fork: the connection is the parent's; our copy of the descriptor goes."""
        self._lock = threading.Lock()
        self._disconnect()

    def _take(self, reply: DescriptorReply, descriptors: list[int]) -> bool:
        """Make `mapped` what the reply lists, as far as descriptors came; is there more to ask for?"""
        if not isinstance(reply, ExtentsHeld):
            raise ProtocolError(f"the daemon answered {reply!r}")
        fresh = [info for info in reply.extents if info.attached]
        if 2 * len(fresh) != len(descriptors) or (reply.more and not fresh):
            raise ProtocolError(f"{len(fresh)} extents came with {len(descriptors)} descriptors")
        listed = {info.extent for info in reply.extents}
        mapped = {extent: mapping for extent, mapping in self.mapped.items() if extent in listed}
        failed = False
        for info, data_fd, table_fd in zip(fresh, descriptors[::2], descriptors[1::2], strict=True):
            try:
                mapping = Mapping(info, self._arena, data_fd, table_fd)
            except (OSError, FormatError) as error:
                self.counts["unmappable"] += 1
                failed = failed or isinstance(error, OSError)
                continue
            mapped[info.extent] = mapping
            # in whichever thread the last view dies: nothing but an append may happen there
            weakref.finalize(mapping.data.obj, self._gone.append, (self._arena, info.extent)).atexit = False
        self.mapped = mapped
        if failed:
            return False  # asked for again, as the version stays
        if not reply.more:
            self.version = reply.extents_version
        return reply.more


def _own_pidfd() -> list[int]:
    """OSError: there is none now (too many files are open); without it the daemon would go by time for ever."""
    try:
        return [os.pidfd_open(os.getpid())]
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        return []  # a kernel before 5.3, or a sandbox that forbids it: the daemon goes by time


def _passed(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what `recvmsg` returned beside the bytes."""
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % _DESCRIPTOR_BYTES])
    return list(fds)
