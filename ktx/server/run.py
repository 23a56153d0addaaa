"""Runs the application on uvicorn until a signal ends it: streams get their last words, and the process ends within ten seconds."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any, Protocol

import uvicorn
from sse_starlette.sse import AppStatus

from ktx.errors import UsageError

HEADERS = 64 << 10  # bytes; only h11 keeps to it
SHUTDOWN_TIMEOUT_S = 8  # seconds for open answers
MAX_CONNECTIONS = 2048
log = logging.getLogger("ktx.server")


class Stoppable(Protocol):
    """What answers: a Served, or a cluster of them."""

    def stop(self) -> None:
        """Ends what runs, each stream with its last words."""


class Server(uvicorn.Server):
    """uvicorn, but the first signal ends the engine's answers and the second does not wait for them."""

    def __init__(self, config: uvicorn.Config, served: Stoppable):
        super().__init__(config)
        self.served = served

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
        AppStatus.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.get_running_loop().run_in_executor(None, self.served.stop)
        await super().shutdown(sockets)
        await stopping


def listen(host: str, port: int) -> socket.socket:
    """A socket, before anything is loaded. UsageError when the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # The protocol by its number: asyncio turns Nagle's algorithm off only then, and an answer in two pieces would wait 40 ms.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(MAX_CONNECTIONS)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: {error.strerror}; another server may be there, or take --port 0 for any"
        ) from error
    return made


def make_server(app: Any, served: Stoppable) -> Server:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=HEADERS,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        timeout_keep_alive=30,
        limit_concurrency=MAX_CONNECTIONS,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
    )
    return Server(config, served)


def serve(app: Any, served: Stoppable, where: socket.socket, started: Callable[[Callable[[], None]], None]) -> None:
    """Serves until a signal. `started` is called once requests are answered, with a function that ends the server."""
    AppStatus.should_exit = False
    server = make_server(app, served)

    def end() -> None:
        server.should_exit = True

    started(end)
    server.run(sockets=[where])
