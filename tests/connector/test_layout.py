"""Where bytes lie: chunks of all shapes, rows, and pieces that are the same rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.connector.layout import (
    CHUNK_TOKENS_MAX,
    GroupLayout,
    LayerPage,
    Piece,
    RankLayout,
    blocks_per_chunk,
    join,
    pieces,
    rows,
)

MIB = 1 << 20


def shared(name: str, canonical: int, local: int | None = None) -> LayerPage:
    return LayerPage(name, canonical, canonical if local is None else local, agnostic=True)


def own(name: str, size: int) -> LayerPage:
    return LayerPage(name, size, size, agnostic=False, own=True)


def ranks(*groups_of_each: tuple[tuple[LayerPage, ...], ...]) -> list[RankLayout]:
    return [RankLayout(rank, len(groups_of_each), "cpu", groups) for rank, groups in enumerate(groups_of_each)]


# --- how many blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row_bytes", "tokens", "blocks"),
    [
        ([MIB], [16], 1),
        ([MIB - 1], [16], 2),
        ([MIB // 4], [16], 4),
        ([MIB // 4 + 1], [16], 4),
        ([4 * MIB], [128], 1),
        ([1], [16], CHUNK_TOKENS_MAX // 16),
        ([1], [128], 2),
        ([1], [CHUNK_TOKENS_MAX], 1),
        ([1], [1000], 1),
        ([0], [16], 16),
        ([MIB // 8, MIB // 2], [16, 16], 2),
        ([1, 1], [16, 64], 4),
    ],
)
def test_blocks_per_chunk(row_bytes: list[int], tokens: list[int], blocks: int) -> None:
    assert blocks_per_chunk(row_bytes, tokens) == blocks


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_layers_of_one_rank_lie_one_after_the_other() -> None:
    (group,) = join(ranks(((shared("a", 100), shared("b", 60)),)), 3)
    assert group == GroupLayout(3, 160, ((0, 100),))
    assert group.chunk_bytes == 480


def test_shared_pages_have_one_place_for_all_ranks() -> None:
    half = (shared("a", 100, 50), shared("b", 60, 30))
    (group,) = join(ranks((half,), (half,)), 2)
    assert group == GroupLayout(2, 160, ((0, 100), (0, 100)))
    assert group == GroupLayout(2, 160, join(ranks(((shared("a", 100), shared("b", 60)),)), 2)[0].offsets * 2)


def test_own_pages_come_behind_the_shared_ones_rank_by_rank() -> None:
    first = (own("x", 10), shared("a", 100, 50), own("y", 20))
    second = (own("x", 30), shared("a", 100, 50), own("y", 40))
    (group,) = join(ranks((first,), (second,)), 1)
    assert group == GroupLayout(1, 200, ((100, 0, 110), (130, 0, 160)))


def test_every_group_has_its_own_chunk() -> None:
    groups = join(ranks(((shared("a", 100),), (shared("b", 8), shared("c", 8)))), 2)
    assert [group.chunk_bytes for group in groups] == [200, 32]


def test_ranks_may_come_in_any_order() -> None:
    first, second = ranks(((own("x", 10),),), ((own("x", 30),),))
    assert join([second, first], 1) == join([first, second], 1)


@pytest.mark.parametrize(
    "told",
    [
        [],
        ranks(((shared("a", 1),),), ((shared("a", 1),),))[:1],
        ranks(((shared("a", 1),),), ((shared("a", 1),),))[1:],
        ranks(((shared("a", 1),),)) * 2,
        [*ranks(((shared("a", 1),),), ((shared("a", 1),),)), RankLayout(2, 3, "cpu", ((shared("a", 1),),))],
        ranks(((shared("a", 1),),), ((shared("a", 1),), (shared("b", 1),))),
        ranks(((shared("a", 1),),), ((shared("b", 1),),)),
        ranks(((shared("a", 1),),), ((shared("a", 2),),)),
        ranks(((shared("a", 1),),), ((own("a", 1),),)),
        ranks(((shared("a", 1), shared("b", 1)),), ((shared("b", 1), shared("a", 1)),)),
    ],
)
def test_ranks_that_do_not_fit_together(told: list[RankLayout]) -> None:
    with pytest.raises(ValueError, match="ranks"):
        join(told, 1)


PAGES = st.lists(st.tuples(st.booleans(), st.integers(1, 50)), min_size=1, max_size=6)


@given(PAGES, st.integers(1, 4), st.data())
def test_no_two_pages_overlap_and_no_byte_is_left_over(
    pages: list[tuple[bool, int]], world: int, data: st.DataObject
) -> None:
    told = ranks(
        *(
            (
                tuple(
                    own(f"l{i}", data.draw(st.integers(1, 50))) if alone else shared(f"l{i}", size)
                    for i, (alone, size) in enumerate(pages)
                ),
            )
            for _ in range(world)
        )
    )
    (group,) = join(told, 2)
    spans = {
        (offset, offset + page.canonical_bytes, rank if page.own else -1, page.name)
        for rank, layout in enumerate(told)
        for page, offset in zip(layout.groups[0], group.offsets[rank], strict=True)
    }
    ordered = sorted(spans)
    assert ordered[0][0] == 0
    assert [span[1] for span in ordered] == [span[0] for span in ordered[1:]] + [group.row_bytes]


# --- rows -----------------------------------------------------------------------------------------------------------

PAIRS = GroupLayout(2, 100, ((0,),))


def test_rows_of_whole_chunks() -> None:
    found = rows(PAIRS, [4096, 8192], [7, 8], [1, 3], [10, 11, 20, 21], 0)
    assert found == [(7, 4096, 10), (7, 4196, 11), (8, 24576, 20), (8, 24676, 21)]


def test_rows_without_the_beginning_of_the_first_chunk_and_the_end_of_the_last() -> None:
    assert rows(PAIRS, [4096, 4096], [7, 7], [0, 1], [11, 20], 1) == [(7, 100, 11), (7, 4096, 20)]


def test_no_rows() -> None:
    assert rows(PAIRS, [], [], [], [], 0) == []


@pytest.mark.parametrize(
    ("slots", "blocks", "skip"),
    [
        ([0], [1, 2, 3], 0),
        ([0, 1], [1, 2], 0),
        ([0], [1, 2], 1),
        ([0], [1], 2),
        ([0], [1], -1),
        ([], [1], 0),
        ([0], [], 0),
    ],
)
def test_rows_that_do_not_fit(slots: list[int], blocks: list[int], skip: int) -> None:
    with pytest.raises(ValueError, match="chunks of 2 blocks"):
        rows(PAIRS, [4096] * len(slots), [0] * len(slots), slots, blocks, skip)


# --- pieces ---------------------------------------------------------------------------------------------------------


def unfolded(found: list[Piece]) -> list[tuple[int, int, int]]:
    return [(p.extent, p.offset + i * p.stride, p.block + i) for p in found for i in range(p.count)]


ROW = st.tuples(st.integers(0, 1), st.integers(0, 8), st.integers(0, 6))


@given(st.lists(ROW, max_size=30))
def test_pieces_are_the_same_rows(found: list[tuple[int, int, int]]) -> None:
    assert unfolded(pieces(found)) == found
    assert all(piece.count >= 1 and (piece.stride > 0) == (piece.count > 1) for piece in pieces(found))


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=12),
    st.integers(0, 3),
    st.lists(st.integers(0, 9), min_size=48, max_size=48),
    st.integers(0, 3),
)
def test_a_transfer_is_unfolded_without_loss(
    per_chunk: int, places: list[tuple[int, int]], skip: int, numbers: list[int], missing: int
) -> None:
    skip, missing = skip % per_chunk, missing % per_chunk
    count = len(places) * per_chunk - skip - missing
    if count <= 0 or -(-(skip + count) // per_chunk) != len(places):
        return
    blocks = numbers[:count]
    layout = GroupLayout(per_chunk, 64, ((0,),))
    extents, slots = [place[0] for place in places], [place[1] for place in places]
    found = rows(layout, [256] * len(places), extents, slots, blocks, skip)
    assert [row[2] for row in found] == blocks
    assert unfolded(pieces(found)) == found
    for position, (extent, offset, _) in enumerate(found, skip):
        chunk, row = divmod(position, per_chunk)
        assert (extent, offset) == (extents[chunk], slots[chunk] * 256 + row * 64)


def test_neighbours_are_one_piece() -> None:
    layout = GroupLayout(1, 4096, ((0,),))
    found = rows(layout, [4096] * 4, [1] * 4, [2, 3, 4, 5], [8, 9, 10, 11], 0)
    assert pieces(found) == [Piece(1, 8192, 4096, 8, 4)]
    evenly = rows(layout, [4096] * 3, [1] * 3, [2, 4, 6], [8, 9, 10], 0)
    assert pieces(evenly) == [Piece(1, 8192, 8192, 8, 3)]


# --- imports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["layout", "namespace"])
def test_pure_modules_need_no_vllm(module: str) -> None:
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('vllm', 'torch', 'numpy', 'msgspec')))\n"
        f"import cachesvc.connector.{module}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
