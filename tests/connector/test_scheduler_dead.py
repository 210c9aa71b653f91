"""Whatever vLLM asks and in whatever state the daemon is: nothing raises, nothing is found, nothing is stored.

A fake daemon is started, killed, stalled, left empty or made to send garbage in between. What the daemon may do to
stores and loads that it knows of is in `test_worker.py` and in the tests with engines.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from vllm.v1.kv_offload.base import (
    LookupResult,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)

from cachesvc.client.channel import State
from cachesvc.connector import guard
from cachesvc.connector.layout import LayerPage, RankLayout
from cachesvc.connector.membership import Membership
from cachesvc.connector.requests import Group, Limits
from cachesvc.connector.scheduler import CachesvcManager
from cachesvc.connector.specs import SlotsSpec
from cachesvc.wire import messages as m
from tests.support.fake_daemon import FakeDaemon, wait_for
from tests.support.kv import Clock, chain

NAMES = st.sampled_from(["a", "b", "c"])
CHAINS = {name: [chain(name, 3), chain(name, 3, group=1)] for name in "abc"}
PAGE = LayerPage("l", 4096, 4096, agnostic=True)
LAYOUT = RankLayout(0, 1, "cpu", ((PAGE,), (PAGE,)))
GARBAGE: list[Any] = [
    lambda _: b"\x05\x00\x00\x00abcde",
    lambda _: b"\xff" * 64,
    lambda x: m.Pong(x.call, 1),
    lambda x: m.Looked(x.call + 7, b"", 1),
    lambda x: m.Refused(x.call, "limit", "no"),
    lambda x: m.Refused(x.call, "protocol", "no"),
    lambda _: None,
]


class Dead(RuleBasedStateMachine):
    """Every method in any order; the daemon lives, if at all, just long enough to be joined."""

    folder: Path
    number = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).number += 1
        home = self.folder / str(self.number)
        home.mkdir()
        self.daemon: FakeDaemon | None = None
        self.home = home
        self.clock = Clock()
        self.membership = Membership(
            str(home / "fake.sock"), "dead", 1, lambda _, epoch: {"name": "dead", "epoch": epoch}, ""
        )
        groups = [Group(0, 16, True), Group(1, 16, False)]
        self.manager = CachesvcManager(self.membership, groups, 1, Limits(0.02, 0), self.clock)
        self.open: list[int] = []
        guard.faults.clear()

    @initialize(joined=st.sampled_from(["never", "dead", "alive"]))
    def begin(self, joined: str) -> None:
        if joined == "alive":
            self.daemon = FakeDaemon(self.home).start()
        if joined != "never":
            self.membership.told([LAYOUT])
            session = wait_for(self.membership.session)
            if joined == "alive":
                wait_for(lambda: session.channel.state is State.UP)

    # --- the daemon -------------------------------------------------------------------------------------------------

    @rule()
    def killed(self) -> None:
        if self.daemon is not None:
            self.daemon.close()
            self.daemon = None

    @rule(kind=st.sampled_from([m.Lookup, m.Lease, m.Allocate, m.Seal, m.Ping]), garbage=st.sampled_from(GARBAGE))
    def garbled(self, kind: type, garbage: Any) -> None:
        if self.daemon is not None:
            self.daemon.on[kind] = garbage

    # --- vLLM -------------------------------------------------------------------------------------------------------

    @rule(name=NAMES, adapter=st.sampled_from([None, lambda: b"a" * 16, lambda: None, lambda: 1 / 0]))
    def arrives(self, name: str, adapter: Any) -> None:
        assert self.manager.requests.arrive(name, adapter) is None
        assert isinstance(self.manager.on_new_request(ReqContext(name)), RequestOffloadingContext)
        assert self.manager.requests.ask(name, CHAINS[name]) is None

    @rule(name=NAMES, computed=st.sampled_from([0, 16, 48, 480]), later=st.sampled_from([0.0, 0.03]))
    def wants_to_be_scheduled(self, name: str, computed: int, later: float) -> None:
        self.clock.more += later
        assert self.manager.requests.ready(name, lambda: CHAINS[name], computed) in (True, False)

    @rule(name=NAMES)
    def is_scheduled_in_the_end(self, name: str) -> None:
        """However long it takes: with a deadline of 20 ms, every few steps later by more than that."""
        for _ in range(20):
            if self.manager.requests.ready(name, lambda: CHAINS[name], 0):
                break
            self.clock.more += 0.06
        else:
            pytest.fail("a request waits forever")
        for keys in CHAINS[name]:
            assert {self.manager.lookup(key, ReqContext(name)) for key in keys} == {LookupResult.MISS}
        self.manager.requests.scheduled(name, loads=False)

    @rule(name=NAMES)
    def loads(self, name: str) -> None:
        spec = self.manager.prepare_load(CHAINS[name][0], ReqContext(name))
        assert isinstance(spec, SlotsSpec)
        assert spec.lost
        self.manager.requests.scheduled(name, loads=True)
        self.open.append(spec.number)

    @rule(name=NAMES, groups=st.sets(st.integers(0, 1), min_size=1))
    def stores(self, name: str, groups: set[int]) -> None:
        keys = [key for group in groups for key in CHAINS[name][group]]
        began = time.monotonic()
        output = self.manager.prepare_store(keys, ReqContext(name))
        assert time.monotonic() - began < 5
        assert isinstance(output, PrepareStoreOutput)
        assert output.evicted_keys == []
        assert isinstance(output.store_spec, SlotsSpec)
        if output.keys_to_store:
            assert self.daemon is not None
            self.open.append(output.store_spec.number)
        if self.daemon is None:
            assert output.keys_to_store == []

    @rule(good=st.integers(0, 1), other=st.integers(0, 9))
    def transfers_end(self, good: int, other: int) -> None:
        assert self.manager.settle(dict.fromkeys([*self.open, other], (good, 1 - good))) is None
        self.open.clear()

    @rule(names=st.sets(NAMES))
    def steps(self, names: set[str]) -> None:
        assert self.manager.on_schedule_end(ScheduleEndContext((), names)) is None

    @rule(name=NAMES)
    def finishes(self, name: str) -> None:
        assert self.manager.on_request_finished(ReqContext(name)) is None

    @rule()
    def resets(self) -> None:
        assert self.manager.reset_cache() is None

    @rule()
    def counts(self) -> None:
        self.manager.get_stats()  # type: ignore[no-untyped-call]
        assert self.manager.has_pending_work() in (True, False)
        assert self.manager.get_load_source(CHAINS["a"][0][0], ReqContext("a")) == "host"
        assert list(self.manager.take_events()) == []

    @invariant()
    def no_fault_was_hidden(self) -> None:
        """The edge is for what nobody thought of: a dead daemon isn't that."""
        assert set(guard.faults) <= {"Requests.arrive"}

    def teardown(self) -> None:
        self.manager.settle(dict.fromkeys(range(1, 200), (0, 1)))
        self.clock.more += 60
        self.manager.on_schedule_end(ScheduleEndContext((), ()))
        assert not self.manager.has_pending_work()
        assert self.manager.shutdown() is None
        self.killed()


@pytest.mark.parametrize("limit", [pytest.param(200, id="200 runs")])
def test_every_method_with_a_dead_daemon(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dead, "folder", tmp_path, raising=False)
    monkeypatch.setattr("cachesvc.connector.membership.STOP_S", 0.0)
    quick = settings(
        max_examples=limit,
        stateful_step_count=40,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    run_state_machine_as_test(Dead, settings=quick)
