"""Will the arena fit? Asked once at start, before anything is allocated: running out later kills the node, not us.

Covers: the three limits (memory, mount, cgroup), where their numbers are read, the line that an operator gets; and is
the arena in memory at all?
Not here: what existing extents hold (`arena.scan`), how extents are allocated (`arena.files`).

    must fit                                   into
    bytes still to allocate                    MemAvailable - 1 GiB
    bytes still to allocate, and their tables  free space of the mount
    the whole arena + 1 GiB                    the cgroup's memory limit, if there is one

"Still to allocate" is the arena minus what files of the last run hold: their pages are taken already, and are counted
in none of the first two. So it is asked before any of them is unlinked: clients of the last run may map them, and let
them go only when a daemon is there. A cgroup is charged for pages that its processes touch, so there the whole arena
counts. How large tables get is known with the sizes of chunks only; 1/32 of the data is the most (slots of 4 KiB). They
are counted where there is no headroom.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cachesvc.arena.layout import ENTRY_BYTES
from cachesvc.errors import OperatorError
from cachesvc.types import PAGE_BYTES

HEADROOM_BYTES: Final = 1 << 30
"""Left to the daemon, its page tables and the rest of the node."""

_DATA_PER_TABLE: Final = PAGE_BYTES // ENTRY_BYTES

_IN_MEMORY: Final = ("tmpfs", "ramfs")

_CGROUP_UNLIMITED: Final = 1 << 60
"""Version 1 writes "no limit" as a number near 2^63."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the node has, in bytes; None = no such limit."""

    available: int
    mount_free: int | None
    cgroup: int | None


def preflight(
    ram_bytes: int,
    existing_bytes: int,
    arena_dir: Path,
    read: Callable[[Path], Limits] | None = None,
) -> None:
    """OperatorError, one line with every number and what to set, if an arena of `ram_bytes` doesn't fit."""
    _check_medium(arena_dir)
    limits = (read or read_limits)(arena_dir)
    # (the largest arena it has room for, the number, what else than a smaller arena would help)
    rooms = [
        (
            existing_bytes + max(0, limits.available - HEADROOM_BYTES),
            f"MemAvailable {_gib(limits.available)}, of which {_gib(HEADROOM_BYTES)} must stay",
            "free some memory",
        )
    ]
    if limits.mount_free is not None:
        number = f"{_gib(limits.mount_free)} free in the mount of {arena_dir}"
        data = limits.mount_free * _DATA_PER_TABLE // (_DATA_PER_TABLE + 1)
        advice = "remount it with a larger size= (if clients of an earlier run hold it still, stop those)"
        rooms.append((existing_bytes + data, number, advice))
    if limits.cgroup is not None:
        number = f"memory limit of the cgroup {_gib(limits.cgroup)}"
        advice = f"raise the cgroup's limit to {_gib(ram_bytes + HEADROOM_BYTES)}"
        rooms.append((max(0, limits.cgroup - HEADROOM_BYTES), number, advice))
    room = min(room for room, _, _ in rooms)
    if ram_bytes > room:
        missing = max(0, ram_bytes - existing_bytes)
        numbers = "; ".join(number for _, number, _ in rooms)
        others = "".join(f", or {advice}" for enough, _, advice in rooms if ram_bytes > enough)
        raise OperatorError(
            f"an arena of {_gib(ram_bytes)}, {_gib(missing)} of it still to allocate, doesn't fit: {numbers}: "
            f"set ram_bytes to {room >> 20}MiB or less{others}"
        )


def read_limits(arena_dir: Path, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Limits:
    """The numbers of this node; `proc` and `cgroups` are where the kernel shows them. `arena_dir` must exist."""
    stat = os.statvfs(arena_dir)
    # a tmpfs mounted with size=0 has no limit and says so by zero blocks
    mount_free = stat.f_bavail * stat.f_frsize if stat.f_blocks else None
    return Limits(available_bytes(proc), mount_free, cgroup_limit(proc, cgroups))


def _check_medium(arena_dir: Path) -> None:
    """OperatorError if the arena would lie on a disk: every write of a client would go there."""
    found = filesystem(arena_dir)
    if found not in (None, *_IN_MEMORY):
        raise OperatorError(
            f"arena_dir {arena_dir} lies on {found}, not in memory: set arena_dir to a directory of a tmpfs, "
            f"or leave it out"
        )


def filesystem(path: Path, proc: Path = Path("/proc")) -> str | None:
    """The type of the file system that `path` lies on, as far as the kernel's list of mounts tells. OSError."""
    if not path.exists():
        return None
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in mounts:
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            return after.split()[0]
    return None


def available_bytes(proc: Path = Path("/proc")) -> int:
    """What the kernel thinks can be allocated without swapping, in bytes."""
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise OperatorError(f"{proc}/meminfo has no MemAvailable: this kernel is too old (3.14 is needed)")


def cgroup_limit(proc: Path, cgroups: Path) -> int | None:
    """The smallest memory limit of this process's cgroup and those above it, in bytes; None = no limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for root, name in _hierarchies(controllers, cgroups):
            limits += [limit for place in _upwards(root, path) if (limit := _limit(place / name)) is not None]
    return min(limits, default=None)


def _hierarchies(controllers: str, cgroups: Path) -> list[tuple[Path, str]]:
    """Where the memory limits of one line of /proc/self/cgroup lie: (root, file name)."""
    if controllers == "":
        return [(cgroups, "memory.max"), (cgroups / "unified", "memory.max")]
    if "memory" in controllers.split(","):
        return [(cgroups / "memory", "memory.limit_in_bytes")]
    return []


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The cgroup and all above it. In a container the path may name what only the host sees: the root is asked too."""
    place = root / path.lstrip("/")
    while place != root and root in place.parents:
        yield place
        place = place.parent
    yield root


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() and int(text) < _CGROUP_UNLIMITED else None


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"
