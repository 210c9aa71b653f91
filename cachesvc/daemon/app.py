"""The daemon from start to stop, read top to bottom: this is where everything is made and wired.

    claim the directories                               (arena)      another daemon, bad permissions: OperatorError
    is there memory for what isn't there yet?           (preflight)
    find what the last run left, unlink what is no good (arena)
    open the sockets                                    (server)     clients may connect from here on and wait
    restore namespaces, spares, extents                 (core)
    serve                                               loop; HTTP starts in its own thread, imports and all
    stop: the same, backwards                           tables and data stay for the next start

Covers: order, and nothing else. Not here: flags and the config file (`cli`, `config`), what HTTP answers (`admin.app`,
handed in because it lies above this package).
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, TypeAlias

from cachesvc.arena.host import HostArena, Scan
from cachesvc.arena.preflight import preflight
from cachesvc.config import Config, Http, check_extents, format_size
from cachesvc.core import events as ev
from cachesvc.core.node import Node, NodeSettings
from cachesvc.core.quota import TenantQuota
from cachesvc.daemon import namespaces
from cachesvc.daemon.processes import PROCESSES_MAX
from cachesvc.daemon.runner import Runner
from cachesvc.daemon.server import CONNECTIONS_MAX, Door, Server, open_door
from cachesvc.daemon.view import View
from cachesvc.errors import FormatError, OperatorError

LOG = logging.getLogger(__name__)

TENANT_SOCKET_MODE: Final = 0o660
ADMIN_SOCKET_MODE: Final = 0o600
ADMIN_STOP_S: Final = 5.0

Admin: TypeAlias = Callable[[View, Http, threading.Event], None]
"""Serves HTTP until the event is set; called in a thread of its own, may import what it likes."""


def serve(config: Config, admin: Admin | None = None) -> None:
    """Run a daemon until SIGTERM or SIGINT. OperatorError if it can't start."""
    with ExitStack() as opened:
        arena = HostArena(config.arena_dir, config.state_dir, config.ram_bytes, config.extent_bytes)
        opened.callback(arena.close)
        check_extents(config, arena.extent_bytes)
        preflight(config.ram_bytes, arena.found_bytes(), config.arena_dir)
        scan = arena.scan()
        allow_descriptors(config.ram_bytes // arena.extent_bytes)
        asyncio.run(_run(config, arena, scan, open_doors(config, opened), admin))
    LOG.info("stopped")


# --- before the loop ------------------------------------------------------------------------------------------------


def allow_descriptors(extents: int) -> None:
    """Raise the limit on open files to what the most clients and extents need, as far as we may."""
    needed = CONNECTIONS_MAX + PROCESSES_MAX + 2 * extents + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    allowed = needed if hard == unlimited else min(needed, hard)
    if soft not in (unlimited, allowed) and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        LOG.warning(
            "only %d files may be open, %d would serve the most clients: raise the limit (nofile)", hard, needed
        )


def open_doors(config: Config, opened: ExitStack) -> list[Door]:
    """Every socket listens after it; `opened` closes them again. OperatorError."""
    doors = []
    for tenant in config.tenants:
        doors.append(open_door(config.socket_path(tenant.name), TENANT_SOCKET_MODE, tenant.group, tenant.name))
        opened.callback(doors[-1].close)
    doors.append(open_door(config.admin_socket, ADMIN_SOCKET_MODE, None, None))
    opened.callback(doors[-1].close)
    return doors


# --- on the loop ----------------------------------------------------------------------------------------------------


async def _run(config: Config, arena: HostArena, scan: Scan, doors: list[Door], admin: Admin | None) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    runner = Runner(make_node(config, arena), arena, config.state_dir)
    server = Server(runner)
    try:
        restore(runner, config, scan)
        for door in doors:
            server.open(door)
        runner.ready = True
        LOG.info("ready: %s of memory, %d chunks restored, %s", *_summary(config, runner, doors))
        with admin_thread(admin, View(runner), config.http):
            async with asyncio.TaskGroup() as tasks:
                parts = [tasks.create_task(runner.ticks()), tasks.create_task(server.sweep())]
                await stopping.wait()
                for part in reversed(parts):
                    part.cancel()
            runner.ready = False
    finally:
        await server.close()
        runner.close()


def make_node(config: Config, arena: HostArena) -> Node:
    """The core, for this config and this arena."""
    tenants = tuple(TenantQuota(t.name, t.min_bytes, t.max_bytes) for t in config.tenants)
    settings = NodeSettings(
        extent_bytes=arena.extent_bytes,
        extents_max=config.ram_bytes // arena.extent_bytes,
        tenants=tenants,
        eviction=config.eviction,
        quarantine_s=config.quarantine_s,
        restart_grace_s=config.restart_grace_s,
    )
    return Node(settings, arena.next_extent)


def restore(runner: Runner, config: Config, scan: Scan) -> None:
    """Tell the core what the last run left, then that it may begin."""
    for line in scan.dropped:
        LOG.warning("%s", line)
    if runner.arena.cold_start is not None:
        LOG.info("cold start: %s", runner.arena.cold_start)
    else:
        runner.dispatch(ev.NamespacesRestored(_known_namespaces(config)))
    for extent in scan.spares:
        runner.dispatch(ev.SpareRestored(extent))
    for found in scan.extents:
        runner.dispatch(ev.ExtentRestored(found.extent, found.tenant, found.slot_bytes, found.columns()))
    runner.dispatch(ev.Started())


def _known_namespaces(config: Config) -> tuple[ev.NamespaceRecord, ...]:
    try:
        return namespaces.load(config.state_dir)
    except FormatError as error:
        LOG.warning("%s: its chunks are dropped", error)
        return ()
    except OSError as error:
        raise OperatorError(f"{config.state_dir / namespaces.FILE_NAME} can't be read: {error.strerror}") from error


def _summary(config: Config, runner: Runner, doors: list[Door]) -> tuple[str, int, str]:
    chunks = runner.status(None)["restart"]["chunks_restored"]
    return format_size(config.ram_bytes), chunks, ", ".join(str(door.path) for door in doors)


@contextmanager
def admin_thread(admin: Admin | None, view: View, http: Http | None) -> Iterator[None]:
    """HTTP while the daemon serves. It may fail as it likes: the data path goes on."""
    if admin is None or http is None:
        yield
        return
    stopping = threading.Event()

    def edge() -> None:
        try:
            admin(view, http, stopping)
        except Exception:
            LOG.exception("HTTP has ended, metrics and status with it, until the next start")

    thread = threading.Thread(target=edge, name="cachesvc-admin", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(ADMIN_STOP_S)
