from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachesvc.arena.identity import IDENTITY_FILE, LOCK_FILE, Claim, read_boot_id
from cachesvc.errors import OperatorError

MIB = 1 << 20
BOOT = bytes(range(16))


def claim(
    shm: Path,
    *,
    arena: str = "arena",
    state: str = "state",
    ram: int = 64 * MIB,
    size: int | None = None,
    boot: bytes = BOOT,
) -> Claim:
    return Claim(shm / arena, shm / state, ram, size, boot)


def record(shm: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((shm / "state" / IDENTITY_FILE).read_text())
    return found


# --- identity -------------------------------------------------------------------------------------------------------


def test_first_start(shm: Path) -> None:
    mine = claim(shm)
    assert mine.cold_start == f"there is no {shm}/state/{IDENTITY_FILE}"
    assert (len(mine.arena), mine.boot, mine.extent_bytes, mine.first_extent) == (16, BOOT, 16 * MIB, 1)
    assert record(shm) == {"arena": mine.arena.hex(), "boot": BOOT.hex(), "extent_bytes": 16 * MIB, "next_extent": 1}
    for path, mode in ((shm / "arena", 0o700), (shm / "state", 0o700), (shm / "state" / LOCK_FILE, 0o600)):
        assert path.stat().st_mode & 0o777 == mode
    mine.release()


def test_identity_survives(shm: Path) -> None:
    first = claim(shm)
    first.use(4)
    first.use(2)
    first.release()
    second = claim(shm)
    assert second.cold_start is None
    assert second.arena == first.arena
    assert second.first_extent == 5
    second.use(5)
    second.release()
    assert record(shm)["next_extent"] == 6


def test_number_of_an_earlier_run_is_refused(shm: Path) -> None:
    first = claim(shm)
    first.use(1)
    first.use(1)  # the same run may ask twice: a job that failed may be tried again
    first.release()
    second = claim(shm)
    with pytest.raises(ValueError, match="numbers start at 2"):
        second.use(1)
    second.release()


def test_size_of_extents_stays_what_it_was(shm: Path) -> None:
    claim(shm, ram=64 * MIB).release()
    larger = claim(shm, ram=64 << 30)
    assert (larger.cold_start, larger.extent_bytes) == (None, 16 * MIB)
    larger.release()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boot": bytes(16)}, "the machine was booted since"),
        ({"size": 32 * MIB}, "extents had 16777216 bytes, 33554432 are configured"),
        ({"ram": 31 * MIB}, "extents of 16777216 bytes are too large for an arena of 32505856"),
    ],
)
def test_another_arena(changes: dict[str, object], reason: str, shm: Path) -> None:
    first = claim(shm)
    first.use(9)
    first.release()
    second = claim(shm, **changes)  # type: ignore[arg-type]
    assert second.cold_start == reason
    assert second.arena != first.arena
    assert second.first_extent == 1
    second.release()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\0" * 100,
        '{"arena": 3}',
        '{"arena": "zz", "boot": "00", "extent_bytes": 1, "next_extent": 1}',
        f'{{"arena": "{"0" * 32}", "boot": "{"0" * 32}", "extent_bytes": 0, "next_extent": 1}}',
        f'{{"arena": "{"0" * 32}", "boot": "{"0" * 32}", "extent_bytes": "1", "next_extent": 1}}',
    ],
)
def test_damaged_record_is_a_cold_start(text: str, shm: Path) -> None:
    claim(shm).release()
    (shm / "state" / IDENTITY_FILE).write_text(text)
    mine = claim(shm)
    assert mine.cold_start is not None
    assert "is damaged" in mine.cold_start
    mine.release()
    claim(shm).release()


def test_unreadable_record_is_a_cold_start(shm: Path) -> None:
    (shm / "state").mkdir(mode=0o700)
    (shm / "state" / IDENTITY_FILE).mkdir()
    with pytest.raises(OperatorError, match="can't write"):
        claim(shm)
    (shm / "state" / IDENTITY_FILE).rmdir()
    claim(shm).release()


def test_boot_id_of_this_machine() -> None:
    assert len(read_boot_id()) == 16
    assert read_boot_id() == read_boot_id()


# --- one daemon -----------------------------------------------------------------------------------------------------

SECOND = """
import sys
from pathlib import Path
from cachesvc.arena.identity import Claim
from cachesvc.errors import OperatorError
try:
    Claim(Path(sys.argv[1]), Path(sys.argv[2]), 64 << 20, None, bytes(range(16)))
except OperatorError as error:
    print(error)
    sys.exit(2)
"""


def second_daemon(shm: Path, arena: str, state: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SECOND, str(shm / arena), str(shm / state)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=root)


@pytest.mark.parametrize(
    ("arena", "state", "taken"), [("other", "state", "state_dir"), ("arena", "other", "arena_dir")]
)
def test_second_daemon(arena: str, state: str, taken: str, shm: Path) -> None:
    mine = claim(shm)
    before = record(shm)
    refused = second_daemon(shm, arena, state)
    assert refused.returncode == 2
    assert refused.stdout.count("\n") == 1
    assert f"{taken} {shm / taken.removesuffix('_dir')} is in use by another cachesvc daemon: stop" in refused.stdout
    assert record(shm) == before
    mine.release()
    assert second_daemon(shm, arena, state).returncode == 0


def test_refused_claim_holds_nothing(shm: Path) -> None:
    mine = claim(shm)
    with pytest.raises(OperatorError):
        claim(shm, state="other")
    mine.release()
    claim(shm, state="other").release()


# --- directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o710, 0o701])
def test_arena_that_others_can_enter(mode: int, shm: Path) -> None:
    (shm / "arena").mkdir()
    (shm / "arena").chmod(mode)
    with pytest.raises(OperatorError, match=rf"^arena_dir .* \(mode {mode:04o}\): chmod 700 it, or name .*$"):
        claim(shm)


def test_state_that_others_can_read_but_not_write(shm: Path) -> None:
    (shm / "state").mkdir()
    (shm / "state").chmod(0o755)
    claim(shm).release()
    (shm / "state").chmod(0o775)
    with pytest.raises(OperatorError, match=r"^state_dir .* \(mode 0775\)"):
        claim(shm)


@pytest.mark.parametrize("what", ["arena", "state"])
def test_no_directory(what: str, shm: Path) -> None:
    (shm / what).write_text("")
    with pytest.raises(OperatorError, match=rf"^{what}_dir .* can't be used: File exists; make it a directory"):
        claim(shm)


def test_symlink_is_not_followed(shm: Path) -> None:
    (shm / "elsewhere").mkdir(mode=0o700)
    (shm / "arena").symlink_to("elsewhere")
    with pytest.raises(OperatorError, match="no symlink"):
        claim(shm)


def test_of_somebody_else(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shm / "arena").mkdir(mode=0o700)
    uid = os.geteuid()
    claim(shm).release()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(OperatorError, match=f"belongs to uid {uid}, this daemon runs as uid {uid + 1}"):
        claim(shm)


@pytest.mark.root
def test_of_somebody_else_for_root(shm: Path) -> None:
    (shm / "arena").mkdir(mode=0o700)
    os.chown(shm / "arena", 65534, 65534)
    with pytest.raises(OperatorError, match=r"arena_dir .* belongs to uid 65534, this daemon runs as uid 0"):
        claim(shm)


def test_directory_that_can_not_be_made(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OperatorError, match=r"state_dir .* can't be used: Permission denied; make it a directory"):
        claim(shm)
