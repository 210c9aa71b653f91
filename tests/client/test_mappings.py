"""Extents in this process: attaching, mapping, views, giving up, and a daemon that hands out nonsense."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachesvc.arena.layout import STATE_FREE, STATE_SEALED, STATE_WRITING
from cachesvc.client import mappings
from cachesvc.client.mappings import Extents, Mapping
from cachesvc.errors import FormatError, ProtocolError
from cachesvc.wire.framing import encode
from cachesvc.wire.messages import Attach, Attached, ExtentInfo, ExtentsHeld, ExtentsWanted, Refused, Unmapped
from tests.support.fake_daemon import TOKEN, Close, FakeDaemon, FakeExtent, wait_for

HANG_S = 30.0
ARENA = b"u" * 16


def soon() -> float:
    return time.monotonic() + HANG_S


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped_files(folder: Path) -> int:
    """How many mappings of files below `folder` this process has."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line for line in lines)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path, slot_count=4) as daemon:
        yield daemon


@pytest.fixture
def extents(daemon: FakeDaemon) -> Iterator[Extents]:
    extents = Extents([4096])
    assert extents.attach(daemon.path, HANG_S) == TOKEN
    extents.enter(daemon.arena)
    yield extents
    extents.close()


# --- one mapping ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[FakeExtent]:
    extent = FakeExtent(tmp_path, ARENA, 7, 4096, 3)
    yield extent
    extent.close()


def mapping_of(on_disk: FakeExtent, **changes: Any) -> Mapping:
    data, table = on_disk.open()
    info = ExtentInfo(**{"extent": 7, "slot_bytes": 4096, "slot_count": 3, "attached": True, **changes})
    try:
        return Mapping(info, ARENA, data, table)
    finally:
        os.close(data)
        os.close(table)


def test_views_are_the_file(on_disk: FakeExtent) -> None:
    mapping = mapping_of(on_disk)
    view = mapping.view(1, 5)
    assert view is not None
    view[:] = b"hello"
    assert on_disk.data.read_bytes()[4096:4101] == b"hello"
    whole = mapping.view(2, 4096)
    assert whole is not None
    assert len(whole) == 4096


@pytest.mark.parametrize(("slot", "length"), [(3, 1), (-1, 1), (0, 4097), (0, -1), (2**64 - 1, 1)])
def test_there_are_no_views_outside(on_disk: FakeExtent, slot: int, length: int) -> None:
    assert mapping_of(on_disk).view(slot, length) is None


def test_a_slot_is_sealed_while_its_word_says_so(on_disk: FakeExtent) -> None:
    mapping = mapping_of(on_disk)
    assert not mapping.sealed(0, 5)
    on_disk.mark(0, 5, STATE_SEALED)
    assert mapping.sealed(0, 5)
    assert not mapping.sealed(0, 4)
    assert not mapping.sealed(1, 5)
    on_disk.mark(0, 6, STATE_FREE)
    assert not mapping.sealed(0, 5)
    assert not mapping.sealed(0, 2**64 - 1)


def test_a_slot_is_given_out_while_its_word_says_so(on_disk: FakeExtent) -> None:
    mapping = mapping_of(on_disk)
    assert not mapping.writing(1, 4)
    on_disk.mark(1, 4, STATE_WRITING)
    assert mapping.writing(1, 4)
    assert not mapping.sealed(1, 4)
    assert not mapping.writing(1, 5)
    assert not mapping.writing(2, 4)
    on_disk.mark(1, 4, STATE_SEALED)
    assert not mapping.writing(1, 4)
    on_disk.mark(1, 5, STATE_FREE)
    assert not mapping.writing(1, 5)


def test_a_mapping_knows_its_arena(on_disk: FakeExtent) -> None:
    assert mapping_of(on_disk).arena == ARENA


def test_pages_are_populated_in_steps(on_disk: FakeExtent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mappings, "POPULATE_STEP_BYTES", 8192)
    mapping, counts = mapping_of(on_disk), Counter[str]()
    assert mapping.populate(counts)
    assert not mapping.populate(counts)
    assert not mapping.populate(counts)
    assert not counts


def test_a_kernel_that_cannot_populate_is_counted_and_left_alone(
    on_disk: FakeExtent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "_MADV_POPULATE_WRITE", 9999)
    mapping, counts = mapping_of(on_disk), Counter[str]()
    assert not mapping.populate(counts)
    assert not mapping.populate(counts)
    assert counts == {"populate_EINVAL": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"extent": 8},
        {"slot_bytes": 8192},
        {"slot_count": 2},
        {"slot_count": 4},
        {"slot_count": 0},
        {"slot_bytes": 2**63, "slot_count": 2**63},
        {"slot_bytes": 2**64 - 1, "slot_count": 1},
    ],
)
def test_an_extent_that_is_not_what_was_said_is_refused(on_disk: FakeExtent, changes: dict[str, int]) -> None:
    with pytest.raises(FormatError):
        mapping_of(on_disk, **changes)


def test_a_truncated_file_is_refused(on_disk: FakeExtent) -> None:
    with on_disk.data.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(FormatError, match="can't be mapped"):
        mapping_of(on_disk)


# --- attaching ------------------------------------------------------------------------------------------------------


def test_attaching_passes_our_own_pidfd(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        got: list[str] = []

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                assert peer.recv(2) == b"F\x01"
                data, fds, _, _ = socket.recv_fds(peer, 100, 4)
                assert data == encode(Attach(1))
                got.extend(Path(f"/proc/self/fdinfo/{fd}").read_text() for fd in fds)
                for fd in fds:
                    os.close(fd)
                peer.sendall(encode(Attached(1, b"tok")))

        thread = threading.Thread(target=answer)
        thread.start()
        extents = Extents([4096])
        assert extents.attach(str(tmp_path / "s"), HANG_S) == b"tok"
        thread.join()
        extents.close()
    assert len(got) == 1
    assert f"Pid:\t{os.getpid()}\n" in got[0]


def test_without_pidfds_none_is_sent(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    extents = Extents([4096])
    assert extents.attach(daemon.path, HANG_S) == TOKEN
    extents.close()


def closing(message: Attach) -> None:
    raise Close


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda message: Refused(0, "protocol", "no"), ProtocolError),
        (lambda message: ExtentsHeld(message.call, 1, [], False), ProtocolError),
        (lambda message: Attached(message.call + 1, b""), ProtocolError),
        (lambda message: b"\xff\xff\xff\xff", ProtocolError),
        (lambda message: b"\x01\x00\x00\x00\xc1", ProtocolError),
        (closing, OSError),
    ],
    ids=["refused", "other message", "other call", "oversized", "garbage", "closed"],
)
def test_attaching_fails_clean(daemon: FakeDaemon, answer: Any, error: type[Exception]) -> None:
    daemon.on[Attach] = answer
    extents, before = Extents([4096]), open_files()
    with pytest.raises(error):
        extents.attach(daemon.path, HANG_S)
    assert not extents.attached()
    wait_for(lambda: open_files() <= before + 1)
    assert not extents.refresh(soon())


def test_a_daemon_that_does_not_answer_costs_the_timeout(daemon: FakeDaemon) -> None:
    daemon.on[Attach] = lambda message: None
    extents = Extents([4096])
    with pytest.raises(TimeoutError):
        extents.attach(daemon.path, 0.01)
    assert not extents.attached()


# --- asking for extents ---------------------------------------------------------------------------------------------


def test_extents_are_mapped_once(daemon: FakeDaemon, extents: Extents) -> None:
    assert extents.refresh(soon())
    assert list(extents.mapped) == [1]
    assert extents.version == daemon.version
    first = extents.mapped[1]
    daemon.add_extent()
    assert extents.refresh(soon())
    assert list(extents.mapped) == [1, 2]
    assert extents.mapped[1] is first
    assert daemon.got(ExtentsWanted)[1].held == [1]


def test_a_long_answer_comes_in_parts(daemon: FakeDaemon, extents: Extents) -> None:
    daemon.add_extent()
    daemon.add_extent()

    def one_at_a_time(wanted: ExtentsWanted) -> ExtentsHeld:
        lacking = [number for number in daemon.extents if number not in wanted.held]
        infos = [ExtentInfo(number, 4096, 4, number in lacking[:1]) for number in daemon.extents]
        return ExtentsHeld(wanted.call, daemon.version, infos, len(lacking) > 1)

    daemon.on[ExtentsWanted] = one_at_a_time
    assert extents.refresh(soon())
    assert sorted(extents.mapped) == [1, 2, 3]
    assert extents.version == daemon.version
    assert len(daemon.got(ExtentsWanted)) == 3


def test_ensuring_asks_only_if_something_is_missing(daemon: FakeDaemon, extents: Extents) -> None:
    assert extents.ensure([1], soon())
    assert extents.ensure([1, 1], soon())
    assert extents.ensure([], soon())
    assert len(daemon.got(ExtentsWanted)) == 1
    assert not extents.ensure([1, 99], soon())
    assert len(daemon.got(ExtentsWanted)) == 2


def test_an_extent_that_went_is_unmapped_when_its_last_view_dies(
    daemon: FakeDaemon, extents: Extents, tmp_path: Path
) -> None:
    extents.refresh(soon())
    view = extents.mapped[1].view(0, 10)
    assert view is not None
    array = np.frombuffer(view, np.uint8)
    daemon.replace_extents()
    extents.refresh(soon())
    assert list(extents.mapped) == [2]
    assert mapped_files(tmp_path) >= 1
    del view
    extents.report_gone()
    assert daemon.got(Unmapped) == []
    assert array[0] == 0
    del array
    gc.collect()
    extents.report_gone()
    wait_for(lambda: daemon.got(Unmapped) == [Unmapped([1])])
    extents.report_gone()
    extents.refresh(soon())
    assert len(daemon.got(Unmapped)) == 1


def test_nothing_stays_open_or_mapped(daemon: FakeDaemon, tmp_path: Path) -> None:
    gc.collect()
    before, maps = open_files(), mapped_files(tmp_path)
    extents = Extents([4096])
    extents.attach(daemon.path, HANG_S)
    extents.enter(daemon.arena)
    extents.refresh(soon())
    extents.populate()
    assert mapped_files(tmp_path) > maps
    extents.close()
    assert mapped_files(tmp_path) == maps
    daemon.stop()
    assert open_files() <= before
    daemon.start()


def test_another_arena_ends_every_mapping(daemon: FakeDaemon, extents: Extents) -> None:
    extents.refresh(soon())
    assert not extents.enter(daemon.arena)
    assert list(extents.mapped) == [1]
    assert extents.version == -1
    assert extents.enter(b"v" * 16)
    assert extents.mapped == {}
    extents.report_gone()
    extents.refresh(soon())
    assert daemon.got(Unmapped) == [], "the new arena may have an extent of that number"
    assert extents.mapped == {}, "its table names the old arena"
    assert extents.counts["unmappable"] == 1


def test_an_extent_that_cannot_be_mapped_is_asked_for_again(
    daemon: FakeDaemon, extents: Extents, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mappings.Mapping

    def no_memory(*_: object) -> Mapping:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mappings, "Mapping", no_memory)
    assert extents.refresh(soon())
    assert extents.version == -1
    monkeypatch.setattr(mappings, "Mapping", real)
    assert extents.refresh(soon())
    assert extents.version == daemon.version
    assert list(extents.mapped) == [1]


@pytest.mark.parametrize(
    "answer",
    [
        lambda wanted: ExtentsHeld(wanted.call, 1, [], True),
        lambda wanted: Attached(wanted.call, b""),
        lambda wanted: Refused(wanted.call, "protocol", "no"),
        lambda wanted: [encode(ExtentsHeld(wanted.call, 1, [ExtentInfo(5, 4096, 4, True)], False))],
        lambda wanted: ExtentsHeld(wanted.call + 1, 1, [], False),
        lambda wanted: b"\x05\x00\x00\x00abcde",
        lambda wanted: [encode(ExtentsHeld(wanted.call, 1, [], False)) + b"x"],
    ],
    ids=["more of nothing", "other message", "refused", "no descriptors", "other call", "garbage", "trailing"],
)
def test_nonsense_ends_the_connection_and_keeps_the_mappings(daemon: FakeDaemon, extents: Extents, answer: Any) -> None:
    extents.refresh(soon())
    before = open_files()
    daemon.on[ExtentsWanted] = answer
    assert not extents.refresh(soon())
    assert not extents.attached()
    assert list(extents.mapped) == [1]
    assert open_files() <= before
    del daemon.on[ExtentsWanted]
    extents.attach(daemon.path, HANG_S)
    assert extents.refresh(soon())


def test_a_daemon_that_hangs_costs_the_deadline(daemon: FakeDaemon, extents: Extents) -> None:
    daemon.stall()
    try:
        assert not extents.refresh(time.monotonic() + 0.01)
    finally:
        daemon.resume()
    assert not extents.attached()


def test_reporting_without_a_connection_is_put_off(daemon: FakeDaemon, extents: Extents) -> None:
    extents.refresh(soon())
    daemon.replace_extents()
    extents.refresh(soon())
    daemon.on[ExtentsWanted] = lambda wanted: Refused(0, "protocol", "no")
    assert not extents.refresh(soon())
    gc.collect()
    extents.report_gone()
    assert daemon.got(Unmapped) == []
    extents.attach(daemon.path, HANG_S)
    extents.report_gone()
    wait_for(lambda: daemon.got(Unmapped) == [Unmapped([1])])


def test_disowned_extents_ask_nobody(daemon: FakeDaemon, extents: Extents) -> None:
    extents.refresh(soon())
    extents.disown()
    daemon.add_extent()
    assert not extents.refresh(soon())
    assert list(extents.mapped) == [1]


def test_too_many_open_files_are_no_old_kernel(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pidfd the daemon would wait by the clock for this process, for as long as it lives."""

    def refuse(pid: int) -> int:
        raise OSError(24, "Too many open files")

    extents = Extents([4096])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        with pytest.raises(OSError, match="Too many"):
            extents.attach(daemon.path, HANG_S)
    assert not extents.attached()
    assert extents.attach(daemon.path, HANG_S) == TOKEN
    extents.close()


def test_closing_says_what_is_unmapped(daemon: FakeDaemon, extents: Extents) -> None:
    """But not what a view still shows."""
    other = daemon.add_extent()
    assert extents.refresh(time.monotonic() + HANG_S)
    view = extents.mapped[1].view(0, 1)
    extents.close()
    wait_for(lambda: daemon.got(Unmapped))
    assert daemon.got(Unmapped) == [Unmapped([other.number])]
    assert view is not None
