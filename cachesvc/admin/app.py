"""The admin API over HTTP: health, metrics, status. In a thread and a loop of its own, off the data path.

Covers: routes, the HTTP server's life in its thread. Not here: the answers (`daemon.view`), their fields
(`admin.schemas`), names of metrics (`cachesvc.metrics`).

Importing this module takes a quarter of a second: whoever starts the daemon imports it in the admin thread, after the
sockets are open. Nothing that goes wrong here stops the data path. There is no authentication, so it listens on
loopback unless the operator says otherwise.

    GET /healthz        200 if the daemon's loop answers, else 503
    GET /readyz         200 if the sockets are open and the arena is restored, else 503
    GET /metrics        Prometheus text
    GET /v1/status      `admin.schemas.Status`
    GET /v1/namespaces  `admin.schemas.Namespaces`
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from typing import Final

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from cachesvc.admin.schemas import Answer, Namespaces, Status
from cachesvc.config import Http
from cachesvc.daemon.view import UnansweredError, View
from cachesvc.metrics import exposition

LOG = logging.getLogger(__name__)

STOP_S_MAX: Final = 2
"""Requests still open after it are cut off when the daemon stops."""
REQUESTS_MAX: Final = 16
"""At once; more get 503."""


def make_app(view: View) -> FastAPI:
    """The routes, on top of a daemon. They are plain functions: each waits for the loop in a worker thread."""
    app = FastAPI(title="cachesvc", docs_url=None, redoc_url=None)

    @app.exception_handler(UnansweredError)
    async def no_answer(_request: Request, error: UnansweredError) -> Response:
        return JSONResponse(Answer(ok=False, detail=str(error)).model_dump(), status_code=503)

    @app.get("/healthz")
    def healthz() -> Answer:
        view.ready()
        return Answer(ok=True)

    @app.get("/readyz")
    def readyz(response: Response) -> Answer:
        ready = view.ready()
        response.status_code = 200 if ready else 503
        return Answer(ok=ready, detail="" if ready else "starting or stopping")

    @app.get("/metrics")
    def metrics() -> Response:
        body, content_type = exposition(view.figures())
        return Response(body, media_type=content_type)

    @app.get("/v1/status", response_model_exclude_unset=True)
    def status() -> Status:
        return Status.model_validate(view.status())

    @app.get("/v1/namespaces")
    def namespaces() -> Namespaces:
        return Namespaces.model_validate(view.namespaces())

    return app


def run(view: View, http: Http, stopping: threading.Event) -> None:
    """Serve until `stopping` is set. Called in a thread of its own; if it can't listen, a line in the log says so."""
    try:
        listener = _listen(http)
    except OSError as error:
        LOG.warning("no HTTP on %s: %s; name another address with --http", http.address, error.strerror or error)
        return
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with listener:
        host, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            LOG.warning("HTTP listens on %s, not on loopback: anybody who can reach it reads metrics and status", host)
        LOG.info("HTTP on http://%s", Http(host, port).address)
        config = uvicorn.Config(
            make_app(view),
            log_config=None,
            access_log=False,
            limit_concurrency=REQUESTS_MAX,
            timeout_graceful_shutdown=STOP_S_MAX,
            lifespan="off",
        )
        asyncio.run(_serve(uvicorn.Server(config), listener, stopping))


def _listen(http: Http) -> socket.socket:
    """A listening socket: opened by us, because uvicorn ends the process when it can't."""
    family, kind, protocol, _, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


async def _serve(server: uvicorn.Server, listener: socket.socket, stopping: threading.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(sockets=[listener]))
        await asyncio.to_thread(stopping.wait)
        server.should_exit = True
