"""Words and limits: what fits a byte, what counts as a miss, how chunks become slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.types import (
    KEY_MISS_FIRST,
    PAGE_BYTES,
    AllocateState,
    KeyState,
    Priority,
    Role,
    slot_bytes_for,
)

MISSES = {
    KeyState.NEVER_STORED,
    KeyState.EVICTED,
    KeyState.PENDING_TIMEOUT,
    KeyState.DEADLINE,
    KeyState.DAEMON_DOWN,
    KeyState.LOAD_FAILED,
    KeyState.FILTERED,
    KeyState.NAMESPACE_NEW,
    KeyState.NO_ROOM,
}


def test_a_state_is_one_byte_and_zero_is_none_of_them() -> None:
    """A reply that was never filled in must not read as an answer."""
    for state in (*KeyState, *AllocateState):
        assert 0 < state < 256


def test_misses_are_those_from_the_first_reason_on() -> None:
    assert {state for state in KeyState if state >= KEY_MISS_FIRST} == MISSES


def test_interactive_outranks_batch() -> None:
    assert Priority.BATCH < Priority.INTERACTIVE


def test_roles_travel_as_words() -> None:
    assert Role("worker") is Role.WORKER
    assert str(Role.SCHEDULER) == "scheduler"


@pytest.mark.parametrize(("chunk_bytes", "slot_bytes"), [(1, 4096), (4095, 4096), (4096, 4096), (4097, 8192)])
def test_slot_of_a_chunk(chunk_bytes: int, slot_bytes: int) -> None:
    assert slot_bytes_for(chunk_bytes) == slot_bytes


@given(st.integers(min_value=1, max_value=1 << 40))
def test_a_slot_is_the_fewest_pages_that_hold_the_chunk(chunk_bytes: int) -> None:
    slot_bytes = slot_bytes_for(chunk_bytes)
    assert slot_bytes % PAGE_BYTES == 0
    assert slot_bytes - PAGE_BYTES < chunk_bytes <= slot_bytes
