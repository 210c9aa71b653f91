"""Engines that agree in all that decides about KV bytes share; engines that differ in any of it never do.

Every engine gets the same prompt, whose chunks the first one has stored. `cachesvc namespaces diff` must say what it is
that differs. Adapters don't make a namespace: their content is in the keys.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachesvc.demo.engine import EngineProcess
from cachesvc.demo.model import TINY, write_lora
from tests.engines.harness import (
    CHUNK,
    Engines,
    Right,
    answer,
    assert_alike,
    assert_same,
    counting,
    faults_of,
    namespaces,
    ready,
    settled,
    words,
)
from tests.support.daemon import Daemon

PROMPT = words("everybody's", 4 * CHUNK + 30)

DIFFERENT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "weights": ({"seed of the model": 1}, {"weights"}),
    "hf_overrides": ({"hf_overrides": {"rms_norm_eps": 0.01}}, {"model_config"}),
    "dtype": ({"dtype": "bfloat16"}, {"dtype", "kv_dtype"}),
    "block size": ({"block_size": 64}, {"group_0"}),
    # a method that leaves the layers of this model as they are, so that it runs on any CPU; not in float32
    "quantisation": ({"quantization": "experts_int8", "dtype": "bfloat16"}, {"quantization"}),
}
"""What differs: how, and the components that must say so."""

SAME: dict[str, dict[str, Any]] = {
    "another path, other limits": {
        "copy of the model": True,
        "max_model_len": 8192,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_chunked_prefill": True,
        "gpu_memory_utilization": 0.5,
        "served_model_name": "another-name",
    },
}


@pytest.fixture(scope="module")
def first(daemon: Daemon, engines: Engines) -> EngineProcess:
    """Has stored the prompt."""
    engine = engines.start(daemon)
    assert answer(engine, PROMPT).error is None
    return engine


@pytest.fixture
def passing(models: Path) -> Iterator[Engines]:
    """Engines of one test."""
    with Engines(models) as engines:
        yield engines


def diff(daemon: Daemon, one: str, other: str) -> str:
    """What an operator is told."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "cachesvc",
        "namespaces",
        "diff",
        one,
        other,
        "--socket",
        daemon.admin_socket,
    ]
    environment = {**os.environ, "COLUMNS": "200"}
    return str(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def other_namespace(daemon: Daemon, mine: set[str]) -> str:
    [new] = set(namespaces(daemon)) - mine
    return new


@pytest.mark.parametrize("what", DIFFERENT)
def test_never_share(
    daemon: Daemon, passing: Engines, engines: Engines, first: EngineProcess, right: Right, what: str
) -> None:
    settings, components = DIFFERENT[what]
    settings = dict(settings)
    known = set(namespaces(daemon))
    model = engines.model(TINY, seed=settings.pop("seed of the model", 0))
    other = passing.start(daemon, model, **settings)
    with counting(daemon, other) as seen:
        said = answer(other, PROMPT)
    assert said.error is None
    assert (said.loaded_tokens, seen.leased, seen.loaded) == (0, 0, 0)
    assert seen.sealed == seen.stored > 0
    # its own chunks are nobody else's either
    assert first.reset_prefix_cache()
    with counting(daemon, first) as seen:
        assert_alike(answer(first, PROMPT), right(PROMPT))
    assert seen.loaded == 4
    named = diff(daemon, _namespace_of(daemon, known), other_namespace(daemon, known))
    assert all(f" {component} " in named for component in components), named
    # and nothing is told apart that is the same
    rest = {"weights", "model_config", "quantization", "hash", "epoch", "vllm", "speculative"} - components
    assert not [component for component in rest if f" {component} " in named], named
    assert not faults_of(other)


def _namespace_of(daemon: Daemon, known: set[str]) -> str:
    """Of the engine that was there first."""
    return min(known, key=list(namespaces(daemon)).index)


@pytest.mark.parametrize("what", SAME)
def test_always_share(
    daemon: Daemon, passing: Engines, engines: Engines, first: EngineProcess, right: Right, tmp_path: Path, what: str
) -> None:
    settings = dict(SAME[what])
    known = set(namespaces(daemon))
    model = engines.model()
    if settings.pop("copy of the model", False):
        model = settled(Path(shutil.copytree(model, tmp_path / "elsewhere")))
    same = passing.start(daemon, model, **settings)
    with counting(daemon, same) as seen:
        assert_alike(answer(same, PROMPT), right(PROMPT))
    assert (seen.leased, seen.loaded, seen.stored) == (4, 4, 0)
    assert set(namespaces(daemon)) == known


def test_adapters(daemon: Daemon, passing: Engines, tmp_path: Path) -> None:
    """Of the same content they share; overwritten at the same path they don't, while an engine runs or after."""
    path = settled(write_lora(tmp_path / "adapter", TINY, seed=1))
    lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8}
    question = words("adapter", 4 * CHUNK + 30)
    mine = {"lora": ("adapter", 1, str(path))}
    one, two = passing.pair(daemon, **lora)
    with counting(daemon, one) as seen:
        answer(one, question, **mine)
        local = answer(one, question, **mine)
        base = answer(one, question)
    assert seen.stored == 8
    assert seen.leased == 0
    assert base.token_ids != local.token_ids, "the adapter changes nothing"
    with counting(daemon, two) as seen:
        assert_same(answer(two, question, **mine), local)
    assert seen.loaded == 4
    # overwritten: an engine that runs goes on with what it has, and shares nothing of it any more
    write_lora(path, TINY, seed=2)
    assert two.reset_prefix_cache()
    with counting(daemon, two) as seen:
        assert_alike(answer(two, question, **mine), local)
    assert (seen.leased, seen.stored) == (0, 0)
    two.kill()
    settled(path)
    later = ready(passing.begin(daemon.socket(), **lora))
    with counting(daemon, later) as seen:
        changed = answer(later, question, **mine)
    assert (seen.leased, seen.stored) == (0, 4)
    assert changed.token_ids != local.token_ids
    # the base model is shared by all of them
    with counting(daemon, later) as seen:
        assert_alike(answer(later, question), base)
    assert seen.loaded == 4
    assert not faults_of(one) | faults_of(later)
