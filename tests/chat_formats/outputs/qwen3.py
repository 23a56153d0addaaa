"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "members turned round",
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "parameters for arguments",
        '<tool_call>{"name": "weather", "parameters": {"city": "Paris"}}</tool_call>',
        Call("weather", PARIS),
    ),
    case("no arguments member", '<tool_call>{"name": "now"}</tool_call>', Call("now")),
    case(
        "one brace too many",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}}\n</tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "all on one line",
        '<tool_call>{"name":"weather","arguments":{"city":"Paris"}}</tool_call>',
        Call("weather", '{"city":"Paris"}'),
    ),
    case(
        "a code block inside",
        '<tool_call>\n```json\n{"name": "weather", "arguments": {"city": "Paris"}}\n```\n</tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "Python's quotes around all",
        "<tool_call>{'name': 'weather', 'arguments': {'city': 'Paris'}}</tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "a list inside",
        '<tool_call>[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]</tool_call>',
        Call("weather", PARIS),
        Call("now"),
    ),
    case(
        "OpenAI's nesting",
        '<tool_call>{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}</tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "no end mark before the next call",
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        Call("weather", PARIS),
        Call("now"),
    ),
    case("the end mark twice", '<tool_call>{"name": "now", "arguments": {}}</tool_call></tool_call>', Call("now")),
    case(
        "another object in the marks",
        'a <tool_call>{"city": "Paris"}</tool_call> b',
        'a <tool_call>{"city": "Paris"}</tool_call> b',
    ),
    case("no JSON in the marks", "a <tool_call>let me see</tool_call> b", "a <tool_call>let me see</tool_call> b"),
    case("empty marks", "a <tool_call></tool_call> b", "a <tool_call></tool_call> b"),
    case("the marks spoken of", "Use <tool_call> tags, then </tool_call>.", "Use <tool_call> tags, then </tool_call>."),
    case(
        "in tags, as the coder writes",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        Call("weather", '{"city": "\\nParis\\n", "days": 2}'),
    ),
    case(
        "a broken call, then a good one",
        '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        Call("weather", '{"city": ', whole=False),
        '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>',
        Call("now"),
    ),
    case(
        "a string never closed, then a good call",
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris}}</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        Call("weather", '{"city": "Paris}}</tool_call>\\n<tool_call>{"', whole=False),
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris}}</tool_call>',
        Call("now"),
    ),
    case(
        "the thought never closed before the call",
        '<think>\nI will look.\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\nand so',
        Think('I will look.\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\nand so'),
    ),
    case(
        "two objects in one pair of marks",
        '<tool_call>\n{"name": "now", "arguments": {}}\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n',
        Call("now"),
        Call("weather", PARIS),
    ),
    case(
        "two objects with a comma between, then a call of its own",
        'So: <tool_call>{"name": "now"}, {"name": "now"}</tool_call><tool_call>{"name": "now"}</tool_call> Done.',
        "So:",
        Call("now"),
        Call("now"),
        Call("now"),
        "  Done.",
    ),
    case(
        "three objects side by side, no end mark",
        '<tool_call>{"name": "now"}{"name": "now"}{"name": "weather", "arguments": {"city": "Paris"}}',
        Call("now"),
        Call("now"),
        Call("weather", PARIS),
    ),
    case(
        "an object behind a call that is none",
        '<tool_call>{"name": "now"}\n{"city": "Paris"}</tool_call>',
        Call("now"),
        '{"city": "Paris"}</tool_call>',
    ),
    case(
        "words behind the object",
        '<tool_call>{"name": "now"} and so</tool_call>',
        Call("now"),
        "and so</tool_call>",
    ),
    case(
        "functions. before the name",
        '<tool_call>{"name": "functions.weather", "arguments": {"city": "Paris"}}</tool_call>',
        Call("weather", PARIS),
    ),
    case("half a mark at the end", "well <tool_ca", "well <tool_ca"),
]
