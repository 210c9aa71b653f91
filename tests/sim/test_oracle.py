"""Whoever watches is watched: bugs put into the core on purpose, each found by the random worlds within a few seeds.

Each is one that a tired evening could bring. Without the bug the same worlds run clean (`tests.sim.test_chaos`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cachesvc.core import events as ev
from cachesvc.core.eviction import Eviction
from cachesvc.core.extents import Extents
from cachesvc.core.node import Node
from cachesvc.core.restore import Restoration
from cachesvc.core.sessions import WriteTicket
from cachesvc.core.slots import Extent, SlabClass
from cachesvc.core.transfers import Transfers
from cachesvc.types import Priority
from tests.sim.chaos import Chaos, Failed, draw
from tests.sim.disk import FREE, WRITING

SEEDS_MAX = 60

Patch = pytest.MonkeyPatch


def a_lost_connection_frees_what_is_being_written(patch: Patch) -> None:
    right = Transfers.quarantine

    def wrong(self: Transfers, ticket: WriteTicket, now: float) -> None:
        right(self, ticket, now)
        ticket.waiting = set()

    patch.setattr(Transfers, "quarantine", wrong)


def the_first_death_frees_what_is_being_written(patch: Patch) -> None:
    right = Node._process_died

    def wrong(self: Node, event: ev.ProcessDied, now: float, out: list[ev.Effect]) -> None:
        for session in self.sessions.of_process(event.process):
            for ticket in session.writes.values():
                if ticket.waiting is not None:
                    ticket.waiting.clear()
        right(self, event, now, out)

    patch.setattr(Node, "_process_died", wrong)


def a_slot_is_reused_at_its_old_generation(patch: Patch) -> None:
    right = SlabClass.reuse

    def wrong(self: SlabClass, n: int) -> None:
        right(self, n)
        self.generations[n] -= 1

    patch.setattr(SlabClass, "reuse", wrong)


def a_slot_is_freed_at_its_old_generation(patch: Patch) -> None:
    right = SlabClass._free

    def wrong(self: SlabClass, n: int, extent: Extent) -> None:
        right(self, n, extent)
        self.generations[n] -= 1

    patch.setattr(SlabClass, "_free", wrong)


def leases_protect_nothing(patch: Patch) -> None:
    patch.setattr(SlabClass, "leased", lambda self, n: False)
    patch.setattr(SlabClass, "_check_unheld", lambda self, n: None)


def the_reply_comes_before_the_marks(patch: Patch) -> None:
    right = Node.handle

    def wrong(self: Node, event: ev.Event, now: float) -> list[ev.Effect]:
        return sorted(right(self, event, now), key=lambda effect: not isinstance(effect, ev.Allocated | ev.Leased))

    patch.setattr(Node, "handle", wrong)


def lengths_are_off_by_one(patch: Patch) -> None:
    right = Transfers.lease

    def wrong(self: Transfers, *args: Any, **options: Any) -> tuple[bytes, list[int]]:
        states, slots = right(self, *args, **options)
        for n in slots:
            args[2].slab.lengths[n] = max(0, args[2].slab.lengths[n] - 1)
        return states, slots

    patch.setattr(Transfers, "lease", wrong)


def a_restart_forgets_who_writes(patch: Patch) -> None:
    right = Restoration.extent

    def wrong(self: Restoration, event: ev.ExtentRestored, *rest: Any) -> None:
        states = event.columns.states.copy()
        states[states == WRITING] = FREE
        columns = dataclasses.replace(event.columns, states=states)
        right(self, dataclasses.replace(event, columns=columns), *rest)

    patch.setattr(Restoration, "extent", wrong)


def a_restart_loses_a_chunk(patch: Patch) -> None:
    right = Restoration.extent

    def wrong(self: Restoration, event: ev.ExtentRestored, *rest: Any) -> None:
        keys = [b"?" * (at == 0) + key for at, key in enumerate(event.columns.keys)]
        right(self, dataclasses.replace(event, columns=dataclasses.replace(event.columns, keys=keys)), *rest)

    patch.setattr(Restoration, "extent", wrong)


def a_restart_takes_leases_away(patch: Patch) -> None:
    patch.setattr(Restoration, "claim_lease", lambda self, *_: None)


def there_is_no_grace_time(patch: Patch) -> None:
    patch.setattr(Node, "in_grace", lambda self, now: False)


def a_prompt_evicts_its_own_head(patch: Patch) -> None:
    right = Eviction.evict
    patch.setattr(Eviction, "evict", lambda self, priority, held, spared: right(self, priority, held, ()))


def batch_evicts_interactive(patch: Patch) -> None:
    right = Eviction.evict

    def wrong(self: Eviction, priority: Priority, held: Any, spared: Any) -> int | None:
        return right(self, Priority.INTERACTIVE, held, spared)

    patch.setattr(Eviction, "evict", wrong)


def tenants_see_each_others_extents(patch: Patch) -> None:
    def wrong(self: Extents, tenant: str, slot_bytes: set[int]) -> list[tuple[int, int, int]]:
        return [(n, slab.slot_bytes, slab.slots_per_extent) for n, (slab, _) in self.used.items()]

    patch.setattr(Extents, "usable", wrong)


def bytes_are_free_though_mapped(patch: Patch) -> None:
    def wrong(self: Extents, number: int) -> None:
        del self.dropping[number]
        self.mapped.pop(number, None)

    patch.setattr(Extents, "dropped", wrong)


def the_dead_keep_their_mappings(patch: Patch) -> None:
    patch.setattr(Extents, "unmap_all", lambda self, process: None)


def leases_without_a_reply_stay(patch: Patch) -> None:
    patch.setattr(Node, "_end_leases", lambda self, *_: None)


BUGS: list[Callable[[Patch], None]] = [
    a_lost_connection_frees_what_is_being_written,
    the_first_death_frees_what_is_being_written,
    a_slot_is_reused_at_its_old_generation,
    a_slot_is_freed_at_its_old_generation,
    leases_protect_nothing,
    the_reply_comes_before_the_marks,
    lengths_are_off_by_one,
    a_restart_forgets_who_writes,
    a_restart_loses_a_chunk,
    a_restart_takes_leases_away,
    there_is_no_grace_time,
    a_prompt_evicts_its_own_head,
    batch_evicts_interactive,
    tenants_see_each_others_extents,
    bytes_are_free_though_mapped,
    the_dead_keep_their_mappings,
    leases_without_a_reply_stay,
]


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_is_found(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    for seed in range(SEEDS_MAX):
        try:
            Chaos(draw(seed)).run()
        except Failed as found:
            assert "replay: python -m tests.sim.chaos" in str(found)
            return
    pytest.fail(f"{SEEDS_MAX} worlds run clean with this bug")
