"""The vLLM door: `{"kv_connector": "CachesvcConnector", "kv_connector_module_path": "cachesvc.connector"}`.

Loaded on first use, so that the pure modules in here can be had without vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cachesvc.connector.connector import CachesvcConnector

__all__ = ["CachesvcConnector"]


def __getattr__(name: str) -> object:
    if name == "CachesvcConnector":
        from cachesvc.connector.connector import CachesvcConnector

        return CachesvcConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
