"""What a user may set in `kv_connector_extra_config`, and what we set there for vLLM.

Covers: reading and refusing settings, versions of vLLM. Not here: the daemon's settings (`cachesvc.config`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from cachesvc.connector.guard import LOG

TRIED: Final = ((0, 31), (0, 32))
READ: Final = ((0, 33),)
"""Releases of vLLM in which real engines ran with us, and those whose code was only compared with the tried ones."""

LOAD_DEADLINE_MS: Final = 2000
MIN_LOAD_TOKENS: Final = 256

VLLMS_OWN: Final = frozenset(
    {"block_size", "blocks_per_chunk", "canonical_layout", "offload_prompt_only", "self_describing_kv_events"}
    | {"spec_module_path", "spec_name", "sync_load_budget_bytes"}
)


@dataclass(frozen=True)
class Settings:
    """Settings of one engine."""

    address: str | None = None
    """The daemon's socket; None: CACHESVC_ADDRESS, a pod's mount, this user's daemon."""
    load_deadline_ms: float = LOAD_DEADLINE_MS
    """How long a request may wait for an answer, or for a chunk that another engine is writing."""
    min_load_tokens: int = MIN_LOAD_TOKENS
    """Shorter hits are computed."""
    on_reset: str = "fresh"
    """After the engine's cache was reset: `fresh` shares nothing with before, `keep` goes on as if nothing was."""
    reset_epoch: str = ""
    """Engines of one epoch share, if all else agrees."""

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Settings:
        """ValueError names what can't be, and the nearest name for one that isn't known."""
        ours = {f.name for f in fields(cls)}
        known = sorted(ours | VLLMS_OWN)
        for name in extra:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"kv_connector_extra_config: {name!r} is not known, did you mean {nearest!r}?")
        settings = cls(**{name: extra[name] for name in ours if name in extra})
        settings.check()
        return settings

    def check(self) -> None:
        """ValueError for values that can't be."""
        if self.address is not None and (not isinstance(self.address, str) or not self.address):
            raise ValueError(f"address is the path of the daemon's socket, not {self.address!r}")
        for name in ("load_deadline_ms", "min_load_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 31:
                raise ValueError(f"{name} is a number from 0 on, not {value!r}")
        if self.on_reset not in ("fresh", "keep"):
            raise ValueError(f"on_reset is fresh or keep, not {self.on_reset!r}")
        if not isinstance(self.reset_epoch, str):
            raise ValueError(f"reset_epoch is a string, not {self.reset_epoch!r}")


def check_version(version: str) -> tuple[int, int]:
    """(major, minor) of vLLM; ValueError for a release that we can't be right with."""
    numbers = [int(part) if part.isdigit() else -1 for part in version.split(".")[:2]]
    release = (numbers[0], numbers[1]) if len(numbers) > 1 else (-1, -1)
    if release in READ:
        LOG.warning("cachesvc: not run with vLLM %s, only compared with its source; tried: %s", version, _names(TRIED))
    elif release not in TRIED:
        raise ValueError(f"cachesvc doesn't know vLLM {version}: use {_names((*TRIED, *READ))}, or another cachesvc")
    return release


def _names(releases: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in releases)
