"""What a daemon may say, and what ends the connection with it."""

from __future__ import annotations

import pytest

from cachesvc.client.replies import NO_SLOTS, allocated, expect, leased, looked, of
from cachesvc.errors import ProtocolError
from cachesvc.types import AllocateState, KeyState
from cachesvc.wire.messages import Allocated, Leased, Looked, Refused, Sealed, Slots

RAM, PENDING = KeyState.RAM, KeyState.PENDING
ONE, TWO = Slots([1], [0], [3]), Slots([1, 1], [0, 1], [3, 3])


def test_a_lookup_has_a_state_for_each_key() -> None:
    assert looked(Looked(1, bytes([RAM, PENDING]), 0), 2) == bytes([RAM, PENDING])
    assert looked(Refused(1, "limit", "much"), 2) == of(KeyState.NO_ROOM, 2)


@pytest.mark.parametrize("states", [b"", bytes([RAM]), bytes([RAM] * 3), bytes([RAM, 99])])
def test_a_lookup_that_cannot_be(states: bytes) -> None:
    with pytest.raises(ProtocolError):
        looked(Looked(1, states, 0), 2)


def test_a_leading_run_repeats_the_reason_of_its_gap() -> None:
    got = leased(Leased(1, bytes([RAM, PENDING]), ONE, [9], 0), 4, prefix=True)
    assert got.states == bytes([RAM, PENDING, PENDING, PENDING])
    assert leased(Refused(1, "limit", "much"), 3, prefix=True).states == of(KeyState.NO_ROOM, 3)


@pytest.mark.parametrize(
    "reply",
    [
        Leased(1, bytes([RAM]), ONE, [9], 0),
        Leased(1, bytes([RAM, RAM]), ONE, [9], 0),
        Leased(1, bytes([RAM, PENDING]), TWO, [9, 9], 0),
        Leased(1, bytes([RAM, PENDING]), ONE, [], 0),
        Leased(1, bytes([PENDING, RAM]), ONE, [9], 0),
        Sealed(1, ok=True),
    ],
)
def test_a_lease_that_cannot_be(reply: Leased | Sealed) -> None:
    with pytest.raises(ProtocolError):
        leased(reply, 2, prefix=True)


def test_an_allocation_has_a_slot_for_each_new_key() -> None:
    new, busy = AllocateState.NEW, AllocateState.BUSY
    assert allocated(Allocated(1, bytes([busy, new]), ONE, 0), 2).slots == ONE
    assert allocated(Refused(1, "limit", "much"), 2) == Allocated(1, of(AllocateState.RETRY, 2), NO_SLOTS, 0)
    for states, slots in ((bytes([new]), ONE), (bytes([new, new]), ONE), (bytes([busy, 77]), NO_SLOTS)):
        with pytest.raises(ProtocolError):
            allocated(Allocated(1, states, slots, 0), 2)


def test_another_kind_of_reply() -> None:
    with pytest.raises(ProtocolError, match="Sealed came where Looked"):
        expect(Sealed(1, ok=True), Looked)
