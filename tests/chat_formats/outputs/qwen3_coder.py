"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "types by the schema",
        "<tool_call>\n<function=search>\n<parameter=query>\n42\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=limit>\n5\n</parameter>\n</function>\n</tool_call>",
        Call("search", '{"query": "42", "exact": true, "limit": 5}'),
    ),
    case(
        "null for a number or null",
        "<tool_call>\n<function=search>\n<parameter=limit>\nNone\n</parameter>\n</function>\n</tool_call>",
        Call("search", '{"limit": null}'),
    ),
    case(
        "words for a number stay words",
        "<tool_call>\n<function=weather>\n<parameter=days>\na few\n</parameter>\n</function>\n</tool_call>",
        Call("weather", '{"days": "a few"}'),
    ),
    case(
        "a Python dict for an object",
        "<tool_call>\n<function=search>\n<parameter=filters>\n{'a': True}\n</parameter>\n</function>\n</tool_call>",
        Call("search", '{"filters": {"a": true}}'),
    ),
    case(
        "no <tool_call>",
        "I will.\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "I will.",
        Call("weather", PARIS),
    ),
    case(
        "no <tool_call> at either side",
        "<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>",
        Call("weather", PARIS),
    ),
    case(
        "no </function>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "no </parameter> before </function>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</function>\n</tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "no </parameter> before the next",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        Call("weather", '{"city": "Paris", "days": 2}'),
    ),
    case(
        "</parameter> twice",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</parameter>\n</function>\n</tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "values on the tags' lines",
        "<tool_call><function=weather><parameter=city>Paris</parameter><parameter=days>2</parameter></function></tool_call>",
        Call("weather", '{"city": "Paris", "days": 2}'),
    ),
    case(
        "line breaks of the value are kept",
        "<tool_call>\n<function=write>\n<parameter=content>\n\n  a\n\n\n</parameter>\n</function>\n</tool_call>",
        Call("write", '{"content": "\\n  a\\n\\n"}'),
    ),
    case(
        "tags spoken of in a value",
        "<tool_call>\n<function=write>\n<parameter=content>\nwrite <parameter=x> and </parameter> or </function> here\n</parameter>\n</function>\n</tool_call>",
        Call("write", '{"content": "write <parameter=x> and </parameter> or </function> here"}'),
    ),
    case(
        "quoted names",
        '<tool_call>\n<function="weather">\n<parameter name="city">\nParis\n</parameter>\n</function>\n</tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "two functions in one <tool_call>",
        "<tool_call>\n<function=now>\n</function>\n<function=now>\n</function>\n</tool_call>",
        Call("now"),
        Call("now"),
    ),
    case(
        "JSON, as its sister writes",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "an unknown argument",
        "<tool_call>\n<function=weather>\n<parameter=zip>\n75001\n</parameter>\n<parameter=note>\nhi\n</parameter>\n</function>\n</tool_call>",
        Call("weather", '{"zip": 75001, "note": "hi"}'),
    ),
    case(
        "ended before the end marks",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n",
        Call("weather", PARIS),
    ),
    case(
        "ended in a value",
        "<tool_call>\n<function=weather>\n<parameter=city>\nPar",
        Call("weather", '{"city": "Par', whole=False),
        "<tool_call>\n<function=weather>\n<parameter=city>\nPar",
    ),
    case(
        "cut in a value",
        "<tool_call>\n<function=weather>\n<parameter=city>\nPar",
        Call("weather", '{"city": "Par', whole=False),
        cut=True,
        open=True,
    ),
    case(
        "cut in a value that waits for its end",
        "<tool_call>\n<function=weather>\n<parameter=days>\n1",
        "<tool_call>\n<function=weather>\n<parameter=days>\n1",
        cut=True,
    ),
    case(
        "words among the tags",
        "<tool_call>\n<function=now>\nhello\n</function>\n</tool_call>",
        "<tool_call>\n<function=now>\nhello\n</function>\n</tool_call>",
    ),
    case(
        "no name",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
    ),
]
