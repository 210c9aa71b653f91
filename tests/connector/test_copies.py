"""Both ways of moving bytes do the same, and that is what a loop over single bytes does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    CanonicalPageMapping,
    CopyRun,
)

from cachesvc.connector.copies import Copies, HostCopies, Page, TorchCopies, copies_for, pages_of
from cachesvc.connector.layout import LayerPage, Piece
from tests.support.kv import copy_page, memory, part_page, whole_page

KINDS = [
    pytest.param((HostCopies, "cpu"), id="host"),
    pytest.param((lambda: TorchCopies(torch.device("cpu")), "cpu"), id="torch"),
    pytest.param(
        (lambda: TorchCopies(torch.device("cuda")), "cuda"),
        id="cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")],
    ),
]


def move(copies: Copies, page: Page, extent: bytearray, piece: Piece, offset: int, *, store: bool) -> int:
    copies.begin(copies.fence())
    try:
        return copies.copy(page, memoryview(extent), piece, offset, store=store)
    finally:
        copies.end()


def byte_by_byte(page: Page, extent: bytearray, piece: Piece, offset: int, *, store: bool) -> np.ndarray[Any, Any]:
    """What it should be: the tensor afterwards; the extent is changed in place."""
    cache: np.ndarray[Any, Any] = page.tensor.cpu().numpy().copy()
    for row in range(piece.count):
        for run in page.runs:
            for fragment in range(run.num_fragments):
                slot = piece.offset + row * piece.stride + offset + run.canonical_offset
                slot += fragment * run.canonical_stride
                local = run.local_offset + fragment * run.local_stride
                if store:
                    some = cache[piece.block + row, local : local + run.fragment_size]
                    extent[slot : slot + run.fragment_size] = some.tobytes()
                else:
                    some = np.frombuffer(extent[slot : slot + run.fragment_size], np.int8)
                    cache[piece.block + row, local : local + run.fragment_size] = some
    return cache


@st.composite
def transfers(draw: st.DrawFn) -> tuple[int, tuple[CopyRun, ...], int, Piece, int, int]:
    """Page bytes, runs, blocks, piece, offset of the page in a row, bytes of the extent: anything that fits."""
    fragment, fragments = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    world, rank = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    rank %= world
    heads = draw(st.integers(1, 3))
    # heads of a token together (NHD), or tokens of a head (HND): the fragments of a page stand in either order
    inner, outer = (fragment * heads, 1) if draw(st.booleans()) else (fragment, heads)
    runs = tuple(
        CopyRun(
            local_offset=i * inner * fragments,
            canonical_offset=(rank * outer + i) * inner * fragments if outer > 1 or world == 1 else rank * inner,
            fragment_size=inner,
            num_fragments=fragments,
            local_stride=inner,
            canonical_stride=inner if outer > 1 or world == 1 else inner * world,
        )
        for i in range(outer)
    )
    local = inner * outer * fragments
    padding, gap = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    offset, start, count = draw(st.integers(0, 7)), draw(st.integers(0, 9)), draw(st.integers(1, 4))
    row = offset + local * world
    stride = row + gap if count > 1 else 0
    before = draw(st.integers(0, 3))
    blocks = before + count + draw(st.integers(0, 2))
    extent = start + stride * (count - 1) + row + draw(st.integers(0, 5))
    return local + padding, runs, blocks, Piece(1, start, stride, before, count), offset, extent


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(case=transfers(), store=st.booleans(), seed=st.integers(0, 99))
def test_runs_are_copied_and_nothing_else(kind: Any, case: Any, store: bool, seed: int) -> None:
    make, device = kind
    page_bytes, runs, blocks, piece, offset, size = case
    torch.manual_seed(seed)
    tensor = memory(blocks, page_bytes, device)
    page = Page(LayerPage("l", page_bytes, page_bytes, agnostic=True), tensor, runs, (1, 0))
    extent = bytearray(np.random.default_rng(seed).bytes(size))
    wanted = bytearray(extent)
    cache = byte_by_byte(page, wanted, piece, offset, store=store)
    assert move(make(), page, extent, piece, offset, store=store) == piece.count * sum(
        run.fragment_size * run.num_fragments for run in runs
    )
    assert extent == wanted
    assert np.array_equal(tensor.cpu().numpy(), cache)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_a_view_of_another(kind: Any) -> None:
    """VLLM's layers may lie in one memory, with the pages of others between them."""
    make, device = kind
    whole = memory(6, 30, device)
    before = whole.clone()
    page = whole_page("l", whole[:, 10:20])
    extent = bytearray(100)
    move(make(), page, extent, Piece(1, 5, 10, 2, 3), 1, store=True)
    assert bytes(extent[6:36]) == whole[2:5, 10:20].cpu().numpy().tobytes()
    assert extent.count(0) >= 70 - 1
    extent[6:36] = bytes(range(30))
    move(make(), page, extent, Piece(1, 5, 10, 2, 3), 1, store=False)
    assert whole[2:5, 10:20].cpu().numpy().tobytes() == bytes(range(30))
    before[2:5, 10:20] = whole[2:5, 10:20]
    assert torch.equal(whole, before)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_all_ranks_are_the_whole_page(kind: Any) -> None:
    make, device = kind
    tokens, heads, world = 4, 6, 2
    whole = memory(3, tokens * heads * world, device)
    split = whole.reshape(3, tokens, world, heads)
    extent, wanted = bytearray(300), bytearray(300)
    move(make(), whole_page("l", whole), wanted, Piece(1, 0, 60, 0, 3), 2, store=True)
    for rank in range(world):
        part = part_page("l", split[:, :, rank].reshape(3, -1).contiguous(), rank, world, tokens=tokens)
        move(make(), part, extent, Piece(1, 0, 60, 0, 3), 2, store=True)
    assert extent == wanted
    for rank in range(world):
        again = part_page("l", memory(3, tokens * heads, device), rank, world, tokens=tokens)
        move(make(), again, extent, Piece(1, 0, 60, 0, 3), 2, store=False)
        assert torch.equal(again.tensor, split[:, :, rank].reshape(3, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize(
    ("piece", "offset"),
    [
        (Piece(1, 91, 0, 0, 1), 0),
        (Piece(1, 0, 10, 0, 4), 61),
        (Piece(1, 0, 31, 0, 4), 0),
        (Piece(1, -1, 0, 0, 1), 0),
        (Piece(1, 0, 0, 4, 1), 0),
        (Piece(1, 0, 10, 1, 4), 0),
        (Piece(1, 0, 0, -1, 1), 0),
    ],
)
def test_what_goes_beyond_is_refused_and_nothing_changes(kind: Any, store: bool, piece: Piece, offset: int) -> None:
    make, device = kind
    tensor, extent = memory(4, 10, device), bytearray(100)
    before = tensor.clone()
    with pytest.raises(ValueError, match=r"of an extent of 100|of 4"):
        move(make(), whole_page("l", tensor), extent, piece, offset, store=store)
    assert extent == bytearray(100)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_beyond_the_page_is_refused(kind: Any) -> None:
    make, device = kind
    page = Page(LayerPage("l", 20, 20, agnostic=True), memory(4, 10, device), (CopyRun(5, 0, 3, 2, 3, 3),), (1, 0))
    with pytest.raises(ValueError, match="11 of a page"):
        move(make(), page, bytearray(100), Piece(1, 0, 0, 0, 1), 0, store=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_store_waits_for_what_the_engine_was_told() -> None:
    """The fence is taken while a long kernel still computes what is to be stored."""
    copies, tensor = TorchCopies(torch.device("cuda")), torch.zeros(1, 1 << 20, dtype=torch.int8, device="cuda")
    extent = torch.zeros(1 << 20, dtype=torch.int8).pin_memory()
    square = torch.ones(4096, 4096, device="cuda")
    for _ in range(30):
        square = square @ square / 4096
    tensor += 1 + (square[0, 0] * 0).to(torch.int8)
    fence = copies.fence()
    copies.begin(fence)
    copies.copy(whole_page("l", tensor), memoryview(extent.numpy()).cast("B"), Piece(1, 0, 0, 0, 1), 0, store=True)
    copies.end()
    assert bool((extent == 1).all())


def test_who_copies_for_whom() -> None:
    assert isinstance(copies_for(torch.device("cpu")), HostCopies)


# --- from vLLM's description ----------------------------------------------------------------------------------------


def test_pages_as_vllm_describes_them() -> None:
    runs = (CopyRun(0, 8, 8, 1, 8, 8),)
    mapping = CanonicalPageMapping(16, 8, runs, 4, 3, parallelism_agnostic=True)
    tensors = [CanonicalKVCacheTensor(memory(2, 8), 8), CanonicalKVCacheTensor(memory(2, 32), 32)]
    caches = CanonicalKVCaches(
        tensors,
        [[CanonicalKVCacheRef(0, 8, mapping)], [CanonicalKVCacheRef(1, 24), CanonicalKVCacheRef(0, 8)]],
    )
    (first,), (second, third) = pages_of(caches, [["a"], ["b", "c"]])
    assert first == Page(LayerPage("a", 16, 8, agnostic=True), tensors[0].tensor, runs, (4, 3))
    assert second.layer == LayerPage("b", 24, 24, agnostic=False, own=True)
    assert second.tensor is tensors[1].tensor
    assert second.runs == (CopyRun(0, 0, 24, 1, 24, 24),)
    assert third.tensor is tensors[0].tensor


def test_layers_that_share_a_tensor_are_named_by_it() -> None:
    caches = CanonicalKVCaches([CanonicalKVCacheTensor(memory(2, 8), 8)], [[CanonicalKVCacheRef(0, 8)]])
    ((page,),) = pages_of(caches, [["a", "b"]])
    assert page.layer.name == "tensor 0"


def test_turns_are_those_of_vllm() -> None:
    for writers, index in ((1, 0), (4, 0), (4, 3)):
        mapping = CanonicalPageMapping(8, 8, (), writers, index, parallelism_agnostic=True)
        count, mine = copy_page("l", memory(1, 8), index, writers).writers
        assert [mapping.is_writer(block) for block in range(9)] == [block % count == mine for block in range(9)]
