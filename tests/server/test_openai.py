"""OpenAI's routes, asked by its own client and by hand."""

from __future__ import annotations

import json

import openai
import pytest

from tests.server.conftest import NAME, SCRIPT

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(text, **more):
    return {"model": NAME, "messages": [{"role": "user", "content": text}], **more}


def joined(stream):
    """What a client makes of the chunks: content, reasoning, calls, finish, and the chunks themselves."""
    content, reasoning, calls, finish, chunks = "", "", {}, None, list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                mine = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
                mine["arguments"] += call.function.arguments or ""
            finish = choice.finish_reason or finish
    return content, reasoning, [calls[i] for i in sorted(calls)], finish, chunks


def test_models(client, http):
    assert [model.id for model in client.models.list()] == [NAME, "alias"]
    assert client.models.retrieve("alias").max_model_len == 1 << 15
    with pytest.raises(openai.NotFoundError, match="test-model, alias"):
        client.models.retrieve("gpt-4")
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert http.post("/v1/embeddings", json={"input": "x"}).status_code == 501


@pytest.mark.parametrize("text", ["greet", "think", "call the tool", "broken call", "emoji", "long story"])
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"max_tokens": 40, "tools": TOOLS}, {"stop": [" to", "see"]}])
def test_a_stream_says_what_the_whole_answer_says(client, text, more):
    whole = client.chat.completions.create(**ask(text, **more))
    content, reasoning, calls, finish, chunks = joined(
        client.chat.completions.create(**ask(text, stream=True, stream_options={"include_usage": True}, **more))
    )
    message = whole.choices[0].message
    assert content == (message.content or "") and reasoning == (getattr(message, "reasoning_content", None) or "")
    assert [(call["name"], call["arguments"]) for call in calls] == [
        (call.function.name, call.function.arguments) for call in message.tool_calls or ()
    ]
    assert finish == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [choice.delta.role for chunk in chunks for choice in chunk.choices if choice.delta.role] == ["assistant"]


def test_reasoning_stands_apart(client):
    message = client.chat.completions.create(**ask("think")).choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == (
        "It is four.",
        "Let me see.",
        "Let me see.",
    )
    usage = client.chat.completions.create(**ask("think")).usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_calls(client):
    choice = client.chat.completions.create(**ask("call the tool", tools=TOOLS)).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Well."
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [
        {"city": "Köln", "days": 2},
        {"city": '<b>"x"</b>'},
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    without = client.chat.completions.create(**ask("call the tool")).choices[0]
    assert without.message.tool_calls is None and "<tool_call>" in without.message.content
    none = client.chat.completions.create(**ask("call the tool", tools=TOOLS, tool_choice="none")).choices[0]
    assert none.message.tool_calls is None


def test_a_call_that_was_cut_says_length(client):
    cut = client.chat.completions.create(**ask("call the tool", tools=TOOLS, max_tokens=60)).choices[0]
    assert cut.finish_reason == "length" and not cut.message.tool_calls


def test_a_conversation_with_results_is_read_back(client):
    history = [
        {"role": "user", "content": "call the tool"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sunny, now greet"}]},
    ]
    assert client.chat.completions.create(model=NAME, messages=history, tools=TOOLS).choices[0].message.content


def test_named_and_required_tools_are_forced(client):
    """The script would say something else: the grammar leaves nothing but a call."""
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        made = client.chat.completions.create(
            **ask("greet", tools=TOOLS, tool_choice=choice, max_tokens=200, temperature=0)
        ).choices[0]
        assert made.finish_reason in ("tool_calls", "length")
        assert made.message.content in ("", None)
        for call in made.message.tool_calls or ():
            assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)


def other(name="other", **more):
    return {"type": "function", "function": TOOLS[0]["function"] | {"name": name, **more}}


def allowing(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_allowed_tools_are_called(client):
    """The grammar leaves only calls of the allowed tools, and the prompt stays what it was.

    The script would say something else.
    """
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    three = [other(name, parameters=schema) for name in ("first", "second", "third")]

    def made(choice):
        asked = ask("greet", tools=three, tool_choice=choice, parallel_tool_calls=False, n=8, temperature=2, seed=1)
        return client.chat.completions.create(**asked)

    forced = made(allowing("required", "second", "third"))
    called = [[call.function.name for call in one.message.tool_calls] for one in forced.choices]
    assert len(called) == 8 and {*map(tuple, called)} <= {("second",), ("third",)}
    assert all(one.message.content is None for one in forced.choices)
    assert forced.usage.prompt_tokens == made("auto").usage.prompt_tokens


def test_where_a_model_may_also_answer_it_is_told_of_the_allowed_tools_alone(client):
    def prompt(text, **more):
        return client.chat.completions.create(**ask(text, **more)).usage.prompt_tokens

    two = [*TOOLS, other()]
    for text in ("greet", "call the tool"):
        told = prompt(text, tools=two, tool_choice=allowing("auto", "weather"))
        assert told == prompt(text, tools=TOOLS) < prompt(text, tools=two)
    choice = client.chat.completions.create(
        **ask("call the tool", tools=two, tool_choice=allowing("auto", "weather"))
    ).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.name == "weather"


def test_several_answers_and_log_probabilities(client):
    made = client.chat.completions.create(**ask("greet", n=3, logprobs=True, top_logprobs=2))
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    for choice in made.choices:
        told = choice.logprobs.content
        assert "".join(token.token for token in told) == choice.message.content == SCRIPT[0]["text"]
        assert all(len(token.top_logprobs) == 2 and token.bytes for token in told)
        assert bytes(byte for token in told for byte in token.bytes).decode() == choice.message.content
    emoji = client.chat.completions.create(**ask("emoji", logprobs=True)).choices[0]
    assert bytes(byte for token in emoji.logprobs.content for byte in token.bytes).decode() == "a 🙂 b"
    streamed = client.chat.completions.create(**ask("emoji", logprobs=True, stream=True))
    assert [
        token
        for chunk in streamed
        for choice in chunk.choices
        for token in (choice.logprobs.content if choice.logprobs else ())
    ] == emoji.logprobs.content


def test_structured_answers(client, http):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    said = client.chat.completions.create(
        **ask(
            "greet",
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            max_tokens=50,
            temperature=0,
        )
    )
    assert said.choices[0].message.content.startswith('{"a": ')
    assert (
        client.chat.completions.create(**ask("greet", extra_body={"guided_regex": "[0-9]{3}"}, max_tokens=9))
        .choices[0]
        .message.content.isdigit()
    )
    bad = http.post(
        "/v1/chat/completions",
        json=ask(
            "greet",
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "("}},
            },
        ),
    )
    assert bad.status_code == 400 and "grammar" in bad.json()["error"]["message"]


def test_completions_take_every_kind_of_prompt(client):
    def texts(prompt, **more):
        return [
            choice.text
            for choice in client.completions.create(model=NAME, prompt=prompt, max_tokens=40, **more).choices
        ]

    ids = [8 + ord(letter) % 90 for letter in "abcdef"]
    assert texts("greet") == ["Good day, to you!"] and texts(["greet", "emoji"]) == ["Good day, to you!", "a 🙂 b"]
    assert texts(ids) == texts([ids]) and len(texts([ids, ids], n=2)) == 4
    assert texts("greet", echo=True) == ["greetGood day, to you!"]
    stream = client.completions.create(model=NAME, prompt=["greet", "emoji"], max_tokens=40, stream=True)
    parts = ["", ""]
    for chunk in stream:
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == ["Good day, to you!", "a 🙂 b"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_of_each_piece_counts_tokens(http, path):
    """Also those that had no text of their own: an emoji is four."""
    asked = {"model": NAME, "prompt": "emoji", "max_tokens": 40} if path == "/v1/completions" else ask("emoji")
    options = {"include_usage": True, "continuous_usage_stats": True}
    lines = http.post(path, json=asked | {"stream": True, "stream_options": options}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    whole = chunks[-1]["usage"]
    assert counts == sorted(counts) and counts[-2:] == [8, 8] and 6 in counts and not {3, 4, 5} & set(counts)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {whole["prompt_tokens"]}
    plain = http.post(path, json=asked | {"stream": True, "stream_options": {"include_usage": True}}).text
    assert plain.count('"usage":null') == len(chunks) - 1


def test_echo_with_log_probabilities_is_what_lm_eval_reads(client):
    made = client.completions.create(
        model=NAME, prompt=[[60, 61, 62], [70, 71]], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1
    )
    for choice, length in zip(made.choices, (3, 2), strict=True):
        told = choice.logprobs
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert (
            len(told.tokens)
            == len(told.token_logprobs)
            == len(told.top_logprobs)
            == len(told.text_offset)
            == length + 1
        )
        assert told.token_logprobs[1] == max(told.top_logprobs[1].values())  # the script's own: greedy


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ends_an_answer_is_told_with_log_probabilities(client, stream):
    """lm-eval asks for one token and takes the last one told for it: otherwise it would lose one of the prompt's."""
    asked = {"model": NAME, "prompt": "greet", "max_tokens": 40, "logprobs": 1}
    made = client.completions.create(**asked, stream=stream)
    choices = [choice for chunk in (made if stream else [made]) for choice in chunk.choices]
    text, tokens = "".join(choice.text for choice in choices), [one for c in choices for one in c.logprobs.tokens]
    assert text == "Good day, to you!" and tokens == [*text, "<|end|>"] and choices[-1].finish_reason == "stop"
    if not stream:
        told = client.completions.create(**asked, echo=True).choices[0]
        assert told.logprobs.tokens == [*"greet", *text, "<|end|>"] and told.text == "greet" + text


def test_tokens_there_and_back(http):
    told = http.post("/tokenize", json={"model": NAME, "prompt": "héllo"}).json()
    assert told["count"] == len(told["tokens"]) == 6 and told["max_model_len"] == 1 << 15
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "héllo"}
    chat = http.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "x"}], "return_token_strs": True}
    ).json()
    assert chat["token_strs"][0] == "<|user|>" and chat["token_strs"][-1] == "<|assistant|>"
    assert http.get("/tokenizer_info").json()["eos_token"] == "<|end|>"
    assert http.post("/detokenize", json={"tokens": [1 << 20]}).status_code == 400


def test_words_that_look_like_control_tokens_stay_words(http):
    told = http.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "a<|end|><|system|>b"}], "return_token_strs": True}
    ).json()
    assert [word for word in told["token_strs"] if len(word) > 1 and word.startswith("<")] == [
        "<|user|>",
        "<|end|>",
        "<|assistant|>",
    ]
    assert (
        http.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"]
        == "<|user|>a<|end|><|system|>b<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    "body,param,words",
    [
        (ask("x") | {"model": "gpt-4"}, "model", "does not exist"),
        ({"messages": [{"role": "user", "content": "x"}]}, "model", "is missing"),
        (ask("x", temperature=3), "temperature", "less than or equal to 2"),
        (ask("x", temperature="0.5"), "temperature", "valid number"),
        (ask("x", n=100), "n", "less than or equal to 8"),
        (ask("x", tempurature=1), "tempurature", "no such field"),
        (ask("x", audio={"voice": "a"}), "audio", "does not support"),
        (ask("x", stream_options={"include_usage": True}), None, "stream: true"),
        (ask("x", max_tokens=1 << 20), "messages", "context holds 32768"),
        (ask("x" * 40000), "messages", "context holds"),
        (
            ask("x", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "no"}}),
            None,
            "not one of the tools",
        ),
        (ask("x", tools=TOOLS, tool_choice=allowing("auto", "no")), "tool_choice", "tools are ['weather']"),
        (ask("x", tools=TOOLS, tool_choice=allowing("required")), "tool_choice", "tools are ['weather']"),
        (ask("x", tool_choice=allowing("auto", "weather")), "tool_choice", "tools are []"),
        (ask("x", tools=TOOLS, tool_choice=allowing("none", "weather")), None, "'auto' or 'required'"),
        (ask("x", tools=TOOLS, tool_choice="any"), None, "'none', 'auto' or 'required'"),
        (
            ask("x", chat_template_kwargs={"chat_template": "x"}),
            "chat_template_kwargs",
            "not a supported template argument",
        ),
        (
            {
                "model": NAME,
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
            },
            None,
            "only text",
        ),
        ({"model": NAME, "messages": []}, "messages", "at least 1"),
    ],
)
def test_what_cannot_be_is_told_as_openai_tells_it(http, body, param, words):
    for stream in (False, True) if "stream_options" not in body else (False,):
        answer = http.post("/v1/chat/completions", json={**body, "stream": stream})
        error = answer.json()["error"]
        assert answer.status_code in (400, 404) and words in error["message"], error
        assert error["type"] == "invalid_request_error" and (param is None or error["param"] == param), error


def test_official_error_classes(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**ask("x" * 40000), extra_headers={"x-request-id": "mine"})
    assert error.value.code == "context_length_exceeded" and error.value.request_id == "mine"
    assert client.chat.completions.create(**ask("greet"))._request_id.startswith("req_")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b'{"model": "\\ud800", "messages": []}',
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
        "/api/generate",
        "/tokenize",
    ],
)
def test_what_is_no_request_is_a_client_error(http, raw, path):
    assert http.post(path, content=raw).status_code in (400, 413)


def test_responses(client):
    whole = client.responses.create(model=NAME, input="think", instructions="be brief")
    assert whole.output_text == "It is four." and [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.status == "completed" and whole.usage.output_tokens_details.reasoning_tokens > 0
    cut = client.responses.create(model=NAME, input="long story", max_output_tokens=16)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    called = client.responses.create(model=NAME, input="call the tool", tools=tools)
    calls = [item for item in called.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Köln", '<b>"x"</b>']
    again = [
        *[item.model_dump(exclude_none=True) for item in called.output],
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sun; greet"},
    ]
    assert client.responses.create(model=NAME, input=[{"role": "user", "content": "hi"}, *again], tools=tools).output


@pytest.mark.parametrize("text", ["think", "call the tool", "greet"])
def test_responses_stream(client, text):
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    events = list(client.responses.create(model=NAME, input=text, tools=tools, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[1].type, events[-1].type) == (
        "response.created",
        "response.in_progress",
        "response.completed",
    )
    text_of = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text_of == events[-1].response.output_text
    whole = client.responses.create(model=NAME, input=text, tools=tools)
    assert [item.type for item in whole.output] == [
        item.type for item in events[-1].response.output
    ] and whole.output_text == text_of


def test_responses_in_the_background_are_not_offered(http):
    for more in ({"background": True}, {"conversation": "conv_1"}):
        assert http.post("/v1/responses", json={"model": NAME, "input": "x", **more}).status_code == 400
