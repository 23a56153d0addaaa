"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case("an answer", "Hello.\n\nYou.", "Hello.\n\nYou."),
    case("nothing", ""),
    case("only white space", " \n ", " \n "),
    case("line breaks before", "\n\nHello.", "Hello."),
    case("white space behind", "Hello. \n", "Hello. \n"),
    case("thought and answer", "<think>\nHm.\n</think>\n\nYes.", Think("Hm."), "Yes."),
    case("the prompt opened the block", "Hm.</think>Yes.", Think("Hm."), "Yes.", thinking=True),
    case("opened twice", "<think><think>Hm.</think></think>Yes.", Think("Hm."), "Yes."),
    case("an empty thought", "<think>\n\n</think>\n\nYes.", "Yes."),
    case("never closed", "<think>Hm.", Think("Hm.")),
    case("never opened", "Hm.</think>Yes.", "Hm.Yes."),
    case("tags spoken of", "<think>a</think>Use <think> and </think>.", Think("a"), "Use <think> and </think>."),
    case("a block behind a first line", "Well.\n<think>Hm.</think>Yes.", "Well.", Think("Hm."), "Yes."),
    case(
        "calls of others are text",
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    ),
    case(
        "more calls of others",
        '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
        '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
    ),
    case("half a tag", "a <thin", "a <thin"),
    case("tags in other letters", "<THINK>a</THINK>", "<THINK>a</THINK>"),
    case("a surrogate pair", "🙂<think>", "🙂<think>"),
]
