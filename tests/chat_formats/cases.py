"""What a model wrote, and what a user wants to get from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ktx.chat_formats import CHAT_FORMATS, CallArguments, CallEnd, CallStart, Event, Parser, Text, merge_events


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
TOOLS = [
    _tool("weather", city=STRING, days=INTEGER, units={"enum": ["C", "F"]}),
    _tool("write", path=STRING, content=STRING),
    _tool(
        "search",
        query=STRING,
        filters={"type": "object"},
        tags={"type": "array", "items": STRING},
        exact={"type": "boolean"},
        limit={"type": ["number", "null"]},
    ),
    _tool("now"),
]


@dataclass(frozen=True)
class Think:
    text: str


@dataclass(frozen=True)
class Call:
    """`whole` False: the call began but was cut or turned out to be none."""

    name: str
    arguments: str = "{}"
    id: str = ""
    whole: bool = True


@dataclass(frozen=True)
class Case:
    title: str
    text: str
    want: tuple[str | Think | Call, ...]
    thinking: bool = False
    tools: bool = True
    cut: bool = False
    open: bool = False  # the stream ended inside a call


def case(title: str, text: str, *want: str | Think | Call, **how: bool) -> Case:
    return Case(title, text, want, **how)


def wanted(case: Case) -> list[Event]:
    events, index = list[Event](), 0
    for item in case.want:
        if isinstance(item, str):
            events.append(Text(item))
        elif isinstance(item, Think):
            events.append(Text(item.text, "think"))
        else:
            events.append(CallStart(index, item.id or f"call_{index}", item.name))
            events += [CallArguments(index, item.arguments)] if item.arguments else []
            events += [CallEnd(index)] if item.whole else []
            index += 1
    return events


def numbered() -> Any:
    """Ids that count."""
    numbers = itertools.count()
    return lambda: f"call_{next(numbers)}"


def parse(
    dialect: str,
    pieces: Iterable[str],
    thinking: bool = False,
    tools: Any = TOOLS,
    cut: bool = False,
    said: str = "",
) -> Any:
    """The merged events, and whether a call stayed open."""
    parser = Parser(CHAT_FORMATS[dialect], tools, thinking, ids=numbered(), prefill_text=said)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merge_events(events + parser.finish(cut)), parser.open_call
