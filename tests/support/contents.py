"""Chunks that say what they are: who knows a chunk's key can check every byte of it, and who wrote it.

Covers: making and checking contents. Pure. A content is 64-bit words::

    word 0           digest of the key
    word 1           seed: chosen by the writer, so that two writers of one key are told apart
    word 2           length in bytes
    word 3, 4, ...   first(key, seed) + number * odd constant; the last word may be cut off

So bytes of another key, of two writers, of another length, shifted or missing bytes are all seen.
"""

from __future__ import annotations

import functools
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

LENGTH_MIN: Final = 24
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)


def content(key: bytes, seed: int, length: int) -> bytes:
    """The content of `length` bytes that the writer `seed` stores under `key`."""
    assert length >= LENGTH_MIN, f"a content has at least {LENGTH_MIN} bytes, not {length}"
    words = _ramp(-(-length // 8)) + np.uint64(_digest(key, seed))
    words[:3] = _digest(key), seed, length
    return words.tobytes()[:length]


def fault(key: bytes, stored: bytes | bytearray | memoryview) -> str | None:
    """What is wrong with what was read under `key`, None if every byte is right."""
    if len(stored) < LENGTH_MIN:
        return f"{key!r}: {len(stored)} bytes"
    digest, seed, length = np.frombuffer(stored, np.uint64, 3).tolist()
    if digest != _digest(key):
        return f"{key!r}: the bytes of another key"
    if length != len(stored):
        return f"{key!r}: {len(stored)} bytes, {length} were written"
    wrong = np.frombuffer(stored, np.uint8) != np.frombuffer(content(key, seed, length), np.uint8)
    if wrong.any():
        return f"{key!r}: byte {int(wrong.argmax())} of {length} is wrong (seed {seed})"
    return None


def _digest(key: bytes, seed: int | None = None) -> int:
    salt = b"" if seed is None else seed.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=8, salt=salt).digest(), "little")


@functools.lru_cache(maxsize=8)
def _ramp(words: int) -> NDArray[np.uint64]:
    return np.arange(words, dtype=np.uint64) * _ODD
