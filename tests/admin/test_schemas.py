"""The schemas say exactly what the daemon answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from cachesvc.admin.schemas import Namespaces, Status
from cachesvc.core import events as ev
from cachesvc.types import Role
from tests.support.served import running, until


def answers() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Status of all, status of one tenant, namespaces, of a daemon that has something to say everywhere."""

    async def scenario() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        async with running() as runner:
            runner.count("protocol")
            runner.dispatch(
                ev.Hello(1, "one", None, 1, bytes(16), Role.SCHEDULER, bytes(16), "label", {"a": "b"}, (4096, 8192))
            )
            await until(lambda: runner.node.extents_version("one") == 2)
            runner.dispatch(ev.Lookup(1, 2, 0, [b"k"], 0, touch=True))
            return runner.report("status", None), runner.report("status", "one"), runner.report("namespaces", None)

    return asyncio.run(scenario())


def test_nothing_is_missing_and_nothing_is_more() -> None:
    everything, one, namespaces = answers()
    assert Status.model_validate(everything).model_dump(exclude_unset=True) == everything
    assert Status.model_validate(one).model_dump(exclude_unset=True) == one
    assert Namespaces.model_validate(namespaces).model_dump() == namespaces
    assert everything["tenants"]["one"]["counts"]["misses"] == {"namespace_new": 1}


@pytest.mark.parametrize("model", [Status, Namespaces])
def test_a_new_field_is_an_error(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate({"tenants": {}, "namespaces": [], "surprise": 1})
