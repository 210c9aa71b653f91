"""When an engine may share, in which namespace and session: with a real daemon, and without one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cachesvc.client.channel import State
from cachesvc.client.grants import KeyRun
from cachesvc.connector import guard
from cachesvc.connector.layout import LayerPage, RankLayout
from cachesvc.connector.membership import EPOCH_BYTES, Membership, enter
from cachesvc.connector.namespace import digest
from cachesvc.types import AllocateState, KeyState, Role
from tests.support.daemon import Daemon, wait_for
from tests.support.kv import Clock

LAYOUT = RankLayout(0, 1, "cpu", ((LayerPage("l", 4096, 4096, agnostic=True),),))
Components = Callable[[Sequence[RankLayout], str], dict[str, str] | None]


@pytest.fixture
def made() -> Iterator[Callable[..., Membership]]:
    """Makes memberships; all of them are closed at the end."""
    every: list[Membership] = []

    def make(address: Path | str, components: Components, epoch: str = "") -> Membership:
        every.append(Membership(str(address), "label", 2, components, epoch))
        return every[-1]

    yield make
    for membership in every:
        membership.close()


def named(name: str) -> Components:
    return lambda _, epoch: {"name": name, "epoch": epoch}


def joined(membership: Membership) -> Any:
    return wait_for(membership.session)


def test_it_joins_when_all_is_known(daemon: Daemon, made: Any) -> None:
    known, asked = threading.Event(), []

    def components(ranks: Sequence[RankLayout], epoch: str) -> dict[str, str]:
        asked.append((list(ranks), epoch))
        assert known.wait(30)
        return {"name": "waits"}

    membership = made(daemon.socket(), components, "e")
    assert membership.session() is None
    assert membership.take_join() is None
    membership.told([LAYOUT])
    wait_for(lambda: asked)
    assert membership.session() is None, "the weights aren't known yet"
    known.set()
    session = joined(membership)
    assert asked == [([LAYOUT], "e")]
    assert session.identity.namespace == digest({"name": "waits"})
    assert session.identity.role is Role.SCHEDULER
    assert session.identity.chunk_bytes == (8192,)
    wait_for(lambda: session.channel.state is State.UP)
    assert membership.closed == ""


def test_the_join_is_handed_out_once_and_leads_into_the_same_session(daemon: Daemon, made: Any) -> None:
    membership = made(daemon.socket(), named("once"))
    membership.told([LAYOUT])
    session = joined(membership)
    join = wait_for(membership.take_join)
    assert membership.take_join() is None
    assert (join.session, join.namespace) == (session.identity.session, session.identity.namespace)
    assert join.groups[0].chunk_bytes == 8192
    worker, keeper = enter(join, Role.WORKER)
    wait_for(lambda: worker.channel.state is session.channel.state is State.UP)
    assert worker.arena == session.arena
    keeper.stop(5)


@pytest.mark.parametrize("layouts", [[], [RankLayout(1, 2, "cpu", LAYOUT.groups)]])
def test_ranks_that_do_not_fit_share_nothing(
    layouts: list[RankLayout], daemon: Daemon, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    membership = made(daemon.socket(), named("odd"))
    membership.told(layouts)
    wait_for(lambda: membership.closed)
    assert membership.session() is None
    assert "ranks" in caplog.text


def test_a_reason_not_to_share_is_logged_once(daemon: Daemon, made: Any, caplog: pytest.LogCaptureFixture) -> None:
    def components(ranks: Sequence[RankLayout], epoch: str) -> dict[str, str]:
        raise ValueError("the scales are computed at run time")

    membership = made(daemon.socket(), components)
    with caplog.at_level(logging.WARNING, "vllm.cachesvc"):
        membership.told([LAYOUT])
        wait_for(lambda: membership.closed)
        membership.renew()
        membership.told([LAYOUT])
        wait_for(lambda: not _joining())
    assert membership.closed == "the scales are computed at run time"
    assert membership.session() is None
    assert membership.take_join() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "run time" in caplog.text


def _joining() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "cachesvc-join"]


def test_any_other_fault_shares_nothing_and_is_counted(daemon: Daemon, made: Any) -> None:
    def components(ranks: Sequence[RankLayout], epoch: str) -> dict[str, str]:
        raise ZeroDivisionError("odd")

    before = guard.faults["joining"]
    membership = made(daemon.socket(), components)
    membership.told([LAYOUT])
    wait_for(lambda: membership.closed)
    assert "ZeroDivisionError" in membership.closed
    assert guard.faults["joining"] == before + 1


def test_an_engine_that_ends_meanwhile_joins_nothing(daemon: Daemon, made: Any) -> None:
    membership = made(daemon.socket(), lambda *_: None)
    membership.told([LAYOUT])
    wait_for(lambda: not _joining())
    assert membership.session() is None
    assert membership.closed == ""


def test_closed_while_the_weights_are_read(daemon: Daemon, made: Any) -> None:
    known = threading.Event()

    def components(ranks: Sequence[RankLayout], epoch: str) -> dict[str, str]:
        assert known.wait(30)
        return {"name": "late"}

    membership = made(daemon.socket(), components)
    membership.told([LAYOUT])
    membership.close()
    known.set()
    wait_for(lambda: not _joining())
    assert membership.session() is None
    assert membership.closed == "the engine has ended"


def test_a_daemon_that_refuses_the_namespace_closes_it(
    daemon: Daemon, made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = made(daemon.socket(), named("clash"))
    first.told([LAYOUT])
    wait_for(lambda: joined(first).channel.state is State.UP)
    other = made(daemon.socket(), named("clash"))
    page = LayerPage("l", 12288, 12288, agnostic=True)
    with caplog.at_level(logging.WARNING, "vllm.cachesvc"):
        other.told([RankLayout(0, 1, "cpu", ((page,),))])
        wait_for(lambda: other.session() is None and other.closed)
        assert other.session() is None
    assert "not [24576]" in other.closed
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert joined(first).channel.state is State.UP


def test_without_a_daemon_there_is_a_session_that_is_down(tmp_path: Path, made: Any) -> None:
    membership = made(tmp_path / "nobody.sock", named("alone"))
    membership.told([LAYOUT])
    session = joined(membership)
    assert session.channel.state is State.DOWN
    assert wait_for(membership.take_join).session == session.identity.session


# --- renewing -------------------------------------------------------------------------------------------------------


def test_renew_is_another_namespace_and_session(daemon: Daemon, made: Any) -> None:
    membership = made(daemon.socket(), named("renew"), "first")
    membership.told([LAYOUT])
    old = joined(membership)
    first = wait_for(membership.take_join)
    wait_for(lambda: old.channel.state is State.UP)
    membership.renew()
    new = membership.session()
    assert new is not None
    assert new is not old
    second = membership.take_join()
    assert second is not None
    assert second.session == new.identity.session != first.session
    assert second.namespace != first.namespace
    assert first.components["epoch"] == "first"
    assert len(bytes.fromhex(second.components["epoch"])) == EPOCH_BYTES
    wait_for(lambda: old.channel.state is State.CLOSED)
    wait_for(lambda: new.channel.state is State.UP)
    membership.renew()
    assert membership.session().identity.components["epoch"] != second.components["epoch"]


def test_renew_takes_a_given_epoch(daemon: Daemon, made: Any) -> None:
    membership = made(daemon.socket(), named("given"), "first")
    membership.told([LAYOUT])
    joined(membership)
    membership.renew("fleet-2")
    assert membership.session().identity.namespace == digest({"name": "given", "epoch": "fleet-2"})


def test_a_join_that_nobody_took_is_replaced(daemon: Daemon, made: Any) -> None:
    membership = made(daemon.socket(), named("skipped"))
    membership.told([LAYOUT])
    joined(membership)
    membership.renew()
    assert membership.take_join().session == membership.session().identity.session
    assert membership.take_join() is None


def test_the_old_session_ends_when_its_tickets_are_settled(daemon: Daemon, made: Any) -> None:
    membership = made(daemon.socket(), named("settles"))
    membership.told([LAYOUT])
    old = joined(membership)
    wait_for(lambda: old.channel.state is State.UP)
    run = KeyRun(0, [b"k" * 32])
    clock = Clock()

    def allocate() -> Any:
        grant = old.allocate(run, clock() + 5)
        return grant if grant.states == bytes([AllocateState.NEW]) else None

    grant = wait_for(allocate)
    membership.renew()
    new = membership.session()
    wait_for(lambda: new.channel.state is State.UP)
    assert old.channel.state.value == "up", "a copy may still be under way"
    assert old.seal_soon(grant, [8192], clock() + 5)
    wait_for(lambda: old.channel.state is State.CLOSED)
    assert old.unsealed == 0
    assert new.lookup(run, clock() + 5) != bytes([KeyState.RAM]), "another namespace"


def test_a_reset_while_the_weights_are_read(daemon: Daemon, made: Any) -> None:
    epochs: list[str] = []
    known = threading.Event()

    def components(ranks: Sequence[RankLayout], epoch: str) -> dict[str, str]:
        epochs.append(epoch)
        assert known.wait(30)
        return {"name": "raced", "epoch": epoch}

    membership = made(daemon.socket(), components, "before")
    membership.told([LAYOUT])
    wait_for(lambda: epochs)
    membership.renew("after")
    assert membership.session() is None
    known.set()
    session = joined(membership)
    assert epochs == ["before", "after"]
    assert session.identity.components["epoch"] == "after"


def test_closing_ends_everything(daemon: Daemon, made: Any) -> None:
    membership = made(daemon.socket(), named("closing"))
    membership.told([LAYOUT])
    session = joined(membership)
    wait_for(lambda: session.channel.state is State.UP)
    membership.close()
    assert membership.session() is None
    assert membership.take_join() is None
    wait_for(lambda: session.channel.state is State.CLOSED)
    membership.renew()
    assert membership.session() is None
    membership.close()
    assert membership.closed == "the engine has ended"
