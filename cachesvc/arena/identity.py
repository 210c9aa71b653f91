"""Whose arena it is: the two directories that a daemon claims, and the identity that survives it.

Covers: the arena's directory and the state directory (who may use them, one daemon each), `arena.json`. Not here: the
files of extents (`arena.files`), what is found in them at start (`arena.scan`).

`arena.json` holds the uuid that tables and clients name the arena by, the size of its extents, the boot that it was
made in, and the lowest extent number never used: a client of the last run may still map a dropped extent, so a number
that came twice would let it read other bytes under a generation that looks right. Another boot, or another size of
extents, is another arena: it gets a new uuid, and what lies in the directory doesn't match it any more.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Final

import msgspec

from cachesvc.config import EXTENTS_MIN, default_extent_bytes
from cachesvc.errors import OperatorError

IDENTITY_FILE: Final = "arena.json"
LOCK_FILE: Final = "lock"

_UUID: Final = re.compile("[0-9a-f]{32}")
_OTHERS: Final = 0o077
_OTHERS_WRITE: Final = 0o022


@dataclass(frozen=True, slots=True)
class Identity:
    """What `arena.json` holds; `arena` and `boot` are uuids in hex."""

    arena: str
    boot: str
    extent_bytes: int
    next_extent: int


class Claim:
    """The right of one daemon to one state directory and one arena directory; holds both locks until `release`.

    `cold_start` says why nothing of an earlier run can be used, None if it can. OperatorError if a directory can't be
    used or another daemon has it. `use` may be called by any thread, the rest belongs to the thread that made it.
    """

    def __init__(self, directory: Path, state_dir: Path, ram_bytes: int, extent_bytes: int | None, boot: bytes) -> None:
        self._state_dir = state_dir
        self._locks: list[int] = []
        # Extents are made in two threads, and each may raise the number kept in arena.json.
        self._writing = Lock()
        try:
            self._locks.append(_claim_state_dir(state_dir))
            self._locks.append(_claim_arena_dir(directory))
            found = _recorded(state_dir / IDENTITY_FILE, ram_bytes, extent_bytes, boot)
            if isinstance(found, str):
                size = extent_bytes or default_extent_bytes(ram_bytes)
                self._identity = Identity(uuid.uuid4().hex, boot.hex(), size, 1)
                self._save(self._identity)
            else:
                self._identity = found
        except OSError as error:
            self.release()
            raise OperatorError(f"can't write {state_dir / IDENTITY_FILE}: {error.strerror}") from error
        except OperatorError:
            self.release()
            raise
        self.cold_start = found if isinstance(found, str) else None
        self.first_extent = self._identity.next_extent
        self.arena = bytes.fromhex(self._identity.arena)
        self.boot = boot
        self.extent_bytes = self._identity.extent_bytes

    def use(self, extent: int) -> None:
        """Keep in mind, across restarts, that the number was used. ValueError if an earlier run used it; OSError."""
        if extent < self.first_extent:
            raise ValueError(f"extent {extent} was used before this run: numbers start at {self.first_extent}")
        with self._writing:
            if extent >= self._identity.next_extent:
                raised = replace(self._identity, next_extent=extent + 1)
                self._save(raised)
                self._identity = raised

    def release(self) -> None:
        """Let another daemon have the directories."""
        while self._locks:
            os.close(self._locks.pop())

    def _save(self, identity: Identity) -> None:
        # No fsync: a crash of the machine ends the arena as well, and a torn file is a cold start.
        path = self._state_dir / IDENTITY_FILE
        unfinished = path.with_suffix(".new")
        unfinished.write_bytes(msgspec.json.encode(identity) + b"\n")
        unfinished.replace(path)


def read_boot_id() -> bytes:
    """16 bytes that change with every boot of the machine."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


# --- what the last run left -----------------------------------------------------------------------------------------


def _recorded(path: Path, ram_bytes: int, extent_bytes: int | None, boot: bytes) -> Identity | str:
    """The identity that goes on, or why there is none."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError:
        return f"there is no {path}"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    except msgspec.MsgspecError as error:
        return f"{path} is damaged: {error}"
    if _UUID.fullmatch(found.arena) is None or found.extent_bytes <= 0 or found.next_extent <= 0:
        return f"{path} is damaged: no daemon writes such values"
    if found.boot != boot.hex():
        return "the machine was booted since"
    if extent_bytes is not None and extent_bytes != found.extent_bytes:
        return f"extents had {found.extent_bytes} bytes, {extent_bytes} are configured"
    if ram_bytes < EXTENTS_MIN * found.extent_bytes:
        return f"extents of {found.extent_bytes} bytes are too large for an arena of {ram_bytes}"
    return found


# --- directories ----------------------------------------------------------------------------------------------------


def _claim_state_dir(path: Path) -> int:
    """The locked descriptor of the lock file."""
    directory = _open_directory(path, "state_dir", _OTHERS_WRITE)
    try:
        lock = os.open(LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    except OSError as error:
        raise OperatorError(f"can't open {path / LOCK_FILE}: {error.strerror}") from error
    finally:
        os.close(directory)
    return _lock(lock, f"state_dir {path}")


def _claim_arena_dir(path: Path) -> int:
    """The locked descriptor of the directory: daemons with different state directories must not share it."""
    return _lock(_open_directory(path, "arena_dir", _OTHERS), f"arena_dir {path}")


def _lock(descriptor: int, what: str) -> int:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise OperatorError(f"can't lock {what}: {error.strerror}") from error
        raise OperatorError(
            f"{what} is in use by another cachesvc daemon: stop that one, or give this one directories of its own"
        ) from error
    return descriptor


def _open_directory(path: Path, setting: str, forbidden: int) -> int:
    """Make the directory if it is missing; OperatorError unless it is ours and has no mode bit of `forbidden`."""
    try:
        path.mkdir(0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise OperatorError(
            f"{setting} {path} can't be used: {error.strerror}; make it a directory (no symlink) of "
            f"uid {os.geteuid()}, or set another {setting}"
        ) from error
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    fault = None
    if status.st_uid != os.geteuid():
        fault = (
            f"belongs to uid {status.st_uid}, this daemon runs as uid {os.geteuid()}: give it a directory of its own"
        )
    elif mode & forbidden:
        fault = f"is open to other users (mode {mode:04o}): chmod 700 it, or name a directory of its own inside"
    if fault is not None:
        os.close(descriptor)
        raise OperatorError(f"{setting} {path} {fault}")
    return descriptor
