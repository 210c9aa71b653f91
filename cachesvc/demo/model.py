"""Small random models that vLLM loads without a network: config, weights and tokenizer, written with numpy and JSON.

Covers: Llama-type models (one KV group), Gemma-3-type text models (several KV groups), LoRA adapters for the first.
Not here: anything trained. The same arguments give the same bytes on every machine, so that engines on two nodes share.

The weights are spread far wider than a trained model's: else greedy output hardly depends on the prompt, and wrong KV
bytes would go unseen.

A weights file (safetensors)::

    8 bytes   length of the header, little endian
    header    JSON: name -> dtype, shape, [first byte, last byte + 1] counted from the end of the header; padded with
              spaces to a multiple of 8
    data      the tensors, in the order of the header, row-major
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["float32", "bfloat16"]

CONTEXT_TOKENS: Final = 32768
SPECIAL_TOKENS: Final = ("<unk>", "<s>", "</s>")
"""Ids 0, 1, 2; the word `w<n>` is id n + 3."""

FORMAT: Final = 1
"""Part of a cached model's name: raise it whenever other bytes come out of here."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model looks like. `spread` is the standard deviation of its weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Width of the feed-forward layers."""
    vocab: int
    spread: float = 0.08
    window: int = 0
    """Tokens that a sliding-window layer sees; 0 = a Llama, where every layer sees everything."""
    full_every: int = 3
    """With a window: each so manieth layer sees everything. vLLM makes as many KV groups of equally many layers."""

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0, f"{self.heads} heads can't share {self.kv_heads} KV heads evenly"
        assert self.vocab > len(SPECIAL_TOKENS), f"a vocabulary of {self.vocab} has no room for words"

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers of KV cache that all layers together keep of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


TINY: Final = Shape(layers=2, hidden=256, heads=8, kv_heads=4, head_dim=32, inner=512, vocab=2048)
"""Starts and answers at once; 1 KiB of KV a token in bfloat16."""
MID: Final = Shape(layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, inner=1408, vocab=4096)
"""Heavy enough for a hit to be seen: 28 M parameters, 8 KiB of KV a token in bfloat16, 16 KiB in float32."""
HYBRID: Final = Shape(
    layers=6, hidden=256, heads=8, kv_heads=4, head_dim=32, inner=512, vocab=2048, spread=0.3, window=512
)
"""Three KV groups of two layers each: one sees everything, two a window of 512 tokens."""

# --- writing ----------------------------------------------------------------------------------------------------------


def write_model(directory: Path, shape: Shape, *, seed: int = 0, dtype: Dtype = "float32") -> Path:
    """Write a whole model into `directory` (made if missing, files of the same names replaced); returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", _gemma_config(shape, dtype) if shape.window else _llama_config(shape, dtype))
    _write_tokenizer(directory, shape.vocab)
    _write_safetensors(directory / "model.safetensors", _tensors(shape), shape.spread, seed, dtype)
    return directory


def cached_model(shape: Shape, cache: Path, *, seed: int = 0, dtype: Dtype = "float32") -> Path:
    """The model in `cache`, written first if it isn't there; whoever writes it at the same time writes the same."""
    digest = crc32(repr((FORMAT, shape, seed, dtype)).encode())
    path = cache / f"model-{shape.layers}x{shape.hidden}-{dtype}-{digest:08x}"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=cache))
    try:
        write_model(unfinished, shape, seed=seed, dtype=dtype)
        try:
            os.rename(unfinished, path)
        except OSError:
            # somebody else was faster: a directory that isn't empty is never replaced
            if not path.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def write_lora(directory: Path, shape: Shape, *, seed: int, rank: int = 8, dtype: Dtype = "float32") -> Path:
    """Write a LoRA adapter of a Llama-type `shape` into `directory`; the adapter changes what the model says."""
    assert not shape.window, "adapters are written for Llama-type models only"
    directory.mkdir(parents=True, exist_ok=True)
    targets = ("q_proj", "v_proj")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
    }
    sizes = _projections(shape)
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        for target in targets:
            rows, columns = sizes[f"self_attn.{target}"]
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{name}.lora_A.weight"] = (rank, columns)
            tensors[f"{name}.lora_B.weight"] = (rows, rank)
    _write_json(directory / "adapter_config.json", config)
    _write_safetensors(directory / "adapter_model.safetensors", tensors, 2 * shape.spread, seed, dtype)
    return directory


# --- config and tokenizer ---------------------------------------------------------------------------------------------


def _common_config(shape: Shape, dtype: Dtype) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "initializer_range": shape.spread,
        "intermediate_size": shape.inner,
        "max_position_embeddings": CONTEXT_TOKENS,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": SPECIAL_TOKENS.index("<unk>"),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def _llama_config(shape: Shape, dtype: Dtype) -> dict[str, Any]:
    return _common_config(shape, dtype) | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
        "rope_theta": 10000.0,
    }


def _gemma_config(shape: Shape, dtype: Dtype) -> dict[str, Any]:
    kinds = ["full_attention" if _sees_all(shape, layer) else "sliding_attention" for layer in range(shape.layers)]
    return _common_config(shape, dtype) | {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": shape.head_dim,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "sliding_window": shape.window,
    }


def _sees_all(shape: Shape, layer: int) -> bool:
    return (layer + 1) % shape.full_every == 0


def _write_tokenizer(directory: Path, vocab: int) -> None:
    """One word, one token: a text of n words is n tokens, and decoding gives the words back."""
    specials = [
        {"id": number, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, token in enumerate(SPECIAL_TOKENS)
    ]
    words = [f"w{number}" for number in range(vocab - len(SPECIAL_TOKENS))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: number for number, token in enumerate((*SPECIAL_TOKENS, *words))},
            "unk_token": "<unk>",
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    settings = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


# --- weights ----------------------------------------------------------------------------------------------------------


def _projections(shape: Shape) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the matrices of one layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.inner, shape.hidden),
        "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner),
    }


def _norms(shape: Shape) -> dict[str, int]:
    """Width of the norms of one layer."""
    norms = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden}
    if shape.window:
        norms |= {"pre_feedforward_layernorm": shape.hidden, "post_feedforward_layernorm": shape.hidden}
        norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
    return norms


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights, in the order of the file; the norms are those with one dimension."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        for name, size in _projections(shape).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = size
        for name, width in _norms(shape).items():
            tensors[f"model.layers.{layer}.{name}.weight"] = (width,)
    tensors["model.norm.weight"] = (shape.hidden,)
    tensors["lm_head.weight"] = (shape.vocab, shape.hidden)
    return tensors


def _write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], spread: float, seed: int, dtype: Dtype) -> None:
    encode, item_bytes, code = (_bfloat16, 2, "BF16") if dtype == "bfloat16" else (_float32, 4, "F32")
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in tensors.items():
        end = at + item_bytes * int(np.prod(size))
        entries[name] = {"dtype": code, "shape": list(size), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for values in _values(tensors, spread, seed):
            file.write(encode(values).tobytes())


def _values(tensors: dict[str, tuple[int, ...]], spread: float, seed: int) -> Iterator[NDArray[np.float32]]:
    """Uniform numbers with this standard deviation for every matrix, 1 for what has one dimension.

    Made from raw bits by exact steps: numpy keeps the bits of a seed forever, of its distributions it doesn't.
    """
    bits = np.random.PCG64(seed)
    for size in tensors.values():
        count = int(np.prod(size))
        if len(size) == 1:
            yield np.ones(count, np.float32)
            continue
        words = bits.random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]
        # 24 bits, exactly: -2^23 .. 2^23 - 1, of which a float32 holds every one
        whole = (words >> 8).astype(np.int32) - (1 << 23)
        yield whole.astype(np.float32) * np.float32(spread * 3**0.5 / (1 << 23))


def _float32(values: NDArray[np.float32]) -> NDArray[np.generic]:
    return values.astype("<f4")


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.generic]:
    """The upper halves, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
