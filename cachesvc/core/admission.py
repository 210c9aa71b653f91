"""Whether a session may come in, and the namespace that it opens.

Covers: what a Hello may say, declaring namespaces, making room for one more. Not here: who is in which session
(`core.node`, `core.sessions`), what is known of a namespace (`core.index`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesvc.core import events as ev
from cachesvc.core.index import Index, Namespace, component_bytes
from cachesvc.types import GROUPS_MAX, NAMESPACE_BYTES, PAGE_BYTES, slot_bytes_for

if TYPE_CHECKING:
    from cachesvc.core.extents import Extents
    from cachesvc.core.quota import Quotas
    from cachesvc.core.transfers import Transfers


class Rejected(Exception):  # noqa: N818 - never leaves the core: it carries a Refused up to the door
    """The event breaks a rule of its sender's; becomes a Refused effect."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class Admission:
    """Opens namespaces. Owned by the node."""

    def __init__(self, index: Index, extents: Extents, transfers: Transfers, quotas: Quotas) -> None:
        self._index = index
        self._extents = extents
        self._transfers = transfers
        self._quotas = quotas

    def check(self, event: ev.Hello) -> None:
        """Rejected, if no session could ever be opened like this."""
        if not self._quotas.knows(event.tenant):
            raise Rejected("protocol", f"tenant {event.tenant!r} is not configured on this node")
        if not 16 <= len(event.session) <= 64:
            raise Rejected("protocol", f"a session id has 16 to 64 bytes, not {len(event.session)}")
        if len(event.namespace) != NAMESPACE_BYTES:
            raise Rejected("protocol", f"a namespace digest has {NAMESPACE_BYTES} bytes, not {len(event.namespace)}")
        if not 1 <= len(event.chunk_bytes) <= GROUPS_MAX:
            raise Rejected("protocol", f"a namespace has 1 to {GROUPS_MAX} KV groups, not {len(event.chunk_bytes)}")
        for chunk_bytes in event.chunk_bytes:
            if chunk_bytes < 1:
                raise Rejected("namespace", f"chunk_bytes is at least 1, not {chunk_bytes}")
            if slot_bytes_for(chunk_bytes) > self._extents.extent_bytes // 2:
                needed = 1 << (2 * slot_bytes_for(chunk_bytes) - 1).bit_length()
                raise Rejected(
                    "namespace",
                    f"a chunk of {chunk_bytes} bytes is larger than half an extent of "
                    f"{self._extents.extent_bytes} bytes: start the daemon with extent_bytes: {needed} or more, or use "
                    f"chunks of at most {self._extents.extent_bytes // 2 // PAGE_BYTES * PAGE_BYTES} bytes",
                )

    def open(self, record: ev.NamespaceRecord, now: float, out: list[ev.Effect]) -> Namespace:
        """The namespace of a session that joins; declared if it is new."""
        known = self._index.find(record.tenant, record.namespace)
        if known is not None and known.record.chunk_bytes != record.chunk_bytes and known.idle():
            self._index.forget(record.tenant, record.namespace)
            known = None
        if known is None:
            sizes = [slot_bytes_for(size) for size in record.chunk_bytes]
            if not self._extents.room(record.tenant, set(sizes)):
                raise Rejected("limit", f"tenant {record.tenant!r} has its most slot sizes, all of them in use")
            self._make_room(record, now, out)
            known = self._index.declare(record, [self._extents.slab(record.tenant, size) for size in sizes])
            out.append(ev.SaveNamespaces(self._index.records()))
        else:
            self.check_sizes(known, record)
            self._index.opened(known)
        return known

    def _make_room(self, record: ev.NamespaceRecord, now: float, out: list[ev.Effect]) -> None:
        """For one more namespace; at the cost of the chunks of those that nobody has open, longest unused first."""
        while not self._index.room(record.tenant, component_bytes(record.components)):
            unused = self._index.unused(record.tenant) if self._transfers.may_evict else None
            if unused is None:
                raise Rejected(
                    "limit", f"tenant {record.tenant!r} has its most namespaces, or bytes of components, all in use"
                )
            self._transfers.drop(unused, now, out)

    @staticmethod
    def check_sizes(known: Namespace, record: ev.NamespaceRecord) -> None:
        """Rejected, if the namespace is known with other sizes."""
        if known.record.chunk_bytes != record.chunk_bytes:
            raise Rejected(
                "namespace",
                f"namespace {record.label!r} holds chunks of {list(known.record.chunk_bytes)} bytes, "
                f"not {list(record.chunk_bytes)}: use another namespace for another chunk_bytes",
            )
