"""The contract of the public API, `from cachesvc import Client`, kept by the real daemon: what each call promises, what
is ValueError, and that nothing else is ever raised.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cachesvc import Client
from cachesvc.types import KeyState, user_namespace
from tests.support.contents import content, fault
from tests.support.daemon import KIB, Daemon, Wire, shared_directory, wait_for

CHUNK = 4 * KIB
SLOTS = 64 << 20 >> 12


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests here: each has namespaces of its own."""
    with shared_directory() as arena, Daemon(tmp_path_factory.mktemp("daemon"), arena) as daemon:
        yield daemon


@pytest.fixture
def address(daemon: Daemon) -> str:
    return str(daemon.socket())


@pytest.fixture
def client(address: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(address, namespace=request.node.name, chunk_bytes=CHUNK) as client:
        yield client


@pytest.fixture
def other(address: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Another client of the same namespace."""
    with Client(address, namespace=request.node.name, chunk_bytes=CHUNK) as client:
        yield client


def keys(count: int, prefix: str = "k") -> list[bytes]:
    return [f"{prefix}-{number}".encode() for number in range(count)]


def store(client: Client, some: list[bytes]) -> None:
    """Offered again until all are there: the first extents of a class come one after another."""

    def stored() -> bool:
        with client.write(some) as write:
            for key, view in write.views.items():
                view[:] = content(key, 1, len(view))
        return client.lookup(some) == len(some)

    wait_for(stored)


# --- lookup -----------------------------------------------------------------------------------------------------------


def test_lookup_is_the_length_of_the_leading_run(client: Client) -> None:
    assert client.lookup([]) == 0
    assert client.lookup(keys(3)) == 0
    store(client, keys(3))
    assert client.lookup(keys(3)) == 3
    assert client.lookup(keys(5)) == 3
    assert client.lookup([b"gap", *keys(3)]) == 0
    assert client.lookup([b"k-0", b"gap", b"k-1"]) == 1
    assert client.lookup([b"k-0", b"k-0", b"k-2"]) == 3
    assert client.lookup(iter(keys(3))) == 3


def test_batches_over_4096_are_split(client: Client, other: Client) -> None:
    some = keys(10_000)
    store(client, some)
    assert other.lookup(some) == 10_000
    assert other.lookup([*some[:9_999], b"gap", some[9_999]]) == 9_999
    assert other.lookup([*some[:5_000], b"gap", *some[5_000:]]) == 5_000
    with other.read([*some[:5_000], b"gap", *some[5_000:]]) as read:
        assert len(read.views) == 5_000
        assert all(fault(key, view) is None for key, view in zip(some, read.views, strict=False))
        assert read.valid()
    with client.write(some) as write:
        assert write.views == {}


# --- write ------------------------------------------------------------------------------------------------------------


def test_write_gives_views_of_chunk_bytes_for_the_keys_that_are_new(client: Client) -> None:
    store(client, [b"old"])
    with client.write([b"a", b"old", b"b", b"a"]) as write:
        assert list(write.views) == [b"a", b"b"]
        assert all(
            type(view) is memoryview and len(view) == CHUNK and not view.readonly for view in write.views.values()
        )
        assert client.lookup([b"a"]) == 0
        write.views[b"a"][:] = content(b"a", 7, CHUNK)
    assert write.sealed
    assert client.lookup([b"a", b"b"]) == 2
    buffer = bytearray(CHUNK)
    assert client.get_into(b"a", buffer)
    assert fault(b"a", buffer) is None
    with client.write([b"a", b"b", b"old"]) as write:
        assert write.views == {}
    with client.write([]) as write:
        assert write.views == {}


def test_an_exception_aborts(client: Client, other: Client) -> None:
    write = client.write(keys(3))

    def fail() -> None:
        with write:
            write.views[b"k-0"][:] = content(b"k-0", 1, CHUNK)
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="own"):
        fail()
    assert not write.sealed
    assert client.lookup(keys(3)) == other.lookup(keys(3)) == 0
    store(other, keys(3))
    assert client.lookup(keys(3)) == 3


def test_what_somebody_else_writes_is_busy(client: Client, other: Client) -> None:
    with client.write([b"a", b"b"]) as mine, other.write([b"a", b"c"]) as theirs:
        assert list(mine.views) == [b"a", b"b"]
        assert list(theirs.views) == [b"c"]
        assert other.put(b"a", b"x") is False
        assert other.states([b"a", b"c", b"d"]) == [KeyState.PENDING, KeyState.PENDING, KeyState.NAMESPACE_NEW]
    assert other.lookup([b"a", b"b", b"c"]) == 3


# --- read -------------------------------------------------------------------------------------------------------------


def test_read_gives_read_only_views_of_the_leading_run(client: Client, other: Client) -> None:
    store(client, keys(3))
    with other.read([*keys(3), b"gap", b"k-0"]) as read:
        assert type(read.views) is tuple
        assert [fault(key, view) for key, view in zip(keys(3), read.views, strict=True)] == [None] * 3
        assert all(type(view) is memoryview and view.readonly for view in read.views)
        with pytest.raises(TypeError):
            read.views[0][0] = 1
        assert read.valid()
    with other.read([b"gap", *keys(3)]) as read:
        assert read.views == ()
        assert read.valid()
    with other.read([]) as read:
        assert read.views == ()


def test_views_are_leased_until_the_exit(tmp_path: Path) -> None:
    """The arena is overwritten many times: what is read stays."""
    with shared_directory() as arena, Daemon(tmp_path, arena, ram_bytes="1MiB", extent_bytes="256KiB") as daemon:
        path = str(daemon.socket())
        with (
            Client(path, namespace="n", chunk_bytes=CHUNK) as reader,
            Client(path, namespace="n", chunk_bytes=CHUNK) as writer,
        ):
            store(writer, keys(10))
            with reader.read(keys(10)) as read:
                for number in range(200):
                    with writer.write(keys(8, f"other-{number}")) as write:
                        for key, view in write.views.items():
                            view[:] = content(key, 1, CHUNK)
                assert daemon.evictions() > 256
                assert [fault(key, view) for key, view in zip(keys(10), read.views, strict=True)] == [None] * 10
                assert read.valid()
            wait_for(lambda: daemon.tenant()["leases"] == 0)


# --- put and get ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 24, CHUNK - 1, CHUNK])
def test_put_keeps_the_length(client: Client, other: Client, length: int) -> None:
    data = bytes(range(256)) * 16
    assert client.put(b"k", data[:length]) is True
    buffer = bytearray(b"\xff" * CHUNK)
    assert other.get_into(b"k", buffer) is True
    assert buffer == data[:length] + b"\xff" * (CHUNK - length)
    exact = bytearray(length)
    assert other.get_into(b"k", exact) is True
    assert exact == data[:length]
    with other.read([b"k"]) as read:
        assert [len(view) for view in read.views] == [length]


def test_what_was_put_can_be_read_by_whoever_is_told(client: Client, other: Client) -> None:
    """`put` doesn't wait for the daemon's word; whoever asks after it returned finds the chunk all the same."""
    for key in keys(2000, "told"):
        assert client.put(key, key)
        assert other.lookup([key]) == 1, key
        buffer = bytearray(len(key))
        assert other.get_into(key, buffer)
        assert buffer == key


def test_put_of_what_is_there_is_true_and_changes_nothing(client: Client, other: Client) -> None:
    assert client.put(b"k", b"first") is True
    assert other.put(b"k", b"second") is True
    buffer = bytearray(5)
    assert client.get_into(b"k", buffer)
    assert buffer == b"first"


def test_get_of_what_is_not_there_is_false(client: Client) -> None:
    assert client.get_into(b"k", bytearray(CHUNK)) is False
    assert client.get_into(b"k", bytearray()) is False


@pytest.mark.parametrize(
    "make", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.float16)], ids=["bytes", "array", "view", "np"]
)
def test_any_contiguous_buffer_will_do(client: Client, make: Callable[[bytes], bytes]) -> None:
    data = content(b"k", 1, 64)
    assert client.put(b"k", make(data))
    array = np.zeros((8, 8), np.uint16)
    assert client.get_into(b"k", array)
    assert array.tobytes()[:64] == data


# --- names ------------------------------------------------------------------------------------------------------------


def test_namespaces_share_nothing(address: str) -> None:
    with (
        Client(address, namespace="one", chunk_bytes=CHUNK) as one,
        Client(address, namespace="two", chunk_bytes=CHUNK) as two,
    ):
        assert one.put(b"k", b"of one")
        assert two.lookup([b"k"]) == 0
        assert two.put(b"k", b"of two")
        buffer = bytearray(6)
        assert one.get_into(b"k", buffer)
        assert buffer == b"of one"


def test_a_name_that_a_user_chose_never_meets_an_engines(client: Client, daemon: Daemon) -> None:
    """A connector that asks for the digest of the bare name finds nothing of the user's."""
    assert client.put(b"k", b"of a user")
    known = daemon.tenant()["namespaces"]
    name = "test_a_name_that_a_user_chose_never_meets_an_engines"
    assert known[user_namespace(name).hex()[:12]]["label"] == name
    with Wire(daemon.socket()) as engine:
        engine.hello(namespace=user_namespace("connector\0" + name))
        assert daemon.tenant()["namespaces"].keys() > known.keys()


@pytest.mark.parametrize("key", [b"k", b"\0", b"\xff" * 64, bytes(64), b"\0" * 63 + b"\1"])
def test_keys_of_1_to_64_bytes(client: Client, key: bytes) -> None:
    assert client.put(key, key)
    assert client.lookup([key]) == 1
    buffer = bytearray(len(key))
    assert client.get_into(key, buffer)
    assert buffer == key


def test_the_address_comes_from_the_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHESVC_ADDRESS", address)
    with Client(namespace="from the environment", chunk_bytes=CHUNK) as client:
        assert client.put(b"k", b"v")


# --- ValueError -------------------------------------------------------------------------------------------------------

WRONG_KEYS = [b"", b"k" * 65, "k", None, 1]


@pytest.mark.parametrize("key", WRONG_KEYS, ids=repr)
def test_wrong_keys(client: Client, key: bytes) -> None:
    for call in (
        lambda: client.lookup([b"k", key]),
        lambda: client.states([key]),
        lambda: client.read([key]).__enter__(),
        lambda: client.write([b"k", key]).__enter__(),
        lambda: client.put(key, b"v"),
        lambda: client.get_into(key, bytearray(CHUNK)),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()
    assert client.put(b"k", b"v"), "nothing was left behind"


def test_wrong_sizes(client: Client) -> None:
    with pytest.raises(ValueError, match=r"4097 bytes.* at most 4096"):
        client.put(b"k", bytes(CHUNK + 1))
    assert client.put(b"k", b"12345")
    with pytest.raises(ValueError, match=r"5 bytes, the buffer 4"):
        client.get_into(b"k", bytearray(4))
    with pytest.raises(ValueError, match="writable"):
        client.get_into(b"k", bytes(CHUNK))
    with pytest.raises(ValueError, match="contiguous"):
        client.get_into(b"k", memoryview(bytearray(CHUNK))[::2])
    with pytest.raises(ValueError, match="buffer"):
        client.put(b"k", "text")  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_bytes", [0, -1, 1 << 32])
def test_wrong_chunk_bytes(address: str, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="chunk_bytes"):
        Client(address, namespace="n", chunk_bytes=chunk_bytes)


def test_another_chunk_bytes_for_a_known_namespace(
    client: Client, address: str, request: pytest.FixtureRequest
) -> None:
    assert client.put(b"k", b"v")
    with pytest.raises(ValueError, match=r"holds chunks of \[4096\] bytes, not \[8192\]"):
        Client(address, namespace=request.node.name, chunk_bytes=2 * CHUNK)
    assert client.lookup([b"k"]) == 1


def test_a_chunk_larger_than_half_an_extent(address: str) -> None:
    with pytest.raises(ValueError, match="start the daemon with extent_bytes: 33554432 or more"):
        Client(address, namespace="large", chunk_bytes=(8 << 20) + 1)


def test_use_after_close(address: str) -> None:
    client = Client(address, namespace="closed", chunk_bytes=CHUNK)
    store(client, [b"k"])
    client.close()
    client.close()
    for call in (
        lambda: client.lookup([b"k"]),
        lambda: client.states([b"k"]),
        lambda: client.read([b"k"]),
        lambda: client.write([b"k"]),
        lambda: client.put(b"k", b"v"),
        lambda: client.get_into(b"k", bytearray(CHUNK)),
        lambda: client.wait_ready(0),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_view_after_the_exit(client: Client) -> None:
    with client.write([b"k"]) as write:
        written = write.views[b"k"]
    with client.read([b"k"]) as read:
        seen = read.views[0]
    for view in (written, seen):
        with pytest.raises(ValueError, match="released"):
            bytes(view)
    with pytest.raises(ValueError, match="over"):
        read.valid()
    with pytest.raises(ValueError, match="used before"), read:
        pass
    with pytest.raises(ValueError, match="used before"), write:
        pass


# --- nothing else -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nothing", "a file", "a stale socket", "a directory", "a long path"])
def test_without_a_daemon_everything_is_a_miss(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cachesvc.sock"
    if what == "a file":
        path.write_text("")
    elif what == "a directory":
        path.mkdir()
    elif what == "a long path":
        path = tmp_path / ("x" * 200)
    elif what == "a stale socket":
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    with Client(str(path), namespace="n", chunk_bytes=CHUNK) as client:
        assert client.lookup(keys(5)) == 0
        assert client.states([b"k"]) == [KeyState.DAEMON_DOWN]
        assert client.put(b"k", b"v") is False
        assert client.get_into(b"k", bytearray(CHUNK)) is False
        with client.write(keys(5)) as write:
            assert write.views == {}
        assert not write.sealed
        with client.read(keys(5)) as read:
            assert read.views == ()
        assert client.wait_ready(0) is False


def test_a_client_nobody_holds_any_more_gives_everything_back(address: str, daemon: Daemon) -> None:
    def sessions() -> int:
        """Of this namespace: those of tests before may still be ending."""
        mine = [n for n in daemon.tenant()["namespaces"].values() if n["label"] == "dropped"]
        return sum(n["sessions"] for n in mine)

    client = Client(address, namespace="dropped", chunk_bytes=CHUNK)
    assert client.put(b"k", b"v")
    assert sessions() == 1
    del client
    gc.collect()
    wait_for(lambda: sessions() == 0)


def test_closing_with_contexts_open(address: str, daemon: Daemon) -> None:
    """They end as they would have, and then the client is gone."""
    client = Client(address, namespace="open contexts", chunk_bytes=CHUNK)
    store(client, keys(3))
    with client.read(keys(3)) as read, client.write([b"new"]) as write:
        client.close()
        write.views[b"new"][:] = content(b"new", 1, CHUNK)
        assert [fault(key, view) for key, view in zip(keys(3), read.views, strict=True)] == [None] * 3
        assert read.valid()
    assert write.sealed
    wait_for(lambda: daemon.tenant()["leases"] == 0)
    with Client(address, namespace="open contexts", chunk_bytes=CHUNK) as again:
        assert again.lookup([b"new"]) == 1
