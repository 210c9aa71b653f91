"""How much of an arena a tenant may have: a guaranteed minimum, a maximum, whole extents.

Covers: pure sums over counts of extents. Not here: which extent moves (`core.extents`); caps of sessions inside a slab
class (`core.sessions.Sessions.room`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """A tenant's share in bytes; `max_bytes` None = the whole arena."""

    name: str
    min_bytes: int = 0
    max_bytes: int | None = None


class Quotas:
    """Shares of all tenants, in whole extents of `extent_bytes`; minima are rounded up, maxima down, but not to 0."""

    def __init__(self, tenants: tuple[TenantQuota, ...], extent_bytes: int, extents_max: int) -> None:
        self.extents_max = extents_max
        self._even = extents_max // max(1, len(tenants))
        self._min = {t.name: -(-t.min_bytes // extent_bytes) for t in tenants}
        self._max = {
            t.name: extents_max if t.max_bytes is None else max(1, t.max_bytes // extent_bytes) for t in tenants
        }

    def knows(self, tenant: str) -> bool:
        """Is it a tenant of this node?"""
        return tenant in self._min

    def entitled(self, tenant: str, used: Mapping[str, int]) -> bool:
        """Has it less than it is guaranteed?"""
        return used.get(tenant, 0) < self._min[tenant]

    def left(self, tenant: str, used: Mapping[str, int], *, damaged: bool = False) -> int:
        """How many more extents may it have? At most its maximum, and nothing that others are guaranteed but lack; one
        that has `damaged` what it got, at most an even share of the arena or what it is guaranteed."""
        owed = sum(max(0, least - used.get(name, 0)) for name, least in self._min.items() if name != tenant)
        most = self._max[tenant]
        if damaged:
            most = min(most, max(self._even, self._min[tenant]))
        return min(most - used.get(tenant, 0), self.extents_max - sum(used.values()) - owed)

    def may_receive(self, tenant: str, used: Mapping[str, int]) -> bool:
        """May an extent of another tenant move to it?"""
        return used.get(tenant, 0) < self._max[tenant]

    def may_give(self, tenant: str, used: Mapping[str, int]) -> bool:
        """May another tenant take one of its extents?"""
        return used.get(tenant, 0) > self._min[tenant]
