"""Everything that may go wrong, at random moments drawn from a seed.

Covers: drawing a world from a seed, its faults, its three parts, the story of a failure. Not here: the world and what
is right (`tests.sim.world`, `tests.sim.oracle`).

A run has three parts: *trouble* (faults at random moments), *calm* (no faults, engines finish what they do and stay
connected: nothing may be left open), *end* (everybody dies: nothing may be left at all).

``python -m tests.sim.chaos SEED`` runs one and prints what happened; with ``--log`` every event and effect.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

from cachesvc.core.quota import TenantQuota
from cachesvc.types import PAGE_BYTES
from tests.sim.disk import Troubles
from tests.sim.engine import Engine, Habits
from tests.sim.network import Delays
from tests.sim.process import Process
from tests.sim.world import Place, World


@dataclass(frozen=True, slots=True)
class Faults:
    """How often each thing goes wrong, in mean seconds between two of them; 0 = never."""

    kill_process: float = 0.0
    kill_engine: float = 0.0
    stall: float = 0.0
    cut: float = 0.0
    crash: float = 0.0
    hang: float = 0.0
    damage: float = 0.0
    stall_s_max: float = 3.0
    long_stalls: float = 0.15
    """The share of stalls that outlast quarantine."""
    resize: float = 0.0
    """The chance that a restart comes with another size of the arena."""
    restart_s_max: float = 1.0
    deaths_s_max: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, whole: everything that a seed decides before it begins."""

    seed: int
    place: Place
    trouble_s: float
    namespaces: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(tenant, label, chunk_bytes) that engines open."""
    engines: int
    engines_max: int
    tasks: int
    pidfds: float
    """The share of engines whose processes give pidfds."""
    faults: Faults
    habits: Habits


class Failed(AssertionError):  # noqa: N818 - an outcome, told like a test's
    """A run went wrong: what, when, what came before, and how to see it again."""


class Chaos:
    """Runs one plan."""

    def __init__(self, plan: Plan, log: Callable[[str], None] | None = None, check_every: int = 1) -> None:
        self.plan = plan
        self.world = World(plan.place, plan.seed, log, check_every)
        self.world.daemon.deaths_s_max = plan.faults.deaths_s_max
        self.world.daemon.restart_s_max = plan.faults.restart_s_max
        self.world.daemon.resize = plan.faults.resize
        self._rng = self.world.dice("faults")
        self._calm = False

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All three parts; Failed with the story."""
        try:
            self._trouble()
            self._settle()
            self._end()
        except Exception as error:
            story = "\n".join(self.world.tail)
            raise Failed(
                f"seed {self.plan.seed}, {self.world.kernel.now:.3f}: {type(error).__name__}: {error}\n"
                f"replay: python -m tests.sim.chaos {self.plan.seed} --log\nlast events:\n{story}"
            ) from error

    def _trouble(self) -> None:
        self.world.start()
        for _ in range(self.plan.engines):
            self._arrive()
        faults = self.plan.faults
        for mean_s, fault in (
            (faults.kill_process, self._kill_process),
            (faults.kill_engine, self._kill_engine),
            (faults.stall, self._stall),
            (faults.cut, self._cut),
            (faults.crash, self._crash),
            (faults.hang, self._hang),
            (faults.damage, self._damage),
        ):
            if mean_s:
                self._repeat(mean_s, fault)
        self.world.after(self.plan.trouble_s)

    def _settle(self) -> None:
        """No more faults. Engines finish, stay, and nothing is left open."""
        world = self.world
        self._calm = True
        world.daemon.fuse = None
        for engine in world.engines:
            engine.stopping = True
        now = world.kernel.now
        stalled = max((p.stalled_until for e in world.engines for p in e.processes if p.alive), default=now)
        world.after(max(0.0, stalled - now) + 60.0)
        world.after(self.plan.place.quarantine_s + 1.0)
        for engine in world.engines:
            if engine.scheduler.alive:
                assert not engine.busy, f"{engine.name} hangs"
                assert engine.scheduler.connected(), f"{engine.name} never came back"
        world.check_idle("engines are idle and connected")

    def _end(self) -> None:
        for engine in self.world.engines:
            for process in engine.processes:
                process.die()
        self.world.after(self.plan.place.quarantine_s + self.plan.faults.deaths_s_max + 3.0)
        self.world.check_gone()

    # --- engines ----------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        """Another engine starts."""
        world, rng = self.world, self._rng
        name = f"engine-{len(world.engines)}"
        tenant, label, chunk_bytes = rng.choice(self.plan.namespaces)
        workers, pidfd = rng.choice((0, 0, 1, 2)), rng.random() < self.plan.pidfds
        dice = world.dice(name)
        engine = Engine(world, name, tenant, label, chunk_bytes, self.plan.habits, dice, workers, pidfd=pidfd)
        world.engines.append(engine)
        engine.start(self.plan.tasks)

    def _replace(self) -> None:
        if not self._calm and len(self.world.engines) < self.plan.engines_max:
            self.world.kernel.after(self._rng.uniform(0, 2.0), lambda: None if self._calm else self._arrive())

    def _die_soon(self, process: Process, seconds: float) -> None:
        self.world.kernel.after(self._rng.uniform(0, seconds), process.die)

    # --- faults -----------------------------------------------------------------------------------------------------

    def _repeat(self, mean_s: float, fault: Callable[[], None]) -> None:
        def strike() -> None:
            if not self._calm:
                fault()
                self._repeat(mean_s, fault)

        self.world.kernel.after(self._rng.expovariate(1 / mean_s), strike)

    def _pick(self) -> Process | None:
        """Somebody who lives, most often somebody who is in the middle of something."""
        living = [process for engine in self.world.engines for process in engine.processes if process.alive]
        amid = [process for process in living if process.engine.writes or process.engine.leases]
        some = amid if amid and self._rng.random() < 0.8 else living
        return self._rng.choice(some) if some else None

    def _kill_process(self) -> None:
        """One process dies; the others of its engine follow some time later."""
        process = self._pick()
        if process is not None:
            process.die()
            patience_s = self._rng.choice((0.5, 5.0, self.plan.place.quarantine_s * 1.5))
            for other in process.engine.processes:
                self._die_soon(other, patience_s)
            self._replace()

    def _kill_engine(self) -> None:
        process = self._pick()
        if process is not None:
            for other in process.engine.processes:
                self._die_soon(other, self._rng.choice((0.0, 0.1)))
            self._replace()

    def _stall(self) -> None:
        process = self._pick()
        if process is not None:
            long = self._rng.random() < self.plan.faults.long_stalls
            most = self.plan.place.quarantine_s * 2.0 if long else self.plan.faults.stall_s_max
            process.stall(self._rng.uniform(0, most))

    def _cut(self) -> None:
        """A connection breaks, or all connections of an engine."""
        process = self._pick()
        if process is not None:
            for other in process.engine.processes if self._rng.random() < 0.5 else [process]:
                if other.link is not None:
                    other.link.cut()

    def _crash(self) -> None:
        if self._rng.random() < 0.2:
            self.world.daemon.crash()
        else:
            self.world.daemon.fuse = self._rng.randint(1, 60)

    def _hang(self) -> None:
        self.world.daemon.hang(self._rng.uniform(0, 2.0))

    def _damage(self) -> None:
        if self.world.disk.extents and self.world.daemon.node is not None:
            extent = self._rng.choice(sorted(self.world.disk.extents))
            self.world.daemon.damage(extent)


# --- drawing a world --------------------------------------------------------------------------------------------------


def draw(seed: int) -> Plan:
    """The world of a seed."""
    rng = random.Random(f"{seed}/plan")
    extent_cells = rng.choice((6, 8, 12))
    extents_max = rng.choice((1, 2, 2, 3, 4, 7))
    two = rng.random() < 0.4 and extents_max >= 3
    tenants = _tenants(rng, extent_cells, extents_max, two=two)
    names = [tenant.name for tenant in tenants]
    sizes = [size for size in (1, 2, 3) if 2 * size <= extent_cells]
    namespaces = []
    for label in ("model-a", "model-b", "model-c")[: rng.randint(1, 3)]:
        groups = rng.choice((1, 1, 1, 2))
        chunk_bytes = tuple(rng.choice(sizes) * PAGE_BYTES - rng.choice((0, 0, 100)) for _ in range(groups))
        namespaces += [(name, label, chunk_bytes) for name in names]
    place = Place(
        extent_cells=extent_cells,
        extents_max=extents_max,
        eviction=rng.choice(("arc", "arc", "lru")),
        quarantine_s=rng.choice((8.0, 15.0, 30.0)),
        grace_s=rng.choice((1.5, 3.0, 5.0)),
        tenants=tenants,
        delays=_delays(rng),
        troubles=Troubles(rng.choice((0.0, 0.05, 0.5)), rng.choice((0.0, 0.0, 0.2)), rng.choice((0.0, 0.0, 0.1))),
    )
    return Plan(
        seed=seed,
        place=place,
        trouble_s=rng.choice((20.0, 40.0, 60.0)),
        namespaces=tuple(namespaces),
        engines=rng.randint(1, 4),
        engines_max=12,
        tasks=rng.randint(1, 3),
        pidfds=rng.choice((0.9, 0.9, 0.3)),
        faults=_faults(rng),
        habits=_habits(rng),
    )


def _tenants(rng: random.Random, extent_cells: int, extents_max: int, *, two: bool) -> tuple[TenantQuota, ...]:
    if not two:
        return (TenantQuota("red"),)
    extent_bytes = extent_cells * PAGE_BYTES
    least = rng.choice((0, 1))
    most = rng.choice((None, extents_max - 1))
    return (
        TenantQuota("red", least * extent_bytes, None if most is None else most * extent_bytes),
        TenantQuota("blue", rng.choice((0, 1)) * extent_bytes),
    )


def _faults(rng: random.Random) -> Faults:
    def mean(*choices: float) -> float:
        return rng.choice(choices)

    return Faults(
        kill_process=mean(0, 4, 15),
        kill_engine=mean(0, 6, 20),
        stall=mean(0, 1, 5),
        cut=mean(0, 1, 5),
        crash=mean(0, 0, 4, 15),
        hang=mean(0, 0, 10),
        damage=mean(0, 0, 0, 15),
        stall_s_max=rng.choice((0.5, 3.0, 8.0)),
        long_stalls=rng.choice((0.05, 0.4)),
        resize=rng.choice((0.0, 0.0, 0.5)),
        restart_s_max=rng.choice((0.1, 1.0, 5.0)),
        deaths_s_max=rng.choice((0.01, 1.0, 4.0)),
    )


def _delays(rng: random.Random) -> Delays:
    return Delays(
        usual_s_max=rng.choice((0.001, 0.01)),
        slow_s_max=rng.choice((0.1, 2.0)),
        slow_chance=rng.choice((0.0, 0.01, 0.05)),
        notice_s_max=rng.choice((0.001, 0.1, 1.0)),
    )


def _habits(rng: random.Random) -> Habits:
    return Habits(
        think_s_max=rng.choice((0.1, 0.3, 1.0)),
        deadline_s=rng.choice((0.05, 1.0)),
        step_s_max=rng.choice((0.005, 0.05, 0.5)),
        inside_s_max=rng.choice((0.001, 0.05)),
        keys_max=rng.randint(1, 5),
        batches_max=rng.randint(1, 4),
        prompts=rng.choice((2, 8, 30)),
        depth_max=rng.choice((5, 12)),
        slow_chance=rng.choice((0.0, 0.02, 0.1)),
        slow_s_max=rng.choice((0.5, 4.0)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="run one simulated world")
    parser.add_argument("seed", type=int)
    parser.add_argument("--log", action="store_true", help="print every event and effect")
    arguments = parser.parse_args()
    plan = draw(arguments.seed)
    print(plan, file=sys.stderr)
    run = Chaos(plan, print if arguments.log else None)
    run.run()
    print(dict(sorted(run.world.oracle.counts.items())), run.world.digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
