"""The scheduler's side of belonging to a namespace: when the engine may share, under which identity, in which session.

Covers: waiting for what the identity is made of, joining, starting afresh after a reset. Not here: what the identity
consists of (`connector.identity`), its digest (`connector.namespace`), what is asked in the session
(`connector.scheduler`).

States; a thread of its own draws the arrows out of WAITING, the engine's scheduler thread all others::

    WAITING  the workers haven't told their layout, or the weights' content isn't known yet: all is a miss
       |
       +--> JOINED   a session and its background thread exist; the daemon may be there or not
       |       |  renew (the engine's cache was reset): another epoch, so another namespace and session;
       |       +-------------------------------------> JOINED; the old session ends when its last ticket is settled
       |
       +--> CLOSED   nothing may be shared, for a reason that is logged once; or the engine ends. Nothing leads out.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Final

from cachesvc.client.keeper import Keeper
from cachesvc.client.session import Session
from cachesvc.config import client_address
from cachesvc.connector import layout
from cachesvc.connector.guard import LOG, tell
from cachesvc.connector.layout import RankLayout
from cachesvc.connector.namespace import digest
from cachesvc.connector.specs import Join
from cachesvc.errors import CachesvcError
from cachesvc.types import Role

EPOCH_BYTES: Final = 8
STOP_S: Final = 2.0


class Membership:
    """What session the engine is in, if any. Owns the sessions and their background threads until `close`."""

    def __init__(
        self,
        address: str | None,
        label: str,
        blocks_per_chunk: int,
        components: Callable[[Sequence[RankLayout], str], dict[str, str] | None],
        epoch: str,
    ) -> None:
        """`components(ranks, epoch)`: the named parts of the identity; it waits for what takes long to find out.

        Returns None: the engine ends; ValueError: it can't share, and why.
        """
        self.closed = ""
        """Why nothing is shared, ever; "" as long as something may be."""
        self._address = address
        self._label = label
        self._blocks_per_chunk = blocks_per_chunk
        self._components = components
        self._epoch = epoch
        self._ranks: Sequence[RankLayout] = ()
        self._session: Session | None = None
        self._keeper: Keeper | None = None
        self._join: Join | None = None
        self._lock = threading.Lock()  # all of the above: two threads draw arrows

    def told(self, ranks: Sequence[RankLayout]) -> None:
        """The workers' KV caches are there: join as soon as everything is known."""
        self._ranks = ranks
        threading.Thread(target=self._enter, name="cachesvc-join", daemon=True).start()

    def session(self) -> Session | None:
        """The session, if there is one and the daemon hasn't refused it."""
        session = self._session
        if session is not None and session.refusal:
            self._close(session.refusal)
        return self._session

    def take_join(self) -> Join | None:
        """What the workers have to know, once for each session."""
        if self._join is None:
            return None
        with self._lock:
            join, self._join = self._join, None
        return join

    def renew(self, epoch: str | None = None) -> None:
        """Leave the namespace for good, as nothing stored so far is right any more; `epoch`: a random one."""
        with self._lock:
            joined = self._session is not None
            self._epoch = epoch if epoch is not None else secrets.token_hex(EPOCH_BYTES)
            self._leave(0.0)
        if joined:
            self._enter()

    def close(self) -> None:
        """The engine ends."""
        with self._lock:
            self.closed = self.closed or "the engine has ended"
            self._leave(STOP_S)

    def _enter(self) -> None:
        try:
            if not all(rank.memory for rank in self._ranks):
                raise ValueError("a worker can't tell how the bytes of its KV cache are to be read")
            while True:
                epoch = self._epoch
                groups = layout.join(self._ranks, self._blocks_per_chunk)
                components = self._components(self._ranks, epoch)
                if components is None:
                    return
                namespace = digest(components)
                join = Join(self._address, secrets.token_bytes(16), namespace, self._label, components, groups)
                with self._lock:
                    if self.closed or self._session is not None:
                        return
                    if epoch != self._epoch:
                        continue  # the cache was reset meanwhile
                    self._session, self._keeper = enter(join, Role.SCHEDULER)
                    self._join = join
                LOG.info("cachesvc: namespace %s (%s)", namespace.hex()[:12], self._label)
                return
        except (ValueError, CachesvcError) as error:
            self._close(str(error))
        except Exception as error:
            tell("joining", error)
            self._close(repr(error))

    def _leave(self, wait_s: float) -> None:
        if self._keeper is not None:
            self._keeper.stop(wait_s)
        self._session = self._keeper = self._join = None

    def _close(self, why: str) -> None:
        with self._lock:
            if not self.closed:
                LOG.warning("cachesvc: this engine shares nothing: %s", why)
                self.closed = why
            self._leave(0.0)


def enter(join: Join, role: Role) -> tuple[Session, Keeper]:
    """A session of this process and the background thread that keeps it connected. ValueError: no daemon takes it."""
    wake = threading.Event()
    session = Session(join.identity(role), wake.set)
    return session, Keeper(session, lambda: client_address(join.address), wake)
