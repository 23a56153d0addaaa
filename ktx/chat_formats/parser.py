"""The model's text, read while it comes: reasoning, answer and calls told apart.

The events do not depend on how the text was cut. What cannot be understood as a call is shown as the text it is. The
work is bounded: every character is read once, but for those of broken calls, which are read again within limits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from ktx.chat_formats.bare_calls import read_bare
from ktx.chat_formats.calls import MOST, Calls, new_id
from ktx.chat_formats.events import CallEnd, CallStart, Event, Text
from ktx.chat_formats.harmony import Harmony
from ktx.chat_formats.reader import Broken, TextReader, marks_of
from ktx.chat_formats.registry import CallFormat, ChatFormat
from ktx.chat_formats.tagged_calls import read_marked
from ktx.chat_formats.whitespace import WhitespaceFilter

MAX_REREAD_CHARS = 1 << 16  # characters of broken calls that are searched for calls within them
MAX_BROKEN_CALLS = 1000  # broken calls after which the rest is text
BARE = "{", "["  # what calls without a mark begin with, at the start of a line


class Parser:
    """Reads one answer of one request.

    `thinking`: the prompt has opened the reasoning block. `said`: what the prompt says in the block where it ends, the
    beginning of the text that comes. `parse_calls`: whether calls are looked for, by default where there are tools.
    What looks like a call inside the reasoning block is reasoning, unless the family calls from there: nobody runs what
    a model only thinks about.
    Arguments are told while they come, so it may turn out late that they are no JSON: the call then has no CallEnd, and
    all its text follows as Text. Whoever collects a message leaves out calls without CallEnd.
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
        self.seen = thinking or bool(said)  # whether there was any reasoning, or none will come any more
        self.begins = said.endswith("\n")  # what comes first begins a line
        self.again, self.broken = MAX_REREAD_CHARS, 0
        self.open_call = False  # after finish(cut=True): the stream ended inside a call
        self._look()
        harmony = dialect.format is not None and dialect.format.style == "harmony"
        self.reading = Harmony(self).read() if harmony else self._read()

    def feed(self, text: str) -> list[Event]:
        """What `text` makes sure."""
        self.source.feed(text)
        return list(self._ready())

    def finish(self, cut: bool = False) -> list[Event]:
        """The rest. `cut`: the model did not end by itself, so a call that is not whole stays open."""
        if cut and self.calls.open:
            self.open_call = True
            return []
        self.source.ended, self.source.cut = True, cut
        return list(self._ready())

    def _ready(self) -> Iterator[Event]:
        for event in self.reading:
            if event is None:
                return
            yield event

    def _read(self) -> Iterator[Event | None]:
        while mark := (yield from self._text()):
            if mark in self.dialect.think:
                yield from self._reasoning(mark)
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

    def _text(self) -> Generator[Event | None, None, str]:
        """Shows text; returns the mark behind it, empty at the end."""
        source = self.source
        while True:
            thinking = self.output.kind == "think" and not self.dialect.calls_in_thought
            if self._bare and not thinking and (self.output.fresh or self.begins):
                self.begins = False
                yield from self.output.show((yield from source.space()))
                char = yield from source.char()
                if char in BARE and char:
                    source.at += 1
                    return char
            behind = self._marks_behind if self.output.behind_call else self._marks
            text, mark = source.until(marks_of(*self.dialect.think) if thinking else behind)
            yield from self.output.show(text)
            if mark[:1] == "\n":
                yield from self.output.show("\n")
            if mark or (source.ended and source.at >= len(source.text)):
                return mark
            if not source.ended:
                yield None

    def _look(self) -> None:
        """What is looked for: in text, and behind a call, where a mark may end it."""
        format, self._bare = self.format, False
        self._marks = self._marks_behind = marks_of(*self.dialect.think)
        if format is not None:
            self._bare = format.style in ("bare", "pythonic")
            bare = ("\n{", "\n[", "```json") if self._bare else ()
            self._marks = marks_of(*self.dialect.think, *format.starts, *format.sections, *bare)
            self._marks_behind = marks_of(*self._marks.all, *format.ends, *(bare and ("```",)))

    def _reasoning(self, mark: str) -> Iterator[Event]:
        """Opens or closes the block, or shows a mark that is only spoken of."""
        output, opens = self.output, mark == self.dialect.think[0]
        if opens and output.kind == "answer":
            real = output.fresh or (not self.seen and output.last == "\n")
        elif opens:
            real = output.fresh
        elif output.kind == "answer":
            real = output.fresh or not self.seen
        else:
            real = True
        if not real:
            yield from output.show(mark)
            return
        nothing_to_close = not opens and output.kind == "answer" and not output.fresh
        self.seen = True
        if nothing_to_close:  # the tag is left out, the text around it stays as it is
            return
        yield from output.turn("think" if opens else "answer")

    def call(self, mark: str, reader: Callable[..., Iterator[Event | None]]) -> Iterator[Event | None]:
        """What `reader` makes of the text behind `mark`; the text itself when that is no call."""
        source = self.source
        source.keep(len(mark.lstrip("\n")))
        layout = ""
        try:
            for event in reader(source, self.calls, self.format, mark):
                if isinstance(event, CallStart):
                    if source.cut:  # begun by the end of a stream that was cut
                        self.calls.index, self.calls.open = self.calls.index - 1, False
                        raise Broken
                    layout = self.output.drop()
                elif isinstance(event, Text):  # white space behind a call
                    yield from self.output.show(event.text)
                    continue
                yield event
                if isinstance(event, CallEnd):
                    source.release()
                    self.output.after_call(layout)
                    layout = ""
        except Broken:
            yield from self.output.show(layout)
            yield from self._no_call()
        source.release()

    def _no_call(self) -> Iterator[Event]:
        """The text of a call that is none. What lies within it is read again, for it may hold a call."""
        raw, lead = self.source.raw(), self.source.lead
        self.calls.open = False
        self.broken += 1
        if self.broken >= MAX_BROKEN_CALLS or self.calls.index + 1 >= MOST:
            self.format = None
            self._look()
        if raw and len(raw) - lead <= self.again:
            self.again -= len(raw) - lead
            self.source.again(raw)
            raw = raw[:lead]
        yield from self.output.show(raw)
