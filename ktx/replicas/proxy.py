"""The ASGI application in front of the replicas: forwards each authenticated request to a replica."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ktx.errors import Overloaded, QueueFull
from ktx.replicas.affinity import prefix_keys
from ktx.replicas.cluster import BUSY_ERRORS, DEAD_REPLICA_ERRORS, Cluster
from ktx.replicas.status import ReplicaStatus
from ktx.server.errors import error_body
from ktx.server.streaming import SEND_TIMEOUT_S, ClientDisconnected, cancel_on_disconnect, dumps

FORWARDED_SCOPE_KEYS = (
    "http_version",
    "method",
    "path",
    "raw_path",
    "query_string",
    "scheme",
    "client",
    "server",
    "root_path",
)
# AuthMiddleware has checked these headers; they are not forwarded, because Ray's connections are not encrypted.
SECRET_HEADERS = (b"authorization", b"x-api-key", b"cookie")
MAX_TRIES = 3  # replicas that a request is sent to when each of them dies before it responds
log = logging.getLogger("ktx.server")


class ReplicaProxy:
    """Forwards requests to the replicas; answers /health and /metrics itself for all of them."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers /health and /metrics itself, and forwards any other request to a replica; 503 while none is ready."""
        route = {"/health": self.health, "/metrics": self.metrics}.get(scope["path"])
        if route is not None and scope["method"] in ("GET", "HEAD"):
            response = await route()
        elif not await self.cluster.ready():
            response = error_response(scope, Overloaded(self.cluster.unavailable_reason()), retry=5)
        else:
            return await self.forward(scope, receive, send)
        await response(scope, receive, send)

    async def health(self) -> Response:
        """Returns 200 as soon as one replica is ready, else 503 with the reason; the body has the loading progress."""
        statuses = await self.cluster.statuses()
        ready = sum(status.ready for status in statuses)
        body: dict[str, Any] = {
            "replicas": {"ready": ready, "wanted": self.cluster.num_replicas},
            "loading": {
                status.name: round(100 * status.loaded_bytes / status.total_bytes, 1)
                for status in statuses
                if not status.ready and status.total_bytes
            },
        }
        if await self.cluster.ready():
            return JSONResponse({"status": "ok", **body})
        error = {"code": 503, "message": self.cluster.unavailable_reason(), "type": "unavailable_error"}
        return JSONResponse({"status": "error" if self.cluster.load_error else "loading", **body, "error": error}, 503)

    async def metrics(self) -> Response:
        """Returns the Prometheus metrics of all replicas."""
        return Response(
            merge_metrics(await self.cluster.statuses()), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the request to a replica; retries with another one if that replica dies before it sends anything."""
        body = (await receive()).get("body", b"")
        keys = await asyncio.to_thread(prefix_keys, body, self.cluster.config.replica.adapters) if body else []
        forwarded = forwarded_scope(scope)
        proxied = ProxiedResponse(scope, send)
        for attempt in range(MAX_TRIES):
            assert self.cluster.handle is not None
            response = self.cluster.handle.remote(keys, forwarded, body)
            try:
                return await cancel_on_disconnect(Request(scope, receive), proxied.send_all(response))
            except ClientDisconnected:
                return
            except BUSY_ERRORS:
                busy = error_response(scope, QueueFull("too many requests are waiting; try again later"))
                return await busy(scope, receive, send)
            except DEAD_REPLICA_ERRORS as error:
                log.warning("a replica died while it answered a request: %s", str(error).partition("\n")[0])
                if proxied.started:
                    return await proxied.send_error("the replica that was answering this request died")
                if attempt + 1 == MAX_TRIES:
                    failed = error_response(
                        scope, Overloaded("each replica that was tried died while it answered this request"), retry=5
                    )
                    return await failed(scope, receive, send)
            finally:
                response.cancel()  # otherwise the replica continues to decode; no effect on a finished call


def forwarded_scope(scope: Scope) -> dict[str, Any]:
    """Returns the parts of an ASGI scope that are forwarded to a replica, without secret headers."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in SECRET_HEADERS]
    return {name: scope[name] for name in FORWARDED_SCOPE_KEYS if name in scope} | {"headers": headers}


class ProxiedResponse:
    """Passes a replica's ASGI messages on to the client. `started` is whether any was sent."""

    def __init__(self, scope: Scope, send: Send):
        self.scope, self.send, self.started, self.media_type = scope, send, False, b""

    async def send_all(self, response: Any) -> None:
        """Sends every message of a replica's response."""
        async for messages in response:
            for message in messages:
                await self.send_message(message)

    async def send_message(self, message: Message) -> None:
        """Sends one message. Raises TimeoutError when the client does not read it within `SEND_TIMEOUT_S`."""
        if message["type"] == "http.response.start":
            self.started, self.media_type = True, dict(message["headers"]).get(b"content-type", b"")
        await asyncio.wait_for(self.send(message), SEND_TIMEOUT_S)

    async def send_error(self, text: str) -> None:
        """Ends a stream with an error event in the format of its protocol.

        Raises:
            ConnectionError: the response is no stream. The server then closes the connection, so that the client does
                not take a partial body for a complete one.
        """
        path = self.scope["path"]
        body = dumps(error_body(path, 503, text))
        if self.media_type.startswith(b"text/event-stream"):
            name, end = ("event: error\n", "") if path.startswith("/v1/messages") else ("", "data: [DONE]\n\n")
            data = f"{name}data: {body}\n\n{end}"
        elif self.media_type.startswith(b"application/x-ndjson"):
            data = body + "\n"
        else:
            raise ConnectionError(text)
        await self.send({"type": "http.response.body", "body": data.encode(), "more_body": False})


def error_response(scope: Scope, error: Overloaded, retry: int | None = None) -> Response:
    """Returns an error response in the format of the path's protocol. `retry` is in seconds, by default the error's."""
    return Response(
        json.dumps(error_body(scope["path"], error.status, str(error), error.code)),
        error.status,
        {"retry-after": str(retry or error.retry)},
        media_type="application/json",
    )


class MergedMetrics:
    """A Prometheus collector of all replicas' metrics; a `replica` label tells them apart."""

    def __init__(self, statuses: Iterable[ReplicaStatus]):
        self.statuses = statuses

    def collect(self) -> Iterable[Metric]:
        """Parses the metrics of each replica and returns the merged families."""
        families: dict[str, Metric] = {}
        for status in self.statuses:
            for family in text_string_to_metric_families(status.metrics.decode()):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels={**sample.labels, "replica": status.name}))
        return families.values()


def merge_metrics(statuses: Iterable[ReplicaStatus]) -> bytes:
    """Returns the metrics of all replicas in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(MergedMetrics(list(statuses)))  # type: ignore[arg-type]
    return generate_latest(registry)
