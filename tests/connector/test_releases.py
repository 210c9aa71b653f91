"""The connector against every release of vLLM that it accepts.

What it uses of vLLM is there and fits, by the sources (`tests.support.vllm_fit` has the rules); and what `prepare` does
otherwise for one release than for another. Not here: what vLLM does with it (`tests.engines`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachesvc.connector import connector
from cachesvc.connector.settings import READ, TRIED
from tests.support.vllm_fit import (
    MANAGER,
    OFFLOADING,
    OURS,
    ROOT,
    RULES,
    WORKER,
    Ours,
    Pair,
    callers,
    imports,
    overrides,
    reads,
    supers,
    unlisted,
)
from tests.support.vllm_sources import Sources, SourcesError, fetch, is_kept

RELEASES = ("0.31.0", "0.32.0", "0.33.0")


@pytest.fixture(scope="module")
def roots() -> dict[str, Path]:
    """The sources of each release."""
    try:
        return {version: fetch(version) for version in RELEASES}
    except SourcesError as error:
        pytest.fail(str(error), pytrace=False)


def test_these_are_the_releases_that_we_accept() -> None:
    accepted = {(*map(int, version.split(".")[:2]),) for version in RELEASES}
    assert accepted == {*TRIED, *READ}


@pytest.mark.timeout(900)  # the first time, hundreds of MB come over the network
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("version", RELEASES)
def test_we_fit(version: str, rule: Callable[[Pair], Iterator[str]], roots: dict[str, Path]) -> None:
    assert list(rule(Pair(Ours(), Sources(roots[version]), version))) == []


def test_the_list_is_complete(roots: dict[str, Path]) -> None:
    assert list(unlisted(Pair(Ours(), Sources(roots[RELEASES[-1]]), RELEASES[-1]))) == []


BASE, INTERFACE = "vllm.v1.kv_offload.base", "vllm.v1.kv_cache_interface"


@dataclass(frozen=True)
class Change:
    """Something that is otherwise, in our modules or in one of vLLM's, and what is said of it then."""

    module: str
    old: str
    new: str
    rule: Callable[[Pair], Iterator[str]]
    said: str
    version: str = "0.33.0"


CHANGES = (
    # ours
    Change(OURS, "        expedited: bool = False,\n", "", callers, "submit_load takes no 'expedited'"),
    Change(OURS, "        expedited: bool = False,\n", "", overrides, "submit_load doesn't take 'expedited'"),
    Change(OURS, "success=True, ", "", imports, "TransferResult needs success"),
    Change(OURS, "def wait(", "def wait_for(", overrides, f"{WORKER} lacks wait"),
    Change(OURS, "def on_schedule_end(", "def on_step_end(", overrides, "on_step_end: vLLM doesn't know it"),
    Change(OURS, "has_pending_work(self)", "has_pending_work(self, now)", overrides, "needs 'now'"),
    Change(
        OURS,
        "def prepare_load(self, keys",
        "def prepare_load(self, them",
        overrides,
        "what is called 'keys'",
    ),
    Change(OURS, "def settle(", "def take_events(", overrides, "take_events doesn't take|needs"),
    Change(OURS, "LookupResult.HIT ", "LookupResult.FOUND ", imports, "LookupResult has no FOUND"),
    Change(
        OURS,
        "from vllm.v1.kv_offload.base import (",
        "from vllm.v1.metrics.cache_hit_source import CacheHitSource\nfrom vllm.v1.kv_offload.base import (",
        imports,
        "vLLM has no CacheHitSource",
        version="0.31.0",
    ),
    Change(
        OURS,
        f"from {INTERFACE} import Full",
        f"from {OFFLOADING}.scheduler import get_sliding_window_size_in_chunks\nfrom {INTERFACE} import Full",
        imports,
        "vLLM has no get_sliding_window_size_in_chunks",
    ),
    Change(OURS, "super().on_new_request(request)", "super().on_new_request()", supers, "needs request"),
    Change(OURS, "super().start_load_kv(", "super().load_kv(", supers, "load_kv is not there"),
    Change(OURS, "self._loading", "self._kv_transfer_config", overrides, "_kv_transfer_config hides"),
    Change(OURS, "request.block_hashes", "request.block_keys", unlisted, "block_keys is in no list"),
    Change(OURS, "block_hashes", "request_id", unlisted, "block_hashes: nobody reads it"),
    Change(OURS, '"use_replayssm"', '"use_another"', unlisted, "'use_another', False\\) is in no list"),
    # vLLM's
    Change(BASE, "def on_schedule_end(", "def on_step_end(", overrides, "on_schedule_end: vLLM doesn't know it"),
    Change(
        BASE, "expedited: bool = False,", "expedited: bool = False, lane: int = 0,", overrides, "doesn't take 'lane'"
    ),
    Change(BASE, "    success: bool\n", "    success: bool\n    rank: int\n", imports, "TransferResult needs rank"),
    Change(BASE, "    def touch(", "    @abstractmethod\n    def touch(", overrides, f"{MANAGER} lacks touch"),
    Change(BASE, "    @classmethod\n    def build_metric", "    def build_metric", overrides, "is a plain method"),
    Change(BASE, "def get_load_source(", "def get_source(", overrides, "get_load_source: vLLM doesn't know it"),
    Change(
        BASE,
        "def on_request_finished(",
        "def settle(self): ...\n    def on_request_finished(",
        overrides,
        "settle hides",
    ),
    Change(BASE, "class CopyRun", "class Run", reads, "there is no vllm.v1.kv_offload.base:CopyRun"),
    Change(
        BASE, "def make_offload_key(block_hash", "def make_offload_key(salt, block_hash", imports, "needs group_idx"
    ),
    Change("vllm.v1.request", "skip_reading_prefix_cache", "skip_reading", reads, "Request has no skip_reading_prefix"),
    Change(BASE, "def allows(self, medium", "def allows(self, tier, medium", reads, "TierFilter.allows needs locality"),
    Change(f"{OFFLOADING}.worker", "self.worker.wait(", "self.worker.drain(", callers, f"{WORKER} has no drain"),
    Change(f"{OFFLOADING}.scheduler", "self.manager.", "self.tier.", callers, f"no {MANAGER} is seen there"),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.said)
def test_a_change_is_seen(change: Change, roots: dict[str, Path]) -> None:
    ours, vllm = Sources(ROOT), Sources(roots[change.version])
    changed = ours if change.module == OURS else vllm
    modules = [name for name, _ in Ours().modules()] if change.module == OURS else [change.module]
    texts = {name: path.read_text(encoding="utf-8") for name in modules if (path := changed.path(name))}
    changed.changed = {name: text.replace(change.old, change.new) for name, text in texts.items() if change.old in text}
    assert changed.changed
    said = list(change.rule(Pair(Ours(ours), vllm, change.version)))
    assert any(re.search(change.said, line) for line in said), said


# --- what we do otherwise for one than for another --------------------------------------------------------------------


def engine(groups: int = 1, **extra: object) -> tuple[SimpleNamespace, SimpleNamespace]:
    """As much of vLLM's settings as `prepare` looks at: blocks of 128 tokens and 128 KiB."""
    transfer = SimpleNamespace(kv_connector_extra_config=dict(extra), kv_load_failure_policy="fail")
    parallel = SimpleNamespace(nnodes=1, world_size=1)
    spec = SimpleNamespace(page_size_bytes=64 << 10, block_size=128)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a", "b"])
    return (
        SimpleNamespace(kv_transfer_config=transfer, parallel_config=parallel),
        SimpleNamespace(kv_cache_groups=[group] * groups),
    )


@pytest.mark.parametrize(
    ("version", "groups", "blocks"), [("0.31.0", 1, 2), ("0.32.0", 3, 1), ("0.33.0", 3, 2), ("0.33.1", 1, 2)]
)
def test_blocks_per_chunk(version: str, groups: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    config, caches = engine(groups)
    connector.prepare(config, caches)
    assert config.kv_transfer_config.kv_connector_extra_config["blocks_per_chunk"] == blocks
    assert config.kv_transfer_config.kv_connector_extra_config["sync_load_budget_bytes"] == 0
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"


@pytest.mark.parametrize("extra", [{"blocks_per_chunk": 2}, {"block_size": 256}])
def test_chunks_of_several_blocks_and_groups(extra: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.32.0")
    with pytest.raises(ValueError, match=r"below 0\.33"):
        connector.prepare(*engine(3, **extra))
    connector.prepare(*engine(1, **extra))
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    connector.prepare(*engine(3, **extra))


def test_inside_multi_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    around, child = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy="fail")), engine()
    space: dict[str, Any] = {"__name__": "vllm.somewhere.multi_connector"}
    exec("def make(vllm_config, build): build()", space)
    monkeypatch.setattr("vllm.__version__", "0.32.0")
    with pytest.raises(ValueError, match="inside MultiConnector"):
        space["make"](around, lambda: connector.prepare(*child))
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    space["make"](around, lambda: connector.prepare(*child))
    assert around.kv_transfer_config.kv_load_failure_policy == "recompute"


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_sources_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourcesError, match=r"^vLLM 0.0.99's sources can't be had: ERROR: No matching .*vllm==0.0.99$"):
        fetch("0.0.99")
    assert list(tmp_path.glob("cachesvc/*")) == []


def test_only_what_is_read_is_kept() -> None:
    kept = ["vllm/__init__.py", "vllm/v1/request.py", "vllm/config/model.py"]
    left = [
        "setup.py",
        "csrc/x.py",
        "vllm/benchmarks/a.py",
        "vllm/v1/../../x.py",
        "/vllm/v1/x.py",
        "tests/vllm/v1/x.py",
    ]
    assert [name for name in kept + left if is_kept(name)] == kept
