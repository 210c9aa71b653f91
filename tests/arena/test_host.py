from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cachesvc.arena.host import SPARE_HEADROOM_BYTES, HostArena, Scan
from cachesvc.arena.layout import STATE_FREE, STATE_SEALED, STATE_WRITING, table_bytes, word, words_view
from cachesvc.errors import OperatorError

ROOT = Path(__file__).parents[2]
EXTENT_BYTES = 64 << 10
SLOT_BYTES = 4096
SLOTS = EXTENT_BYTES // SLOT_BYTES
RAM_BYTES = 16 * EXTENT_BYTES
NAMESPACE = b"n" * 16


def start(shm: Path, **changes: object) -> HostArena:
    """A daemon's arena, as after a start or a restart."""
    settings: dict[str, object] = {"ram_bytes": RAM_BYTES, "extent_bytes": EXTENT_BYTES} | changes
    return HostArena(shm / "arena", shm / "state", **settings)  # type: ignore[arg-type]


def names(shm: Path) -> set[str]:
    return {path.name for path in (shm / "arena").iterdir()}


def seal(arena: HostArena, extent: int, slot: int, key: bytes, generation: int = 0) -> None:
    arena.mark_writing(extent, (slot,), (generation,))
    arena.mark_sealed(extent, (slot,), (generation,), NAMESPACE, 1, (key,), (100,))


def sealed(found: Scan) -> dict[int, dict[int, bytes]]:
    """Extent -> slot -> key of everything that came back sealed."""
    return {
        restored.extent: {slot: columns.keys[slot] for slot in np.flatnonzero(columns.states == STATE_SEALED).tolist()}
        for restored in found.extents
        for columns in [restored.columns()]
    }


# --- a life ---------------------------------------------------------------------------------------------------------


def test_life_of_an_arena(shm: Path) -> None:
    arena = start(shm)
    assert arena.scan() == Scan((), (), ())
    assert (arena.next_extent, arena.extent_bytes, len(arena.uuid)) == (1, EXTENT_BYTES, 16)
    arena.make_spare(1)
    arena.make_spare(2)
    arena.format(1, 3, "default", SLOT_BYTES)
    assert names(shm) == {"extent-00000002.spare", "extent-00000003.data", "extent-00000003.table"}

    words = words_view(os.pread(arena.descriptors(3).table, table_bytes(SLOTS), 0), SLOTS)
    assert words.tolist() == [word(0, STATE_FREE)] * SLOTS
    seal(arena, 3, 0, b"a")
    seal(arena, 3, 1, b"b", generation=5)
    seal(arena, 3, 2, b"c")
    arena.mark_free(3, (2,), (1,))
    arena.mark_writing(3, (3, 4), (7, 8))
    arena.save_last_use(3, np.arange(SLOTS, dtype=np.float64))
    words = words_view(os.pread(arena.descriptors(3).table, table_bytes(SLOTS), 0), SLOTS)
    assert words.tolist()[:5] == [0x002, 0x502, 0x100, 0x701, 0x801]
    arena.close()

    again = start(shm)
    assert again.cold_start is None
    assert again.uuid == arena.uuid
    assert again.next_extent == 4
    found = again.scan()
    assert (found.spares, found.dropped, again.found_bytes()) == ((2,), (), 2 * EXTENT_BYTES)
    [restored] = found.extents
    assert (restored.extent, restored.tenant, restored.slot_bytes) == (3, "default", SLOT_BYTES)
    columns = restored.columns()
    assert columns.states.tolist()[:5] == [STATE_SEALED, STATE_SEALED, STATE_FREE, STATE_WRITING, STATE_WRITING]
    assert columns.generations.tolist()[:5] == [0, 5, 1, 7, 8]
    assert columns.keys[:3] == [b"a", b"b", b""]
    assert (columns.namespaces[0], columns.groups[0], columns.lengths[0]) == (NAMESPACE, 1, 100)
    assert columns.last_use.tolist() == list(range(SLOTS))

    # and it goes on: the restored table is written, the spare is used, everything can go
    again.mark_free(3, (0,), (1,))
    assert restored.columns().states[0] == STATE_FREE
    again.format(2, 4, "other", 2 * SLOT_BYTES)
    again.drop(3)
    again.drop(4)
    assert names(shm) == set()
    again.close()


def test_moved_extent_keeps_its_bytes_and_loses_its_table(shm: Path) -> None:
    arena = start(shm)
    arena.make_spare(1)
    arena.format(1, 2, "default", SLOT_BYTES)
    seal(arena, 2, 0, b"a")
    inode = os.fstat(arena.descriptors(2).data).st_ino
    held = os.dup(arena.descriptors(2).table)
    arena.format(2, 3, "default", 2 * SLOT_BYTES)
    assert os.fstat(arena.descriptors(3).data).st_ino == inode
    assert names(shm) == {"extent-00000003.data", "extent-00000003.table"}
    with pytest.raises(KeyError):
        arena.descriptors(2)
    # who still maps the old table sees what was last written there, never marks of the new one
    seal(arena, 3, 1, b"b", generation=9)
    assert words_view(os.pread(held, table_bytes(SLOTS), 0), SLOTS).tolist() == [0x002] + [0] * (SLOTS - 1)
    os.close(held)
    arena.close()


def test_bytes_never_move_to_another_tenant(shm: Path) -> None:
    arena = start(shm)
    arena.make_spare(1)
    arena.format(1, 2, "a", SLOT_BYTES)
    with pytest.raises(ValueError, match="of tenant a: b must never get its bytes"):
        arena.format(2, 3, "b", SLOT_BYTES)
    arena.descriptors(2)
    arena.close()


@pytest.mark.parametrize("slot_bytes", [0, -SLOT_BYTES, 100, EXTENT_BYTES + SLOT_BYTES])
def test_slots_that_do_not_fit(slot_bytes: int, shm: Path) -> None:
    arena = start(shm)
    arena.make_spare(1)
    with pytest.raises(ValueError, match="don't fit"):
        arena.format(1, 2, "a", slot_bytes)
    assert names(shm) == {"extent-00000001.spare"}
    arena.close()


def test_numbers_are_used_once(shm: Path) -> None:
    """A client may hold a dropped extent mapped over a restart: its number must not come again."""
    arena = start(shm)
    arena.make_spare(1)
    arena.format(1, 2, "a", SLOT_BYTES)
    arena.drop(2)
    arena.close()
    again = start(shm)
    assert again.scan() == Scan((), (), ())
    assert again.next_extent == 3
    with pytest.raises(ValueError, match="numbers start at 3"):
        again.make_spare(2)
    again.close()


def test_spares_and_strangers_have_no_descriptors(shm: Path) -> None:
    arena = start(shm)
    arena.make_spare(1)
    for extent in (1, 9):
        with pytest.raises(KeyError):
            arena.descriptors(extent)
    arena.drop(9)
    arena.close()


def test_descriptors_are_closed(shm: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    arena = start(shm)
    for number in (1, 3, 5):
        arena.make_spare(number)
        arena.format(number, number + 1, "a", SLOT_BYTES)
    arena.drop(2)
    arena.format(4, 7, "a", SLOT_BYTES)
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- cold starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boot": bytes(16)}, "booted since"),
        ({"extent_bytes": 2 * EXTENT_BYTES}, "are configured"),
        ({"ram_bytes": EXTENT_BYTES, "extent_bytes": None}, "too large for an arena"),
    ],
)
def test_another_arena_starts_cold(changes: dict[str, object], reason: str, shm: Path) -> None:
    arena = start(shm)
    arena.make_spare(1)
    arena.make_spare(2)
    arena.format(2, 3, "a", SLOT_BYTES)
    arena.close()
    again = start(shm, **changes)
    assert reason in (again.cold_start or "")
    assert again.found_bytes() == 2 * EXTENT_BYTES, "clients may hold it when it is unlinked"
    found = again.scan()
    assert (found.spares, found.extents, again.found_bytes(), len(found.dropped)) == ((), (), 0, 2)
    assert names(shm) == set()
    assert again.next_extent == 1
    again.close()


def test_lost_state_starts_cold(shm: Path) -> None:
    arena = start(shm)
    arena.make_spare(1)
    arena.format(1, 2, "a", SLOT_BYTES)
    arena.close()
    (shm / "state/arena.json").unlink()
    again = start(shm)
    assert len(again.scan().dropped) == 1
    assert names(shm) == set()
    again.close()


def test_directory_in_the_way(shm: Path) -> None:
    arena = start(shm)
    (shm / "arena/extent-00000001.data").mkdir()
    with pytest.raises(OperatorError, match=r"can't be read or cleaned: .*extent-00000001"):
        arena.scan()
    arena.close()


# --- kills ----------------------------------------------------------------------------------------------------------

STEPS = ("open", "posix_fallocate", "pwritev", "pwrite", "rename", "replace", "unlink")


class Killed(BaseException):
    """No handler of the arena may see it, as none sees SIGKILL."""


def fail_at(step: int, fault: BaseException, patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the system call with this number (0 = the first) fail; returns how many were begun."""
    begun = 0

    def wrapped(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **named: object) -> object:
            nonlocal begun
            begun += 1
            if begun == step + 1:
                raise fault
            return call(*args, **named)

        return counted

    for name in STEPS:
        patch.setattr(os, name, wrapped(getattr(os, name)))
    return lambda: begun


OPERATIONS: dict[str, Callable[[HostArena], None]] = {
    "make": lambda arena: arena.make_spare(4),
    "format spare": lambda arena: arena.format(3, 4, "b", 2 * SLOT_BYTES),
    "format used": lambda arena: arena.format(2, 4, "a", 2 * SLOT_BYTES),
    "drop used": lambda arena: arena.drop(2),
    "drop spare": lambda arena: arena.drop(3),
}


def furnished(shm: Path) -> HostArena:
    """Extent 1 and 2 of tenant a hold a chunk each, 3 is a spare."""
    arena = start(shm)
    arena.make_spare(0xA)
    arena.format(0xA, 1, "a", SLOT_BYTES)
    arena.make_spare(0xB)
    arena.format(0xB, 2, "a", SLOT_BYTES)
    arena.make_spare(3)
    seal(arena, 1, 3, b"bystander")
    seal(arena, 2, 4, b"chunk")
    return arena


def steps_of(operation: str, shm: Path) -> int:
    """How many system calls it begins."""
    arena = furnished(shm)
    with pytest.MonkeyPatch.context() as patch:
        begun = fail_at(10**6, Killed(), patch)
        OPERATIONS[operation](arena)
        count = begun()
    arena.close()
    for path in (shm / "arena").iterdir():
        path.unlink()
    (shm / "state/arena.json").unlink()
    return count


def check_after(shm: Path, found: Scan, inodes: dict[int, int]) -> None:
    """What holds after a kill at any step: nothing half, nothing lost that wasn't meant, nothing of a tenant spare."""
    alive = sealed(found)
    assert alive.pop(1) == {3: b"bystander"}
    assert alive in ({2: {4: b"chunk"}}, {2: {4: b"chunk"}, 4: {}}, {4: {}}, {})
    assert set(found.spares) <= {3, 4}
    spare_inodes = {os.stat(shm / f"arena/extent-{spare:08d}.spare").st_ino for spare in found.spares}
    assert not spare_inodes & set(inodes.values())
    expected = {f"extent-{extent:08d}.{kind}" for extent in (1, *alive) for kind in ("data", "table")}
    assert names(shm) == expected | {f"extent-{spare:08d}.spare" for spare in found.spares}
    assert all("\n" not in line for line in found.dropped)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kill_between_any_two_steps(operation: str, shm: Path) -> None:
    count = steps_of(operation, shm)
    assert count > 0
    for step in range(count):
        arena = furnished(shm)
        inodes = {extent: os.fstat(arena.descriptors(extent).data).st_ino for extent in (1, 2)}
        with pytest.MonkeyPatch.context() as patch:
            fail_at(step, Killed(), patch)
            with pytest.raises(Killed):
                OPERATIONS[operation](arena)
        arena.close()

        again = start(shm)
        found = again.scan()
        check_after(shm, found, inodes)
        number = again.next_extent
        again.make_spare(number)
        again.format(number, number + 1, "b", SLOT_BYTES)
        for extent in (*found.spares, number + 1, *(each.extent for each in found.extents)):
            again.drop(extent)
        assert names(shm) == set()
        again.close()
        (shm / "state/arena.json").unlink()


@pytest.mark.parametrize("operation", ["make", "format spare", "format used"])
def test_failure_of_any_step_leaves_nothing_of_it(operation: str, shm: Path) -> None:
    for step in range(steps_of(operation, shm)):
        arena = furnished(shm)
        open_before = len(os.listdir("/proc/self/fd"))
        with pytest.MonkeyPatch.context() as patch:
            fail_at(step, OSError(errno.ENOSPC, "No space left on device"), patch)
            with pytest.raises(OSError, match="No space left"):
                OPERATIONS[operation](arena)
        lost = {"make": {4}, "format spare": {3, 4}, "format used": {2, 4}}[operation]
        left = {"1.data", "1.table", "2.data", "2.table", "3.spare"}
        assert {name.removeprefix("extent-0000000") for name in names(shm)} == {
            name for name in left if int(name[0]) not in lost
        }
        assert len(os.listdir("/proc/self/fd")) == open_before - (3 if operation == "format used" else 0)
        arena.close()
        for path in (shm / "arena").iterdir():
            path.unlink()
        (shm / "state/arena.json").unlink()


LOAD = """
import sys
from pathlib import Path
from cachesvc.arena.host import HostArena
arena = HostArena(Path(sys.argv[1]), Path(sys.argv[2]), 1 << 20, 64 << 10)
arena.scan()
number = arena.next_extent
used = []
while True:
    if len(used) < 4:
        arena.make_spare(number)
        source, number = number, number + 1
    else:
        source = used.pop(0)
        print("gone", source, flush=True)
    arena.format(source, number, "a", 4096)
    for slot in range(16):
        key = b"%d/%d" % (number, slot)
        arena.mark_writing(number, (slot,), (slot,))
        arena.mark_sealed(number, (slot,), (slot,), b"n" * 16, 0, (key,), (slot,))
        print("sealed", number, slot, flush=True)
    used.append(number)
    number += 1
"""


def test_kill_9_under_load(shm: Path) -> None:
    rng = random.Random(9)
    for _ in range(4):
        command = [sys.executable, "-c", LOAD, str(shm / "arena"), str(shm / "state")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as daemon:
            assert daemon.stdout is not None
            lines = [daemon.stdout.readline() for _ in range(rng.randrange(1, 400))]
            daemon.send_signal(signal.SIGKILL)
            lines += daemon.stdout.read().splitlines()
        said: dict[int, dict[int, bytes]] = {}
        for what, *numbers in map(str.split, lines):
            if what == "gone":
                del said[int(numbers[0])]
            elif len(numbers) == 2:
                extent, slot = map(int, numbers)
                said.setdefault(extent, {})[slot] = b"%d/%d" % (extent, slot)
        arena = start(shm)
        back = sealed(arena.scan())
        for extent, keys in said.items():
            assert back[extent].items() >= keys.items()
        for extent, keys in back.items():
            assert keys == {slot: b"%d/%d" % (extent, slot) for slot in keys}
            arena.drop(extent)
        arena.close()
        assert said


# --- clients --------------------------------------------------------------------------------------------------------


@pytest.fixture
def arena(shm: Path) -> Iterator[HostArena]:
    """Extent 2 of 16 slots and a bystander, extent 4."""
    arena = start(shm)
    for number in (1, 3):
        arena.make_spare(number)
        arena.format(number, number + 1, "a", SLOT_BYTES)
    yield arena
    arena.close()


def test_truncated_data_is_noticed(arena: HostArena) -> None:
    assert arena.check() == {}
    data = arena.descriptors(2).data
    os.ftruncate(data, 100)
    assert arena.check() == {2: f"the data file has 100 bytes, not {EXTENT_BYTES}"}
    # what the daemon does goes on: it touches no page of the data
    seal(arena, 2, 15, b"x")
    os.ftruncate(data, EXTENT_BYTES)
    assert arena.check() == {2: f"the data file holds 4096 bytes, not {EXTENT_BYTES}: there are holes in it"}
    arena.drop(2)
    assert arena.check() == {}


def test_truncated_data_is_dropped_at_restart(arena: HostArena, shm: Path) -> None:
    seal(arena, 2, 0, b"x")
    seal(arena, 4, 0, b"y")
    os.ftruncate(arena.descriptors(2).data, 0)
    arena.close()
    again = start(shm)
    found = again.scan()
    assert sealed(found) == {4: {0: b"y"}}
    assert found.dropped == (f"extent 2 dropped: the data file has 0 bytes, not {EXTENT_BYTES}",)
    again.close()


CLIENT = """
import ctypes, json, mmap, os, sys
data, table, pid, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
libc.prctl(4, 1, 0, 0, 0)  # dumpable: else /proc/self/fd itself would be closed to us, and prove nothing

def tried(call):
    try:
        call()
    except OSError as error:
        return type(error).__name__ + " " + os.strerror(error.errno)
    return "done"

def mprotect():
    address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, table, 0)
    if libc.mprotect(address, 4096, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "")

answers = {
    "map data": tried(lambda: mmap.mmap(data, 4096).write(b"x")),
    "read table": tried(lambda: mmap.mmap(table, 4096, prot=mmap.PROT_READ).close()),
    "map table": tried(lambda: mmap.mmap(table, 4096)),
    "mprotect table": tried(mprotect),
    "write table": tried(lambda: os.pwrite(table, b"x", 0)),
    "truncate table": tried(lambda: os.ftruncate(table, 0)),
    "chmod table": tried(lambda: os.fchmod(table, 0o666)),
    "read it again": tried(lambda: os.open(f"/proc/self/fd/{table}", os.O_RDONLY)),
    "reopen table": tried(lambda: os.open(f"/proc/self/fd/{table}", os.O_RDWR)),
    "list": tried(lambda: os.listdir(directory)),
    "by path": tried(lambda: os.open(f"{directory}/extent-00000002.table", os.O_RDONLY)),
    "of daemon": tried(lambda: os.listdir(f"/proc/{pid}/fd")),
}
print(json.dumps(answers))
"""


@pytest.mark.root
def test_client_can_not_write_a_table(arena: HostArena, shm: Path) -> None:
    """Another user with both descriptors: all it can do is what it was given them for."""
    shm.chmod(0o755)  # the way to the arena is open, the arena isn't
    seal(arena, 2, 0, b"x")
    data, table = arena.descriptors(2)
    before = os.pread(table, 1 << 20, 0)
    command = [sys.executable, "-c", CLIENT, *map(str, (data, table, os.getpid(), shm / "arena"))]
    client = subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=(data, table), timeout=60)
    assert json.loads(client.stdout) == {
        "map data": "done",
        "read table": "done",
        "map table": "PermissionError Permission denied",
        "mprotect table": "PermissionError Permission denied",
        "write table": "OSError Bad file descriptor",
        "truncate table": "OSError Invalid argument",
        "chmod table": "PermissionError Operation not permitted",
        "read it again": "PermissionError Permission denied",
        "reopen table": "PermissionError Permission denied",
        "list": "PermissionError Permission denied",
        "by path": "PermissionError Permission denied",
        "of daemon": "PermissionError Permission denied",
    }
    assert os.pread(table, 1 << 20, 0) == before
    assert arena.check() == {}


def test_table_descriptor_can_not_be_mapped_for_writing(arena: HostArena) -> None:
    data, table = arena.descriptors(2)
    with pytest.raises(PermissionError):
        mmap.mmap(table, 4096)
    mmap.mmap(data, 4096).close()


# --- room -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_mount(shm: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", shm], check=True)
    yield shm
    # lazily: a test that failed may still have files open there
    subprocess.run(["umount", "--lazy", shm], check=True)


@pytest.mark.root
def test_mount_that_is_full(small_mount: Path) -> None:
    arena = start(small_mount, ram_bytes=2 << 20, extent_bytes=512 << 10)
    arena.make_spare(1)
    with pytest.raises(OSError, match="No space left"):
        arena.make_spare(2)
    assert names(small_mount) == {"extent-00000001.spare"}
    arena.format(1, 3, "a", SLOT_BYTES)
    arena.close()


def test_no_extent_is_made_of_the_last_memory(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a start found free may be gone by now, or is held by clients of the last run still."""
    arena = start(shm)
    left = EXTENT_BYTES + SPARE_HEADROOM_BYTES
    monkeypatch.setattr("cachesvc.arena.host.available_bytes", lambda: left - 1)
    with pytest.raises(OSError, match="too little memory is left on this node"):
        arena.make_spare(1)
    assert names(shm) == set()
    monkeypatch.setattr("cachesvc.arena.host.available_bytes", lambda: left)
    arena.make_spare(1)
    assert arena.found_bytes() == EXTENT_BYTES
    arena.close()


def test_jobs_run_beside_the_loop(shm: Path) -> None:
    arena = start(shm, ram_bytes=64 * EXTENT_BYTES)

    def work(first: int) -> None:
        for number in range(first, first + 40, 2):
            arena.make_spare(number)
            arena.format(number, number + 1, "a", SLOT_BYTES)
            if number % 4 == 1:
                arena.drop(number + 1)

    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(work, first) for first in (1, 101, 201, 301)]
        while not all(job.done() for job in jobs):
            assert arena.check() == {}
        for job in jobs:
            job.result()
    arena.close()
    again = start(shm)
    assert len(again.scan().extents) == 40
    assert again.next_extent == 341
    again.close()
