"""Ways to send an answer: as one body unless its client leaves, as server-sent events, as lines of JSON."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ktx.engine.client import RequestGroup
from ktx.engine.request import Finished
from ktx.server.errors import APIError, error_body, to_api_error

log = logging.getLogger("ktx.server")
SEND_TIMEOUT_S = 30.0  # seconds a client may take to read a piece
T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client has left."""


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled, and Gone raised, when the client leaves before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def json_response(chorus: RequestGroup, work: Awaitable[Any]) -> Response:
    """The one body that `work` makes. The routes cancel it when its client leaves."""
    try:
        return JSONResponse(await work)
    finally:
        chorus.close()


def sse_response(
    pieces: AsyncIterator[tuple[str | None, Any]], chorus: RequestGroup, path: str, ping: float, done: str | None = None
) -> EventSourceResponse:
    """Server-sent events, each a name (or None) and a value. A failure on the way is an event of its own, then `done`."""

    async def stream() -> AsyncIterator[ServerSentEvent]:
        try:
            async for name, value in pieces:
                yield ServerSentEvent(data=dumps(value), event=name, sep="\n")
        except Exception as error:
            told = _error_event(error)
            yield ServerSentEvent(
                data=dumps(error_body(path, told.status, told.message, told.code)),
                event="error" if path.startswith("/v1/messages") else None,
                sep="\n",
            )
        finally:
            chorus.close()
        if done:
            yield ServerSentEvent(data=done, sep="\n")

    return EventSourceResponse(
        stream(),
        ping=ping,
        sep="\n",
        ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
        send_timeout=SEND_TIMEOUT_S,
        shutdown_grace_period=8,
    )


def ndjson_response(pieces: AsyncIterator[Any], chorus: RequestGroup) -> StreamingResponse:
    """A JSON object a line."""

    async def stream() -> AsyncIterator[str]:
        try:
            async for value in pieces:
                yield dumps(value) + "\n"
        except Exception as error:
            yield dumps({"error": _error_event(error).message}) + "\n"
        finally:
            chorus.close()

    return StreamingResponse(stream(), media_type="application/x-ndjson")


def _error_event(error: Exception) -> APIError:
    problem = to_api_error(error)
    if problem.status >= 500 and not isinstance(error, APIError):
        log.error("a stream failed", exc_info=error)
    return problem


def usage_so_far(chorus: RequestGroup, number: int, said: int) -> dict[str, int]:
    """Of one choice of a stream, of which `said` tokens have come."""
    asked = len(chorus.requests[number].prompt)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def raise_for_finish(finished: Finished) -> None:
    """Problem for an answer that did not end by itself."""
    if finished.reason == "error":
        raise APIError(400 if finished.client_error else 500, finished.error or "the answer failed")
    if finished.reason == "cancelled":
        raise APIError(503, "the server is shutting down, the answer ends here", retry=5)
