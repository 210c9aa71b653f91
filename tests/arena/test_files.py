from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from cachesvc.arena.files import (
    DATA,
    SPARE,
    TABLE,
    data_fault,
    file_fault,
    find_data,
    format_data,
    make_spare,
    open_extent,
    path_of,
    remove,
)
from cachesvc.arena.layout import STATE_SEALED, Header, decode_header, table_bytes, words_view

EXTENT_BYTES = 1 << 20
SLOT_BYTES = 8192


def header_of(extent: int, data: Path, tenant: str = "default") -> Header:
    slot_count = EXTENT_BYTES // SLOT_BYTES
    inode = data.stat().st_ino
    return Header(bytes(16), bytes(16), extent, inode, tenant, EXTENT_BYTES, SLOT_BYTES, slot_count)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def formatted(directory: Path, extent: int = 2) -> Header:
    make_spare(directory, 1, EXTENT_BYTES)
    header = header_of(extent, path_of(directory, 1, SPARE))
    format_data(directory, 1, path_of(directory, 1, SPARE), header)
    return header


@pytest.mark.parametrize("size", [4096, EXTENT_BYTES, (64 << 20) + 4096])
def test_spare_is_whole_zero_and_private(size: int, shm: Path) -> None:
    make_spare(shm, 1, size)
    assert names(shm) == ["extent-00000001.spare"]
    status = path_of(shm, 1, SPARE).stat()
    assert status.st_mode & 0o777 == 0o600
    assert data_fault(status, size) is None
    assert file_fault(status) is None
    with path_of(shm, 1, SPARE).open("rb") as file:
        assert file.read().count(0) == size


def test_no_room_leaves_nothing(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        make_spare(shm, 1, EXTENT_BYTES)
    assert names(shm) == []


def test_filesystem_that_does_not_reserve(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda _fd, buffers, _at: sum(map(len, buffers)))
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, _at, size: os.ftruncate(fd, size))
    with pytest.raises(OSError, match="can't hold an arena: the data file holds 0 bytes"):
        make_spare(shm, 1, EXTENT_BYTES)
    assert names(shm) == []


def test_short_writes_go_on(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def short(descriptor: int, buffers: list[bytes], start: int) -> int:
        written.append((start, sum(map(len, buffers))))
        return os.pwrite(descriptor, b"".join(buffers)[:100_000], start)

    monkeypatch.setattr(os, "pwritev", short)
    make_spare(shm, 1, EXTENT_BYTES)
    assert written[:2] == [(0, EXTENT_BYTES), (100_000, EXTENT_BYTES - 100_000)]
    assert path_of(shm, 1, SPARE).stat().st_size == EXTENT_BYTES


def test_number_that_is_taken(shm: Path) -> None:
    (shm / "extent-00000001.spare.new").write_text("of somebody else")
    with pytest.raises(FileExistsError):
        make_spare(shm, 1, EXTENT_BYTES)
    assert names(shm) == ["extent-00000001.spare.new"]


def test_format_takes_the_data_over(shm: Path) -> None:
    header = formatted(shm)
    assert names(shm) == ["extent-00000002.data", "extent-00000002.table"]
    table = path_of(shm, 2, TABLE).read_bytes()
    assert len(table) == table_bytes(header.slot_count)
    assert decode_header(table) == header
    assert not words_view(table, header.slot_count).any()
    assert path_of(shm, 2, TABLE).stat().st_mode & 0o777 == 0o600

    again = header_of(3, path_of(shm, 2, DATA))
    assert find_data(shm, 2) == path_of(shm, 2, DATA)
    format_data(shm, 2, path_of(shm, 2, DATA), again)
    assert names(shm) == ["extent-00000003.data", "extent-00000003.table"]
    assert again.inode == header.inode


def test_header_that_can_not_be_written_changes_nothing(shm: Path) -> None:
    make_spare(shm, 1, EXTENT_BYTES)
    spare = path_of(shm, 1, SPARE)
    with pytest.raises(ValueError, match="tenant"):
        format_data(shm, 1, spare, header_of(2, spare, tenant=""))
    assert names(shm) == ["extent-00000001.spare"]


def test_no_data(shm: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_data(shm, 1)


def test_remove_takes_everything_of_one_extent(shm: Path) -> None:
    for kind in ("spare", "spare.new", "data", "table", "table.new"):
        (shm / f"extent-00000001.{kind}").touch()
    (shm / "extent-00000011.data").touch()
    remove(shm, 1)
    remove(shm, 1)
    assert names(shm) == ["extent-00000011.data"]


def test_open_extent_has_a_read_only_table(shm: Path) -> None:
    header = formatted(shm)
    opened = open_extent(shm, header)
    opened.writer.mark((1,), (6,), STATE_SEALED)
    assert words_view(os.pread(opened.table, table_bytes(header.slot_count), 0), header.slot_count)[1] == 0x602
    with pytest.raises(PermissionError):
        mmap.mmap(opened.table, 4096)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(opened.table, 0)
    mmap.mmap(opened.data, EXTENT_BYTES).close()
    opened.close()


@pytest.mark.parametrize("missing", [DATA, TABLE])
def test_open_extent_without_a_file(missing: str, shm: Path) -> None:
    header = formatted(shm)
    before = len(os.listdir("/proc/self/fd"))
    path_of(shm, 2, missing).unlink()
    with pytest.raises(FileNotFoundError):
        open_extent(shm, header)
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_extent_with_a_short_table(shm: Path) -> None:
    header = formatted(shm)
    os.truncate(path_of(shm, 2, TABLE), 4096)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="greater than file size"):
        open_extent(shm, header)
    assert len(os.listdir("/proc/self/fd")) == before


def test_faults(shm: Path) -> None:
    header = formatted(shm)
    opened = open_extent(shm, header)
    assert opened.fault() is None
    os.ftruncate(opened.data, 4096)
    assert opened.fault() == f"the data file has 4096 bytes, not {EXTENT_BYTES}"
    os.ftruncate(opened.data, EXTENT_BYTES)
    assert opened.fault() == f"the data file holds 4096 bytes, not {EXTENT_BYTES}: there are holes in it"
    os.posix_fallocate(opened.data, 0, EXTENT_BYTES)
    assert opened.fault() is None
    os.ftruncate(opened.data, 2 * EXTENT_BYTES)
    assert opened.fault() == f"the data file has {2 * EXTENT_BYTES} bytes, not {EXTENT_BYTES}"
    os.ftruncate(opened.data, EXTENT_BYTES)
    os.truncate(path_of(shm, 2, TABLE), 4096)
    assert opened.fault() == "the table was truncated"
    opened.close()


def test_strange_files(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shm / "a").touch()
    assert file_fault((shm / "a").lstat()) is None
    (shm / "b").hardlink_to(shm / "a")
    (shm / "c").symlink_to("a")
    for name in "abc":
        assert file_fault((shm / name).lstat()) == "it is no plain file"
    (shm / "b").unlink()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert file_fault((shm / "a").lstat()) == f"it belongs to uid {uid}"
