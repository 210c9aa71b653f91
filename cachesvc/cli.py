"""The command `cachesvc`: serve, status, namespaces, demo.

Covers: flags, asking a running daemon over its socket, printing. Not here: settings (`config`), the daemon
(`daemon.app`), HTTP (`admin.app`), what the demo shows (`demo.app`).

What can't be done ends in one line on stderr that says what to do, and exit code 2. Everything heavy is imported in the
functions that use it: `serve` has to listen within half a second.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cachesvc import config as settings
from cachesvc.config import Http
from cachesvc.errors import CachesvcError, OperatorError, ProtocolError

if TYPE_CHECKING:
    from cachesvc.daemon.view import View

ANSWER_S: Final = 10.0

app = typer.Typer(
    help="One cache service per GPU node: KV-cache chunks in shared memory.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
namespaces_app = typer.Typer(
    help="List the namespaces; `diff` says why two share nothing.", invoke_without_command=True, rich_markup_mode=None
)
app.add_typer(namespaces_app, name="namespaces")

Socket = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="A tenant's socket, or the admin socket, which sees every tenant (default: the admin socket if it is "
        "yours, else the one that a client opens; $CACHESVC_ADDRESS leads to both).",
    ),
]


@contextmanager
def one_line() -> Iterator[None]:
    """Whatever an operator has to mend ends the command with one line and exit code 2."""
    try:
        yield
    except CachesvcError as error:
        typer.echo(f"cachesvc: {error}", err=True)
        raise typer.Exit(2) from error


# --- serve ----------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings in YAML, as in README.md; flags override it.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The cache on disk (default: /var/lib/cachesvc, not root: $XDG_DATA_HOME/cachesvc)."
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Bookkeeping of the arena, and the lock (default: `state` in the root)."),
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="The socket, if there is one tenant (default: <run dir>/<tenant>/cachesvc.sock)."
        ),
    ] = None,
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of the arena, like 8GiB (default: 4GiB).")
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Metrics and status (default: 127.0.0.1:8765; off: none).")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the sockets are (default: /run/cachesvc, not root: $XDG_RUNTIME_DIR/cachesvc)."
        ),
    ] = None,
) -> None:
    """Run the daemon of this node until SIGTERM."""
    flags = {
        "root": root,
        "state_dir": state_dir,
        "socket": socket,
        "ram_bytes": ram,
        "http.address": http,
        "run_dir": run_dir,
    }
    with one_line():
        effective = settings.load(config, flags)
        typer.echo(settings.effective(effective), nl=False)
        sys.stdout.flush()
        from cachesvc.daemon import app as daemon
        from cachesvc.daemon import logs

        logs.set_up()
        daemon.serve(effective, _admin)


def _admin(view: View, http: Http, stopping: threading.Event) -> None:
    """In the admin thread: HTTP and all its imports."""
    from cachesvc.admin.app import run

    run(view, http, stopping)


# --- asking ---------------------------------------------------------------------------------------------------------


def ask(what: str, path: Path | None) -> bytes:
    """The answer of the daemon at `path` (None = the admin socket if it may be used, else a client's), JSON.

    OperatorError if nobody answers, or the daemon refuses to.
    """
    where = path or default_socket()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(str(where))
            return _exchange(connection, what)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise OperatorError(
            f"no daemon listens on {where}: start one with `cachesvc serve`, or name its socket with --socket"
        ) from error
    except TimeoutError as error:
        raise OperatorError(f"the daemon on {where} didn't answer within {ANSWER_S:g} s: look at its log") from error
    except (OSError, ProtocolError) as error:
        raise OperatorError(f"can't ask {where}: {error}; is it the socket of a cachesvc daemon, and yours?") from error


def default_socket() -> Path:
    """The admin socket beside the one that a client would open, if we may open it; else that one."""
    tenant = Path(settings.client_address(None))
    admin = tenant.parent.parent / "admin.sock"
    return admin if os.access(admin, os.R_OK | os.W_OK) else tenant


def _exchange(connection: socket.socket, what: str) -> bytes:
    from cachesvc.wire.framing import PREFACE_CONTROL, FrameReader, decode_control_reply, encode, preface
    from cachesvc.wire.messages import Ask, Refused, Report

    connection.sendall(preface(PREFACE_CONTROL) + encode(Ask(1, what)))
    frames = FrameReader()
    while True:
        n = connection.recv_into(frames.buffer())
        if not n:
            raise ProtocolError("the connection was closed without an answer")
        for payload in frames.advance(n):
            reply = decode_control_reply(payload)
            if isinstance(reply, Report):
                return reply.body
            if isinstance(reply, Refused):
                raise OperatorError(f"the daemon refuses: {reply.detail}")
            raise ProtocolError(f"an unexpected {type(reply).__name__}")


# --- status ---------------------------------------------------------------------------------------------------------


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print the body of /v1/status.")] = False,
    socket: Socket = None,
) -> None:
    """What the daemon holds, and for whom."""
    with one_line():
        body = ask("status", socket)
    if as_json:
        typer.echo(body)
        return
    from rich.console import Console

    console = Console()
    answer = json.loads(body)
    if "arena" in answer:
        console.print(_arena_lines(answer), soft_wrap=True)
    for name, tenant in answer["tenants"].items():
        console.print(_tenant_table(name, tenant))
        console.print(_tenant_line(tenant), highlight=False, soft_wrap=True)


def _arena_lines(answer: dict[str, Any]) -> str:
    arena, daemon = answer["arena"], answer["daemon"]
    extents = ", ".join(f"{n} {state}" for state, n in arena["extents"].items() if n and state != "total")
    lines = [
        f"arena {settings.format_size(arena['bytes'])} in {arena['extents']['total']} extents of "
        f"{settings.format_size(arena['extent_bytes'])} ({extents or 'none made yet'})",
        f"up {daemon['uptime_s']:.0f} s, {daemon['connections']} connections, {daemon['processes']} processes, "
        f"{answer['restart']['chunks_restored']} chunks restored at start",
    ]
    if answer["restart"]["grace"]:
        lines.append("restarted a moment ago: until its clients are back nothing is evicted")
    if daemon["problems"]:
        lines.append("problems: " + ", ".join(f"{n} {name}" for name, n in daemon["problems"].items()))
    return "\n".join(lines)


def _tenant_table(name: str, tenant: dict[str, Any]) -> Any:
    from rich.table import Table

    columns = ("extents", "slots", "sealed", "writing", "leased", "quarantined", "free")
    table = Table("slot", *columns, "bytes", title=f"tenant {name}", title_justify="left", box=None)
    for slab in tenant["classes"]:
        numbers = [str(slab[column]) for column in columns]
        table.add_row(settings.format_size(slab["slot_bytes"]), *numbers, settings.format_size(slab["bytes"]))
    return table


def _tenant_line(tenant: dict[str, Any]) -> str:
    counts = tenant["counts"]
    misses = ", ".join(f"{n} {reason}" for reason, n in counts["misses"].items())
    return (
        f"{tenant['sessions']} sessions, {tenant['namespaces_total']} namespaces, {tenant['leases']} leases; "
        f"{counts['hits']} hits, {sum(counts['misses'].values())} misses{f' ({misses})' if misses else ''}, "
        f"{counts['stores']} stores, {counts['refused']} refused, {counts['evictions']} evictions"
    )


# --- namespaces -----------------------------------------------------------------------------------------------------


@namespaces_app.callback()
def namespaces(context: typer.Context, socket: Socket = None) -> None:
    """List the namespaces that the daemon knows."""
    if context.invoked_subcommand is not None:
        context.obj = socket
        return
    with one_line():
        known = json.loads(ask("namespaces", socket))["namespaces"]
    from rich.console import Console
    from rich.table import Table

    table = Table("namespace", "tenant", "label", "chunk bytes", "components")
    for one in known:
        sizes = ", ".join(settings.format_size(size) for size in one["chunk_bytes"])
        table.add_row(one["namespace"][:12], one["tenant"], one["label"], sizes, str(len(one["components"])))
    Console().print(table)


@namespaces_app.command()
def diff(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="A label, or the first hex digits.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    socket: Socket = None,
) -> None:
    """Say in which components two namespaces differ."""
    with one_line():
        known = json.loads(ask("namespaces", socket or context.obj))["namespaces"]
        first, second = find(known, a), find(known, b)
    rows = list(differences(first, second))
    if not rows:
        same = "the same namespace" if first == second else "different namespaces, but no component tells them apart"
        typer.echo(f"{a} and {b} are {same}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "component", f"{first['label']} {first['namespace'][:12]}", f"{second['label']} {second['namespace'][:12]}"
    )
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def find(known: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The namespace with this label, or with a digest that begins so; OperatorError if there is none or not one."""
    matching = [one for one in known if name == one["label"]]
    matching = matching or [one for one in known if name and one["namespace"].startswith(name.lower())]
    if not matching:
        raise OperatorError(f"no namespace is called {name!r} or begins so: `cachesvc namespaces` lists them")
    if len(matching) > 1:
        digests = ", ".join(f"{one['namespace'][:12]} of {one['tenant']}" for one in matching[:8])
        raise OperatorError(f"{name!r} means {len(matching)} namespaces: use more hex digits of one ({digests})")
    return matching[0]


def differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, value in a, value in b) of everything that keeps two namespaces apart; `-` where one lacks it."""
    for field in ("tenant", "chunk_bytes"):
        if a[field] != b[field]:
            yield field, str(a[field]), str(b[field])
    for name in sorted(a["components"].keys() | b["components"].keys()):
        values = a["components"].get(name, "-"), b["components"].get(name, "-")
        if values[0] != values[1]:
            yield name, *values


# --- demo -------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A causal language model (default: a small random one).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1024, metavar="N", help="Length of the shared document.")] = 4096,
    kill: Annotated[
        bool, typer.Option("--kill", help="Kill the daemon (-9) in the middle, and start it again.")
    ] = False,
) -> None:
    """Let two vLLM engines share a prompt; exit code 1 if they didn't."""
    from rich.console import Console

    from cachesvc.demo import app as story

    with one_line():
        try:
            story.run(model, tokens, kill, Console())
        except story.Failure as failure:
            typer.echo(f"cachesvc demo: {failure}", err=True)
            raise typer.Exit(1) from failure
