"""Nothing that vLLM calls raises."""

from __future__ import annotations

import logging

import pytest

from cachesvc.connector import guard
from cachesvc.connector.guard import faults, harmless, tell


class Door:
    """What vLLM calls."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    @harmless(lambda self, number, *, factor=2: (self, -number * factor))
    def open(self, number: int, *, factor: int = 1) -> tuple[Door, int]:
        """Doc."""
        if self.error is not None:
            raise self.error
        return self, number * factor


@pytest.fixture(autouse=True)
def no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "faults", faults)
    faults.clear()


def test_no_fault_nothing_changes() -> None:
    door = Door()
    assert door.open(3, factor=5) == (door, 15)
    assert door.open.__doc__ == "Doc."
    assert not faults


@pytest.mark.parametrize("error", [ValueError("v"), AssertionError(), KeyError(1), OSError(5, "x"), RecursionError()])
def test_a_fault_becomes_the_harmless_answer(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    door.error = error
    with caplog.at_level(logging.ERROR, "vllm.cachesvc"):
        assert [door.open(3, factor=5) for _ in range(3)] == [(door, -15)] * 3
    assert faults == {"Door.open": 3}
    assert len(caplog.records) == 1, "only the first is logged"
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_who_ends_the_process_may(error: BaseException) -> None:
    door = Door()
    door.error = error
    with pytest.raises(type(error)):
        door.open(1)


def test_places_are_counted_apart(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "vllm.cachesvc"):
        for place in ("a", "b", "a"):
            tell(place, OSError(place))
    assert faults == {"a": 2, "b": 1}
    assert [record.getMessage().split()[0] for record in caplog.records] == ["a", "b"]


def test_what_is_logged_is_below_vllm() -> None:
    assert guard.LOG.name.startswith("vllm.")
