"""Reads gpt-oss's format: each message has a header with its channel and, for a call, its function.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

The prompt ends with <|start|>assistant, so an output begins within a header, unless it continues a message's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Protocol

from ktx.chat_formats.calls import CallEvents, stream_call
from ktx.chat_formats.events import Event
from ktx.chat_formats.reader import WHITESPACE, NotACall, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat
from ktx.chat_formats.whitespace import WhitespaceFilter

MAX_HEADER_CHARS = 400  # maximum characters of a message's header
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_MARKS = marks_of(START, CHANNEL, MESSAGE, *_ENDS)
_HEADER_ENDS = marks_of(MESSAGE, *_ENDS)
_ARGUMENT_ENDS = marks_of(START, CHANNEL, *_ENDS)
_RECIPIENT = re.compile(r"\bto=([^\s<>]+)")
_KIND = re.compile(r"<\|channel\|>\s*(analysis|commentary|final)\b")
_NO_FUNCTION = ("user", "all", "assistant")


class CallParser(Protocol):
    """What Harmony requires of the parser of an output, see ktx.chat_formats.parser."""

    reader: TextReader
    output: WhitespaceFilter

    def read_call(self, mark: str, reader: Callable[..., Iterator[Event | None]]) -> Iterator[Event | None]:
        """Yields the events of what `reader` reads after `mark`, or their text if it raises NotACall."""


class Harmony:
    """Reads all messages of an output: analysis is reasoning, a message to a function is a call, all else is content.
    Text outside of messages is content too.
    """

    def __init__(self, parser: CallParser):
        self.parser, self.source, self.output = parser, parser.reader, parser.output

    def read(self) -> Iterator[Event | None]:
        """Yields the events of the output: of headers, read through `Parser.read_call`, so that an invalid one becomes
        text, and of the text between them.
        """
        source, output = self.source, self.output
        yield from output.emit((yield from source.read_whitespace()))
        in_message = not output.after_mark  # the output continues a message's text
        # the mark before the recipient is in the prompt
        if not in_message and (yield from source.peek_mark(marks_of("to=functions."))):
            yield from self.parser.read_call("", self.read_message)
        while True:
            text, mark = source.read_until(_MARKS)
            yield from output.emit(text)
            if mark in (START, CHANNEL):
                yield from self.parser.read_call(mark, self.read_message)
            elif mark and (mark != MESSAGE or output.after_mark):  # a <|message|> without a header
                yield from output.switch_kind("answer", WHITESPACE)
            elif mark:
                yield from output.emit(mark)
            elif source.finished:
                break
            else:
                yield None
        yield from output.flush()

    def read_message(
        self, source: TextReader, calls: CallEvents, call_format: CallFormat | None, mark: str
    ) -> Iterator[Event | None]:
        """Reads a header up to <|message|>, and a call's arguments after it if its recipient is a function; the text of
        any other message is left for `read`.

        `mark` is the mark that began the header. Raises NotACall for text that is not a header, and for a call when
        calls are not parsed.
        """
        text, end_mark = yield from source.read_short_until(_HEADER_ENDS, MAX_HEADER_CHARS)
        text = mark + text
        channel, recipient = _KIND.search(text), _RECIPIENT.search(text)
        name = recipient.group(1) if recipient and recipient.group(1) not in _NO_FUNCTION else ""
        if (
            end_mark != MESSAGE
            or not (channel or name or text.strip() == START + "assistant")
            or (name and not call_format)
        ):
            raise NotACall
        source.pos += len(end_mark)
        yield from self.output.switch_kind("think" if channel and channel.group(1) == "analysis" else "answer")
        if not name:
            source.end_call()
            return
        yield from source.read_whitespace()
        yield from stream_call(source, calls, _ARGUMENT_ENDS, name)
