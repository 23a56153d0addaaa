"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "no outer mark",
        '<invoke name="weather">\n<parameter name="city">Paris</parameter>\n</invoke>',
        Call("weather", PARIS),
    ),
    case(
        "no outer end mark",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n</invoke>\n',
        Call("weather", PARIS),
    ),
    case(
        "no </invoke>",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n</minimax:tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "no </parameter>",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</invoke>\n</minimax:tool_call>',
        Call("weather", PARIS),
    ),
    case(
        "single quotes",
        "<minimax:tool_call><invoke name='weather'><parameter name='city'>Paris</parameter></invoke></minimax:tool_call>",
        Call("weather", PARIS),
    ),
    case(
        "types by the schema",
        '<minimax:tool_call><invoke name="search"><parameter name="query">42</parameter><parameter name="limit">4.5</parameter><parameter name="exact">false</parameter></invoke></minimax:tool_call>',
        Call("search", '{"query": "42", "limit": 4.5, "exact": false}'),
    ),
    case(
        "an enumeration",
        '<minimax:tool_call><invoke name="weather"><parameter name="units">C</parameter></invoke></minimax:tool_call>',
        Call("weather", '{"units": "C"}'),
    ),
    case(
        "line breaks in a value are its own",
        '<minimax:tool_call><invoke name="write"><parameter name="content">\na\n</parameter></invoke></minimax:tool_call>',
        Call("write", '{"content": "\\na\\n"}'),
    ),
    case(
        "tags spoken of in a value",
        '<minimax:tool_call><invoke name="write"><parameter name="content">say </parameter> or </invoke> so</parameter></invoke></minimax:tool_call>',
        Call("write", '{"content": "say </parameter> or </invoke> so"}'),
    ),
    case(
        "the outer mark spoken of",
        "Begin with <minimax:tool_call>, then go on.",
        "Begin with <minimax:tool_call>, then go on.",
    ),
    case(
        "nothing in the outer mark",
        "a <minimax:tool_call>\n</minimax:tool_call> b",
        "a <minimax:tool_call>\n</minimax:tool_call> b",
    ),
    case("no name", 'a <invoke name=""></invoke>', 'a <invoke name=""></invoke>'),
    case("words among the tags", '<invoke name="now">well</invoke>', '<invoke name="now">well</invoke>'),
    case(
        "thinks again behind a call",
        '<think>\na\n</think>\n\n<minimax:tool_call>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>\n<think>\nb\n</think>\n\nDone.',
        Think("a"),
        Call("now"),
        Think("b"),
        "Done.",
    ),
    case(
        "cut in a value",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Par',
        Call("weather", '{"city": "Par', whole=False),
        cut=True,
        open=True,
    ),
    case("cut in a tag", '<minimax:tool_call>\n<invoke name="wea', '<minimax:tool_call>\n<invoke name="wea', cut=True),
    case(
        "ended in a value",
        '<invoke name="weather">\n<parameter name="city">Par',
        Call("weather", '{"city": "Par', whole=False),
        '<invoke name="weather">\n<parameter name="city">Par',
    ),
]
