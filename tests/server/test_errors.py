"""What an error of the engine's becomes in each protocol: its class decides, its words do not."""

from __future__ import annotations

import httpx
import pytest

from ktx.engine.sampler import SamplingParams
from ktx.errors import ContextExceeded, KtxError, Overloaded, QueueFull, UsageError
from ktx.server.errors import to_api_error
from tests.server.conftest import NAME, scripted, serving

HELLO = [{"role": "user", "content": "greet"}]
ROUTES = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "greet"},
    "/v1/responses": {"input": "greet"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 9},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "greet"},
}
ERRORS = [  # error, status, OpenAI's code and type, Anthropic's type, Retry-After
    (QueueFull("voll"), 429, "queue_full", "rate_limit_error", "rate_limit_error", "1"),
    (Overloaded("weg; try again later"), 503, None, "unavailable_error", "overloaded_error", "1"),
    (ContextExceeded("zu lang"), 400, "context_length_exceeded", *["invalid_request_error"] * 2, None),
    (UsageError("the context holds nothing; try again later"), 400, None, *["invalid_request_error"] * 2, None),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(scripted(tmp_path_factory)) as (base, served):
        yield base, served


@pytest.mark.parametrize("error,status,code,openai,anthropic,retry", ERRORS)
@pytest.mark.parametrize("path", ROUTES)
def test_an_error_in_every_protocol(served, monkeypatch, path, error, status, code, openai, anthropic, retry):
    base, server = served

    def submit(*args):
        raise error

    monkeypatch.setattr(server.engine, "submit", submit)
    for stream in (False, True):
        answer = httpx.post(base + path, json={"model": NAME, "stream": stream, **ROUTES[path]}, timeout=30)
        assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry)
        told = answer.json()["error"]
        if path.startswith("/api/"):
            assert told == str(error)
        elif path == "/v1/messages":
            assert (told["message"], told["type"]) == (str(error), anthropic)
        else:
            assert (told["message"], told["code"], told["type"]) == (str(error), code, openai)


def test_the_engines_own_errors(served):
    base, server = served
    with pytest.raises(ContextExceeded):
        server.engine.check_request([1] * (server.engine.context + 1), SamplingParams())
    long = {"model": NAME, "messages": [{"role": "user", "content": "x" * 40_000}]}
    told = httpx.post(f"{base}/v1/chat/completions", json=long, timeout=60)
    assert (told.status_code, told.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert httpx.post(f"{base}/v1/messages", json={**long, "max_tokens": 9}, timeout=60).status_code == 400


def test_an_error_of_a_class_of_its_own():
    class Odd(KtxError):
        pass

    class Later(QueueFull):
        code, retry = "later", 9

    assert to_api_error(Odd("x")).status == 500 and "Odd" in to_api_error(Odd("x")).message
    told = to_api_error(Later("x"))
    assert (told.status, told.code, told.retry) == (429, "later", 9)


@pytest.mark.parametrize("error,status,code", [(QueueFull("x"), 429, "queue_full"), (Overloaded("x"), 503, None)])
def test_a_replicas_front_says_the_same(error, status, code):
    pytest.importorskip("ray")
    from ktx.replicas.proxy import error_response

    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
        answer = error_response({"path": path}, error)
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "1")
        if path == "/v1/chat/completions":
            assert f'"code": "{code}"'.replace('"None"', "null") in answer.body.decode()
