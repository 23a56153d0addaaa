"""No text makes the parser fail, lose anything, or take long."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktx.chat_formats import CHAT_FORMATS, CallArguments, CallEnd, CallStart, Parser, Text, merge_events
from tests.chat_formats.cases import TOOLS, parse
from tests.support.call_samples import WRITINGS

MEGABYTE, PIECE = 1_000_000, 10_000


def marks(family: str) -> list[str]:
    dialect = CHAT_FORMATS[family]
    format = dialect.call_format
    found = [
        *dialect.reasoning_marks,
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "\\",
        ",",
        ":",
        "\n",
        " ",
        "(",
        ")",
        "=",
        "```json\n",
        "```",
    ]
    found += [
        '{"name": "now", "arguments": ',
        '{"name": "weather", ',
        '"parameters": {',
        "\n{",
        "now",
        "x",
        "1",
        "None",
    ]
    if format:
        found += [*format.starts, *format.ends, *format.sections, *format.separators, format.id_mark]
        found += [*format.tag_call, *format.tag_parameter, *format.pair_key, *format.pair_value, "<function=now>"]
        found += [
            "<parameter=city>",
            '<invoke name="now">',
            '<parameter name="city">',
            "<|message|>",
            " to=functions.f",
        ]
    if family in WRITINGS:
        found += [WRITINGS[family].calls(("now", {})), WRITINGS[family].calls(("weather", {"city": "P"}))]
    return [mark for mark in found if mark]


@pytest.mark.parametrize("family", CHAT_FORMATS)
def test_any_text(family):
    """No exception, the same events however the text is cut, and every ended call is an object."""
    texts = st.lists(st.sampled_from(marks(family)) | st.text(max_size=3), max_size=14).map("".join)

    @settings(max_examples=150, deadline=None)
    @given(texts, st.booleans(), st.booleans())
    def check(text, thinking, cut):
        events, _ = parse(family, [text], thinking, cut=cut)
        assert parse(family, list(text), thinking, cut=cut)[0] == events
        ended = {event.index for event in events if isinstance(event, CallEnd)}
        started = [event.index for event in events if isinstance(event, CallStart)]
        assert started == list(range(len(started)))
        for index in ended:
            found = [event.text for event in events if isinstance(event, CallArguments) and event.index == index]
            assert isinstance(json.loads("".join(found)), dict)

    check()


def before(family: str, thinking: bool) -> str:
    """What a model writes before it thinks, or before it answers once it has thought."""
    if family == "gpt-oss":
        return f"<|channel|>{'analysis' if thinking else 'final'}<|message|>"
    opening, closing = CHAT_FORMATS[family].reasoning_marks
    return opening if thinking else f"{opening}Hm.{closing}"


@pytest.mark.parametrize("family", CHAT_FORMATS)
def test_any_text_that_goes_on(family):
    """The same events as behind the same words of the model's own, however the text is cut."""
    texts = st.lists(st.sampled_from(marks(family)) | st.text(max_size=3), max_size=14).map("".join)

    @settings(max_examples=150, deadline=None)
    @given(texts, st.booleans(), st.booleans())
    def check(text, thinking, cut):
        said, kind = "The answer is", "think" if thinking else "answer"
        events, open_call = parse(family, [text], thinking, cut=cut, said=said)
        assert parse(family, list(text), thinking, cut=cut, said=said) == (events, open_call)
        whole = parse(family, [before(family, thinking) + said + text], cut=cut)[0]
        own = whole if thinking or family == "gpt-oss" else whole[1:]
        assert own == merge_events([Text(said, kind), *events])

    check()


HOSTILE = {
    "letters": "a",
    "spaces": " ",
    "line breaks": "\n",
    "open tags": "<",
    "braces": "{",
    "lines of braces": "\n{",
    "lines of brackets": "\n[a(",
    "lines of names": '\n{"name": "x"',
    "brackets": "[",
    "commas": "[1,",
    "quotes": '"',
    "backslashes": "\\",
    "lists": "1, ",
    "objects": '{"a": [1, "x"]}, ',
    "fences": "```json\n",
    "think": "<think>\n</think>",
}


def hostile(family: str) -> dict[str, str]:
    """Repeated pieces, alone and inside the beginnings of calls."""
    w = WRITINGS.get(family)
    if w is None:
        return HOSTILE
    call = w.calls(("write", {"path": "x", "content": "MIDDLE"}))
    open_call = call[: call.index("MIDDLE")]
    name = call[: call.index("write")]
    found = {**HOSTILE, "calls": w.calls(("now", {})), "starts": open_call, "names": name}
    found |= {f"in a string: {title}": open_call + "\0" + text for title, text in HOSTILE.items()}
    found |= {f"as a name: {title}": name + "\0" + text for title, text in HOSTILE.items()}
    number = w.calls(("search", {"limit": 12345})).partition("12345")[0]
    found |= {f"as a number: {title}": number + "\0" + text for title, text in HOSTILE.items()}
    return found | {f"a mark again and again: {mark!r}": mark for mark in marks(family)}


def seconds(family: str, text: str, length: int, piece: int = PIECE) -> float:
    """Processor time for `length` characters, in pieces."""
    first, _, again = text.rpartition("\0")
    whole = first + again * (length // len(again))
    start = time.process_time()
    parser = Parser(CHAT_FORMATS[family], TOOLS)
    for at in range(0, len(whole), piece):
        parser.feed(whole[at : at + piece])
    parser.finish()
    return time.process_time() - start


LIMIT = 2.0  # seconds of a processor


def least(enough, *case):
    """Of up to three tries, until one took less than `enough`: a busy machine takes longer."""
    best = float("inf")
    for _ in range(3):
        best = min(best, seconds(*case))
        if best < enough:
            break
    return best


@pytest.mark.parametrize("family", CHAT_FORMATS)
def test_a_megabyte_takes_two_seconds(family):
    """Each text as a fifteenth of a megabyte in pieces of 10 KB, then the slowest of them whole, and as one piece."""
    texts = hostile(family)
    slow = {title: seconds(family, text, MEGABYTE // 15) for title, text in texts.items()}
    worst = max(slow, key=slow.__getitem__)
    assert least(LIMIT, family, texts[worst], MEGABYTE) < LIMIT, worst
    assert least(LIMIT / 5, family, texts[worst], MEGABYTE // 5, MEGABYTE) < LIMIT / 5, worst


@pytest.mark.parametrize("family", CHAT_FORMATS)
def test_single_characters_are_no_dearer_as_the_text_grows(family):
    """Fed character by character, a text costs a few microseconds each, however long the call or the text is."""
    titles = ("letters", "spaces", "in a string: letters", "in a string: backslashes", "in a string: spaces", "starts")
    for title in titles:
        text = hostile(family).get(title)
        if text is not None:
            assert least(1.0, family, text, 20_000, 1) < 1.0, title


@pytest.mark.parametrize("family", CHAT_FORMATS)
def test_plain_text_flows_at_once(family):
    """Nothing is held but what may be layout or become a mark."""
    parser, shown = Parser(CHAT_FORMATS[family], TOOLS), ""
    for character in "Hello, this is <b>text</b> [1] with {braces}.":
        shown += "".join(event.text for event in parser.feed(character) if isinstance(event, Text))
        parser.feed("")
    assert shown == "Hello, this is <b>text</b> [1] with {braces}."


@pytest.mark.parametrize("family", list(WRITINGS))
def test_arguments_flow_while_they_come(family):
    """A long string is told long before it ends."""
    w = WRITINGS[family]
    text = w.calls(("write", {"path": "p", "content": "word " * 100}))
    parser = Parser(CHAT_FORMATS[family], TOOLS)
    told = "".join(e.text for e in parser.feed(text[: text.index("word") + 50]) if isinstance(e, CallArguments))
    assert told.count("word") >= 9


def test_what_is_kept_of_broken_calls_is_exact():
    """Every character of a text without whole calls comes out again, between the layout."""
    text = 'a <tool_call>{"name": "now", "x": 1}</tool_call> b <tool_call>nothing <tool_call>{"name" c'
    events, _ = parse("qwen3", [text])
    assert events == [Text(text)]
