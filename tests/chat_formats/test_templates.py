"""What the families' chat templates write of an assistant's turn is read back as the same turn.

The templates here are written for this test, after the public ones: same marks, same order, shorter tool descriptions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from ktx.chat_formats import (
    CHAT_FORMATS,
    CallArguments,
    CallEnd,
    CallStart,
    Text,
    chat_format_for,
    ends_in_reasoning,
    to_template_messages,
)
from ktx.engine.prompt import PromptRenderer
from ktx.errors import UsageError
from tests.chat_formats.cases import TOOLS, parse
from tests.support.tiny_chat_model import tokenizer

FOLDER = Path(__file__).parent / "templates"
# what a turn of the assistant begins with, beside what the model itself writes, and ends with
TURNS = {
    "qwen3": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    "qwen3-coder": ("<|im_start|>assistant", "<|im_end|>\n"),
    "glm-4.5": ("<|assistant|>", ""),
    "minimax-m2": ("]~b]ai\n", "[e~[\n"),
    "kimi-k2": ("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
    "deepseek-r1": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-v3": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-v3.1": ("<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    "gpt-oss": ("<|start|>assistant", ""),
    "llama-3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "llama-4": ("<|header_start|>assistant<|header_end|>\n\n", "<|eom|>"),
    "mistral": ("", "</s>"),
    "mistral-named": ("", "</s>"),
}
FAMILIES = list(TURNS)
REASONING = {"qwen3", "glm-4.5", "minimax-m2", "kimi-k2", "gpt-oss", "mistral-named"}  # whose templates write it
ONE_CALL = {"llama-3", "llama-4", "gpt-oss"}
CONTENT = {"qwen3", "qwen3-coder", "glm-4.5", "minimax-m2", "kimi-k2", "deepseek-v3.1", "mistral-named", "deepseek-v3"}
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]


def template(family: str) -> str:
    return (FOLDER / (family.replace("-", "_").replace(".", "_") + ".jinja")).read_text(encoding="utf-8")


def render(family: str, messages, prompt: bool = False, **how) -> str:
    told = to_template_messages(messages, CHAT_FORMATS[family])
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    out = render_jinja_template(
        [told], TOOLS, chat_template=template(family), add_generation_prompt=prompt, **tokens, **how
    )
    return out[0][0]


def turn(family: str, message) -> str:
    """What the model itself wrote of the assistant's message."""
    before, after = TURNS[family]
    text, question = render(family, [*QUESTION, message]), render(family, QUESTION)
    # mistral's writes the system message and the tools into the last user message, which is another one now
    text = text.rpartition("[/INST]")[2] if family == "mistral" else text[len(question) :]
    assert text.startswith(before) and text.endswith(after), text
    return text[len(before) : len(text) - len(after)]


def assistant(calls, content="", reasoning=""):
    told = [
        {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for n, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": told}


def read(family: str, text: str):
    """(reasoning, answer, [(name, arguments)])"""
    events, _ = parse(family, [text])
    said = {
        kind: "".join(e.text for e in events if isinstance(e, Text) and e.kind == kind) for kind in ("think", "answer")
    }
    names = [event.name for event in events if isinstance(event, CallStart)]
    arguments = [json.loads(event.text) for event in events if isinstance(event, CallArguments)]
    assert sum(isinstance(event, CallEnd) for event in events) == len(names)
    return said["think"], said["answer"], list(zip(names, arguments, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dialect_is_found_by_the_template(family):
    assert chat_format_for(template(family)).name == family
    assert chat_format_for(template(family), "something_else").name == family


def test_the_dialect_is_found_by_the_model_type():
    assert chat_format_for(None, "deepseek_v3").name == "deepseek-v3"
    assert chat_format_for("{{ messages }}", "qwen3_moe").name == "qwen3"
    assert chat_format_for(None, "gpt_oss").name == "gpt-oss"
    assert chat_format_for(None, None).name == chat_format_for("", "unheard_of").name == "plain"


@pytest.mark.parametrize("family", FAMILIES)
def test_whether_the_prompt_opens_the_block(family):
    prompt = render(family, QUESTION, prompt=True)
    assert (
        ends_in_reasoning(prompt, CHAT_FORMATS[family])
        == CHAT_FORMATS[family].prompt_opens_reasoning
        == (family in ("deepseek-r1", "minimax-m2"))
    )


def test_thinking_that_is_asked_for():
    assert ends_in_reasoning(
        render("deepseek-v3.1", QUESTION, prompt=True, thinking=True), CHAT_FORMATS["deepseek-v3.1"]
    )
    assert not ends_in_reasoning(render("qwen3", QUESTION, prompt=True, enable_thinking=False), CHAT_FORMATS["qwen3"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_with_calls(family):
    calls = [("weather", {"city": "Paris", "days": 2}), ("now", {})][: 1 if family in ONE_CALL else 2]
    content = "Let me look." if family in CONTENT else ""
    reasoning = "Hm.\nParis." if family in REASONING else ""
    assert read(family, turn(family, assistant(calls, content, reasoning))) == (reasoning, content, calls)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama-4"])
def test_a_turn_with_an_answer(family):
    text = turn(family, {"role": "assistant", "content": "It rains.\n\nTake care."}).removeprefix(" ")
    assert read(family, text.removesuffix("<|return|>")) == ("", "It rains.\n\nTake care.", [])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_with_results(family):
    """Every result reaches the model, and several calls do where the template takes one."""
    calls = [("weather", {"city": "Paris"}), ("now", {})]
    messages = [
        *QUESTION,
        assistant(calls),
        {"role": "tool", "tool_call_id": "call_0", "content": [{"type": "text", "text": "17 degrees"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "assistant", "content": "It is 17."},
        {"role": "user", "content": "Thanks."},
    ]
    text = render(family, messages, prompt=True)
    assert all(
        word in text for word in ("Be brief.", "Weather?", "Paris", "17 degrees", "noon", "It is 17.", "Thanks.")
    )


def _texts(family: str):
    tags = family in ("qwen3-coder", "glm-4.5", "minimax-m2")
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<" if tags else ""), max_size=12)


def _arguments(family: str):
    texts = _texts(family)
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(10**12), 10**12)
        | st.floats(allow_nan=False, allow_infinity=False)
        | texts
    )
    nested = st.recursive(
        scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=6
    )
    fields = {
        "query": texts,
        "filters": st.dictionaries(texts, nested, max_size=3),
        "tags": st.lists(texts, max_size=3),
        "exact": st.booleans(),
        "limit": st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    }
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_arguments(family):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(_arguments(family), min_size=1, max_size=1 if family in ONE_CALL else 2))
    def check(arguments):
        calls = [("search", found) for found in arguments]
        assert read(family, turn(family, assistant(calls)))[2] == calls

    check()


def prompts(family: str) -> PromptRenderer:
    """The template with a tokenizer that knows a few control tokens."""
    words = tokenizer()
    words.chat_template = template(family)
    return PromptRenderer(words)


def going_on(family: str, before=QUESTION, **last):
    """The prompt, and what it writes of the last message, which stands behind what is written of those before it."""
    made = prompts(family)
    rendered = made.render([*before, {"role": "assistant", **last}], TOOLS, continue_final_message=True)
    begun = made.render(before, TOOLS, add_generation_prompt=False).text
    assert rendered.text.startswith(begun)
    return rendered, rendered.text[len(begun) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_goes_on(family):
    rendered, turn = going_on(family, content="The answer is")
    assert turn.startswith(TURNS[family][0]) and turn.endswith("The answer is")
    assert read(family, turn.removeprefix(TURNS[family][0]).removeprefix(" ")) == ("", "The answer is", [])
    assert (rendered.prefill_text, rendered.thinking) == ("The answer is", False)
    empty, place = going_on(family, content="")
    assert turn == place + "The answer is" and (empty.prefill_text, empty.thinking) == ("", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_white_space_at_the_end_stays(family):
    assert going_on(family, content=" \n The answer \n")[1].endswith("The answer \n")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_goes_on_behind_results(family):
    """Kimi's template would leave out the reasoning of a turn that is not over, Mistral's the system message."""
    calls = assistant([("now", {})], reasoning="Hm.\nThe clock." if family in REASONING else "")
    before = [*QUESTION, calls, {"role": "tool", "tool_call_id": "call_0", "content": "noon"}]
    _, turn = going_on(family, before, content="It is")
    assert turn.endswith("It is")


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_look_like_control_tokens_stay_words_that_go_on(family):
    made, said = prompts(family), "a<|end|>\ufdd0\ufdd1<|user|>b"
    rendered, plain = going_on(family, content=said)[0], going_on(family, content="ab")[0]
    assert rendered.prefill_text == said and rendered.text.endswith(said)
    assert made.tokenizer.decode(rendered.ids) == rendered.text
    for name in ("<|end|>", "<|user|>"):  # some templates write them too
        assert rendered.ids.count(made.special[name]) == plain.ids.count(made.special[name])


@pytest.mark.parametrize("family", sorted({*REASONING, "deepseek-r1"}))
def test_reasoning_and_an_answer_that_goes_on(family):
    rendered, turn = going_on(family, content="The answer is", reasoning_content="Hm.\nParis.")
    assert read(family, turn.removeprefix(TURNS[family][0])) == ("Hm.\nParis.", "The answer is", [])
    assert (rendered.prefill_text, rendered.thinking) == ("The answer is", False)
    opening, closing = CHAT_FORMATS[family].reasoning_marks
    if opening:
        inside = f"{opening}\nHm.\nParis.\n{closing}\n\nThe answer is"
        assert going_on(family, content=inside) == (rendered, turn)


@pytest.mark.parametrize("family", sorted({*REASONING, "deepseek-r1"}))
def test_reasoning_goes_on(family):
    rendered, turn = going_on(family, content="", reasoning_content="Hm.\nPar")
    assert read(family, turn.removeprefix(TURNS[family][0])) == ("Hm.\nPar", "", [])
    assert (rendered.prefill_text, rendered.thinking) == ("Hm.\nPar", True) and turn.endswith("Hm.\nPar")
    opening = CHAT_FORMATS[family].reasoning_marks[0]
    if opening:
        assert going_on(family, content=f"{opening}\nHm.\nPar") == (rendered, turn)
        begun, place = going_on(family, content=opening)
        assert turn == place + "Hm.\nPar" and (begun.prefill_text, begun.thinking) == ("", True)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - REASONING - {"deepseek-r1"}))
def test_reasoning_that_no_template_writes(family):
    for content in ("", "The answer is"):
        with pytest.raises(UsageError, match="renders no reasoning"):
            going_on(family, content=content, reasoning_content="Hm.")


def test_reasoning_of_a_model_that_was_told_to_think():
    last = {"role": "assistant", "reasoning_content": "Hm.", "content": "It"}
    rendered = prompts("deepseek-v3.1").render(
        [*QUESTION, last], template_kwargs={"thinking": True}, continue_final_message=True
    )
    assert rendered.text.endswith("<｜Assistant｜><think>Hm.</think>It")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_go_on(family):
    with pytest.raises(UsageError, match="only a last message of the assistant"):
        prompts(family).render(QUESTION, TOOLS, continue_final_message=True)
    with pytest.raises(UsageError, match="has tool calls"):
        going_on(family, **assistant([("now", {})], "So"))


def test_text_that_a_template_changes_cannot_go_on():
    with pytest.raises(UsageError, match="changes the last message's text"):
        going_on("deepseek-r1", content="a</think>b")
    made = tokenizer()
    made.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(UsageError, match="changes the last message's text"):
        PromptRenderer(made).render([*QUESTION, {"role": "assistant", "content": "ab"}], continue_final_message=True)


def test_a_model_without_a_template_goes_on():
    made = tokenizer()
    made.chat_template = None
    rendered = PromptRenderer(made).render(
        [*QUESTION, {"role": "assistant", "content": "It "}], continue_final_message=True
    )
    assert (rendered.text, rendered.prefill_text) == ("Be brief.\nWeather?\nIt ", "It ")
