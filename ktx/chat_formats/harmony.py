"""gpt-oss: every message has a header that names its channel, and for a call its function.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

The prompt ends with <|start|>assistant, so an answer begins inside a header, but where it goes on with a message's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ktx.chat_formats.calls import Calls, stream_call
from ktx.chat_formats.events import Event
from ktx.chat_formats.reader import SPACE, Broken, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat

if TYPE_CHECKING:
    from ktx.chat_formats.parser import Parser

HEADER = 400  # characters of a message's header
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_MARKS = marks_of(START, CHANNEL, MESSAGE, *_ENDS)
_HEADER_ENDS = marks_of(MESSAGE, *_ENDS)
_ARGUMENT_ENDS = marks_of(START, CHANNEL, *_ENDS)
_RECIPIENT = re.compile(r"\bto=([^\s<>]+)")
_KIND = re.compile(r"<\|channel\|>\s*(analysis|commentary|final)\b")
_NOBODY = ("user", "all", "assistant")


class Harmony:
    """All messages of an answer; text outside of messages is the answer too."""

    def __init__(self, parser: Parser):
        self.parser, self.source, self.output = parser, parser.source, parser.output

    def read(self) -> Iterator[Event | None]:
        source, output = self.source, self.output
        yield from output.show((yield from source.space()))
        inside = not output.fresh  # a message's text: no header begins
        if not inside and (yield from source.comes(marks_of("to=functions."))):  # the mark before it is the prompt's
            yield from self.parser.call("", self.message)
        while True:
            text, mark = source.until(_MARKS)
            yield from output.show(text)
            if mark in (START, CHANNEL):
                yield from self.parser.call(mark, self.message)
            elif mark and (mark != MESSAGE or output.fresh):  # a lone <|message|> has lost its header
                yield from output.turn("answer", SPACE)
            elif mark:
                yield from output.show(mark)
            elif source.ended:
                break
            else:
                yield None
        yield from output.rest()

    def message(self, source: TextReader, calls: Calls, format: CallFormat | None, mark: str) -> Iterator[Event | None]:
        """A header; the call's arguments behind it where it has a recipient, else the text is left to `read`."""
        text, end = yield from source.upto(_HEADER_ENDS, HEADER)
        text = mark + text
        channel, recipient = _KIND.search(text), _RECIPIENT.search(text)
        name = recipient.group(1) if recipient and recipient.group(1) not in _NOBODY else ""
        if end != MESSAGE or not (channel or name or text.strip() == START + "assistant") or (name and not format):
            raise Broken
        source.at += len(end)
        yield from self.output.turn("think" if channel and channel.group(1) == "analysis" else "answer")
        if not name:
            source.release()
            return
        yield from source.space()
        yield from stream_call(source, calls, _ARGUMENT_ENDS, name)
