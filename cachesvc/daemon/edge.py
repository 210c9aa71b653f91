"""Where a client's connection meets the daemon: no exception that its bytes cause goes further than this.

Covers: the guard around everything that is done for a client, the last words to one, what is kept from all of them.
Not here: the connections (`daemon.server`, `daemon.descriptors`).
"""

from __future__ import annotations

import logging
import resource
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from cachesvc.errors import ProtocolError
from cachesvc.wire.framing import encode
from cachesvc.wire.messages import Refused

LOG = logging.getLogger(__name__)


RESERVED_FILES: Final = 64
"""Descriptors below our limit that are for the daemon itself."""


def files_max() -> int:
    """From this descriptor on the daemon keeps none for a tenant's client: the kernel gives the lowest that is free."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(limit // 2, limit - RESERVED_FILES)


class Member(Protocol):
    """Anything that counts as a connection of the daemon."""

    tenant: str | None
    """None = it came through the admin socket."""

    def overdue(self, now: float) -> bool:
        """Should it have said something, or the rest of something, by `now` (seconds of the loop's clock)?"""

    def shrink(self) -> None:
        """Give back memory that it doesn't need now."""

    def cut(self) -> None:
        """Close at once, whatever is unsent. Harmless when closed already."""


def guard(counts: Counter[str], who: str, work: Callable[[], None]) -> ProtocolError | None:
    """Do something for a client; None, or why its connection has to be closed.

    A bug of ours comes out as a refusal that tells nothing; it is logged with its traceback, and counted.
    """
    try:
        work()
    except ProtocolError as error:
        LOG.warning("%s closed: %s", who, error)
        counts["protocol"] += 1
        return error
    except Exception:
        LOG.exception("%s closed: this is a bug", who)
        counts["crashed"] += 1
        return ProtocolError("the daemon failed on this message; its log says more")
    return None


def last_words(error: ProtocolError) -> bytes:
    """The frame that tells a client why it is closed."""
    return encode(Refused(0, "protocol", str(error)))


def tell(sock: socket.socket, error: ProtocolError) -> None:
    """Tell a client why it will be closed, if it can be told without waiting."""
    sock.setblocking(False)
    try:
        sock.send(last_words(error))
    except OSError:
        return


def refuse(sock: socket.socket, error: ProtocolError) -> None:
    """Tell a client why, and close."""
    with sock:
        tell(sock, error)
