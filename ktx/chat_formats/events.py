"""Events that a parser emits: pieces of text, and tool calls piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A piece of output; `kind` is "answer" (content) or "think" (reasoning)."""

    text: str
    kind: str = "answer"


@dataclass(frozen=True)
class CallStart:
    """The start of a call of function `name`; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A fragment of a call's arguments: all fragments of a finished call together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is complete. A call without this event is not one: the stream was cut, or its text turned out not to be
    a call.
    """

    index: int


Event = Text | CallStart | CallArguments | CallEnd


def merge_events(events: Iterable[Event]) -> list[Event]:
    """Joins neighboring events of the same text or call, so that the result does not depend on how the stream was
    split.
    """
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text) and event.kind == last.kind:
            out[-1] = Text(last.text + event.text, event.kind)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
            out[-1] = CallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out
