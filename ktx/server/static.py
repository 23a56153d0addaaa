"""The web page: static files that are read once and are public. The page gets its data from the other routes."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGE_DIR = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/favicon.ico": "icon.svg"} | {
    f"/page/{name}": name
    for name in (
        "api.js",
        "chat-stream.js",
        "chat.js",
        "dom.js",
        "format.js",
        "gauges.js",
        "heatmap.js",
        "icon.svg",
        "inline.js",
        "machine.css",
        "machine.js",
        "markdown.js",
        "message.js",
        "modules.js",
        "page.js",
        "settings.js",
        "sidebar.js",
        "store.js",
        "style.css",
        "theme.js",
        "toast.js",
    )
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # assigning a string to innerHTML raises an error
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # the browser revalidates every time and gets a 304
}


def make_routes() -> list[Route]:
    """Returns one route per file, for GET and HEAD."""
    return [Route(path, _make_handler(PAGE_DIR / name), methods=["GET"]) for path, name in FILES.items()]


def _make_handler(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """Reads a file and returns the handler that sends it, or a 304 if its ETag matches."""
    data = path.read_bytes()
    etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = HEADERS | {"etag": etag}

    async def send(request: Request) -> Response:
        """Sends the file; 304 without a body if the browser has this version of it."""
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=TYPES[path.suffix])

    return send
