"""What stands before every route: keys, hosts, origins, the size of what is read, and an id. Plain ASGI, on the raw path.

Nothing is open that is not listed. A request is refused before its body is read.
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
from ktx.server.protocol.parameters import HEADER
from ktx.server.static import FILES

PUBLIC_PATHS = {(method, path) for method in ("GET", "HEAD") for path in ("/health", *FILES)}
OWNER = "ktx.owner"  # in a request's scope
MAX_BODY_BYTES = 16 << 20
DRAINED, DRAINING = 64 << 20, 5.0  # bytes and seconds of a body that is too large and is read all the same
BODY_TIMEOUT_S = 60.0  # seconds without a byte of a body that was announced
MAX_JSON_VALUES = 500_000  # brackets and commas of a body outside its strings: each costs Python a hundred bytes


@dataclass(frozen=True)
class AccessPolicy:
    """Who may ask. Without keys everybody who reaches the port may, as long as the Host header says that they meant this server."""

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # names besides localhost and addresses, which Host may say where there are no keys
    origins: tuple[str, ...] = ()  # of web pages that may ask; "*" is all
    local: frozenset[str] = field(default=frozenset({"localhost", "127.0.0.1", "::1"}))

    def authenticate(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a key of ours is in Authorization or X-Api-Key. Takes as long for a wrong key as for a right one."""
        given = _key(headers)
        right = [hmac.compare_digest(given, key.encode()) for key in self.keys]
        return any(right)

    def owner(self, headers: Mapping[bytes, bytes]) -> bytes:
        """Who asks, of those that are let in."""
        return hashlib.sha256(_key(headers)).digest() if self.keys else b""

    def host(self, header: bytes) -> bool:
        """Whether a Host header names this server: DNS rebinding sends a name of somebody else's."""
        name = header.decode("latin-1").strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
        return not name or name in self.local or name in self.hosts or _is_address(name)

    def origin(self, origin: bytes, host: bytes) -> bool:
        """Whether a page of this origin may ask: its own host's, or a listed one."""
        said = origin.decode("latin-1").strip().rstrip("/")
        return "*" in self.origins or said in self.origins or said.partition("://")[2].encode("latin-1") == host.strip()


def owner_of(request: HTTPConnection) -> bytes:
    """Whose key a request came with, as a digest; empty where there are no keys."""
    return request.scope.get(OWNER, b"")


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Rejected(Exception):
    """A request that no route shall see."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class AuthMiddleware:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, access: AccessPolicy):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers: dict[bytes, bytes] = dict(scope["headers"])
        origin, name = headers.get(b"origin"), request_id.set_current(headers).encode()
        send = _with(send, [(header, name) for header in request_id.RESPONSE_HEADERS])
        try:
            self._authorize(scope, headers)
            if scope["method"] == "OPTIONS" and origin:
                return await _preflight(send, origin, headers)
            body = await _body(receive, headers) if scope["method"] in ("POST", "PUT", "PATCH", "DELETE") else b""
        except Rejected as refused:
            more = [(b"www-authenticate", b"Bearer")] if refused.status == 401 else []
            return await _answer(send, scope, refused, more)
        known = [(request_id.CLIENT_HEADER, name)]
        if body:  # many clients send JSON under another name, curl -d among them
            known.append((b"content-type", b"application/json"))
        scope = {
            **scope,
            "headers": [*_without(scope["headers"], dict(known)), *known],
            OWNER: self.access.owner(headers),
        }
        await self.app(scope, _replay(body, receive), _with(send, _allowing(origin)) if origin else send)

    def _authorize(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        access, path, method = self.access, scope["path"], scope["method"]
        origin, host = headers.get(b"origin"), headers.get(b"host", b"")
        if not access.keys and not access.host(host):
            raise Rejected(
                403,
                f"the Host header says {host.decode('latin-1')!r}; --allowed_hosts lists the names this server goes by",
            )
        if origin and origin != b"null" and not access.origin(origin, host):
            raise Rejected(
                403, f"pages of {origin.decode('latin-1')} may not ask this server; --cors_origins lists those that may"
            )
        if origin == b"null" and "*" not in access.origins:
            raise Rejected(403, "pages without an origin may not ask this server")
        if (
            access.keys
            and (method, path) not in PUBLIC_PATHS
            and not (method == "OPTIONS" and origin)
            and not access.authenticate(headers)
        ):
            raise Rejected(401, "a key is needed: send Authorization: Bearer KEY", "invalid_api_key")


def _without(headers: Iterable[tuple[bytes, bytes]], names: Container[bytes]) -> list[tuple[bytes, bytes]]:
    return [(key, value) for key, value in headers if key not in names]


async def _body(receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
    """The whole body. Refused when it is too large, comes too slowly or not at all, or would take too much to read."""
    announced = headers.get(b"content-length", b"0")
    if not announced.isdigit() or int(announced) > MAX_BODY_BYTES:
        await _drain(receive)
        raise Rejected(413, f"the body has more than {MAX_BODY_BYTES >> 20} MB")
    parts, size = [], 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), BODY_TIMEOUT_S)
        except TimeoutError:
            raise Rejected(408, f"nothing of the body came for {BODY_TIMEOUT_S:.0f} seconds") from None
        if message["type"] == "http.disconnect":
            raise Rejected(400, "the connection ended inside the body")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            await _drain(receive)
            raise Rejected(413, f"the body has more than {MAX_BODY_BYTES >> 20} MB")
        if not message.get("more_body"):
            break
    body = b"".join(parts)
    if count_json_values(body) > MAX_JSON_VALUES:
        raise Rejected(413, f"the body has more than {MAX_JSON_VALUES} values")
    return body


async def _drain(receive: Receive) -> None:
    """Reads on for a moment: a client that is still sending would not see the answer."""
    left = DRAINED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAINING):
            while left > 0 and (message := await receive())["type"] == "http.request" and message.get("more_body"):
                left -= len(message.get("body", b""))


def count_json_values(body: bytes) -> int:
    """Commas and opening brackets of JSON outside its strings, at least as many as it has; exact where it matters."""
    upper = body.count(b",") + body.count(b"[") + body.count(b"{")
    if upper <= MAX_JSON_VALUES:
        return upper
    outside = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    return sum(part.count(b",") + part.count(b"[") + part.count(b"{") for part in outside)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read as the one message it is now, then whatever the connection says."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


def _with(send: Send, more: list[tuple[bytes, bytes]]) -> Send:
    """Sends more headers with the answer."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return told


def _allowing(origin: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", b", ".join((*request_id.RESPONSE_HEADERS, HEADER.encode()))),
        (b"vary", b"Origin"),
    ]


async def _preflight(send: Send, origin: bytes, headers: Mapping[bytes, bytes]) -> None:
    more = [
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
    await send({"type": "http.response.start", "status": 204, "headers": more})
    await send({"type": "http.response.body", "body": b""})


async def _answer(send: Send, scope: Scope, refused: Rejected, more: list[tuple[bytes, bytes]]) -> None:
    data = json.dumps(error_body(scope["path"], refused.status, refused.message, refused.code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        (b"connection", b"close"),
        *more,
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
