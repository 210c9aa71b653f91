"""Small random models: the same bytes each time, read back by a reader of the format's own specification.

That vLLM loads them and that their answers depend on the prompt is in `test_child`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cachesvc.demo.model import HYBRID, MID, TINY, Shape, cached_model, write_lora, write_model

SMALL = replace(TINY, hidden=64, heads=2, kv_heads=1, inner=96, vocab=40)


def read(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Code and raw numbers of every tensor; every byte of the file belongs to one."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    data, at, found = raw[8 + header_bytes :], 0, {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert start == at, "no gaps"
        at = end
        numbers = np.frombuffer(data[start:end], {"F32": "<f4", "BF16": "<u2"}[entry["dtype"]])
        found[name] = entry["dtype"], numbers.reshape(entry["shape"])
    assert at == len(data)
    return found


def digest(directory: Path) -> str:
    """Of every file with its name."""
    total = blake2b(digest_size=8)
    for path in sorted(directory.iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, layers=3, window=32)])
def test_same_arguments_same_bytes(shape: Shape, tmp_path: Path) -> None:
    first = digest(write_model(tmp_path / "a", shape, seed=1))
    assert digest(write_model(tmp_path / "b", shape, seed=1)) == first
    assert digest(write_model(tmp_path / "a", shape, seed=1)) == first, "over what is there"
    assert digest(write_model(tmp_path / "c", shape, seed=2)) != first


def test_bytes_are_the_same_everywhere(tmp_path: Path) -> None:
    """If this fails another machine makes another model: raise FORMAT, and write the new digest down."""
    assert digest(write_model(tmp_path, SMALL)) == "18406d74c101c613"


def test_seed_changes_every_matrix_and_no_name(tmp_path: Path) -> None:
    one = read(write_model(tmp_path / "1", SMALL, seed=1) / "model.safetensors")
    two = read(write_model(tmp_path / "2", SMALL, seed=2) / "model.safetensors")
    assert one.keys() == two.keys()
    assert all((one[name][1] == two[name][1]).mean() < 0.01 for name in one if one[name][1].ndim == 2)


def test_numbers(tmp_path: Path) -> None:
    tensors = read(write_model(tmp_path, SMALL, seed=5) / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.weight"][1].shape == (32, 64)
    assert tensors["model.layers.0.mlp.down_proj.weight"][1].shape == (64, 96)
    assert (tensors["model.norm.weight"][1] == 1).all()
    weights = np.concatenate([values.ravel() for _, values in tensors.values() if values.ndim == 2])
    assert abs(float(weights.mean())) < 0.002
    assert float(weights.std()) == pytest.approx(SMALL.spread, rel=0.02)


def test_bfloat16_is_float32_rounded(tmp_path: Path) -> None:
    exact = read(write_model(tmp_path / "a", SMALL, dtype="float32") / "model.safetensors")
    rounded = read(write_model(tmp_path / "b", SMALL, dtype="bfloat16") / "model.safetensors")
    for name, (code, halves) in rounded.items():
        assert code == "BF16"
        wide = (halves.astype(np.uint32) << 16).view(np.float32)
        wanted = exact[name][1]
        # the next one up and down are no nearer
        for step in (1, -1):
            other = ((halves.astype(np.int64) + step).astype(np.uint32) << 16).view(np.float32)
            assert (np.abs(wide - wanted) <= np.abs(other - wanted)).all()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_presets() -> None:
    assert MID.kv_elements_per_token * 2 == 8192
    assert TINY.kv_elements_per_token * 2 == 1024
    assert all(shape.head_dim in (32, 64, 128) for shape in (TINY, MID, HYBRID)), "what vLLM takes on a CPU"


def test_hybrid_has_groups_of_equal_size(tmp_path: Path) -> None:
    config = json.loads((write_model(tmp_path, replace(SMALL, layers=6, window=64)) / "config.json").read_text())
    kinds = config["layer_types"]
    assert kinds.count("full_attention") * 2 == kinds.count("sliding_attention")
    assert config["sliding_window"] == 64
    assert "model.layers.5.self_attn.q_norm.weight" in read(tmp_path / "model.safetensors")


def test_a_word_is_a_token(tmp_path: Path) -> None:
    tokenizer = json.loads((write_model(tmp_path, SMALL) / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(SMALL.vocab))
    assert vocab["w0"] == 3
    assert [token["id"] for token in tokenizer["added_tokens"]] == [0, 1, 2]


def test_impossible_shapes() -> None:
    with pytest.raises(AssertionError, match="evenly"):
        replace(TINY, kv_heads=3)
    with pytest.raises(AssertionError, match="no room"):
        replace(TINY, vocab=3)


def test_adapter(tmp_path: Path) -> None:
    adapter = read(write_lora(tmp_path / "1", SMALL, seed=1, rank=4) / "adapter_model.safetensors")
    assert len(adapter) == SMALL.layers * 2 * 2
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    assert adapter[f"{name}.lora_A.weight"][1].shape == (4, 64)
    assert adapter[f"{name}.lora_B.weight"][1].shape == (32, 4)
    assert digest(write_lora(tmp_path / "2", SMALL, seed=2, rank=4)) != digest(tmp_path / "1")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_cached_model_is_written_once(tmp_path: Path) -> None:
    path = cached_model(SMALL, tmp_path / "cache")
    before = (path / "config.json").stat().st_mtime_ns
    assert cached_model(SMALL, tmp_path / "cache") == path
    assert (path / "config.json").stat().st_mtime_ns == before
    assert digest(path) == digest(write_model(tmp_path / "plain", SMALL))


def test_cached_models_are_told_apart(tmp_path: Path) -> None:
    paths = [cached_model(SMALL, tmp_path), cached_model(SMALL, tmp_path, seed=1)]
    paths += [cached_model(SMALL, tmp_path, dtype="bfloat16"), cached_model(replace(SMALL, spread=0.1), tmp_path)]
    assert len(set(paths)) == 4
    assert sorted(tmp_path.iterdir()) == sorted(paths), "nothing unfinished stays"


def test_somebody_else_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(directory: Path, shape: Shape, **options: Any) -> Path:
        monkeypatch.undo()
        cached_model(SMALL, tmp_path)
        return write_model(directory, shape, **options)

    monkeypatch.setattr("cachesvc.demo.model.write_model", late)
    path = cached_model(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
