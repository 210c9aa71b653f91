"""The arena in host RAM: extents as files on tmpfs, and the only writer of their tables.

Covers: the extents in use, carrying out what the core wants done to them, what a start restores, noticing damage. Not
here: who may use the directory (`arena.identity`), whether there is memory for it (`arena.preflight`), the files
(`arena.files`), bytes of a table (`arena.layout`), when anything is done and why (`core`).

Who may call what: `make_spare`, `format` and `drop` are jobs for threads, any number at a time for different extents.
Everything else belongs to the thread that made the arena (the daemon's loop). The core keeps them apart: it wants
nothing of an extent done while a job on it runs, so the only thing they share is which extents are open.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachesvc.arena import files
from cachesvc.arena.files import OpenExtent
from cachesvc.arena.identity import Claim, read_boot_id
from cachesvc.arena.layout import STATE_FREE, STATE_WRITING, Header, decode_table
from cachesvc.arena.preflight import HEADROOM_BYTES, available_bytes
from cachesvc.arena.scan import find_extents, found_bytes
from cachesvc.core.events import TableColumns
from cachesvc.errors import OperatorError
from cachesvc.types import PAGE_BYTES

SPARE_HEADROOM_BYTES: Final = HEADROOM_BYTES // 2
"""No extent is made that leaves the node less; below what a start asks for, which is a moment's number as well."""


class Descriptors(NamedTuple):
    """Of one extent: `data` read-write, `table` read-only. The arena's own: send them, don't close or keep them."""

    data: int
    table: int


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """An extent of the last run, as it was found at start."""

    extent: int
    tenant: str
    slot_bytes: int
    opened: OpenExtent

    def columns(self) -> TableColumns:
        """Its table, decoded now: one at a time, because a table of small slots is large. See `layout.decode_table`."""
        return decode_table(self.opened.mapping, self.opened.header)


@dataclass(frozen=True, slots=True)
class Scan:
    """What a start found; `dropped` is one line for each extent that couldn't be used, with the reason."""

    spares: tuple[int, ...]
    extents: tuple[Restored, ...]
    dropped: tuple[str, ...]


class HostArena:
    """All extents of one daemon in host RAM.

    Holds the locks on both directories until `close`; OperatorError if it can't have them. `extent_bytes` None = what
    the arena was made with, `config.default_extent_bytes` for a new one; `boot` None = the machine's boot id.
    """

    def __init__(
        self,
        directory: Path,
        state_dir: Path,
        ram_bytes: int,
        extent_bytes: int | None = None,
        boot: bytes | None = None,
    ) -> None:
        self._directory = directory
        self._claim = Claim(directory, state_dir, ram_bytes, extent_bytes, boot or read_boot_id())
        self._extents: dict[int, OpenExtent] = {}
        # Jobs open and close extents while the loop looks through them: a descriptor must not be closed under fstat.
        self._opening = Lock()

    @property
    def uuid(self) -> bytes:
        """Names the arena to clients, 16 bytes; another one = nothing that they knew is there any more."""
        return self._claim.arena

    @property
    def extent_bytes(self) -> int:
        """Size of every extent, fixed when the arena was made."""
        return self._claim.extent_bytes

    @property
    def next_extent(self) -> int:
        """The lowest number that no extent had before this start; lower ones are refused."""
        return self._claim.first_extent

    @property
    def cold_start(self) -> str | None:
        """Why nothing of an earlier run could be used, None if it could."""
        return self._claim.cold_start

    # --- start and end ----------------------------------------------------------------------------------------------

    def found_bytes(self) -> int:
        """Held by what the last run left: `preflight` needs no room for it. To be asked before `scan`."""
        try:
            return found_bytes(self._directory)
        except OSError as error:
            raise OperatorError(
                f"arena_dir {self._directory} can't be read: {error}; remove what is in the way"
            ) from error

    def scan(self) -> Scan:
        """Find what the last run left, unlink what can't be used, open the rest. Once, before anything else."""
        claim = self._claim
        try:
            found = find_extents(self._directory, claim.arena, claim.boot, claim.extent_bytes, claim.first_extent)
            opened = [self._open(header) for header in found.headers]
        except OSError as error:
            raise OperatorError(
                f"arena_dir {self._directory} can't be read or cleaned: {error}; remove what is in the way"
            ) from error
        extents = tuple(Restored(e.header.extent, e.header.tenant, e.header.slot_bytes, e) for e in opened)
        return Scan(found.spares, extents, found.dropped)

    def check(self) -> dict[int, str]:
        """Extents whose files a client has damaged, with what was done to them. Two system calls an extent."""
        with self._opening:
            return {number: fault for number, opened in self._extents.items() if (fault := opened.fault())}

    def close(self) -> None:
        """Close everything and give the directories up; files stay for the next start. No job may be running."""
        for number in list(self._extents):
            self._close(number)
        self._claim.release()

    # --- jobs -------------------------------------------------------------------------------------------------------

    def make_spare(self, extent: int) -> None:
        """Make, reserve and populate the data file of a new extent. OSError (ENOSPC) leaves nothing.

        Memory is asked about each time: since the start others may have taken it, or not given it back yet.
        """
        if available_bytes() < self.extent_bytes + SPARE_HEADROOM_BYTES:
            raise OSError(errno.ENOMEM, "too little memory is left on this node", str(self._directory))
        self._claim.use(extent)
        files.make_spare(self._directory, extent, self.extent_bytes)

    def format(self, source: int, extent: int, tenant: str, slot_bytes: int) -> None:
        """Turn the data of `source` (a spare, or an extent of the same tenant) into `extent`, every slot free.

        ValueError, and nothing happened, if the arguments can't be right; OSError, and nothing is left of either
        extent, if a step fails.
        """
        if slot_bytes <= 0 or slot_bytes % PAGE_BYTES or slot_bytes > self.extent_bytes:
            raise ValueError(f"slots of {slot_bytes} bytes don't fit extents of {self.extent_bytes} bytes")
        old = self._extents.get(source)
        if old is not None and old.header.tenant != tenant:
            raise ValueError(f"extent {source} is of tenant {old.header.tenant}: {tenant} must never get its bytes")
        self._close(source)
        try:
            self._claim.use(extent)
            data = files.find_data(self._directory, source)
            header = Header(
                arena=self._claim.arena,
                boot=self._claim.boot,
                extent=extent,
                inode=data.stat().st_ino,
                tenant=tenant,
                extent_bytes=self.extent_bytes,
                slot_bytes=slot_bytes,
                slot_count=self.extent_bytes // slot_bytes,
            )
            files.format_data(self._directory, source, data, header)
            self._open(header)
        except OSError:
            files.remove(self._directory, source)
            files.remove(self._directory, extent)
            raise

    def drop(self, extent: int) -> None:
        """Unlink the files of an extent or spare; its bytes come back when the last process has unmapped it."""
        self._close(extent)
        files.remove(self._directory, extent)

    # --- tables -----------------------------------------------------------------------------------------------------

    def mark_writing(self, extent: int, slots: Sequence[int], generations: Sequence[int]) -> None:
        """The words of these slots say *writing*."""
        self._extents[extent].writer.mark(slots, generations, STATE_WRITING)

    def mark_sealed(
        self,
        extent: int,
        slots: Sequence[int],
        generations: Sequence[int],
        namespace: bytes,
        group: int,
        keys: Sequence[bytes],
        lengths: Sequence[int],
    ) -> None:
        """Fields and checksum of each slot, then its word: *sealed*. `lengths` are the bytes stored."""
        self._extents[extent].writer.seal(slots, generations, namespace, group, keys, lengths)

    def mark_free(self, extent: int, slots: Sequence[int], generations: Sequence[int]) -> None:
        """The words of these slots say *free*, at their raised generations."""
        self._extents[extent].writer.mark(slots, generations, STATE_FREE)

    def save_last_use(self, extent: int, last_use: NDArray[np.float64]) -> None:
        """Write the last-use column, one number a slot, in seconds of the monotonic clock."""
        self._extents[extent].writer.save_last_use(last_use)

    # --- clients ----------------------------------------------------------------------------------------------------

    def descriptors(self, extent: int) -> Descriptors:
        """What a client of the extent's tenant gets. KeyError for a spare or an unknown extent."""
        opened = self._extents[extent]
        return Descriptors(opened.data, opened.table)

    # --- which extents are open -------------------------------------------------------------------------------------

    def _open(self, header: Header) -> OpenExtent:
        opened = files.open_extent(self._directory, header)
        with self._opening:
            self._extents[header.extent] = opened
        return opened

    def _close(self, extent: int) -> None:
        """Nothing if it isn't open (a spare, or a job that failed before)."""
        with self._opening:
            opened = self._extents.pop(extent, None)
            if opened is not None:
                opened.close()
