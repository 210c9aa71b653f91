"""What eviction should do, in plain lists and dicts: from the contract (`Model`) and from the paper (`PaperArc`).

Nothing here imports the code that it judges. Slow and short on purpose.
"""

from __future__ import annotations

from collections import OrderedDict

from cachesvc.types import Priority


class Model:
    """Eviction in plain lists: rings[priority, list], parked slots, ghosts[priority, list]; lists coldest first."""

    def __init__(self, kind: str, capacity: int) -> None:
        self.arc = kind == "arc"
        self.capacity = capacity
        self.lists = [(level, which) for level in Priority for which in ("once", "again")]
        self.rings: dict[tuple[int, str], list[int]] = {name: [] for name in self.lists}
        self.parked: dict[int, tuple[int, str]] = {}
        self.ghosts: dict[tuple[int, str], list[int]] = {name: [] for name in self.lists}
        self.digests: dict[int, int] = {}
        self.target = dict.fromkeys(Priority, 0.0)

    def size(self, name: tuple[int, str]) -> int:
        return len(self.rings[name]) + sum(1 for home in self.parked.values() if home == name)

    def take(self, slot: int) -> tuple[int, str]:
        """Off its list, parked or not."""
        if slot in self.parked:
            return self.parked.pop(slot)
        name = next(name for name in self.lists if slot in self.rings[name])
        self.rings[name].remove(slot)
        return name

    def insert(self, slot: int, digest: int, level: Priority) -> None:
        self.digests[slot] = digest
        found = next((name for name in self.lists if digest in self.ghosts[name]), None)
        which = "again" if self.arc and found else "once"
        self.rings[level, which].append(slot)
        if found:
            if found[0] == level and self.arc:
                self.adapt(level, found[1])
            self.ghosts[found].remove(digest)
        self.trim()

    def adapt(self, level: Priority, which: str) -> None:
        b1, b2 = len(self.ghosts[level, "once"]), len(self.ghosts[level, "again"])
        slots = self.size((level, "once")) + self.size((level, "again"))
        p = self.target[level]
        if which == "once":
            self.target[level] = min(slots, p + max(1, b2 / b1))
        else:
            self.target[level] = max(0, min(slots, p) - max(1, b1 / b2))

    def trim(self) -> None:
        for level in Priority:
            t1, t2 = self.size((level, "once")), self.size((level, "again"))
            b1, b2 = self.ghosts[level, "once"], self.ghosts[level, "again"]
            if not self.arc:
                del b1[: max(0, len(b1) - self.capacity)]
                continue
            del b1[: max(0, t1 + len(b1) - self.capacity)]
            del b2[: max(0, t1 + t2 + len(b1) + len(b2) - 2 * self.capacity)]

    def trim_all(self, room: int) -> None:
        """The limit for all ghosts together, `room` of it kept free."""
        while sum(map(len, self.ghosts.values())) > self.capacity + self.capacity // 8 + 1 - room:
            del max(self.ghosts.values(), key=len)[0]

    def touch(self, slot: int) -> None:
        level, which = self.take(slot)
        self.rings[level, "again" if self.arc else which].append(slot)

    def refresh(self, slot: int) -> None:
        self.rings[self.take(slot)].append(slot)

    def unpark(self, slot: int) -> None:
        if slot in self.parked:
            self.rings[self.parked.pop(slot)].insert(0, slot)

    def order(self, level: Priority) -> list[tuple[int, str]]:
        once, again = (level, "once"), (level, "again")
        return [once, again] if self.size(once) > self.target[level] else [again, once]

    def evict(self, priority: Priority, held: set[int], spared: set[int]) -> int | None:
        for level in range(priority + 1):
            for name in self.order(Priority(level)):
                for slot in tuple(self.rings[name]):
                    self.rings[name].remove(slot)
                    if slot in spared:
                        self.rings[name].append(slot)
                    elif slot in held:
                        self.parked[slot] = name
                    else:
                        self.trim_all(room=1)
                        self.ghosts[name].append(self.digests[slot])
                        if not self.arc:
                            self.trim()
                        return slot
        return None

    def coldest(self) -> int | None:
        return next((self.rings[n][0] for level in Priority for n in self.order(level) if self.rings[n]), None)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        for slot in self.tracked():
            if slot >= capacity:
                self.take(slot)
        self.trim_all(room=0)
        self.target = {level: min(p, capacity) for level, p in self.target.items()}
        self.trim()

    def tracked(self) -> list[int]:
        return sorted([*(slot for ring in self.rings.values() for slot in ring), *self.parked])


class PaperArc:
    """ARC as in figure 4 of the paper; with `late` the ghost that was found matters after the eviction only.

    The paper's order makes sure that REPLACE never meets an empty T2; the late one needs `or not self.t2`.
    """

    def __init__(self, capacity: int, *, late: bool) -> None:
        self.c, self.p, self.late = capacity, 0.0, late
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict[int, None]() for _ in range(4))

    def request(self, key: int) -> bool:
        if key in self.t1 or key in self.t2:
            self.t1.pop(key, None)
            self.t2.pop(key, None)
            self.t2[key] = None
            return True
        if key in self.b1 or key in self.b2:
            if self.late:
                self.replace(in_b2=False)
            self.adapt(key in self.b1)
            if not self.late:
                self.replace(in_b2=key in self.b2)
            self.b1.pop(key, None)
            self.b2.pop(key, None)
            self.t2[key] = None
            return False
        self.make_room()
        self.t1[key] = None
        return False

    def adapt(self, in_b1: bool) -> None:
        if in_b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
        else:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))

    def make_room(self) -> None:
        l1 = len(self.t1) + len(self.b1)
        both = l1 + len(self.t2) + len(self.b2)
        if l1 == self.c:
            if len(self.t1) < self.c:
                self.b1.popitem(last=False)
                self.replace(in_b2=False)
            else:
                self.t1.popitem(last=False)
        elif both >= self.c:
            if both == 2 * self.c:
                self.b2.popitem(last=False)
            self.replace(in_b2=False)

    def replace(self, *, in_b2: bool) -> None:
        if self.t1 and (len(self.t1) > self.p or (in_b2 and len(self.t1) == self.p) or (self.late and not self.t2)):
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None


class PlainLru:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: OrderedDict[int, None] = OrderedDict()

    def request(self, key: int) -> bool:
        hit = key in self.keys
        if not hit and len(self.keys) == self.capacity:
            self.keys.popitem(last=False)
        self.keys[key] = None
        self.keys.move_to_end(key)
        return hit
