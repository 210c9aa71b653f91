"""The package's one name, found on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cachesvc.connector


def test_vllm_finds_the_connector_by_its_name() -> None:
    assert cachesvc.connector.CachesvcConnector.__name__ == "CachesvcConnector"
    assert cachesvc.connector.__all__ == ["CachesvcConnector"]


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = cachesvc.connector.Other


def test_the_package_alone_loads_no_vllm() -> None:
    script = "import sys, cachesvc.connector.layout, cachesvc.connector.namespace; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
