"""Content identity of LoRA adapters.

vLLM's block hashes know an adapter by name and path only, so its content goes into our keys (`namespace.adapter_key`).
Covers: digests by path, and whether the files are still what the engine loaded. Not here: how files are read and
remembered (`connector.weights`).
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final

from cachesvc.connector.namespace import ADAPTER_BYTES
from cachesvc.connector.weights import (
    SETTLED_NS,
    Memos,
    Signature,
    WeightsError,
    files_in,
    matching,
    sign,
    tree_digest,
)

NOW_BYTES_MAX: Final = 64 << 20
"""A larger adapter is hashed in the background: this much takes some 30 ms of a scheduler's step, once."""

ADAPTERS_MAX: Final = 1024
"""Adapters remembered by one engine; the least recently asked for go first."""

THREADS_MAX: Final = 2

_FILES: Final = ("adapter_*", "new_embeddings*")

Looks = tuple[tuple[str, Signature], ...]
"""Name and signature of each file of an adapter."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What is known of one adapter's path."""

    looks: Looks = ()
    """Name and signature of each of its files, when it was seen first; empty = it wasn't there."""
    digest: bytes | None = None
    reason: str = ""
    refused: bool = False


class Adapters:
    """Content digests of LoRA adapters, by the path that a request names. Thread-safe.

    vLLM loads an adapter once and keeps it, whatever happens to its files. So a digest is given only for files that are
    as they were when the engine started; an adapter that was written or overwritten later has none until the next start
    (nobody outside the worker knows which content it loaded, and when). Who stores a chunk asks again just before: an
    unchanged answer proves that the worker can't have loaded anything else in between. A hub's name has no digest
    either, its directory in the hub's cache has.
    """

    def __init__(
        self,
        *,
        started_ns: int | None = None,
        memos: Memos | None = None,
        now_bytes_max: int = NOW_BYTES_MAX,
    ) -> None:
        self._since_ns = (time.time_ns() if started_ns is None else started_ns) - SETTLED_NS
        self._memos = memos or Memos()
        self._now_bytes_max = now_bytes_max
        self._lock = threading.Lock()  # the entries, and how many threads there are
        self._adapters: OrderedDict[str, _Adapter] = OrderedDict()
        self._threads = 0

    def digest(self, path: str) -> bytes | None:
        """`ADAPTER_BYTES` bytes, or None: not known yet, or never (`reason` says why). Costs a few stats."""
        with self._lock:
            known = self._adapters.get(path)
        if known is not None and known.refused:
            return None
        try:
            looks = _looks_of(path)
        except (OSError, WeightsError) as error:
            self._remember(path, _Adapter(known.looks if known else (), reason=str(error)))
            return None
        if known is None or not known.looks:
            return self._see(path, looks)
        if known.looks != looks:
            self._remember(path, _Adapter(looks, reason=f"{path} changed after it was first used", refused=True))
            return None
        return known.digest if known.digest or not known.reason else self._see(path, looks)

    def reason(self, path: str) -> str:
        """Why this adapter has no digest; empty if it has one, is being read, or was never asked for."""
        with self._lock:
            known = self._adapters.get(path)
        return known.reason if known else ""

    def _see(self, path: str, looks: Looks) -> bytes | None:
        """The digest of an adapter that is new here."""
        if sum(signature[2] for _, signature in looks) <= self._now_bytes_max:
            return self._identify(path, looks, wait=False)
        with self._lock:
            if self._threads >= THREADS_MAX:
                return None
            self._threads += 1
        self._remember(path, _Adapter(looks))
        threading.Thread(target=self._identify_later, args=(path, looks), name="cachesvc-adapter", daemon=True).start()
        return None

    def _identify_later(self, path: str, looks: Looks) -> None:
        try:
            self._identify(path, looks, wait=True)
        finally:
            with self._lock:
                self._threads -= 1

    def _identify(self, path: str, looks: Looks, *, wait: bool) -> bytes | None:
        found = _Adapter(looks)
        try:
            folder = os.path.abspath(os.path.expanduser(path))
            files = files_in("adapter", folder, [name for name, _ in looks], self._since_ns)
            content = files.known.encode() if files.known else tree_digest(files.paths, self._memos, wait=wait)
            if _looks_of(path) == looks:
                found = replace(found, digest=hashlib.blake2b(content, digest_size=ADAPTER_BYTES).digest())
            else:
                found = replace(found, reason=f"{path} changed while it was read", refused=True)
        except (OSError, WeightsError) as error:
            found = replace(found, reason=str(error))
        self._remember(path, found)
        return found.digest

    def _remember(self, path: str, adapter: _Adapter) -> None:
        with self._lock:
            self._adapters[path] = adapter
            self._adapters.move_to_end(path)
            if len(self._adapters) > ADAPTERS_MAX:
                self._adapters.popitem(last=False)


def _looks_of(path: str) -> Looks:
    """Name and signature of every file that vLLM reads of an adapter. OSError or WeightsError if it can't be had."""
    folder = os.path.abspath(os.path.expanduser(path))
    names = sorted(matching(os.listdir(folder), _FILES))
    if not any(name.startswith("adapter_model") for name in names):
        raise WeightsError(f"no adapter in {folder}")
    return tuple((name, sign(os.stat(os.path.join(folder, name)))) for name in names)
