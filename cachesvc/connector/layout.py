"""Where the bytes of a chunk lie: in its slot, and in the KV cache of an engine.

Covers: the size of a chunk of each KV group, the place of every layer's page in it, which pages go together in one
copy. Pure. Not here: copying (`connector.worker`), who gets which slot (`connector.scheduler`).

A chunk is `blocks_per_chunk` rows, a row is one block of all layers of its group, of all ranks of the engine::

    chunk   | row 0                                             | row 1                    ...
    row     | layer 0, canonical page | layer 1 ... | rank 0's own pages | rank 1's own pages ...

A *canonical* page is vLLM's: the whole page as an engine without parallelism has it, of which each rank holds and
writes its part (`CanonicalPageMapping`). A layer that vLLM can't certify has a place of its own for each rank.
Rows lie at a constant distance, so that a run of blocks and slots next to each other is one strided copy a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

CHUNK_BYTES_WANTED: Final = 1 << 20
"""Below this, the cost of a slot (a table entry, a lookup, a copy's start) shows."""

CHUNK_TOKENS_MAX: Final = 256
"""A prompt shares whole chunks only: half a chunk is recomputed on average."""


@dataclass(frozen=True)
class LayerPage:
    """One layer's page of one block, as one rank sees it. Bytes."""

    name: str
    canonical_bytes: int
    """Of the whole page, all ranks together; of a page that belongs to this rank alone: its own."""
    local_bytes: int
    agnostic: bool
    """vLLM certifies that the canonical page is the same under any parallelism."""
    own: bool = False
    """There is no canonical page: this rank keeps its page beside those of the others."""


@dataclass(frozen=True)
class RankLayout:
    """What one worker says of its KV cache; `groups[g]` are the layers of KV group g, in the order of its tensors."""

    rank: int
    world: int
    memory: str
    """Device, attention backends, KV layout: what decides how a page's bytes are to be read."""
    groups: tuple[tuple[LayerPage, ...], ...]


@dataclass(frozen=True)
class GroupLayout:
    """One KV group's chunk."""

    blocks_per_chunk: int
    row_bytes: int
    offsets: tuple[tuple[int, ...], ...]
    """`offsets[rank][layer]`: where in a row the layer's page begins."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.blocks_per_chunk * self.row_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks `block ... block + count - 1` of the KV cache, and as many rows of an extent.

    The first row begins at byte `offset`, each next `stride` bytes later (0 if there is one).
    """

    extent: int
    offset: int
    stride: int
    block: int
    count: int


def blocks_per_chunk(row_bytes: Sequence[int], tokens_per_block: Sequence[int]) -> int:
    """Blocks of a chunk unless the user says: enough for 1 MiB of the group with the largest rows, at most 256 tokens.

    `row_bytes[g]`: one block of group g, all layers, all ranks.
    """
    wanted = -(-CHUNK_BYTES_WANTED // max(1, *row_bytes))
    return max(1, min(wanted, CHUNK_TOKENS_MAX // max(tokens_per_block)))


def join(ranks: Sequence[RankLayout], blocks: int) -> tuple[GroupLayout, ...]:
    """The chunk of each group, from what all ranks say. ValueError: one is missing, or they contradict each other."""
    ordered = sorted(ranks, key=lambda layout: layout.rank)
    world = ordered[0].world if ordered else 0
    if [layout.rank for layout in ordered] != list(range(world)) or not world:
        raise ValueError(f"ranks {[layout.rank for layout in ordered]} told of their KV cache, there are {world}")
    if len({(layout.world, len(layout.groups)) for layout in ordered}) > 1:
        raise ValueError("the ranks of this engine disagree about its KV groups")
    return tuple(_join_group([layout.groups[g] for layout in ordered], blocks) for g in range(len(ordered[0].groups)))


def _join_group(ranks: Sequence[tuple[LayerPage, ...]], blocks: int) -> GroupLayout:
    shared = [[(page.name, page.canonical_bytes) for page in pages if not page.own] for pages in ranks]
    if any(pages != shared[0] for pages in shared):
        raise ValueError("the ranks of this engine disagree about the pages of its layers")
    # 1. the pages that the ranks share, in order; 2. those of each rank
    own_at = sum(size for _, size in shared[0])
    offsets: list[tuple[int, ...]] = []
    for pages in ranks:
        shared_at = 0
        mine: list[int] = []
        for page in pages:
            if page.own:
                mine.append(own_at)
                own_at += page.canonical_bytes
            else:
                mine.append(shared_at)
                shared_at += page.canonical_bytes
        offsets.append(tuple(mine))
    return GroupLayout(blocks, own_at, tuple(offsets))


def rows(
    layout: GroupLayout,
    slot_bytes: Sequence[int],
    extents: Sequence[int],
    slots: Sequence[int],
    blocks: Sequence[int],
    skip: int,
) -> list[tuple[int, int, int]]:
    """(extent, byte in it, block) of every row of a transfer, in order.

    `slots[i]` of `extents[i]`, whose slots have `slot_bytes[i]`, holds chunk i; `blocks` are the blocks of all chunks,
    one after the other, without the first `skip` of the first chunk. ValueError: not so many chunks have these blocks.
    """
    per_chunk = layout.blocks_per_chunk
    chunks = -(-(skip + len(blocks)) // per_chunk)
    if not 0 <= skip < per_chunk or chunks != len(slots):
        raise ValueError(f"{len(blocks)} blocks after {skip} others aren't {len(slots)} chunks of {per_chunk} blocks")
    found = []
    for position, block in enumerate(blocks, skip):
        chunk, row = divmod(position, per_chunk)
        found.append((extents[chunk], slots[chunk] * slot_bytes[chunk] + row * layout.row_bytes, block))
    return found


def pieces(found: Iterable[tuple[int, int, int]]) -> list[Piece]:
    """The same rows, those that lie evenly on both sides together. Every row is in exactly one piece."""
    made: list[Piece] = []
    extent = offset = stride = block = count = 0
    for row in found:
        steps = row[1] - (offset + stride * (count - 1))
        if count and row[0] == extent and row[2] == block + count and steps > 0 and (count == 1 or steps == stride):
            stride, count = steps, count + 1
            continue
        if count:
            made.append(Piece(extent, offset, stride, block, count))
        (extent, offset, block), stride, count = row, 0, 1
    if count:
        made.append(Piece(extent, offset, stride, block, count))
    return made
