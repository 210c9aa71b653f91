"""A real daemon and real client processes for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import Clients
from tests.support.daemon import Daemon, shared_directory

SMALL = {"ram_bytes": "8MiB", "extent_bytes": "1MiB"}
"""With the usual chunks of 64 KiB: 8 extents of 16 slots, filled and read in no time."""


@pytest.fixture
def arena() -> Iterator[Path]:
    with shared_directory() as path:
        yield path


@pytest.fixture
def daemon(tmp_path: Path, arena: Path) -> Iterator[Daemon]:
    """Small, and not started yet."""
    daemon = Daemon(tmp_path, arena, **SMALL)
    try:
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def clients(daemon: Daemon) -> Iterator[Clients]:
    """All that it starts are dead before the daemon is."""
    with Clients() as clients:
        yield clients
