"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "no section",
        '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>',
        Call("weather", PARIS, "functions.weather:0"),
    ),
    case(
        "no end marks",
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Paris"}',
        Call("weather", PARIS, "functions.weather:0"),
    ),
    case(
        "no end mark before the next call",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        Call("now", "{}", "functions.now:0"),
        Call("now", "{}", "functions.now:1"),
    ),
    case(
        "numbers that go on",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:7<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        Call("now", "{}", "functions.now:7"),
    ),
    case(
        "no number",
        "<|tool_call_begin|>functions.now<|tool_call_argument_begin|>{}<|tool_call_end|>",
        Call("now", "{}"),
    ),
    case(
        "no functions.",
        "<|tool_call_begin|>now:3<|tool_call_argument_begin|>{}<|tool_call_end|>",
        Call("now", "{}", "now:3"),
    ),
    case(
        "a dotted name",
        "<|tool_call_begin|>functions.my.tool:3<|tool_call_argument_begin|>{}<|tool_call_end|>",
        Call("my.tool", "{}", "functions.my.tool:3"),
    ),
    case(
        "line breaks around all",
        "\n<|tool_calls_section_begin|>\n<|tool_call_begin|> functions.now:0 \n<|tool_call_argument_begin|>\n{}\n<|tool_call_end|>\n<|tool_calls_section_end|>\n",
        Call("now", "{}", "functions.now:0"),
    ),
    case(
        "no arguments at all",
        "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|><|tool_call_end|>",
        Call("now", "{}", "functions.now:0"),
    ),
    case(
        "no argument mark",
        '<|tool_call_begin|>functions.weather:0{"city": "Paris"}<|tool_call_end|>',
        Call("weather", PARIS, "functions.weather:0"),
    ),
    case(
        "a section without calls",
        "a <|tool_calls_section_begin|><|tool_calls_section_end|> b",
        "a <|tool_calls_section_begin|><|tool_calls_section_end|> b",
    ),
    case(
        "text in a call",
        "<|tool_call_begin|>let me see<|tool_call_end|>",
        "<|tool_call_begin|>let me see<|tool_call_end|>",
    ),
    case(
        "in the thought, which goes on",
        "<think>a<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>b</think>c",
        Think("a"),
        Call("now", "{}", "functions.now:0"),
        Think("b"),
        "c",
    ),
    case("a section end too many", "Hello<|tool_calls_section_end|>", "Hello<|tool_calls_section_end|>"),
    case(
        "cut behind the header",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>",
        cut=True,
    ),
]
