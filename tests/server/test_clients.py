"""Anthropic's, Ollama's and LangChain's clients."""

from __future__ import annotations

import anthropic
import ollama
import pytest
from langchain_openai import ChatOpenAI

from tests.server.conftest import NAME

TOOL = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
FUNCTION = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": TOOL["input_schema"]},
}


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server, api_key="none", max_retries=0)


def said(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("text", ["greet", "think", "call the tool", "broken call", "long story"])
def test_messages_stream_what_the_whole_says(claude, text):
    common = {"model": NAME, "max_tokens": 500, "messages": said(text), "tools": [TOOL]}
    whole = claude.messages.create(**common)
    with claude.messages.stream(**common) as stream:
        final = stream.get_final_message()
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [
        block.model_dump(exclude={"id"}) for block in whole.content
    ]
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens > 0


def test_messages_of_every_kind(claude):
    thought = claude.messages.create(model=NAME, max_tokens=100, messages=said("think"))
    assert [block.type for block in thought.content] == ["thinking", "text"] and thought.stop_reason == "end_turn"
    called = claude.messages.create(model=NAME, max_tokens=500, messages=said("call the tool"), tools=[TOOL])
    assert called.stop_reason == "tool_use" and called.content[1].input == {"city": "Köln", "days": 2}
    assert claude.messages.create(model=NAME, max_tokens=3, messages=said("long story")).stop_reason == "max_tokens"
    stopped = claude.messages.create(model=NAME, max_tokens=99, messages=said("greet"), stop_sequences=[" to"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == (
        "stop_sequence",
        " to",
        "Good day,",
    )
    history = [
        *said("call the tool"),
        {"role": "assistant", "content": [block.model_dump() for block in called.content]},
    ]
    history.append(
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": called.content[1].id,
                    "content": [{"type": "text", "text": "sun"}],
                },
                {"type": "text", "text": "greet"},
            ],
        }
    )
    assert claude.messages.create(
        model=NAME, max_tokens=99, messages=history, tools=[TOOL], system=[{"type": "text", "text": "s"}]
    ).content
    assert claude.messages.count_tokens(model=NAME, messages=said("abc")).input_tokens == 3 + 3


def test_messages_errors(claude):
    for wrong in (
        {"model": "claude"},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"extra_body": {"temperature": 2.0}},
    ):
        with pytest.raises((anthropic.BadRequestError, anthropic.NotFoundError)) as error:
            claude.messages.create(**({"model": NAME, "max_tokens": 9, "messages": said("x")} | wrong))
        assert error.value.body["type"] == "error"
        assert error.value.request_id == error.value.body["request_id"]
    answer = claude.messages.create(model=NAME, max_tokens=9, messages=said("greet"))
    assert answer._request_id.startswith("req_")


@pytest.fixture(scope="module")
def llama(server):
    return ollama.Client(server)


def test_ollama(llama):
    assert llama.list().models[0].model == f"{NAME}:latest" and llama.ps().models
    assert "tools" in llama.show(NAME).capabilities
    whole = llama.chat(NAME, messages=said("think"))
    assert (whole.message.content, whole.message.thinking, whole.done_reason) == ("It is four.", "Let me see.", "stop")
    parts = list(llama.chat(f"{NAME}:latest", messages=said("think"), stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert parts[-1].done and parts[-1].eval_count == whole.eval_count > 0 and parts[-1].prompt_eval_count
    called = llama.chat(NAME, messages=said("call the tool"), tools=[FUNCTION])
    assert [call.function.arguments for call in called.message.tool_calls] == [
        {"city": "Köln", "days": 2},
        {"city": '<b>"x"</b>'},
    ]
    assert llama.generate(NAME, "greet").response == "Good day, to you!"
    assert llama.generate(NAME, "greet", options={"num_predict": 4}).done_reason == "length"
    assert (
        "".join(part.response for part in llama.generate(NAME, "greet", raw=True, stream=True)) == "Good day, to you!"
    )
    with pytest.raises(ollama.ResponseError, match="does not exist"):
        llama.chat("nothing", messages=said("x"))


def test_ollama_loads_by_an_empty_request(http):
    assert http.post("/api/generate", json={"model": NAME}).json()["done_reason"] == "load"
    assert http.get("/api/version").json()["version"]


def test_langchain(server):
    model = ChatOpenAI(base_url=f"{server}/v1", api_key="none", model=NAME, max_retries=0)
    assert model.invoke("greet").content == "Good day, to you!"
    bound = model.bind_tools([FUNCTION])
    merged = None
    for piece in bound.stream("call the tool"):
        merged = piece if merged is None else merged + piece
    assert [call["args"] for call in merged.tool_calls] == [{"city": "Köln", "days": 2}, {"city": '<b>"x"</b>'}]
    assert [call["args"] for call in bound.invoke("call the tool").tool_calls] == [
        call["args"] for call in merged.tool_calls
    ]
