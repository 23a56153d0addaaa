"""The server answers, or names the client's fault, for each wrong value in each place of a request.

The requests use much of what there is; each place gets each value that does not belong there.
"""

from __future__ import annotations

import random

import pytest

from tests.server.conftest import NAME
from tests.server.test_hostile import NOISE, WRONG, asked, still_well

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "enum": ["x"]},
        "b": {"anyOf": [{"type": "integer", "minimum": 1}, {"$ref": "#/$defs/c"}]},
        "l": {"type": "array", "items": {"type": "string", "pattern": "a+"}, "maxItems": 3},
    },
    "$defs": {"c": {"const": 1}},
    "required": ["a"],
    "additionalProperties": False,
}
FN = {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
RICH = {
    "/v1/chat/completions": [
        {
            "model": NAME,
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "greet"}], "name": "n"},
                {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "x"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]},
                {"role": "user", "content": "greet"},
            ],
            "tools": [{"type": "function", "function": FN}],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "max_tokens": 2,
            "stop": ["zz"],
            "logit_bias": {"5": 1.0},
            "stream_options": {"include_usage": True},
            "stream": True,
            "chat_template_kwargs": {"enable_thinking": True},
        },
        {
            "model": NAME,
            "messages": [{"role": "user", "content": "greet"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
            "max_tokens": 2,
            "logprobs": True,
            "top_logprobs": 2,
        },
        {
            "model": NAME,
            "messages": [{"role": "user", "content": "greet"}],
            "tools": [{"type": "function", "function": FN}],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]},
            },
            "max_tokens": 2,
        },
        {
            "model": NAME,
            "messages": [{"role": "user", "content": "greet"}],
            "structured_outputs": {"json": SCHEMA},
            "max_tokens": 2,
        },
    ],
    "/v1/responses": [
        {
            "model": NAME,
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "greet"}]}],
            "tools": [
                {"type": "function", **FN},
                {"type": "namespace", "name": "sky", "description": "d", "tools": [{"type": "function", **FN}]},
                {"type": "web_search", "filters": {"a": 1}},
            ],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "weather"}],
            },
            "text": {"format": {"type": "text"}, "verbosity": "low"},
            "reasoning": {"effort": "low", "summary": "auto"},
            "metadata": {"a": "b"},
            "include": ["message.output_text.logprobs"],
            "max_output_tokens": 2,
        },
        {
            "model": NAME,
            "input": "greet",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
            "max_output_tokens": 2,
        },
    ],
    "/v1/messages": [
        {
            "model": NAME,
            "max_tokens": 2,
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "greet"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "t", "signature": "s"},
                        {"type": "tool_use", "id": "t", "name": "weather", "input": {"a": "x"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t",
                            "content": [{"type": "text", "text": "x"}],
                            "is_error": False,
                        }
                    ],
                },
            ],
            "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
            "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "stop_sequences": ["zz"],
            "metadata": {"user_id": "u"},
        },
        {
            "model": NAME,
            "max_tokens": 2,
            "messages": [{"role": "user", "content": "greet"}],
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        },
        {
            "model": NAME,
            "max_tokens": 2,
            "messages": [
                {"role": "user", "content": "greet"},
                {"role": "assistant", "content": [{"type": "text", "text": "Go"}]},
            ],
        },
    ],
    "/api/chat": [
        {
            "model": NAME,
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "greet"},
                {
                    "role": "assistant",
                    "content": "",
                    "thinking": "t",
                    "tool_calls": [{"function": {"name": "weather", "arguments": {"a": "x"}}}],
                },
                {"role": "tool", "tool_name": "weather", "content": "x"},
            ],
            "tools": [{"type": "function", "function": FN}],
            "stream": False,
            "options": {"num_predict": 2, "stop": ["zz"], "temperature": 0.5},
            "think": True,
            "keep_alive": "5m",
        },
        {
            "model": NAME,
            "messages": [{"role": "user", "content": "greet"}],
            "stream": False,
            "format": SCHEMA,
            "options": {"num_predict": 2},
        },
    ],
    "/v1/completions": [
        {
            "model": NAME,
            "prompt": ["greet", "x"],
            "max_tokens": 2,
            "logprobs": 1,
            "echo": True,
            "stop": ["zz"],
            "logit_bias": {"5": 1},
        }
    ],
    "/tokenize": [
        {
            "model": NAME,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "greet"}]},
                {"role": "assistant", "content": "Go", "tool_calls": [CALL]},
            ],
            "tools": [{"type": "function", "function": FN}],
            "add_generation_prompt": False,
        }
    ],
}


def places(v, at=()):
    """The way to every value inside."""
    if isinstance(v, dict):
        for k, x in v.items():
            yield (*at, k)
            yield from places(x, (*at, k))
    elif isinstance(v, list):
        for i, x in enumerate(v):
            yield (*at, i)
            yield from places(x, (*at, i))


def put(v, at, w):
    if not at:
        return w
    if isinstance(v, dict):
        return {k: (put(x, at[1:], w) if k == at[0] else x) for k, x in v.items()}
    return [put(x, at[1:], w) if i == at[0] else x for i, x in enumerate(v)]


@pytest.mark.wall_clock
@pytest.mark.parametrize("path,body", [(path, body) for path, bodies in RICH.items() for body in bodies])
def test_any_place(http, path, body):
    """A hundred of the pairs of a place and a value, or as NOISE says; each request as it stands is answered."""
    assert asked(http, path, body) == 200
    pairs = [(at, wrong) for at in places(body) for wrong in [*WRONG, None, {"$ref": "#"}, {"type": "text"}]]
    for at, wrong in random.Random(5).sample(pairs, min(len(pairs), NOISE // 50)):
        asked(http, path, put(body, at, wrong))
    still_well(http)
