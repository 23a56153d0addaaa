"""What a client meets: the guard has let its request in, a replica answers it. Plain ASGI."""

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
from ktx.replicas.affinity import keys_of
from ktx.replicas.cluster import BUSY, GONE, Cluster
from ktx.replicas.status import ReplicaStatus
from ktx.server.errors import error_body
from ktx.server.streaming import SEND_TIMEOUT_S, ClientDisconnected, cancel_on_disconnect, dumps

PLAIN = (
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
KEYS = (b"authorization", b"x-api-key", b"cookie")  # the guard has seen them, and Ray's connections are not encrypted
TRIES = 3  # replicas that are asked before a client hears that they end under its request
log = logging.getLogger("ktx.server")


class ReplicaProxy:
    """The routes of a replica, and /health and /metrics of all."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = {"/health": self.health, "/metrics": self.metrics}.get(scope["path"])
        if own is not None and scope["method"] in ("GET", "HEAD"):
            answer = await own()
        elif not await self.cluster.ready():
            answer = refused(scope, Overloaded(self.cluster.why()), retry=5)
        else:
            return await self.pass_on(scope, receive, send)
        await answer(scope, receive, send)

    async def health(self) -> Response:
        """200 as soon as one replica can answer."""
        words = await self.cluster.words()
        ready = sum(word.ready for word in words)
        told: dict[str, Any] = {
            "replicas": {"ready": ready, "wanted": self.cluster.wanted},
            "loading": {
                word.name: round(100 * word.done / word.total, 1) for word in words if not word.ready and word.total
            },
        }
        if await self.cluster.ready():
            return JSONResponse({"status": "ok", **told})
        error = {"code": 503, "message": self.cluster.why(), "type": "unavailable_error"}
        return JSONResponse({"status": "error" if self.cluster.trouble else "loading", **told, "error": error}, 503)

    async def metrics(self) -> Response:
        return Response(together(await self.cluster.words()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Asks a replica, and another one when that dies before it has said anything."""
        body = (await receive()).get("body", b"")
        keys = await asyncio.to_thread(keys_of, body, self.cluster.asked.making.adapters) if body else []
        words = plain(scope)
        sending = ProxiedResponse(scope, send)
        for attempt in range(TRIES):
            assert self.cluster.handle is not None
            answer = self.cluster.handle.remote(keys, words, body)
            try:
                return await cancel_on_disconnect(Request(scope, receive), sending.all_of(answer))
            except ClientDisconnected:
                return
            except BUSY:
                busy = refused(scope, QueueFull("too many requests are waiting; try again later"))
                return await busy(scope, receive, send)
            except GONE as error:
                log.warning("a replica ended under a request: %s", str(error).partition("\n")[0])
                if sending.begun:
                    return await sending.last_words("the replica that was answering has ended")
                if attempt + 1 == TRIES:
                    ended = refused(scope, Overloaded("the replicas end under this request"), retry=5)
                    return await ended(scope, receive, send)
            finally:
                answer.cancel()  # its replica goes on otherwise; nothing happens where it has ended


def plain(scope: Scope) -> dict[str, Any]:
    """What a replica is told of a request."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in KEYS]
    return {name: scope[name] for name in PLAIN if name in scope} | {"headers": headers}


class ProxiedResponse:
    """An answer on its way to the client."""

    def __init__(self, scope: Scope, send: Send):
        self.scope, self.send, self.begun, self.kind = scope, send, False, b""

    async def all_of(self, answer: Any) -> None:
        async for messages in answer:
            for message in messages:
                await self.pass_on(message)

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.kind = True, dict(message["headers"]).get(b"content-type", b"")
        await asyncio.wait_for(self.send(message), SEND_TIMEOUT_S)

    async def last_words(self, text: str) -> None:
        """A stream's end in its own form. The connection of another answer is cut, so that nobody takes a part for the whole."""
        path = self.scope["path"]
        told = dumps(error_body(path, 503, text))
        if self.kind.startswith(b"text/event-stream"):
            name, end = ("event: error\n", "") if path.startswith("/v1/messages") else ("", "data: [DONE]\n\n")
            data = f"{name}data: {told}\n\n{end}"
        elif self.kind.startswith(b"application/x-ndjson"):
            data = told + "\n"
        else:
            raise ConnectionError(text)
        await self.send({"type": "http.response.body", "body": data.encode(), "more_body": False})


def refused(scope: Scope, error: Overloaded, retry: int | None = None) -> Response:
    return Response(
        json.dumps(error_body(scope["path"], error.status, str(error), error.code)),
        error.status,
        {"retry-after": str(retry or error.retry)},
        media_type="application/json",
    )


class MergedMetrics:
    """The metrics of all replicas, each with a label of its own."""

    def __init__(self, words: Iterable[ReplicaStatus]):
        self.words = words

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for word in self.words:
            for family in text_string_to_metric_families(word.metrics.decode()):
                made = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    made.samples.append(sample._replace(labels={**sample.labels, "replica": word.name}))
        return families.values()


def together(words: Iterable[ReplicaStatus]) -> bytes:
    registry = CollectorRegistry()
    registry.register(MergedMetrics(list(words)))  # type: ignore[arg-type]
    return generate_latest(registry)
