"""What the parser is told beside the text."""

from __future__ import annotations

import re

from ktx.chat_formats import CHAT_FORMATS, CallArguments, CallEnd, CallStart, Parser, Text, merge_events, new_id
from tests.chat_formats.cases import TOOLS, numbered

CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
QWEN = CHAT_FORMATS["qwen3"]


def test_ids_look_like_openai_s():
    assert re.fullmatch(r"call_[A-Za-z0-9]{24}", new_id())
    assert new_id() != new_id()
    start = next(e for e in Parser(QWEN, TOOLS).feed(CALL) if isinstance(e, CallStart))
    assert re.fullmatch(r"call_[A-Za-z0-9]{24}", start.id)


def test_calls_are_looked_for_where_there_are_tools():
    assert Parser(QWEN).feed(CALL) == [Text(CALL)]
    assert Parser(QWEN, TOOLS, parse_calls=False).feed(CALL) == [Text(CALL)]


def test_calls_can_be_looked_for_without_tools():
    parser = Parser(QWEN, parse_calls=True, ids=numbered())
    assert parser.feed(CALL) == [CallStart(0, "call_0", "now"), CallArguments(0, "{}"), CallEnd(0)]


def test_tools_may_be_bare_functions():
    parser = Parser(CHAT_FORMATS["qwen3-coder"], [tool["function"] for tool in TOOLS])
    events = merge_events(parser.feed("<function=weather><parameter=city>7</parameter></function>") + parser.finish())
    assert events[1] == CallArguments(0, '{"city": "7"}')


def test_reading_ends_once():
    parser = Parser(QWEN, TOOLS)
    assert parser.feed("a <tool") == [Text("a")]
    assert merge_events(parser.finish()) == [Text(" <tool")]
    assert parser.finish() == []


def test_a_call_that_is_cut_stays_open():
    parser = Parser(QWEN, TOOLS)
    parser.feed('<tool_call>{"name": "weather", "arguments": {"city": "Par')
    assert not parser.open_call
    assert parser.finish(cut=True) == []
    assert parser.open_call


def test_a_whole_call_before_a_cut_is_no_open_one():
    parser = Parser(QWEN, TOOLS)
    parser.feed(CALL[:-6])
    parser.finish(cut=True)
    assert not parser.open_call


def test_what_goes_on_keeps_its_white_space():
    for thinking, kind in ((False, "answer"), (True, "think")):
        parser = Parser(QWEN, TOOLS, thinking, prefill_text="Hello")
        assert merge_events(parser.feed("\n world ") + parser.finish()) == [Text("\n world ", kind)]


def test_an_answer_that_goes_on_thinks_no_more():
    text = " and <think>more</think> words"
    assert merge_events(Parser(QWEN, prefill_text="Hello").feed(text)) == [Text(text)]
    thought = Parser(QWEN, thinking=True, prefill_text="Hm").feed(" <think> so.</think>\n\nYes.")
    assert merge_events(thought) == [Text(" <think> so.", "think"), Text("Yes.")]


def test_what_goes_on_may_call():
    events = Parser(QWEN, TOOLS, ids=numbered(), prefill_text="Hello").feed(" you.\n" + CALL)
    assert events == [Text(" you."), CallStart(0, "call_0", "now"), CallArguments(0, "{}"), CallEnd(0)]


def test_a_call_without_marks_begins_a_line():
    call = '{"name": "now", "parameters": {}}'
    for said, text, calls in (("So:\n", call, 1), ("So:", "\n" + call, 1), ("So: ", call, 0), ("So:\n", "x" + call, 0)):
        events = Parser(CHAT_FORMATS["llama-3"], TOOLS, prefill_text=said).feed(text)
        assert sum(isinstance(event, CallStart) for event in events) == calls, (said, text)


def test_harmony_goes_on_inside_its_channel():
    rest = " four.<|end|><|start|>assistant<|channel|>final<|message|>4"
    thought = Parser(CHAT_FORMATS["gpt-oss"], thinking=True, prefill_text="It is")
    assert merge_events(thought.feed(rest) + thought.finish()) == [Text(" four.", "think"), Text("4")]
    answer = Parser(CHAT_FORMATS["gpt-oss"], TOOLS, prefill_text="Say")
    assert merge_events(answer.feed(" to=functions.now<|return|>")) == [Text(" to=functions.now")]
