"""How bytes move between a KV cache and extents.

Covers: one layer's page of a run of blocks, in either direction, in memory of the CPU and of a device. Not here: which
runs (`connector.layout`), in which thread and whether it counts (`connector.worker`).

A page's bytes and its place in a row are matched by copy runs (vLLM's `CopyRun`): `num_fragments` fragments of
`fragment_size` bytes, `local_stride` apart in the page and `canonical_stride` apart in the row. One copy of a piece is
therefore a copy between two views of three dimensions (blocks, fragments, bytes), of which the last is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CopyRun

from cachesvc.connector.layout import LayerPage, Piece


@dataclass(frozen=True)
class Page:
    """One layer's pages in this rank's KV cache: `tensor[block]` is the page of a block, in int8."""

    layer: LayerPage
    tensor: torch.Tensor
    """(blocks, bytes); the second dimension is contiguous."""
    runs: tuple[CopyRun, ...]
    writers: tuple[int, int]
    """(n, i): of the n ranks that hold these bytes this is the i-th, and writes the blocks b with b % n == i."""


class Copies(Protocol):
    """Moves bytes. `fence` is called in the engine's thread, the rest in the copy thread."""

    def fence(self) -> Any:
        """A point in the engine's work: what it has been told to do so far comes before a copy that begins there."""

    def begin(self, fence: Any) -> None:
        """A job begins."""

    def copy(self, page: Page, extent: memoryview, piece: Piece, offset: int, *, store: bool) -> int:
        """Copy a piece of `page`, which lies `offset` bytes into the rows of `extent`; how many bytes.

        ValueError: it would go beyond the extent or the KV cache.
        """

    def end(self) -> None:
        """Return when every copy since `begin` is done. Called also when one of them failed."""


class HostCopies:
    """The KV cache is in memory of the CPU. numpy: torch would start threads of its own in each copy.

    Pages of chunks that lie scattered are copied one by one, so what a copy costs beside its bytes counts: 512 of them
    make a prompt of 8k tokens. One thread: two share a memory bus and the GIL, and the engine waits for both.
    """

    def __init__(self) -> None:
        self._arrays: dict[int, Any] = {}
        """The tensors of pages as arrays. By identity: a page lives as long as its worker."""

    def fence(self) -> None:
        """The engine computes in its own thread: what it did is done."""

    def begin(self, fence: Any) -> None:
        """Nothing to wait for."""

    def copy(self, page: Page, extent: memoryview, piece: Piece, offset: int, *, store: bool) -> int:
        """See `Copies`."""
        cache = self._arrays.get(id(page))
        if cache is None:
            cache = self._arrays[id(page)] = page.tensor.numpy()
        copied, count = 0, piece.count
        for run in page.runs:
            start, stride = _check(page, extent, piece, offset, run)
            size, first = run.fragment_size, run.local_offset
            slots: Any
            if run.num_fragments == 1:
                slots = np.ndarray((count, size), np.int8, extent, start, (stride or size, 1))
                blocks = cache[piece.block : piece.block + count, first : first + size]
            else:
                shape = (count, run.num_fragments, size)
                slots = np.ndarray(shape, np.int8, extent, start, (stride, run.canonical_stride, 1))
                strides = (cache.strides[0], run.local_stride, 1)
                blocks = np.lib.stride_tricks.as_strided(cache[piece.block :, first:], shape, strides)
            if store:
                np.copyto(slots, blocks)
            else:
                np.copyto(blocks, slots)
            copied += slots.size
        return copied

    def end(self) -> None:
        """All is done already."""


class TorchCopies:
    """The KV cache is on a device that torch knows; also right, and slower than `HostCopies`, for memory of the CPU.

    Copies run on a stream of their own. It waits for the engine's stream where the job was submitted: the blocks to be
    stored are computed then, and the blocks to be loaded are read by nobody any more.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def fence(self) -> Any:
        """An event in the engine's stream."""
        return torch.cuda.current_stream().record_event() if self._cuda else None

    def begin(self, fence: Any) -> None:
        """Wait, on our stream, for what the engine had been told."""
        if self._stream is not None:
            self._stream.wait_event(fence)

    def copy(self, page: Page, extent: memoryview, piece: Piece, offset: int, *, store: bool) -> int:
        """See `Copies`."""
        copied = 0
        memory = torch.frombuffer(extent, dtype=torch.int8)
        with torch.cuda.stream(self._stream):
            for run in page.runs:
                start, stride = _check(page, extent, piece, offset, run)
                shape = (piece.count, run.num_fragments, run.fragment_size)
                slots = memory.as_strided(shape, (stride, run.canonical_stride, 1), start)
                first = page.tensor.storage_offset() + piece.block * page.tensor.stride(0) + run.local_offset
                blocks = page.tensor.as_strided(shape, (page.tensor.stride(0), run.local_stride, 1), first)
                if store:
                    slots.copy_(blocks, non_blocking=True)
                else:
                    blocks.copy_(slots, non_blocking=True)
                copied += slots.numel()
        return copied

    def end(self) -> None:
        """Wait for our stream."""
        if self._stream is not None:
            self._stream.synchronize()


def copies_for(device: torch.device) -> Copies:
    """What moves bytes from and to this device."""
    return HostCopies() if device.type == "cpu" else TorchCopies(device)


def pages_of(kv_caches: CanonicalKVCaches, names: Sequence[Sequence[str]]) -> list[list[Page]]:
    """The pages of each KV group, in vLLM's order; `names` of the layers of each group."""
    return [
        [
            _page(
                kv_caches.tensors[ref.tensor_idx].tensor, ref, layers[i] if len(layers) == len(refs) else f"tensor {i}"
            )
            for i, ref in enumerate(refs)
        ]
        for refs, layers in zip(kv_caches.group_data_refs, names, strict=True)
    ]


def _page(tensor: torch.Tensor, ref: CanonicalKVCacheRef, name: str) -> Page:
    mapping, size = ref.mapping, ref.page_size_bytes
    if mapping is None:
        whole = CopyRun(0, 0, size, 1, size, size)
        return Page(LayerPage(name, size, size, agnostic=False, own=True), tensor, (whole,), (1, 0))
    layer = LayerPage(
        name, mapping.canonical_page_size_bytes, mapping.local_page_size_bytes, mapping.parallelism_agnostic
    )
    return Page(layer, tensor, mapping.runs, (mapping.num_writers, mapping.writer_index))


def _check(page: Page, extent: memoryview, piece: Piece, offset: int, run: CopyRun) -> tuple[int, int]:
    """Where in the extent the first fragment begins, and the bytes from row to row; ValueError: it doesn't fit."""
    start = piece.offset + offset + run.canonical_offset
    stride = piece.stride
    last = start + (piece.count - 1) * stride + (run.num_fragments - 1) * run.canonical_stride + run.fragment_size
    local = run.local_offset + (run.num_fragments - 1) * run.local_stride + run.fragment_size
    if start < 0 or last > len(extent) or local > page.tensor.shape[1]:
        raise ValueError(f"bytes {start} to {last} of an extent of {len(extent)}, {local} of a page")
    if not 0 <= piece.block <= page.tensor.shape[0] - piece.count:
        raise ValueError(f"blocks {piece.block} and {piece.count - 1} more of {page.tensor.shape[0]}")
    return start, stride
