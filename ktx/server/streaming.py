"""Sends responses: as one JSON body, as server-sent events (SSE) or as lines of JSON (NDJSON)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive

from ktx.engine.client import RequestGroup
from ktx.engine.request import Finished
from ktx.server.errors import APIError, error_body, to_api_error

log = logging.getLogger("ktx.server")
SEND_TIMEOUT_S = 30.0  # for a client to read one event
T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client disconnected before the response was complete."""


def dumps(value: Any) -> str:
    """Returns compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` and returns its result; when the client disconnects, `work` ends, because nothing reads its result.

    Raises:
        ClientDisconnected: the client disconnected first; `work` is cancelled.
    """
    task, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        for future in (task, disconnected):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def json_response(group: RequestGroup, work: Awaitable[dict[str, Any]]) -> Response:
    """Returns the result of `work` as a JSON body; closes the group, also when the route cancels the call."""
    try:
        return JSONResponse(await work)
    finally:
        group.close()


def sse_response(
    events: AsyncIterator[tuple[str | None, dict[str, Any]]],
    group: RequestGroup,
    path: str,
    keepalive_s: float,
    done: str | None = None,
) -> EventSourceResponse:
    """Returns a stream of server-sent events. An error in the stream is sent as an event.

    Args:
        events: name (or None) and JSON value of each event.
        group: the requests that are answered; closed when the stream ends.
        path: path of the route, which determines the format of an error.
        keepalive_s: seconds between comments that are sent while there is no event.
        done: data of the final event, which also follows an error; None: there is none.
    """

    async def stream() -> AsyncIterator[ServerSentEvent]:
        """Yields the events, an error as the last one; the status 200 has been sent, so an error cannot change it."""
        try:
            async for name, value in events:
                yield ServerSentEvent(data=dumps(value), event=name, sep="\n")
        except Exception as error:
            api_error = _to_logged_api_error(error)
            yield ServerSentEvent(
                data=dumps(error_body(path, api_error.status, api_error.message, api_error.code)),
                event="error" if path.startswith("/v1/messages") else None,
                sep="\n",
            )
        finally:
            group.close()
        if done:
            yield ServerSentEvent(data=done, sep="\n")

    return EventSourceResponse(
        stream(),
        ping=keepalive_s,
        sep="\n",
        ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
        send_timeout=SEND_TIMEOUT_S,
        shutdown_grace_period=8,
    )


def ndjson_response(events: AsyncIterator[dict[str, Any]], group: RequestGroup) -> StreamingResponse:
    """Returns a stream of JSON objects, one per line. An error in the stream is sent as a line."""

    async def stream() -> AsyncIterator[str]:
        """Yields the lines; the status 200 has been sent, so an error can only be a line."""
        try:
            async for chunk in events:
                yield dumps(chunk) + "\n"
        except Exception as error:
            yield dumps({"error": _to_logged_api_error(error).message}) + "\n"
        finally:
            group.close()

    return StreamingResponse(stream(), media_type="application/x-ndjson")


def _to_logged_api_error(error: Exception) -> APIError:
    """Converts an error in a stream; logs it if it is not a client's."""
    api_error = to_api_error(error)
    if api_error.status >= 500 and not isinstance(error, APIError):
        log.error("a stream failed", exc_info=error)
    return api_error


def usage_so_far(group: RequestGroup, index: int, num_tokens: int) -> dict[str, int]:
    """Returns the usage of one choice of a stream after `num_tokens` tokens of output."""
    num_prompt_tokens = len(group.requests[index].prompt)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def raise_for_finish(finished: Finished) -> None:
    """Raises APIError if a request failed or was cancelled."""
    if finished.reason == "error":
        raise APIError(400 if finished.client_error else 500, finished.error or "the request failed")
    if finished.reason == "cancelled":
        raise APIError(503, "the server is shutting down; the answer is incomplete", retry=5)
