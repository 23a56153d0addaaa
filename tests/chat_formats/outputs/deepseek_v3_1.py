"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "no section",
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "as V3 writes",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "no end marks",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}',
        Call("weather", PARIS),
    ),
    case(
        "line breaks",
        '<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>\nweather\n<｜tool▁sep｜>\n{"city": "Paris"}\n<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "a code block",
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>',
        Call("weather", PARIS),
    ),
    case("no separator", '<｜tool▁call▁begin｜>weather{"city": "Paris"}<｜tool▁call▁end｜>', Call("weather", PARIS)),
    case("no arguments", "<｜tool▁call▁begin｜>now<｜tool▁sep｜><｜tool▁call▁end｜>", Call("now")),
    case(
        "an object as others write",
        '<｜tool▁call▁begin｜>{"name": "weather", "arguments": {"city": "Paris"}}<｜tool▁call▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "words in a call",
        "<｜tool▁call▁begin｜>well, no<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>well, no<｜tool▁call▁end｜>",
    ),
    case("a section without calls", "a<｜tool▁calls▁begin｜>b", "a<｜tool▁calls▁begin｜>b"),
    case(
        "the end of thought before the call",
        "Hm</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Think("Hm"),
        Call("now"),
        thinking=True,
    ),
    case(
        "text between section and call",
        "<｜tool▁calls▁begin｜> so <｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜> so",
        Call("now"),
    ),
]
