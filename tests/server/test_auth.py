"""Keys, hosts, origins, sizes: what is refused before a route sees it."""

from __future__ import annotations

import io
import json
import logging
import socket

import httpx
import pytest

from ktx.server.auth import AccessPolicy, count_json_values
from ktx.server.log import LogFormatter
from ktx.server.output import OutputParser
from ktx.server.state import ServerSettings
from tests.server.conftest import NAME, scripted, serving

BODY = {"model": NAME, "messages": [{"role": "user", "content": "greet"}]}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    with (
        serving(
            scripted(tmp_path_factory), AccessPolicy(("first-key", "second-key"), origins=("https://chat.example",))
        ) as (base, _),
        httpx.Client(base_url=base, timeout=30) as client,
    ):
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
    assert {"x-request-id", "request-id"} <= {*good.headers["access-control-expose-headers"].split(", ")}


def test_a_listed_page_can_read_errors(keyed):
    refused = keyed.get("/v1/models", headers={"origin": "https://chat.example"})
    too_large = keyed.post(
        "/tokenize",
        content=b"x" * (17 << 20),
        headers={"origin": "https://chat.example", "x-api-key": "first-key"},
    )
    for answer, status in ((refused, 401), (too_large, 413)):
        assert answer.status_code == status and answer.headers["vary"] == "Origin"
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-origin" not in keyed.get("/health", headers={"origin": "https://evil.example"}).headers


def told_id(answer):
    """The id under both its names."""
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    assert len(answer.headers.get_list("x-request-id")) == 1
    return answer.headers["x-request-id"]


def test_every_answer_has_an_id_of_its_own(keyed):
    key = {"authorization": "Bearer first-key"}
    answers = [
        keyed.get("/v1/models"),
        keyed.get("/v1/models", headers=key),
        keyed.head("/health"),
        keyed.get("/nothing", headers=key),
        keyed.options("/v1/models", headers={"origin": "https://chat.example"}),
        keyed.get("/v1/models", headers=key | {"origin": "https://evil.example"}),
        keyed.post("/v1/chat/completions", content=b"x" * (17 << 20), headers=key),
        *(
            keyed.post("/v1/chat/completions", json=BODY | more, headers=key)
            for more in ({}, {"stream": True}, {"n": 0})
        ),
        keyed.post("/api/chat", json=BODY, headers=key),
    ]
    assert [answer.status_code for answer in answers] == [401, 200, 200, 404, 204, 403, 413, 200, 200, 400, 200]
    names = [told_id(answer) for answer in answers]
    assert len({*names}) == len(answers) and all(name.startswith("req_") for name in names)


def test_a_client_may_bring_an_id(http):
    for own in ("a", "Job-7.3_b", "x" * 128):
        assert told_id(http.get("/v1/models", headers={"x-request-id": own})) == own
    for other in ("", "x" * 129, "a b", "a,b", "<b>", "é".encode()):
        assert told_id(http.get("/v1/models", headers={"x-request-id": other})).startswith("req_")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropics_errors_repeat_the_id(keyed, path):
    for headers, status in (({}, 401), ({"x-api-key": "first-key"}, 400)):
        answer = keyed.post(path, json={"model": NAME}, headers=headers)
        assert answer.status_code == status and answer.json()["request_id"] == told_id(answer), answer.text


def test_lines_of_the_log_name_the_request(tmp_path_factory, monkeypatch):
    """Also those of the engine's thread, and those of what fails, with the event that tells of it."""
    heard, logger = io.StringIO(), logging.getLogger("ktx")
    handler = logging.StreamHandler(heard)
    handler.setFormatter(LogFormatter(True))
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    with (
        serving(scripted(tmp_path_factory), settings=ServerSettings(log_prompts=True)) as (base, _),
        httpx.Client(base_url=base, timeout=30) as http,
    ):
        assert http.post("/v1/messages", json=BODY | {"max_tokens": 9}, headers={"x-request-id": "good"}).is_success
        monkeypatch.setattr(OutputParser, "feed", lambda turn, event: [1 / 0])
        for stream, name in ((True, "streamed"), (False, "whole")):
            asked = BODY | {"max_tokens": 9, "stream": stream}
            answer = http.post("/v1/messages", json=asked, headers={"x-request-id": name})
            last = answer.text.strip().rpartition("data: ")[2]
            assert json.loads(last)["request_id"] == name and "ZeroDivisionError" in last
    said = {}
    for line in map(json.loads, heard.getvalue().splitlines()):
        said.setdefault(line["request_id"], set()).add(line["message"])
    assert said["good"] == {"asked", "answered"}
    assert "a stream failed" in said["streamed"] and "POST /v1/messages failed" in said["whole"]


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
    assert count_json_values(b'{"a": "' + filler + b'", "b\\"": [1, 2]}') == 4
    assert count_json_values(b"[1, 2]") == 2


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
