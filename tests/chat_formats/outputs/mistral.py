"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case("a list", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]', Call("weather", PARIS)),
    case("a list with ids", '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "abc123def"}]', Call("now")),
    case(
        "a list with ids first",
        '[TOOL_CALLS][{"id": "abc123def", "name": "now", "arguments": {}}]',
        Call("now", "{}", "abc123def"),
    ),
    case("an object alone", '[TOOL_CALLS]{"name": "weather", "arguments": {"city": "Paris"}}', Call("weather", PARIS)),
    case(
        "a list that does not end",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}',
        Call("weather", PARIS),
    ),
    case(
        "a brace forgotten", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}]', Call("weather", PARIS)
    ),
    case("the name first", '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', Call("weather", PARIS)),
    case(
        "the name first, with an id",
        '[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{"city": "Paris"}',
        Call("weather", PARIS, "abc123def"),
    ),
    case("the name first, no [ARGS]", '[TOOL_CALLS]weather{"city": "Paris"}', Call("weather", PARIS)),
    case("the name first, twice", "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}", Call("now"), Call("now")),
    case("text before", "Let me look.[TOOL_CALLS]now[ARGS]{}", "Let me look.", Call("now")),
    case("an empty list", "a [TOOL_CALLS][] b", "a [TOOL_CALLS][] b"),
    case("nothing behind the mark", "a [TOOL_CALLS]", "a [TOOL_CALLS]"),
    case("words behind the mark", "The [TOOL_CALLS] mark is text here.", "The [TOOL_CALLS] mark is text here."),
    case("<think> is no tag here", "<think>a</think>b", "<think>a</think>b"),
    case("thought, text and call", "[THINK]Hm.[/THINK]Ok.[TOOL_CALLS]now[ARGS]{}", Think("Hm."), "Ok.", Call("now")),
    case(
        "broken second call of a list",
        '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"x": 1}]',
        Call("now"),
        '{"x": 1}]',
    ),
]
