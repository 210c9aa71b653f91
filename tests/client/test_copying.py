"""`client.copying`: every byte arrives, whoever copies which part; a late helper costs nothing; callers don't wait for
each other."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesvc.client.copying import SHARED_BYTES_MIN, Copier

SIZES = [0, 1, 4095, SHARED_BYTES_MIN - 1, SHARED_BYTES_MIN, SHARED_BYTES_MIN + 4097, 3 * SHARED_BYTES_MIN + 5]


@pytest.fixture
def copier() -> Copier:
    return Copier()


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_arrives_and_none_besides(copier: Copier, size: int) -> None:
    source = os.urandom(size)
    target = bytearray(b"\xaa" * (size + 2))
    for _ in range(3):
        copier.copy(memoryview(target)[1 : size + 1], memoryview(source))
        assert target == b"\xaa" + source + b"\xaa"


@given(st.integers(SHARED_BYTES_MIN, SHARED_BYTES_MIN + 65536), st.integers(0, 255))
def test_any_shared_size(size: int, seed: int) -> None:
    source = np.random.default_rng(seed).bytes(size)
    target = bytearray(size)
    COPIER.copy(memoryview(target), memoryview(source))
    assert target == source


COPIER = Copier()


def test_a_helper_that_never_comes_is_not_waited_for(copier: Copier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachesvc.client.copying._help", lambda _parts: None)
    source = os.urandom(2 * SHARED_BYTES_MIN)
    target = bytearray(len(source))
    copier.copy(memoryview(target), memoryview(source))
    assert target == source


def test_threads_copy_at_once(copier: Copier) -> None:
    sources = [os.urandom(SHARED_BYTES_MIN + i) for i in range(6)]
    targets = [bytearray(len(source)) for source in sources]

    def work(i: int) -> None:
        for _ in range(20):
            targets[i][:] = bytes(len(sources[i]))
            copier.copy(memoryview(targets[i]), memoryview(sources[i]))
            assert targets[i] == sources[i]

    failures: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(len(sources))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert targets == sources


def test_the_helper_ends_with_its_client_and_copies_still_work(copier: Copier) -> None:
    source = os.urandom(SHARED_BYTES_MIN)
    target = bytearray(len(source))
    copier.copy(memoryview(target), memoryview(source))
    helper = copier._helper
    assert helper is not None
    copier.close()
    helper.join(60)
    assert not helper.is_alive()
    target[:] = bytes(len(target))
    copier.copy(memoryview(target), memoryview(source))
    assert target == source


def test_the_helper_ends_with_a_client_that_was_dropped(copier: Copier) -> None:
    dropped = Copier()
    source = os.urandom(SHARED_BYTES_MIN)
    dropped.copy(memoryview(bytearray(len(source))), memoryview(source))
    helper = dropped._helper
    assert helper is not None
    del dropped
    helper.join(60)
    assert not helper.is_alive()


def test_without_a_thread_the_caller_copies_alone(copier: Copier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is ending, or there are too many."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    source = os.urandom(SHARED_BYTES_MIN + 1)
    target = bytearray(len(source))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        copier.copy(memoryview(target), memoryview(source))
    assert target == source
    assert copier._helper is None
    target[:] = bytes(len(target))
    copier.copy(memoryview(target), memoryview(source))
    assert target == source
    assert copier._helper is not None
