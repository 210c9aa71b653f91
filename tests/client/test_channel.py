"""The channel's states: up, down, closed; who is told what; nothing waits for a dead daemon twice."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from cachesvc.client import channel as channel_module
from cachesvc.client.channel import REQUESTS_LATER_MAX, TICKETS_LATER_MAX, Channel, Later, State
from cachesvc.client.connection import Connection
from cachesvc.errors import ProtocolError
from cachesvc.types import KeyState
from cachesvc.wire.framing import FrameReader, decode_control_request, encode
from cachesvc.wire.messages import (
    Abort,
    ControlReply,
    ControlRequest,
    Done,
    EndRequests,
    Looked,
    Lookup,
    Ping,
    Pong,
    Refused,
    Release,
    pack_keys,
)
from tests.support.fake_daemon import wait_for

HANG_S = 30.0
KEYS = pack_keys(0, [b"k"])


class Wired:
    """A channel that is up, and the daemon's end of its socket, played by the test."""

    def __init__(self) -> None:
        self.woken = 0
        self.channel = Channel(self._wake)
        self.plug()

    def _wake(self) -> None:
        self.woken += 1

    @property
    def state(self) -> str:
        return self.channel.state.value

    def plug(self) -> None:
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.settimeout(HANG_S)
        self._reader = FrameReader()
        self._preface = False
        self.channel.install(Connection(ours, self.channel.hear))

    def messages(self) -> list[ControlRequest]:
        """What one read of the peer brings."""
        if not self._preface:
            assert self.peer.recv(2) == b"C\x01"
            self._preface = True
        n = self.peer.recv_into(self._reader.buffer())
        return [decode_control_request(payload) for payload in self._reader.advance(n)]

    def nothing_was_sent(self) -> bool:
        self.peer.setblocking(False)
        try:
            return not self.peer.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.peer.settimeout(HANG_S)

    def lookup(self, seconds: float = HANG_S, **options: object) -> object:
        request = Lookup(self.channel.number(), KEYS)
        return self.channel.call([request], first, time.monotonic() + seconds, **options)  # type: ignore[arg-type]

    def play(self, answer: Callable[[ControlRequest], Sequence[ControlReply]]) -> threading.Thread:
        """Answer the next read's messages in a thread."""

        def run() -> None:
            for message in self.messages():
                self.peer.sendall(b"".join(map(encode, answer(message))))

        thread = threading.Thread(target=run)
        thread.start()
        return thread


def first(replies: list[ControlReply]) -> ControlReply:
    return replies[0]


def looked(message: ControlRequest) -> list[ControlReply]:
    assert isinstance(message, Lookup)
    return [Looked(message.call, b"\x01", 1)]


@pytest.fixture
def wired() -> Iterator[Wired]:
    wired = Wired()
    yield wired
    wired.channel.close(HANG_S)
    wired.peer.close()


# --- up -------------------------------------------------------------------------------------------------------------


def test_a_call_is_answered(wired: Wired) -> None:
    thread = wired.play(looked)
    assert wired.lookup() == Looked(1, b"\x01", 1)
    thread.join()
    assert wired.state == "up"
    assert wired.channel.error == ""


def test_a_batch_is_sent_at_once_and_answered_together(wired: Wired) -> None:
    thread = wired.play(looked)
    requests = [Lookup(wired.channel.number(), KEYS) for _ in range(5)]
    replies = wired.channel.call(requests, list, time.monotonic() + HANG_S)
    thread.join()
    assert replies == [Looked(request.call, b"\x01", 1) for request in requests]


def test_a_new_version_wakes_the_background_thread_once(wired: Wired) -> None:
    for _ in range(2):
        thread = wired.play(looked)
        wired.lookup()
        thread.join()
    assert wired.channel.extents_version == 1
    assert wired.woken == 1


def test_one_way_messages_leave_at_once(wired: Wired) -> None:
    wired.channel.tell(Release, [1, 2])
    assert wired.messages() == [Release([1, 2])]


def test_one_way_messages_told_during_a_call_leave_after_it(wired: Wired) -> None:
    def tell_and_answer(message: ControlRequest) -> list[ControlReply]:
        wired.channel.tell(Abort, [7])
        assert wired.nothing_was_sent()
        return looked(message)

    thread = wired.play(tell_and_answer)
    wired.lookup()
    thread.join()
    assert wired.messages() == [Abort([7])]


def test_threads_share_the_channel(wired: Wired) -> None:
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for message in wired.messages():
                if isinstance(message, Lookup):
                    wired.peer.sendall(encode(Looked(message.call, message.keys.blob, 1)))

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    wrong: list[object] = []

    def ask(key: bytes) -> None:
        for _ in range(50):
            request = Lookup(wired.channel.number(), pack_keys(0, [key]))
            got = wired.channel.call([request], first, time.monotonic() + HANG_S)
            if not isinstance(got, Looked) or (got.call, got.states) != (request.call, key):
                wrong.append(got)

    threads = [threading.Thread(target=ask, args=(bytes([i]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    wired.channel.tell(Release, [1])
    server.join(HANG_S)
    assert wrong == []


def test_waiting_for_the_lock_counts_and_says_nothing_of_the_daemon(wired: Wired) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold(replies: list[ControlReply]) -> ControlReply:
        inside.set()
        assert go_on.wait(HANG_S)
        return replies[0]

    server = wired.play(looked)
    request = Lookup(wired.channel.number(), KEYS)
    holder = threading.Thread(target=wired.channel.call, args=([request], hold, time.monotonic() + HANG_S))
    holder.start()
    assert inside.wait(HANG_S)
    assert wired.lookup(0.01) is KeyState.DEADLINE
    assert wired.state == "up"
    go_on.set()
    holder.join()
    server.join()


# --- down and up again ----------------------------------------------------------------------------------------------


def test_one_missed_deadline_and_calls_answer_locally(wired: Wired) -> None:
    assert wired.lookup(0.01) is KeyState.DEADLINE
    assert wired.state == "down"
    wired.messages()
    assert wired.lookup() is KeyState.DAEMON_DOWN
    assert wired.nothing_was_sent()
    assert wired.channel.connected()
    assert wired.woken


def test_a_late_reply_is_dropped_and_a_pong_revives(wired: Wired) -> None:
    assert wired.lookup(0.01, undo=(Release, [5])) is KeyState.DEADLINE
    assert [type(message) for message in wired.messages()] == [Lookup]
    wired.channel.revive(0.0)
    release, ping = wired.messages()
    assert release == Release([5])
    assert isinstance(ping, Ping)
    wired.peer.sendall(encode(Looked(1, b"\x01", 1)))
    wired.channel.revive(0.01)
    assert wired.state == "down"
    assert wired.nothing_was_sent()
    wired.peer.sendall(encode(Pong(ping.call, 1)))
    wired.channel.revive(HANG_S)
    assert wired.state == "up"
    thread = wired.play(lambda message: [Looked(message.call, b"\x02", 1)] if isinstance(message, Lookup) else [])
    assert wired.lookup() == Looked(3, b"\x02", 1)
    thread.join()


def test_what_is_told_while_down_leaves_when_it_is_up_again(wired: Wired) -> None:
    wired.lookup(0.01)
    wired.messages()
    wired.channel.tell(Release, [1])
    wired.channel.tell(Release, [2])
    wired.channel.tell(EndRequests, [3])
    assert wired.nothing_was_sent()
    wired.channel.revive(0.0)
    release, ended, _ping = wired.messages()
    assert (release, ended) == (Release([1, 2]), EndRequests([3]))


def test_a_connection_that_stays_silent_is_given_up(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream may have broken in the middle of a frame: then no pong will ever be read from it."""
    wired.lookup(0.01)
    wired.peer.sendall(b"\xff\xff\x00\x00 the rest never comes")
    wired.channel.revive(0.01)
    assert wired.channel.connected()
    monkeypatch.setattr("cachesvc.client.channel.REVIVE_S", 0.0)
    wired.channel.revive(0.01)
    assert not wired.channel.connected()
    assert wired.state == "down"


@pytest.mark.parametrize(
    "raw",
    [b"\x01\x00\x00\x00\xc1", encode(Pong(99, 1)), encode(Refused(0, "protocol", "no"))],
    ids=["garbage", "wrong call", "refused"],
)
def test_garbage_closes_the_connection(wired: Wired, raw: bytes) -> None:
    wired.peer.sendall(raw)
    assert wired.lookup(undo=(Abort, [9])) is KeyState.DAEMON_DOWN
    assert wired.state == "down"
    assert not wired.channel.connected()
    assert wired.lookup() is KeyState.DAEMON_DOWN
    wired.peer.close()
    wired.plug()
    assert wired.messages() == [Abort([9])]


def test_a_reply_that_cannot_be_closes_the_connection(wired: Wired) -> None:
    def refuse(replies: list[ControlReply]) -> None:
        raise ProtocolError("two states came for one key")

    thread = wired.play(looked)
    got = wired.channel.call([Lookup(1, KEYS)], refuse, time.monotonic() + HANG_S, (Release, [4]))
    thread.join()
    assert got is KeyState.DAEMON_DOWN
    assert not wired.channel.connected()
    assert wired.channel.error == "two states came for one key"


def test_the_end_of_the_daemon_is_noticed_by_the_next_call(wired: Wired) -> None:
    wired.peer.close()
    assert wired.lookup() is KeyState.DAEMON_DOWN
    assert not wired.channel.connected()


def test_an_interrupted_call_is_undone_and_the_channel_goes_on(wired: Wired) -> None:
    def interrupt(replies: list[ControlReply]) -> None:
        raise KeyboardInterrupt

    thread = wired.play(looked)
    with pytest.raises(KeyboardInterrupt):
        wired.channel.call([Lookup(wired.channel.number(), KEYS)], interrupt, time.monotonic() + HANG_S, (Release, [4]))
    thread.join()
    assert wired.messages() == [Release([4])]
    thread = wired.play(looked)
    assert isinstance(wired.lookup(), Looked)
    thread.join()


# --- the background thread's part -----------------------------------------------------------------------------------


def test_a_silent_connection_is_pinged_and_falls_if_it_stays_silent(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("cachesvc.client.channel.time.monotonic", lambda: now)
    wired.channel.tend()
    (ping,) = wired.messages()
    assert isinstance(ping, Ping)
    wired.channel.tend()
    assert wired.nothing_was_sent()
    wired.peer.sendall(encode(Pong(ping.call, 5)))
    wired.channel.tend()
    assert wired.channel.extents_version == 5
    assert wired.nothing_was_sent(), "it has just been heard"
    now += 1.0
    wired.channel.tend()
    assert [type(message) for message in wired.messages()] == [Ping]
    now += 1.0
    wired.channel.tend()
    assert wired.state == "down"
    assert wired.channel.connected()


def test_tending_notices_the_end(wired: Wired) -> None:
    wired.peer.close()
    wired.channel.tend()
    assert wired.state == "down"
    assert not wired.channel.connected()


def test_a_call_reads_over_the_answer_to_a_ping(wired: Wired) -> None:
    wired.channel.tend()
    (ping,) = wired.messages()
    assert isinstance(ping, Ping)
    wired.peer.sendall(encode(Pong(ping.call, 3)))
    thread = wired.play(looked)
    assert isinstance(wired.lookup(), Looked)
    thread.join()


# --- closing --------------------------------------------------------------------------------------------------------


# --- without waiting ------------------------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[tuple[Wired, list[ControlReply]]]:
    """A channel whose owner hears replies."""
    replies: list[ControlReply] = []
    wired = Wired()
    wired.channel.close(HANG_S)
    wired.peer.close()
    wired.channel = Channel(wired._wake, replies.append)
    wired.plug()
    yield wired, replies
    wired.channel.close(HANG_S)
    wired.peer.close()


def test_several_requests_are_posted_at_once_and_heard_later(heard: tuple[Wired, list[ControlReply]]) -> None:
    wired, replies = heard
    calls = [Lookup(wired.channel.number(), KEYS) for _ in range(3)]
    assert wired.channel.post(calls, 0.0)
    assert wired.messages() == calls
    wired.channel.listen()
    assert replies == []
    answers: list[ControlReply] = [Looked(call.call, b"\x01", 1) for call in calls]
    wired.peer.sendall(encode(answers[0]) + encode(answers[1])[:3])
    wired.channel.listen()
    assert replies == answers[:1]
    wired.peer.sendall(encode(answers[1])[3:] + encode(answers[2]))
    wired.channel.listen()
    assert replies == answers
    assert wired.state == "up"


def test_what_goes_along_goes_with_what_is_posted(heard: tuple[Wired, list[ControlReply]]) -> None:
    wired, _ = heard
    wired.channel.tell_along(Release, [4])
    wired.channel.tell_along(Release, [5])
    call = Lookup(wired.channel.number(), KEYS)
    assert wired.channel.post([call], 0.0)
    assert wired.messages() == [Release([4, 5]), call]


def test_a_call_after_what_was_posted_gets_its_own_reply(heard: tuple[Wired, list[ControlReply]]) -> None:
    wired, replies = heard
    posted = Lookup(wired.channel.number(), KEYS)
    assert wired.channel.post([posted], 0.0)

    def answer() -> None:
        got: list[ControlRequest] = []
        while len(got) < 2:
            got += wired.messages()
        for state, message in enumerate(got, 1):
            assert isinstance(message, Lookup)
            wired.peer.sendall(encode(Looked(message.call, bytes([state]), 1)))

    peer = threading.Thread(target=answer)
    peer.start()
    assert wired.lookup() == Looked(posted.call + 1, b"\x02", 1)
    peer.join(HANG_S)
    assert [reply.call for reply in replies] == [posted.call, posted.call + 1]


def test_nothing_is_posted_while_the_channel_is_used_or_down(wired: Wired) -> None:
    with wired.channel._lock:
        assert not wired.channel.post([Lookup(1, KEYS)], 0.0)
        wired.channel.listen()
        wired.channel.missed()
    assert wired.state == "up"
    assert wired.lookup(seconds=0.01) is KeyState.DEADLINE
    assert not wired.channel.post([Lookup(3, KEYS)], time.monotonic() + HANG_S)
    wired.channel.listen()
    assert len(wired.messages()) == 1
    assert wired.nothing_was_sent()


def test_listening_notices_the_end_and_garbage(wired: Wired) -> None:
    wired.peer.close()
    wired.channel.listen()
    assert wired.state == "down"
    assert not wired.channel.connected()
    wired.plug()
    wired.peer.sendall(b"\x05\x00\x00\x00abcde")
    wired.channel.listen()
    assert wired.state == "down"
    assert not wired.channel.connected()
    wired.channel.listen()


def test_posting_into_a_closed_connection_is_noticed_when_it_is_read(wired: Wired) -> None:
    wired.peer.close()
    assert wired.channel.post([Lookup(1, KEYS)], 0.0)
    wired.channel.listen()
    assert wired.state == "down"


def test_a_reply_that_did_not_come_in_time_is_a_missed_deadline(wired: Wired) -> None:
    assert wired.channel.post([Lookup(wired.channel.number(), KEYS)], 0.0)
    woken = wired.woken
    wired.channel.missed()
    assert wired.state == "down"
    assert "deadline" in wired.channel.error
    assert wired.woken == woken + 1
    assert wired.channel.connected(), "its late reply may still come"
    wired.channel.missed()
    assert wired.woken == woken + 1
    assert wired.lookup() is KeyState.DAEMON_DOWN


def test_closing_sends_what_is_left(wired: Wired) -> None:
    wired.lookup(0.01)
    wired.messages()
    wired.channel.tell(Release, [8])
    wired.channel.close(HANG_S)
    assert wired.messages() == [Release([8])]
    assert wired.peer.recv(1) == b""
    assert wired.state == "closed"
    assert wired.lookup() is KeyState.DAEMON_DOWN


def test_closing_during_a_call_ends_the_connection_after_it(wired: Wired) -> None:
    def close_and_answer(message: ControlRequest) -> list[ControlReply]:
        wired.channel.close(0.0)
        return looked(message)

    thread = wired.play(close_and_answer)
    assert isinstance(wired.lookup(), Looked)
    thread.join()
    assert not wired.channel.connected()
    wired.channel.install(Connection(wired.peer.dup(), wired.channel.hear))
    assert not wired.channel.connected()


def test_a_closed_channel_stays_closed_whatever_is_done_to_it(wired: Wired) -> None:
    wired.channel.close(HANG_S)
    wired.channel.revive(0.0)
    wired.channel.tend()
    wired.channel.tell(Release, [1])
    wired.channel.close(HANG_S)
    assert wired.state == "closed"


def test_disowning_sends_nothing(wired: Wired) -> None:
    wired.channel.disown()
    wired.channel.tell(Release, [1])
    assert wired.lookup() is KeyState.DAEMON_DOWN
    assert wired.peer.recv(100) == b"C\x01"
    assert wired.peer.recv(100) == b""
    assert wired.state == "closed"


# --- later ----------------------------------------------------------------------------------------------------------


def test_later_groups_by_kind() -> None:
    later = Later()
    assert not later
    later.add(Release, [1])
    later.add(Abort, [2])
    later.add(Release, [3])
    later.add(EndRequests, [4])
    later.add(Done, [5])
    assert later
    assert later.take() == encode(Release([1, 3])) + encode(Abort([2])) + encode(Done([5])) + encode(EndRequests([4]))
    assert not later
    assert later.take() == b""


def test_later_is_bounded_and_fits_frames() -> None:
    later = Later()
    later.add(EndRequests, range(2 * REQUESTS_LATER_MAX))
    later.add(Release, range(2**63, 2**63 + TICKETS_LATER_MAX))
    reader = FrameReader()
    stream = memoryview(later.take())
    got = []
    while stream:
        space = reader.buffer()
        n = min(len(space), len(stream))
        space[:n] = stream[:n]
        stream = stream[n:]
        got += [decode_control_request(payload) for payload in reader.advance(n)]
    assert got == [
        Release(list(range(2**63, 2**63 + TICKETS_LATER_MAX))),
        EndRequests(list(range(REQUESTS_LATER_MAX, 2 * REQUESTS_LATER_MAX))),
    ]


def test_telling_never_gets_lost_between_threads(wired: Wired) -> None:
    """Many threads tell while others call: everything arrives, without anybody waiting for a tick."""
    told: set[int] = set()
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for message in wired.messages():
                if isinstance(message, Release):
                    told.update(message.tickets)
                elif isinstance(message, Lookup):
                    wired.peer.sendall(encode(Looked(message.call, b"\x01", 1)))

    server = threading.Thread(target=serve, daemon=True)
    server.start()

    def work(base: int) -> None:
        for i in range(200):
            wired.channel.tell(Release, [base + i])
            if i % 4 == 0:
                wired.lookup()

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: len(told) == 800)
    stop.set()
    wired.channel.tell(Abort, [1])
    server.join(HANG_S)


# --- locks that are never given up ------------------------------------------------------------------------------------


@pytest.fixture
def impatient(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> Wired:
    monkeypatch.setattr(channel_module, "ABANDONED_S", 0.01)
    monkeypatch.setattr(channel_module, "WATCH_S", 0.005)
    return wired


def test_a_lock_whose_holder_is_gone_is_replaced(impatient: Wired) -> None:
    """A signal handler raised between taking the lock and `try`."""
    impatient.channel._lock.acquire()
    impatient.channel.tell(Abort, [7])
    until = time.monotonic() + HANG_S
    while impatient.state == "up" and time.monotonic() < until:
        impatient.channel.tend()
    assert not impatient.channel.connected(), "nobody knows what was sent"
    impatient.peer.close()
    impatient.plug()
    assert impatient.messages() == [Abort([7])]
    impatient.channel.tell(Abort, [8])
    assert impatient.messages() == [Abort([8])]


def test_a_lock_that_is_lost_while_it_is_down_keeps_nobody_from_coming_back(impatient: Wired) -> None:
    impatient.peer.close()
    impatient.channel.listen()
    impatient.channel._lock.acquire()
    impatient.plug()
    assert impatient.state == "up"
    impatient.channel._lock.acquire()
    impatient.channel.missed()
    impatient.channel.state = State.DOWN
    impatient.channel.revive(0.0)
    assert not impatient.channel._lock.locked()


def test_a_lock_that_is_used_is_not_replaced(impatient: Wired) -> None:
    """A call waits for longer than that: its deadline is later."""
    caller = threading.Thread(target=impatient.lookup)
    caller.start()
    (lookup,) = impatient.messages()
    assert isinstance(lookup, Lookup)
    for _ in range(20):
        time.sleep(0.005)
        impatient.channel.tend()
    assert impatient.state == "up"
    impatient.peer.sendall(encode(Looked(lookup.call, b"\x01", 1)))
    caller.join(HANG_S)
    assert not impatient.channel._lock.locked()


def test_a_holder_that_comes_back_too_late_gets_nothing(impatient: Wired) -> None:
    """Its handler took minutes. What its call brought isn't in the Hello that was said meanwhile."""
    lock = impatient.channel._lock

    def abandoned(_: object) -> str:
        impatient.channel._abandon()
        impatient.peer.close()
        impatient.plug()
        return "slots"

    def answer() -> None:
        (lookup,) = impatient.messages()
        assert isinstance(lookup, Lookup)
        impatient.peer.sendall(encode(Looked(lookup.call, b"\x01", 1)))

    peer = threading.Thread(target=answer)
    peer.start()
    call = Lookup(impatient.channel.number(), KEYS)
    outcome = impatient.channel.call([call], abandoned, time.monotonic() + HANG_S, (Abort, [9]))
    peer.join(HANG_S)
    assert outcome is KeyState.DEADLINE
    assert impatient.state == "up", "the new connection isn't its to drop"
    assert impatient.channel._lock is not lock
    assert not lock.locked()
    impatient.channel.tell(Abort, [])
    assert impatient.messages() == [Abort([9])]


def test_an_exception_while_replies_are_read_costs_the_connection(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wired.lookup()
    assert not wired.channel.connected()
    assert not wired.channel._lock.locked()


def test_a_deadline_missed_for_reasons_of_our_own_is_not_held_against_the_daemon(wired: Wired) -> None:
    call = Lookup(wired.channel.number(), KEYS)
    assert wired.channel.call([call], lambda _: None, time.monotonic() + 0.01, blame=False) is KeyState.DEADLINE
    assert wired.state == "up"
