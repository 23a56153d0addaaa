"""ASGI middleware in front of all routes: API keys, Host and Origin checks, body limits and the request id.

It works on the raw path. Only listed paths are public, and a request is rejected before its body is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktx.server import request_id
from ktx.server.errors import error_body
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

    def authenticate(self, headers: Mapping[bytes, bytes]) -> bool:
        """Returns whether Authorization or X-Api-Key holds a valid key; constant time against timing attacks."""
        sent = _sent_key(headers)
        matches = [hmac.compare_digest(sent, key.encode()) for key in self.keys]
        return any(matches)

    def owner(self, headers: Mapping[bytes, bytes]) -> bytes:
        """Returns a digest of the client's key; empty without keys."""
        return hashlib.sha256(_sent_key(headers)).digest() if self.keys else b""

    def host(self, header: bytes) -> bool:
        """Returns whether a Host header names this server. A DNS rebinding attack sends the attacker's host name."""
        name = header.decode("latin-1").strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
        return not name or name in self.local or name in self.hosts or _is_address(name)

    def origin(self, origin: bytes, host: bytes) -> bool:
        """Returns whether pages of an origin may send requests: those of this host and of listed origins."""
        name = origin.decode("latin-1").strip().rstrip("/")
        return "*" in self.origins or name in self.origins or name.partition("://")[2].encode("latin-1") == host.strip()


def owner_of(request: HTTPConnection) -> bytes:
    """Returns the digest of the key that a request was sent with; empty without keys."""
    return request.scope.get(OWNER_KEY, b"")


def _sent_key(headers: Mapping[bytes, bytes]) -> bytes:
    """Returns the key of a request: from Authorization, else from X-Api-Key."""
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _is_address(name: str) -> bool:
    """Whether a host name is an IP address, which no DNS rebinding attack can use."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Rejected(Exception):
    """The request is rejected before it reaches a route.

    Args:
        status: HTTP status.
        message: text for the user.
        code: machine-readable error code.
    """

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class AuthMiddleware:
    """The outermost ASGI application. It reads the whole body and passes it on as one message."""

    def __init__(self, app: ASGIApp, access: AccessPolicy):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authorizes a request, reads its body and calls the application; answers preflights and rejected requests
        itself.

        The application sees the request id and JSON as content type, whatever the client sent.
        """
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers: dict[bytes, bytes] = dict(scope["headers"])
        origin, request_name = headers.get(b"origin"), request_id.set_current(headers).encode()
        send = _add_headers(send, [(header, request_name) for header in request_id.RESPONSE_HEADERS])
        try:
            self._authorize(scope, headers)
            if scope["method"] == "OPTIONS" and origin:
                return await _answer_preflight(send, origin, headers)
            body = await _read_body(receive, headers) if scope["method"] in ("POST", "PUT", "PATCH", "DELETE") else b""
        except Rejected as error:
            extra = [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
            return await _send_error(send, scope, error, extra)
        replaced = [(request_id.CLIENT_HEADER, request_name)]
        if body:  # many clients send JSON with another content type, such as `curl -d`
            replaced.append((b"content-type", b"application/json"))
        scope = {
            **scope,
            "headers": [*_remove_headers(scope["headers"], dict(replaced)), *replaced],
            OWNER_KEY: self.access.owner(headers),
        }
        await self.app(scope, _replay(body, receive), _add_headers(send, _cors_headers(origin)) if origin else send)

    def _authorize(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Raises Rejected if the policy does not allow the request: 403 for its host or its page's origin, 401 for a
        missing key.
        """
        access, path, method = self.access, scope["path"], scope["method"]
        origin, host = headers.get(b"origin"), headers.get(b"host", b"")
        if not access.keys and not access.host(host):
            raise Rejected(
                403,
                f"the Host header is {host.decode('latin-1')!r}, which is not a name of this server; add it to"
                " --allowed_hosts",
            )
        if origin and origin != b"null" and not access.origin(origin, host):
            raise Rejected(
                403,
                f"pages of {origin.decode('latin-1')} may not send requests to this server; add the origin to"
                " --cors_origins",
            )
        if origin == b"null" and "*" not in access.origins:
            raise Rejected(403, "pages without an origin may not send requests to this server")
        if (
            access.keys
            and (method, path) not in PUBLIC_PATHS
            and not (method == "OPTIONS" and origin)
            and not access.authenticate(headers)
        ):
            raise Rejected(401, "an API key is required: send the header Authorization: Bearer KEY", "invalid_api_key")


def _remove_headers(headers: Iterable[tuple[bytes, bytes]], names: Container[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns the headers without those in `names`."""
    return [(name, value) for name, value in headers if name not in names]


async def _read_body(receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
    """Reads and returns the whole body.

    Raises:
        Rejected: the body is too large, arrives too slowly, is incomplete or has too many JSON values.
    """
    content_length = headers.get(b"content-length", b"0")
    if not content_length.isdigit() or int(content_length) > MAX_BODY_BYTES:
        await _drain(receive)
        raise Rejected(413, f"the body has more than {MAX_BODY_BYTES >> 20} MB")
    parts, num_bytes = [], 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), BODY_TIMEOUT_S)
        except TimeoutError:
            raise Rejected(408, f"no data of the body arrived for {BODY_TIMEOUT_S:.0f} seconds") from None
        if message["type"] == "http.disconnect":
            raise Rejected(400, "the connection was closed before the body was complete")
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > MAX_BODY_BYTES:
            await _drain(receive)
            raise Rejected(413, f"the body has more than {MAX_BODY_BYTES >> 20} MB")
        if not message.get("more_body"):
            break
    body = b"".join(parts)
    if count_json_values(body) > MAX_JSON_VALUES:
        raise Rejected(413, f"the body has more than {MAX_JSON_VALUES} JSON values")
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
    """Counts the commas and opening brackets outside the strings of a JSON body.

    At or below `MAX_JSON_VALUES` the result may be too high, because characters in strings are counted as well.
    """
    upper_bound = body.count(b",") + body.count(b"[") + body.count(b"{")
    if upper_bound <= MAX_JSON_VALUES:
        return upper_bound
    outside = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    return sum(part.count(b",") + part.count(b"[") + part.count(b"{") for part in outside)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a receive function that first returns the body as one message, then the connection's messages."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay


def _add_headers(send: Send, extra: list[tuple[bytes, bytes]]) -> Send:
    """Returns a send function that adds headers to the response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return send_with_headers


def _cors_headers(origin: bytes) -> list[tuple[bytes, bytes]]:
    """Returns the CORS headers of a response to an allowed origin."""
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", b", ".join((*request_id.RESPONSE_HEADERS, IGNORED_HEADER.encode()))),
        (b"vary", b"Origin"),
    ]


async def _answer_preflight(send: Send, origin: bytes, headers: Mapping[bytes, bytes]) -> None:
    """Answers a CORS preflight request, with which a browser asks whether a page may send the actual request."""
    headers_out = [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
        (
            b"access-control-allow-headers",
            headers.get(b"access-control-request-headers", b"authorization, content-type"),
        ),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Origin"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers_out})
    await send({"type": "http.response.body", "body": b""})


async def _send_error(send: Send, scope: Scope, error: Rejected, extra: list[tuple[bytes, bytes]]) -> None:
    """Sends an error response and closes the connection."""
    data = json.dumps(error_body(scope["path"], error.status, error.message, error.code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        (b"connection", b"close"),
        *extra,
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
