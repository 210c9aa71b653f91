"""What a start finds in the arena's directory: what can be used goes on, the rest is unlinked, each with its reason.

Covers: telling spares, extents and leftovers apart, checking headers. Not here: how files get their names
(`arena.files`), reading the entries of a table (`arena.layout`), what is done with what was found (`core.restore`).

    found                                          becomes
    .spare, whole                                  a spare
    .data + .table that matches it and this arena  an extent
    .data alone, .table alone, *.new               unlinked: the last run was killed between two steps
    anything that doesn't match                    unlinked
    a number that was never given out              unlinked: `arena.json` is of another arena
    names that no arena uses                       left alone, and said so

Bytes of a file that was unlinked come back when clients of the last run have unmapped it: they do so when they hear
from this one.

A name proves nothing: files must be plain, our own, and have no other name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cachesvc.arena.files import DATA, SPARE, TABLE, UNFINISHED, data_fault, file_fault, path_of, remove
from cachesvc.arena.layout import TABLE_HEADER_BYTES, Header, decode_header, table_bytes
from cachesvc.errors import FormatError
from cachesvc.types import PAGE_BYTES

_NAME: Final = re.compile(rf"extent-(\d{{8,19}})\.({SPARE}|{DATA}|{TABLE})({re.escape(UNFINISHED)})?")


@dataclass(frozen=True, slots=True)
class Found:
    """Result of `find_extents`: numbers of spares, headers of extents, a line for each dropped or left alone."""

    spares: tuple[int, ...]
    headers: tuple[Header, ...]
    dropped: tuple[str, ...]


def find_extents(directory: Path, arena: bytes, boot: bytes, extent_bytes: int, next_extent: int) -> Found:
    """Look at every file once and unlink what can't be used. OSError if the directory can't be read or cleaned."""
    kinds: dict[int, set[str]] = {}
    dropped = []
    for name in sorted(os.listdir(directory)):
        match = _NAME.fullmatch(name)
        if match is None or name != f"extent-{int(match[1]):08d}.{match[2]}{match[3] or ''}":
            dropped.append(f"{name} left alone: no file of an arena has such a name")
        else:
            kinds.setdefault(int(match[1]), set()).add(match[2] + (match[3] or ""))
    spares, headers = [], []
    for extent, found in sorted(kinds.items()):
        try:
            if extent >= next_extent:
                raise FormatError(f"this arena has not come to that number yet (it is at {next_extent})")
            if found == {SPARE}:
                _check_data(path_of(directory, extent, SPARE), extent_bytes)
                spares.append(extent)
            elif found == {DATA, TABLE}:
                status = _check_data(path_of(directory, extent, DATA), extent_bytes)
                headers.append(_check_table(path_of(directory, extent, TABLE), extent, status, arena, boot))
            else:
                raise FormatError(f"only {' and '.join(sorted(found))} are there: the last run was killed in between")
        except FormatError as error:
            remove(directory, extent)
            dropped.append(f"extent {extent} dropped: {error}")
    return Found(tuple(spares), tuple(headers), tuple(dropped))


def found_bytes(directory: Path) -> int:
    """What the data files of the last run hold, whatever a start makes of them. OSError if that can't be read."""
    total = 0
    for name in os.listdir(directory):
        match = _NAME.fullmatch(name)
        if match is not None and match[2] != TABLE:
            total += (directory / name).lstat().st_blocks * 512
    return total


def _check_data(path: Path, extent_bytes: int) -> os.stat_result:
    status = path.lstat()
    fault = file_fault(status) or data_fault(status, extent_bytes)
    if fault is not None:
        raise FormatError(fault)
    return status


def _check_table(path: Path, extent: int, data: os.stat_result, arena: bytes, boot: bytes) -> Header:
    status = path.lstat()
    fault = file_fault(status)
    if fault is not None:
        raise FormatError(f"its table: {fault}")
    with path.open("rb", buffering=0) as table:
        header = decode_header(table.read(TABLE_HEADER_BYTES))
    for matches, fault in (
        (header.boot == boot, "it was made in another boot of the machine"),
        (header.arena == arena, "it belongs to another arena (uuid)"),
        (header.extent == extent, f"its table is that of extent {header.extent}"),
        (header.inode == data.st_ino, "its table is that of another data file (inode)"),
        (header.extent_bytes == data.st_size, f"its table is for {header.extent_bytes} bytes of data"),
        (header.slot_bytes % PAGE_BYTES == 0, f"its slots have {header.slot_bytes} bytes"),
        (header.slot_count == header.extent_bytes // header.slot_bytes, "its slots don't fill its data"),
        (status.st_size == table_bytes(header.slot_count), f"its table has {status.st_size} bytes"),
    ):
        if not matches:
            raise FormatError(fault)
    return header
