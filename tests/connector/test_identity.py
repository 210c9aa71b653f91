"""Which engines share: their configs are vLLM's own, resolved as an engine resolves them."""

from __future__ import annotations

import enum
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# before vLLM is imported: it looks at these once
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="ERROR")

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from cachesvc.connector.identity import UnsharableError, components, memory_of, minor_version, plain
from cachesvc.connector.layout import LayerPage, RankLayout
from cachesvc.connector.namespace import digest
from cachesvc.connector.weights import Memos, content_digest, find
from cachesvc.demo.model import HYBRID, TINY, write_model
from cachesvc.wire.messages import COMPONENTS_MAX

LATER = 10**18 * 4
LAYERS = [f"model.layers.{number}.self_attn.attn" for number in range(TINY.layers)]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM's own and of what it imports
]

# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of tiny models."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "tiny", TINY)
    write_model(folder / "seed", TINY, seed=1)
    write_model(folder / "draft", replace(TINY, layers=1))
    write_model(folder / "hybrid", HYBRID)
    shutil.copytree(folder / "tiny", folder / "copy")
    return folder


def changed(models: Path, **fields: object) -> Path:
    """The tiny model with other fields in its config."""
    folder = models / ("changed " + " ".join(sorted(fields)) + str(len(list(models.iterdir()))))
    shutil.copytree(models / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def resolved(model: Path, *, layout: str = "LBHNC", chunk: int = 1, **arguments: Any) -> VllmConfig:
    """An engine's config; vLLM decides on the KV layout later, in the engine."""
    defaults = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    transfer |= {"kv_connector_extra_config": {"blocks_per_chunk": chunk}}  # type: ignore[dict-item]
    config = EngineArgs(
        model=str(model), **{"kv_transfer_config": transfer} | defaults | arguments
    ).create_engine_config()
    config.cache_config.kv_cache_layout = layout
    return config


def spec_of(config: VllmConfig, **changes: Any) -> FullAttentionSpec:
    tp = config.parallel_config.tensor_parallel_size
    dtype = torch.uint8 if config.cache_config.cache_dtype.startswith("fp8") else config.model_config.dtype
    values = {"block_size": config.cache_config.block_size, "num_kv_heads": TINY.kv_heads // tp}
    return FullAttentionSpec(**values | {"head_size": TINY.head_dim, "dtype": dtype} | changes)


def cache_of(*groups: tuple[Sequence[str], Any]) -> KVCacheConfig:
    return KVCacheConfig(
        num_blocks=8,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(list(names), spec) for names, spec in groups],
    )


def ranks_of(
    config: VllmConfig, *, agnostic: bool = True, memory: str = "cpu, LBHNC, CPU_ATTN vec"
) -> list[RankLayout]:
    world, local = config.parallel_config.world_size, spec_of(config).page_size_bytes
    pages = tuple(LayerPage(name, local * world, local, agnostic) for name in LAYERS)
    return [RankLayout(rank, world, memory, (pages,)) for rank in range(world)]


def named(config: VllmConfig, *, weights: str = "model blake3 00", epoch: str = "", **ranks: Any) -> dict[str, str]:
    return components(config, cache_of((LAYERS, spec_of(config))), ranks_of(config, **ranks), weights, epoch)


def weights_of(config: VllmConfig, models: Path) -> str:
    return content_digest(find(config, LATER), Memos(models / "memos", settled_ns=0))


def differing(a: dict[str, str], b: dict[str, str]) -> set[str]:
    names = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    assert (digest(a) == digest(b)) == (not names)
    return names


# --- who shares -------------------------------------------------------------------------------------------------------


def test_engines_that_agree_share(models: Path) -> None:
    mine, copy = resolved(models / "tiny"), resolved(models / "copy", max_model_len=2048, max_num_seqs=4, seed=3)
    a, b = (named(config, weights=weights_of(config, models)) for config in (mine, copy))
    assert differing(a, b) == set()


def test_components_are_few_short_and_readable(models: Path) -> None:
    told = named(resolved(models / "tiny"))
    assert len(told) < COMPONENTS_MAX // 2
    assert all(len(name) + len(value) < 400 and value.isprintable() for name, value in told.items())
    assert told["dtype"] == told["kv_dtype"] == "float32"
    assert told["speculative"] == told["quantization"] == told["multimodal"] == "none"
    assert told["max_length"] == "no effect"
    assert told["pages"] == "canonical v1-hnd, any parallelism"
    assert told["group_0"].startswith("FullAttentionSpec(dtype=float32, head_size=32,")
    assert "128 tokens a block, 128 a chunk, 2 layers of 131072 bytes (" in told["group_0"]


OTHER_ENGINES = {
    "hf_overrides": (
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
        {"model_config"},
    ),
    "dtype": ({"dtype": "float16"}, {"dtype", "kv_dtype", "group_0"}),
    "KV dtype": ({"kv_cache_dtype": "fp8"}, {"kv_dtype", "group_0"}),
    "block size": ({"block_size": 64}, {"group_0"}),
    "chunk size": ({"chunk": 2}, {"group_0"}),
    "KV layout": ({"layout": "LBNHC"}, {"pages"}),
    "quantization": ({"quantization": "int8_per_channel_weight_only"}, {"quantization"}),
    "n-grams": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        {"speculative"},
    ),
    "hash": ({"prefix_caching_hash_algo": "sha256_cbor"}, {"hash"}),
}


@pytest.mark.parametrize(("arguments", "names"), OTHER_ENGINES.values(), ids=OTHER_ENGINES)
def test_engines_that_differ_do_not(arguments: dict[str, Any], names: set[str], models: Path) -> None:
    first = named(resolved(models / "tiny", dtype="bfloat16"))
    assert differing(first, named(resolved(models / "tiny", **{"dtype": "bfloat16"} | arguments))) == names


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rms_norm_eps": 1e-5}, "model_config"),
        ({"head_scale": 2}, "model_config"),  # no field of this kind of model: custom code may read it
        ({"transformers_version": "4.0"}, ""),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, ""),
    ],
)
def test_a_models_config_counts(fields: dict[str, Any], name: str, models: Path) -> None:
    differ = differing(named(resolved(models / "tiny")), named(resolved(changed(models, **fields))))
    assert differ == ({name} if name else set())


def test_a_checkpoints_quantization_counts(models: Path) -> None:
    def quantized(bits: int) -> dict[str, str]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        inputs = weights | {"strategy": "token", "dynamic": True}
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": scheme}}
        return named(resolved(changed(models, quantization_config=settings)))

    plain_model, eight, four = named(resolved(models / "tiny")), quantized(8), quantized(4)
    assert eight["quantization"].startswith("compressed-tensors, checkpoint ")
    assert differing(plain_model, eight) == differing(eight, four) == {"quantization"}


def test_other_weights_do_not_share(models: Path) -> None:
    configs = [resolved(models / name) for name in ("tiny", "seed")]
    a, b = (named(config, weights=weights_of(config, models)) for config in configs)
    assert differing(a, b) == {"weights"}


def test_a_draft_model_counts(models: Path) -> None:
    def drafting(model: Path, tokens: int = 2) -> dict[str, str]:
        speculative = {"model": str(model), "method": "draft_model", "num_speculative_tokens": tokens}
        config = resolved(models / "tiny", speculative_config=speculative)
        return named(config, weights=weights_of(config, models))

    config = resolved(models / "tiny")
    without = named(config, weights=weights_of(config, models))
    first = drafting(models / "draft")
    assert differing(without, first) == {"weights", "speculative"}
    assert first["speculative"].startswith("draft_model, 2 tokens, ")
    assert differing(first, drafting(models / "draft", tokens=3)) == {"speculative"}
    write_model(models / "other draft", replace(TINY, layers=1), seed=1)
    assert differing(first, drafting(models / "other draft")) == {"weights"}


@pytest.mark.parametrize(
    ("rope", "length", "effect"),
    [
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 1024, "no effect"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}, 1024, "1024"),
    ],
)
def test_the_maximum_length_counts_where_it_has_an_effect(
    rope: dict[str, Any], length: int, effect: str, models: Path
) -> None:
    rope = rope | {"rope_theta": 10000.0, "original_max_position_embeddings": 512}
    told = named(resolved(changed(models, rope_parameters=rope), max_model_len=length))
    assert told["max_length"] == effect


def test_the_hash_seed_and_the_epoch_count(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(models / "tiny")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    first = named(config)
    assert differing(first, named(config, epoch="after a reset")) == {"epoch"}
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert differing(first, named(config)) == {"hash"}


def test_the_release_of_vllm_counts(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(models / "tiny")
    first = named(config)
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    assert differing(first, named(config)) == {"vllm"}


@pytest.mark.parametrize(
    ("version", "minor"),
    [
        ("0.32.0", "0.32"),
        ("0.32.1+cpu", "0.32"),
        ("0.32.0.post1", "0.32"),
        ("0.33.0rc1", "0.33.0rc1"),
        ("0.33.1.dev7+g12ab", "0.33.1.dev7+g12ab"),
        ("dev", "dev"),
    ],
)
def test_minor_version(version: str, minor: str) -> None:
    assert minor_version(version) == minor


# --- parallelism and groups -------------------------------------------------------------------------------------------


def test_any_parallelism_shares_canonical_pages(models: Path) -> None:
    one, two = resolved(models / "tiny"), resolved(models / "tiny", tensor_parallel_size=2)
    assert differing(named(one), named(two)) == set()
    assert differing(named(one, memory="cpu, LBHNC, CPU_ATTN amx"), named(two)) == {"memory"}


def test_other_pages_are_shared_by_the_same_parallelism(models: Path) -> None:
    one, two = resolved(models / "tiny"), resolved(models / "tiny", tensor_parallel_size=2)
    assert differing(named(one), named(one, agnostic=False)) >= {"pages"}
    assert differing(named(two, agnostic=False), named(two, agnostic=False)) == set()
    assert differing(named(one, agnostic=False), named(two, agnostic=False)) >= {"pages", "group_0"}
    assert named(two, agnostic=False)["pages"].startswith("v1-hnd of tp=2 pp=1 pcp=1 dcp=1 interleave=1, 2 ranks ")


def test_one_page_that_depends_on_parallelism_is_enough(models: Path) -> None:
    config = resolved(models / "tiny", tensor_parallel_size=2)
    first, second = ranks_of(config)
    pages = (first.groups[0][0], replace(first.groups[0][1], agnostic=False))
    told = components(
        config, cache_of((LAYERS, spec_of(config))), [first, replace(second, groups=(pages,))], "model blake3 00", ""
    )
    assert "tp=2" in told["pages"]


def test_every_group_has_a_component(models: Path) -> None:
    config = resolved(models / "hybrid")
    full, window = (
        spec_of(config),
        SlidingWindowSpec(128, num_kv_heads=4, head_size=32, dtype=torch.float32, sliding_window=512),
    )

    def told(*specs: Any) -> dict[str, str]:
        names = [[f"layers.{2 * number}", f"layers.{2 * number + 1}"] for number in range(len(specs))]
        groups = tuple(tuple(LayerPage(name, 4096, 4096, True) for name in group) for group in names)
        cache = cache_of(*zip(names, specs, strict=True))
        return components(config, cache, [RankLayout(0, 1, "memory", groups)], "model blake3 00", "")

    first = told(full, window)
    assert "sliding_window=512" in first["group_1"]
    assert differing(first, told(full, replace(window, sliding_window=256))) == {"group_1"}
    assert differing(first, told(full, window, window)) == {"group_2"}
    layers = dict.fromkeys(("layers.0", "layers.1"), full)
    uniform = UniformTypeKVCacheSpecs(128, kv_cache_specs=layers)
    other = UniformTypeKVCacheSpecs(128, kv_cache_specs=layers | {"layers.1": replace(full, head_size_v=64)})
    assert differing(told(uniform), told(other)) == {"group_0"}


# --- who never shares -------------------------------------------------------------------------------------------------


def test_random_weights_are_never_shared(models: Path) -> None:
    with pytest.raises(UnsharableError, match="load_format=dummy"):
        named(resolved(models / "tiny", load_format="dummy"))


def test_unknown_weights_are_never_shared(models: Path) -> None:
    with pytest.raises(UnsharableError, match="weights is not known"):
        named(resolved(models / "tiny"), weights="")


def test_workers_that_contradict_are_never_shared(models: Path) -> None:
    config = resolved(models / "tiny", tensor_parallel_size=2)
    cache, (first, second) = cache_of((LAYERS, spec_of(config))), ranks_of(config)
    other = replace(second, groups=(tuple(replace(page, canonical_bytes=1) for page in second.groups[0]),))
    for ranks, reason in (
        ([first, other], "disagree about canonical pages"),
        ([first, replace(second, groups=())], "count KV groups differently"),
        ([], "no worker told"),
    ):
        with pytest.raises(UnsharableError, match=reason):
            components(config, cache, ranks, "model blake3 00", "")


def test_a_layout_that_nobody_decided_on(models: Path) -> None:
    config = resolved(models / "tiny")
    config.cache_config.kv_cache_layout = None
    with pytest.raises(UnsharableError, match="has not decided"):
        named(config)


# --- values in words --------------------------------------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 1


def test_plain_values() -> None:
    values = {1: torch.float32, "a": (1, 2.5, None, True), "set": {"x"}, "colour": Colour.RED, "class": Path}
    told = plain(values)
    assert json.loads(json.dumps(told)) == told
    assert told["1"] == "torch.float32"
    assert told["colour"] == "RED"
    assert told["class"] == "pathlib.Path"
    assert plain({"b", "a", "c"}) == plain({"c", "b", "a"})
    with pytest.raises(UnsharableError, match="can't be compared"):
        plain({"x": object()})


# --- workers ----------------------------------------------------------------------------------------------------------


def layer(backend: str, tokens: int = 128, **attributes: Any) -> SimpleNamespace:
    cache = torch.zeros((2, 1, tokens, 4))
    name = SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(get_attn_backend=lambda: name, kv_cache=cache, **attributes)


def memory(layers: dict[str, SimpleNamespace]) -> str:
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers | {"not.shared": SimpleNamespace()}),
        cache_config=SimpleNamespace(kv_cache_layout="LBNHC"),
    )
    return memory_of(config, layers)


def test_memory_in_words() -> None:
    first = memory({"a": layer("CPU_ATTN", isa="vec"), "b": layer("CPU_ATTN", isa="vec")})
    assert first.startswith("cpu ")
    assert first.endswith(", LBNHC, CPU_ATTN vec 128 tokens")
    assert first == memory({"a": layer("CPU_ATTN", isa="vec")}), "it says nothing of how many layers there are"
    assert first != memory({"a": layer("CPU_ATTN", isa="amx")})
    assert first != memory({"a": layer("CPU_ATTN", isa="vec", tokens=32)})
    mixed = memory({"a": layer("FLASH_ATTN"), "b": layer("TRITON_ATTN")})
    assert mixed != memory({"a": layer("TRITON_ATTN"), "b": layer("FLASH_ATTN")})
    assert "FLASH_ATTN 128 tokens + TRITON_ATTN 128 tokens (" in mixed


def test_memory_of_several_tensors_a_layer() -> None:
    state = SimpleNamespace(kv_cache=[torch.zeros(2, 3), torch.zeros(2, 4)])
    assert memory({"a": state}).endswith(", SimpleNamespace")


ENGINE = """
import sys
from vllm import LLM
from cachesvc.connector.identity import memory_of
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 24)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context
    print("memory:", memory_of(worker.vllm_config, [name for name in layers if hasattr(layers[name], "kv_cache")]))
"""


def test_memory_of_a_real_worker(models: Path) -> None:
    environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(models / "tiny")],
        env={**os.environ, **environ, "VLLM_HOST_IP": "127.0.0.1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("memory: ")]
    assert told, done.stderr[-2000:]
    assert told[0].startswith("memory: cpu ")
    assert told[0].endswith(" 128 tokens")
    assert ", LBHNC, CPU_ATTN " in told[0]
