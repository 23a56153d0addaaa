"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "behind <|python_tag|>",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}',
        Call("weather", PARIS),
    ),
    case("arguments for parameters", '{"name": "weather", "arguments": {"city": "Paris"}}', Call("weather", PARIS)),
    case(
        "with a type",
        '{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}',
        Call("weather", PARIS),
    ),
    case(
        "OpenAI's nesting",
        '{"type": "function", "function": {"name": "weather", "parameters": {"city": "Paris"}}}',
        Call("weather", PARIS),
    ),
    case("function for name", '{"function": "weather", "parameters": {"city": "Paris"}}', Call("weather", PARIS)),
    case(
        "one a line",
        '{"name": "weather", "parameters": {"city": "Paris"}}\n{"name": "now", "parameters": {}}',
        Call("weather", PARIS),
        Call("now"),
    ),
    case(
        "in a list",
        '[{"name": "weather", "parameters": {"city": "Paris"}}, {"name": "now", "parameters": {}}]',
        Call("weather", PARIS),
        Call("now"),
    ),
    case(
        "in a code block", '```json\n{"name": "weather", "parameters": {"city": "Paris"}}\n```', Call("weather", PARIS)
    ),
    case(
        "behind a sentence",
        'I will look it up:\n{"name": "weather", "parameters": {"city": "Paris"}}',
        "I will look it up:",
        Call("weather", PARIS),
    ),
    case(
        "in a sentence: no call",
        'Like {"name": "weather", "parameters": {}} so.',
        'Like {"name": "weather", "parameters": {}} so.',
    ),
    case("<function=", '<function=weather>{"city": "Paris"}</function>', Call("weather", PARIS)),
    case("a function's name alone", '{"name": "now"}', Call("now")),
    case("a person's name alone", '{"name": "Bob"}', '{"name": "Bob"}'),
    case("JSON about something else", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}'),
    case(
        "JSON about something else over lines",
        '{\n  "title": "x",\n  "parameters": 3\n}',
        '{\n  "title": "x",\n  "parameters": 3\n}',
    ),
    case("a list about something else", '[1, 2, {"name": "x"}]', '[1, 2, {"name": "x"}]'),
    case("a code block about something else", 'See:\n```json\n{"a": 1}\n```\nOk.', 'See:\n```json\n{"a": 1}\n```\nOk.'),
    case("parameters that are no object", '{"name": "Bob", "parameters": 3}', '{"name": "Bob", "parameters": 3}'),
    case("other words for name and arguments", '{"tool": "weather", "input": {}}', '{"tool": "weather", "input": {}}'),
    case("code: no call", "def f():\n    return {\n}", "def f():\n    return {\n}"),
    case("a brace at the end", "so\n{", "so\n{"),
    case("Python's calls, as its younger sister writes", '[weather(city="Paris")]', Call("weather", PARIS)),
]
