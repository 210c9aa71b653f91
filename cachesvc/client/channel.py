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

An exception may hit a caller anywhere: its signal handler raised. Inside a call it costs the connection, as nobody
knows what was sent and read. Between taking the lock and `try`, or while giving it up, it would leave the lock held for
ever: so a lock that stays taken long after its holder's deadline is *abandoned* by the background thread, with the
connection, and both are replaced. A holder that was alive after all (a handler that took minutes) finds another lock in
its place: it touches nothing, and what its call brought counts as never answered.
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
    Claim,
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

ABANDONED_S: Final = 2.0
"""A lock that is taken for so long after its holder's deadline, seen again and again, will never be given up."""

WATCH_S: Final = 0.2
"""Time between two such looks. They are counted, as time alone passes while the whole process is stopped."""

REVIVE_S: Final = 10.0
"""A connection that is DOWN for so long is given up for a new one: it may have broken in the middle of a frame."""

Call: TypeAlias = Hello | Claim | Lookup | Lease | Allocate | Seal | Ping
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
        self._held_until = 0.0
        """Deadline of the last holder of the lock that may have to wait (seconds, monotonic)."""
        self._turns = 0
        """How often the lock was given up."""
        self._watched = 0, 0, 0.0
        """The turn in which the background thread last found the lock taken, how often in a row, and when."""

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
        *,
        blame: bool = True,
    ) -> T | KeyState:
        """Send `requests` (numbered by `number()`) at once, wait for all replies, return what `accept` makes of them.

        `accept` runs while the channel is held: what it notes happens before anything the background thread does. It
        raises ProtocolError for a reply that can't be. The other outcomes are DAEMON_DOWN and DEADLINE (`deadline` in
        seconds, monotonic): then the daemon may have acted or not, and `undo` is sent sooner or later.
        A deadline missed says nothing of the daemon without `blame`: it had little time, for reasons of our own.
        """
        if self.state is not State.UP:
            return KeyState.DAEMON_DOWN
        frames = b"".join([encode(request) for request in requests])
        lock = self._lock
        if not lock.acquire(blocking=False) and not lock.acquire(timeout=_left_s(deadline)):
            return KeyState.DEADLINE
        outcome: T | KeyState = KeyState.DAEMON_DOWN
        sent = whole = answered = False
        connection = None
        try:
            self._held_until = deadline
            connection = self._connection
            if self._lock is lock and self.state is State.UP and connection is not None:
                sent = True
                if self._along:
                    frames = self._along.take() + frames
                connection.post(frames, [request.call for request in requests])
                spin = len(frames) <= SPIN_REQUEST_BYTES_MAX
                replies = connection.collect(len(requests), deadline, spin=spin)
                whole = True
                got = accept(replies)
                # if the lock was abandoned meanwhile, a Hello may have said that we have nothing of this
                answered = self._lock is lock
                outcome = got if answered else KeyState.DEADLINE
        except TimeoutError:
            if blame and self._connection is connection:
                self._fall("the daemon missed a deadline")
            outcome = KeyState.DEADLINE
        except (OSError, ProtocolError) as error:
            self._drop(str(error), connection)
        except BaseException:
            if not whole:
                self._drop("a call was interrupted", connection)
            raise
        finally:
            if sent and not answered and undo is not None:
                self._later.add(*undo)
            self._give_up_lock(lock)
        return outcome

    def post(self, requests: Sequence[Call], deadline: float) -> bool:
        """Send requests and don't wait: their replies pass `heard` with later ones, or with `listen`.

        True: the daemon finds them before anything that is said to it from now on, if it lives. False: nothing sent.
        """
        if self.state is not State.UP:
            return False
        lock = self._lock
        if not lock.acquire(blocking=False) and not lock.acquire(timeout=_left_s(deadline)):
            return False
        connection = None
        try:
            connection = self._connection
            if self._lock is not lock or self.state is not State.UP or connection is None:
                return False
            frames = b"".join([encode(request) for request in requests])
            connection.post(self._along.take() + frames, [request.call for request in requests])
        except OSError as error:
            self._drop(str(error), connection)
        except BaseException:
            self._drop("a call was interrupted", connection)
            raise
        finally:
            self._give_up_lock(lock)
        return True

    def listen(self) -> None:
        """Hear what has come, without waiting for anything."""
        lock = self._lock
        if self.state is not State.UP or not lock.acquire(blocking=False):
            return
        connection = None
        try:
            connection = self._connection
            if self._lock is lock and self.state is State.UP and connection is not None:
                connection.flush()
                connection.drain()
        except (OSError, ProtocolError) as error:
            self._drop(str(error), connection)
        except BaseException:
            self._drop("a call was interrupted", connection)
            raise
        finally:
            self._give_up_lock(lock)

    def missed(self) -> None:
        """The reply to something posted didn't come in time: as bad as a call without one."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            return  # whoever waits for a reply now finds out
        try:
            if self.state is State.UP:
                self._fall("the daemon missed a deadline")
        finally:
            self._give_up_lock(lock)

    def tell(self, kind: type[OneWay], numbers: Sequence[int]) -> None:
        """Send a one-way message now if that is possible without waiting, else as soon as somebody can."""
        lock = self._lock
        if not lock.acquire(blocking=False):
            self._later.add(kind, numbers)
            if not lock.acquire(blocking=False):
                return  # its holder looks once more after giving it up
            numbers = ()
        connection = None
        try:
            connection = self._connection if self._lock is lock else None
            ready = self.state is State.UP and connection is not None and not connection.clogged
            if not numbers or not ready or self._later:
                self._later.add(kind, numbers)
            elif connection is not None:
                connection.post(encode(kind(list(numbers))))
        except OSError as error:
            self._drop(str(error), connection)
        except BaseException:
            self._later.add(kind, numbers)  # twice does no harm
            self._drop("a call was interrupted", connection)
            raise
        finally:
            self._give_up_lock(lock)

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
        with self._taken():
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
        with self._taken():
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
        lock = self._lock
        if not lock.acquire(blocking=False):
            self._watch()
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
            self._give_up_lock(lock)

    def _watch(self) -> None:
        """Somebody has the lock. Abandon it if that can't be."""
        now, (turn, looks, looked_at) = time.monotonic(), self._watched
        if turn != self._turns:
            self._watched = self._turns, 0, now
        elif now >= looked_at + WATCH_S:
            self._watched = turn, looks + 1, now
            if (looks + 1) * WATCH_S >= ABANDONED_S and now >= self._held_until + ABANDONED_S:
                self._abandon()

    def _taken(self) -> threading.Lock:
        """The lock, not taken in this moment; in DOWN nobody keeps it for long."""
        if self._lock.acquire(timeout=ABANDONED_S):
            self._lock.release()
        else:
            self._abandon()
        return self._lock

    def _abandon(self) -> None:
        """Its holder is gone: another lock, and no connection, as nobody knows what was sent and read on it."""
        self._drop("a call was interrupted")
        self._lock = threading.Lock()

    def close(self, wait_s: float) -> None:
        """Send what is left, close the connection. Waits for the holder of the lock at most `wait_s`."""
        lock = self._lock
        if not lock.acquire(timeout=wait_s):
            self.state = State.CLOSED  # the holder closes the connection when it gives up the lock
            return
        try:
            if self._connection is not None and not self._connection.clogged:
                self._connection.post(self._along.take() + self._later.take())
        except OSError as error:
            self._drop(str(error))
        finally:
            self.state = State.CLOSED
            self._give_up_lock(lock)

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

    def _drop(self, reason: str, connection: Connection | None = None) -> None:
        """Close the connection, or just this one, if it isn't ours any more."""
        if connection is not None and connection is not self._connection:
            connection.close()
            return
        self._fall(reason)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _give_up_lock(self, lock: threading.Lock) -> None:
        """Whoever adds to `Later` and doesn't get the lock relies on this: look again after giving it up."""
        while self._lock is lock:
            if self.state is State.CLOSED:
                self._drop("closed")
            self._flush_later()
            self._turns += 1
            lock.release()
            if not self._later or self.state is not State.UP or not lock.acquire(blocking=False):
                return
            if self._connection is None or self._connection.clogged:
                lock.release()
                return
        lock.release()


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _nobody() -> None:
    """Wakes nobody: there is no background thread in the child of a fork."""
