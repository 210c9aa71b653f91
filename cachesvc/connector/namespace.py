"""What makes bytes interchangeable, as a digest: of named components, and of a LoRA adapter inside a key.

Pure. Covers: the encodings. Not here: which components there are (`connector.identity`), where the content digests come
from (`connector.weights`), why two namespaces differ (`cachesvc namespaces diff`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Final

from cachesvc.types import KEY_BYTES_MAX, NAMESPACE_BYTES, NAMESPACE_CONNECTOR

ADAPTER_BYTES: Final = 16
"""Length of an adapter's content digest: with it a 32-byte block hash and vLLM's group number still make a key."""


def digest(components: Mapping[str, str]) -> bytes:
    """The namespace of these components, `NAMESPACE_BYTES` long; their order doesn't matter.

    ValueError for text that can't be written in UTF-8.
    """
    out = hashlib.blake2b(NAMESPACE_CONNECTOR, digest_size=NAMESPACE_BYTES)
    for name in sorted(components):
        _feed(out, name.encode())
        _feed(out, components[name].encode())
    return out.digest()


def adapter_key(block_hash: bytes, adapter: bytes) -> bytes:
    """The block hash of a request that runs with a LoRA adapter; `adapter` is its content digest.

    Two adapters or two block hashes never give the same key: both stand in it as they are. Nor is it the key of a
    request without adapter, as the block hashes of a namespace all have one length. A suffix of `block_hash` stays one.
    ValueError for a digest of another length than `ADAPTER_BYTES`, and where the two don't fit a key.
    """
    if len(adapter) != ADAPTER_BYTES:
        raise ValueError(f"the digest of an adapter has {ADAPTER_BYTES} bytes, not {len(adapter)}")
    if not 0 < len(block_hash) <= KEY_BYTES_MAX - ADAPTER_BYTES:
        raise ValueError(f"with an adapter a block hash has 1 to {KEY_BYTES_MAX - ADAPTER_BYTES} bytes")
    return adapter + block_hash


def fingerprint(value: object) -> str:
    """32 hex digits of a value made of lists, plain values and mappings with string keys, whose order doesn't matter.

    TypeError for anything else in it.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def group_component(
    spec: str,
    parameters: Mapping[str, str],
    tokens_per_block: int,
    blocks_per_chunk: int,
    pages: Sequence[tuple[str, int]],
) -> str:
    """One KV group in words: its spec, tokens in a block and a chunk, its layers and the bytes of their pages.

    `pages` are (layer, bytes of its page of one block) in the order in which they lie in a chunk.
    """
    shown = ", ".join(f"{name}={parameters[name]}" for name in sorted(parameters))
    sizes = sorted({size for _, size in pages})
    spread = "/".join(str(size) for size in sizes[:4]) + ("..." if len(sizes) > 4 else "")
    layers = fingerprint([[name, size] for name, size in pages])
    return (
        f"{spec}({shown}), {tokens_per_block} tokens a block, {tokens_per_block * blocks_per_chunk} a chunk, "
        f"{len(pages)} layers of {spread} bytes ({layers})"
    )


def ranks_component(ranks: Sequence[Sequence[Sequence[tuple[str, int]]]]) -> str:
    """Who holds what, where pages depend on it: for each rank and group (layer, bytes of its part), as a digest."""
    plain = [[[[name, size] for name, size in group] for group in rank] for rank in ranks]
    return f"{len(ranks)} ranks {fingerprint(plain)}"


def _feed(out: hashlib.blake2b, text: bytes) -> None:
    out.update(len(text).to_bytes(8, "little") + text)
