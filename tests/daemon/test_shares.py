"""Turns of the loop: what a tenant's connections may take in one, and in which order the rest follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cachesvc.daemon import shares
from cachesvc.daemon.shares import Share


class Clock:
    """In place of perf_counter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(shares, "perf_counter", lambda: self.now)

    def work(self, heard: list[str], name: str, messages: int, each_s: float) -> shares.Work:
        """Notes its name for each message, which takes so long."""

        def serve(until: float) -> bool:
            nonlocal messages
            while messages:
                messages -= 1
                heard.append(name)
                self.now += each_s
                if self.now >= until:
                    return bool(messages)
            return False

        return serve


def in_turns(heard: list[str], begin: Callable[[Share], None], turns: int) -> list[list[str]]:
    """What is heard in each turn of a loop, from the one on in which `begin` is called."""
    seen = []

    async def scenario() -> None:
        begin(Share(asyncio.get_running_loop()))
        for _ in range(turns):
            seen.append(list(heard))
            heard.clear()
            await asyncio.sleep(0)

    asyncio.run(scenario())
    return seen


def test_small_work_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, heard = Clock(monkeypatch), list[str]()
    done: list[bool] = []

    def begin(share: Share) -> None:
        done.extend(share.serve(clock.work(heard, name, 1, shares.TURN_S / 10)) for name in "abc")

    assert in_turns(heard, begin, 2) == [["a", "b", "c"], []]
    assert done == [True, True, True]


def test_what_takes_too_long_goes_on_in_later_turns_and_others_stand_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, heard = Clock(monkeypatch), list[str]()
    done: list[bool] = []

    def begin(share: Share) -> None:
        done.append(share.serve(clock.work(heard, "a", 5, shares.TURN_S / 2)))
        done.append(share.serve(clock.work(heard, "b", 3, shares.TURN_S / 2)))
        done.append(share.serve(clock.work(heard, "c", 1, shares.TURN_S / 2)))

    assert in_turns(heard, begin, 6) == [["a", "a"], ["a", "a"], ["b", "b"], ["c", "a"], ["b"], []]
    assert done == [True, False, False]


def test_a_message_that_is_longer_than_a_turn_is_served_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, heard = Clock(monkeypatch), list[str]()

    def begin(share: Share) -> None:
        share.serve(clock.work(heard, "a", 2, 10 * shares.TURN_S))

    assert in_turns(heard, begin, 3) == [["a"], ["a"], []]


def test_time_is_forgotten_in_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes much of each turn, but not too much, never has to wait."""
    clock, heard = Clock(monkeypatch), list[str]()
    done: list[bool] = []

    async def scenario() -> None:
        share = Share(asyncio.get_running_loop())
        for _ in range(10):
            done.append(share.serve(clock.work(heard, "a", 1, 0.9 * shares.TURN_S)))
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert done == [True] * 10


def test_one_tenant_does_not_wait_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, heard = Clock(monkeypatch), list[str]()

    async def scenario() -> None:
        greedy, modest = (Share(asyncio.get_running_loop()) for _ in range(2))
        greedy.serve(clock.work(heard, "g", 1000, shares.TURN_S / 2))
        for _ in range(3):
            assert modest.serve(clock.work(heard, "m", 1, shares.TURN_S / 4))
            await asyncio.sleep(0)

    asyncio.run(scenario())
    assert heard[:9] == ["g", "g", "m"] * 3
