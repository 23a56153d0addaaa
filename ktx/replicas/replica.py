"""One replica: an engine and its routes in a process of Ray Serve's. Requests come whole, answers go as the messages of ASGI.

Nothing that brings torch is imported before the process knows which CPUs are its own: the kernels pin their threads to those they find.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from ktx.errors import KtxError
from ktx.hardware import share_of_cpus
from ktx.replicas.status import ReplicaStatus, say
from ktx.server import request_id

PAUSE = 1.0  # seconds between two words to the board
PATIENCE = 5.0  # seconds that a request's routes have to end after its client has left
log = logging.getLogger("ktx.server")


@dataclass(frozen=True)
class ReplicaConfig:
    """How a replica is made; `make` gets the number of threads and the tally of bytes read."""

    make: Callable[[int, Any], Any]
    names: tuple[str, ...]
    adapters: tuple[str, ...]  # names of LoRA adapters
    settings: Any  # ktx.server.state.Settings
    log: tuple[str, str]  # level and format
    threads: int
    beside: int  # replicas on one machine, among which its CPUs are divided


class Replica:
    """The deployment."""

    def __init__(self, making: ReplicaConfig, board: Any):
        context = serve.get_replica_context()
        os.sched_setaffinity(0, share_of_cpus(context.rank.local_rank, making.beside))
        from ktx.server.app import make_routes
        from ktx.server.gc_tuning import freeze_gc
        from ktx.server.log import set_up
        from ktx.server.state import ServerState

        set_up(*making.log)
        self.board, self.name, self.app_name = board, context.replica_tag, context.app_name
        self.served = ServerState(making.names, making.settings, making.adapters)
        self.routes, self.metrics = make_routes(self.served)
        threading.Thread(target=self._speak, name="ktx-board", daemon=True).start()
        threading.Thread(target=self._hear, name="ktx-end", daemon=True).start()
        try:
            self.served.set_engine(making.make(making.threads, self.served))
            freeze_gc()
        except BaseException as error:
            told = str(error) if isinstance(error, KtxError) else f"{type(error).__name__}: {error}"
            self.served.load_error = told
            say(board, self._word())
            raise
        say(board, self._word())  # before Serve sends requests

    def _word(self) -> ReplicaStatus:
        served, ready = self.served, self.served.engine is not None and not self.served.stopping
        return ReplicaStatus(
            self.name,
            ray.util.get_node_ip_address(),
            ready,
            served.load_error,
            served.progress.total,
            served.progress.done,
            self.metrics.text() if ready else b"",
        )

    def _speak(self) -> None:
        while True:
            try:
                say(self.board, self._word())
            except ray.exceptions.RayError:
                return  # the board has gone, which `_hear` answers
            time.sleep(PAUSE)

    def _hear(self) -> None:
        """Ends the engine, and so every stream with its last words, when the server ends. A server that has died leaves its application to us."""
        try:
            ray.get(self.board.wait.remote())
            self.served.stop()
        except ray.exceptions.RayError:
            log.warning("the server has gone, its replicas end")
            self.served.stop()
            serve.delete(self.app_name)

    def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        engine = self.served.engine
        if engine is not None and not self.served.stopping and (engine.failure or engine.stuck):
            raise RuntimeError(engine.failure or "the engine has shown no sign of life for long")

    async def answer(self, keys: list[bytes], scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Any]]:
        """The answer's ASGI messages, several at once where they are there. Cancelled when the client has left."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        left, asked = asyncio.Event(), [body]

        async def receive() -> dict[str, Any]:
            if asked:
                return {"type": "http.request", "body": asked.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-ktx-replica", self.name.encode())]}
            messages.put_nowait(message)

        async def run() -> None:
            request_id.begin(dict(scope["headers"]))
            try:
                await self.routes({**scope, "type": "http", "asgi": {"version": "3.0"}}, receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                some = [message]
                while not messages.empty() and (message := messages.get_nowait()) is not None:
                    some.append(message)
                yield some
                if message is None:
                    break
            await task
        finally:
            left.set()
            if not task.done():
                await asyncio.wait({task}, timeout=PATIENCE)
                task.cancel()
