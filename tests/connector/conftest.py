"""vLLM and torch warn when they are imported: that is theirs, everything else is an error here too."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cachesvc.connector.connector  # noqa: F401

from cachesvc.connector import guard, requests, scheduler
from tests.support.daemon import Daemon, shared_directory


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests of a file, each in a namespace of its own; it has room for the chunk sizes of all of them."""
    home = tmp_path_factory.mktemp("home")
    with shared_directory() as arena_dir, Daemon(home, arena_dir, ram_bytes="192MiB") as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What we log is seen by tests, also when vLLM has set up its own logging."""
    monkeypatch.setattr(guard.LOG, "propagate", False)
    monkeypatch.setattr(guard.LOG, "level", logging.INFO)
    guard.LOG.addHandler(caplog.handler)
    yield
    guard.LOG.removeHandler(caplog.handler)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No deadline is missed on a machine that does ten other things."""
    monkeypatch.setattr(scheduler, "ALLOCATE_S", 10.0)
    monkeypatch.setattr(scheduler, "SEAL_S", 10.0)
    monkeypatch.setattr(requests, "CLAIM_S", 10.0)
    monkeypatch.setattr(requests, "FRESH_S", 10.0)
