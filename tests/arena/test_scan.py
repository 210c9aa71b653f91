from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachesvc.arena.files import DATA, SPARE, TABLE, format_data, make_spare, path_of
from cachesvc.arena.layout import ENTRY_BYTES, LAYOUT_VERSION, Header, encode_header
from cachesvc.arena.scan import Found, find_extents, found_bytes

EXTENT_BYTES = 64 << 10
SLOT_BYTES = 4096
ARENA = bytes(range(16))
BOOT = bytes(range(16, 32))


def make_extent(directory: Path, extent: int, tenant: str = "default") -> Header:
    make_spare(directory, extent, EXTENT_BYTES)
    data = path_of(directory, extent, SPARE)
    slots = EXTENT_BYTES // SLOT_BYTES
    header = Header(ARENA, BOOT, extent, data.stat().st_ino, tenant, EXTENT_BYTES, SLOT_BYTES, slots)
    format_data(directory, extent, data, header)
    return header


def scan(directory: Path, next_extent: int = 100) -> Found:
    return find_extents(directory, ARENA, BOOT, EXTENT_BYTES, next_extent)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def rewrite(directory: Path, header: Header) -> None:
    with path_of(directory, 2, TABLE).open("r+b") as table:
        table.write(encode_header(header))


def test_nothing(shm: Path) -> None:
    assert scan(shm) == Found((), (), ())


def test_everything_good_comes_back(shm: Path) -> None:
    second, first = make_extent(shm, 12, "b"), make_extent(shm, 2, "a")
    make_spare(shm, 7, EXTENT_BYTES)
    before = names(shm)
    assert scan(shm) == Found((7,), (first, second), ())
    assert names(shm) == before
    assert scan(shm, 13).dropped == ()


def test_bytes_that_are_there_whatever_becomes_of_them(shm: Path) -> None:
    """Tables aren't counted; truncated data holds less; a killed run's unfinished file counts."""
    assert found_bytes(shm) == 0
    make_extent(shm, 2)
    make_extent(shm, 3)
    os.truncate(path_of(shm, 3, DATA), 4096)
    make_spare(shm, 7, EXTENT_BYTES)
    path_of(shm, 7, SPARE).rename(shm / "extent-00000008.spare.new")
    (shm / "notes").write_bytes(bytes(8192))
    assert found_bytes(shm) == 2 * EXTENT_BYTES + 4096
    scan(shm)
    assert found_bytes(shm) == EXTENT_BYTES


# --- extents that don't match ---------------------------------------------------------------------------------------

HEADERS: dict[str, Callable[[Header], Header]] = {
    "made in another boot": lambda h: replace(h, boot=ARENA),
    "another arena": lambda h: replace(h, arena=BOOT),
    "that of extent 3": lambda h: replace(h, extent=3),
    "another data file": lambda h: replace(h, inode=h.inode + 1),
    "is for 131072 bytes of data": lambda h: replace(h, extent_bytes=2 * h.extent_bytes),
    "slots have 100 bytes": lambda h: replace(h, slot_bytes=100),
    "don't fill its data": lambda h: replace(h, slot_count=h.slot_count - 1),
    "table has 6144 bytes": lambda h: replace(h, slot_bytes=2 * h.slot_bytes, slot_count=h.slot_count // 2),
}


@pytest.mark.parametrize("reason", HEADERS)
def test_header_that_does_not_match(reason: str, shm: Path) -> None:
    bystander = make_extent(shm, 1)
    rewrite(shm, HEADERS[reason](make_extent(shm, 2)))
    found = scan(shm)
    assert found.headers == (bystander,)
    assert len(found.dropped) == 1
    assert found.dropped[0].startswith("extent 2 dropped: ")
    assert reason in found.dropped[0]
    assert names(shm) == {"extent-00000001.data", "extent-00000001.table"}
    assert scan(shm).dropped == ()


def test_table_of_another_version(shm: Path) -> None:
    make_extent(shm, 2)
    with path_of(shm, 2, TABLE).open("r+b") as table:
        table.seek(8)
        table.write((LAYOUT_VERSION + 1).to_bytes(4, "little"))
    assert scan(shm).dropped == (f"extent 2 dropped: its layout version is {LAYOUT_VERSION + 1}, this daemon reads 1",)
    assert names(shm) == set()


def punch(directory: Path) -> None:
    os.truncate(path_of(directory, 2, DATA), 0)
    os.truncate(path_of(directory, 2, DATA), EXTENT_BYTES)


def link(directory: Path) -> None:
    path_of(directory, 2, DATA).unlink()
    path_of(directory, 2, DATA).symlink_to(path_of(directory, 1, DATA))


def pipe(directory: Path) -> None:
    path_of(directory, 2, TABLE).unlink()
    os.mkfifo(path_of(directory, 2, TABLE))


FILES: dict[str, Callable[[Path], object]] = {
    "only data are there": lambda d: path_of(d, 2, TABLE).unlink(),
    "only table are there": lambda d: path_of(d, 2, DATA).unlink(),
    "only data and table and table.new": lambda d: (d / "extent-00000002.table.new").touch(),
    "data file has 65535 bytes": lambda d: os.truncate(path_of(d, 2, DATA), EXTENT_BYTES - 1),
    "data file has 65537 bytes": lambda d: os.truncate(path_of(d, 2, DATA), EXTENT_BYTES + 1),
    "there are holes in it": punch,
    "only 100 bytes": lambda d: os.truncate(path_of(d, 2, TABLE), 100),
    "table has 4096 bytes": lambda d: os.truncate(path_of(d, 2, TABLE), 4096),
    "table has 6272 bytes": lambda d: os.truncate(path_of(d, 2, TABLE), 4096 + 17 * ENTRY_BYTES),
    "it is no table": lambda d: path_of(d, 2, TABLE).write_bytes(bytes(8192)),
    "dropped: it is no plain file": link,
    "its table: it is no plain file": pipe,
    "that of extent 1": lambda d: shutil.copy(path_of(d, 1, TABLE), path_of(d, 2, TABLE)),
}


@pytest.mark.parametrize("reason", FILES)
def test_files_that_do_not_match(reason: str, shm: Path) -> None:
    bystander = make_extent(shm, 1)
    make_extent(shm, 2)
    FILES[reason](shm)
    found = scan(shm)
    assert found.headers == (bystander,)
    assert found.spares == ()
    assert found_bytes(shm) == EXTENT_BYTES
    assert len(found.dropped) == 1
    assert reason in found.dropped[0]
    assert names(shm) == {"extent-00000001.data", "extent-00000001.table"}


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 4095), bit=st.integers(0, 7))
def test_flipped_bit_in_a_header(offset: int, bit: int, shm: Path) -> None:
    make_extent(shm, 2)
    path = path_of(shm, 2, TABLE)
    table = bytearray(path.read_bytes())
    table[offset] ^= 1 << bit
    path.write_bytes(table)
    assert scan(shm).headers == ()
    assert names(shm) == set()


# --- spares and strangers -------------------------------------------------------------------------------------------


def test_data_without_table_is_no_spare(shm: Path) -> None:
    """A client of some tenant may still map it, and a spare goes to any tenant."""
    make_extent(shm, 2)
    path_of(shm, 2, TABLE).unlink()
    assert scan(shm).spares == ()


def test_unfinished_spare(shm: Path) -> None:
    make_spare(shm, 3, EXTENT_BYTES)
    (shm / "extent-00000003.spare").rename(shm / "extent-00000003.spare.new")
    assert scan(shm).dropped == ("extent 3 dropped: only spare.new are there: the last run was killed in between",)
    assert names(shm) == set()


def test_spare_of_another_size(shm: Path) -> None:
    make_spare(shm, 3, 2 * EXTENT_BYTES)
    assert scan(shm).spares == ()
    assert names(shm) == set()


def test_number_that_was_never_given_out(shm: Path) -> None:
    make_spare(shm, 3, EXTENT_BYTES)
    make_extent(shm, 4)
    found = scan(shm, next_extent=3)
    assert (found.spares, found.headers) == ((), ())
    assert "has not come to that number yet (it is at 3)" in found.dropped[0]
    assert names(shm) == set()


STRANGERS = (
    "README",
    "extent-1.data",
    "extent-00000001.data.bak",
    "extent-000000001.data",
    "extent-00000001.log",
    "xextent-00000001.data",
)


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_left_alone(name: str, shm: Path) -> None:
    (shm / name).touch()
    assert scan(shm).dropped == (f"{name} left alone: no file of an arena has such a name",)
    assert names(shm) == {name}


def test_large_numbers(shm: Path) -> None:
    make_spare(shm, 123_456_789_012, EXTENT_BYTES)
    assert scan(shm, 1 << 60).spares == (123_456_789_012,)


def test_directory_in_the_way(shm: Path) -> None:
    (shm / "extent-00000001.data").mkdir()
    with pytest.raises(OSError, match=r"extent-00000001\.data"):
        scan(shm)
