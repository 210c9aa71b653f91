from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachesvc.arena.preflight import Limits, cgroup_limit, filesystem, preflight, read_limits
from cachesvc.errors import OperatorError

MIB = 1 << 20
GIB = 1 << 30
ARENA = Path("/somewhere/arena")


def check(ram: int, existing: int, limits: Limits) -> None:
    preflight(ram, existing, ARENA, lambda _: limits)


# --- deciding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ram", "existing", "limits"),
    [
        (8 * GIB, 0, Limits(9 * GIB, 8 * GIB * 33 // 32, 9 * GIB)),
        (8 * GIB, 0, Limits(9 * GIB, None, None)),
        # a full arena on 60 % of the mount restarts: its pages are neither available nor free any more
        (6 * GIB, 6 * GIB, Limits(2 * GIB, 4 * GIB, None)),
        (6 * GIB, 6 * GIB, Limits(0, 0, 7 * GIB)),
        (6 * GIB, 4 * GIB, Limits(3 * GIB, 2 * GIB * 33 // 32, None)),
        # the arena was made smaller
        (2 * GIB, 6 * GIB, Limits(0, 0, 3 * GIB)),
    ],
)
def test_fits(ram: int, existing: int, limits: Limits) -> None:
    check(ram, existing, limits)


@pytest.mark.parametrize(
    ("ram", "existing", "limits", "room_mib", "advice"),
    [
        (8 * GIB, 0, Limits(9 * GIB - 1, None, None), 8191, ["free some memory"]),
        # tables need room as well
        (8 * GIB, 0, Limits(9 * GIB, 8 * GIB * 33 // 32 - 1, None), 8191, ["remount it with a larger size="]),
        (8 * GIB, 0, Limits(90 * GIB, 80 * GIB, 9 * GIB - 1), 8191, ["raise the cgroup's limit to 9.00 GiB"]),
        # what exists must fit the cgroup too
        (8 * GIB, 8 * GIB, Limits(90 * GIB, 80 * GIB, 8 * GIB), 7168, ["raise the cgroup's limit to 9.00 GiB"]),
        (8 * GIB, 4 * GIB, Limits(4 * GIB, 2 * GIB * 33 // 32, None), 6144, ["free some memory", "remount it"]),
        (8 * GIB, 0, Limits(GIB, 0, GIB), 0, ["free some memory", "remount it", "raise the cgroup's"]),
    ],
)
def test_does_not_fit(ram: int, existing: int, limits: Limits, room_mib: int, advice: list[str]) -> None:
    with pytest.raises(OperatorError) as refusal:
        check(ram, existing, limits)
    line = str(refusal.value)
    assert "\n" not in line
    assert f"{ram / GIB:.2f} GiB, {(ram - existing) / GIB:.2f} GiB of it still to allocate" in line
    for number in (limits.available, limits.mount_free, limits.cgroup):
        assert number is None or f"{number / GIB:.2f} GiB" in line
    assert f"set ram_bytes to {room_mib}MiB or less" in line
    assert all(each in line for each in advice)
    assert len(re.findall(", or ", line)) == len(advice)
    check(room_mib * MIB, min(existing, room_mib * MIB), limits)


# --- reading --------------------------------------------------------------------------------------------------------


def node(tmp_path: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A fake /proc and /sys/fs/cgroup."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  100 kB\nMemAvailable:    64 kB\nHugePages_Free: 0\n")
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    return tmp_path / "proc", tmp_path / "cgroup"


V1_UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": "4096\n"}, 4096),
        ("0::/a/b\n", {"a/b/memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "8192\n"}, 8192),
        ("0::/a/b\n", {"a/b/memory.max": "4096\n", "a/memory.max": "8192\n"}, 4096),
        # a container sees its own cgroup as the root, whatever the path says
        ("0::/../../other\n", {"memory.max": "4096\n"}, 4096),
        ("0::/kubepods/pod1\n", {"memory.max": "4096\n"}, 4096),
        ("0::/a\n", {"unified/a/memory.max": "4096\n"}, 4096),
        ("3:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": "4096\n"}, 4096),
        ("3:memory:/a\n", {"memory/memory.limit_in_bytes": "4096\n"}, 4096),
        (
            "3:memory:/a\n0::/a\n",
            {"memory/a/memory.limit_in_bytes": V1_UNLIMITED, "memory/memory.limit_in_bytes": V1_UNLIMITED},
            None,
        ),
        ("4:cpuset:/a\n", {"memory/a/memory.limit_in_bytes": "4096\n"}, None),
        ("1:name=systemd:/a:b\n0::/a:b\n", {"a:b/memory.max": "4096\n"}, 4096),
    ],
)
def test_cgroup_limit(cgroup: str, files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    assert cgroup_limit(*node(tmp_path, cgroup, files)) == limit


def test_limits_are_read(tmp_path: Path, shm: Path) -> None:
    limits = read_limits(shm, *node(tmp_path, "0::/\n", {"memory.max": "max\n"}))
    assert limits.available == 64 * 1024
    assert limits.cgroup is None
    assert limits.mount_free is not None
    assert limits.mount_free > 0


def test_no_proc_cgroup_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path, tmp_path) is None


def test_kernel_without_mem_available(tmp_path: Path, shm: Path) -> None:
    proc, cgroups = node(tmp_path, "", {})
    (proc / "meminfo").write_text("MemFree: 12 kB\n")
    with pytest.raises(OperatorError, match="kernel is too old"):
        read_limits(shm, proc, cgroups)


def test_limits_of_this_machine(shm: Path) -> None:
    limits = read_limits(shm)
    assert limits.available > 0
    with pytest.raises(OperatorError, match=r"MemAvailable .* GiB, of which"):
        preflight(1 << 60, 0, shm)


# --- the medium -----------------------------------------------------------------------------------------------------


def mounts(tmp_path: Path, kind: str) -> Path:
    """A fake /proc that says on what kind of file system `tmp_path` lies."""
    device = tmp_path.stat().st_dev
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(
        "21 1 999:7 / /sys rw shared:1 - sysfs sysfs rw\n"
        f"22 1 {os.major(device)}:{os.minor(device)} / /x rw,noatime shared:1 master:2 - {kind} /dev/x rw\n"
    )
    return tmp_path


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_the_kind_of_a_file_system(tmp_path: Path, kind: str) -> None:
    assert filesystem(tmp_path, mounts(tmp_path, kind)) == kind
    assert filesystem(Path("/proc"), tmp_path) is None, "not in the list"
    assert filesystem(tmp_path / "nowhere", tmp_path) is None
    assert filesystem(tmp_path, tmp_path / "nowhere") is None


def test_an_arena_on_a_disk_is_refused(tmp_path: Path, shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(90 * GIB, None, None)
    preflight(GIB, 0, shm, lambda _: limits)
    monkeypatch.setattr("cachesvc.arena.preflight.filesystem", lambda _: "xfs")
    with pytest.raises(OperatorError, match=f"arena_dir {tmp_path} lies on xfs, not in memory: set arena_dir to"):
        preflight(GIB, 0, tmp_path, lambda _: limits)
    monkeypatch.setattr("cachesvc.arena.preflight.filesystem", lambda _: None)
    preflight(GIB, 0, tmp_path, lambda _: limits)


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.root
def test_mount_that_is_too_small(small_mount: Path) -> None:
    preflight(15 * MIB, 0, small_mount)
    with pytest.raises(OperatorError, match=rf"0.02 GiB free in the mount of {small_mount}.* set ram_bytes to 15MiB"):
        preflight(16 * MIB, 0, small_mount)
    preflight(16 * MIB, MIB, small_mount)
