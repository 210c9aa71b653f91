"""Identity, keys and grants: plain values that are checked before anything is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.client.grants import CHUNK_BYTES_MAX, WINDOW, Grant, Identity, KeyRun, Peek, Ticket
from cachesvc.types import KEYS_PER_MESSAGE_MAX, KeyState, Role
from cachesvc.wire.messages import Slots


def identity(**changes: object) -> Identity:
    fields = {
        "session": b"s" * 16,
        "role": Role.SCHEDULER,
        "namespace": b"n" * 16,
        "label": "test",
        "components": {"a": "b"},
        "chunk_bytes": (4096,),
    }
    return Identity(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"session": b"s" * 15},
        {"session": b"s" * 65},
        {"chunk_bytes": ()},
        {"chunk_bytes": (4096, 0)},
        {"chunk_bytes": (CHUNK_BYTES_MAX + 1,)},
        {"chunk_bytes": (True,)},
    ],
)
def test_what_no_daemon_takes_is_the_callers_mistake(changes: dict[str, object]) -> None:
    identity().check()
    with pytest.raises(ValueError, match=r"session id|chunk_bytes|KV groups"):
        identity(**changes).check()


@given(st.integers(0, 3 * KEYS_PER_MESSAGE_MAX))
def test_every_key_is_in_one_batch_of_one_window(count: int) -> None:
    keys = [number.to_bytes(4, "big") for number in range(count)]
    run = KeyRun(1, keys)
    assert len(run) == count
    assert [key for part in run.parts() for key in part] == keys
    assert sum(run.sizes()) == count
    windows = list(run.windows())
    assert [batch for batches, _ in windows for batch in batches] == list(run.batches)
    assert all(len(batches) <= WINDOW for batches, _ in windows)


@pytest.mark.parametrize("lost", [False, True])
def test_a_grant_of_several_tickets_names_its_slots_in_order(lost: bool) -> None:
    tickets = [Ticket(1, Slots([5], [0], [7])), Ticket(2, Slots([5, 6], [1, 2], [8, 9]), lost=lost)]
    grant = Grant(b"\1\1\1", tickets)
    assert list(grant.places()) == [(5, 0, 7), (5, 1, 8), (6, 2, 9)]
    assert grant.lost == lost


def test_a_peek_is_complete_when_every_part_has_come() -> None:
    peek = Peek([1, 2])
    heard = []
    for part, states in ((1, [KeyState.RAM] * 2), (0, [KeyState.PENDING])):
        peek.take(part, bytes(states))
        heard.append(peek.states)
    assert heard == [None, bytes([KeyState.PENDING, KeyState.RAM, KeyState.RAM])]
    assert Peek([]).states == b""
