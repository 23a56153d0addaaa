"""Reads calls that are JSON objects: {"name": ..., "arguments": {...}}, alone or in a list, with the members in any
order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ktx.chat_formats.calls import Calls, read_arguments, stream_call
from ktx.chat_formats.events import Event
from ktx.chat_formats.json_repair import collect
from ktx.chat_formats.reader import Broken, Marks, TextReader, Wait

# a family's own keys first: without marks around the object, only the first two of each make it a call
NAME_KEYS = ("name", "function", "tool", "tool_name", "function_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
ID_KEYS = ("id", "call_id", "tool_call_id")
IGNORED_KEYS = ("type", "index")  # other keys of a call, which are ignored


class ObjectCall:
    """One call object, read from `{` on. `sure`: its marks already show that it is a call."""

    def __init__(self, source: TextReader, calls: Calls, ends: Marks, sure: bool):
        self.source, self.calls, self.ends, self.sure = source, calls, ends, sure
        self.name = self.id = ""
        self._early_arguments: list[str] | None = None  # arguments before the name
        self._emitted = False
        self._inner_braces = 0  # open braces of an inner {"function": {...}}

    def read(self) -> Iterator[Event | None]:
        """Yields the events of the call. Broken when the object is not one."""
        self.source.at += 1
        while not self._emitted:
            key = yield from self._key()
            if key == "":
                break
            yield from self._member(key)
        if not self._emitted:
            yield from self._without_arguments()
            return
        yield from self._rest()

    def _key(self) -> Wait[str]:
        """Returns the next member's key and consumes its colon; empty after the last member."""
        while True:
            yield from self.source.space()
            char = yield from self.source.char()
            if char == "}" and self._inner_braces:
                self._inner_braces -= 1
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
        """Reads one member's value."""
        char = yield from self.source.char()
        if key == "function" and char == "{" and not self._inner_braces:
            self._inner_braces += 1
            self.source.at += 1
        elif key in (NAME_KEYS if self.sure else NAME_KEYS[:2]) and not self.name:
            self.name = yield from _string(self.source)
            if self._early_arguments is not None:
                yield from self._late_name()
        elif key in (ARGUMENT_KEYS if self.sure else ARGUMENT_KEYS[:2]) and self._early_arguments is None:
            yield from self._arguments()
        elif key in ID_KEYS or key in IGNORED_KEYS:
            text = yield from self._skip()
            if key in ID_KEYS and text.startswith('"'):
                self.id = json.loads(text)[:256]
        else:
            raise Broken  # not a call object

    def _arguments(self) -> Iterator[Event | None]:
        """Streams the arguments if the name is known, otherwise stores them until it is."""
        if self.name and (yield from self.source.char()) in '{"n':
            yield from self._stream()
            return
        self._early_arguments = []
        for piece in read_arguments(self.source, self.ends):
            if piece is None:
                yield None
            else:
                self._early_arguments.append(piece)

    def _stream(self) -> Iterator[Event | None]:
        yield from stream_call(self.source, self.calls, self.ends, self.name, self.id)
        self._emitted = True

    def _late_name(self) -> Iterator[Event | None]:
        """Emits the call when its name follows its arguments."""
        yield from self.calls.whole(self.name, "".join(self._early_arguments or ["{}"]), self.id)
        self._emitted = True

    def _without_arguments(self) -> Iterator[Event | None]:
        """Emits a call that has only a name, if marks show a call or a function has this name."""
        if not self.name or not (self.sure or self.calls.known(self.name) in self.calls.schemas):
            raise Broken
        yield from self.calls.whole(self.name, id=self.id)

    def _skip(self) -> Wait[str]:
        """Reads a value and returns its text."""
        text = yield from collect(self.source)
        if text is None:
            raise Broken
        return text

    def _rest(self) -> Wait[None]:
        """Skips the members after the arguments, up to the object's end. No error there makes the call invalid."""
        try:
            while (yield from self._key()):
                yield from self._skip()
        except Broken:
            pass


def read_list(source: TextReader, calls: Calls, ends: Marks, sure: bool = True) -> Iterator[Event | None]:
    """Reads calls [{...}, {...}], from `[` on."""
    index_before = calls.index
    while True:
        source.at += 1  # the bracket or a comma
        yield from source.space()
        if (yield from source.char()) != "{":
            break
        if calls.index > index_before:
            source.keep()
        yield from ObjectCall(source, calls, ends, sure).read()
        yield from source.space()
        if (yield from source.char()) != ",":
            break
    char = yield from source.char()
    if calls.index == index_before or char not in ("]", ""):
        raise Broken
    source.at += len(char)


def _key(source: TextReader) -> Wait[str]:
    """Returns a key and consumes its colon; a text longer than any key of a call is not one."""
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
    """Returns a function's name from a JSON string."""
    if (yield from source.char()) not in ('"', "'"):
        raise Broken
    text = yield from collect(source)
    name = str(json.loads(text)) if text else ""
    if not name or len(name) > 256:
        raise Broken
    return name.strip()


_QUOTES = {quote: Marks((quote,)) for quote in "\"'"}
_COLON = Marks((":",))
