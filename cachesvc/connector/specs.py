"""What travels inside an engine: from its scheduler to its workers, and back.

Covers: joining a session, the slots of a transfer, what became of it. vLLM pickles these (it would its own, too); they
never leave the engine. Not here: what is said to the daemon (`wire.messages`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec

from cachesvc.client.grants import Identity
from cachesvc.connector.layout import GroupLayout, RankLayout
from cachesvc.types import Role


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once, when its KV cache is there."""

    layout: RankLayout


@dataclass(frozen=True)
class Join:
    """Scheduler to workers: the session that they write and read in from now on."""

    address: str | None
    session: bytes
    namespace: bytes
    label: str
    components: dict[str, str]
    groups: tuple[GroupLayout, ...]

    def identity(self, role: Role) -> Identity:
        """Who joins, to the daemon."""
        sizes = tuple(group.chunk_bytes for group in self.groups)
        return Identity(self.session, role, self.namespace, self.label, self.components, sizes)


@dataclass(slots=True)
class GroupSlots:
    """Slots of one KV group, in the order of its chunks, as columns."""

    extents: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)


class SlotsSpec(LoadStoreSpec):
    """One transfer: where its chunks lie. `groups[g]` are the slots of KV group g."""

    def __init__(
        self,
        number: int,
        session: bytes,
        arena: bytes,
        groups: list[GroupSlots],
        tickets: list[int],
        *,
        lost: bool = False,
    ) -> None:
        self.number = number
        """Of the transfer, as the worker reports it."""
        self.session = session
        self.arena = arena
        """Uuid of the arena that the slots are of."""
        self.groups = groups
        self.tickets = tickets
        """The daemon's numbers of the write tickets in it; none for a load."""
        self.lost = lost
        """Its lease was gone before it began."""


@dataclass
class Metadata(OffloadingConnectorMetadata):
    """Scheduler to workers, each step: vLLM's, and at times a session to join."""

    join: Join | None = None
    idle: bool = False
    """Nothing is computed in this step."""

    @classmethod
    def around(cls, meta: OffloadingConnectorMetadata, join: Join | None = None, *, idle: bool = False) -> Metadata:
        """VLLM's metadata and ours; `meta` is used up."""
        return cls(**{f.name: getattr(meta, f.name) for f in fields(meta)}, join=join, idle=idle)


@dataclass
class WorkerMetadata(OffloadingWorkerMetadata):
    """Workers to scheduler, each step: vLLM's, and what became of transfers: number -> ranks that succeeded, failed."""

    outcomes: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def around(cls, meta: OffloadingWorkerMetadata, outcomes: dict[int, tuple[int, int]]) -> WorkerMetadata:
        """VLLM's metadata and ours; `meta` is used up."""
        return cls(**{f.name: getattr(meta, f.name) for f in fields(OffloadingWorkerMetadata)}, outcomes=outcomes)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Of two ranks. vLLM's own makes an object of its own class, which has lost what isn't vLLM's."""
        outcomes = dict(self.outcomes)
        for number, (good, bad) in getattr(other, "outcomes", {}).items():
            before = outcomes.get(number, (0, 0))
            outcomes[number] = before[0] + good, before[1] + bad
        return self.around(super().aggregate(other), outcomes)  # type: ignore[arg-type]
