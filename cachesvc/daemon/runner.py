"""Carries messages to the core and the core's effects out. The only caller of `Node.handle`, the only writer of state.

Covers: one request from payload to reply, effects in list order, the clock's ticks, reports for operators. Not here:
sockets (`daemon.server`, `daemon.descriptors`), the dictionary between wire and core (`daemon.translate`), the threads
of I/O (`daemon.jobs`).

Who runs where, and what crosses a thread::

    clients == sockets ==> LOOP THREAD, owns everything but files ------------------------------------------------+
                           server: connections, frames                                                            |
                             |  payload                                                                           |
                           Runner.request -- translate --> event                                                  |
                             |                                                                                    |
                           Node.handle(event, now) --> effects, carried out in list order:                        |
                             |-- Mark...  --> arena tables, at once: in shared memory before the reply is sent    |
                             |-- replies  --> the connection                                                      |
                             +-- the rest --> Jobs ------> MEMORY THREAD  makes spares                            |
                                                   \\-----> FILES THREAD   formats, drops -- outcome event --------+
                                                                                      (call_soon_threadsafe)
    operators == HTTP ==> ADMIN THREAD -- daemon.view: asks on the loop, waits a limited time

Time is CLOCK_MONOTONIC, the same for every process since boot: last uses in the tables outlive the daemon.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from cachesvc.arena.host import HostArena
from cachesvc.core import events as ev
from cachesvc.core.node import Node
from cachesvc.daemon import namespaces
from cachesvc.daemon.jobs import Jobs
from cachesvc.daemon.processes import Processes
from cachesvc.daemon.translate import EVENTS, Reply, hello_event, reply_of
from cachesvc.errors import ProtocolError
from cachesvc.metrics import Latency
from cachesvc.wire import messages as wire
from cachesvc.wire.framing import FRAME_BYTES_MAX, decode_control_request, encode

LOG = logging.getLogger(__name__)

TICK_S: Final = 0.25
CHECK_S: Final = 1.0
"""How often the data files are checked for truncation."""

REPORT_BYTES_MAX: Final = FRAME_BYTES_MAX - 64
"""A report is one frame; the rest is the message around it."""


class Connection(Protocol):
    """What the runner needs of a control connection (`daemon.server.ControlConnection`)."""

    number: int
    tenant: str | None
    """None = the admin socket: questions about every tenant, nothing else."""

    def send(self, frame: bytes) -> None:
        """Send a frame, never wait; a peer that doesn't read is cut off."""

    def finish(self) -> None:
        """Send what is left, then close."""


class Runner:
    """One for each daemon; every method runs on the loop. `counts` are problems by name, for operators."""

    def __init__(self, node: Node, arena: HostArena, state_dir: Path) -> None:
        self.node = node
        self.arena = arena
        self.processes = Processes(asyncio.get_running_loop(), lambda number: self.dispatch(ev.ProcessDied(number)))
        self.ready = False
        """Sockets are open and the arena is restored (set by `daemon.app`)."""
        self.latency: dict[type[Any], Latency] = {}
        self.counts: Counter[str] = Counter()
        self._register = namespaces.Register(state_dir)
        self._jobs = Jobs(arena, self.dispatch, lambda: self.count("io_failed"))
        self._connections: dict[int, Connection] = {}
        self._last_connection = 0
        self._damaged: set[int] = set()
        self._started = time.monotonic()
        self._carriers = self._make_carriers()

    # --- the core's door --------------------------------------------------------------------------------------------

    def dispatch(self, event: ev.Event) -> None:
        """Let an event happen and carry out what follows from it."""
        for effect in self.node.handle(event, time.monotonic()):
            self._carriers[type(effect)](effect)

    def _make_carriers(self) -> dict[type[Any], Callable[[Any], None]]:
        """Effect type -> what carries it out."""
        arena = self.arena
        carriers: dict[type[Any], Callable[[Any], None]] = {
            ev.MarkWriting: lambda mark: arena.mark_writing(mark.extent, mark.slots, mark.generations),
            ev.MarkSealed: lambda mark: arena.mark_sealed(
                mark.extent, mark.slots, mark.generations, mark.namespace, mark.group, mark.keys, mark.lengths
            ),
            ev.MarkFree: lambda mark: arena.mark_free(mark.extent, mark.slots, mark.generations),
            ev.SaveLastUse: lambda mark: arena.save_last_use(mark.extent, mark.last_use),
            ev.SaveNamespaces: self._save_namespaces,
        }
        carriers |= dict.fromkeys((ev.MakeSpare, ev.FormatExtent, ev.DropExtent), self._jobs.start)
        replies = (ev.Welcome, ev.Claimed, ev.Looked, ev.Leased, ev.Allocated, ev.Sealed, ev.Refused)
        return carriers | dict.fromkeys(replies, self._reply)

    def _reply(self, effect: Reply) -> None:
        connection = self._connections.get(effect.connection)
        if connection is None or connection.tenant is None:
            return
        version = self.node.extents_version(connection.tenant)
        connection.send(encode(reply_of(effect, self.arena.uuid, version)))
        if isinstance(effect, ev.Refused) and effect.kind == "protocol":
            self.count("protocol")
            LOG.warning("connection %d of %s closed: %s", connection.number, connection.tenant, effect.detail)
            connection.finish()

    def _save_namespaces(self, effect: ev.SaveNamespaces) -> None:
        """On the loop, before anything can be stored: a chunk whose namespace nobody remembers would be lost."""
        try:
            self._register.keep(effect.records)
        except OSError as error:
            LOG.warning("namespaces can't be saved, a restart will forget new ones: %s", error)
            self.count("io_failed")

    # --- connections ------------------------------------------------------------------------------------------------

    def join(self, connection: Connection) -> int:
        """A control connection was opened; its number."""
        self._last_connection += 1
        self._connections[self._last_connection] = connection
        return self._last_connection

    def leave(self, connection: Connection) -> None:
        """It is gone."""
        del self._connections[connection.number]
        self.dispatch(ev.ConnectionLost(connection.number))

    def joined(self, connection: Connection) -> bool:
        """Has it said Hello, and was that not refused?"""
        return connection.number in self.node.sessions.by_connection

    def request(self, connection: Connection, payload: memoryview, *, again: bool = False) -> bool:
        """One message of a client. ProtocolError if it breaks the rules of the wire.

        False: ask `again` when the loop has read whatever lies in other sockets by now. A client that was told of a
        chunk may ask for it before we have read its seal: who seals doesn't wait for us.
        """
        started = time.perf_counter()
        message = decode_control_request(payload)
        kind = type(message)
        make_event = EVENTS.get(kind)
        if connection.tenant is None and kind is not wire.Ask and kind is not wire.Ping:
            raise ProtocolError("the admin socket answers questions only: use the socket of a tenant")
        if make_event is not None:
            event = make_event(message, connection.number)
            if not again and isinstance(event, ev.Lookup | ev.Lease) and self.node.being_written(event):
                return False
            self.dispatch(event)
        elif isinstance(message, wire.Hello):
            self._hello(message, connection)
        elif isinstance(message, wire.Ping):
            version = 0 if connection.tenant is None else self.node.extents_version(connection.tenant)
            connection.send(encode(wire.Pong(message.call, version)))
        elif isinstance(message, wire.Ask):
            connection.send(self._answer(message, connection.tenant))
        latency = self.latency.get(kind)
        if latency is None:
            latency = self.latency[kind] = Latency()
        latency.observe(time.perf_counter() - started)
        return True

    def _hello(self, message: wire.Hello, connection: Connection) -> None:
        if connection.tenant is not None:
            process = self.processes.number(message.token)
            self.dispatch(hello_event(message, connection.number, connection.tenant, process, self.arena.uuid))

    def _answer(self, question: wire.Ask, tenant: str | None) -> bytes:
        least = self._least_bytes(question.what, tenant)
        body = b"" if least > REPORT_BYTES_MAX else msgspec.json.encode(self.report(question.what, tenant))
        if max(least, len(body)) > REPORT_BYTES_MAX:
            detail = f"the answer has {max(least, len(body))} bytes or more, a frame holds less: ask over HTTP"
            return encode(wire.Refused(question.call, "limit", detail))
        return encode(wire.Report(question.call, body))

    def _least_bytes(self, what: str, tenant: str | None) -> int:
        """What an answer is not shorter than: it isn't worth encoding if that is too much."""
        if what != "namespaces":
            return 0
        return sum(
            sum(len(name) + len(value) for name, value in record.components.items())
            for record in self.node.namespaces(tenant)
        )

    # --- time -------------------------------------------------------------------------------------------------------

    async def ticks(self) -> None:
        """Tell the core that time passes, and watch the files; until cancelled."""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            self.dispatch(ev.Tick())
            if time.monotonic() - checked >= CHECK_S:
                checked = time.monotonic()
                self._check_extents()

    def _check_extents(self) -> None:
        for extent, fault in self.arena.check().items():
            if extent not in self._damaged:
                self._damaged.add(extent)
                self.count("damaged")
                LOG.error("extent %d was damaged by a client and is dropped: %s", extent, fault)
            # every time while it is there: the core may have heard of it before it knew the extent
            self.dispatch(ev.ExtentDamaged(extent, fault))

    def close(self) -> None:
        """Stop: no connection is open any more."""
        self.processes.close()
        self._jobs.close()

    # --- reports ----------------------------------------------------------------------------------------------------

    def count(self, problem: str) -> None:
        """One more of a kind of problem."""
        self.counts[problem] += 1

    def report(self, what: str, tenant: str | None) -> dict[str, Any]:
        """Plain values that answer an operator's question; ProtocolError if it is none that is known."""
        if what == "status":
            return self.status(tenant)
        if what == "namespaces":
            return {"namespaces": [namespaces.plain(record) for record in self.node.namespaces(tenant)]}
        raise ProtocolError(f"nothing is known of {what[:40]!r}: ask for status or namespaces")

    def status(self, tenant: str | None) -> dict[str, Any]:
        """The node's snapshot, and for the admin socket what the daemon itself counts."""
        now = time.monotonic()
        body = self.node.snapshot(tenant, now)
        if tenant is None:
            body["daemon"] = {
                "wire_version": wire.WIRE_VERSION,
                "arena": self.arena.uuid.hex(),
                "uptime_s": round(now - self._started, 3),
                "connections": len(self._connections),
                "processes": len(self.processes),
                "problems": dict(sorted(self.counts.items())),
            }
        return body

    def figures(self) -> dict[str, Any]:
        """Everything that `/metrics` shows (`cachesvc.metrics.collector`)."""
        calls = {kind.__name__.lower(): latency.plain() for kind, latency in self.latency.items()}
        return {"status": self.status(None), "calls": calls}
