"""A directory on tmpfs for every test that wants one, gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shm() -> Iterator[Path]:
    """A new directory in /dev/shm, mode 0700."""
    directory = Path(tempfile.mkdtemp(prefix="cachesvc-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)
