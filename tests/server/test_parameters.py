"""The server gives parameters of other servers' clients their meaning.

Those without a meaning are named in a header, the rest is refused by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from ktx.engine.engine import Options
from ktx.engine.sampler import Sampler, SamplingParams
from ktx.server.protocol import ChatCompletionRequest, CompletionRequest, parameters
from ktx.server.protocol.ollama import OllamaOptions
from ktx.server.protocol.parameters import ALIASES, IGNORED, IGNORED_HEADER, PREFIXES, REFUSED
from tests.server.conftest import NAME, QWEN, refused, sent, serving
from tests.support.scripted_engine import read_script, scripted_engine
from tests.support.tiny_chat_model import tokenizer

HELLO = [{"role": "user", "content": "greet"}]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ROUTES = {
    CHAT: {"messages": HELLO, "max_tokens": 4},
    TEXT: {"prompt": "greet", "max_tokens": 4},
    "/v1/responses": {"input": "greet", "max_output_tokens": 16},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
    "/api/chat": {"messages": HELLO, "stream": False},
    "/tokenize": {"messages": HELLO},
}


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """A server whose answers hold special tokens, and end with another one than the vocabulary's end."""
    words = tokenizer()
    words.chat_template = QWEN
    ids = words.convert_tokens_to_ids
    said = [ids("<|user|>"), *words("Hi")["input_ids"], ids("<|system|>"), *words(" you")["input_ids"]]
    path = tmp_path_factory.mktemp("script") / "script.json"
    script = [
        {"match": "mark", "ids": said},
        {"match": "reason", "text": "<think>Hm.</think>Yes."},
        {"match": "greet", "text": "Good day, to you!"},
    ]
    path.write_text(json.dumps(script))
    with (
        serving(scripted_engine(words, Options(), read_script(path, words))) as (base, served),
        httpx.Client(base_url=base, timeout=30) as http,
    ):
        yield http, served, words


def asked(http, path, **more):
    answer = http.post(path, json={"model": NAME, **ROUTES[path], **more})
    return answer.status_code, answer.headers.get(IGNORED_HEADER, ""), answer.text


def texts(http, **more):
    """The answer by every way it can be asked for, which must all say the same; and its tokens."""
    found, counts = set(), set()
    for path, words in ((CHAT, {"messages": [{"role": "user", "content": more.pop("text")}]}),):
        body = {"model": NAME, "temperature": 0, **words, **more}
        whole = sent(http, path, **{key: value for key, value in body.items() if key != "model"})
        found.add(whole["choices"][0]["message"]["content"])
        counts.add(whole["usage"]["completion_tokens"])
        streamed = http.post(path, json=body | {"stream": True}).text
        chunks = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: {")]
        found.add("".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]))
    assert len(found) == 1
    return found.pop(), counts.pop()


# ---- ignored and refused


@pytest.mark.parametrize("path", ROUTES)
def test_what_changes_no_answer_is_named_in_a_header(special, path):
    http, _, _ = special
    status, header, text = asked(http, path, cache_prompt=True, id_slot=3, priority=None, **{"speculative.n_max": 4})
    assert (status, header) == (200, "cache_prompt, id_slot, speculative.*"), text
    assert asked(http, path)[1] == ""


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_every_ignored_parameter(special, path):
    http, _, _ = special
    typed = {"metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low", "store": True}
    typed |= {"prompt_cache_retention": "24h", "prompt_cache_options": {}}
    kind = ChatCompletionRequest if path == CHAT else CompletionRequest
    for name in IGNORED:
        value = typed.get(name, "x" if name in kind.model_fields else 1)
        assert asked(http, path, **{name: value})[:2] == (200, name), name


@pytest.mark.parametrize("path", ROUTES)
def test_every_refused_parameter(special, path):
    http, _, _ = special
    for name, row in REFUSED.items():
        for value in (None, *row.neutral_values):
            assert asked(http, path, **{name: value})[:2] == (200, ""), (name, value)
        status, _, text = asked(http, path, **{name: 7})
        assert status == 400 and f"{name}: this server does not support it" in text, name
        if path == CHAT:
            assert json.loads(text)["error"]["param"] == name


def test_no_name_has_two_answers():
    assert not set(IGNORED) & set(REFUSED) and not set(ALIASES) & (set(IGNORED) | set(REFUSED))
    for kind in (ChatCompletionRequest, CompletionRequest, OllamaOptions):
        assert not set(kind.model_fields) & set(REFUSED)


@pytest.mark.parametrize("name", ["tempurature", "x-evil\r\nset-cookie: a", "speculative", "__class__"])
def test_an_unknown_name_is_refused(special, name):
    http, _, _ = special
    for path in ROUTES:
        status, header, text = asked(http, path, **{name: 1})
        assert status == 400 and header == "" and "no such field" in text
    wrong = http.post("/api/chat", json={"model": NAME, "messages": HELLO, "options": {name: 1}})
    assert wrong.status_code == 400 and "no such field" in wrong.text


def test_a_header_never_holds_a_clients_words(special):
    http, _, _ = special
    status, header, _ = asked(http, CHAT, **{"speculative.\r\nset-cookie: a": 1})
    assert (status, header) == (200, "speculative.*")


def test_ollamas_options(special):
    http, _, _ = special
    given = {"num_ctx": 8192, "num_gpu": 99, "temperature": 0.0, "num_predict": 3.0, "top_k": 1.0, "mirostat": 0}
    answer = http.post("/api/chat", json={"model": NAME, "messages": HELLO, "stream": False, "options": given})
    assert answer.headers[IGNORED_HEADER] == "num_ctx, num_gpu" and answer.json()["eval_count"] == 3
    for more in ({"options": {"max_tokens": 2.0}}, {"max_tokens": 2.0}, {"options": {"num_predict": 2}}):
        assert sent(http, "/api/generate", prompt="greet", stream=False, **more)["eval_count"] == 2
    assert "mirostat: this server does not" in refused(http, "/api/chat", messages=HELLO, options={"mirostat": 2})
    assert "8.5" not in refused(http, "/api/chat", messages=HELLO, options={"num_predict": 8.5})


def test_a_stream_has_the_header_too(special):
    http, _, _ = special
    for path in (CHAT, TEXT, "/v1/messages", "/v1/responses", "/api/chat"):
        assert asked(http, path, cache_prompt=True, stream=True)[:2] == (200, "cache_prompt")


def test_a_page_of_another_origin_may_read_the_header(special):
    http, _, _ = special
    host = f"http://{http.base_url.host}:{http.base_url.port}"
    answer = http.post(CHAT, json={"model": NAME, **ROUTES[CHAT], "id_slot": 1}, headers={"origin": host})
    assert IGNORED_HEADER in answer.headers["access-control-expose-headers"]


# ---- numbers


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/messages"])
def test_a_whole_number_with_a_point_is_that_number(special, path):
    http, _, _ = special
    assert asked(http, path, max_tokens=2.0, top_k=1.0)[0] == 200
    assert asked(http, path, max_tokens=2.5)[0] == asked(http, path, max_tokens="2")[0] == 400
    assert asked(http, path, max_tokens=1e300)[0] == 400


# ---- with a meaning


def test_nothing_ends_an_answer_before_min_tokens(special):
    http, _, words = special
    assert texts(http, text="greet") == ("Good day, to you!", 17)
    for more in ({"min_tokens": 20}, {"min_new_tokens": 20.0}):
        text, count = texts(http, text="greet", **more)
        assert text.startswith("Good day, to you!") and count == 20
    assert texts(http, text="greet", min_tokens=17)[1] == 17
    assert texts(http, text="greet", stop=["day"])[0] == "Good "
    assert texts(http, text="greet", stop=["day", "y"], min_tokens=9)[0] == "Good day, to "
    end = words.convert_tokens_to_ids("d")
    assert texts(http, text="greet", stop_token_ids=[end])[0] == "Goo"
    assert texts(http, text="greet", stop_token_ids=[end], min_tokens=4) == ("Goo ", 5)  # the next one ends it
    assert "min_tokens is 9, but the answer may have at most 4 tokens" in refused(
        http, CHAT, messages=HELLO, min_tokens=9, max_tokens=4
    )
    guided = texts(http, text="greet", guided_choice=["ab"], min_tokens=9, max_tokens=20)
    assert guided[0] == "ab"  # the grammar has the last word


def test_special_tokens_are_shown_when_asked_for(special):
    http, _, _ = special
    shown = "<|user|>Hi<|system|> you"
    assert texts(http, text="mark")[0] == texts(http, text="mark", skip_special_tokens=True)[0] == "Hi you"
    assert texts(http, text="mark", skip_special_tokens=False)[0] == shown
    assert texts(http, text="mark", stop=["<|system|>"])[0] == "Hi"
    for more, text in (({}, "Hi you"), ({"skip_special_tokens": False}, shown)):
        made = sent(http, TEXT, prompt="mark", temperature=0, max_tokens=16, logprobs=0, **more)["choices"][0]
        assert made["text"] == text and "<|system|>" in made["logprobs"]["tokens"]
    message = sent(http, CHAT, messages=[{"role": "user", "content": "reason"}])["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (
        "Hm.",
        "Yes.",
    )  # a mark that is a special token is read


def test_what_ends_an_answer_is_shown_when_asked_for(special):
    http, _, words = special
    assert texts(http, text="greet", stop=["day"], include_stop_str_in_output=True)[0] == "Good day"
    assert texts(http, text="greet", stop=["to", "o y"], no_stop_trim=True)[0] == "Good day, to"
    end = words.convert_tokens_to_ids("d")
    assert texts(http, text="greet", stop_token_ids=[end], include_stop_str_in_output=True)[0] == "Good"
    assert texts(http, text="greet", include_stop_str_in_output=True)[0] == "Good day, to you!"
    both = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert texts(http, text="greet", **both)[0] == "Good day, to you!<|end|>"


def test_thinking_goes_to_the_template(special):
    http, _served, _ = special
    plain, off = (sent(http, "/tokenize", messages=HELLO, **more)["count"] for more in ({}, {"enable_thinking": False}))
    assert off > plain  # QWEN closes the block at once
    ways = [
        ({"enable_thinking": False}, off),
        ({"enable_thinking": True}, plain),
        ({"thinking": {"type": "disabled"}}, off),
        ({"thinking": {"type": "enabled"}}, plain),
        ({"thinking": False}, off),
        ({"reasoning_effort": "none"}, off),
        ({"reasoning": {"effort": "none"}}, off),
        ({"reasoning": {"enabled": False}}, off),
        ({"chat_template_kwargs": {"enable_thinking": False}}, off),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, off),
    ]
    for more, count in ways:
        assert sent(http, CHAT, messages=HELLO, max_tokens=1, **more)["usage"]["prompt_tokens"] == count, more
    assert "bool" in refused(http, CHAT, messages=HELLO, enable_thinking="no")
    hidden = sent(http, CHAT, messages=[{"role": "user", "content": "reason"}], reasoning={"exclude": True})
    assert "reasoning_content" not in hidden["choices"][0]["message"]


def test_a_prompt_is_cut_from_its_beginning(special):
    http, _, _words = special
    for count, usage in ((3, 3), (1000, 5), (-1, 5)):
        made = sent(http, TEXT, prompt="greet", truncate_prompt_tokens=count, max_tokens=1, echo=True)
        assert made["usage"]["prompt_tokens"] == usage and made["choices"][0]["text"].startswith("greet"[-usage:])
    assert sent(http, CHAT, messages=HELLO, truncate_prompt_tokens=4, max_tokens=1)["usage"]["prompt_tokens"] == 4
    long = "x" * 40_000
    assert "context" in refused(http, TEXT, prompt=long, max_tokens=8)
    made = sent(http, TEXT, prompt=long, max_tokens=8, truncate_prompt_tokens=-1)
    assert made["usage"]["prompt_tokens"] == (1 << 15) - 8
    assert "empty" in refused(http, TEXT, prompt="greet", truncate_prompt_tokens=0)


def test_tokens_by_their_ids(special):
    http, _, words = special
    ids = words("Good")["input_ids"]
    made = sent(http, TEXT, prompt="greet", max_tokens=4, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
    assert made["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert list(made["logprobs"]["top_logprobs"][0]) == [f"token_id:{ids[0]}"]
    made = sent(http, CHAT, messages=HELLO, max_tokens=1, logprobs=True, return_tokens_as_token_ids=True)["choices"][0]
    assert made["logprobs"]["content"][0]["token"] == f"token_id:{ids[0]}"


def test_other_names(special):
    http, _, _ = special
    assert texts(http, text="greet", n_predict=4) == ("Good", 4)
    assert texts(http, text="greet", n_predict=-1)[1] == 17
    assert texts(http, text="greet", regex="[0-9]{3}", max_tokens=9, temperature=0)[0].isdigit()
    schema = {"type": "integer", "minimum": 5, "maximum": 5}
    assert texts(http, text="greet", json_schema=schema, max_tokens=9, temperature=0)[0] == "5"
    assert "have different values" in refused(http, CHAT, messages=HELLO, n_predict=4, max_tokens=5)
    assert texts(http, text="greet", repeat_penalty=1.0, repeat_last_n=64)[0] == "Good day, to you!"


def test_penalties_look_back_as_far_as_asked():
    import torch

    logits = torch.tensor([1.0, 1.1, 1.05, 0.0])

    def said(count, **more):
        chooser = Sampler(SamplingParams(repetition_penalty=2.0, **more), [3, 3])
        return [chooser.sample(logits).token for _ in range(count)]

    assert said(4) == [1, 2, 0, 1]
    assert said(4, repeat_last_n=-1) == [1, 2, 0, 1]
    assert said(4, repeat_last_n=1) == [1, 2, 1, 2]
    assert said(4, repeat_last_n=2) == [1, 2, 0, 1]
    assert said(3, repeat_last_n=0) == [1, 1, 1]
    counted = Sampler(SamplingParams(frequency_penalty=0.2, repeat_last_n=2), [1])
    assert [counted.sample(logits).token for _ in range(3)] == [1, 2, 0]  # the prompt is not counted


# ---- tools


def test_a_template_that_writes_no_tools_says_so(caplog):
    plain = tokenizer()
    with (
        caplog.at_level("WARNING", "ktx.server"),
        serving(scripted_engine(plain, Options(), read_script(None, plain))) as (base, _),
        httpx.Client(base_url=base, timeout=30) as http,
    ):
        own = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
        of_responses = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
        for path, tools in (
            (CHAT, TOOLS),
            ("/v1/messages", [own]),
            ("/api/chat", TOOLS),
            ("/v1/responses", [of_responses]),
            ("/tokenize", TOOLS),
        ):
            assert asked(http, path, tools=tools)[:2] == (200, "tools"), path
        assert asked(http, CHAT, tools=TOOLS, cache_prompt=True, stream=True)[1] == "cache_prompt, tools"
        assert asked(http, CHAT, tools=TOOLS, tool_choice="none")[1] == ""
        assert asked(http, CHAT)[1] == ""
    told = [record.getMessage() for record in caplog.records if "does not render tools" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith(NAME)


def test_a_template_that_writes_tools_says_nothing(special):
    http, served, _ = special
    assert asked(http, CHAT, tools=TOOLS)[:2] == (200, "")
    assert not any("tools" in words for words in served.model.warnings_sent)


def test_parameters_are_of_their_own_request(special):
    """Notes of one request never reach another's header."""
    http, _, _ = special
    for _ in range(3):
        assert asked(http, CHAT, id_slot=1)[1] == "id_slot"
        assert asked(http, CHAT)[1] == ""
    assert parameters.IGNORED_BY_REQUEST.get() is None


def test_the_page_shows_the_tables():
    page = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    page = page.partition("## Other servers' parameters")[2].partition("\n## ")[0]
    rows = {
        tuple(re.findall(r"`([^`]+)`", names)): why for names, why in re.findall(r"^\| (`.*?) \| (.*) \|$", page, re.M)
    }
    shown = {name: why for names, why in rows.items() for name in names}
    table = IGNORED | {f"{prefix}*": why for prefix, why in PREFIXES.items()}
    assert shown == table | {name: row.reason for name, row in REFUSED.items()}
    named = set(re.findall(r"`([a-z_]+)`", page.partition("| ignored")[0]))
    assert set(ALIASES) <= named and named - set(ALIASES) - {"effort", "enabled", "exclude", "n", "false"} <= {
        *ChatCompletionRequest.model_fields,
        *CompletionRequest.model_fields,
        *OllamaOptions.model_fields,
    }
