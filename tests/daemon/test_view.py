"""Questions from another thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cachesvc.daemon import view as module
from cachesvc.daemon.view import UnansweredError, View
from tests.support.served import running


def test_answers_come_from_the_loop() -> None:
    async def scenario() -> None:
        async with running() as runner:
            view = View(runner)
            status = await asyncio.to_thread(view.status)
            assert status.keys() >= {"tenants", "arena", "daemon"}
            assert await asyncio.to_thread(view.namespaces) == {"namespaces": []}
            assert (await asyncio.to_thread(view.figures))["calls"] == {}
            assert not await asyncio.to_thread(view.ready)
            runner.ready = True
            assert await asyncio.to_thread(view.ready)

    asyncio.run(scenario())


def test_a_wedged_loop_costs_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.01)

    async def scenario() -> None:
        async with running() as runner:
            view = View(runner)
            outcome: list[Exception] = []

            def ask() -> None:
                try:
                    view.status()
                except UnansweredError as error:
                    outcome.append(error)

            thread = threading.Thread(target=ask)
            thread.start()
            time.sleep(0.1)  # noqa: ASYNC251 - this is the wedged loop
            thread.join()
            assert "didn't answer within 0.01 s" in str(outcome[0])

    asyncio.run(scenario())


def test_a_bug_in_an_answer_is_raised_where_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running() as runner:
            monkeypatch.setattr(runner, "status", lambda tenant: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await asyncio.to_thread(View(runner).status)

    asyncio.run(scenario())


def test_a_loop_that_has_ended() -> None:
    views: list[View] = []

    async def scenario() -> None:
        async with running() as runner:
            views.append(View(runner))

    asyncio.run(scenario())
    with pytest.raises(UnansweredError, match="has stopped"):
        views[0].status()
