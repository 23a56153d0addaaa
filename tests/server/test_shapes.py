"""Requests as clients of many makers send them: what they always send, what they hand back, what they look at first."""

from __future__ import annotations

import json

import pytest

from tests.server.conftest import NAME, refused, sent

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "number"}},
    "required": ["city"],
}
FUNCTION = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}
TOOL = {"name": "weather", "description": "d", "input_schema": PARAMETERS}
RESPONSE_TOOL = {"type": "function", "name": "weather", "description": "d", "strict": False, "parameters": PARAMETERS}
ALWAYS = {  # what says something about the sender or about keeping, and nothing about the answer
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "priority",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "user": "u",
}


def user(text):
    return [{"role": "user", "content": text}]


def test_what_says_nothing_about_the_answer_breaks_no_client(http):
    chat = sent(http, "/v1/chat/completions", messages=user("greet"), top_logprobs=0, logprobs=False, **ALWAYS)
    assert chat["choices"][0]["message"]["content"] == "Good day, to you!" and chat["service_tier"] == "default"
    told = sent(http, "/v1/responses", input="greet", reasoning={"effort": "max", "summary": "auto"}, **ALWAYS)
    assert (told["status"], told["store"], told["service_tier"]) == ("completed", True, "default")


def test_what_clients_add_to_an_answer_may_come_back_with_it(http):
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "x"}', "parsed_arguments": {"city": "x"}},
        "provider_specific_fields": None,
    }
    said = {"role": "assistant", "content": None, "parsed": None, "tool_calls": [call], "provider_specific_fields": {}}
    said |= {"thinking_blocks": [{"type": "thinking", "thinking": "t"}], "images": [], "id": "msg_1", "annotations": []}
    history = [*user("x"), said, {"role": "tool", "tool_call_id": "a", "content": "sun; greet"}]
    tools = [FUNCTION | {"cache_control": {"type": "ephemeral"}}]
    plain = [{key: said[key] for key in ("role", "content", "tool_calls")} if one is said else one for one in history]
    counts = [
        sent(http, "/v1/chat/completions", messages=messages, tools=[*given])["usage"]["prompt_tokens"]
        for messages, given in ((history, tools), (plain, [FUNCTION]))
    ]
    assert counts[0] == counts[1]  # and nothing of it reaches the prompt
    assert "messages.0.mood" in refused(http, "/v1/chat/completions", messages=[{**user("x")[0], "mood": "good"}])


@pytest.mark.parametrize(
    "guide,fits",
    [
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, str.isdigit),
        ({"structured_outputs": {"choice": ["ja", 'n"e']}}, {"ja", 'n"e'}.__contains__),
        ({"guided_choice": ["oui", "non"]}, {"oui", "non"}.__contains__),
        ({"structured_outputs": {"json": {"type": "integer", "maximum": 9, "minimum": 0}}}, str.isdigit),
        ({"structured_outputs": {"grammar": '%llguidance {}\nstart: "ab"'}}, "ab".__eq__),
        ({"structured_outputs": {"json_object": True}}, lambda text: text.startswith("{")),
    ],
)
def test_vllms_guides_by_both_their_names(http, guide, fits):
    for path, asked in (
        ("/v1/chat/completions", {"messages": user("greet")}),
        ("/v1/completions", {"prompt": "greet"}),
    ):
        choice = sent(http, path, **asked, **guide, max_tokens=20, temperature=0)["choices"][0]
        assert fits(choice["text"] if "text" in choice else choice["message"]["content"]), choice
        words = refused(http, path, **asked, **guide, guided_regex="x", response_format={"type": "json_object"})
        assert "cannot be combined" in words and "guided_regex" in words


def test_a_model_goes_by_ollamas_name_on_every_route(http):
    """Editors find names at /api/tags and ask /v1/chat/completions for them."""
    name = http.get("/api/tags").json()["models"][0]["name"]
    assert name == f"{NAME}:latest"
    chat = http.post("/v1/chat/completions", json={"model": name, "messages": user("greet")}).json()
    assert chat["model"] == name and chat["choices"][0]["message"]["content"]
    assert http.get(f"/v1/models/{name}").json()["id"] == name
    assert http.post("/v1/messages", json={"model": name, "max_tokens": 9, "messages": user("greet")}).is_success
    assert http.post("/v1/chat/completions", json={"model": f"{NAME}:8b", "messages": user("x")}).status_code == 404


def test_models_as_openais_and_anthropics_clients_list_them(http):
    told = http.get("/v1/models/").json()
    assert told == http.get("/v1/models").json() == http.get("/v1/models", headers={"anthropic-version": "1"}).json()
    first = told["data"][0]
    assert (first["object"], first["type"], first["id"]) == ("model", "model", NAME)
    assert first["display_name"] and first["created_at"].endswith("Z") and first["max_model_len"] == 1 << 15
    assert (told["has_more"], told["first_id"], told["last_id"]) == (False, NAME, "alias")


def claude_code():
    """One of its turns: marks for the cache everywhere, thinking, effort, long names of tools."""
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    return {
        "max_tokens": 32000,
        "system": [{"type": "text", "text": "You are."}, {"type": "text", "text": "Be brief.", **cached}],
        "tools": [
            TOOL | cached | {"eager_input_streaming": True, "defer_loading": False, "strict": True},
            TOOL | {"name": "mcp__" + "a" * 90, "type": "custom", "allowed_callers": ["direct"]},
        ],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "max"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "u"},
        "cache_control": {"type": "ephemeral"},
        "mcp_servers": [],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x", **cached}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": ""},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {}, "caller": {"type": "direct"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "is_error": False, **cached}
                    | {"content": [{"type": "text", "text": "sun; greet"}]}
                ],
            },
        ],
    }


def test_a_coding_agent_on_anthropics_route(http):
    headers = {"anthropic-beta": "interleaved-thinking-2025-05-14,effort-2025-11-24", "anthropic-version": "2023-06-01"}
    answer = http.post("/v1/messages?beta=true", json={"model": NAME, **claude_code()}, headers=headers)
    assert answer.json()["content"] == [{"type": "text", "text": "Good day, to you!"}], answer.text
    count = claude_code()
    for name in ("max_tokens", "metadata"):
        count.pop(name)
    told = http.post("/v1/messages/count_tokens?beta=true", json={"model": NAME, **count}).json()
    assert told["input_tokens"] == sum(answer.json()["usage"][f"{kind}input_tokens"] for kind in ("", "cache_read_"))
    assert http.head("/").status_code == 200


@pytest.mark.parametrize("where", ["output_config", "output_format"])
def test_messages_keep_to_a_schema(http, where):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    asked = {"type": "json_schema", "schema": schema}
    more = {"output_config": {"format": asked}} if where == "output_config" else {"output_format": asked}
    said = sent(http, "/v1/messages", max_tokens=50, messages=user("greet"), **more)["content"][0]["text"]
    assert json.loads(said) == {"a": 1}


def test_anthropics_clients_learn_that_no_conversation_is_kept_here(http):
    answer = http.post(
        "/v1/messages", json={"model": NAME, "max_tokens": 9, "messages": user("x"), "thread": {"type": "create"}}
    )
    assert answer.status_code == 400 and answer.json()["error"]["details"] == {
        "error_code": "thread_unsupported_request",
        "unsupported": ["thread"],
    }


@pytest.mark.parametrize(
    "path,body",
    [
        (
            "/v1/messages",
            {"max_tokens": 9, "messages": user("x"), "tools": [{"type": "web_search_1", "name": "s", "max_uses": 3}]},
        ),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search_1", "vector_store_ids": []}]}),
        ("/v1/chat/completions", {"messages": user("x"), "tools": [{"type": "web_search_1", "custom": {}}]}),
    ],
)
def test_tools_that_a_provider_would_run_are_named(http, path, body):
    words = refused(http, path, **body)
    assert words.startswith("tools.0") and "a tool of type 'web_search_1' cannot be used here" in words


def test_numbers_beyond_all_floats_are_told(http):
    """A model may write them, and JSON has no infinity."""
    block = sent(http, "/v1/messages", max_tokens=200, messages=user("beyond numbers"), tools=[TOOL])["content"][0]
    assert block["input"]["days"] > 1e308
    for stream in (False, True):
        asked = {"model": NAME, "messages": user("beyond numbers"), "tools": [FUNCTION], "stream": stream}
        lines = [json.loads(line) for line in http.post("/api/chat", json=asked).text.splitlines()]
        call = next(line["message"]["tool_calls"][0] for line in lines if line["message"].get("tool_calls"))
        assert call["function"]["arguments"]["days"] > 1e308


def test_a_coding_agent_on_the_responses_route(http):
    told = sent(
        http,
        "/v1/responses",
        instructions="You are.",
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sun; greet"}]},
        ],
        tools=[RESPONSE_TOOL, {"type": "web_search", "external_web_access": False}],
        tool_choice="auto",
        client_metadata={"installation": "i"},
        parallel_tool_calls=False,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        text={"verbosity": "medium"},
    )
    assert told["output"][0]["content"][0]["text"] == "Good day, to you!"
    assert [tool["type"] for tool in told["tools"]] == [
        "function"
    ]  # nobody here searches the web, and the answer says so


def test_functions_of_a_namespace_are_called_by_both_names(http):
    """The model knows one name, the client two."""
    tools = [{"type": "namespace", "name": "sky", "description": "d", "tools": [RESPONSE_TOOL]}]
    told = sent(http, "/v1/responses", input="look at the sky", tools=tools)
    call = next(item for item in told["output"] if item["type"] == "function_call")
    assert (call["namespace"], call["name"], told["tools"][0]["type"]) == ("sky", "weather", "namespace")
    forced = {"tools": tools, "tool_choice": {"type": "function", "name": "sky__weather"}, "max_output_tokens": 16}
    assert sent(http, "/v1/responses", input="x", **forced)["status"] == "incomplete"
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun; greet"}
    again = sent(http, "/v1/responses", input=[*[{"role": "user", "content": "x"}], call, result], tools=tools)
    assert again["output"][0]["content"][0]["text"] == "Good day, to you!"


def test_the_responses_route_allows_some_tools(http):
    """Also those of a namespace, by the name that the model knows."""
    short = {
        "type": "object",
        "properties": {"city": {"enum": ["x"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    sky = {"type": "namespace", "name": "sky", "description": "d", "tools": [RESPONSE_TOOL | {"parameters": short}]}
    tools = [RESPONSE_TOOL | {"name": "other"}, sky]

    def choice(mode, *names):
        return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}

    def told(text, **more):
        return sent(http, "/v1/responses", input=text, **more)

    forced = told("greet", tools=tools, tool_choice=choice("required", "sky__weather"), parallel_tool_calls=False)
    assert forced["tool_choice"] == choice("required", "sky__weather")
    assert [(item["type"], item.get("namespace")) for item in forced["output"]] == [("function_call", "sky")]
    free = told("look at the sky", tools=tools, tool_choice=choice("auto", "sky__weather"))
    alone, both = told("look at the sky", tools=[sky]), told("look at the sky", tools=tools)
    assert free["output"][-1]["name"] == "weather" and free["tools"] == both["tools"]
    counts = [one["usage"]["input_tokens"] for one in (free, alone, both)]
    assert counts[0] == counts[1] < counts[2]
    for wrong in (choice("auto", "weather"), choice("required")):
        words = refused(http, "/v1/responses", input="x", tools=tools, tool_choice=wrong)
        assert "tools are ['other', 'sky__weather']" in words


def test_reasoning_stands_where_summaries_are_shown_if_they_are_asked_for(http):
    """It is whole there, and is read back from there."""
    body = {"model": NAME, "input": "think", "stream": True, "reasoning": {"summary": "auto"}}
    lines = http.post("/v1/responses", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    kinds = list(dict.fromkeys(event["type"] for event in events))
    assert kinds[2:8] == [
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
    ]
    output = events[-1]["response"]["output"]
    assert output[0]["summary"] == [{"type": "summary_text", "text": "Let me see."}] and output[0]["content"] == []
    assert output[1]["content"][0]["text"] == "It is four."
    told = [event["delta"] for event in events if event["type"] == "response.reasoning_summary_text.delta"]
    assert "".join(told) == "Let me see."
    plain = sent(http, "/v1/responses", input="think")["output"][0]
    assert plain["summary"] == [] and plain["content"] == [{"type": "reasoning_text", "text": "Let me see."}]


def test_ollamas_command_line(http):
    """It sends every field of its types, also those it has nothing for."""
    assert (
        http.head("/").status_code == http.head("/api/tags").status_code == http.head("/api/version").status_code == 200
    )
    empty = {"system": "", "template": "", "options": None, "name": "", "verbose": False}
    shown = sent(http, "/api/show", **empty)
    assert shown["model_info"]["general.basename"] == NAME and "tools" in shown["capabilities"]
    asked = {"prompt": "", "suffix": "", "system": "", "template": "", "options": {}, "_debug_render_only": False}
    assert sent(http, "/api/generate", **asked, keep_alive="5m")["done_reason"] == "load"
    more = {"format": "", "truncate": True, "shift": True, "keep_alive": 300, "think": True, "options": {"num_ctx": 9}}
    assert http.post("/api/chat", json={"model": NAME, "messages": user("greet"), **more}).status_code == 200


@pytest.mark.parametrize("keep", [0, 0.0, "0", "0s"])
def test_ollamas_clients_cannot_unload_the_model(http, keep):
    assert "cannot unload its model" in refused(http, "/api/generate", keep_alive=keep)
    assert "cannot unload its model" in refused(http, "/api/chat", messages=[], keep_alive=keep)
    assert sent(http, "/api/generate", prompt="greet", keep_alive=keep, stream=False)["response"]


def test_ollamas_log_probabilities(http):
    asked = {"logprobs": True, "top_logprobs": 2}
    whole = sent(http, "/api/generate", prompt="greet", stream=False, **asked)
    assert "".join(one["token"] for one in whole["logprobs"]) == whole["response"]
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in whole["logprobs"])
    lines = http.post("/api/chat", json={"model": NAME, "messages": user("greet"), **asked}).text.splitlines()
    pieces = [one for line in lines for one in json.loads(line).get("logprobs", ())]
    assert [one["token"] for one in pieces] == [one["token"] for one in whole["logprobs"]]
    assert "logprobs" not in sent(http, "/api/chat", messages=user("greet"), stream=False)


def test_what_a_text_model_cannot_do_is_said_in_ollamas_words(http):
    assert "no embeddings" in refused(http, "/api/embed", input="x")
    assert "no embeddings" in refused(http, "/api/embeddings", prompt="x")
    assert "does not accept images" in refused(http, "/api/chat", messages=[{**user("x")[0], "images": ["aGk="]}])
