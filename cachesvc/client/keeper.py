"""The background thread of a client: connects, reconnects, pings, maps and populates extents, closes.

Covers: what is done when, and how long it may take. Not here: how (`client.channel`, `client.mappings`,
`client.session`). One daemon thread a client; it does everything that may block for reasons that no caller should pay
for, and never holds the channel's lock while it waits in UP.

A turn of the loop::

    UP                      hear what came, ping if silent; ask for extents if the daemon has others than we; say what
                            is unmapped; populate one step
    DOWN, still connected   say what was to be said, ping, wait a little for the answer
    DOWN, no connection     attach (descriptors connection), connect, Hello with the open tickets, wait for Welcome

A daemon that refuses the session is asked again now and then: it may be started anew with other settings. Once another
client has taken our place in the session (*superseded*) a Hello is said only when tickets have ended, and the last time
at the end: the daemon keeps from others whatever it believes to be in use.

Nothing may end this thread: what it doesn't expect is the error that operators see, and it tries again.

Also here: what the child of a fork does with the clients it inherited (nothing, ever).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

from cachesvc.client.channel import State
from cachesvc.client.connection import Connection, connect
from cachesvc.client.session import Session
from cachesvc.errors import ProtocolError
from cachesvc.wire.framing import encode
from cachesvc.wire.messages import ControlReply, Refused, Welcome

TICK_S: Final = 0.25
"""The loop turns at least so often: a client that was dropped is noticed, a dead daemon too."""

SLICE_S: Final = 0.1
"""The longest wait in which a call to close isn't heard."""

CONNECT_S: Final = 1.0
WELCOME_S: Final = 10.0
"""The daemon may hold a Welcome back for 2 s, until there is memory; after a restart it reads its tables first."""

EXTENTS_S: Final = 5.0

BACKOFF_S_MIN: Final = 0.05
BACKOFF_S_MAX: Final = 0.25
"""Asking for a socket that isn't there costs 20 us, and a restart is noticed late by this much."""

REFUSED_BACKOFF_S_MAX: Final = 1.0
"""A daemon that is there and refuses us (limits, another version) is left in peace for longer."""

CLOSE_S: Final = 1.0


class Keeper:
    """Keeps one session connected. `wake` is the event that the session's channel sets."""

    def __init__(self, session: Session, address: Callable[[], str], wake: threading.Event) -> None:
        self.tried = threading.Event()
        """Set when the first attempt to connect has ended, well or not."""
        self.settled = threading.Event()
        """Set while every extent that the daemon has for us is mapped and populated."""
        self._session = session
        self._address = address
        self._wake = wake
        self._backoff_s = BACKOFF_S_MIN
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="cachesvc-keeper", daemon=True)
        _keepers.add(self)
        try:
            self._thread.start()
        except RuntimeError as error:
            # no thread can be had: everything is a miss
            session.channel.error = str(error)
            self.tried.set()

    def request_stop(self) -> None:
        """Close as soon as no ticket is open. Only sets a flag: may be called from a finalizer, in any thread."""
        self._stopping = True

    def stop(self, wait_s: float) -> None:
        """Close as soon as no ticket is open; wait a while for that if none is open now."""
        self.request_stop()
        self._wake.set()
        alive = self._thread.is_alive() and self._thread is not threading.current_thread()
        if alive and self._session.idle():
            self._thread.join(wait_s)

    def disown(self) -> None:
        """In the child of a fork: there is no thread, and nothing is ours."""
        self._session.disown()
        self._wake = threading.Event()
        self.tried, self.settled = threading.Event(), threading.Event()
        self.tried.set()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        delay_s = 0.0
        while not (self._stopping and self._session.idle()):
            if delay_s and self._wake.wait(delay_s):
                self._wake.clear()
            try:
                delay_s = self._turn()
            except Exception as error:
                self._session.channel.error = repr(error)
                self.tried.set()
                delay_s = REFUSED_BACKOFF_S_MAX
        if self._session.superseded and self._session.untold():
            self._connect()
        self._session.channel.close(CLOSE_S)
        self._session.extents.close()

    def _turn(self) -> float:
        """Do what is to be done now; seconds until there may be more."""
        channel = self._session.channel
        if self._session.superseded and not channel.connected() and not self._session.untold():
            return TICK_S
        if channel.state is State.UP:
            channel.tend()
            return self._map() if channel.state is State.UP else 0.0
        if channel.connected():
            channel.revive(SLICE_S)
            return 0.0
        return self._connect()

    def _map(self) -> float:
        channel, extents = self._session.channel, self._session.extents
        try:
            if not extents.attached():
                extents.attach(self._address(), CONNECT_S)
        except (OSError, ProtocolError) as error:
            channel.error = str(error)
            return TICK_S
        if extents.version != channel.extents_version:
            self.settled.clear()
            extents.refresh(time.monotonic() + EXTENTS_S)
        extents.report_gone()
        if extents.populate():
            return 0.0
        if extents.version == channel.extents_version:
            self.settled.set()
        return TICK_S

    # --- connecting -------------------------------------------------------------------------------------------------

    def _connect(self) -> float:
        connection: Connection | None = None
        self.settled.clear()
        path = self._address()
        try:
            token = self._session.extents.attach(path, CONNECT_S)
            connection = Connection(connect(path, CONNECT_S), self._session.channel.hear)
            self._greet(connection, token)
        except (OSError, ProtocolError) as error:
            if connection is not None:
                connection.close()
            refused = isinstance(error, ProtocolError)
            delay_s = min(self._backoff_s, REFUSED_BACKOFF_S_MAX if refused else BACKOFF_S_MAX)
            self._backoff_s = min(2 * self._backoff_s, REFUSED_BACKOFF_S_MAX)
            self._session.channel.error = f"{path}: {getattr(error, 'strerror', None) or error}"
        else:
            self._backoff_s = BACKOFF_S_MIN
            delay_s = 0.0
        self.tried.set()
        return delay_s

    def _greet(self, connection: Connection, token: bytes) -> None:
        session = self._session
        hello = session.hello(token)
        connection.post(encode(hello), [hello.call])
        reply = self._wait(connection)
        if isinstance(reply, Refused):
            if reply.kind == "namespace":
                session.refused(reply.detail)
            elif reply.kind == "session":
                session.turned_away(reply.detail)
            raise ProtocolError(f"the daemon refuses this client: {reply.detail}")
        if not isinstance(reply, Welcome):
            raise ProtocolError(f"{type(reply).__name__} came where Welcome was to come")
        session.welcomed(reply)
        for claim in session.claims_left(reply):
            connection.post(encode(claim), [claim.call])
            session.claimed(claim, self._wait(connection))
        for seal in session.seals_again():
            connection.post(encode(seal), [seal.call])
        session.channel.install(connection)

    def _wait(self, connection: Connection) -> ControlReply:
        """The reply to Hello."""
        deadline = time.monotonic() + WELCOME_S
        while True:
            try:
                return connection.collect(1, min(deadline, time.monotonic() + SLICE_S))[0]
            except TimeoutError:
                if self._stopping or time.monotonic() >= deadline:
                    raise


# --- forks ----------------------------------------------------------------------------------------------------------

_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def _disown_all() -> None:
    for keeper in list(_keepers):
        keeper.disown()


os.register_at_fork(after_in_child=_disown_all)
