"""A session of the real client and its background thread, up with a fake daemon."""

from __future__ import annotations

import threading
import time
from typing import Any

from cachesvc.client.channel import State
from cachesvc.client.grants import Identity, KeyRun
from cachesvc.client.keeper import Keeper
from cachesvc.client.session import Session
from cachesvc.types import Role
from tests.support.fake_daemon import HANG_S, FakeDaemon, wait_for


def identity(**changes: Any) -> Identity:
    usual: dict[str, Any] = {
        "session": b"s" * 16,
        "role": Role.SCHEDULER,
        "namespace": b"n" * 16,
        "label": "test",
        "components": {"user": "test"},
        "chunk_bytes": (4096, 100),
    }
    return Identity(**(usual | changes))


def soon() -> float:
    return time.monotonic() + HANG_S


def run(*keys: bytes, group: int = 0) -> KeyRun:
    return KeyRun(group, list(keys))


def many(count: int) -> KeyRun:
    return KeyRun(0, [b"%d" % i for i in range(count)])


class Joined:
    """A session of the real client that is up with a fake daemon."""

    def __init__(self, daemon: FakeDaemon, **changes: Any) -> None:
        wake = threading.Event()
        self.daemon = daemon
        self.session = Session(identity(**changes), wake.set, first_ticket=1)
        self.keeper = Keeper(self.session, lambda: daemon.path, wake)
        self.up()
        assert self.keeper.settled.wait(HANG_S)

    def up(self) -> None:
        wait_for(lambda: self.session.channel.state is State.UP)

    def told(self, kind: type) -> list[Any]:
        """One-way messages that the daemon has by now, after everything sent before has arrived."""
        assert self.session.lookup(run(b"x"), soon()) is not None
        return self.daemon.got(kind)
