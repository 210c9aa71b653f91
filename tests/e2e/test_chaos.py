"""Everything at once: clients and the daemon are killed, stopped and started at random moments, under load. What comes
of any of it is the right bytes or a miss, and in the end nothing has leaked.
"""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.support.clients import ClientProcess, Clients
from tests.support.daemon import Daemon, wait_for

pytestmark = pytest.mark.slow

SECONDS = 10
DEADLINE_MS = 500.0
HANG_GUARD_S = 10 * DEADLINE_MS / 1000
PREFIXES = ["a", "b", "c"]


class Chaos:
    """Three clients and a daemon, each up, stopped or being replaced."""

    def __init__(self, daemon: Daemon, clients: Clients, seed: int) -> None:
        self.daemon, self.clients = daemon, clients
        self.draw = random.Random(seed)
        self.crowd = [self.fresh(prefix) for prefix in PREFIXES]
        self.told: list[str] = []

    def fresh(self, prefix: str) -> ClientProcess:
        """A client under load. Keys of its predecessor come again, with other contents."""
        client = self.clients.open(self.daemon.socket(), deadline_ms=DEADLINE_MS, ready_s=0)
        seed = self.draw.randrange(1 << 30)
        client.do("begin_load", threads=2, prefix=prefix, others=PREFIXES, keys_max=200, hold=2, seed=seed)
        return client

    def step(self) -> None:
        time.sleep(self.draw.random() * 0.5)
        what = self.draw.choice([self.kill_client, self.stop_client, self.kill_daemon, self.stop_daemon])
        self.told.append(what.__name__)
        what()

    def kill_client(self) -> None:
        index = self.draw.randrange(len(self.crowd))
        self.check(self.crowd[index])
        self.crowd[index].kill()
        self.crowd[index] = self.fresh(PREFIXES[index])

    def stop_client(self) -> None:
        """Longer than the grace time of a restart, sometimes over one."""
        client = self.draw.choice(self.crowd)
        client.stop()
        if self.draw.random() < 0.5:
            self.kill_daemon()
        time.sleep(self.draw.random())
        client.go_on()

    def kill_daemon(self) -> None:
        self.daemon.stop(self.draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        time.sleep(self.draw.random() * 0.3)
        self.daemon.start()

    def stop_daemon(self) -> None:
        self.daemon.freeze()
        time.sleep(self.draw.random())
        self.daemon.thaw()

    def check(self, client: ClientProcess) -> None:
        assert client.do("look_at_load")["wrong"] == [], self.told


@pytest.mark.parametrize("seed", [1, 2])
def test_right_bytes_or_a_miss_whatever_is_killed(daemon: Daemon, clients: Clients, seed: int) -> None:
    # nobody is stopped for as long as a writer has for naming what it writes
    daemon.settings |= {"restart_grace_s": 0.5, "quarantine_s": 5}
    daemon.start()
    chaos = Chaos(daemon, clients, seed)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        chaos.step()
    for client in chaos.crowd:
        client.do("until_up")
    time.sleep(0.5)
    figures = [client.do("end_load") for client in chaos.crowd]
    for each in figures:
        assert each["wrong"] == [], chaos.told
        assert each["counts"]["hits"] > 0
    # a process that was stopped for a second has slept that long in a call
    assert max(each["longest_s"] for each in figures) < HANG_GUARD_S + 1
    wait_for(lambda: daemon.nothing_leaks(processes=len(PREFIXES)))
    assert daemon.status()["daemon"]["problems"] == {}
    assert "Traceback" not in daemon.log
