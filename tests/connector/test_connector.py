"""The façade: what it sets and refuses, and steps of vLLM's own scheduler with it, against a real daemon."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# before vLLM is imported: it looks at these once
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="ERROR")

import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus

from cachesvc.connector import connector as module
from cachesvc.connector import guard, identity
from cachesvc.connector.connector import CachesvcConnector, prepare
from cachesvc.connector.specs import WorkerMetadata
from cachesvc.connector.worker import CachesvcWorker
from cachesvc.demo.model import TINY, write_model
from tests.support.daemon import Daemon, shared_directory, wait_for
from tests.support.steps import Steps

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM's own and of what it imports
    pytest.mark.usefixtures("patient"),
]

BLOCK = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder / "tiny", TINY)
    return folder / "tiny"


Config = Callable[..., VllmConfig]


@pytest.fixture(scope="module")
def config(model: Path) -> Config:
    def make(
        address: Path | str = "nowhere.sock", *, extra: dict[str, Any] | None = None, **options: Any
    ) -> VllmConfig:
        transfer = {
            "kv_connector": "CachesvcConnector",
            "kv_connector_module_path": "cachesvc.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"address": str(address), "min_load_tokens": 0} | (extra or {}),
        }
        usual = {"dtype": "float32", "max_model_len": 4096, "enforce_eager": True, "block_size": BLOCK}
        arguments = usual | options
        made = EngineArgs(model=str(model), kv_transfer_config=transfer, **arguments).create_engine_config()
        made.cache_config.kv_cache_layout = "LBHNC"
        return made

    return make


def full(block: int = BLOCK) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=32, dtype=torch.float32)


def window(tokens: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=tokens)


def cache(*specs: Any, blocks: int = 200) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"model.layers.{i}.self_attn.attn"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 900), k=length)


# --- what it sets and refuses -----------------------------------------------------------------------------------------


def test_what_vllm_must_have_is_set(config: Config) -> None:
    made = config()
    settings = prepare(made, cache(full()))
    transfer = made.kv_transfer_config
    extra = transfer.kv_connector_extra_config
    assert transfer.kv_load_failure_policy == "recompute"
    assert (extra["spec_name"], extra["spec_module_path"]) == ("CachesvcSpec", "cachesvc.connector.connector")
    assert extra["canonical_layout"] is True
    assert extra["sync_load_budget_bytes"] == 0
    assert extra["blocks_per_chunk"] == 256 // BLOCK
    assert settings.address == "nowhere.sock"
    before = dict(extra)
    assert prepare(made, cache(full())) == settings, "both sides are made from the same config"
    assert extra == before


def test_a_users_chunk_stays(config: Config) -> None:
    for extra in {"blocks_per_chunk": 3}, {"block_size": 2 * BLOCK}:
        made = config(extra=extra)
        prepare(made, cache(full()))
        kept = made.kv_transfer_config.kv_connector_extra_config
        assert {name: kept[name] for name in ("blocks_per_chunk", "block_size") if name in kept} == extra


def test_large_rows_are_chunks_of_one_block(config: Config) -> None:
    made = config()
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=64, head_size=128, dtype=torch.float32)
    prepare(made, cache(spec))
    assert made.kv_transfer_config.kv_connector_extra_config["blocks_per_chunk"] == 1


def test_several_groups_have_chunks_of_one_block(config: Config) -> None:
    made = config()
    prepare(made, cache(full(), window(64)))
    assert made.kv_transfer_config.kv_connector_extra_config["blocks_per_chunk"] == 1
    prepare(config(extra={"blocks_per_chunk": 1}), cache(full(), window(64)))


@pytest.mark.parametrize("extra", [{"blocks_per_chunk": 2}, {"block_size": 2 * BLOCK}])
def test_several_groups_with_larger_chunks_are_refused(extra: dict[str, int], config: Config) -> None:
    with pytest.raises(ValueError, match="leave blocks_per_chunk and block_size away"):
        prepare(config(extra=extra), cache(full(), window(64)))


def test_newer_vllm_takes_larger_chunks_of_several_groups(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    prepare(config(extra={"blocks_per_chunk": 2}), cache(full(), window(64)))
    made = config()
    prepare(made, cache(full(), window(64)))
    assert made.kv_transfer_config.kv_connector_extra_config["blocks_per_chunk"] == 256 // BLOCK


def test_engines_that_span_nodes_are_refused(config: Config) -> None:
    made = config()
    made.parallel_config.nnodes = 2
    with pytest.raises(ValueError, match="one engine a node"):
        prepare(made, cache(full()))


def test_other_versions_and_settings_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="did you mean 'address'"):
        prepare(config(extra={"adress": "x"}), cache(full()))
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    with pytest.raises(ValueError, match=r"doesn't know vLLM 0\.34\.0"):
        prepare(config(), cache(full()))


def test_inside_a_multi_connector_it_is_refused_below_0_33(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    def make() -> Any:
        made = config()
        ours: dict[str, Any] = {"kv_connector": "CachesvcConnector", "kv_connector_module_path": "cachesvc.connector"}
        ours |= {"kv_role": "kv_both", "kv_connector_extra_config": {"address": "nowhere.sock"}}
        made.kv_transfer_config.kv_connector = "MultiConnector"
        made.kv_transfer_config.kv_connector_extra_config = {"connectors": [ours]}
        return MultiConnector(made, KVConnectorRole.WORKER, cache(full()))

    with pytest.raises(ValueError, match="inside MultiConnector"):
        make()
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    make()


def test_metrics_in_a_process_without_a_connector(config: Config) -> None:
    made = config()
    metrics = Any
    shown = CachesvcConnector.build_prom_metrics(
        made, {kind: lambda **_: SimpleNamespace(labels=lambda *_: metrics) for kind in _kinds()}, [], {}
    )
    assert "vllm:cachesvc_hit_chunks" in shown._offloading_metric_metadata


def _kinds() -> list[type]:
    import prometheus_client

    return [prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram]


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(daemon: Daemon, config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes engines, which are in their session when they are there."""
    made: list[Steps] = []
    # the model is younger than this process
    known = SimpleNamespace(wait=lambda: None, result=lambda: "blake3 00", error="")
    monkeypatch.setattr(module, "Identified", lambda _: known)

    def make(*specs: Any, address: Path | str = "", epoch: str, blocks: int = 200, **options: Any) -> Steps:
        turns = options.pop("turns", False)
        extra = {"reset_epoch": epoch} | options.pop("extra", {})
        built = config(address or daemon.socket(), extra=extra, **options)
        made.append(Steps(built, cache(*(specs or (full(),)), blocks=blocks), turns=turns))
        return made[-1].joined()

    yield make
    for steps in made:
        steps.__exit__()


GROUPS = [
    pytest.param((full(),), {}, id="one group"),
    pytest.param((full(),), {"blocks_per_chunk": 1}, id="small chunks"),
    pytest.param((full(),), {"blocks_per_chunk": 3}, id="odd chunks"),
    pytest.param((full(), window(96)), {}, id="window"),
    pytest.param((full(), window(64), window(200)), {}, id="two windows"),
]


@pytest.mark.parametrize(("specs", "extra"), GROUPS)
def test_what_one_engine_computed_another_loads(specs: Any, extra: dict[str, Any], engine: Any) -> None:
    epoch = f"share-{len(specs)}-{extra}"
    first, second = engine(*specs, epoch=epoch, extra=extra), engine(*specs, epoch=epoch, extra=extra)
    # vLLM offers the last windows of a prompt only: another prompt finds them where this one ended
    document = prompt(1, 960)
    assert first.answer("cold", document) == 961
    first.settle()
    for name, seed in ("shared", 3), ("again", 3), ("local", 4):
        left = 1011 - (928 if len(specs) > 1 else 960 if extra else 768)
        assert second.answer(name, [*document, *prompt(seed, 50)]) <= left, second.counted
        second.settle()
        if name == "shared":
            second.forget()
    assert first.failed_steps == second.failed_steps == 0
    assert second.manager._transfers == {}


def test_the_beginning_that_an_engine_has_itself_is_not_loaded(engine: Any) -> None:
    first, second = engine(epoch="middle"), engine(epoch="middle")
    document = prompt(1, 1024)
    first.answer("cold", [*document, *prompt(2, 40)])
    first.settle()
    # three blocks of its own: its load begins in the middle of a chunk of eight
    assert second.answer("begin", document[:100]) == 101
    assert second.answer("rest", [*document, *prompt(3, 40)]) == 41
    assert second.failed_steps == 0


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("specs", [(full(),), (full(), window(96))], ids=["one group", "window"])
def test_ranks_and_a_single_one_share(specs: Any, turns: bool, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # what certifies is tested in test_identity: here the two are told that they are one namespace
    monkeypatch.setattr(identity, "components", lambda *arguments: {"epoch": arguments[-1]})
    epoch = f"ranks-{turns}-{len(specs)}"
    wide = engine(*specs, epoch=epoch, tensor_parallel_size=2, turns=turns)
    narrow = engine(*specs, epoch=epoch)
    document, other = prompt(1, 800), prompt(5, 800)
    wide.answer("cold", document)
    wide.settle()
    assert narrow.answer("shared", [*document, *prompt(2, 40)]) <= 841 - 768, narrow.counted
    narrow.answer("cold", other)
    narrow.settle()
    assert wide.answer("shared", [*other, *prompt(2, 40)]) <= 841 - 768, wide.counted
    assert wide.failed_steps == narrow.failed_steps == 0


@pytest.mark.parametrize("specs", [(full(),), (full(), window(96))], ids=["one group", "window"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_that_fails_is_computed_and_tried_once(specs: Any, ranks: int, engine: Any) -> None:
    epoch = f"fails-{len(specs)}-{ranks}"
    options = {"tensor_parallel_size": ranks, "epoch": epoch}
    first, second = engine(*specs, **options), engine(*specs, **options)
    document = prompt(1, 800)
    first.answer("cold", document)
    first.settle()
    calls: list[int] = []
    worker: CachesvcWorker = second.workers[-1]._worker

    def sealed(*_: Any) -> bool:
        calls.append(1)
        return False

    worker._all_sealed = sealed  # type: ignore[assignment, method-assign]
    assert second.answer("r", [*document, *prompt(2, 40)]) == 841
    assert calls == [1], second.counted
    assert second.failed_steps == 1


def test_one_rank_fails_to_store_and_nothing_is_sealed(engine: Any) -> None:
    options = {"tensor_parallel_size": 2, "epoch": "unsealed"}
    first, second = engine(**options), engine(**options)
    first.workers[1]._worker._all_writing = lambda *_: False
    document = prompt(1, 800)
    first.answer("cold", document)
    first.settle()
    assert second.answer("shared", [*document, *prompt(2, 40)]) == 841
    assert second.failed_steps == 0


def test_a_request_is_aborted_with_its_load_under_way(engine: Any) -> None:
    first, second = engine(epoch="aborted"), engine(epoch="aborted")
    document = prompt(1, 800)
    first.answer("cold", document)
    first.settle()
    go_on = threading.Event()
    copies = second.workers[0]._worker._copies
    copies.copy = lambda *arguments, **options: (go_on.wait(30), type(copies).copy(copies, *arguments, **options))[1]
    second.add("r", [*document, *prompt(2, 40)])
    for _ in range(50):
        second.step()
        if second.manager._transfers:
            break
    assert second.manager._transfers, (first.counted, second.counted, second.finished)
    second.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    for _ in range(3):
        second.step()
    assert second.manager._transfers, "its blocks are still written"
    go_on.set()
    second.settle()
    assert second.manager.requests._requests == {}
    assert second.answer("s", [*document, *prompt(2, 40)]) <= 841 - 768, second.counted


def test_a_small_kv_cache_preempts_and_all_bytes_are_right(engine: Any) -> None:
    """More requests than fit: blocks are used again while their stores are under way."""
    first = engine(epoch="preempts", blocks=70, extra={"blocks_per_chunk": 2})
    document = prompt(1, 500)
    for i in range(6):
        first.add(f"r{i}", [*document, *prompt(10 + i, 100)], output_tokens=60)
    first.until(lambda: len(first.finished) == 6)
    first.settle()
    second = engine(epoch="preempts", extra={"blocks_per_chunk": 2})
    for i in range(6):
        assert second.answer(f"s{i}", [*document, *prompt(10 + i, 100)]) <= 601 - 448, second.counted
    assert first.failed_steps == second.failed_steps == 0


def test_a_reset_shares_nothing_with_before_and_goes_on(engine: Any) -> None:
    first = engine(epoch="reset")
    document = prompt(1, 800)
    first.answer("cold", document)
    assert first.scheduler.reset_prefix_cache(reset_connector=True)
    first.joined()
    first.settle()
    assert first.answer("after", document) == 801
    first.settle()
    first.forget()
    assert first.answer("again", [*document, *prompt(2, 40)]) <= 841 - 768, first.counted


def test_opt_outs(engine: Any) -> None:
    first, second = engine(epoch="optouts"), engine(epoch="optouts")
    document, other = prompt(1, 800), prompt(2, 800)
    first.answer("cold", document)
    first.answer("private", other, kv_transfer_params={"max_offload_tokens": 0})
    first.settle()
    assert second.answer("private", other) == 801
    assert second.answer("none", document, kv_transfer_params={"max_load_tokens": 0}) == 801
    second.settle()
    second.forget()
    assert second.answer("some", document, kv_transfer_params={"max_load_tokens": 300}) == 801 - 256


def test_settled_before_vllm_hears_of_it(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = engine(epoch="order")
    order: list[str] = []
    monkeypatch.setattr(steps.manager, "settle", lambda outcomes: order.append(f"settle {outcomes}"))
    monkeypatch.setattr(steps.connector.scheduler, "update_connector_output", lambda output: order.append("vLLM"))
    steps.connector.update_connector_output(
        SimpleNamespace(kv_connector_worker_meta=WorkerMetadata(outcomes={1: (1, 0)}))
    )
    steps.connector.update_connector_output(SimpleNamespace(kv_connector_worker_meta=None))
    assert order == ["settle {1: (1, 0)}", "vLLM", "vLLM"]


def test_the_daemon_dies_and_comes_back(engine: Any, tmp_path: Path) -> None:
    with shared_directory() as arena_dir, Daemon(tmp_path, arena_dir) as own:
        steps = engine(epoch="dies", address=own.socket())
        document = prompt(1, 800)
        steps.answer("cold", document)
        steps.settle()
        own.stop(9)
        steps.forget()
        assert steps.answer("down", [*document, *prompt(2, 40)]) == 841
        own.start()
        wait_for(lambda: steps.manager.membership.session().channel.state.value == "up")
        steps.forget()
        assert steps.answer("back", [*document, *prompt(3, 40)]) <= 841 - 768, steps.counted
        assert steps.failed_steps == 0


def test_no_fault_was_hidden_in_any_of_these() -> None:
    assert dict(guard.faults) == {}


# --- imports ----------------------------------------------------------------------------------------------------------

LOADED = """
import json, sys, warnings
warnings.simplefilter("ignore")
import vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector
vllms = set(sys.modules)
import cachesvc.connector.connector
print("loaded", json.dumps(sorted(set(sys.modules) - vllms)))
"""


def test_an_engine_loads_nothing_of_the_daemon() -> None:
    """Beside what vLLM's own connector loads: the standard library, and what an engine may have."""
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("loaded ")]
    names = json.loads(line.removeprefix("loaded "))
    ours = {name for name in names if name.startswith("cachesvc.")}
    assert {name.split(".")[1] for name in ours} <= {
        "arena",
        "client",
        "config",
        "connector",
        "core",
        "errors",
        "types",
        "wire",
    }
    others = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert {name for name in others if not name.startswith("_")} <= {
        "cachesvc",
        "numpy",
        "msgspec",
        "blake3",
        "torch",
        "vllm",
    }


def test_the_package_leads_to_the_connector() -> None:
    import cachesvc.connector as package

    assert package.CachesvcConnector is CachesvcConnector
    with pytest.raises(AttributeError, match="Elsewhere"):
        package.Elsewhere  # noqa: B018
