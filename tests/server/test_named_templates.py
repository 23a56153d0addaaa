"""Chat templates: several by name, as transformers chooses among them; broken ones; and such as write no tools."""

from __future__ import annotations

import httpx
import pytest

from ktx.__main__ import main
from ktx.engine.engine import Options
from ktx.engine.prompt import PromptRenderer
from ktx.engine.template import named_templates
from ktx.errors import BadFile, UsageError
from tests.server.conftest import NAME, refused, sent, serving
from tests.support.scripted_engine import read_script, scripted_engine
from tests.support.tiny_chat_model import TEMPLATE, tokenizer

TOOL_USE = "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}" + TEMPLATE
SHORT = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
NAMED = {"default": TEMPLATE, "tool_use": TOOL_USE, "short": SHORT}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
HELLO = [{"role": "user", "content": "hi"}]


def words(template):
    made = tokenizer()
    made.chat_template = template
    return made


def serves(template):
    made = words(template)
    return serving(scripted_engine(made, Options(), read_script(None, made)))


def prompt(template, tools=None, name=None):
    return PromptRenderer(words(template)).render(HELLO, tools or [], template_name=name).ids


def right(template, tools=None, name=None):
    """What transformers makes of it."""
    return words(template).apply_chat_template(
        HELLO, tools=tools, chat_template=name, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", [None, "default", "tool_use", "short"])
@pytest.mark.parametrize("form", ["by name", "a list"])
def test_of_several_the_one_that_transformers_chooses(form, name, tools):
    given = NAMED if form == "by name" else [{"name": key, "template": text} for key, text in NAMED.items()]
    assert prompt(given, tools, name) == right(NAMED, tools, name)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_saved_and_read_again(tmp_path, tools):
    from transformers import AutoTokenizer

    words(NAMED).save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert PromptRenderer(read).render(HELLO, tools or []).ids == right(NAMED, tools)


def test_without_a_default_a_name_is_needed():
    only = {"tool_use": TOOL_USE}
    assert prompt(only, TOOLS) == right(only, TOOLS)
    assert prompt(only, name="tool_use") == right(only, name="tool_use")
    with pytest.raises(UsageError, match=r"no default: choose one with chat_template \(tool_use\)"):
        prompt(only)
    with pytest.raises(
        UsageError, match=r"this model has no chat_template 'toll_use' \(it has: tool_use\).*did you mean"
    ):
        prompt(only, name="toll_use")
    with pytest.raises(BadFile, match="of type int"):
        named_templates(7)
    with pytest.raises(BadFile, match="of type list"):
        named_templates([{"name": "default"}])


def test_over_http_on_every_route():
    with serves(NAMED) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        for more, tools in (({}, None), ({"tools": TOOLS}, TOOLS), ({"chat_template": "short"}, None)):
            ids = right(NAMED, tools, more.get("chat_template"))
            assert sent(http, "/tokenize", messages=HELLO, **more)["tokens"] == ids
            chat = sent(http, "/v1/chat/completions", messages=HELLO, max_tokens=1, **more)
            assert chat["usage"]["prompt_tokens"] == len(ids)
            if "chat_template" not in more:
                told = sent(http, "/api/chat", messages=HELLO, stream=False, options={"num_predict": 1}, **more)
                assert told["prompt_eval_count"] == len(ids)
        asked = sent(http, "/v1/messages", messages=HELLO, max_tokens=1)
        assert asked["usage"]["input_tokens"] == len(right(NAMED))
        tool = {"name": "now", "description": "", "input_schema": {"type": "object", "properties": {}}}
        assert sent(http, "/v1/messages/count_tokens", messages=HELLO, tools=[tool])["input_tokens"] > len(right(NAMED))
        told = sent(http, "/v1/responses", input="hi", max_output_tokens=1)
        assert told["usage"]["input_tokens"] == len(right(NAMED))
        assert http.get("/tokenizer_info").json()["chat_template"] == TEMPLATE
        assert sent(http, "/api/show")["template"] == TEMPLATE
        for wrong in ("{{ messages }}", "tool"):  # a template itself never comes from a request
            assert "(it has: default, short, tool_use)" in refused(
                http, "/v1/chat/completions", messages=HELLO, chat_template=wrong
            )


BROKEN = [
    ("{% for m in messages %}{{ m.content", "line 1: is not a valid Jinja template"),
    ("{{ 1 }}\n{% if messages %}\n{{ messages[0].content }}", "line 3: is not a valid Jinja template"),
    ("{{ messages[0].content | shout }}", "No filter named 'shout'"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}\n{{ date_of() }}", "line 2: cannot render a conversation"),
    ("{{ messages[0].content + 1 }}", "cannot render a conversation: TypeError"),
    ("You are a helpful assistant.", "does not render the user's message"),
    ("{{ messages | length }}", "does not render the user's message"),
]


@pytest.mark.parametrize("template,told", BROKEN)
def test_a_broken_template_is_refused_at_the_start(template, told, tmp_path, capsys):
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    assert main(["serve", "--port", "0", "--chat_template", str(file)]) == 4
    error = capsys.readouterr().err
    assert told in error and f"--chat-template {file}" in error and error.count("\n") == 1
    with pytest.raises(BadFile) as own:
        PromptRenderer(words(template))
    assert told in str(own.value) and str(own.value).startswith("the tokenizer's chat template")
    assert PromptRenderer(words(template), template=TEMPLATE).render(HELLO).ids == right(TEMPLATE)  # the remedy


@pytest.mark.parametrize(
    "data,told",
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"{{ messages[0].content }}\n\xff", "line 2: is not valid UTF-8"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_file_that_is_no_text_is_refused_at_the_start(data, told, tmp_path, capsys):
    file = tmp_path / "chat.jinja"
    file.mkdir() if data is None else file.write_bytes(data)
    assert main(["serve", "--port", "0", "--chat_template", str(file)]) == 4
    assert told in capsys.readouterr().err


def test_a_broken_one_among_several():
    with pytest.raises(BadFile, match=r"chat template \(tool_use\), line 1: is not a valid Jinja"):
        PromptRenderer(words(NAMED | {"tool_use": "{% if"}))


def test_a_template_that_refuses_some_messages_is_not_broken():
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + TEMPLATE
    with pytest.raises(UsageError, match="a system message first"):
        PromptRenderer(words(picky)).render(HELLO)
    assert PromptRenderer(words(picky)).render([{"role": "system", "content": "s"}, *HELLO]).ids


def test_the_model_with_a_broken_template_of_its_own_ends_the_server(tmp_path, capsys):
    from tests.support.tiny_chat_model import write_model

    folder = write_model(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content")
    assert main(["serve", "--port", "0", "--model", str(folder)]) == 4
    assert f"{folder}: the tokenizer's chat template, line 1: is not a valid Jinja template" in capsys.readouterr().err
    assert main(["chat", "--model", str(folder), "--weights", str(folder / "model.gguf"), "-p", "hi"]) == 4
    assert "the tokenizer's chat template, line 1: is not a valid Jinja template" in capsys.readouterr().err


def test_a_single_template_is_the_default():
    with serves(TEMPLATE) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        assert sent(http, "/tokenize", messages=HELLO, chat_template="default")["tokens"] == right(TEMPLATE)
        assert http.post("/tokenize", json={"model": NAME, "messages": HELLO, "chat_template": "x"}).status_code == 400
