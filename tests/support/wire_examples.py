"""One example of every message; `tests/golden/wire_v1.json` holds their bytes."""

from __future__ import annotations

from cachesvc.types import Priority, Role
from cachesvc.wire import messages as m

SLOTS = m.Slots([7, 300], [0, 65536], [1, 2**40])
KEYS = m.KeyBatch(3, 2, b"k1k2")
MIXED = m.KeyBatch(0, [1, 3], b"abbb")

EXAMPLES: list[m.Message] = [
    m.Hello(
        call=1,
        session=b"s" * 16,
        role=Role.SCHEDULER,
        token=b"t" * 16,
        namespace=b"n" * 16,
        label="toy",
        components={"model": "a/b", "dtype": "bf16"},
        chunk_bytes=[1 << 20, 4096],
        writes=[m.OpenWrite(9, KEYS, SLOTS)],
        leases=[m.OpenLease(10, SLOTS)],
        member=b"m" * 8,
        arena=b"u" * 16,
        open_writes=[21],
        open_leases=[22],
        over=True,
    ),
    m.Claim(8, [m.OpenWrite(21, KEYS, SLOTS)], [m.OpenLease(22, SLOTS)]),
    m.Lookup(2, KEYS, request=5, touch=True),
    m.Lease(3, 11, MIXED, request=5, touch=True, prefix=False),
    m.Release([11, 12]),
    m.Allocate(4, 13, KEYS, request=5, priority=Priority.BATCH),
    m.Seal(5, 13, [4096, 17]),
    m.Abort([13]),
    m.Done([13]),
    m.EndRequests([5]),
    m.Ping(6),
    m.Ask(7, "status"),
    m.Welcome(1, b"u" * 16, [9], [10], 3),
    m.Looked(2, b"\x01\x10", 3),
    m.Leased(3, b"\x01\x01", SLOTS, [4096, 17], 3),
    m.Allocated(4, b"\x01\x01", SLOTS, 3),
    m.Sealed(5, True),
    m.Pong(6, 4),
    m.Report(7, b"{}"),
    m.Refused(0, "protocol", "no"),
    m.Claimed(8, [21], [22]),
    m.Attach(1),
    m.ExtentsWanted(2, [4096], [7]),
    m.Unmapped([7]),
    m.Attached(1, b"t" * 16),
    m.ExtentsHeld(2, 3, [m.ExtentInfo(7, 4096, 100, True)], False),
]
