"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "no line breaks",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "types by the schema",
        "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>42</arg_value>\n<arg_key>limit</arg_key>\n<arg_value>5</arg_value>\n</tool_call>",
        Call("search", '{"query": "42", "limit": 5}'),
    ),
    case(
        "True for true",
        "<tool_call>search\n<arg_key>exact</arg_key>\n<arg_value>True</arg_value>\n</tool_call>",
        Call("search", '{"exact": true}'),
    ),
    case(
        "a list in Python's quotes",
        "<tool_call>search\n<arg_key>tags</arg_key>\n<arg_value>['a', 'b']</arg_value>\n</tool_call>",
        Call("search", '{"tags": ["a", "b"]}'),
    ),
    case(
        "line breaks in a value are its own",
        "<tool_call>write\n<arg_key>content</arg_key>\n<arg_value>\na\n</arg_value>\n</tool_call>",
        Call("write", '{"content": "\\na\\n"}'),
    ),
    case("no arguments, no line break", "<tool_call>now</tool_call>", Call("now")),
    case("text in the marks", "a <tool_call>oh my</tool_call> b", "a <tool_call>oh my</tool_call> b"),
    case(
        "no </arg_value> at the end",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "no </arg_value> before the next",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris<arg_key>days</arg_key><arg_value>2</arg_value>\n</tool_call>",
        Call("weather", '{"city": "Paris", "days": 2}'),
    ),
    case(
        "no </arg_key>",
        "<tool_call>weather\n<arg_key>city<arg_value>Paris</arg_value>\n</tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "no </tool_call> at the end",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n",
        Call("weather", PARIS),
    ),
    case(
        "tags spoken of in a value",
        "<tool_call>write\n<arg_key>content</arg_key>\n<arg_value>say </arg_value> or <arg_key> or </tool_call> so</arg_value>\n</tool_call>",
        Call("write", '{"content": "say </arg_value> or <arg_key> or </tool_call> so"}'),
    ),
    case(
        "JSON, as others write",
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>',
        Call("weather", PARIS),
    ),
    case("JSON behind the name", '<tool_call>weather\n{"city": "Paris"}\n</tool_call>', Call("weather", PARIS)),
    case(
        "a key without value",
        "<tool_call>weather\n<arg_key>city</arg_key>\n</tool_call>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n</tool_call>",
    ),
    case(
        "cut in a value",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Par",
        Call("weather", '{"city": "Par', whole=False),
        cut=True,
        open=True,
    ),
    case("cut in the name", "<tool_call>weat", "<tool_call>weat", cut=True),
    case("cut behind the name", "<tool_call>weather\n", "<tool_call>weather\n", cut=True),
    case(
        "cut before </tool_call>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n",
        Call("weather", '{"city": "Paris', whole=False),
        cut=True,
        open=True,
    ),
    case(
        "an empty value",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value></arg_value>\n</tool_call>",
        Call("weather", '{"city": ""}'),
    ),
    case("the marks spoken of", "Write <tool_call> first.", "Write <tool_call> first."),
]
