"""Where a client's connection meets the daemon: no exception that its bytes cause goes further than this.

Covers: the guard around everything that is done for a client, and the last words to one. Not here: the connections
(`daemon.server`, `daemon.descriptors`).
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from cachesvc.errors import ProtocolError
from cachesvc.wire.framing import encode
from cachesvc.wire.messages import Refused

LOG = logging.getLogger(__name__)


class Member(Protocol):
    """Anything that counts as a connection of the daemon."""

    deadline: float | None
    """When it is cut unless it has proved itself (seconds of the loop's clock); None once it has."""

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


def refuse(sock: socket.socket, error: ProtocolError) -> None:
    """Tell a client why, if it can be told without waiting, and close."""
    with sock:
        sock.setblocking(False)
        try:
            sock.send(last_words(error))
        except OSError:
            return
