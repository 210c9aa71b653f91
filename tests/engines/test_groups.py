"""A model with several KV groups: full attention and sliding windows, of which a hit needs only the end."""

from __future__ import annotations

import pytest

from cachesvc.demo.engine import EngineProcess
from cachesvc.demo.model import HYBRID
from tests.engines.harness import BLOCK, Engines, answer, assert_same, counting, faults_of, words
from tests.support.daemon import Daemon

WINDOW_BLOCKS = HYBRID.window // BLOCK


@pytest.fixture(scope="module")
def pair(daemon: Daemon, engines: Engines) -> tuple[EngineProcess, EngineProcess]:
    return engines.pair(daemon, engines.model(HYBRID))


@pytest.mark.parametrize("blocks", [2, WINDOW_BLOCKS, 9, 24])
def test_a_prefix_is_shared(daemon: Daemon, one: EngineProcess, two: EngineProcess, blocks: int) -> None:
    document, question = words(f"groups {blocks}", blocks * BLOCK), words("q", 30)
    answer(one, document + words("first", 30))
    local = answer(one, document + question)
    assert local.local_tokens == blocks * BLOCK
    with counting(daemon, two) as seen:
        shared = answer(two, document + question)
    assert (shared.loaded_tokens, shared.local_tokens) == (blocks * BLOCK, 0)
    assert_same(local, shared)
    # one group needs all of it, two need what their windows still see
    assert blocks + 2 * min(blocks, WINDOW_BLOCKS) <= seen.loaded <= blocks + 2 * min(blocks, WINDOW_BLOCKS + 1)
    assert seen.leased >= seen.loaded
    assert not faults_of(one) | faults_of(two)


def test_a_prefix_grows(daemon: Daemon, one: EngineProcess, two: EngineProcess) -> None:
    """Each engine continues where the other one stopped, with its own beginning still there or gone."""
    talk = words("growing", 6 * BLOCK)
    for turn in range(6):
        speaker, listener = (one, two) if turn % 2 else (two, one)
        answer(speaker, [*talk, 7])
        local = answer(speaker, [*talk, 9])
        if turn > 2:
            assert listener.reset_prefix_cache()
        with counting(daemon, listener) as seen:
            assert_same(answer(listener, [*talk, 9]), local)
        assert seen.loaded > 0
        talk = talk + words(f"turn {turn}", 2 * BLOCK)
