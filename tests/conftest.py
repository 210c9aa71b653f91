"""What every test run shares: how hypothesis searches, how many worlds are simulated. Helpers: `tests.support`."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import settings

# Time is only a guard against hanging (pytest's own timeout), and a failure prints what replays it.
settings.register_profile("cachesvc", deadline=None, print_blob=True)
settings.load_profile("cachesvc")

# These run in an environment with vLLM: `make test` makes it, and runs them there.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["connector", "demo", "engines"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sim-seeds", type=int, default=200, help="how many random worlds tests/sim runs")
    parser.addoption("--sim-first", type=int, default=0, help="the seed of the first of them")
