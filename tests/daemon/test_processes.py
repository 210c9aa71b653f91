"""pidfds of real processes: whose they are, one number each, news of their death."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cachesvc.daemon import processes as module
from cachesvc.daemon.processes import Processes, check_own_pidfd
from cachesvc.errors import ProtocolError

CHILD = """
import os, socket, sys, array
peer = socket.socket(fileno=int(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    fds = array.array("i", [os.pidfd_open(os.getpid())])
    peer.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
sys.stdin.read()
"""


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def receive(sock: socket.socket) -> int:
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4))
    passed = array.array("i")
    passed.frombytes(ancillary[0][2])
    return passed[0]


def start(theirs: socket.socket, count: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(theirs.fileno()), str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def test_a_process_has_one_token_until_it_dies(pair: tuple[socket.socket, socket.socket]) -> None:
    # made by us, so the kernel says that we are the peer: what it says is tested below
    ours, theirs = pair

    async def scenario() -> None:
        died: asyncio.Queue[int] = asyncio.Queue()
        processes = Processes(asyncio.get_running_loop(), died.put_nowait)
        child = start(theirs, 2)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "check_own_pidfd", lambda pidfd, peer: None)
                token = processes.attach(receive(ours), ours)
                assert processes.attach(receive(ours), ours) == token
                own = processes.attach(os.pidfd_open(os.getpid()), ours)
            assert own != token
            assert len(token) == 16
            number = processes.number(token)
            assert number is not None
            assert number != processes.number(own)
            assert len(processes) == 2
        finally:
            end(child)
        assert await asyncio.wait_for(died.get(), 30) == number
        assert len(processes) == 1
        with pytest.raises(ProtocolError, match="names no living process"):
            processes.number(token)
        processes.close()

    asyncio.run(scenario())


def test_no_descriptor_is_kept(pair: tuple[socket.socket, socket.socket]) -> None:
    async def scenario() -> None:
        processes = Processes(asyncio.get_running_loop(), lambda number: None)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            processes.attach(os.pidfd_open(os.getpid()), pair[0])
        assert len(os.listdir("/proc/self/fd")) == before + 1
        with pytest.raises(ProtocolError, match="is no pidfd"):
            processes.attach(os.eventfd(0), pair[0])
        processes.close()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(scenario())


def test_no_token_is_no_process() -> None:
    async def scenario() -> None:
        assert Processes(asyncio.get_running_loop(), lambda number: None).number(b"") is None

    asyncio.run(scenario())


def test_there_is_a_limit(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROCESSES_MAX", 0)

    async def scenario() -> None:
        processes = Processes(asyncio.get_running_loop(), lambda number: None)
        with pytest.raises(ProtocolError, match="0 processes are attached"):
            processes.attach(os.pidfd_open(os.getpid()), pair[0])

    asyncio.run(scenario())


def test_somebody_elses_pidfd_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    child = start(theirs)
    try:
        pidfd = receive(ours)
        with pytest.raises(ProtocolError, match="not the sender's own"):
            check_own_pidfd(pidfd, ours)
        os.close(pidfd)
    finally:
        end(child)


@pytest.mark.parametrize("so_peerpidfd", [77, 10_000])
@pytest.mark.parametrize("pidfs", [True, False])
def test_older_kernels(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, so_peerpidfd: int, pidfs: bool
) -> None:
    """As if there were no SO_PEERPIDFD, and as if all pidfds had one inode."""
    ours, theirs = pair
    monkeypatch.setattr(module, "_SO_PEERPIDFD", so_peerpidfd)
    if not pidfs:
        mine = os.pidfd_open(os.getpid())
        device = os.fstat(mine).st_dev
        os.close(mine)
        monkeypatch.setattr(module, "_anonymous_device", lambda: device)
    own = os.pidfd_open(os.getpid())
    check_own_pidfd(own, ours)
    os.close(own)
    child = start(theirs)
    try:
        other = receive(ours)
        if pidfs and so_peerpidfd != 77:
            check_own_pidfd(other, ours)  # nothing to compare with: can't be checked, is accepted
        else:
            with pytest.raises(ProtocolError):
                check_own_pidfd(other, ours)
        os.close(other)
    finally:
        end(child)
