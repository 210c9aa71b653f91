"""`python -m cachesvc` is the command `cachesvc` (`cachesvc.cli`)."""

from __future__ import annotations

from cachesvc.cli import app

if __name__ == "__main__":
    app(prog_name="cachesvc")
