"""Replies that may be believed: what a daemon says is checked before anything is done with it.

Every function raises ProtocolError for a reply that can't be: the connection is then given up.
"""

from __future__ import annotations

from typing import Final, TypeVar

from cachesvc.errors import ProtocolError
from cachesvc.types import AllocateState, KeyState
from cachesvc.wire.messages import Allocated, ControlReply, Leased, Looked, Refused, Slots

_RAM: Final = bytes([KeyState.RAM])
_NEW: Final = bytes([AllocateState.NEW])
NO_SLOTS: Final = Slots([], [], [])
_KEY_STATES: Final = bytes(KeyState)
_ALLOCATE_STATES: Final = bytes(AllocateState)

R = TypeVar("R", bound=ControlReply)


def of(state: int, count: int) -> bytes:
    """`count` times the same state."""
    return bytes((state,)) * count


def expect(reply: ControlReply, kind: type[R]) -> R:
    if not isinstance(reply, kind):
        raise ProtocolError(f"{type(reply).__name__} came where {kind.__name__} was to come")
    return reply


def looked(reply: ControlReply, size: int) -> bytes:
    """The states of a lookup of `size` keys. A refusal (a limit) says that there is no room."""
    if isinstance(reply, Refused):
        return of(KeyState.NO_ROOM, size)
    states = expect(reply, Looked).states
    if len(states) != size or states.translate(None, _KEY_STATES):
        raise ProtocolError(f"{len(states)} states came for {size} keys, or states that nobody knows")
    return states


def leased(reply: ControlReply, size: int, *, prefix: bool) -> Leased:
    """A lease of `size` keys with a state for each: what is missing behind a leading run gets the state of the gap."""
    if isinstance(reply, Refused):
        return Leased(reply.call, of(KeyState.NO_ROOM, size), NO_SLOTS, [], 0)
    leased = expect(reply, Leased)
    states, count = leased.states, len(leased.slots)
    ends_in_gap = prefix and states != b"" and states[-1] != KeyState.RAM and len(states) < size
    if (len(states) != size and not ends_in_gap) or states.translate(None, _KEY_STATES):
        raise ProtocolError(f"{len(states)} states came for {size} keys, or states that nobody knows")
    if prefix:
        states += of(states[-1], size - len(states))
    run = len(states) - len(states.lstrip(_RAM)) if prefix else count
    if not states.count(_RAM) == run == count == len(leased.lengths):
        raise ProtocolError(f"{count} slots and {len(leased.lengths)} lengths came for {states.count(_RAM)} leases")
    return Leased(leased.call, states, leased.slots, leased.lengths, leased.extents_version)


def allocated(reply: ControlReply, size: int) -> Allocated:
    """An allocation for `size` keys. A refusal (a limit) says to try again."""
    if isinstance(reply, Refused):
        return Allocated(reply.call, of(AllocateState.RETRY, size), NO_SLOTS, 0)
    allocated = expect(reply, Allocated)
    states, count = allocated.states, len(allocated.slots)
    if len(states) != size or states.count(_NEW) != count or states.translate(None, _ALLOCATE_STATES):
        raise ProtocolError(f"{len(states)} states and {count} slots came for {size} keys, or states that nobody knows")
    return allocated
