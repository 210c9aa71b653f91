"""Prompts and their prefixes: one larger than the arena, one with a gap."""

from __future__ import annotations

import pytest

from tests.support.clients import ClientProcess, Clients, names
from tests.support.daemon import Daemon, wait_for

pytestmark = pytest.mark.slow

SLOTS = 128
STEP = 8


def write_prompt(client: ClientProcess, keys: list[str], request: int) -> None:
    """In steps, as an engine does: what is to be tried again is offered again, and nothing behind what got no room."""
    at = 0
    while at < len(keys):
        before = client.do("refusals").get("NO_ROOM", 0)
        step = keys[at : at + STEP]
        client.do("write", keys=step, request=request)
        at += client.do("lookup", keys=step)
        if client.do("refusals").get("NO_ROOM", 0) > before:
            return


@pytest.mark.parametrize("eviction", ["arc", "lru"])
@pytest.mark.parametrize("arena_is", ["empty", "full of others'"])
def test_a_prompt_twice_the_arena_keeps_an_unbroken_prefix(
    daemon: Daemon, clients: Clients, eviction: str, arena_is: str
) -> None:
    daemon.settings |= {"eviction": eviction}
    daemon.start()
    engine = clients.open(daemon.socket())
    if arena_is != "empty":
        old = names("old", range(SLOTS + 50))
        for number in range(0, len(old), 10):
            wait_for(lambda: engine.do("write", keys=old[number : number + 10]))  # noqa: B023 - called at once
        assert daemon.evictions() > 0
    prompt = names("prompt", range(2 * SLOTS))
    write_prompt(engine, prompt, request=1)
    assert engine.do("lookup", keys=prompt) == SLOTS
    assert engine.do("read", keys=prompt) == SLOTS
    assert [engine.do("get", key=key) for key in prompt[SLOTS : SLOTS + 8]] == [None] * 8


@pytest.mark.parametrize("eviction", ["arc", "lru"])
def test_the_head_of_a_prompt_outlives_its_tail(daemon: Daemon, clients: Clients, eviction: str) -> None:
    """What is evicted of a prompt goes from its end: its prefix stays unbroken."""
    daemon.settings |= {"eviction": eviction}
    daemon.start()
    engine = clients.open(daemon.socket())
    prompt = names("prompt", range(100))
    write_prompt(engine, prompt, request=1)
    assert engine.do("read", keys=prompt, request=1) == 100
    runs = [100]
    for number in range(30):
        engine.do("write", keys=names(f"other-{number}", range(STEP)))
        states = engine.do("states", keys=prompt)
        runs.append(engine.do("lookup", keys=prompt))
        assert states.count("RAM") == runs[-1]
    assert runs == sorted(runs, reverse=True)
    if eviction == "lru":  # ARC keeps what was used twice
        assert runs[-1] == 0
        assert len(set(runs)) > 3


def test_a_key_never_stored_in_the_middle_ends_the_prefix(daemon: Daemon, clients: Clients) -> None:
    daemon.start()
    engine = clients.open(daemon.socket())
    prompt = names("prompt", range(10))
    assert engine.do("write", keys=[*prompt[:5], *prompt[6:8]]) == [*prompt[:5], *prompt[6:8]]
    assert engine.do("write", keys=prompt[8:]) == prompt[8:]
    assert engine.do("lookup", keys=prompt) == 5
    assert engine.do("read", keys=prompt) == 5
    assert engine.do("lookup", keys=prompt[6:]) == 4
    assert engine.do("write", keys=prompt) == prompt[5:6]
    assert engine.do("read", keys=prompt) == 10


def test_a_key_dropped_from_the_middle_ends_the_prefix(daemon: Daemon, clients: Clients) -> None:
    """One chunk is the least recently used, and goes: lookup stops there."""
    daemon.settings |= {"eviction": "lru"}
    daemon.start()
    engine = clients.open(daemon.socket())
    prompt = names("prompt", range(10))
    assert engine.do("put", key=prompt[5])
    write_prompt(engine, prompt, request=1)
    assert engine.do("lookup", keys=prompt) == 10
    for number in range(SLOTS):
        if engine.do("states", keys=prompt[5:6]) == ["EVICTED"]:
            break
        wait_for(lambda: engine.do("put", key=f"other-{number}"))  # noqa: B023 - called at once
        for key in prompt[:5] + prompt[6:]:
            assert engine.do("get", key=key) == "right"
    assert engine.do("states", keys=prompt) == ["RAM"] * 5 + ["EVICTED"] + ["RAM"] * 4
    assert engine.do("lookup", keys=prompt) == 5
    assert engine.do("read", keys=prompt) == 5
