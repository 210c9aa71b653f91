"""The namespaces that the daemon knew, kept across restarts: without them restored chunks would have no owner.

Covers: one small file of JSON lines in the state directory, appended to, now and then replaced atomically. Not here:
the chunks (their tables are the truth, `arena.layout`), when to save (`core.node` says so by SaveNamespaces).

    {"format": 1, "namespaces": [{"tenant", "namespace" (hex), "label", "components": {..}, "chunk_bytes": [..]}, ..]}
    {"tenant", "namespace", ...}      one line for each that came later; of two with one name the later counts

Written on the daemon's loop, before the session that is new there may store anything; so it must cost little however
many there are: only what is new is written. Read once at start.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from cachesvc.core.events import NamespaceRecord
from cachesvc.daemon.translate import CHUNK_BYTES_MAX
from cachesvc.errors import FormatError
from cachesvc.types import GROUPS_MAX, NAMESPACE_BYTES

FILE_NAME: Final = "namespaces.json"
FORMAT: Final = 1

APPENDED_BYTES_MIN: Final = 64 * 1024
"""So much is appended, or as much as the whole file had, before it is written anew."""


class _Kept(msgspec.Struct, frozen=True):
    tenant: str
    namespace: str
    label: str
    components: dict[str, str]
    chunk_bytes: tuple[int, ...]


class _File(msgspec.Struct, frozen=True):
    format: int
    namespaces: list[_Kept]


def plain(record: NamespaceRecord) -> dict[str, Any]:
    """A record as JSON has it; also what `/v1/namespaces` lists."""
    return {
        "tenant": record.tenant,
        "namespace": record.namespace.hex(),
        "label": record.label,
        "components": dict(record.components),
        "chunk_bytes": list(record.chunk_bytes),
    }


def _record(kept: _Kept) -> NamespaceRecord:
    """What a line says; ValueError if no daemon writes such values."""
    namespace = bytes.fromhex(kept.namespace)
    if len(namespace) != NAMESPACE_BYTES:
        raise ValueError(f"a namespace has {len(namespace)} bytes, not {NAMESPACE_BYTES}")
    if not 1 <= len(kept.chunk_bytes) <= GROUPS_MAX:
        raise ValueError(f"{kept.namespace} has {len(kept.chunk_bytes)} KV groups, not 1 to {GROUPS_MAX}")
    if not all(1 <= size <= CHUNK_BYTES_MAX for size in kept.chunk_bytes):
        raise ValueError(f"{kept.namespace} has chunks of {list(kept.chunk_bytes)} bytes")
    return NamespaceRecord(kept.tenant, namespace, kept.label, kept.components, kept.chunk_bytes)


class Register:
    """The file of a daemon that runs, and what is in it. Owned by the loop."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._saved: dict[tuple[str, bytes], NamespaceRecord] = {}
        self._whole_bytes = 0
        self._appended_bytes = 0
        self._sound = False
        """The file is as we think: not before it was written once, nor after a write that failed."""

    def keep(self, records: Iterable[NamespaceRecord]) -> None:
        """All of these are in the file afterwards. OSError: some may not be; the next call tries again."""
        records = tuple(records)
        fresh = [r for r in records if self._saved.get((r.tenant, r.namespace)) is not r]
        lines = b"".join(msgspec.json.encode(plain(record)) + b"\n" for record in fresh)
        sound, self._sound = self._sound, False
        if sound and self._appended_bytes + len(lines) <= max(self._whole_bytes, APPENDED_BYTES_MIN):
            with (self._state_dir / FILE_NAME).open("ab", buffering=0) as file:
                written = file.write(lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, "only a part could be written")
            self._appended_bytes += len(lines)
        else:
            self._whole_bytes = save(self._state_dir, records)
            self._appended_bytes = 0
            self._saved.clear()
            fresh = list(records)
        self._saved.update(((r.tenant, r.namespace), r) for r in fresh)
        self._sound = True


def save(state_dir: Path, records: Iterable[NamespaceRecord]) -> int:
    """Replace the file; its bytes. OSError leaves the old one in place."""
    body = msgspec.json.encode({"format": FORMAT, "namespaces": [plain(record) for record in records]}) + b"\n"
    target = state_dir / FILE_NAME
    fresh = target.with_suffix(".new")
    fresh.write_bytes(body)
    # no fsync: a crash of the machine empties the arena as well, a crash of the daemon loses nothing
    fresh.replace(target)
    return len(body)


def load(state_dir: Path) -> tuple[NamespaceRecord, ...]:
    """What `save` kept, nothing if there is no file. FormatError if it can't be understood, OSError if not read."""
    try:
        body = (state_dir / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return ()
    try:
        first, *later = body.split(b"\n")
        kept = msgspec.json.decode(first, type=_File)
        if kept.format != FORMAT:
            raise FormatError(f"{FILE_NAME} has format {kept.format}, this daemon reads {FORMAT}")
        # what follows the last end of a line is nothing, or what a kill left of a line that nobody relied on yet
        every = kept.namespaces + [msgspec.json.decode(line, type=_Kept) for line in later[:-1]]
        records = list(map(_record, every))
        return tuple({(record.tenant, record.namespace): record for record in records}.values())
    except (msgspec.MsgspecError, ValueError) as error:
        raise FormatError(f"{FILE_NAME} can't be read: {error}") from error
