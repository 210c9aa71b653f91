"""`python -m cachesvc` is the command."""

from __future__ import annotations

import subprocess
import sys

from cachesvc import __main__ as main
from cachesvc import cli


def test_it_is_the_same_command() -> None:
    assert vars(main)["app"] is cli.app
    run = subprocess.run([sys.executable, "-m", "cachesvc", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: cachesvc " in run.stdout
    assert all(name in run.stdout for name in ("serve", "status", "namespaces"))
