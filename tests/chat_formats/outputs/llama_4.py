"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case("between marks", '<|python_start|>[weather(city="Paris")]<|python_end|>', Call("weather", PARIS)),
    case("single quotes", "[weather(city='Paris')]", Call("weather", PARIS)),
    case(
        "no space", "[weather(city='Paris',days=2),now()]", Call("weather", '{"city": "Paris", "days": 2}'), Call("now")
    ),
    case("a lot of space", "[ weather( city = 'Paris' , days = 2 ) ]", Call("weather", '{"city": "Paris", "days": 2}')),
    case("over lines", "[\n  weather(\n    city='Paris',\n  ),\n  now()\n]", Call("weather", PARIS), Call("now")),
    case(
        "JSON, as its elder sister writes",
        '{"name": "weather", "parameters": {"city": "Paris"}}',
        Call("weather", PARIS),
    ),
    case(
        "JSON between marks",
        '<|python_start|>{"name": "weather", "parameters": {"city": "Paris"}}<|python_end|>',
        Call("weather", PARIS),
    ),
    case("a dotted name", "[api.get(x=1)]", Call("api.get", '{"x": 1}')),
    case("brackets in a string", "[weather(city='a)]}(')]", Call("weather", '{"city": "a)]}("}')),
    case(
        "nested values",
        "[search(filters={'a': [1, {'b': None}]}, exact=True)]",
        Call("search", '{"filters": {"a": [1, {"b": null}]}, "exact": true}'),
    ),
    case("a list that is none", "[1] says so.", "[1] says so."),
    case("a link", "[text](http://x.y/z)", "[text](http://x.y/z)"),
    case("a link behind a line", "See\n[text (a=1)](http://x.y/z)", "See\n[text (a=1)](http://x.y/z)"),
    case("a footnote", "[note: see(x)]", "[note: see(x)]"),
    case("an argument without its name", "[weather('Paris')]", Call("weather", "", whole=False), "[weather('Paris')]"),
    case("ended before the bracket", "[weather(city='Paris')", Call("weather", PARIS)),
    case(
        "ended before the parenthesis",
        "[weather(city='Paris'",
        Call("weather", '{"city": "Paris"', whole=False),
        "[weather(city='Paris'",
    ),
    case("cut in a string", "[weather(city='Par", Call("weather", '{"city": "Par', whole=False), cut=True, open=True),
    case(
        "a word for a value",
        "[weather(city=Paris)]",
        Call("weather", '{"city": ', whole=False),
        "[weather(city=Paris)]",
    ),
    case("text behind", "[now()]\nDone.", Call("now"), "Done."),
]
