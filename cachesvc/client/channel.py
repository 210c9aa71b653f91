"""The way to the daemon: whose turn it is on the one control connection, and what is known of the daemon's health.

Covers: calls with deadlines, one-way messages, going down and coming back up. Not here: bytes on the socket
(`client.connection`), what calls mean (`client.session`), when the background thread does what (`client.keeper`).

States; every arrow is drawn by a thread that holds the lock::

             install (background: a new connection said Welcome)
             revive  (background: the old connection answered a ping)
      DOWN -------------------------------------------------------------> UP
        ^                                                                 |
        +-----------------------------------------------------------------+
        |     a deadline was missed: the connection is kept, its late replies are stale
        |     the connection broke, or brought garbage: it is closed
        |
        +--> CLOSED   close (background), or this is the child of a fork. Nothing leads out.

Who may touch the socket: the holder of the lock. In UP that is any thread with a call, for as long as the call lasts,
and the background thread for moments in which it doesn't wait. In DOWN only the background thread: everybody else sees
the state, which is read without the lock, and answers locally. So a dead or hanging daemon costs one deadline, not one
a call. Waiting for the lock counts against the deadline; missing it there says nothing of the daemon and changes no
state. (Threads with deadlines of different length: the short ones may pay theirs until the longest has passed.)

A call whose outcome is unknown (deadline missed, connection lost) is undone: its ticket was chosen here, so a one-way
message can end it, whether or not the daemon ever saw the call. One-way messages wait in `Later` while nobody can send
them; who gives up the lock sends what has come in meanwhile.
"""

from __future__ import annotations

import enum
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias, TypeVar

from cachesvc.client.connection import SPIN_REQUEST_BYTES_MAX, Connection
from cachesvc.errors import ProtocolError
from cachesvc.types import KeyState
from cachesvc.wire.framing import encode
from cachesvc.wire.messages import (
    Abort,
    Allocate,
    ControlReply,
    Done,
    EndRequests,
    Hello,
    Lease,
    Lookup,
    Ping,
    Release,
    Seal,
)

TICKETS_LATER_MAX: Final = 16384
REQUESTS_LATER_MAX: Final = 4096
"""As many as the daemon remembers of a session; the oldest are dropped: they only lose their protection."""

PING_AFTER_S: Final = 1.0
"""A connection that said nothing for so long is asked whether it lives."""

PONG_S: Final = 1.0
"""A ping that isn't answered for so long counts as a missed deadline."""

REVIVE_S: Final = 10.0
"""A connection that is DOWN for so long is given up for a new one: it may have broken in the middle of a frame."""

Call: TypeAlias = Hello | Lookup | Lease | Allocate | Seal | Ping
OneWay: TypeAlias = Release | Abort | Done | EndRequests
T = TypeVar("T")


class State(enum.Enum):
    """See the module's drawing."""

    UP = "up"
    DOWN = "down"
    CLOSED = "closed"


class Later:
    """One-way messages that nobody could send yet, as numbers. Any thread adds; the holder of the lock takes."""

    def __init__(self) -> None:
        self._tickets: deque[tuple[type[OneWay], int]] = deque(maxlen=TICKETS_LATER_MAX)
        self._requests: deque[tuple[type[OneWay], int]] = deque(maxlen=REQUESTS_LATER_MAX)

    def add(self, kind: type[OneWay], numbers: Iterable[int]) -> None:
        """Tickets to release, abort or be done with, or requests to end."""
        queue = self._requests if kind is EndRequests else self._tickets
        queue.extend((kind, number) for number in numbers)

    def __bool__(self) -> bool:
        return bool(self._tickets or self._requests)

    def take(self) -> bytes:
        """Everything added so far, as frames: one message of each kind."""
        numbers: dict[type[OneWay], list[int]] = {}
        for queue in (self._tickets, self._requests):
            for _ in range(len(queue)):
                kind, number = queue.popleft()
                numbers.setdefault(kind, []).append(number)
        return b"".join(encode(kind(some)) for kind, some in numbers.items())


class Channel:
    """One client's way to the daemon. `wake` is called when the background thread has something to do; it may be called
    by any thread, with the lock held."""

    def __init__(self, wake: Callable[[], None], heard: Callable[[ControlReply], None] = lambda _: None) -> None:
        self.state = State.DOWN
        self.error = "not connected yet"
        """Why it is down, for operators; "" when it is up."""
        self.extents_version = -1
        """The last one heard; -1 = none yet."""
        self._wake = wake
        self._heard = heard
        self._lock = threading.Lock()  # held by whoever uses the socket; see the module's drawing
        self._connection: Connection | None = None
        self._later = Later()
        self._along = Later()
        """Goes with the next call, or when the background thread looks: not worth a message of its own."""
        self._numbers = itertools.count(1)
        self._heard_at = 0.0
        self._ping: tuple[int, float] | None = None

    def number(self) -> int:
        """A number for the next call."""
        return next(self._numbers)

    # --- any thread -------------------------------------------------------------------------------------------------

    def call(
        self,
        requests: Sequence[Call],
        accept: Callable[[list[ControlReply]], T],
        deadline: float,
        undo: tuple[type[OneWay], Sequence[int]] | None = None,
    ) -> T | KeyState:
        """Send `requests` (numbered by `number()`) at once, wait for all replies, return what `accept` makes of them.

        `accept` runs while the channel is held: what it notes happens before anything the background thread does. It
        raises ProtocolError for a reply that can't be. The other outcomes are DAEMON_DOWN and DEADLINE (`deadline` in
        seconds, monotonic): then the daemon may have acted or not, and `undo` is sent sooner or later.
        """
        if self.state is not State.UP:
            return KeyState.DAEMON_DOWN
        frames = b"".join([encode(request) for request in requests])
        if not self._lock.acquire(blocking=False) and not self._lock.acquire(timeout=_left_s(deadline)):
            return KeyState.DEADLINE
        outcome: T | KeyState = KeyState.DAEMON_DOWN
        sent = answered = False
        try:
            connection = self._connection
            if self.state is State.UP and connection is not None:
                sent = True
                if self._along:
                    frames = self._along.take() + frames
                connection.post(frames, [request.call for request in requests])
                spin = len(frames) <= SPIN_REQUEST_BYTES_MAX
                outcome = accept(connection.collect(len(requests), deadline, spin=spin))
                answered = True
        except TimeoutError:
            self._fall("the daemon missed a deadline")
            outcome = KeyState.DEADLINE
        except (OSError, ProtocolError) as error:
            self._drop(str(error))
        finally:
            if sent and not answered and undo is not None:
                self._later.add(*undo)
            self._give_up_lock()
        return outcome

    def post(self, request: Call, deadline: float) -> bool:
        """Send a request and don't wait: its reply passes `heard` with a later one.

        True: the daemon finds it before anything that is said to it from now on, if it lives. False: it wasn't sent.
        """
        if self.state is not State.UP:
            return False
        if not self._lock.acquire(blocking=False) and not self._lock.acquire(timeout=_left_s(deadline)):
            return False
        try:
            connection = self._connection
            if self.state is not State.UP or connection is None:
                return False
            connection.post(self._along.take() + encode(request), [request.call])
        except OSError as error:
            self._drop(str(error))
        finally:
            self._give_up_lock()
        return True

    def tell(self, kind: type[OneWay], numbers: Sequence[int]) -> None:
        """Send a one-way message now if that is possible without waiting, else as soon as somebody can."""
        if not self._lock.acquire(blocking=False):
            self._later.add(kind, numbers)
            if not self._lock.acquire(blocking=False):
                return  # its holder looks once more after giving it up
            numbers = ()
        try:
            connection = self._connection
            ready = self.state is State.UP and connection is not None and not connection.clogged
            if not numbers or not ready or self._later:
                self._later.add(kind, numbers)
            elif connection is not None:
                connection.post(encode(kind(list(numbers))))
        except OSError as error:
            self._drop(str(error))
        finally:
            self._give_up_lock()

    def tell_along(self, kind: type[OneWay], numbers: Sequence[int]) -> None:
        """Send a one-way message together with the next call, or within a quarter of a second.

        By itself it would cost its sender as much as half a call: the daemon's core has to be woken for it.
        """
        self._along.add(kind, numbers)

    # --- the background thread --------------------------------------------------------------------------------------

    def connected(self) -> bool:
        """Is there a connection, be it UP or waiting for a sign of life?"""
        return self._connection is not None

    def install(self, connection: Connection) -> None:
        """A new connection said Welcome: UP."""
        with self._lock:
            if self.state is State.CLOSED:
                connection.close()
                return
            self._connection = connection
            self._rise()
        self.tell(Release, ())  # says nothing itself: who gives up the lock sends what has waited

    def revive(self, wait_s: float) -> None:
        """In DOWN: tell the old connection what was to be told, ping it, wait a while for the answer: UP if it came.

        Not for longer than `REVIVE_S` in all: then the connection is closed.
        """
        with self._lock:
            connection = self._connection
            if connection is None or self.state is not State.DOWN:
                return
            try:
                number, since = self._ping or self._send_ping(connection)
                if not connection.awaits(number, wait_s):
                    self._rise()
                elif time.monotonic() >= since + REVIVE_S:
                    self._drop(f"the daemon said nothing for {REVIVE_S} s")
            except (OSError, ProtocolError) as error:
                self._drop(str(error))
        self.tell(Release, ())  # as in `install`

    def tend(self) -> None:
        """In UP: hear what came, ping a connection that is silent, fall if it stays so. Never waits."""
        if not self._lock.acquire(blocking=False):
            return  # somebody has a call: that tells as much
        try:
            connection = self._connection
            if connection is None or self.state is not State.UP:
                return
            connection.flush()
            connection.drain()
            if self._along and not connection.clogged:
                connection.post(self._along.take())
            now = time.monotonic()
            if self._ping is not None and self._ping[0] not in connection.pending:
                self._ping = None
            if self._ping is not None and now >= self._ping[1] + PONG_S:
                self._fall("the daemon missed a ping")
            elif self._ping is None and now >= self._heard_at + PING_AFTER_S:
                self._send_ping(connection)
        except (OSError, ProtocolError) as error:
            self._drop(str(error))
        finally:
            self._give_up_lock()

    def close(self, wait_s: float) -> None:
        """Send what is left, close the connection. Waits for the holder of the lock at most `wait_s`."""
        if not self._lock.acquire(timeout=wait_s):
            self.state = State.CLOSED  # the holder closes the connection when it gives up the lock
            return
        try:
            if self._connection is not None and not self._connection.clogged:
                self._connection.post(self._along.take() + self._later.take())
        except OSError as error:
            self._drop(str(error))
        finally:
            self.state = State.CLOSED
            self._give_up_lock()

    def disown(self) -> None:
        """In the child of a fork: the connection is the parent's. Our copies go; nothing is sent."""
        self.state = State.CLOSED
        self.error = "this process is the child of a fork: make a new client"
        self._lock = threading.Lock()
        self._wake = _nobody
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- with the lock held -----------------------------------------------------------------------------------------

    def hear(self, reply: ControlReply) -> None:
        """Every reply of every connection passes here, Welcome too, when nobody else uses the connection yet."""
        self._heard_at = time.monotonic()
        self._heard(reply)
        version = getattr(reply, "extents_version", None)
        if version is not None and version != self.extents_version:
            self.extents_version = version
            self._wake()

    def _send_ping(self, connection: Connection) -> tuple[int, float]:
        number = self.number()
        connection.post(self._later.take() + encode(Ping(number)), [number])
        self._ping = number, time.monotonic()
        return self._ping

    def _flush_later(self) -> None:
        if self._later and self._connection is not None and self.state is State.UP and not self._connection.clogged:
            try:
                self._connection.post(self._later.take())
            except OSError as error:
                self._drop(str(error))

    def _rise(self) -> None:
        self._ping = None
        self.error = ""
        self.state = State.UP

    def _fall(self, reason: str) -> None:
        if self.state is State.UP:
            self.state = State.DOWN
        self.error = reason
        self._ping = None
        self._wake()

    def _drop(self, reason: str) -> None:
        self._fall(reason)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _give_up_lock(self) -> None:
        """Whoever adds to `Later` and doesn't get the lock relies on this: look again after giving it up."""
        while True:
            if self.state is State.CLOSED:
                self._drop("closed")
            self._flush_later()
            self._lock.release()
            if not self._later or self.state is not State.UP or not self._lock.acquire(blocking=False):
                return
            if self._connection is None or self._connection.clogged:
                self._lock.release()
                return


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _nobody() -> None:
    """Wakes nobody: there is no background thread in the child of a fork."""
