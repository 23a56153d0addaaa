"""Parses a model's output while it arrives into reasoning, content and tool calls.

The events do not depend on how the text was split. Text that is not a valid call is emitted as text. The work is
bounded: each character is read once, except for those of broken calls, which are read again within limits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from ktx.chat_formats.bare_calls import read_bare
from ktx.chat_formats.calls import MAX_CALLS, CallEvents, new_id
from ktx.chat_formats.events import CallEnd, CallStart, Event, Text
from ktx.chat_formats.harmony import Harmony
from ktx.chat_formats.reader import NotACall, TextReader, marks_of
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
        chat_format: the model's chat format.
        tools: the request's tools.
        thinking: the prompt has opened the reasoning block.
        parse_calls: whether to parse calls; None: if there are tools.
        ids: returns a new call id.
        prefill_text: text at the prompt's end that the output continues.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        tools: Iterable[Mapping[str, Any]] = (),
        thinking: bool = False,
        parse_calls: bool | None = None,
        ids: Callable[[], str] = new_id,
        prefill_text: str = "",
    ):
        """Starts at the output's beginning, with the reader of the family's format."""
        self.chat_format, tools = chat_format, list(tools)
        self.parse_calls: bool = bool(tools) if parse_calls is None else parse_calls
        self.call_format: CallFormat | None = chat_format.call_format if self.parse_calls else None
        self.reader, self.calls = TextReader(), CallEvents(tools, ids)
        self.output = WhitespaceFilter("think" if thinking else "answer", prefill_text)
        self._reasoning_seen = thinking or bool(prefill_text)  # whether there was reasoning, or none can follow
        self._at_line_start = prefill_text.endswith("\n")  # the output begins at the start of a line
        # how many characters of broken calls may still be read again, and the number of broken calls
        self._reread_chars, self._num_broken = MAX_REREAD_CHARS, 0
        self.open_call = False  # after finish(cut=True): the stream ended inside a call
        self._set_marks()
        harmony = chat_format.call_format is not None and chat_format.call_format.style == "harmony"
        self._events = Harmony(self).read() if harmony else self._read()

    def feed(self, text: str) -> list[Event]:
        """Appends text and returns the events that are certain."""
        self.reader.feed(text)
        return list(self._ready())

    def finish(self, cut: bool = False) -> list[Event]:
        """Returns the remaining events. `cut`: the model did not end the output, so an incomplete call stays open."""
        if cut and self.calls.open:
            self.open_call = True
            return []
        self.reader.finished, self.reader.cut = True, cut
        return list(self._ready())

    def _ready(self) -> Iterator[Event]:
        """Yields events until the reader needs more text."""
        for event in self._events:
            if event is None:
                return
            yield event

    def _read(self) -> Iterator[Event | None]:
        """Yields the events of an output: text up to a mark, then what the mark begins. Not for Harmony's messages."""
        while mark := (yield from self._read_text()):
            if mark in self.chat_format.reasoning_marks:
                yield from self._read_reasoning(mark)
            elif self.call_format and mark in (*self.call_format.ends, "```"):  # layout after a call, else text
                if self.output.after_call_only:
                    self.output.end_mark()
                else:
                    yield from self.output.emit(mark)
            elif self.call_format and mark in (*self.call_format.sections, "```json"):  # layout before a call
                self.output.hold_mark(mark)
            else:
                yield from self.read_call(mark, read_bare if mark[-1] in BARE else read_marked)
        yield from self.output.flush()

    def _read_text(self) -> Generator[Event | None, None, str]:
        """Emits text and returns the mark after it, empty at the end.

        Calls without marks begin at the start of a line: there the first character is peeked at, and "{" or "[" counts
        as a mark. Within reasoning only its own marks are searched, unless the family calls from there.
        """
        source = self.reader
        while True:
            thinking = self.output.kind == "think" and not self.chat_format.calls_in_reasoning
            if self._calls_without_marks and not thinking and (self.output.after_mark or self._at_line_start):
                self._at_line_start = False
                yield from self.output.emit((yield from source.read_whitespace()))
                char = yield from source.peek_char()
                if char in BARE and char:
                    source.pos += 1
                    return char
            marks_in_text = self._marks_after_call if self.output.after_call_only else self._marks
            text, mark = source.read_until(marks_of(*self.chat_format.reasoning_marks) if thinking else marks_in_text)
            yield from self.output.emit(text)
            if mark[:1] == "\n":  # of a mark of two characters, such as "\n{", the line break is text
                yield from self.output.emit("\n")
            if mark or (source.finished and source.pos >= len(source.text)):
                return mark
            if not source.finished:
                yield None

    def _set_marks(self) -> None:
        """Sets the marks to search for: in text, and after a call, where a mark may end it."""
        call_format, self._calls_without_marks = self.call_format, False
        self._marks = self._marks_after_call = marks_of(*self.chat_format.reasoning_marks)
        if call_format is not None:
            self._calls_without_marks = call_format.style in ("bare", "pythonic")
            bare = ("\n{", "\n[", "```json") if self._calls_without_marks else ()
            self._marks = marks_of(*self.chat_format.reasoning_marks, *call_format.starts, *call_format.sections, *bare)
            self._marks_after_call = marks_of(*self._marks.all, *call_format.ends, *(bare and ("```",)))

    def _read_reasoning(self, mark: str) -> Iterator[Event]:
        """Opens or closes the reasoning block, or emits a mark that is part of the text.

        Models also write the marks in prose. Right after another mark, and at the output's start, each mark counts.
        Elsewhere an opening mark counts at the start of a line as long as there was no reasoning; a closing one counts
        within reasoning, and in content as long as there was no reasoning.
        """
        output, opens = self.output, mark == self.chat_format.reasoning_marks[0]
        if opens and output.kind == "answer":
            is_mark = output.after_mark or (not self._reasoning_seen and output.last == "\n")
        elif opens:
            is_mark = output.after_mark
        elif output.kind == "answer":
            is_mark = output.after_mark or not self._reasoning_seen
        else:
            is_mark = True
        if not is_mark:
            yield from output.emit(mark)
            return
        stray_close = not opens and output.kind == "answer" and not output.after_mark
        self._reasoning_seen = True
        if stray_close:  # the mark is dropped, the text around it stays as it is
            return
        yield from output.switch_kind("think" if opens else "answer")

    def read_call(self, mark: str, reader: Callable[..., Iterator[Event | None]]) -> Iterator[Event | None]:
        """Runs `reader` on the text after `mark` and yields its events; emits the text itself when the reader raises
        NotACall.

        The reader's text is recorded until a call is complete, because a call that turns out to be broken is text.
        White space before the call is layout: it is dropped when the call starts, and emitted when it is broken.
        """
        source = self.reader
        source.start_call(len(mark.lstrip("\n")))
        layout = ""
        try:
            for event in reader(source, self.calls, self.call_format, mark):
                if isinstance(event, CallStart):
                    if source.cut:  # the call began at the end of a cut stream
                        self.calls.index, self.calls.open = self.calls.index - 1, False
                        raise NotACall
                    layout = self.output.drop_pending()
                elif isinstance(event, Text):  # white space after a call
                    yield from self.output.emit(event.text)
                    continue
                yield event
                if isinstance(event, CallEnd):
                    source.end_call()
                    self.output.after_call(layout)
                    layout = ""
        except NotACall:
            yield from self.output.emit(layout)
            yield from self._emit_broken_call()
        source.end_call()

    def _emit_broken_call(self) -> Iterator[Event]:
        """Emits the text of a broken call. The text within it is read again, because it may contain a call."""
        raw, lead = self.reader.recorded_text(), self.reader.lead
        self.calls.open = False
        self._num_broken += 1
        if self._num_broken >= MAX_BROKEN_CALLS or self.calls.index + 1 >= MAX_CALLS:
            self.call_format = None  # from now on all is text, so that reading again stays cheap
            self._set_marks()
        # the first `lead` characters, in which no other call begins, are text; the rest is read again
        if raw and len(raw) - lead <= self._reread_chars:
            self._reread_chars -= len(raw) - lead
            self.reader.rewind(raw)
            raw = raw[:lead]
        yield from self.output.emit(raw)
