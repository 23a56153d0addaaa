"""Keys, hosts, origins, sizes: what is refused before a route sees it."""

from __future__ import annotations

import socket

import httpx
import pytest

from ktx.server.guard import Access, structure
from tests.server.conftest import NAME, scripted, serving

BODY = {"model": NAME, "messages": [{"role": "user", "content": "greet"}]}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    with serving(
        scripted(tmp_path_factory), Access(("first-key", "second-key"), origins=("https://chat.example",))
    ) as (base, _):
        with httpx.Client(base_url=base, timeout=30) as client:
            yield client


def routes(client):
    spec = client.get("/openapi.json", headers={"authorization": "Bearer first-key"}).json()
    return [
        (method.upper(), path.replace("{name}", NAME)) for path, methods in spec["paths"].items() for method in methods
    ]


def test_every_route_but_health_needs_a_key(keyed):
    found = routes(keyed)
    assert len(found) > 15
    for method, path in [
        *found,
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("POST", "//v1/models"),
        ("GET", "/health/../metrics"),
    ]:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first-key"},
            {"x-api-key": "first-ke"},
        ):
            answer = keyed.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
            assert answer.status_code == (200 if path == "/health" else 401), (method, path, headers, answer.text)
    assert "first-key" not in keyed.get("/v1/models").text


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer second-key"}, {"authorization": "bearer  first-key"}, {"x-api-key": "first-key"}],
)
def test_a_key_lets_in(keyed, headers):
    assert keyed.get("/v1/models", headers=headers).status_code == 200
    assert keyed.get("/metrics", headers=headers | {"host": "anything.example"}).status_code == 200


def test_only_listed_pages_may_ask(keyed):
    key = {"authorization": "Bearer first-key"}
    good = keyed.post("/v1/chat/completions", json=BODY, headers=key | {"origin": "https://chat.example"})
    assert good.status_code == 200 and good.headers["access-control-allow-origin"] == "https://chat.example"
    assert (
        keyed.post("/v1/chat/completions", json=BODY, headers=key | {"origin": "https://evil.example"}).status_code
        == 403
    )
    asked = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x-stainless-os",
    }
    preflight = keyed.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 204 and "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    assert keyed.options("/v1/chat/completions", headers=asked | {"origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "host,status",
    [
        ("localhost", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("192.168.7.7:10002", 200),
        ("evil.example", 403),
        ("localhost.evil.example:80", 403),
    ],
)
def test_without_keys_the_host_must_be_ours(http, host, status):
    assert http.get("/v1/models", headers={"host": host}).status_code == status


def test_without_keys_other_pages_may_not_ask(http, server):
    assert http.get("/v1/models", headers={"origin": "http://evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"origin": "null"}).status_code == 403
    assert http.get("/v1/models", headers={"origin": server}).status_code == 200


def test_bodies_have_a_bound(http):
    assert http.post("/v1/chat/completions", content=b"x" * (17 << 20)).status_code == 413
    assert http.post("/v1/chat/completions", content=(b"x" * 1000 for _ in range(17 << 10))).status_code == 413
    assert http.post("/tokenize", content=b'{"tokens": [' + b"1," * 600_000 + b"1]}").status_code == 413
    text = {"prompt": "a,b[{" * 300_000}
    assert http.post("/tokenize", json=text).status_code in (200, 400)  # commas of a text are none of the structure


def test_structure_counts_what_is_outside_strings():
    filler = b"," * 500_001
    assert structure(b'{"a": "' + filler + b'", "b\\"": [1, 2]}') == 4
    assert structure(b"[1, 2]") == 2


def test_headers_have_a_bound(http, server):
    assert http.get("/v1/models", headers={"x-long": "x" * 50_000}).status_code == 200
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 4")
    assert http.get("/health").json()["status"] == "ok"


def test_any_name_for_json_will_do(http):
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        assert (
            http.post(
                "/v1/chat/completions", content=__import__("json").dumps(BODY), headers={"content-type": kind}
            ).status_code
            == 200
        )


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /nothing HTTP/9.9\r\n\r\n",
    ],
)
def test_what_is_no_http_is_survived(http, server, raw):
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(raw)
        connection.settimeout(5)
        assert connection.recv(100)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 404", b"HTTP/1.1 505", b"")
    assert http.get("/health").status_code == 200
