"""Under which identity KV bytes of an engine are interchangeable: from vLLM's resolved config to named components.

Covers: everything that changes the bytes of a chunk or the meaning of its key, and nothing else: engines that agree
must share. What isn't sure to be without effect counts. Not here: the content of weights and adapters
(`connector.weights`, `connector.adapters`), the digest (`connector.namespace`); the tenant is the socket's.

Not counted, as they don't change the bytes for a token beyond the last bits: batch sizes, compilation, CUDA graphs,
expert and data parallelism, versions of torch, drivers and devices of one kind.
"""

from __future__ import annotations

import enum
import importlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Final

from cachesvc import config
from cachesvc.connector.layout import RankLayout
from cachesvc.connector.namespace import fingerprint, group_component, ranks_component
from cachesvc.errors import CachesvcError

_WITHOUT_EFFECT: Final = frozenset(
    (
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "max_model_len",
        "quantization_config",
        "transformers_version",
    )
)
"""Of a model's config, at any depth: where it comes from, and what has a component of its own."""

_LENGTH_BLIND_ROPES: Final = frozenset(
    (
        "bailing_mrope",
        "default",
        "deepseek_llama_scaling",
        "deepseek_yarn",
        "linear",
        "llama3",
        "mrope",
        "proportional",
        "yarn",
    )
)
"""Rotary embeddings that are the same for any maximum length."""

_PER_RANK: Final = frozenset(
    (
        "block_size",
        "block_stride_alignment",
        "dcp_sharded",
        "max_tp_shards",
        "num_head_slots",
        "num_kv_heads",
        "page_size_padded",
    )
)
"""Of a KV cache spec: what depends on parallelism or only on where blocks lie; the size of a canonical page says what
is left of it."""

_MULTIMODAL_WITHOUT_EFFECT: Final = frozenset(
    (
        *("allow_missing_mm_embeddings", "enable_mm_embeds", "interleave_mm_strings", "limit_per_prompt"),
        *("mm_encoder_fp8_scale_save_margin", "mm_encoder_fp8_scale_save_path", "mm_encoder_tp_mode"),
        *("mm_hasher_algorithm", "mm_ipc_gpu_memory_gb", "mm_processor_cache_gb", "mm_processor_cache_type"),
        *("mm_shm_cache_max_object_size_mb", "mm_tensor_ipc", "skip_mm_profiling"),
    )
)

_SPECULATION_WITHOUT_KV: Final = ("ngram", "ngram_gpu", "suffix")

_LOADER_WITHOUT_EFFECT: Final = frozenset(
    ("concurrency", "distributed", "enable_multithread_load", "enable_weights_track", "memory_limit", "num_threads")
)


class UnsharableError(CachesvcError, ValueError):
    """The KV bytes of this engine mean nothing to another one, or nobody can say what they mean: it caches nothing."""


# --- scheduler side ---------------------------------------------------------------------------------------------------


def components(
    vllm_config: Any, kv_cache_config: Any, ranks: Sequence[RankLayout], weights: str, epoch: str
) -> dict[str, str]:
    """The named components of an engine's namespace; `ranks` are all its workers, in the order of their ranks.

    `weights`: `connector.weights.content_digest`; `epoch`: of the last reset, empty at first. UnsharableError says why
    this engine must not share.
    """
    _refuse_unsharable(vllm_config, weights)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    named = {
        "weights": weights,
        "loader": _loader(vllm_config.load_config),
        "model_config": _config_digest(model),
        "implementation": _implementation(model),
        "max_length": _max_length(model),
        "quantization": _quantization(model),
        "dtype": _short(model.dtype),
        "kv_dtype": _kv_dtype(model, cache),
        "speculative": _speculative(vllm_config.speculative_config),
        "multimodal": _multimodal(getattr(model, "multimodal_config", None)),
        "vllm": minor_version(importlib.import_module("vllm").__version__),
        "memory": " | ".join(sorted({rank.memory for rank in ranks})),
        "hash": f"{cache.prefix_caching_hash_algo}, seed {config.hash_seed()}",
        "epoch": epoch,
    }
    return named | _groups(vllm_config, kv_cache_config, ranks) | _parallelism(vllm_config, ranks)


def _refuse_unsharable(vllm_config: Any, weights: str) -> None:
    if not weights:
        raise UnsharableError("the content of the weights is not known")
    loads = [vllm_config.load_config, getattr(vllm_config.speculative_config, "draft_load_config", None)]
    if any(load is not None and str(load.load_format) == "dummy" for load in loads):
        raise UnsharableError("load_format=dummy: random weights")
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if getattr(multimodal, "mm_encoder_attn_dtype", None) and not getattr(
        multimodal, "mm_encoder_fp8_scale_path", None
    ):
        raise UnsharableError("mm_encoder_attn_dtype without mm_encoder_fp8_scale_path: scales computed at run time")


def minor_version(version: str) -> str:
    """`0.32` of `0.32.1+cpu`; a development version stands for itself, as anything may have changed since."""
    public, _, _ = version.partition("+")
    numbers = public.split(".")
    released = len(numbers) >= 2 and all(number.isdigit() or "post" in number for number in numbers)
    return ".".join(numbers[:2]) if released else version


def _loader(load: Any) -> str:
    """How files become weights: `sharded_state` takes some of them, by a pattern."""
    extra = load.model_loader_extra_config
    extra = extra if isinstance(extra, Mapping) else {"config": str(extra)}
    kept = {str(key): plain(extra[key]) for key in extra if key not in _LOADER_WITHOUT_EFFECT}
    # the default loader reads the same tensors whatever it is called
    kind = str(load.load_format) if str(load.load_format) in ("sharded_state", "mistral", "gguf") else "files"
    return f"{kind} {fingerprint(kept)}" if kept else kind


def _config_digest(model: Any) -> str:
    """Of the model's config after overrides, with the kind of model in front."""
    hf_config = model.hf_config
    whole = plain(hf_config)
    assert isinstance(whole, dict)
    if not model.trust_remote_code:
        whole.pop("auto_map", None)  # whose code isn't run; the hub's cache writes other names into it than it has
    return f"{getattr(hf_config, 'model_type', 'unknown')} {fingerprint(whole)}"


def _implementation(model: Any) -> str:
    overrides = getattr(model, "model_class_overrides", None)
    return str(model.architecture) + (f", overridden by {fingerprint(plain(overrides))}" if overrides else "")


def _max_length(model: Any) -> str:
    """The maximum length, where the model computes something else below another one."""
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [one for one in rope.values() if isinstance(one, Mapping)] if isinstance(rope, Mapping) else []
    kinds = {str(one.get("rope_type", one.get("type", "default"))) for one in [*nested, *([] if nested else [rope])]}
    if kinds <= _LENGTH_BLIND_ROPES and not str(getattr(text, "model_type", "")).startswith("llama4"):
        return "no effect"
    tuning = getattr(model, "override_generation_config", None)
    return f"{model.max_model_len}" + (f", generation {fingerprint(plain(tuning))}" if tuning else "")


def _quantization(model: Any) -> str:
    """The method, the checkpoint's own settings and the user's."""
    checkpoint = getattr(model.hf_config, "quantization_config", None)
    checkpoint = checkpoint or getattr(model.hf_text_config, "quantization_config", None)
    asked = getattr(model, "quantization_config", None)
    parts = [str(getattr(model.quantization, "value", model.quantization) or "none")]
    parts += [f"checkpoint {fingerprint(plain(checkpoint))}"] if checkpoint else []
    parts += [f"asked {fingerprint(plain(asked))}"] if asked else []
    return ", ".join(parts)


def _kv_dtype(model: Any, cache: Any) -> str:
    dtype = _short(model.dtype) if cache.cache_dtype == "auto" else str(cache.cache_dtype)
    skipped = getattr(cache, "kv_cache_dtype_skip_layers", None) or []
    parts = [dtype]
    parts += [f"not in {'/'.join(sorted(map(str, skipped)))}"] if skipped else []
    parts += [f"replayssm {cache.replayssm_buffer_len}"] if getattr(cache, "use_replayssm", False) else []
    return ", ".join(parts)


def _speculative(speculative: Any) -> str:
    """Method and draft model: its layers have KV in the chunks, or its look-ahead changes which blocks there are."""
    if speculative is None:
        return "none"
    method = str(speculative.method)
    if method in _SPECULATION_WITHOUT_KV:
        return method
    draft = getattr(speculative, "draft_model_config", None)
    told = {
        "model": speculative.model if draft is None else "",
        "config": None if draft is None else _config_digest(draft),
        "quantization": None if draft is None else _quantization(draft),
        "dtype": None if draft is None else _short(draft.dtype),
        "kv_dtype": speculative.kv_cache_dtype,
        "parallel_drafting": bool(getattr(speculative, "parallel_drafting", False)),
    }
    return f"{method}, {speculative.num_speculative_tokens} tokens, {fingerprint(told)}"


def _multimodal(multimodal: Any) -> str:
    """How media become embeddings, less what a media item's own hash holds."""
    if multimodal is None:
        return "none"
    told = {one.name: plain(getattr(multimodal, one.name)) for one in fields(multimodal)}
    return fingerprint({name: value for name, value in told.items() if name not in _MULTIMODAL_WITHOUT_EFFECT})


# --- groups and parallelism -------------------------------------------------------------------------------------------


def _agnostic(ranks: Sequence[RankLayout]) -> bool:
    """Whether chunks are the same under any parallelism: vLLM certifies it of every layer of every rank."""
    pages = [page for rank in ranks for group in rank.groups for page in group]
    return bool(pages) and all(page.agnostic for page in pages)


def _groups(vllm_config: Any, kv_cache_config: Any, ranks: Sequence[RankLayout]) -> dict[str, str]:
    """One component a KV group. The first rank speaks for all where every page is a canonical one."""
    if not ranks:
        raise UnsharableError("no worker told the layout of its KV cache")
    every = kv_cache_config.kv_cache_groups
    chosen = [every[number] for number in getattr(kv_cache_config, "prefix_cacheable_group_ids", range(len(every)))]
    if any(len(rank.groups) != len(chosen) for rank in ranks):
        raise UnsharableError("scheduler and workers count KV groups differently")
    agnostic = _agnostic(ranks)
    if agnostic and len({_canonical_pages(rank) for rank in ranks}) > 1:
        raise UnsharableError("the ranks disagree about canonical pages")
    shown = ranks[:1] if agnostic else ranks
    named = {}
    for number, group in enumerate(chosen):
        spec = group.kv_cache_spec
        span = vllm_config.parallel_config.decode_context_parallel_size if getattr(spec, "dcp_sharded", True) else 1
        tokens = spec.block_size * span
        pages = [(page.name, page.canonical_bytes) for rank in shown for page in rank.groups[number]]
        named[f"group_{number}"] = group_component(
            type(spec).__name__,
            _parameters(spec, agnostic=agnostic),
            tokens,
            _blocks_per_chunk(vllm_config, tokens),
            pages,
        )
    return named


def _canonical_pages(rank: RankLayout) -> tuple[tuple[tuple[str, int], ...], ...]:
    return tuple(tuple((page.name, page.canonical_bytes) for page in group) for group in rank.groups)


def _parameters(spec: Any, *, agnostic: bool) -> dict[str, str]:
    """What a spec says, in words; a group of unequal layers as a digest."""
    told = {}
    for one in fields(spec):
        value = getattr(spec, one.name)
        if (agnostic and one.name in _PER_RANK) or one.name == "block_size" or value is None:
            continue
        if isinstance(value, Mapping):  # layers that differ
            layers = {str(name): _parameters(value[name], agnostic=agnostic) for name in value}
            told[one.name] = fingerprint(layers)
        else:
            told[one.name] = _short(plain(value))
    return told


def _blocks_per_chunk(vllm_config: Any, tokens_per_block: int) -> int:
    """As vLLM reads it from the connector's settings."""
    transfer = vllm_config.kv_transfer_config
    extra = {} if transfer is None else transfer.kv_connector_extra_config
    if extra.get("block_size") is not None:
        return int(extra["block_size"]) // tokens_per_block
    return int(extra.get("blocks_per_chunk") or 1)


def _parallelism(vllm_config: Any, ranks: Sequence[RankLayout]) -> dict[str, str]:
    """The format of a chunk's pages: vLLM's canonical one for any parallelism, or that of just this one."""
    if _agnostic(ranks):
        return {"pages": f"canonical {_canonical_format(vllm_config)}, any parallelism"}
    parallel = vllm_config.parallel_config
    sizes = {
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "pcp": getattr(parallel, "prefill_context_parallel_size", 1),
        "dcp": parallel.decode_context_parallel_size,
        "interleave": getattr(parallel, "cp_kv_cache_interleave_size", 1),
    }
    held = [[[(page.name, page.local_bytes) for page in group] for group in rank.groups] for rank in ranks]
    shown = " ".join(f"{name}={size}" for name, size in sizes.items())
    return {"pages": f"{_canonical_format(vllm_config)} of {shown}, {ranks_component(held)}"}


def _canonical_format(vllm_config: Any) -> str:
    """How vLLM calls the format of its canonical pages."""
    layout = vllm_config.cache_config.kv_cache_layout
    if layout is None:
        raise UnsharableError("vLLM has not decided on a KV layout")
    mapping = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping")
    return str(mapping.canonical_format_id(layout))


# --- worker side ------------------------------------------------------------------------------------------------------


def memory_of(vllm_config: Any, layers: Iterable[str]) -> str:
    """How the bytes of this worker's KV caches are to be read: device, layout, attention backends, CPU ISA, and tokens
    in a kernel's block. The same under any parallelism, as far as vLLM chooses the same.

    `layers` are those whose KV is shared; vLLM has bound their caches to them when it registers these with a connector.
    """
    forward = vllm_config.compilation_config.static_forward_context
    kept = {name: forward[name] for name in layers}
    read_by = {name: _reader(layer) for name, layer in kept.items()}
    kinds = sorted(set(read_by.values()))
    # which layer is read by which matters where there are several
    spread = f" ({fingerprint(read_by)})" if len(kinds) > 1 else ""
    device = _device([tensor for layer in kept.values() for tensor in _tensors(layer)])
    return f"{device}, {vllm_config.cache_config.kv_cache_layout}, {' + '.join(kinds)}{spread}"


def _tensors(layer: Any) -> list[Any]:
    cache = layer.kv_cache
    return list(cache) if isinstance(cache, list | tuple) else [cache]


def _reader(layer: Any) -> str:
    """The backend that reads and writes a layer's pages, and in which steps."""
    backend = layer.get_attn_backend().get_name() if hasattr(layer, "get_attn_backend") else type(layer).__name__
    isa = getattr(layer, "isa", None)  # the CPU backend packs keys for the instructions that it found
    # [blocks, heads, tokens, content]: a block of the manager may be several of the kernel's, one after the other
    tokens = {f" {tensor.shape[2]} tokens" for tensor in _tensors(layer) if tensor.ndim == 4}
    return backend + (f" {isa}" if isa else "") + "".join(sorted(tokens))


def _device(tensors: Iterable[Any]) -> str:
    kinds = sorted({str(tensor.device.type) for tensor in tensors})
    if kinds == ["cpu"]:
        torch = importlib.import_module("torch")
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return "/".join(kinds)


# --- values in words --------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value of vLLM's config as mappings with string keys, lists and plain values. UnsharableError if it can't be."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in value if key not in _WITHOUT_EFFECT}
    if isinstance(value, set | frozenset):
        return sorted(fingerprint(plain(one)) for one in value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "to_dict") and not isinstance(value, type):  # a model's config: it has more than its fields
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return _named(value)


def _named(value: Any) -> str:
    """Classes, functions, dtypes and numbers of other kinds, by their names."""
    if isinstance(value, type) or callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    text = str(value)
    if " object at 0x" in text:
        raise UnsharableError(f"a {type(value).__name__} in the config can't be compared between engines")
    return text


def _short(value: Any) -> str:
    """A plain value as it stands in a component."""
    if isinstance(value, list | dict):
        return fingerprint(value)
    return str(value).removeprefix("torch.")
