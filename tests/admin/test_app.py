"""HTTP over a real socket, on top of a real daemon where its answers matter and of a fake one where it fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cachesvc.admin.app import run
from cachesvc.config import Http
from cachesvc.daemon.view import UnansweredError
from cachesvc.wire.messages import Allocate, Ask, Lookup, Report, Seal, pack_keys
from tests.support.daemon import HANG_S, Daemon, Wire, shared_directory, wait_for


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("daemon")
    with shared_directory() as arena, Daemon(home, arena, http={"address": "127.0.0.1:0"}) as running:
        yield running


@pytest.fixture(scope="module")
def http(daemon: Daemon) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=daemon.http(), timeout=HANG_S) as client:
        yield client


def test_health(http: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        response = http.get(path)
        assert (response.status_code, response.json()) == (200, {"ok": True, "detail": ""})


def test_the_same_body_as_over_the_wire(daemon: Daemon, http: httpx.Client) -> None:
    with Wire(daemon.socket()) as client, Wire(daemon.admin_socket) as wire:
        client.hello(label="seen")
        client.call(Allocate(2, 1, pack_keys(0, [b"k"])))
        client.call(Seal(3, 1, [100]))
        client.call(Lookup(4, pack_keys(0, [b"k", b"l"]), 1, True))
        for what in ("status", "namespaces"):
            report = wire.call(Ask(1, what))
            assert isinstance(report, Report)
            asked = json.loads(report.body)
            got = http.get(f"/v1/{what}").json()
            for body in (asked, got):
                body.get("daemon", {}).pop("uptime_s", None)
            assert got == asked
        assert got["namespaces"][0]["label"] == "seen"


def test_metrics(http: httpx.Client) -> None:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'cachesvc_arena_bytes{tier="ram"} 6.7108864e+07' in response.text
    assert "cachesvc_rpc_seconds_bucket" in response.text


def test_nothing_else_is_there(http: httpx.Client) -> None:
    assert http.get("/v1/chunks").status_code == 404
    assert http.get("/docs").status_code == 404
    assert http.post("/v1/status").status_code == 405


def test_no_line_a_request(daemon: Daemon, http: httpx.Client) -> None:
    before = daemon.log
    http.get("/healthz")
    assert daemon.log == before


# --- a daemon that fails --------------------------------------------------------------------------------------------


class FakeView:
    """Answers as it is told."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.is_ready = True

    def ready(self) -> bool:
        return bool(self._answer(self.is_ready))

    def status(self) -> Any:
        return self._answer({"tenants": {}})

    def _answer(self, value: Any) -> Any:
        if self.error is not None:
            raise self.error
        return value


@pytest.fixture
def view() -> FakeView:
    return FakeView()


@pytest.fixture
def fake(view: FakeView) -> Iterator[httpx.Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stopping = threading.Event()
    thread = threading.Thread(target=run, args=(view, Http("127.0.0.1", port), stopping))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_S) as client:
            wait_for(lambda: _answers(client))
            yield client
    finally:
        stopping.set()
        thread.join(HANG_S)
        assert not thread.is_alive()


def _answers(client: httpx.Client) -> bool:
    try:
        client.get("/")
    except httpx.ConnectError:
        return False
    return True


def test_a_wedged_daemon_is_not_healthy(view: FakeView, fake: httpx.Client) -> None:
    view.error = UnansweredError("the daemon's loop didn't answer")
    for path in ("/healthz", "/readyz", "/v1/status"):
        response = fake.get(path)
        assert response.status_code == 503
        assert response.json() == {"ok": False, "detail": "the daemon's loop didn't answer"}


def test_starting_or_stopping_is_healthy_but_not_ready(view: FakeView, fake: httpx.Client) -> None:
    view.is_ready = False
    assert fake.get("/healthz").status_code == 200
    assert fake.get("/readyz").status_code == 503


def test_a_bug_costs_one_request(view: FakeView, fake: httpx.Client) -> None:
    view.error = ZeroDivisionError()
    assert fake.get("/v1/status").status_code == 500
    view.error = None
    # on a connection of its own: the server closes one that failed
    assert httpx.get(f"{fake.base_url}/v1/status", timeout=HANG_S).json() == {"tenants": {}}


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_address_that_can_not_be_had_is_one_line(
    view: FakeView, caplog: pytest.LogCaptureFixture, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run(view, Http(host, taken.getsockname()[1]), threading.Event())  # type: ignore[arg-type]
    (record,) = caplog.records
    assert f"no HTTP on {host}:" in record.getMessage()


def test_another_address_than_loopback_is_warned_of(view: FakeView, caplog: pytest.LogCaptureFixture) -> None:
    stopping = threading.Event()
    stopping.set()
    run(view, Http("0.0.0.0", 0), stopping)  # type: ignore[arg-type]
    assert "not on loopback" in caplog.text
