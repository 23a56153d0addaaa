"""Reads gpt-oss's format: each message has a header with its channel and, for a call, its function.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

The prompt ends with <|start|>assistant, so an output begins inside a header, unless it continues a message's text.
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

MAX_HEADER_CHARS = 400  # maximum characters of a message's header
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_MARKS = marks_of(START, CHANNEL, MESSAGE, *_ENDS)
_HEADER_ENDS = marks_of(MESSAGE, *_ENDS)
_ARGUMENT_ENDS = marks_of(START, CHANNEL, *_ENDS)
_RECIPIENT = re.compile(r"\bto=([^\s<>]+)")
_KIND = re.compile(r"<\|channel\|>\s*(analysis|commentary|final)\b")
_NO_FUNCTION = ("user", "all", "assistant")


class Harmony:
    """Reads all messages of an output; text outside of messages is content too."""

    def __init__(self, parser: Parser):
        self.parser, self.source, self.output = parser, parser.source, parser.output

    def read(self) -> Iterator[Event | None]:
        """Yields the events of the output."""
        source, output = self.source, self.output
        yield from output.show((yield from source.space()))
        inside = not output.fresh  # inside a message's text: no header begins
        if not inside and (yield from source.comes(marks_of("to=functions."))):  # the mark before it is in the prompt
            yield from self.parser.call("", self.message)
        while True:
            text, mark = source.until(_MARKS)
            yield from output.show(text)
            if mark in (START, CHANNEL):
                yield from self.parser.call(mark, self.message)
            elif mark and (mark != MESSAGE or output.fresh):  # a <|message|> without a header
                yield from output.turn("answer", SPACE)
            elif mark:
                yield from output.show(mark)
            elif source.ended:
                break
            else:
                yield None
        yield from output.rest()

    def message(
        self, source: TextReader, calls: Calls, call_format: CallFormat | None, mark: str
    ) -> Iterator[Event | None]:
        """Reads a header, and a call's arguments after it if it has a recipient; otherwise `read` reads the text."""
        text, end_mark = yield from source.upto(_HEADER_ENDS, MAX_HEADER_CHARS)
        text = mark + text
        channel, recipient = _KIND.search(text), _RECIPIENT.search(text)
        name = recipient.group(1) if recipient and recipient.group(1) not in _NO_FUNCTION else ""
        if (
            end_mark != MESSAGE
            or not (channel or name or text.strip() == START + "assistant")
            or (name and not call_format)
        ):
            raise Broken
        source.at += len(end_mark)
        yield from self.output.turn("think" if channel and channel.group(1) == "analysis" else "answer")
        if not name:
            source.release()
            return
        yield from source.space()
        yield from stream_call(source, calls, _ARGUMENT_ENDS, name)
