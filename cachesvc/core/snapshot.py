"""What operators see of a node: plain values for `/v1/status`, `/metrics` and `cachesvc status`.

Covers: one function that reads the node and changes nothing. Not here: names of metrics (`cachesvc.metrics`), JSON
schemas (`admin.schemas`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from cachesvc.core.index import Counts
from cachesvc.core.slots import SlabClass, SlotState

if TYPE_CHECKING:
    from cachesvc.core.node import Node

NAMESPACES_SHOWN_MAX: Final = 200


def snapshot(node: Node, tenant: str | None, now: float) -> dict[str, Any]:
    """State and counts of one tenant, or of all and of the arena as a whole (None). Sizes in bytes."""
    names = [t.name for t in node.settings.tenants if tenant in (None, t.name)]
    answer: dict[str, Any] = {"tenants": {name: _tenant(node, name) for name in names}}
    if tenant is None:
        extents = node.extents
        answer["arena"] = {
            "extent_bytes": extents.extent_bytes,
            "bytes": node.settings.extents_max * extents.extent_bytes,
            "extents": {
                "total": node.settings.extents_max,
                "spare": len(extents.spares),
                "making": int(extents.making is not None) + len(extents.formatting),
                "used": sum(1 for _, extent in extents.used.values() if not extent.draining),
                "draining": sum(1 for _, extent in extents.used.values() if extent.draining),
                "retiring": len(extents.dropping) + len(extents.retiring),
            },
            "moves": extents.moved,
        }
        answer["restart"] = {
            "chunks_restored": node.restoration.chunks,
            "orphans": len(node.restoration.orphans),
            "grace": node.in_grace(now),
        }
    return answer


def _tenant(node: Node, name: str) -> dict[str, Any]:
    sessions = [s for s in node.sessions.by_name.values() if s.tenant == name]
    slabs = [slab for (owner, _), slab in sorted(node.extents.slabs.items()) if owner == name]
    classes = [_class(slab) for slab in slabs]
    namespaces = [n for (owner, _), n in node.index.namespaces.items() if owner == name]
    return {
        "bytes": sum(c["bytes"] for c in classes),
        "sessions": len(sessions),
        "connections": sum(len(s.connections) for s in sessions),
        "processes": len({p for s in sessions for p in s.processes}),
        "write_tickets": sum(len(s.writes) for s in sessions),
        "leases": sum(len(s.leases) for s in sessions),
        "classes": classes,
        "counts": _counts(node.index.totals(name)),
        "namespaces": {
            n.record.namespace.hex()[:12]: {
                "label": n.record.label,
                "chunks": sum(len(space.sealed) for space in n.spaces),
                "chunk_bytes": list(n.record.chunk_bytes),
                "sessions": n.sessions,
                "counts": _counts(n.counts),
            }
            for n in namespaces[:NAMESPACES_SHOWN_MAX]
        },
        "namespaces_total": len(namespaces),
    }


def _class(slab: SlabClass) -> dict[str, int]:
    """`bytes` is what sealed chunks take up, padding included."""
    # counting in C: these columns have a row a slot, and this runs on the daemon's loop
    states = bytes(slab.states)
    return {
        "slot_bytes": slab.slot_bytes,
        "extents": len([extent for extent in slab.extents if extent is not None]),
        "slots": slab.slot_count,
        "sealed": slab.sealed_slots,
        "writing": states.count(SlotState.WRITING),
        "quarantined": states.count(SlotState.QUARANTINED),
        "leased": int(np.count_nonzero(np.frombuffer(slab.leases, np.uint32))) if slab.leases else 0,
        "free": slab.free_slots,
        "bytes": slab.sealed_slots * slab.slot_bytes,
    }


def _counts(counts: Counts) -> dict[str, Any]:
    return {
        "hits": counts.hits,
        "misses": {state.name.lower(): n for state, n in sorted(counts.misses.items())},
        "stores": counts.stores,
        "stored_bytes": counts.stored_bytes,
        "loads": counts.loads,
        "loaded_bytes": counts.loaded_bytes,
        "evictions": counts.evictions,
        "aborts": counts.aborts,
        "refused": counts.refused,
    }
