"""The public API: chunks by key in a namespace, shared by every process of the node.

Covers: checking arguments, views of slots, copying in and out. Not here: what is said to the daemon (`client.session`).

The rule of every method: what the caller did wrong (keys, sizes, use after close, another `chunk_bytes` for a known
namespace) is ValueError; whatever happens to the daemon, the node or the memory is a miss, False or fewer views, and
nothing else is ever raised. Reasons are counted in `misses` and `refusals`. No call about keys waits longer than
`deadline_ms`; after one missed deadline calls answer at once, until the daemon answers the background thread again.
Another `chunk_bytes` is an error of the constructor's only: a daemon that comes later, or comes back with other
settings, and refuses the namespace is as good as none, until it takes it. `status` says why.

In the child of a fork a client is dead: everything is a miss. Views must not be used there.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final

from cachesvc.client.channel import State
from cachesvc.client.copying import Copier
from cachesvc.client.grants import Grant, Identity, KeyRun
from cachesvc.client.keeper import Keeper
from cachesvc.client.mappings import Mapping
from cachesvc.client.session import Session
from cachesvc.config import client_address
from cachesvc.types import AllocateState, KeyState, Priority, Role, user_namespace
from cachesvc.wire.messages import LABEL_CHARS_MAX

if TYPE_CHECKING:
    from typing import Any, Self, TypeAlias

    from _typeshed import ReadableBuffer, WriteableBuffer
    from numpy.typing import NDArray

    # numpy's arrays are buffers, but say so to a type checker only from Python 3.12 on
    Readable: TypeAlias = ReadableBuffer | NDArray[Any]
    Writeable: TypeAlias = WriteableBuffer | NDArray[Any]

FIRST_ANSWER_S: Final = 3.0
"""How long a new client waits for a daemon that is there but doesn't answer."""

CLOSE_S: Final = 2.0

DEADLINE_MS_MAX: Final = 24 * 3600 * 1000.0
"""The kernel's waits don't take any number, and a call without an end is no call to a cache."""

RETRY_S: Final = 0.05
"""How long a write that would get no slot at all is offered again while the daemon says *retry*: enough for making an
extent of 128 MiB; a larger one isn't worth an engine's time. Refusals that nothing will change soon come at once."""

RETRY_STEP_S_MIN: Final = 0.001
RETRY_STEP_S_MAX: Final = 0.02

_RAM: Final = bytes([KeyState.RAM])
_KEY_STATES: Final = {int(state): state for state in KeyState}


class Client:
    """A namespace of the node's cache. Thread-safe.

    Owns one background thread, two connections to the daemon and the mappings of its extents until `close`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        namespace: str,
        chunk_bytes: int,
        deadline_ms: float = 1000.0,
        session: bytes | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> None:
        """Open `namespace`, whose chunks have at most `chunk_bytes` bytes.

        `address` is the daemon's socket (default: CACHESVC_ADDRESS, a pod's mount, this user's daemon). Without a
        daemon everything is a miss until there is one. Waits for the daemon's first answer (at most 3 s; not at all
        where nobody listens). ValueError: an argument can't be, or the namespace is known with another `chunk_bytes`.

        `deadline_ms` bounds each call. `session` (16 to 64 bytes, default: a new one) is for who manages sessions by
        himself: of the clients with one id only the last that came is served, the others have misses from then on; what
        they still read or write stays theirs. `priority` is that of all chunks written.
        """
        if address is not None and (not isinstance(address, str) or not address or "\0" in address):
            raise ValueError(f"the address of a daemon is the path of its socket, not {address!r}")
        if address is not None:
            os.fsencode(address)  # UnicodeEncodeError, which is a ValueError
        if not isinstance(namespace, str):
            raise ValueError(f"a namespace is a name, not {namespace!r}")
        if not isinstance(session, bytes | None):
            raise ValueError(f"a session id is bytes, not {session!r}")
        if not isinstance(deadline_ms, int | float) or not 0 < deadline_ms <= DEADLINE_MS_MAX:
            raise ValueError(f"deadline_ms is more than 0 and at most {DEADLINE_MS_MAX:.0f}, not {deadline_ms!r}")
        self._chunk_bytes = chunk_bytes
        self._deadline_s = deadline_ms / 1000
        self._priority = Priority(priority)
        self._closed = False
        identity = Identity(
            session=secrets.token_bytes(16) if session is None else session,
            role=Role.SCHEDULER,
            namespace=user_namespace(namespace),
            label=namespace[:LABEL_CHARS_MAX],
            components={"user": namespace},
            chunk_bytes=(chunk_bytes,),
        )
        wake = threading.Event()
        self._copier = Copier()
        self._session = Session(identity, wake.set)
        self._keeper = Keeper(self._session, lambda: client_address(address), wake)
        self._finalizer = weakref.finalize(self, self._keeper.request_stop)
        self._keeper.tried.wait(FIRST_ANSWER_S)
        if self._session.refusal:
            self.close()
            raise ValueError(self._session.refusal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back. Reads and writes that are open end first, in the background. Closing twice is fine."""
        self._closed = True
        self._keeper.stop(CLOSE_S)
        self._copier.close()

    # --- asking -----------------------------------------------------------------------------------------------------

    def lookup(self, keys: Iterable[bytes]) -> int:
        """Length of the leading run of `keys` that can be read now. Nothing is reserved by asking."""
        states = self._states(keys)
        return len(states) - len(states.lstrip(_RAM))

    def states(self, keys: Iterable[bytes]) -> list[KeyState]:
        """What is known of each key; a miss says why."""
        return [_KEY_STATES[state] for state in self._states(keys)]

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the daemon is there and its memory is mapped and populated in this process: speed, not rightness.

        False: not within `timeout_s`.
        """
        self._check()
        if not isinstance(timeout_s, int | float) or not timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"a time to wait is a number of seconds, not {timeout_s!r}")
        return self._keeper.settled.wait(timeout_s)

    @property
    def misses(self) -> dict[KeyState, int]:
        """Keys that were asked for and not had, by reason, since this client was made."""
        return dict(self._session.misses)

    @property
    def refusals(self) -> dict[AllocateState, int]:
        """Keys that got no slot to write, by reason (RETRY also without a daemon), since this client was made."""
        return dict(self._session.refusals)

    def status(self) -> dict[str, object]:
        """For operators: plain values about this client and its connection."""
        session = self._session
        return {
            "state": session.channel.state.value,
            "error": session.channel.error,
            "arena": session.arena.hex(),
            "extents_mapped": len(session.extents.mapped),
            "misses": {state.name.lower(): count for state, count in session.misses.items()},
            "refusals": {state.name.lower(): count for state, count in session.refusals.items()},
            "unsealed": session.unsealed,
            "troubles": dict(session.extents.counts),
        }

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, keys: Iterable[bytes], *, request: int = 0) -> Read:
        """A context in which the leading run of `keys` can be read in place, without a copy. See `Read`.

        `request` (0 = none) tells apart the callers' requests: one request counts as one use of a chunk.
        """
        self._check()
        return Read(self._session, KeyRun(0, _listed(keys)), _number(request), self._deadline_s, self._check)

    def get_into(self, key: bytes, buffer: Writeable) -> bool:
        """Copy the chunk into the start of `buffer`; False: a miss, and `buffer` may hold anything.

        ValueError: `buffer` is read-only, not contiguous, or smaller than the chunk (nothing was copied then).
        """
        self._check()
        target = _bytes_of(buffer, writable=True)
        session, deadline = self._session, time.monotonic() + self._deadline_s
        grant = session.lease(KeyRun(0, [key]), deadline, touch=True)
        if not grant.tickets:
            return False
        try:
            if _load(session, grant, target, deadline, self._copier):
                return True
        finally:
            session.release(grant, along=True)
        session.count_misses(bytes([KeyState.LOAD_FAILED]))
        return False

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, keys: Iterable[bytes], *, request: int = 0) -> Write:
        """A context in which the chunks of those `keys` that are new can be written in place. See `Write`.

        A key that comes twice is written once. Keys of one `request` (0 = none) don't push each other out.
        """
        self._check()
        run = KeyRun(0, _listed(keys, distinct=True))
        return Write(
            self._session, run, _number(request), self._priority, self._chunk_bytes, self._deadline_s, self._check
        )

    def put(self, key: bytes, data: Readable) -> bool:
        """Store `data` (at most `chunk_bytes`) under `key`. True: the key can be read now, be it from before.

        False: somebody else is writing it, no room, or no daemon. Its seal is on its way when this returns: the daemon
        finds it before any later question of anybody, and one that is killed just then gets it again.
        """
        self._check()
        source = _bytes_of(data, writable=False)
        if len(source) > self._chunk_bytes:
            raise ValueError(f"{len(source)} bytes, a chunk of this namespace has at most {self._chunk_bytes}")
        session, deadline = self._session, time.monotonic() + self._deadline_s
        grant = _allocate(session, KeyRun(0, [key]), 0, self._priority, deadline)
        if not grant.tickets:
            return grant.states[0] == AllocateState.PRESENT
        try:
            views = _writable(session, grant, len(source), deadline)
            if views:
                self._copier.copy(views[0], source)
        except BaseException:
            session.abort(grant)
            raise
        if not views:
            session.abort(grant)
            return False
        return session.seal_soon(grant, [len(source)], deadline)

    # --- arguments --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise ValueError("this client is closed")

    def _states(self, keys: Iterable[bytes]) -> bytes:
        self._check()
        run = KeyRun(0, _listed(keys))
        return self._session.lookup(run, time.monotonic() + self._deadline_s)


class Read:
    """Chunks leased for reading: `with client.read(keys) as read`.

    `views` are the chunks of the leading run of the keys, in order: read-only, each as long as what was stored. They
    are leased until the end of the context, and released there: a view used later raises ValueError. Buffers made of a
    view (numpy, torch) stay mapped but may change any time after the context.
    """

    def __init__(
        self, session: Session, keys: KeyRun, request: int, deadline_s: float, check: Callable[[], None]
    ) -> None:
        self.views: tuple[memoryview, ...] = ()
        self._check = check
        self._session = session
        self._keys = keys
        self._request = request
        self._deadline_s = deadline_s
        self._grant: Grant | None = None
        self._mappings: list[Mapping] = []
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise ValueError("this read was used before: ask for another one")
        self._check()
        self._entered = True
        deadline = time.monotonic() + self._deadline_s
        request = _request_of(self._session, self._keys, self._request)
        try:
            self._grant = self._session.lease(self._keys, deadline, request=request, touch=True)
        finally:
            if request != self._request:
                self._session.end_requests([request])
        try:
            self._mappings, views = _readable(self._session, self._grant, deadline)
        except BaseException:
            self._session.release(self._grant)
            raise
        self.views = tuple(views)
        return self

    def valid(self) -> bool:
        """Do the views still show what was stored? Ask after the bytes were used; ValueError outside the context.

        It says False if the daemon took a lease away, which it does only when this process was silent for too long.
        """
        if self._grant is None:
            raise ValueError("this read is over, or hasn't begun")
        return _still_sealed(self._grant, self._mappings)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        grant, self._grant = self._grant, None
        self._mappings = []
        _release(self.views)
        if grant is not None:
            self._session.release(grant)


class Write:
    """Slots to write: `with client.write(keys) as write`.

    `views` has a view of `chunk_bytes` for each key that is new and got a slot; what the slot held before is in it. At
    the end of the context all of them are sealed with their whole length, after an exception in it none. Whether that
    worked is in `sealed`. The views are released then: one that is used later raises ValueError. A buffer made of a
    view (numpy, torch) can't be taken away: writing to it after the context corrupts a chunk that others read.
    """

    def __init__(
        self,
        session: Session,
        keys: KeyRun,
        request: int,
        priority: Priority,
        chunk_bytes: int,
        deadline_s: float,
        check: Callable[[], None],
    ) -> None:
        self.views: dict[bytes, memoryview] = {}
        self._check = check
        self.sealed = False
        """After the context: can all of `views` be read now? False, too, if there were none."""
        self._session = session
        self._keys = keys
        self._request = request
        self._priority = priority
        self._chunk_bytes = chunk_bytes
        self._deadline_s = deadline_s
        self._private = request
        self._grant: Grant | None = None
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise ValueError("this write was used before: ask for another one")
        self._check()
        self._entered = True
        deadline = time.monotonic() + self._deadline_s
        self._private = _request_of(self._session, self._keys, self._request)
        try:
            grant = _allocate(self._session, self._keys, self._private, self._priority, deadline)
        except BaseException:
            self._end_request()
            raise
        try:
            views = _writable(self._session, grant, self._chunk_bytes, deadline)
        except BaseException:
            self._session.abort(grant)
            self._end_request()
            raise
        if not views:
            self._session.abort(grant)
            self._end_request()
            return self
        new = [key for key, state in zip(self._keys.keys, grant.states, strict=True) if state == AllocateState.NEW]
        self.views = dict(zip(new, views, strict=True))
        self._grant = grant
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _release(self.views.values())
        grant, self._grant = self._grant, None
        if grant is None:
            return
        try:
            if kind is not None:
                self._session.abort(grant)
                return
            lengths = [self._chunk_bytes] * len(self.views)
            self.sealed = self._session.seal(grant, lengths, time.monotonic() + self._deadline_s)
        finally:
            self._end_request()

    def _end_request(self) -> None:
        if self._private != self._request:
            self._session.end_requests([self._private])


# --- slots as views -------------------------------------------------------------------------------------------------


def _allocate(session: Session, keys: KeyRun, request: int, priority: Priority, deadline: float) -> Grant:
    """Slots for the keys that are new. Offers them again for a while if none got one and the daemon says *retry*."""
    until = min(deadline, time.monotonic() + RETRY_S)
    step_s = RETRY_STEP_S_MIN
    while True:
        grant = session.allocate(keys, deadline, request=request, priority=priority)
        if grant.tickets or AllocateState.RETRY not in grant.states or time.monotonic() + step_s >= until:
            return grant
        if session.channel.state is not State.UP:
            return grant
        time.sleep(step_s)
        step_s = min(2 * step_s, RETRY_STEP_S_MAX)


def _request_of(session: Session, keys: KeyRun, request: int) -> int:
    """The caller's number, or one of our own for keys that don't fit into one message: the daemon remembers nothing of
    a request without one, and a long prompt's tail would push out its head."""
    return request or (session.private_request() if len(keys.batches) > 1 else 0)


def _mapping(session: Session, extent: int, arena: bytes) -> Mapping | None:
    """The extent of that arena, if it is mapped: after a new start the daemon may have another of the same number."""
    mapping = session.extents.mapped.get(extent)
    return mapping if mapping is not None and mapping.arena == arena else None


def _readable(session: Session, grant: Grant, deadline: float) -> tuple[list[Mapping], list[memoryview]]:
    """Read-only views of the leased slots, in order, up to the first that can't be mapped; and the mappings."""
    places = list(grant.places())
    session.extents.ensure([extent for extent, _, _ in places], deadline)
    mappings: list[Mapping] = []
    views: list[memoryview] = []
    for (extent, slot, _), length in zip(places, grant.lengths, strict=True):
        mapping = _mapping(session, extent, grant.arena)
        view = mapping.view(slot, length) if mapping is not None else None
        if mapping is None or view is None:
            session.count_misses(bytes([KeyState.LOAD_FAILED]) * (len(places) - len(views)))
            break
        mappings.append(mapping)
        views.append(view.toreadonly())
    return mappings, views


def _load(session: Session, grant: Grant, target: memoryview, deadline: float, copier: Copier) -> bool:
    """Copy the one leased slot out; False: it can't be mapped, or was reused meanwhile. ValueError: `target` is small.

    What comes after a copy of megabytes runs with cold caches, so this is spelled out for one slot.
    """
    (ticket,), (size,) = grant.tickets, grant.lengths
    (extent,), (slot,), (generation,) = ticket.slots.extents, ticket.slots.slots, ticket.slots.generations
    if extent not in session.extents.mapped:
        session.extents.ensure([extent], deadline)
    mapping = _mapping(session, extent, ticket.arena)
    source = mapping.view(slot, size) if mapping is not None else None
    if mapping is None or source is None:
        return False
    if size > len(target):
        raise ValueError(f"the chunk has {size} bytes, the buffer {len(target)}")
    copier.copy(target[:size], source)
    return mapping.sealed(slot, generation) and not ticket.lost


def _writable(session: Session, grant: Grant, length: int, deadline: float) -> list[memoryview]:
    """Views of `length` bytes of the allocated slots, in order; none at all if one of them can't be mapped, or was lost
    while that was tried."""
    places = list(grant.places())
    session.extents.ensure([extent for extent, _, _ in places], deadline)
    views: list[memoryview] = []
    for extent, slot, _ in places:
        mapping = _mapping(session, extent, grant.arena)
        view = mapping.view(slot, length) if mapping is not None else None
        if view is None:
            return []
        views.append(view)
    return [] if grant.lost else views


def _still_sealed(grant: Grant, mappings: list[Mapping]) -> bool:
    """Do the slots behind `mappings` (the first ones of the grant) hold what they held when they were leased?"""
    if grant.lost:
        return False
    return all(
        mapping.sealed(slot, generation)
        for mapping, (_, slot, generation) in zip(mappings, grant.places(), strict=False)
    )


def _release(views: Iterable[memoryview]) -> None:
    for view in views:
        try:
            view.release()
        except BufferError:
            # somebody made a buffer of it (numpy): it stays mapped for as long as that lives
            continue


# --- arguments ------------------------------------------------------------------------------------------------------


def _listed(keys: Iterable[bytes], *, distinct: bool = False) -> list[bytes]:
    """The keys, each once if `distinct`; ValueError if these aren't any."""
    try:
        return list(dict.fromkeys(keys)) if distinct else list(keys)
    except TypeError as error:
        raise ValueError(f"keys are bytes: {error}") from error


def _bytes_of(buffer: Readable, *, writable: bool) -> memoryview:
    """The bytes of a contiguous buffer; ValueError if it is none."""
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"a buffer of bytes was to be given: {error}") from error
    if not view.c_contiguous or (writable and view.readonly):
        raise ValueError("the buffer has to be contiguous" + (" and writable" if writable else ""))
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def _number(request: int) -> int:
    if not isinstance(request, int) or not 0 <= request < 1 << 64:
        raise ValueError(f"a request is a number from 0 to 2**64 - 1, not {request!r}")
    return request
