"""Outputs of this family alone, as its models write them."""

from __future__ import annotations

from tests.chat_formats.cases import Call, Case, Think, case

PARIS = '{"city": "Paris"}'

CASES: list[Case] = [
    case("from inside the header", "<|channel|>final<|message|>Hello.", "Hello."),
    case(
        "thought and answer",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        Think("Hm."),
        "Yes.",
    ),
    case(
        "the function before the channel",
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        Call("weather", PARIS),
    ),
    case(
        "the function before the channel, later",
        '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}',
        Think("Hm."),
        Call("weather", PARIS),
    ),
    case(
        "without its type",
        '<|channel|>commentary to=functions.weather<|message|>{"city": "Paris"}<|call|>',
        Call("weather", PARIS),
    ),
    case(
        "code for its type",
        '<|channel|>commentary to=functions.weather code<|message|>{"city": "Paris"}<|call|>',
        Call("weather", PARIS),
    ),
    case(
        "in the analysis channel",
        '<|channel|>analysis to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        Call("weather", PARIS),
    ),
    case(
        "a preamble",
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
        "I will look.",
        Call("now"),
    ),
    case(
        "a thought that was not ended",
        "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Yes.",
        Think("Hm."),
        "Yes.",
    ),
    case(
        "a thought that was not ended, nor the next begun",
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Yes.",
        Think("Hm."),
        "Yes.",
    ),
    case(
        "no end mark",
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}',
        Call("weather", PARIS),
    ),
    case("no channel", "<|start|>assistant<|message|>Hello.<|return|>", "Hello."),
    case("no marks at all", "Hello.", "Hello."),
    case("a lone message mark", "<|message|>Hello.", "Hello."),
    case("an unknown channel", "<|channel|>secret<|message|>x", "<|channel|>secret<|message|>x"),
    case("a header that never ends", "<|channel|>final and so on", "<|channel|>final and so on"),
    case(
        "the function without functions.",
        '<|channel|>commentary to=weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        Call("weather", PARIS),
    ),
    case(
        "a code tool that is no JSON",
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        Think("<|channel|>analysis to=python code<|message|>print(1)"),
    ),
    case(
        "no tools: a call is text",
        "<|channel|>commentary to=functions.now <|message|>{}",
        "<|channel|>commentary to=functions.now <|message|>{}",
        tools=False,
    ),
    case(
        "no tools: channels are still read",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        Think("Hm."),
        "Yes.",
        tools=False,
    ),
    case(
        "broken arguments",
        '<|channel|>commentary to=functions.weather <|message|>{"city": }<|call|>',
        Call("weather", '{"city": ', whole=False),
        '<|channel|>commentary to=functions.weather <|message|>{"city": }',
    ),
    case(
        "cut in the header",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>comm",
        Think("Hm."),
        "<|start|>assistant<|channel|>comm",
        cut=True,
    ),
    case("cut in the thought", "<|channel|>analysis<|message|>Hm", Think("Hm"), cut=True),
]
