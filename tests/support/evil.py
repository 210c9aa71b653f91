"""A client that means harm: it speaks the protocol by itself and keeps every descriptor that it can get.

Covers: joining, storing, collecting descriptors; trying, as another uid, whatever could change a table
(`python -m tests.support.evil SOCKET UID OTHER...`, JSON on standard output). Not here: what must come of it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachesvc.types import AllocateState, KeyState, user_namespace
from cachesvc.wire.messages import (
    Allocate,
    Allocated,
    ExtentsHeld,
    ExtentsWanted,
    Looked,
    Lookup,
    Ping,
    Pong,
    Seal,
    Sealed,
    pack_keys,
)
from tests.support.clients import CHUNK_BYTES
from tests.support.daemon import DescriptorsWire, Wire


@dataclass
class Stolen:
    """Every descriptor that a client of a tenant can get."""

    extents: list[int]
    data: list[int]
    tables: list[int]
    extent_bytes: int

    def close(self) -> None:
        for descriptor in self.data + self.tables:
            os.close(descriptor)


@contextmanager
def evil(path: Path | str) -> Iterator[tuple[Wire, DescriptorsWire]]:
    """Both connections of a client, in the namespace that tests use."""
    with DescriptorsWire(path) as descriptors, Wire(path) as control:
        control.hello(token=descriptors.attach(), namespace=user_namespace("e2e"), chunk_bytes=[CHUNK_BYTES])
        yield control, descriptors


def steal(descriptors: DescriptorsWire, sizes: list[int], held: list[int] | None = None) -> Stolen:
    """What is offered for these slot sizes to a client that says it has `held`."""
    descriptors.send(ExtentsWanted(7, sizes, held or []))
    reply, passed = descriptors.reply()
    assert isinstance(reply, ExtentsHeld)
    attached = [info for info in reply.extents if info.attached]
    assert len(passed) == 2 * len(attached)
    size = max((info.slot_bytes * info.slot_count for info in attached), default=0)
    return Stolen([info.extent for info in reply.extents], passed[::2], passed[1::2], size)


def store(control: Wire, keys: list[bytes], ticket: int) -> bool:
    """Seal chunks without having written them; False: there is no room."""
    allocated = control.call(Allocate(ticket, ticket, pack_keys(0, keys)))
    assert isinstance(allocated, Allocated)
    given = allocated.states.count(AllocateState.NEW)
    assert not given or control.call(Seal(ticket, ticket, [CHUNK_BYTES] * given)) == Sealed(ticket, True)
    return given == len(keys)


def states(control: Wire, keys: list[str]) -> list[KeyState]:
    """What this client is told of keys."""
    looked = control.call(Lookup(99, pack_keys(0, [key.encode() for key in keys])))
    assert isinstance(looked, Looked)
    return [KeyState(state) for state in looked.states]


# --- as another uid ---------------------------------------------------------------------------------------------------


def become(uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def forge(stolen: Stolen, others: list[str]) -> dict[str, Any]:
    """Try everything on a table; what came of it."""
    table, data = stolen.tables[0], stolen.data[0]
    name = os.readlink(f"/proc/self/fd/{table}")
    attempts: dict[str, Callable[[], object]] = {
        "write": lambda: os.write(table, b"x"),
        "pwrite": lambda: os.pwrite(table, b"x", 4096),
        "truncate": lambda: os.ftruncate(table, 0),
        "map for writing": lambda: mmap.mmap(table, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE),
        "map for reading": lambda: mmap.mmap(table, 4096, prot=mmap.PROT_READ).close(),
        "open again": lambda: os.close(os.open(f"/proc/self/fd/{table}", os.O_RDWR)),
        "open data again": lambda: os.close(os.open(f"/proc/self/fd/{data}", os.O_RDWR)),
        "chmod": lambda: os.fchmod(table, 0o666),
        "chown": lambda: os.fchown(table, os.getuid(), os.getgid()),
        "open by name": lambda: os.close(os.open(name, os.O_RDONLY)),
        "list the arena": lambda: os.listdir(os.path.dirname(name)),
        "unlink": lambda: os.unlink(name),
        **{f"connect to {Path(path).name}": lambda path=path: Wire(path).close() for path in others},  # type: ignore[misc]
    }
    tried = {}
    for what, attempt in attempts.items():
        try:
            attempt()
            tried[what] = "done"
        except OSError as error:
            tried[what] = str(error.strerror)
    return tried


def main() -> None:
    path, uid, *others = sys.argv[1:]
    become(int(uid))
    with evil(path) as (control, descriptors):
        assert store(control, [b"own"], 1)
        tried = forge(steal(descriptors, [CHUNK_BYTES]), others)
        assert control.call(Ping(3)) == Pong(3, 1)
    sys.stdout.write(json.dumps(tried))


if __name__ == "__main__":
    main()
