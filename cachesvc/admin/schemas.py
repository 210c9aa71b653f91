"""The bodies of the admin API, field by field: sizes in bytes, times in seconds, counts since the daemon started.

Covers: what `/v1/status` and `/v1/namespaces` answer; the wire's Ask has the same bodies, less what only the admin
sees. Not here: where the values come from (`core.snapshot`, `daemon.runner`). A field that is not here is an error, so
that the schema can't fall behind.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """Whatever the API answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(Body):
    """Counts of a tenant or a namespace, in keys unless the name says bytes; `misses` by reason."""

    hits: int
    misses: dict[str, int]
    stores: int
    stored_bytes: int
    loads: int
    loaded_bytes: int
    evictions: int
    aborts: int
    refused: int


class SlabClass(Body):
    """Slots of one size of one tenant; `bytes` is what sealed chunks take up, padding included."""

    slot_bytes: int
    extents: int
    slots: int
    sealed: int
    writing: int
    quarantined: int
    leased: int
    free: int
    bytes: int


class NamespaceState(Body):
    """A namespace at work; `chunk_bytes` has one number a KV group."""

    label: str
    chunks: int
    chunk_bytes: list[int]
    sessions: int
    counts: Counts


class Tenant(Body):
    """One tenant; `namespaces` by their first 12 hex digits, at most 200 of `namespaces_total`."""

    bytes: int
    sessions: int
    connections: int
    processes: int
    write_tickets: int
    leases: int
    classes: list[SlabClass]
    counts: Counts
    namespaces: dict[str, NamespaceState]
    namespaces_total: int


class Extents(Body):
    """Extents of the arena by what is done with them."""

    total: int
    spare: int
    making: int
    used: int
    draining: int
    retiring: int


class Arena(Body):
    """The arena as a whole; `moves` are extents that changed their slab class."""

    extent_bytes: int
    bytes: int
    extents: Extents
    moves: int


class Restart(Body):
    """What the last start brought back; `orphans` are slots that were being written then and that nobody named yet."""

    chunks_restored: int
    orphans: int
    grace: bool


class Daemon(Body):
    """The process; `arena` is the uuid in hex, `problems` what went wrong by reason."""

    wire_version: int
    arena: str
    uptime_s: float
    connections: int
    processes: int
    problems: dict[str, int]


class Status(Body):
    """`/v1/status`. On a tenant's own socket `tenants` has that one only, and the rest is missing."""

    tenants: dict[str, Tenant]
    arena: Arena | None = None
    restart: Restart | None = None
    daemon: Daemon | None = None


class Namespace(Body):
    """What a namespace was declared with; `namespace` is its digest in hex, `components` say why two differ."""

    tenant: str
    namespace: str
    label: str
    components: dict[str, str]
    chunk_bytes: list[int]


class Namespaces(Body):
    """`/v1/namespaces`."""

    namespaces: list[Namespace]


class Answer(Body):
    """`/healthz` and `/readyz`."""

    ok: bool
    detail: str = ""
