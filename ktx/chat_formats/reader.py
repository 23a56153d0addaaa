"""The stream as a reader sees it: a short buffer, and steps that wait where the next character decides.

Readers are generators. They yield None where they need more text, so a format reads like a paragraph and cannot depend
on how the stream was cut: a step either has all it needs or waits.
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
    """What began like a call cannot be understood as one."""


class Marks:
    """Fixed strings to look for, the longest first."""

    def __init__(self, marks: Iterable[str]):
        self.all = sorted(set(marks), key=lambda mark: (-len(mark), mark))
        self.pattern = re.compile("|".join(map(re.escape, self.all)) or r"(?!)")
        self.longest = max(map(len, self.all), default=0)
        self.firsts = {mark[0] for mark in self.all}

    def unsure(self, text: str) -> bool:
        """Whether `text` may yet become a mark, or a longer one than it is."""
        return any(len(mark) > len(text) and mark.startswith(text) for mark in self.all)

    def partial(self, text: str, at: int) -> int:
        """Where a mark may have begun at the end of `text`; its length when none has."""
        start = max(at, len(text) - self.longest + 1)
        return next((n for n in range(start, len(text)) if text[n] in self.firsts and self.unsure(text[n:])), len(text))


@lru_cache(maxsize=1024)
def marks_of(*marks: str) -> Marks:
    """The marks that are not empty."""
    return Marks(mark for mark in marks if mark)


class TextReader:
    """Text that has come but is not used up; what a call took is kept until the call is sure."""

    def __init__(self) -> None:
        self.text, self.at, self.ended, self.cut = "", 0, False, False
        self.kept: list[str] | None = None  # what the call took from earlier buffers
        self.start = 0  # where the call starts in this buffer
        self.lead = 0  # characters of it that begin no other call

    def feed(self, piece: str) -> None:
        if self.kept is not None:
            self.kept.append(self.text[self.start : self.at])
            self.start = 0
        self.text, self.at = self.text[self.at :] + piece, 0

    def keep(self, back: int = 0) -> None:
        """A call begins `back` characters ago."""
        self.kept, self.start, self.lead = [], self.at - back, back

    def begun(self) -> None:
        """What was taken so far begins this call, and no other if this one is broken."""
        self.lead = len(self.raw())

    def release(self) -> None:
        """The call is sure, or given up."""
        self.kept = None

    def raw(self) -> str:
        """What was taken since `keep`."""
        return "" if self.kept is None else "".join(self.kept) + self.text[self.start : self.at]

    def again(self, raw: str) -> None:
        """Back to behind what begins the call. Text of earlier buffers is copied: at most once a piece."""
        if self.kept:
            self.text, self.at = raw[self.lead :] + self.text[self.at :], 0
        else:
            self.at = self.start + self.lead

    def char(self) -> Wait[str]:
        """The next character, not taken; empty at the end."""
        while self.at >= len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def space(self) -> Wait[str]:
        """White space, taken."""
        taken: list[str] = []
        while True:
            match = _SPACES.match(self.text, self.at)
            assert match is not None
            taken.append(match.group())
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return "".join(taken)
            yield

    def comes(self, marks: Marks) -> Wait[str]:
        """The mark that comes next, not taken; empty when none does."""
        while True:
            rest = self.text[self.at : self.at + marks.longest]
            if self.ended or not marks.unsure(rest):
                return next((mark for mark in marks.all if rest.startswith(mark)), "")
            yield

    def accept(self, marks: Marks) -> Wait[str]:
        """The mark that comes next, taken."""
        mark = yield from self.comes(marks)
        self.at += len(mark)
        return mark

    def until(self, marks: Marks) -> tuple[str, str]:
        """Text that surely lies before any mark, and the mark behind it, both taken; no mark while none is sure."""
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
        """A short text up to a mark, which is not taken; no mark when none comes within `limit` characters."""
        taken = ""
        while True:
            text, mark = self.until(marks)
            taken += text
            if len(taken) > limit:
                self.at -= len(mark) + len(taken) - limit
                return taken[:limit], ""
            if mark or (self.ended and self.at >= len(self.text)):
                self.at -= len(mark)
                return taken, mark
            yield
