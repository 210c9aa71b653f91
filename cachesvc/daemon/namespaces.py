"""The namespaces that the daemon knew, kept across restarts: without them restored chunks would have no owner.

Covers: one small JSON file in the state directory, replaced atomically. Not here: the chunks (their tables are the
truth, `arena.layout`), when to save (`core.node` says so by SaveNamespaces).

    {"format": 1, "namespaces": [{"tenant", "namespace" (hex), "label", "components": {..}, "chunk_bytes": [..]}, ..]}

Written on the daemon's loop (it is small, and new namespaces are rare), read once at start.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from cachesvc.core.events import NamespaceRecord
from cachesvc.errors import FormatError

FILE_NAME: Final = "namespaces.json"
FORMAT: Final = 1


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


def save(state_dir: Path, records: Iterable[NamespaceRecord]) -> None:
    """Replace the file; OSError leaves the old one in place."""
    body = msgspec.json.encode({"format": FORMAT, "namespaces": [plain(record) for record in records]})
    target = state_dir / FILE_NAME
    fresh = target.with_suffix(".new")
    fresh.write_bytes(body)
    # no fsync: a crash of the machine empties the arena as well, a crash of the daemon loses nothing
    fresh.replace(target)


def load(state_dir: Path) -> tuple[NamespaceRecord, ...]:
    """What `save` kept, nothing if there is no file. FormatError if it can't be understood, OSError if not read."""
    try:
        body = (state_dir / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return ()
    try:
        kept = msgspec.json.decode(body, type=_File)
        if kept.format != FORMAT:
            raise FormatError(f"{FILE_NAME} has format {kept.format}, this daemon reads {FORMAT}")
        return tuple(
            NamespaceRecord(one.tenant, bytes.fromhex(one.namespace), one.label, one.components, one.chunk_bytes)
            for one in kept.namespaces
        )
    except (msgspec.MsgspecError, ValueError) as error:
        raise FormatError(f"{FILE_NAME} can't be read: {error}") from error
