"""Calls as JSON objects: {"name": ..., "arguments": {...}}, alone or in a list, the members in any order."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ktx.chat_formats.calls import Calls, read_arguments, stream_call
from ktx.chat_formats.events import Event
from ktx.chat_formats.json_repair import collect
from ktx.chat_formats.reader import Broken, Marks, TextReader, Wait

# a family's own words first: without marks around the object, only the first two of each make it a call
NAMES = ("name", "function", "tool", "tool_name", "function_name")
ARGUMENTS = ("arguments", "parameters", "args", "input")
IDS = ("id", "call_id", "tool_call_id")
OTHERS = ("type", "index")  # said beside a call, and not needed


class ObjectCall:
    """One call object, taken from `{` on. `sure` is whether its marks already say that it is a call."""

    def __init__(self, source: TextReader, calls: Calls, ends: Marks, sure: bool):
        self.source, self.calls, self.ends, self.sure = source, calls, ends, sure
        self.name = self.id = ""
        self.early: list[str] | None = None  # arguments that came before the name
        self.told = False
        self.inner = 0  # braces of an inner {"function": {...}}

    def read(self) -> Iterator[Event | None]:
        self.source.at += 1
        while not self.told:
            key = yield from self._key()
            if key == "":
                break
            yield from self._member(key)
        if not self.told:
            yield from self._without_arguments()
            return
        yield from self._rest()

    def _key(self) -> Wait[str]:
        """The next member's key, its colon taken; empty behind the last member."""
        while True:
            yield from self.source.space()
            char = yield from self.source.char()
            if char == "}" and self.inner:
                self.inner -= 1
            elif char in ("}", ""):
                self.source.at += len(char)
                return ""
            elif char != ",":
                break
            self.source.at += 1
        if (yield from self.source.comes(self.ends)):
            return ""
        return (yield from _key(self.source))

    def _member(self, key: str) -> Iterator[Event | None]:
        char = yield from self.source.char()
        if key == "function" and char == "{" and not self.inner:
            self.inner += 1
            self.source.at += 1
        elif key in (NAMES if self.sure else NAMES[:2]) and not self.name:
            self.name = yield from _string(self.source)
            if self.early is not None:
                yield from self._late_name()
        elif key in (ARGUMENTS if self.sure else ARGUMENTS[:2]) and self.early is None:
            yield from self._arguments()
        elif key in IDS or key in OTHERS:
            text = yield from self._skip()
            if key in IDS and text.startswith('"'):
                self.id = json.loads(text)[:256]
        else:
            raise Broken  # an object about something else

    def _arguments(self) -> Iterator[Event | None]:
        if self.name and (yield from self.source.char()) in '{"n':
            yield from self._stream()
            return
        self.early = []
        for piece in read_arguments(self.source, self.ends):
            if piece is None:
                yield None
            else:
                self.early.append(piece)

    def _stream(self) -> Iterator[Event | None]:
        yield from stream_call(self.source, self.calls, self.ends, self.name, self.id)
        self.told = True

    def _late_name(self) -> Iterator[Event | None]:
        yield from self.calls.whole(self.name, "".join(self.early or ["{}"]), self.id)
        self.told = True

    def _without_arguments(self) -> Iterator[Event | None]:
        """A name alone is a call where marks say so, or where a function is called so."""
        if not self.name or not (self.sure or self.calls.known(self.name) in self.calls.schemas):
            raise Broken
        yield from self.calls.whole(self.name, id=self.id)

    def _skip(self) -> Wait[str]:
        text = yield from collect(self.source)
        if text is None:
            raise Broken
        return text

    def _rest(self) -> Wait[None]:
        """What follows the arguments up to the object's end. Nothing in it can undo the call."""
        try:
            while (yield from self._key()):
                yield from self._skip()
        except Broken:
            pass


def read_list(source: TextReader, calls: Calls, ends: Marks, sure: bool = True) -> Iterator[Event | None]:
    """[{...}, {...}], from `[` on."""
    before = calls.index
    while True:
        source.at += 1  # the bracket or a comma
        yield from source.space()
        if (yield from source.char()) != "{":
            break
        if calls.index > before:
            source.keep()
        yield from ObjectCall(source, calls, ends, sure).read()
        yield from source.space()
        if (yield from source.char()) != ",":
            break
    char = yield from source.char()
    if calls.index == before or char not in ("]", ""):
        raise Broken
    source.at += len(char)


def _key(source: TextReader) -> Wait[str]:
    """A key and its colon, in short: what is longer than any key of a call is about something else."""
    char = yield from source.char()
    if char in "\"'":
        source.at += 1
        key, mark = yield from source.upto(_QUOTES[char], 40)
        source.at += len(mark)
    else:
        key, _ = yield from source.upto(_COLON, 40)
    yield from source.space()
    if (yield from source.char()) != ":" or not key:
        raise Broken
    source.at += 1
    yield from source.space()
    return key.strip()


def _string(source: TextReader) -> Wait[str]:
    if (yield from source.char()) not in ('"', "'"):
        raise Broken
    text = yield from collect(source)
    name = str(json.loads(text)) if text else ""
    if not name or len(name) > 256:
        raise Broken
    return name.strip()


_QUOTES = {quote: Marks((quote,)) for quote in "\"'"}
_COLON = Marks((":",))
