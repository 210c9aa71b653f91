"""The command: what it prints, what it says when it can't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cachesvc import cli
from cachesvc.cli import differences, find
from cachesvc.demo.app import Failure
from cachesvc.errors import OperatorError
from cachesvc.wire.messages import Allocate, Lookup, Seal, pack_keys
from tests.support.daemon import Daemon, Wire, shared_directory


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with shared_directory() as arena, Daemon(tmp_path_factory.mktemp("daemon"), arena) as running:
        yield running


@pytest.fixture(scope="module")
def clients(daemon: Daemon) -> Iterator[None]:
    """Two engines that don't share, and a chunk."""
    with Wire(daemon.socket()) as one, Wire(daemon.socket()) as two:
        one.hello(namespace=b"\xaa" * 16, label="one", components={"model": "m", "dtype": "bf16"})
        two.hello(namespace=b"\xab" * 16, label="two", components={"model": "m", "seed": "7"}, chunk_bytes=[8192])
        one.call(Allocate(2, 1, pack_keys(0, [b"k"])))
        one.call(Seal(3, 1, [4096]))
        one.call(Lookup(4, pack_keys(0, [b"k", b"l"]), 1, True))
        yield


def command(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def printed(*arguments: str) -> str:
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    """The one line on stderr of a command that ends with 2."""
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


# --- status ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clients")
def test_status_for_people(daemon: Daemon) -> None:
    text = printed("status", "--socket", str(daemon.admin_socket))
    assert "arena 64MiB in 4 extents of 16MiB" in text
    assert "tenant default" in text
    assert "4KiB" in text
    assert "1 hits, 1 misses (1 never_stored)" in text


@pytest.mark.usefixtures("clients")
def test_status_of_a_tenant(daemon: Daemon) -> None:
    text = printed("status", "--socket", str(daemon.socket()))
    assert "tenant default" in text
    assert "arena" not in text


def test_status_as_json_is_the_body(daemon: Daemon) -> None:
    body = json.loads(printed("status", "--json", "--socket", str(daemon.admin_socket)))
    assert body.keys() == {"tenants", "arena", "restart", "daemon"}


def test_the_socket_is_found_as_a_client_finds_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CACHESVC_ADDRESS", str(daemon.socket()))
    assert "arena" in json.loads(printed("status", "--json"))
    elsewhere = tmp_path / "pod" / "cachesvc.sock"
    elsewhere.parent.mkdir()
    os.symlink(daemon.socket(), elsewhere)
    monkeypatch.setenv("CACHESVC_ADDRESS", str(elsewhere))
    assert "arena" not in json.loads(printed("status", "--json"))


# --- namespaces -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clients")
def test_namespaces(daemon: Daemon) -> None:
    text = printed("namespaces", "--socket", str(daemon.socket()))
    assert "aaaaaaaaaaaa" in text
    assert "two" in text


@pytest.mark.usefixtures("clients")
@pytest.mark.parametrize("where", ["before", "after"])
def test_diff_says_what_differs(daemon: Daemon, where: str) -> None:
    socket = ("--socket", str(daemon.socket()))
    if where == "before":
        text = printed("namespaces", *socket, "diff", "one", "abab")
    else:
        text = printed("namespaces", "diff", "one", "abab", *socket)
    for word in ("dtype", "bf16", "seed", "7", "chunk_bytes", "[4096]", "[8192]"):
        assert word in text
    assert "model" not in text
    assert "the same namespace" in printed("namespaces", "diff", "one", "aaaa", *socket)


@pytest.mark.usefixtures("clients")
def test_diff_needs_one_namespace_each(daemon: Daemon) -> None:
    socket = ("--socket", str(daemon.socket()))
    assert "'three'" in refused("namespaces", "diff", "one", "three", *socket)
    assert "'a' means 2 namespaces" in refused("namespaces", "diff", "a", "one", *socket)


def namespace(**fields: Any) -> dict[str, Any]:
    usual = {"tenant": "t", "namespace": "00", "label": "l", "components": {}, "chunk_bytes": [1]}
    return usual | fields


def test_find_prefers_a_label() -> None:
    known = [namespace(label="ab", namespace="00"), namespace(label="x", namespace="ab")]
    assert find(known, "ab") == known[0]
    assert find(known, "AB") == known[1]
    with pytest.raises(OperatorError):
        find(known, "")


def test_differences() -> None:
    assert list(differences(namespace(), namespace(label="other"))) == []
    assert list(differences(namespace(tenant="a", components={"x": "1"}), namespace(tenant="b"))) == [
        ("tenant", "a", "b"),
        ("x", "1", "-"),
    ]


# --- what can't be done ---------------------------------------------------------------------------------------------


def test_no_daemon(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    expected = (
        f"cachesvc: no daemon listens on {path}: start one with `cachesvc serve`, or name its socket with --socket"
    )
    assert refused("status", "--socket", str(path)) == expected
    assert refused("namespaces", "--socket", str(path)) == expected


def test_something_else_on_the_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no daemon listens on" in refused("status", "--socket", str(tmp_path / "file"))
    assert "can't ask" in refused("status", "--socket", str(tmp_path / "file" / "x"))
    assert "can't ask" in refused("status", "--socket", "/" + "x" * 200)


def test_serve_refuses_a_bad_config(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("ram_byts: 1GiB")
    line = refused("serve", "--config", str(config))
    assert "ram_bytes" in line
    assert "ram_bytes" in refused("serve", "--ram", "many", "--run-dir", str(tmp_path), "--root", str(tmp_path))


def test_flags_reach_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("cachesvc.daemon.app.serve", lambda config, admin: served.append(config))
    monkeypatch.setattr("cachesvc.daemon.logs.set_up", lambda: None)
    flags = {name: str(tmp_path / name) for name in ("root", "state-dir", "socket", "run-dir")}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    text = printed("serve", *arguments, "--ram", "512MiB", "--http", "127.0.0.1:0")
    (config,) = served
    assert (config.root, config.state_dir, config.socket, config.run_dir) == tuple(map(Path, flags.values()))
    assert config.ram_bytes == 512 << 20
    assert config.http.port == 0
    assert text.count("ram_bytes: 512MiB") == 1


def test_rich_is_not_imported_for_json() -> None:
    code = "import sys, cachesvc.cli; assert not {'rich', 'numpy', 'asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- demo -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("vllm") is not None, reason="there is vLLM")
def test_demo_without_vllm() -> None:
    assert "make demo" in refused("demo")


def test_demo_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Path | None, tokens: int, kill: bool, console: object) -> None:
        raise Failure(f"no shared hit of {tokens} tokens, {model}, {kill}")

    monkeypatch.setattr("cachesvc.demo.app.run", fail)
    result = command("demo", "--model", "m", "--tokens", "5000", "--kill")
    assert result.exit_code == 1
    assert result.stderr == "cachesvc demo: no shared hit of 5000 tokens, m, True\n"


def test_demo_takes_no_short_document() -> None:
    assert command("demo", "--tokens", "1000").exit_code == 2
