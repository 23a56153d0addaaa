"""The text stream that readers parse: a short buffer, and steps that wait where the next character decides.

Readers are generators. They yield None where they need more text, so they are written as if all text were there, and
cannot depend on how the stream was split: a step either has all the text it needs or waits.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, None, T]

WHITESPACE = " \t\r\n"
_SPACES = re.compile("[ \t\r\n]*")


class NotACall(Exception):
    """Text that began like a call is not one."""


class Marks:
    """Fixed strings to search for, the longest first."""

    def __init__(self, marks: Iterable[str]):
        self.all = sorted(set(marks), key=lambda mark: (-len(mark), mark))
        self.pattern = re.compile("|".join(map(re.escape, self.all)) or r"(?!)")
        self.longest = max(map(len, self.all), default=0)
        self.first_chars = {mark[0] for mark in self.all}

    def may_continue(self, text: str) -> bool:
        """Whether more text may turn `text` into a mark, or into a longer one."""
        return any(len(mark) > len(text) and mark.startswith(text) for mark in self.all)

    def partial_start(self, text: str, at: int) -> int:
        """Returns the position at the end of `text` where an incomplete mark may begin; its length if there is none."""
        start = max(at, len(text) - self.longest + 1)
        return next(
            (n for n in range(start, len(text)) if text[n] in self.first_chars and self.may_continue(text[n:])),
            len(text),
        )


@lru_cache(maxsize=1024)
def marks_of(*marks: str) -> Marks:
    """Returns the marks that are not empty."""
    return Marks(mark for mark in marks if mark)


class TextReader:
    """Text that has arrived but was not consumed; text that a call consumed is recorded until the call is complete.

    `text` is the buffer and `pos` the position of the next character in it. `finished` is whether no more text comes,
    `cut` whether the stream then ended without the model's end.
    """

    def __init__(self) -> None:
        self.text, self.pos, self.finished, self.cut = "", 0, False, False
        self._recorded: list[str] | None = None  # text that the call consumed from earlier buffers
        self._call_start = 0  # position of the call's start in this buffer
        self.lead = 0  # its first characters, in which no other call begins

    def feed(self, piece: str) -> None:
        """Appends text."""
        if self._recorded is not None:
            self._recorded.append(self.text[self._call_start : self.pos])
            self._call_start = 0
        self.text, self.pos = self.text[self.pos :] + piece, 0

    def start_call(self, back: int = 0) -> None:
        """Starts recording a call that began `back` characters ago."""
        self._recorded, self._call_start, self.lead = [], self.pos - back, back

    def mark_lead(self) -> None:
        """Marks the recorded text as this call's beginning, in which no other call is searched if this one is
        broken.
        """
        self.lead = len(self.recorded_text())

    def end_call(self) -> None:
        """Ends recording: the call is complete, or not one."""
        self._recorded = None

    def recorded_text(self) -> str:
        """Returns the text that was consumed since the start of the call, see `start_call`."""
        return "" if self._recorded is None else "".join(self._recorded) + self.text[self._call_start : self.pos]

    def rewind(self, raw: str) -> None:
        """Rewinds to after the call's beginning. Text of earlier buffers is copied, at most once a piece."""
        if self._recorded:
            self.text, self.pos = raw[self.lead :] + self.text[self.pos :], 0
        else:
            self.pos = self._call_start + self.lead

    def peek_char(self) -> Step[str]:
        """Returns the next character without consuming it; empty at the end."""
        while self.pos >= len(self.text) and not self.finished:
            yield
        return self.text[self.pos : self.pos + 1]

    def read_whitespace(self) -> Step[str]:
        """Consumes and returns all white space that comes next; waits while more of it may arrive."""
        pieces: list[str] = []
        while True:
            match = _SPACES.match(self.text, self.pos)
            assert match is not None
            pieces.append(match.group())
            self.pos = match.end()
            if self.pos < len(self.text) or self.finished:
                return "".join(pieces)
            yield

    def peek_mark(self, marks: Marks) -> Step[str]:
        """Returns the mark that comes next without consuming it; empty if none does."""
        while True:
            rest = self.text[self.pos : self.pos + marks.longest]
            if self.finished or not marks.may_continue(rest):
                return next((mark for mark in marks.all if rest.startswith(mark)), "")
            yield

    def accept_mark(self, marks: Marks) -> Step[str]:
        """Consumes and returns the mark that comes next; empty if none does."""
        mark = yield from self.peek_mark(marks)
        self.pos += len(mark)
        return mark

    def read_until(self, marks: Marks) -> tuple[str, str]:
        """Consumes and returns the text that is certainly before any mark, and the mark after it; an empty mark while
        none is certain.
        """
        match = marks.pattern.search(self.text, self.pos)
        end = match.start() if match else len(self.text)
        if not self.finished and match is None:
            end = marks.partial_start(self.text, self.pos)  # the text may end in the beginning of a mark
        elif not self.finished and marks.may_continue(self.text[end : end + marks.longest]):
            match = None  # more text may make it a longer mark
        text, mark = self.text[self.pos : end], match.group() if match else ""
        self.pos = end + len(mark)
        return text, mark

    def read_short_until(self, marks: Marks, limit: int) -> Step[tuple[str, str]]:
        """Consumes and returns a short text up to a mark, and the mark, which is not consumed; an empty mark if none
        comes within `limit` characters.
        """
        result = ""
        while True:
            text, mark = self.read_until(marks)
            result += text
            if len(result) > limit:  # what is beyond stays unread
                self.pos -= len(mark) + len(result) - limit
                return result[:limit], ""
            if mark or (self.finished and self.pos >= len(self.text)):
                self.pos -= len(mark)
                return result, mark
            yield
