"""Parses a model's output while it arrives into reasoning, content and tool calls.

The events do not depend on how the text was split. Text that is not a valid call is emitted as text. The work is
bounded: each character is read once, except for those of broken calls, which are read again within limits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from ktx.chat_formats.bare_calls import read_bare
from ktx.chat_formats.calls import MAX_CALLS, Calls, new_id
from ktx.chat_formats.events import CallEnd, CallStart, Event, Text
from ktx.chat_formats.harmony import Harmony
from ktx.chat_formats.reader import Broken, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat, ChatFormat
from ktx.chat_formats.tagged_calls import read_marked
from ktx.chat_formats.whitespace import WhitespaceFilter

MAX_REREAD_CHARS = 1 << 16  # characters of broken calls that are searched again for calls within them
MAX_BROKEN_CALLS = 1000  # broken calls after which the rest of the output is text
BARE = "{", "["  # first characters of calls without a mark, at the start of a line


class Parser:
    """Parses the output of one request.

    Calls inside the reasoning block are reasoning, unless the family calls from there: calls that a model only reasons
    about must not be run.
    Arguments are emitted while they arrive, so a call may turn out late to be invalid: then it has no CallEnd, and all
    its text follows as Text. A client that assembles a message leaves out calls without CallEnd.

    Args:
        dialect: the model's chat format.
        tools: the request's tools.
        thinking: the prompt has opened the reasoning block.
        parse_calls: whether to parse calls; None: if there are tools.
        ids: returns a new call id.
        said: text at the prompt's end that the output continues.
    """

    def __init__(
        self,
        dialect: ChatFormat,
        tools: Iterable[Mapping[str, Any]] = (),
        thinking: bool = False,
        parse_calls: bool | None = None,
        ids: Callable[[], str] = new_id,
        said: str = "",
    ):
        self.dialect, tools = dialect, list(tools)
        self.parse_calls: bool = bool(tools) if parse_calls is None else parse_calls
        self.format: CallFormat | None = dialect.format if self.parse_calls else None
        self.source, self.calls = TextReader(), Calls(tools, ids)
        self.output = WhitespaceFilter("think" if thinking else "answer", said)
        self._reasoning_seen = thinking or bool(said)  # whether there was reasoning, or none can follow
        self._at_line_start = said.endswith("\n")  # the output begins at the start of a line
        self._reread_chars, self._num_broken = MAX_REREAD_CHARS, 0
        self.open_call = False  # after finish(cut=True): the stream ended inside a call
        self._set_marks()
        harmony = dialect.format is not None and dialect.format.style == "harmony"
        self._events = Harmony(self).read() if harmony else self._read()

    def feed(self, text: str) -> list[Event]:
        """Appends text and returns the events that are certain."""
        self.source.feed(text)
        return list(self._ready())

    def finish(self, cut: bool = False) -> list[Event]:
        """Returns the remaining events. `cut`: the model did not end the output, so an incomplete call stays open."""
        if cut and self.calls.open:
            self.open_call = True
            return []
        self.source.ended, self.source.cut = True, cut
        return list(self._ready())

    def _ready(self) -> Iterator[Event]:
        """Yields events until the reader needs more text."""
        for event in self._events:
            if event is None:
                return
            yield event

    def _read(self) -> Iterator[Event | None]:
        """Yields the events of an output."""
        while mark := (yield from self._read_text()):
            if mark in self.dialect.think:
                yield from self._read_reasoning(mark)
            elif self.format and mark in self.format.ends + ("```",):
                if self.output.behind_call:
                    self.output.end_mark()
                else:
                    yield from self.output.show(mark)
            elif self.format and mark in self.format.sections + ("```json",):
                self.output.wait(mark)
            else:
                yield from self.call(mark, read_bare if mark[-1] in BARE else read_marked)
        yield from self.output.rest()

    def _read_text(self) -> Generator[Event | None, None, str]:
        """Emits text and returns the mark after it, empty at the end."""
        source = self.source
        while True:
            thinking = self.output.kind == "think" and not self.dialect.calls_in_thought
            if self._bare and not thinking and (self.output.fresh or self._at_line_start):
                self._at_line_start = False
                yield from self.output.show((yield from source.space()))
                char = yield from source.char()
                if char in BARE and char:
                    source.at += 1
                    return char
            marks_behind = self._marks_behind if self.output.behind_call else self._marks
            text, mark = source.until(marks_of(*self.dialect.think) if thinking else marks_behind)
            yield from self.output.show(text)
            if mark[:1] == "\n":
                yield from self.output.show("\n")
            if mark or (source.ended and source.at >= len(source.text)):
                return mark
            if not source.ended:
                yield None

    def _set_marks(self) -> None:
        """Sets the marks to search for: in text, and after a call, where a mark may end it."""
        call_format, self._bare = self.format, False
        self._marks = self._marks_behind = marks_of(*self.dialect.think)
        if call_format is not None:
            self._bare = call_format.style in ("bare", "pythonic")
            bare = ("\n{", "\n[", "```json") if self._bare else ()
            self._marks = marks_of(*self.dialect.think, *call_format.starts, *call_format.sections, *bare)
            self._marks_behind = marks_of(*self._marks.all, *call_format.ends, *(bare and ("```",)))

    def _read_reasoning(self, mark: str) -> Iterator[Event]:
        """Opens or closes the reasoning block, or emits a mark that is part of the text."""
        output, opens = self.output, mark == self.dialect.think[0]
        if opens and output.kind == "answer":
            is_mark = output.fresh or (not self._reasoning_seen and output.last == "\n")
        elif opens:
            is_mark = output.fresh
        elif output.kind == "answer":
            is_mark = output.fresh or not self._reasoning_seen
        else:
            is_mark = True
        if not is_mark:
            yield from output.show(mark)
            return
        stray_close = not opens and output.kind == "answer" and not output.fresh
        self._reasoning_seen = True
        if stray_close:  # the mark is dropped, the text around it stays as it is
            return
        yield from output.turn("think" if opens else "answer")

    def call(self, mark: str, reader: Callable[..., Iterator[Event | None]]) -> Iterator[Event | None]:
        """Runs `reader` on the text after `mark` and yields its events; emits the text itself when that is not a
        call.
        """
        source = self.source
        source.keep(len(mark.lstrip("\n")))
        layout = ""
        try:
            for event in reader(source, self.calls, self.format, mark):
                if isinstance(event, CallStart):
                    if source.cut:  # the call began at the end of a cut stream
                        self.calls.index, self.calls.open = self.calls.index - 1, False
                        raise Broken
                    layout = self.output.drop()
                elif isinstance(event, Text):  # white space after a call
                    yield from self.output.show(event.text)
                    continue
                yield event
                if isinstance(event, CallEnd):
                    source.release()
                    self.output.after_call(layout)
                    layout = ""
        except Broken:
            yield from self.output.show(layout)
            yield from self._emit_broken_call()
        source.release()

    def _emit_broken_call(self) -> Iterator[Event]:
        """Emits the text of a broken call. The text within it is read again, because it may contain a call."""
        raw, lead = self.source.raw(), self.source.lead
        self.calls.open = False
        self._num_broken += 1
        if self._num_broken >= MAX_BROKEN_CALLS or self.calls.index + 1 >= MAX_CALLS:
            self.format = None
            self._set_marks()
        if raw and len(raw) - lead <= self._reread_chars:
            self._reread_chars -= len(raw) - lead
            self.source.again(raw)
            raw = raw[:lead]
        yield from self.output.show(raw)
