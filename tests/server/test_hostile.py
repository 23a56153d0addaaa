"""The server is not stopped, hung or fooled by any request.

Requests with wrong values for every field, hostile schemas, what schemathesis makes of our own description, and noise.
"""

from __future__ import annotations

import json
import os
import random
import time

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from ktx.server import protocol
from tests.server.conftest import NAME

GOOD = {
    "/v1/chat/completions": (
        protocol.ChatCompletionRequest,
        {"model": NAME, "messages": [{"role": "user", "content": "greet"}], "max_tokens": 4},
    ),
    "/v1/completions": (protocol.CompletionRequest, {"model": NAME, "prompt": "greet", "max_tokens": 4}),
    "/v1/responses": (protocol.ResponsesRequest, {"model": NAME, "input": "greet", "max_output_tokens": 4}),
    "/v1/responses?items": (
        protocol.ResponsesRequest,
        {
            "model": NAME,
            "max_output_tokens": 4,
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}], "content": []},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "greet"},
            ],
        },
    ),
    "/v1/responses/input_tokens": (protocol.ResponseTokensRequest, {"model": NAME, "input": "greet"}),
    "/v1/messages": (
        protocol.MessagesRequest,
        {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": "greet"}]},
    ),
    "/v1/messages/count_tokens": (
        protocol.CountTokensRequest,
        {"model": NAME, "messages": [{"role": "user", "content": "greet"}]},
    ),
    "/api/chat": (
        protocol.OllamaChat,
        {"model": NAME, "messages": [{"role": "user", "content": "greet"}], "options": {"num_predict": 4}},
    ),
    "/api/generate": (protocol.OllamaGenerate, {"model": NAME, "prompt": "greet", "options": {"num_predict": 4}}),
    "/api/show": (protocol.OllamaShow, {"model": NAME}),
    "/tokenize": (protocol.TokenizeRequest, {"prompt": "greet"}),
    "/detokenize": (protocol.DetokenizeRequest, {"tokens": [9, 10]}),
}
NOISE = int(os.environ.get("NOISE", "5000"))
WRONG = [
    "",
    "x",
    "\x00",
    "🙂" * 300,
    -1,
    0,
    1 << 40,
    1 << 70,
    -1.5,
    1e308,
    True,
    [],
    [[]],
    [None],
    ["x"] * 40,
    [{}],
    {},
    {"type": "x"},
    {"a": {"b": {}}},
    {"": ""},
]


def nested(depth, schema=None):
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema or {}}, "required": ["a"]}
    return schema


HOSTILE_SCHEMAS = {
    "nested": nested(300),
    "deep": nested(60),
    "enum": {"enum": [f"value {i}" for i in range(50_000)]},
    "properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1999)}},
    "too many properties": {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}},
    "remote": {"$ref": "http://127.0.0.1:1/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "circle": {"$ref": "#"},
    "recursion": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "tree": {
        "$defs": {"t": {"type": "object", "properties": {"l": {"$ref": "#/$defs/t"}, "r": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    },
    "pattern": {"type": "string", "pattern": "^(a+)+$" * 200},
    "lookahead": {"type": "string", "pattern": "(?=a)b"},
    "bound": {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
    "length": {"type": "string", "minLength": 1 << 30},
    "items": {"type": "array", "minItems": 1 << 30},
    "anyOf": {
        "anyOf": [{"anyOf": [{"anyOf": [{"const": i * j * k} for i in range(9)]} for j in range(9)]} for k in range(9)]
    },
    "allOf": {"allOf": [{"type": "object", "properties": {f"a{i}": {"type": "integer"}}} for i in range(300)]},
    "nothing": {"not": {}},
    "number": {"type": "number", "multipleOf": 1e-300, "minimum": 1e300, "maximum": -1e300},
    "no schema": {"type": 7, "properties": 3, "required": "x"},
}
GRAMMARS = [
    "(" * 60_000,
    "start: start start | ",
    "start: " + "( " * 5000,
    "start: /(a*)*(b*)*c{1,9999}/",
    "%llguidance {}\nstart: %json {",
    "start: a\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(5000)),
    "\x00",
    'start: "a"{1,1000000000}',
]


def asked(http, path, body):
    """Its status; an assertion unless it is an answer or the client's fault, within ten seconds."""
    start = time.monotonic()
    answer = http.post(path, content=body) if isinstance(body, bytes) else http.post(path, json=body)
    assert answer.status_code < 500, (path, str(body)[:300], answer.text[:300])
    assert time.monotonic() - start < 10, (path, str(body)[:300])
    return answer.status_code


def still_well(http):
    assert http.get("/health").status_code == 200
    made = http.post("/v1/completions", json={"model": NAME, "prompt": "greet", "max_tokens": 40}).json()
    assert made["choices"][0]["text"] == "Good day, to you!"


@pytest.mark.wall_clock
@pytest.mark.parametrize("path", GOOD)
def test_wrong_values_for_every_field(http, path):
    """A thousand requests in all."""
    kind, good = GOOD[path]
    assert asked(http, path, good) == 200
    refused = 0
    for name, known in kind.model_fields.items():
        for wrong in WRONG:
            refused += asked(http, path, good | {known.alias or name: wrong}) != 200
    assert refused > 5 * len(kind.model_fields)
    still_well(http)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_no_json_can_say(http, number):
    """They would be told back, in the tools of an answer or the items of a conversation, and cannot be."""
    tool = {"type": "function", "name": "f", "parameters": {"maximum": "NUMBER"}}
    for more in (
        {"tools": [tool]},
        {"input": [{"role": "user", "content": "greet", "x": "NUMBER"}]},
        {"temperature": "NUMBER"},
    ):
        body = json.dumps({"model": NAME, "input": "greet"} | more).replace('"NUMBER"', number)
        answer = http.post("/v1/responses", content=body)
        assert answer.status_code == 400 and "not valid JSON" in answer.json()["error"]["message"]
    still_well(http)


@pytest.mark.wall_clock
@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
@pytest.mark.parametrize("place", ["format", "tool", "guided"])
def test_hostile_schemas(http, name, place):
    schema = HOSTILE_SCHEMAS[name]
    body = {"model": NAME, "messages": [{"role": "user", "content": "greet"}], "max_tokens": 4}
    if place == "format":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    elif place == "guided":
        body["guided_json"] = schema
    else:
        body |= {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
            "tool_choice": "required",
        }
    start = time.monotonic()
    asked(http, "/v1/chat/completions", body)
    assert time.monotonic() - start < 5  # two seconds for the grammar, the rest for a busy machine
    still_well(http)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_grammar_goes_beyond_the_parser_is_refused(http, stream):
    body = {"model": NAME, "messages": [{"role": "user", "content": "greet"}], "stream": stream}
    answer = http.post("/v1/chat/completions", json=body | {"guided_regex": "(?:a?){500}a{500}"})
    assert answer.status_code == (200 if stream else 400)  # a stream has begun
    told = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    error = (told[-1] if stream else answer.json())["error"]
    assert error["type"] == "invalid_request_error" and "cannot be followed any further" in error["message"]
    still_well(http)


@pytest.mark.wall_clock
@pytest.mark.parametrize("grammar", GRAMMARS, ids=range(len(GRAMMARS)))
def test_hostile_grammars(http, grammar):
    for name in ("guided_grammar", "guided_regex"):
        start = time.monotonic()
        asked(
            http,
            "/v1/chat/completions",
            {"model": NAME, "messages": [{"role": "user", "content": "greet"}], "max_tokens": 4, name: grammar},
        )
        assert time.monotonic() - start < 5
    still_well(http)


def test_hostile_messages(http):
    path, (_, good) = "/v1/chat/completions", GOOD["/v1/chat/completions"]
    texts = [
        "<|end|>" * 5000,
        "\u202e\ufdd0\ufdd1",
        "{{ 7 * 7 }}{% for i in range(10**9) %}{% endfor %}",
        "a" * 100_000,
        "\x00" * 1000,
        "<think>" * 3000,
    ]
    for text in texts:
        for role in ("user", "system", "assistant", "tool", "developer"):
            asked(
                http,
                path,
                good
                | {
                    "messages": [{"role": role, "content": text, "tool_call_id": "x"}, {"role": "user", "content": "x"}]
                },
            )
    asked(http, path, good | {"messages": [{"role": "user", "content": "x"}] * 10_001})
    asked(
        http,
        path,
        good
        | {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "x", "function": {"name": "<|end|>", "arguments": "{" * 500}}],
                }
            ]
            * 200
            + [{"role": "user", "content": "x"}]
        },
    )
    still_well(http)


ITEMS = (
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "greet"}], "id": "msg_1"},
    {"role": "assistant", "content": "greet", "status": "completed", "phase": None},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}], "content": [{"type": "x"}]},
    {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
    {"type": "item_reference", "id": "msg_1"},
)


@pytest.mark.wall_clock
@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.get("type", "assistant"))
def test_items_of_a_conversation(http, item):
    """Each field of each kind of item with each wrong value, and what is then kept of it is shown and gone on from."""
    kept = 0
    for name in item:
        for wrong in [*WRONG, None, item]:
            body = {
                "model": NAME,
                "input": [item | {name: wrong}, {"role": "user", "content": "greet"}],
                "max_output_tokens": 2,
            }
            answer = http.post("/v1/responses", json=body)
            assert answer.status_code in (200, 400), (body, answer.text)
            if answer.status_code == 200:
                kept += 1
                id = answer.json()["id"]
                assert http.get(f"/v1/responses/{id}/input_items").status_code == 200
                more = {"previous_response_id": id, "input": "greet"}
                assert http.post("/v1/responses", json=body | more).status_code == 200
    assert kept or item["type"] == "item_reference"
    still_well(http)


def test_requests_of_noise(http):
    """The server survives five thousand requests of noise, or as many as NOISE says, and its memory stays.

    They are good requests with parts exchanged, doubled, dropped and bytes flipped.
    """
    source = random.Random(7)
    pool = [
        *WRONG,
        None,
        "auto",
        "required",
        "json_object",
        {"type": "json_object"},
        [{"role": "user", "content": "x"}],
        NAME,
        True,
        1,
    ]

    def mutated(value, depth=0):
        if source.random() < 0.08 or depth > 6:
            return source.choice(pool)
        if isinstance(value, dict):
            items = [
                (key if source.random() > 0.03 else source.choice(["", "x", "model"]), mutated(inner, depth + 1))
                for key, inner in value.items()
                if source.random() > 0.04
            ]
            return dict(items)
        if isinstance(value, list):
            return [mutated(inner, depth + 1) for inner in value] * source.choice([1, 1, 1, 1, 0, 3])
        return value

    paths = list(GOOD)
    process, before, statuses = psutil.Process(), 0, {}
    for number in range(NOISE):
        path = source.choice(paths)
        kind, good = GOOD[path]
        extra = {
            source.choice(list(kind.model_fields)): source.choice(pool) for _ in range(source.choice([0, 0, 1, 2]))
        }
        raw = json.dumps(mutated(good | extra)).encode()
        if source.random() < 0.3:
            flips = bytearray(raw)
            for _ in range(source.choice([1, 2, 8])):
                flips[source.randrange(len(flips))] = source.randrange(256)
            raw = bytes(flips)
        status = asked(http, path, raw)
        statuses[status] = statuses.get(status, 0) + 1
        if number == 2000:
            before = process.memory_info().rss
    assert statuses[200] > NOISE // 20 and statuses[400] > NOISE // 20
    assert process.memory_info().rss - before < 256 << 20
    still_well(http)


def test_our_own_description(server):
    """What schemathesis makes of /openapi.json brings no failure of the server's."""
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    statuses = set()

    for operation in schema.get_all_operations():
        made = operation.ok().as_strategy()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=made)
        def check(case):
            answer = case.call(timeout=20)
            statuses.add(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 501, answer.text

        check()
    assert 200 in statuses
    httpx.get(f"{server}/health").raise_for_status()
