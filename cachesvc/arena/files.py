"""The files of an extent: named, made and recycled in an order that makes a kill between any two steps harmless.

Covers: the files, and an extent with its files open (descriptors, the daemon's mapping of the table). Not here: which
extents there are (`arena.host`), what a start makes of what it finds (`arena.scan`), the bytes of a table
(`arena.layout`).

    extent-00000007.spare    data, reserved and populated, seen by no client ever
    extent-00000007.data     data of an extent in use; without its table it is worthless
    extent-00000007.table    its table
    *.new                    unfinished

Every step below ends in one system call that a start can tell from the step before::

    spare     create .spare.new, reserve, populate | rename to .spare
    format    unlink the source's table | rename the source's .spare or .data to the new number's .data
              | create .table.new, reserve, write the header | rename to .table
    drop      unlink .table | unlink .data or .spare

A used file never becomes a spare again: a client of one tenant may still map it, and a spare goes to any tenant. The
daemon maps tables, never data: clients may truncate those, and touching a mapping behind the end of a file kills.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cachesvc.arena.layout import Header, TableWriter, encode_header, table_bytes

SPARE: Final = "spare"
DATA: Final = "data"
TABLE: Final = "table"
UNFINISHED: Final = ".new"

_STEP_BYTES: Final = 64 << 20
_ZEROS: Final = bytes(256 << 10)
"""Small enough to stay in a core's cache while it is written over and over."""

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def path_of(directory: Path, extent: int, kind: str) -> Path:
    """Where the SPARE, DATA or TABLE of an extent lies."""
    return directory / f"extent-{extent:08d}.{kind}"


# --- making ---------------------------------------------------------------------------------------------------------


def make_spare(directory: Path, extent: int, extent_bytes: int) -> None:
    """Reserve and populate a data file; about a quarter of a second per GiB. OSError, and nothing is left, if it fails.

    Pages are reserved first, so that lack of room is ENOSPC here and not SIGBUS in a client, and then filled with
    zeros: the kernel would clear them at the first touch otherwise, in the middle of somebody's write. Writing needs no
    mapping, works on every kernel, and took 0.73 of the time of MADV_POPULATE_WRITE.
    """
    path = path_of(directory, extent, SPARE)
    unfinished = path.with_name(path.name + UNFINISHED)
    descriptor = os.open(unfinished, _CREATE, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, extent_bytes)
        for start in range(0, extent_bytes, _STEP_BYTES):
            _write_zeros(descriptor, start, min(_STEP_BYTES, extent_bytes - start))
        fault = data_fault(os.fstat(descriptor), extent_bytes)
        if fault is not None:
            raise OSError(errno.ENOTSUP, f"this filesystem can't hold an arena: {fault}", str(directory))
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _write_zeros(descriptor: int, start: int, count: int) -> None:
    while count > 0:
        chunks, rest = divmod(count, len(_ZEROS))
        written = os.pwritev(descriptor, [_ZEROS] * chunks + [_ZEROS[:rest]], start)
        start, count = start + written, count - written


def find_data(directory: Path, extent: int) -> Path:
    """The data file of a spare or of an extent in use. FileNotFoundError if there is neither."""
    spare = path_of(directory, extent, SPARE)
    if spare.exists():
        return spare
    data = path_of(directory, extent, DATA)
    data.stat()
    return data


def format_data(directory: Path, source: int, data: Path, header: Header) -> None:
    """The `data` file of `source` becomes that of the header's extent, every slot free at generation 0. OSError.

    ValueError, and nothing happened, if the header can't be written.
    """
    first = encode_header(header)
    path_of(directory, source, TABLE).unlink(missing_ok=True)
    data.rename(path_of(directory, header.extent, DATA))
    path = path_of(directory, header.extent, TABLE)
    unfinished = path.with_name(path.name + UNFINISHED)
    descriptor = os.open(unfinished, _CREATE, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, table_bytes(header.slot_count))
        os.pwrite(descriptor, first, 0)
    finally:
        os.close(descriptor)
    unfinished.rename(path)


def remove(directory: Path, extent: int) -> None:
    """Unlink whatever there is of an extent, table first."""
    for kind in (TABLE + UNFINISHED, TABLE, DATA, SPARE, SPARE + UNFINISHED):
        path_of(directory, extent, kind).unlink(missing_ok=True)


# --- checking -------------------------------------------------------------------------------------------------------


def file_fault(status: os.stat_result) -> str | None:
    """Why a file in the arena's directory can't be one of ours, None if it can."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return "it is no plain file"
    if status.st_uid != os.geteuid():
        return f"it belongs to uid {status.st_uid}"
    return None


def data_fault(status: os.stat_result, extent_bytes: int) -> str | None:
    """What was done to a data file (truncated, grown, holes punched), None if it is whole."""
    if status.st_size != extent_bytes:
        return f"the data file has {status.st_size} bytes, not {extent_bytes}"
    held = status.st_blocks * 512
    if held < extent_bytes:
        return f"the data file holds {held} bytes, not {extent_bytes}: there are holes in it"
    return None


# --- open extents ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class OpenExtent:
    """A formatted extent: descriptors to hand to clients, and the daemon's own mapping of the table."""

    header: Header
    data: int
    """Read-write."""
    table: int
    """Read-only; opened apart, because what may be done to a mapping follows from its descriptor."""
    mapping: mmap.mmap
    writer: TableWriter

    def fault(self) -> str | None:
        """What was done to its files, None if they are whole. Costs two system calls."""
        fault = data_fault(os.fstat(self.data), self.header.extent_bytes)
        if fault is None and os.fstat(self.table).st_size < len(self.mapping):
            fault = "the table was truncated"
        return fault

    def close(self) -> None:
        """Close both descriptors and unmap the table; the files stay."""
        self.writer.release()
        self.mapping.close()
        os.close(self.data)
        os.close(self.table)


def open_extent(directory: Path, header: Header) -> OpenExtent:
    """Open the files of a formatted extent; OSError, and nothing stays open, if that fails."""
    opened: list[int] = []
    try:
        opened.append(os.open(path_of(directory, header.extent, DATA), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        table = path_of(directory, header.extent, TABLE)
        opened.append(os.open(table, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        writable = os.open(table, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            mapping = mmap.mmap(writable, table_bytes(header.slot_count))
        finally:
            os.close(writable)
    except (OSError, ValueError):
        for descriptor in opened:
            os.close(descriptor)
        raise
    return OpenExtent(header, opened[0], opened[1], mapping, TableWriter(mapping, header.slot_count))
