"""What a parser tells: pieces of text, and calls of functions piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A piece of output; `kind` is "answer" or "think"."""

    text: str
    kind: str = "answer"


@dataclass(frozen=True)
class CallStart:
    """The model calls function `name`; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A fragment of the call's arguments: all fragments of an ended call together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is whole. A call that never ends is none: the stream was cut, or its text turned out to be no call."""

    index: int


Event = Text | CallStart | CallArguments | CallEnd


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbours joined: what does not depend on how the stream was cut."""
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
