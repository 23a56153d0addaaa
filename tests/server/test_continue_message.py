"""Answers that go on with the assistant's last message, in all protocols."""

from __future__ import annotations

import json
import string
from pathlib import Path

import anthropic
import httpx
import ollama
import openai
import pytest

import ktx
from ktx.engine.engine import Options
from tests.server.conftest import NAME, refused, sent, serving
from tests.server.test_clients import FUNCTION, TOOL
from tests.support.scripted_engine import read_script, scripted_engine
from tests.support.tiny_chat_model import tokenizer, write_model

TEMPLATES = Path(__file__).parent.parent / "chat_formats" / "templates"
SCRIPT = [
    {"match": "name a place", "text": " world,\n\nand <think>all</think> of it. "},
    {
        "match": "ask the tool",
        "text": ' ask.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    },
    {"match": "two and two", "text": " and two.\n</think>\n\nFour."},
]
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}


def talk(question, **last):
    return [{"role": "user", "content": question}, {"role": "assistant", **last}]


HELLO = talk("name a place", content="Hello")


def made(family):
    words = tokenizer()
    words.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return words


def heard(engine):
    """The ids that the engine is asked from now on."""
    asked, submit = [], engine.submit

    def hear(prompt, *more):
        asked.append(list(prompt))
        return submit(prompt, *more)

    engine.submit = hear
    return asked


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A script behind Qwen3's template, and what it is asked."""
    path, words = tmp_path_factory.mktemp("script") / "script.json", made("qwen3")
    path.write_text(json.dumps(SCRIPT))
    engine = scripted_engine(words, Options(), read_script(path, words))
    asked = heard(engine)
    with serving(engine) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        yield http, asked


@pytest.fixture(scope="module")
def http(running):
    return running[0]


@pytest.fixture(scope="module")
def base(http):
    return str(http.base_url).rstrip("/")


@pytest.fixture(scope="module")
def client(base):
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


def cut(messages, said):
    """The whole conversation as the template writes it, up to the end of what is said."""
    words = made("qwen3")
    text = words.apply_chat_template(messages, tokenize=False)
    return words(text[: text.rindex(said) + len(said)], add_special_tokens=False)["input_ids"]


def test_all_protocols_ask_the_conversation_cut_behind_its_last_word(running):
    http, asked = running
    wanted = cut(HELLO, "Hello")
    sent(http, "/v1/chat/completions", messages=HELLO, **GOES_ON)
    sent(http, "/v1/chat/completions", messages=HELLO, continue_final_message=True)
    sent(http, "/v1/chat/completions", messages=[HELLO[0], HELLO[1] | {"prefix": True}])
    counted = sent(http, "/v1/messages", messages=HELLO, max_tokens=99)["usage"]
    parts = [HELLO[0], {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    sent(http, "/v1/messages", messages=parts, max_tokens=99)
    sent(http, "/api/chat", messages=HELLO, stream=False)
    assert asked[-6:] == [wanted] * 6
    assert sent(http, "/tokenize", messages=HELLO, **GOES_ON)["tokens"] == wanted
    count = sent(http, "/v1/messages/count_tokens", messages=HELLO)["input_tokens"]
    assert count == len(wanted) == counted["input_tokens"] + counted["cache_read_input_tokens"]


def test_without_being_asked_a_chat_does_not_go_on(running):
    http, asked = running
    whole = made("qwen3").apply_chat_template(HELLO, tokenize=False)
    sent(http, "/v1/chat/completions", messages=HELLO)
    sent(http, "/v1/chat/completions", messages=HELLO, add_generation_prompt=False)
    texts = [sent(http, "/detokenize", tokens=ids)["prompt"] for ids in asked[-2:]]
    assert texts == [whole + "<|im_start|>assistant\n", whole]
    assert sent(http, "/tokenize", messages=HELLO, add_generation_prompt=False)["tokens"] == asked[-1]


@pytest.mark.parametrize("how", [{"extra_body": GOES_ON}, {"prefix": True}], ids=["vLLM's", "DeepSeek's"])
def test_openais_client_gets_what_follows(client, how):
    last = HELLO[1] | ({"prefix": True} if "prefix" in how else {})
    asked = {"model": NAME, "messages": [HELLO[0], last], "extra_body": how.get("extra_body")}
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.message.content, whole.finish_reason) == (" world,\n\nand <think>all</think> of it. ", "stop")
    assert not hasattr(whole.message, "reasoning_content")
    stream = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content
    ask = asked | {"messages": [talk("ask the tool", content="x")[0], last | {"content": "Let me"}]}
    called = client.chat.completions.create(**ask, tools=[FUNCTION]).choices[0]
    assert (called.message.content, called.finish_reason) == (" ask.", "tool_calls")
    assert json.loads(called.message.tool_calls[0].function.arguments) == {"city": "Rome"}


def test_reasoning_goes_on(client, running):
    for last in ({"content": "", "reasoning_content": "Two"}, {"content": "<think>\nTwo"}):
        messages = talk("two and two", **last)
        message = client.chat.completions.create(model=NAME, messages=messages, extra_body=GOES_ON).choices[0].message
        assert (message.reasoning_content, message.content) == (" and two.", "Four.")
    whole = talk("name a place", reasoning_content="Hm.\nWhere?", content="Hello")
    client.chat.completions.create(model=NAME, messages=whole, extra_body=GOES_ON)
    assert running[1][-1] == cut(whole, "Hello")


def test_anthropics_client_gets_what_follows(base):
    claude = anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)
    asked = {"model": NAME, "max_tokens": 99, "messages": HELLO}
    whole = claude.messages.create(**asked)
    assert [block.text for block in whole.content] == [" world,\n\nand <think>all</think> of it. "]
    with claude.messages.stream(**asked) as stream:
        assert [block.text for block in stream.get_final_message().content] == [whole.content[0].text]
    called = claude.messages.create(**asked | {"messages": talk("ask the tool", content="Let me")}, tools=[TOOL])
    assert called.content[0].text == " ask." and called.content[1].input == {"city": "Rome"}
    thought = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "Hello"}]
    assert claude.messages.create(**asked | {"messages": talk("name a place", content=thought)}).content
    assert claude.messages.create(**asked | {"messages": talk("name a place", content="")}).content


def test_ollamas_client_gets_what_follows(base):
    llama = ollama.Client(base)
    whole = llama.chat(NAME, messages=HELLO)
    assert whole.message.content == " world,\n\nand <think>all</think> of it. "
    parts = list(llama.chat(NAME, messages=HELLO, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    thought = llama.chat(NAME, messages=talk("two and two", content="", thinking="Two"))
    assert (thought.message.thinking, thought.message.content) == (" and two.", "Four.")
    called = llama.chat(NAME, messages=talk("ask the tool", content="Let me"), tools=[FUNCTION])
    assert called.message.content == " ask." and called.message.tool_calls[0].function.arguments == {"city": "Rome"}


@pytest.mark.parametrize(
    "words,body",
    [
        ("needs add_generation_prompt: false", GOES_ON | {"messages": HELLO, "add_generation_prompt": True}),
        ("only a last message of the assistant", GOES_ON | {"messages": HELLO[:1]}),
        ("only a last message of the assistant", {"messages": [HELLO[0] | {"prefix": True}]}),
        ("only the last message", {"messages": [HELLO[0], HELLO[1] | {"prefix": True}, HELLO[0]]}),
        (
            "has tool calls",
            GOES_ON | {"messages": talk("x", tool_calls=[{"id": "a", "function": {"name": "f", "arguments": "{}"}}])},
        ),
        ("echo", GOES_ON | {"messages": HELLO, "echo": True}),
        ("constrained to a response format", GOES_ON | {"messages": HELLO, "response_format": {"type": "json_object"}}),
        ("constrained to a response format", GOES_ON | {"messages": HELLO, "guided_regex": "x"}),
        ("constrained to tool calls", GOES_ON | {"messages": HELLO, "tools": [FUNCTION], "tool_choice": "required"}),
    ],
)
def test_what_a_chat_cannot_go_on_with(http, words, body):
    assert words in refused(http, "/v1/chat/completions", **body)
    if not {"echo", "response_format", "guided_regex", "tools"} & set(body):
        assert words in refused(http, "/tokenize", **body)


def test_what_allows_nothing_else_may_be_said(http):
    body = GOES_ON | {"messages": HELLO, "echo": False, "response_format": {"type": "text"}}
    told = sent(http, "/v1/chat/completions", **body, tools=[FUNCTION], tool_choice="none")
    assert told["choices"][0]["message"]["content"].startswith(" world")


@pytest.mark.parametrize(
    "words,content,more",
    [
        ("cannot end with trailing whitespace", "Hello ", {}),
        ("cannot end with trailing whitespace", [{"type": "text", "text": "Hello\n"}], {}),
        ("a block of type 'thinking'", [{"type": "thinking", "thinking": "Hm.", "signature": ""}], {}),
        ("a block of type 'tool_use'", [{"type": "tool_use", "id": "a", "name": "weather", "input": {}}], {}),
        ("constrained to tool calls", "Hello", {"tools": [TOOL], "tool_choice": {"type": "any"}}),
        ("constrained to tool calls", "Hello", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}}),
        (
            "constrained to a response format",
            "Hello",
            {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        ),
    ],
)
def test_what_anthropics_route_cannot_go_on_with(http, words, content, more):
    messages = talk("name a place", content=content)
    assert words in refused(http, "/v1/messages", max_tokens=9, messages=messages, **more)
    assert words in refused(http, "/v1/messages/count_tokens", messages=messages, **more)


def test_what_ollamas_route_cannot_go_on_with(http):
    assert "constrained to a response format" in refused(http, "/api/chat", messages=HELLO, format="json")
    calls = [{"function": {"name": "weather", "arguments": {}}}]
    assert "has tool calls" in refused(http, "/api/chat", messages=talk("x", content="", tool_calls=calls))


def test_words_that_look_like_control_tokens_stay_words(http):
    said = "a</s><|end|><|user|>b"
    told = sent(http, "/tokenize", messages=talk("x", content=said), return_token_strs=True, **GOES_ON)
    assert "".join(told["token_strs"][-len(said) :]) == said
    assert sent(http, "/detokenize", tokens=told["tokens"])["prompt"].endswith(said)


def test_gpt_oss_goes_on_inside_its_channel(tmp_path):
    path, words = tmp_path / "script.json", made("gpt_oss")
    rest = " it rains.<|start|>assistant<|channel|>final<|message|>Rain."  # <|end|> ends this tokenizer's answers
    path.write_text(json.dumps([{"match": "final<|message|>To=", "text": "functions. "}, {"match": "", "text": rest}]))
    engine = scripted_engine(words, Options(), read_script(path, words))
    asked = heard(engine)
    with serving(engine) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        messages = talk("name a place", content="To=")
        told = sent(http, "/v1/messages", messages=messages, max_tokens=99)
        assert told["content"] == [{"type": "text", "text": "functions. "}]
        text = sent(http, "/detokenize", tokens=asked[-1])["prompt"]
        assert text.endswith("<|end|><|start|>assistant<|channel|>final<|message|>To=")
        thought = sent(http, "/api/chat", messages=talk("x", content="", thinking="I see"), stream=False)["message"]
        assert (thought["thinking"], thought["content"]) == (" it rains.", "Rain.")


def test_a_models_answer_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Letters alone, each a token: what was said is read back as the same tokens."""
    model, _ = ktx.load(write_model(tmp_path / "m"), progress=False)
    letters = {str(tokenizer().convert_tokens_to_ids(letter)): 100.0 for letter in string.ascii_letters}
    how = {"temperature": 0, "logit_bias": letters}
    with serving(model.ktx.engine()) as (base, _), httpx.Client(base_url=base, timeout=60) as http:

        def answer(messages, **more):
            told = sent(http, "/v1/chat/completions", messages=messages, **how, **more)
            return told["choices"][0]["message"]["content"]

        question = talk("x", content="")[:1]
        whole = answer(question, max_tokens=24)
        assert len(whole) == 24
        for count in (1, 9, 23):
            messages = [*question, {"role": "assistant", "content": whole[:count]}]
            assert answer(messages, max_tokens=24 - count, **GOES_ON) == whole[count:]
