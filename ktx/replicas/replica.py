"""One replica: an engine and its routes in a process of Ray Serve.

A request arrives with its whole body; the response is returned as ASGI messages. Modules that import torch are
imported only after the CPU affinity of the process is set, because the kernels pin their threads to the CPUs that
they find.
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
from starlette.datastructures import Headers

from ktx.errors import KtxError
from ktx.hardware import cpu_share
from ktx.replicas.status import ReplicaStatus, report_status
from ktx.server import request_id

REPORT_INTERVAL_S = 1.0  # between two status reports
CANCEL_TIMEOUT_S = 5.0  # for the routes to end a request whose client disconnected
log = logging.getLogger("ktx.server")


@dataclass(frozen=True)
class ReplicaConfig:
    """How a replica creates its engine."""

    make: Callable[[int, Any], Any]  # (threads, ServerState, whose `progress` counts the bytes read) -> engine
    names: tuple[str, ...]
    adapters: tuple[str, ...]  # names of LoRA adapters
    settings: Any  # ktx.server.state.ServerSettings
    log: tuple[str, str]  # level and format
    threads: int
    per_node: int  # replicas on one machine, among which its CPUs are divided


class Replica:
    """The Ray Serve deployment: loads the model, reports its status and answers requests."""

    def __init__(self, config: ReplicaConfig, status_actor: Any):
        """Loads the model, while a thread reports the progress; Ray Serve sends requests once this returns."""
        context = serve.get_replica_context()
        os.sched_setaffinity(0, cpu_share(context.rank.local_rank, config.per_node))
        # only now: they import the kernels, which pin their threads to the CPUs that they find
        from ktx.server.app import make_routes
        from ktx.server.gc_tuning import freeze_gc
        from ktx.server.log import configure_logging
        from ktx.server.state import ServerState

        configure_logging(*config.log)
        self.status_actor, self.name, self.app_name = status_actor, context.replica_tag, context.app_name
        self.state = ServerState(config.names, config.settings, config.adapters)
        self.routes, self.metrics = make_routes(self.state)
        threading.Thread(target=self._report_loop, name="ktx-board", daemon=True).start()
        threading.Thread(target=self._wait_for_shutdown, name="ktx-end", daemon=True).start()
        try:
            self.state.set_engine(config.make(config.threads, self.state))
            freeze_gc()
        except BaseException as error:
            message = str(error) if isinstance(error, KtxError) else f"{type(error).__name__}: {error}"
            self.state.load_error = message
            report_status(status_actor, self._status())
            raise
        report_status(status_actor, self._status())  # before Serve sends requests

    def _status(self) -> ReplicaStatus:
        """Returns what the server must know of this replica to answer /health and /metrics; metrics only when the
        engine is ready.
        """
        state, ready = self.state, self.state.engine is not None and not self.state.is_shutting_down
        return ReplicaStatus(
            name=self.name,
            node=ray.util.get_node_ip_address(),
            ready=ready,
            error=state.load_error,
            total_bytes=state.progress.total,
            loaded_bytes=state.progress.done,
            metrics=self.metrics.text() if ready else b"",
        )

    def _report_loop(self) -> None:
        """Reports the status every REPORT_INTERVAL_S until the server's actor dies."""
        while True:
            try:
                report_status(self.status_actor, self._status())
            except ray.exceptions.RayError:
                return  # the actor died; `_wait_for_shutdown` handles it
            time.sleep(REPORT_INTERVAL_S)

    def _wait_for_shutdown(self) -> None:
        """Stops the engine when the server shuts down, which sends the final event of each stream.

        If the server died, the replica deletes the Ray Serve application, because the server can no longer do it.
        """
        try:
            ray.get(self.status_actor.wait.remote())
            self.state.stop()
        except ray.exceptions.RayError:
            log.warning("the server process died; its replicas shut down")
            self.state.stop()
            serve.delete(self.app_name)

    def check_health(self) -> None:
        """Raises RuntimeError if the engine failed or stalled; Ray Serve then replaces the replica."""
        engine = self.state.engine
        if engine is not None and not self.state.is_shutting_down and (engine.failure or engine.stalled):
            raise RuntimeError(engine.failure or "the engine has stalled: it has made no progress for too long")

    async def answer(self, keys: list[bytes], scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Any]]:
        """Yields the ASGI messages of the response in batches of those that are available.

        Ray cancels the call when the client disconnects.

        Args:
            keys: prefix keys of the prompt, which only the router reads.
            scope: the ASGI scope that the proxy forwards.
            body: the whole request body.
        """
        messages: asyncio.Queue[Any] = asyncio.Queue()
        disconnected, pending = asyncio.Event(), [body]

        async def receive() -> dict[str, Any]:
            """Returns the body, then waits until the client disconnects."""
            if pending:
                return {"type": "http.request", "body": pending.pop(), "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            """Queues a message of the response; its header names this replica."""
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-ktx-replica", self.name.encode())]}
            messages.put_nowait(message)

        async def run() -> None:
            """Answers the request; a final None in the queue ends the response."""
            request_id.set_current(Headers(raw=scope["headers"]))
            try:
                await self.routes({**scope, "type": "http", "asgi": {"version": "3.0"}}, receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                batch = [message]
                while not messages.empty() and (message := messages.get_nowait()) is not None:
                    batch.append(message)
                yield batch
                if message is None:
                    break
            await task
        finally:
            disconnected.set()
            if not task.done():
                await asyncio.wait({task}, timeout=CANCEL_TIMEOUT_S)
                task.cancel()
