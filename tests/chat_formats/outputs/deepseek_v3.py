"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case(
        "no section",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "no end marks",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```',
        Call("weather", PARIS),
    ),
    case(
        "no code block",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "a code block without json",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```\n{"city": "Paris"}\n```<｜tool▁call▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "no type",
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "no end of the code block",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n<｜tool▁call▁end｜>',
        Call("weather", PARIS),
    ),
    case(
        "no section end, then text",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>\nDone.",
        Call("now"),
        "Done.",
    ),
    case(
        "no separator behind the type",
        "<｜tool▁call▁begin｜>function well then<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>function well then<｜tool▁call▁end｜>",
    ),
    case("a thought without its opening, as R1 writes", "So.\n</think>\n\nYes.", Think("So."), "Yes.", thinking=True),
    case(
        "a call in the thought",
        "So.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Think(
            "So.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        thinking=True,
    ),
]
