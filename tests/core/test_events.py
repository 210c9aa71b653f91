"""The vocabulary: whole, frozen, and every event has a door."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from cachesvc.core import events as ev
from tests.support.nodes import Driven

EVENTS = typing.get_args(ev.Event)
EFFECTS = typing.get_args(ev.Effect)
VALUES = (ev.SlotRun, ev.WriteClaim, ev.LeaseClaim, ev.NamespaceRecord, ev.TableColumns)


def test_every_dataclass_is_an_event_an_effect_or_a_value() -> None:
    declared = {kind for kind in vars(ev).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    assert declared == {*EVENTS, *EFFECTS, *VALUES}
    assert not set(EVENTS) & set(EFFECTS)


@pytest.mark.parametrize("kind", [*EVENTS, *EFFECTS, *VALUES], ids=lambda kind: kind.__name__)
def test_nothing_of_it_can_be_changed(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(kind)


def test_every_event_has_a_door() -> None:
    assert set(Driven(started=False).node._doors) == set(EVENTS)


def test_a_run_of_slots_knows_its_length() -> None:
    assert len(ev.SlotRun((1, 1), (0, 1), (5, 5))) == 2
    assert len(ev.SlotRun((), (), ())) == 0
