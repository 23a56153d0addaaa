"""ASGI middleware in front of all routes: API keys, Host and Origin checks, body limits and the request id.

It works on the raw path. Only listed paths are public, and a request is rejected before its body is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktx.server import request_id
from ktx.server.errors import APIError, error_body
from ktx.server.protocol.parameters import IGNORED_HEADER
from ktx.server.static import FILES

PUBLIC_PATHS = {(method, path) for method in ("GET", "HEAD") for path in ("/health", *FILES)}
OWNER_KEY = "ktx.owner"  # of the ASGI scope
MAX_BODY_BYTES = 16 << 20
MAX_DRAIN_BYTES, DRAIN_TIMEOUT_S = 64 << 20, 5.0  # limits for reading and discarding a body that is too large
BODY_TIMEOUT_S = 60.0  # until the next part of a body arrives
MAX_JSON_VALUES = 500_000  # brackets and commas outside strings; each value takes about 100 bytes in Python


@dataclass(frozen=True)
class AccessPolicy:
    """Who may send requests.

    Without keys everyone who can reach the port may, if the Host header names this server (against DNS rebinding).
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # allowed in Host in addition to localhost and IP addresses; checked without keys only
    origins: tuple[str, ...] = ()  # of web pages that may send requests; "*": all
    local: frozenset[str] = field(default=frozenset({"localhost", "127.0.0.1", "::1"}))

    def authenticate(self, headers: Headers) -> bool:
        """Returns whether Authorization or X-Api-Key holds a valid key; constant time against timing attacks."""
        sent = _sent_key(headers)
        matches = [hmac.compare_digest(sent, key.encode()) for key in self.keys]
        return any(matches)

    def owner(self, headers: Headers) -> bytes:
        """Returns a digest of the client's key; empty without keys."""
        return hashlib.sha256(_sent_key(headers)).digest() if self.keys else b""

    def is_allowed_host(self, header: str) -> bool:
        """Returns whether a Host header names this server. A DNS rebinding attack sends the attacker's host name."""
        name = header.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
        return not name or name in self.local or name in self.hosts or _is_address(name)

    def is_allowed_origin(self, origin: str, host: str) -> bool:
        """Returns whether pages of an origin may send requests: those of this host and of listed origins."""
        name = origin.strip().rstrip("/")
        return "*" in self.origins or name in self.origins or name.partition("://")[2] == host.strip()


def owner_of(request: HTTPConnection) -> bytes:
    """Returns the digest of the key that a request was sent with; empty without keys."""
    return request.scope.get(OWNER_KEY, b"")


def _sent_key(headers: Headers) -> bytes:
    """Returns the key of a request: from Authorization, else from X-Api-Key."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return key.encode("latin-1")


def _is_address(name: str) -> bool:
    """Whether a host name is an IP address, which no DNS rebinding attack can use."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _CORS(CORSMiddleware):
    """Adds the CORS headers of a response and answers preflights.

    It allows every origin, because `AuthMiddleware` has rejected the others: which ones those are depends on the Host
    header too, which Starlette's own check does not read.
    """

    def __init__(self, app: ASGIApp):
        super().__init__(
            app,
            allow_origin_regex=".*",
            allow_methods=("GET", "POST", "DELETE", "OPTIONS"),
            allow_headers=("*",),
            expose_headers=(*request_id.RESPONSE_HEADERS, IGNORED_HEADER),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Returns Starlette's response as a 204 without a body; a browser reads the headers only."""
        response = super().preflight_response(request_headers)
        response.status_code, response.body = 204, b""
        del response.headers["content-length"], response.headers["content-type"]
        return response


class AuthMiddleware:
    """The outermost ASGI application. It reads the whole body and passes it on as one message."""

    def __init__(self, app: ASGIApp, access: AccessPolicy):
        self.app, self.access, self.cors = app, access, _CORS(self._respond)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Gives a request its id, rejects it for its host or its page's origin, and answers preflights.

        An OPTIONS request of a page is a preflight, also without Access-Control-Request-Method.
        """
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})  # policy violation: no websockets
        scope = dict(scope)
        headers = MutableHeaders(scope=scope)
        headers[request_id.CLIENT_HEADER] = current_id = request_id.set_current(headers)
        send = _add_headers(send, dict.fromkeys(request_id.RESPONSE_HEADERS, current_id))
        try:
            self._check_host_and_origin(headers)
        except APIError as error:
            return await _error_response(scope, error)(scope, receive, send)
        if scope["method"] == "OPTIONS" and "origin" in headers:
            headers.setdefault("access-control-request-method", "OPTIONS")
        await self.cors(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticates a request, reads its body and calls the application.

        The application sees JSON as content type, whatever the client sent.
        """
        headers, method = MutableHeaders(scope=scope), scope["method"]
        try:
            if (
                self.access.keys
                and (method, scope["path"]) not in PUBLIC_PATHS
                and not self.access.authenticate(headers)
            ):
                message = "an API key is required: send the header Authorization: Bearer KEY"
                raise APIError(401, message, code="invalid_api_key")
            body = await _read_body(receive, headers) if method in ("POST", "PUT", "PATCH", "DELETE") else b""
        except APIError as error:
            return await _error_response(scope, error)(scope, receive, send)
        if body:  # many clients send JSON with another content type, such as `curl -d`
            headers["content-type"] = "application/json"
        await self.app({**scope, OWNER_KEY: self.access.owner(headers)}, _replay(body, receive), send)

    def _check_host_and_origin(self, headers: Headers) -> None:
        """Raises APIError (403) if the policy does not allow the request's host or its page's origin.

        Starlette's TrustedHostMiddleware cannot replace the check of the host: its list has no form for every IP
        address, and its error is plain text.
        """
        origin, host = headers.get("origin"), headers.get("host", "")
        if not self.access.keys and not self.access.is_allowed_host(host):
            raise APIError(
                403, f"the Host header is {host!r}, which is not a name of this server; add it to --allowed_hosts"
            )
        if origin == "null" and "*" not in self.access.origins:
            raise APIError(403, "pages without an origin may not send requests to this server")
        if origin and origin != "null" and not self.access.is_allowed_origin(origin, host):
            raise APIError(
                403, f"pages of {origin} may not send requests to this server; add the origin to --cors_origins"
            )


async def _read_body(receive: Receive, headers: Headers) -> bytes:
    """Reads and returns the whole body.

    Raises:
        APIError: the body is too large, arrives too slowly, is incomplete or has too many JSON values.
    """
    content_length = headers.get("content-length", "0")
    if not content_length.isdecimal() or int(content_length) > MAX_BODY_BYTES:
        await _drain(receive)
        raise APIError(413, f"the body has more than {MAX_BODY_BYTES >> 20} MB")
    parts, num_bytes = [], 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), BODY_TIMEOUT_S)
        except TimeoutError:
            raise APIError(408, f"no data of the body arrived for {BODY_TIMEOUT_S:.0f} seconds") from None
        if message["type"] == "http.disconnect":
            raise APIError(400, "the connection was closed before the body was complete")
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > MAX_BODY_BYTES:
            await _drain(receive)
            raise APIError(413, f"the body has more than {MAX_BODY_BYTES >> 20} MB")
        if not message.get("more_body"):
            break
    body = b"".join(parts)
    if count_json_values(body) > MAX_JSON_VALUES:
        raise APIError(413, f"the body has more than {MAX_JSON_VALUES} JSON values")
    return body


async def _drain(receive: Receive) -> None:
    """Reads and discards a body for a few seconds, because a client that is still sending would not read the error."""
    remaining_bytes = MAX_DRAIN_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            while (
                remaining_bytes > 0
                and (message := await receive())["type"] == "http.request"
                and message.get("more_body")
            ):
                remaining_bytes -= len(message.get("body", b""))


def count_json_values(body: bytes) -> int:
    """Counts the commas and opening brackets outside the strings of a JSON body, before it is parsed: a small body with
    many values would take much memory.

    At or below `MAX_JSON_VALUES` the result may be too high, because characters in strings are counted as well.
    """
    upper_bound = body.count(b",") + body.count(b"[") + body.count(b"{")
    if upper_bound <= MAX_JSON_VALUES:
        return upper_bound
    # without escaped quotes, every second part between quotes is outside of strings
    outside = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    return sum(part.count(b",") + part.count(b"[") + part.count(b"{") for part in outside)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a receive function that first returns the body, which was read to check it, as one message, then the
    connection's messages, which report a disconnect.
    """
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay


def _add_headers(send: Send, extra: Mapping[str, str]) -> Send:
    """Returns a send function that adds headers to the response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(extra)
        await send(message)

    return send_with_headers


def _error_response(scope: Scope, error: APIError) -> JSONResponse:
    """Returns an error in the format of the path's protocol; it closes the connection."""
    body = error_body(scope["path"], error.status, error.message, error.code)
    authenticate = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    return JSONResponse(body, error.status, {"connection": "close", **authenticate})
