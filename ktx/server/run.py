"""Runs the ASGI application on uvicorn until a signal arrives.

On shutdown each open stream gets its final event, and the process exits within ten seconds.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp

from ktx.errors import UsageError

MAX_HEADER_BYTES = 64 << 10  # only uvicorn's h11 implementation enforces it
SHUTDOWN_TIMEOUT_S = 8  # for open responses
MAX_CONNECTIONS = 2048
log = logging.getLogger("ktx.server")


class Stoppable(Protocol):
    """What the server stops at its end: a `ServerState`, or a `Cluster` of replicas."""

    def stop(self) -> None:
        """Ends all requests; each stream gets its final event."""


class Server(uvicorn.Server):
    """A uvicorn server: the first signal ends all requests gracefully, a second SIGINT does not wait for them.

    Args:
        config: uvicorn's configuration.
        backend: what is stopped at shutdown.
    """

    def __init__(self, config: uvicorn.Config, backend: Stoppable):
        super().__init__(config)
        self.backend = backend

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGINT and SIGTERM."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
        AppStatus.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the backend while uvicorn closes the connections."""
        stopping = asyncio.get_running_loop().run_in_executor(None, self.backend.stop)
        await super().shutdown(sockets)
        await stopping


def listen(host: str, port: int) -> socket.socket:
    """Opens the listening socket; called before the model is loaded, so that a wrong address fails at once.

    Raises:
        UsageError: the address is in use or does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # asyncio disables Nagle's algorithm only for sockets whose protocol is IPPROTO_TCP, not 0. With it, a response
        # that is sent in two writes is delayed by 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: {error.strerror}; if another server uses the port, choose another one"
            " (--port 0: any free port)"
        ) from error
    return listener


def make_server(app: ASGIApp, backend: Stoppable) -> Server:
    """Returns a uvicorn server with limits on headers and connections, without websockets and uvicorn's own logs."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        timeout_keep_alive=30,
        limit_concurrency=MAX_CONNECTIONS,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
    )
    return Server(config, backend)


def serve(
    app: ASGIApp, backend: Stoppable, listener: socket.socket, on_start: Callable[[Callable[[], None]], None]
) -> None:
    """Serves requests until a signal arrives.

    Args:
        app: the ASGI application.
        backend: what is stopped at shutdown.
        listener: the listening socket.
        on_start: called once the server is configured, with a function that stops it.
    """
    AppStatus.should_exit = False  # a flag of the whole process, which an earlier server may have set
    server = make_server(app, backend)

    def stop_server() -> None:
        """Makes `run` end, with a graceful shutdown."""
        server.should_exit = True

    on_start(stop_server)
    server.run(sockets=[listener])
