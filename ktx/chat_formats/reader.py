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
Wait = Generator[None, None, T]

SPACE = " \t\r\n"
_SPACES = re.compile("[ \t\r\n]*")


class Broken(Exception):
    """Text that began like a call is not one."""


class Marks:
    """Fixed strings to search for, the longest first."""

    def __init__(self, marks: Iterable[str]):
        self.all = sorted(set(marks), key=lambda mark: (-len(mark), mark))
        self.pattern = re.compile("|".join(map(re.escape, self.all)) or r"(?!)")
        self.longest = max(map(len, self.all), default=0)
        self.firsts = {mark[0] for mark in self.all}

    def unsure(self, text: str) -> bool:
        """Whether more text may turn `text` into a mark, or into a longer one."""
        return any(len(mark) > len(text) and mark.startswith(text) for mark in self.all)

    def partial(self, text: str, at: int) -> int:
        """Returns the position at the end of `text` where an incomplete mark may begin; its length if there is none."""
        start = max(at, len(text) - self.longest + 1)
        return next((n for n in range(start, len(text)) if text[n] in self.firsts and self.unsure(text[n:])), len(text))


@lru_cache(maxsize=1024)
def marks_of(*marks: str) -> Marks:
    """Returns the marks that are not empty."""
    return Marks(mark for mark in marks if mark)


class TextReader:
    """Text that has arrived but was not consumed; text that a call consumed is recorded until the call is complete."""

    def __init__(self) -> None:
        self.text, self.at, self.ended, self.cut = "", 0, False, False
        self._recorded: list[str] | None = None  # text that the call consumed from earlier buffers
        self._call_start = 0  # position of the call's start in this buffer
        self.lead = 0  # its first characters, in which no other call begins

    def feed(self, piece: str) -> None:
        """Appends text."""
        if self._recorded is not None:
            self._recorded.append(self.text[self._call_start : self.at])
            self._call_start = 0
        self.text, self.at = self.text[self.at :] + piece, 0

    def keep(self, back: int = 0) -> None:
        """Starts recording a call that began `back` characters ago."""
        self._recorded, self._call_start, self.lead = [], self.at - back, back

    def begun(self) -> None:
        """Marks the recorded text as this call's beginning, in which no other call is searched if this one is
        broken.
        """
        self.lead = len(self.raw())

    def release(self) -> None:
        """Ends recording: the call is complete, or not one."""
        self._recorded = None

    def raw(self) -> str:
        """Returns the text that was consumed since `keep`."""
        return "" if self._recorded is None else "".join(self._recorded) + self.text[self._call_start : self.at]

    def again(self, raw: str) -> None:
        """Rewinds to after the call's beginning. Text of earlier buffers is copied, at most once a piece."""
        if self._recorded:
            self.text, self.at = raw[self.lead :] + self.text[self.at :], 0
        else:
            self.at = self._call_start + self.lead

    def char(self) -> Wait[str]:
        """Returns the next character without consuming it; empty at the end."""
        while self.at >= len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def space(self) -> Wait[str]:
        """Consumes and returns white space."""
        pieces: list[str] = []
        while True:
            match = _SPACES.match(self.text, self.at)
            assert match is not None
            pieces.append(match.group())
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return "".join(pieces)
            yield

    def comes(self, marks: Marks) -> Wait[str]:
        """Returns the mark that comes next without consuming it; empty if none does."""
        while True:
            rest = self.text[self.at : self.at + marks.longest]
            if self.ended or not marks.unsure(rest):
                return next((mark for mark in marks.all if rest.startswith(mark)), "")
            yield

    def accept(self, marks: Marks) -> Wait[str]:
        """Consumes and returns the mark that comes next; empty if none does."""
        mark = yield from self.comes(marks)
        self.at += len(mark)
        return mark

    def until(self, marks: Marks) -> tuple[str, str]:
        """Consumes and returns the text that is certainly before any mark, and the mark after it; an empty mark while
        none is certain.
        """
        match = marks.pattern.search(self.text, self.at)
        end = match.start() if match else len(self.text)
        if not self.ended and match is None:
            end = marks.partial(self.text, self.at)
        elif not self.ended and marks.unsure(self.text[end : end + marks.longest]):
            match = None
        text, mark = self.text[self.at : end], match.group() if match else ""
        self.at = end + len(mark)
        return text, mark

    def upto(self, marks: Marks, limit: int) -> Wait[tuple[str, str]]:
        """Consumes and returns a short text up to a mark, and the mark, which is not consumed; an empty mark if none
        comes within `limit` characters.
        """
        result = ""
        while True:
            text, mark = self.until(marks)
            result += text
            if len(result) > limit:
                self.at -= len(mark) + len(result) - limit
                return result[:limit], ""
            if mark or (self.ended and self.at >= len(self.text)):
                self.at -= len(mark)
                return result, mark
            yield
