"""One cache service per GPU node: KV-cache chunks in shared memory, and model weights.

`Client` is the public Python API; it is imported on first use, so that what needs only a part stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cachesvc.client.client import Client as Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    """Import `Client` when it is asked for; AttributeError for any other name."""
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cachesvc.client.client import Client

    return Client
