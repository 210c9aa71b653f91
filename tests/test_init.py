"""`from cachesvc import Client` works, and importing a part of the package imports no more than that."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cachesvc
from cachesvc.client.client import Client

DAEMON_ONLY = ("fastapi", "prometheus_client", "pydantic", "rich", "starlette", "typer", "uvicorn", "yaml")


def modules_after(code: str) -> set[str]:
    """Names of the modules in a fresh interpreter after `code`."""
    code += "\nimport sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


def test_client_is_the_public_name() -> None:
    assert cachesvc.Client is Client
    assert cachesvc.__all__ == ["Client"]


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'cachesvc' has no attribute 'Server'"):
        _ = cachesvc.Server


def test_importing_a_part_imports_nothing_else() -> None:
    loaded = modules_after("import cachesvc.errors")
    assert {name for name in loaded if name.startswith("cachesvc")} == {"cachesvc", "cachesvc.errors"}
    assert "numpy" not in loaded


def test_an_engine_loads_nothing_of_the_daemon() -> None:
    loaded = modules_after("from cachesvc import Client")
    assert "cachesvc.client.client" in loaded
    assert not loaded.intersection(DAEMON_ONLY)
    assert not {name for name in loaded if name.startswith(("cachesvc.daemon", "cachesvc.admin"))}
