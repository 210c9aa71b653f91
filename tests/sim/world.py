"""One simulated node: a daemon, its files, its network and its engines, wired together and watched by the oracle.

Covers: the wiring, the log by which two runs are compared, running scripts, checking that nothing is left. Not here:
the parts (`tests.sim`: `kernel`, `disk`, `network`, `daemon`, `process`, `engine`), what is right (`tests.sim.oracle`),
what goes wrong at random (`tests.sim.chaos`).
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cachesvc.core.node import Node, NodeSettings
from cachesvc.core.quota import TenantQuota
from cachesvc.types import PAGE_BYTES, AllocateState, Priority
from tests.sim.daemon import Daemon
from tests.sim.disk import FREE, SEALED, Disk, Troubles
from tests.sim.engine import Engine, Habits
from tests.sim.kernel import Future, Kernel, Task
from tests.sim.network import Delays, Network
from tests.sim.oracle import Oracle
from tests.sim.process import Process

LOG_LINES = 60

HANG_S = 3600.0
"""On the simulation's clock: no script takes so long."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a world plays. Sizes in cells of `cell_bytes`."""

    extent_cells: int = 8
    extents_max: int = 4
    cell_bytes: int = PAGE_BYTES
    eviction: str = "arc"
    quarantine_s: float = 600.0
    grace_s: float = 5.0
    tenants: tuple[TenantQuota, ...] = (TenantQuota("red"),)
    delays: Delays = Delays()  # noqa: RUF009 - frozen
    troubles: Troubles = Troubles()  # noqa: RUF009 - frozen

    def settings(self) -> NodeSettings:
        return NodeSettings(
            extent_bytes=self.extent_cells * self.cell_bytes,
            extents_max=self.extents_max,
            tenants=self.tenants,
            eviction=self.eviction,
            quarantine_s=self.quarantine_s,
            restart_grace_s=self.grace_s,
        )


class World:
    """Every part has its own dice, so that a change of one doesn't shift the others' luck. `start` it first."""

    def __init__(
        self, place: Place, seed: int = 0, log: Callable[[str], None] | None = None, check_every: int = 1
    ) -> None:
        self.place = place
        self.seed = seed
        self.kernel = Kernel()
        self.tail: deque[str] = deque(maxlen=LOG_LINES)
        settings = place.settings()
        self.disk = Disk(self.kernel, self.dice("disk"), settings.extent_bytes, place.cell_bytes, place.troubles)
        self.oracle = Oracle(self.kernel, self.disk, settings, check_every)
        self.daemon = Daemon(self.kernel, self.disk, settings, self.oracle, self.note, self.dice("daemon"))
        self.network = Network(self.kernel, self.dice("network"), place.delays, self.daemon)
        self.engines: list[Engine] = []
        self._log = log
        self._digest = hashlib.blake2b(digest_size=16)
        self._pids = 0

    def dice(self, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{what}")

    def next_pid(self) -> int:
        self._pids += 1
        return self._pids

    def note(self, line: str) -> None:
        """Everything that the daemon takes in and does: two runs are the same if these lines are."""
        line = f"{self.kernel.now:.6f} {line}"
        self._digest.update(line.encode())
        self.tail.append(line)
        if self._log is not None:
            self._log(line)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    @property
    def node(self) -> Node:
        """Of the daemon that runs now; tests look, clients can't."""
        assert self.daemon.node is not None, "no daemon is running"
        return self.daemon.node

    # --- scripts ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.daemon.start()
        self.after(0.0)

    def after(self, seconds: float) -> None:
        """Let time pass."""
        self.kernel.run(self.kernel.now + seconds)

    def engine(
        self,
        name: str,
        chunk_cells: tuple[int, ...] = (1,),
        tenant: str = "red",
        label: str = "model",
        workers: int = 0,
        pidfd: bool = True,
        habits: Habits | None = None,
        session: str | None = None,
    ) -> Engine:
        """An engine that has connected and does what scripts say."""
        sizes = tuple(cells * self.place.cell_bytes for cells in chunk_cells)
        habits = habits or Habits(fail_chance=0.0, slow_chance=0.0, done_chance=0.0, short_chance=0.0)
        engine = Engine(
            self, name, tenant, label, sizes, habits, self.dice(name), workers, pidfd=pidfd, session=session
        )
        self.engines.append(engine)
        engine.start(tasks=0)
        self.kernel.run(self.kernel.now + HANG_S, until=lambda: all(p.connected() for p in engine.processes))
        assert all(process.connected() for process in engine.processes), f"{name} can't connect"
        self.after(0.001)
        return engine

    def store_all(self, engine: Engine, keys: list[bytes], priority: Priority = Priority.INTERACTIVE) -> None:
        """Store keys, a few at a time and again on RETRY; AssertionError if it says that for long."""
        for at in range(0, len(keys), 2):
            for _ in range(100):
                states = self.do(engine.store(0, keys[at : at + 2], 0, priority), engine.scheduler)
                if max(states) < AllocateState.BUSY:
                    break
                self.after(0.1)
            else:
                raise AssertionError(f"{engine.name} can't store: {[AllocateState(state).name for state in states]}")

    def begin(self, task: Task, process: Process) -> Future:
        """Run a script in a process; the future has what it returns."""
        ended = Future()

        def script() -> Task:
            ended.resolve((yield task))

        process.run(script())
        return ended

    def do(self, task: Task, process: Process) -> Any:
        """Run a script in a process to its end; what it returns."""
        ended = self.begin(task, process)
        self.kernel.run(self.kernel.now + HANG_S, until=lambda: ended.done)
        assert ended.done, "a script hangs"
        return ended.value

    # --- the end ----------------------------------------------------------------------------------------------------

    def check_idle(self, when: str) -> None:
        """Every slot is free or sealed, nothing is leased, and no chunk hides in a table."""
        self.node.check_invariants()
        for extent, table in self.disk.extents.items():
            assert set(table.states) <= {FREE, SEALED}, f"{when}: extent {extent} has words {table.states}"
        for name, tenant in self.node.snapshot(None, self.kernel.now)["tenants"].items():
            for what in ("write_tickets", "leases"):
                assert not tenant[what], f"{when}: tenant {name} counts {tenant[what]} {what}"
        self.oracle.check_end()

    def check_gone(self) -> None:
        """Everybody has died and quarantine is over: nothing is left but chunks."""
        self.check_idle("everybody is gone")
        status = self.node.snapshot(None, self.kernel.now)
        for name, tenant in status["tenants"].items():
            for what in ("sessions", "connections", "processes"):
                assert not tenant[what], f"everybody is gone: tenant {name} counts {tenant[what]} {what}"
        assert not status["arena"]["extents"]["retiring"], "everybody is gone: extents wait to be unmapped"
        assert not status["restart"]["orphans"], "everybody is gone: orphans are left"
