"""Messages as clients send them, as templates want them."""

from __future__ import annotations

import pytest

from ktx.chat_formats import CHAT_FORMATS, to_template_messages


def told(family, *messages):
    return to_template_messages(messages, CHAT_FORMATS[family])


def calls(*arguments, ids=("call_a", "call_b")):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": id, "type": "function", "function": {"name": "weather", "arguments": text}}
            for id, text in zip(ids, arguments, strict=False)
        ],
    }


def result(id, text):
    return {"role": "tool", "tool_call_id": id, "content": text}


def arguments(messages):
    return [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert told("qwen3", {"role": "user", "content": parts}) == [{"role": "user", "content": "ab"}]
    assert told("qwen3", {"role": "user", "content": None})[0]["content"] == ""


def test_other_parts_are_refused():
    with pytest.raises(ValueError, match="image_url"):
        told("qwen3", {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]})


def test_the_developer_is_the_system_but_for_gpt_oss():
    message = {"role": "developer", "content": "x"}
    assert told("qwen3", message)[0]["role"] == "system"
    assert told("gpt-oss", message)[0]["role"] == "developer"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_by_either_name(key):
    message = {"role": "assistant", "content": "y", key: "x"}
    assert told("qwen3", message)[0]["reasoning_content"] == "x"
    assert told("gpt-oss", message)[0]["thinking"] == "x"


def test_arguments_are_objects():
    assert arguments(told("qwen3", calls('{"city": "Paris"}'))) == [{"city": "Paris"}]
    assert arguments(told("qwen3", calls("", None))) == [{}, {}]
    assert arguments(told("qwen3", calls({"city": "Paris"}))) == [{"city": "Paris"}]


def test_arguments_that_are_spoilt_are_not_lost():
    assert arguments(told("qwen3", calls("{'city': True,}"))) == [{"city": True}]
    assert arguments(told("qwen3", calls("{city"))) == [{"arguments": "{city"}]


def test_arguments_are_text_for_deepseek():
    message = told("deepseek-v3.1", calls('{"city":"Paris"}'))[0]
    assert arguments([message]) == ['{"city":"Paris"}']
    assert message["content"] is None
    assert arguments(told("deepseek-r1", calls({"city": "Paris"}, ""))) == ['{"city": "Paris"}', "{}"]


def test_results_know_their_function():
    messages = told("qwen3", calls("{}", "{}"), result("call_b", "rain"))
    assert messages[1] == {"role": "tool", "content": "rain", "tool_call_id": "call_b", "name": "weather"}


def test_ids_take_the_family_s_form():
    messages = told("kimi-k2", calls("{}", "{}"), result("call_b", "x"), calls("{}", ids=["call_c"]))
    ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    assert ids == ["functions.weather:0", "functions.weather:1", "functions.weather:2"]
    assert messages[1]["tool_call_id"] == "functions.weather:1"
    kept = told("kimi-k2", calls("{}", ids=["functions.weather:7"]))
    assert kept[0]["tool_calls"][0]["id"] == "functions.weather:7"


def test_mistral_s_ids_have_nine_characters():
    messages = told("mistral", calls("{}"), result("call_a", "x"))
    id = messages[0]["tool_calls"][0]["id"]
    assert len(id) == 9 and id.isalnum() and messages[1]["tool_call_id"] == id
    assert told("mistral", calls("{}", ids=["abcDEF123"]))[0]["tool_calls"][0]["id"] == "abcDEF123"


def test_several_calls_where_a_message_takes_one():
    messages = told("llama-3", calls("{}", '{"n": 1}'), result("call_a", "x"), result("call_b", "y"))
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant", "tool"]
    assert [message["content"] for message in messages] == ["", "x", "", "y"]
    assert arguments(messages) == [{}, {"n": 1}]


def test_the_client_s_messages_stay_as_they_are():
    message = calls('{"city": "Paris"}')
    told("kimi-k2", message)
    assert message == calls('{"city": "Paris"}')
